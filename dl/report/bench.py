"""What ``tests/bench/bench.py`` measured, as the README's table: our costs beside others' for the same job, each ratio with its goal.

All of it is copied from ``results/bench.csv``. A part that was not measured stands in the table with its reason; while there is no such file, the
text says so.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from dl.plots.bench import AXES, growth_data
from dl.store import markdown_table

SECTIONS = {
    "bridge_training": "bridge, a training step against its matrix products bare",
    "bridge_training_gpu": "the same on a GPU",
    "bridge_inference": "bridge, 1,000 vectors, against Diffusion Bridge's sampler",
    "embedding": "sound files to vectors",
    "captioning": "captions, seconds a clip",
    "captioner_training": "captioner, against transformers' Trainer",
    "metrics": "caption metrics, against aac-metrics",
}


def bench_table(results: Path) -> str:
    """The comparisons, the reasons of those that miss their goal, and how costs grow, as Markdown.

    Args:
        results: ``results/<profile>``; the file lies in the folder above it.
    """
    path = results.parent / "bench.csv"
    if not path.is_file():
        return "Nothing has been measured yet.\n"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    compared = table[table.section != "growth"]
    rows = [[SECTIONS[row.section], row.name, *numbers(row)] for row in compared.itertuples(index=False)]
    threads = ", ".join(sorted(set(table.threads)))
    head = (f"On a CPU, {threads} {'thread' if threads == '1' else 'threads'} for both ({table.versions.iloc[0]}); medians of pairs timed in turn, "
            "with the 95 % interval of the ratio's median.\n")
    parts = [head, markdown_table(["part", "compared", "ours", "theirs", "ratio", "goal", "met"], rows, left=2)]
    missed = compared[(compared.status == "ok") & (compared.met != "yes")]
    if len(missed):
        parts += ["What does not meet its goal, or not beyond the noise:\n",
                  "\n".join(f"* **{SECTIONS[row.section]}, {row.name}:** {row.reason}.{profiled(row.profile)}" for row in missed.itertuples(index=False)) + "\n"]
    if (growth := growth_data(table)) is not None:
        parts.append(f"How costs grow (exponent b of size^b): {exponents(growth)}.\n")
    return "\n".join(parts)


def numbers(row: Any) -> list[str]:
    """ours, theirs, ratio with its interval, goal and verdict of one comparison; the reason where it was not measured."""
    if row.status != "ok":
        return ["", "", "not measured", "", row.reason]
    ours, theirs, ratio, low, high = (float(getattr(row, name)) for name in ("ours", "theirs", "ratio", "ratio_low", "ratio_high"))
    return [f"{digits(ours)} {row.unit}", f"{digits(theirs)} {row.unit}", f"{digits(ratio)} [{digits(low)}, {digits(high)}]", row.goal, row.met]


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,g}" if value < 100_000 else f"{value:,.0f}"


def profiled(profile: str) -> str:
    """A profile as a sentence, or nothing."""
    return f" Where our time goes: {profile}." if profile else ""


def exponents(growth: pd.DataFrame) -> str:
    """One phrase for each axis: its curves with their exponents."""
    phrases = []
    for over, label in AXES.items():
        curves = growth[growth.over == over].drop_duplicates("name")
        if len(curves):
            phrases.append(f"over {label}: " + "; ".join(f"{curve.name} {curve.exponent:.2f}" for curve in curves.itertuples(index=False)))
    return ". ".join(phrase[0].upper() + phrase[1:] for phrase in phrases)
