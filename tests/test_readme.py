"""The README's figures are those of the files it names, its code runs, and it lists every deviation that the code marks."""
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
LINK, RIDGE, RAW = ({"system": name, "space": "text"} for name in ("diffusion_link", "ridge", "raw"))
ZERO, SUPERVISED = {"experiment": "zero_shot"}, {"experiment": "supervised"}
FIGURES = [        # what the section "What came out" says: file, row, column, form of the number or of the interval
    ("table2", RAW | ZERO, "cider_d", ".3f", "0.308"), ("table2", LINK | ZERO, "cider_d", ".3f", "0.380"),
    ("table2", LINK | ZERO, "cider_d_relative_gain", "interval", "+23.3 % [+7.0 %, +43.1 %]"),
    ("table2", LINK | ZERO, "cider_d_minus_ridge", "interval", "+0.021 [-0.023, +0.068]"),
    ("table2", RIDGE | ZERO, "cider_d", ".3f", "0.359"),
    ("table2", RAW | SUPERVISED, "cider_d", ".3f", "0.332"), ("table2", LINK | SUPERVISED, "cider_d", ".3f", "0.343"),
    ("table2", LINK | SUPERVISED, "cider_d_relative_gain", "interval", "+3.3 % [-15.6 %, +21.5 %]"),
    ("table1", RAW, "pair_cosine", ".3f", "0.417"), ("table1", LINK, "pair_cosine", ".3f", "0.475"),
    ("table1", RAW, "rmg", ".3f", "0.378"), ("table1", LINK, "rmg", ".3f", "0.355"), ("table1", RIDGE, "rmg", ".3f", "0.356"),
    ("table1", {"system": "text_floor"}, "pair_cosine", ".3f", "0.797"), ("table1", {"system": "text_floor"}, "rmg", ".3f", "0.174"),
    ("table1", RAW, "recall_at_10", ".3f", "0.483"), ("table1", LINK, "recall_at_10", ".3f", "0.481"),
]
PAPERS = ["+52.5 %", "+7.5 %"]                 # quoted from the paper's abstract


def row_of(file: str, where: dict[str, str]) -> pd.Series:
    """The one row of a table of ``results/mini`` with these cells."""
    table = pd.read_csv(MINI / f"{file}.csv")
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1, where
    return table.iloc[0]


def section(title: str) -> str:
    """The text below a heading, up to the next one of its kind."""
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(("file", "where", "column", "form", "shown"), FIGURES)
def test_a_figure_is_that_of_its_file(file, where, column, form, shown):
    row = row_of(file, where)
    ends = [row[column + end] for end in ("", "_ci_low", "_ci_high")]
    expected = interval(*ends, form="+.1%" if "%" in shown else "+.3f") if form == "interval" else format(row[column], form)
    assert shown == expected and shown in section("What came out")


def test_no_other_figure_is_told():
    told = section("What came out")
    for shown in sorted([figure[-1] for figure in FIGURES] + PAPERS, key=len, reverse=True):
        told = told.replace(shown, "")
    assert not re.search(r"\d\.\d|\d %", told.replace("95 %", ""))
    paper = pd.read_csv(REPO / "results/paper.csv", dtype=str, keep_default_na=False).set_index("claim").value
    assert PAPERS == [f"+{paper[claim]} %" for claim in ("C3", "C4")]


def test_the_verdicts_are_those_of_the_claims():
    verdicts = pd.read_csv(MINI / "claims.csv").set_index("id").verdict
    assert verdicts.to_dict() == {"C1": "not_supported", "C2": "not_supported", "C3": "supported", "C4": "partly_supported",
                                  "C5": "supported", "C6": "not_tested"}, "the README's first line of results says so"


def test_times_and_memory_are_those_of_the_files():
    timing = pd.read_csv(MINI / "timing.csv", dtype={"stage": str})
    default = timing[timing.stage.str.isdigit()]
    assert f"{default.wall_s.sum():,.0f} s in all" in TEXT and f"{default.peak_memory_mb.max() / 1000:.1f} GB of memory" in TEXT
    gpu = pd.read_csv(REPO / "results/bench_gpu.csv").set_index(["section", "name"]).sort_index()
    peaks = [gpu.loc[place].query(f"batch == {batch}").value.item() for place, batch in (
        (("llama_train", "peak_memory_checkpointed"), 16), (("llama_generate", "peak_memory_beam_4"), 64))]
    hours = gpu.loc[("estimate", "total")].value.item()
    assert (f"16 captions with gradient checkpointing takes {peaks[0]:.1f} GiB, beam search of 64 sequences {peaks[1]:.1f} GiB, and a "
            f"default run is estimated at {hours:.1f} h") in " ".join(TEXT.split())


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.splitlines()) <= 230 and len(TEXT.split()) <= 2500
    assert all((REPO / path).exists() for path in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", TEXT))


def test_every_module_of_dl_has_its_place():
    modules = {path.stem for path in (REPO / "dl").glob("*.py") if not path.stem.startswith("__")} | {"plots"}
    table = section("Where things are").split("| `dl/` |", 1)[1]
    assert {name for line in re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)} == modules


def test_marks_in_code_and_differences_agree():
    marked = {name for path in (REPO / "dl").rglob("*.py") for name in re.findall(r"DEVIATION\(([\w-]+)\)", path.read_text(encoding="utf-8"))}
    assert marked and marked == set(re.findall(r"^\| `([\w-]+)` \|", section("Differences from the paper"), re.MULTILINE))


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
