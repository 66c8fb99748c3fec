"""The generated parts of README.md and the cards of the shipped checkpoints: ``python -m dl readme`` makes them from ``results/``.

A test keeps them in step with the files.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from dl.config import REPO, get_profile
from dl.report.answer import answer
from dl.report.bench import bench_table
from dl.report.cards import CARDS
from dl.report.deviations import deviations_table
from dl.report.gpu import duration, gpu_table, measured
from dl.report.replication import limits_section
from dl.report.summaries import STORY, captions_table, claims_table, gap_table, timing_table
from dl.store import atomic_write, markdown_table

TRAIN_BATCH, BEAM_BATCH = "16", "64"           # rows of bench_gpu.csv; 16 is the paper profile's


def doors_table(results: Path) -> str:
    """The three ways in: one command each, with its time, its memory and a figure that it should give."""
    timing = pd.read_csv(results / "timing.csv", dtype={"stage": str})
    default = timing[timing.stage.str.isdigit()]                         # the appendices have letters
    memory = f"{default.peak_memory_mb.max() / 1000:.1f} GB"
    gap = pd.read_csv(results / "table1.csv").query("space == 'text'").set_index("system")
    words = pd.read_csv(results / "table2.csv").query("space == 'text' and experiment == 'zero_shot'").set_index("system")
    claim = pd.read_csv(results / "claims.csv").set_index("id").loc["C3"]
    train, beam = peaks(results)
    on_gpu = measured(results, "mini_full", "total", duration)
    return markdown_table(["I have", "command", "time", "memory", "a figure to expect"], [
        ["a laptop", "`./run_all.sh`", f"{default.wall_s.sum() / 60:.0f} min on two CPU cores, after the install", memory,
         f"[Table 1](results/mini/table1.md): RMG {gap.rmg['raw']:.3f} for `raw`, {gap.rmg['diffusion_link']:.3f} for `diffusion_link`"],
        ["one GPU", "`./run_all.sh --full`", f"{on_gpu} of fits and captions, estimated from measured parts; scores on the CPU come on top",
         "not measured",
         f"[Table 2](results/mini/table2.md), zero-shot: CIDEr-D {words.cider_d['raw']:.3f} for `raw`, {words.cider_d['diffusion_link']:.3f} for `diffusion_link`"],
        ["AudioCaps and a GPU", "`./run_all.sh --profile paper`", f"{measured(results, 'estimate', 'total', duration)}, estimated from measured parts",
         f"GPU: {train} to train, {beam} to caption", f"unknown: not run. The paper: CIDEr up to {claim.paper_value} over raw, zero-shot"],
    ], left=5)


def peaks(results: Path) -> list[str]:
    """Peak memory of a 7B captioner in a training step of ``TRAIN_BATCH`` captions and in beam search of ``BEAM_BATCH`` sequences."""
    names = (("llama_train", "peak_memory_checkpointed", TRAIN_BATCH), ("llama_generate", "peak_memory_beam_4", BEAM_BATCH))
    return [measured(results, section, name, "{:.1f} GiB".format, batch=batch) for section, name, batch in names]


def memory_line(results: Path) -> str:
    """What a captioner of 7B needs, from the benchmark."""
    train, beam = peaks(results)
    return (f"For a captioner of 7B one GPU of 24 GB is enough: with random weights of that shape a training step of {TRAIN_BATCH} captions under gradient\n"
            f"checkpointing peaked at {train}, beam search of {BEAM_BATCH} sequences at {beam}. What it takes in 4 bits was not measured.")


def deviations(results: Path) -> str:
    """What differs from the paper; the same whatever the results are."""
    return deviations_table()


BLOCKS: dict[str, Callable[[Path], str]] = {
    "headline": answer, "doors": doors_table, "gap": partial(gap_table, systems=STORY), "captions": partial(captions_table, systems=STORY),
    "claims": claims_table, "deviations": deviations, "limits": limits_section, "timing": timing_table, "gpu": gpu_table, "bench": bench_table, "memory": memory_line,
}


def render(readme: str, results: Path) -> str:
    """``readme`` with the text between ``<!-- name:start -->`` and ``<!-- name:end -->`` made anew for every block.

    Raises:
        FileNotFoundError: a result file is missing.
        ValueError: a marker is missing.
    """
    for name, make in BLOCKS.items():
        found = re.search(rf"(<!-- {name}:start[^>]*-->\n).*?(<!-- {name}:end -->)", readme, re.DOTALL)
        if not found:
            raise ValueError(f"README.md lacks the markers <!-- {name}:start --> and <!-- {name}:end -->")
        readme = f"{readme[:found.end(1)]}{make(results).strip()}\n{readme[found.start(2):]}"
    return readme


def write_readme() -> None:
    """Bring README.md and the cards of the shipped checkpoints up to date with ``results/mini``."""
    path, results = REPO / "README.md", get_profile("mini").results_dir
    atomic_write(path, render(path.read_text(encoding="utf-8"), results))
    for name, card in CARDS.items():
        atomic_write(results / "checkpoints" / name / "README.md", card(results))
