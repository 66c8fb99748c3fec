"""The README's figures are those of the files it names, its code runs, and it lists every deviation that dl marks."""
from __future__ import annotations

import re
import runpy

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from dl.config import REPO
from dl.report import interval

TEXT = (REPO / "README.md").read_text(encoding="utf-8")
MINI = REPO / "results/mini"
FIGURES = [        # what the section "What came out" says: file, experiment or space, system, column, the text
    ("table2", "zero_shot", "raw", "cider_d", "0.308"), ("table2", "zero_shot", "diffusion_link", "cider_d", "0.380"),
    ("table2", "zero_shot", "diffusion_link", "cider_d_relative_gain", "+23.3 % [+7.0 %, +43.1 %]"),
    ("table2", "zero_shot", "diffusion_link", "cider_d_minus_ridge", "+0.021 [-0.023, +0.068]"),
    ("table2", "zero_shot", "ridge", "cider_d", "0.359"), ("table2", "supervised", "raw", "cider_d", "0.332"),
    ("table2", "supervised", "diffusion_link", "cider_d", "0.343"),
    ("table2", "supervised", "diffusion_link", "cider_d_relative_gain", "+3.3 % [-15.6 %, +21.5 %]"),
    ("table1", "", "raw", "pair_cosine", "0.417"), ("table1", "", "diffusion_link", "pair_cosine", "0.475"),
    ("table1", "", "raw", "rmg", "0.378"), ("table1", "", "diffusion_link", "rmg", "0.355"),
    ("table1", "", "ridge", "rmg", "0.356"), ("table1", "", "text_floor", "pair_cosine", "0.797"),
    ("table1", "", "text_floor", "rmg", "0.174"), ("table1", "", "raw", "recall_at_10", "0.483"),
    ("table1", "", "diffusion_link", "recall_at_10", "0.481"),
]
PAPERS = ["+52.5 %", "+7.5 %"]                 # quoted from the paper's abstract


def section(title: str) -> str:
    """The text below a heading, up to the next one of its kind."""
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(("file", "experiment", "system", "column", "shown"), FIGURES)
def test_a_figure_is_that_of_its_file(file, experiment, system, column, shown):
    table = pd.read_csv(MINI / f"{file}.csv").query("system == @system and space == 'text'")
    row = (table[table.experiment == experiment] if experiment else table).squeeze()
    ends = [row[column + end] for end in ("", "_ci_low", "_ci_high")]
    expected = interval(*ends, form="+.1%" if "%" in shown else "+.3f") if "[" in shown else f"{row[column]:.3f}"
    assert shown == expected and shown in section("What came out")


def test_no_other_figure_is_told():
    told = section("What came out")
    for shown in sorted([figure[-1] for figure in FIGURES] + PAPERS, key=len, reverse=True):
        told = told.replace(shown, "")
    assert not re.search(r"\d\.\d|\d %", told.replace("95 %", ""))
    paper = pd.read_csv(REPO / "results/paper.csv", dtype=str, keep_default_na=False).set_index("claim").value
    assert PAPERS == [f"+{paper[claim]} %" for claim in ("C3", "C4")]
    verdicts = pd.read_csv(MINI / "claims.csv").set_index("id").verdict
    assert verdicts.to_dict() == {
        "C1": "not_supported", "C2": "not_supported", "C3": "supported", "C4": "partly_supported", "C5": "supported",
        "C6": "not_tested"}, "the README's first line of results says so"


def test_times_and_memory_are_those_of_the_files():
    timing = pd.read_csv(MINI / "timing.csv", dtype={"stage": str}).query("stage.str.isdigit()")
    gpu = pd.read_csv(REPO / "results/bench_gpu.csv").set_index("name")
    peaks = [gpu.query(f"section == 'llama_{part}' and batch == {batch}").value[name] for part, name, batch in (
        ("train", "peak_memory_checkpointed", 16), ("generate", "peak_memory_beam_4", 64))]
    hours = gpu.query("section == 'estimate'").value["total"]
    told = " ".join(TEXT.split())
    assert f"{timing.wall_s.sum():,.0f} s in all" in told
    assert f"{timing.peak_memory_mb.max() / 1000:.1f} GB of memory" in told
    assert (f"16 captions with gradient checkpointing takes {peaks[0]:.1f} GiB, beam search of 64 sequences "
            f"{peaks[1]:.1f} GiB, and a default run is estimated at {hours:.1f} h") in told


def test_it_is_short_and_complete():
    assert len(TEXT.splitlines()) <= 230 and len(TEXT.split()) <= 2500
    assert all((REPO / path).exists() for path in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", TEXT))
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (REPO / "dl").glob("*.py")}
    rows = re.findall(r"^\| (`[^|]+) \|", section("Where things are").split("| `dl/` |", 1)[1], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {name for name in sources if not name.startswith("__")}
    marked = set(re.findall(r"DEVIATION\(([\w-]+)\)", "\n".join(sources.values())))
    told = set(re.findall(r"^\| `([\w-]+)` \|", section("Differences from the paper"), re.MULTILINE))
    assert marked == told and told


def test_own_embeddings_in_ten_lines(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", TEXT.split("### Your own embeddings\n", 1)[1], re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) <= 10 and "train_steps=600" in block
    text_clip = torch.arange(40).repeat_interleave(2)
    audio = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.chdir(tmp_path)
    save_file({"audio": audio, "text": audio[text_clip] + 1, "text_clip": text_clip}, "pairs.safetensors")
    (tmp_path / "block.py").write_text(block.replace("train_steps=600", "train_steps=4"))
    bridged = runpy.run_path("block.py")["bridged"]
    assert bridged.shape == (40, 8) and torch.allclose(bridged.norm(dim=1), torch.ones(40), atol=1e-5)
