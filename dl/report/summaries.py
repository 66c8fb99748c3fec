"""The short tables of ``results/<profile>`` that the README and the replication report both show, as Markdown; no number is typed."""
from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from dl.gap import ARROWS, DIRECTION, TITLES
from dl.store import markdown_table

HEADLINE = {metric: TITLES[metric] + ARROWS.get(DIRECTION.get(metric, ""), "")
            for metric in ("pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank")}


STORY = ("raw", "mean_shift", "ridge", "regression_mlp", "diffusion_bridge", "seed", "diffusion_link", "diffusion_link_ddim", "text_floor",
         "text_ceiling")          # the rows that tell it: both ends, the controls, the diffusion methods


def gap_table(results: Path, systems: tuple[str, ...] | None = None) -> str:
    """The headline columns of ``table1.csv``, main rows only, each with its 95 % interval; ``systems`` names the rows, None takes all."""
    table = pd.read_csv(results / "table1.csv", dtype=str, keep_default_na=False)
    rows = []
    for _, row in table[(table.space == "text") & (systems is None or table.system.isin(systems or ()))].iterrows():
        cells = [f"`{row.system}`", row.uses_pairs or "–"]
        for metric in HEADLINE:
            digits = 1 if metric == "effective_rank" else 3
            value, low, high = (float(row[metric + end]) if row[metric + end] else None for end in ("", "_ci_low", "_ci_high"))
            cells.append("n/c" if value is None else f"{value:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"))
        rows.append(cells)
    n_items = table.n_items.iloc[0]
    return f"Test, n = {n_items} clips, 95 % intervals over recordings, training seeds and noise seeds.\n\n" + markdown_table(
        ["system", "pairs", *HEADLINE.values()], rows)


def claims_table(results: Path) -> str:
    """Each claim with its verdict and what it rests on."""
    claims = pd.read_csv(results / "claims.csv", dtype=str, keep_default_na=False)
    rows = []
    for row in claims.itertuples():
        ours = "–"
        if row.ours:
            system, metric = (re.findall(rf"{key}=([^,]+)", row.evidence)[0] for key in ("system", "metric"))
            form = "+.1%" if metric.endswith("_relative_gain") else "+.3f"
            ends = f" [{float(row.ci_low):{form}}, {float(row.ci_high):{form}}]" if row.ci_low else ""
            ours = f"{metric}, {system}: {float(row.ours):{form}}{ends}"
        rows.append([row.id, row.claim, row.paper_value, ours, row.verdict.replace("_", " ")])
    return markdown_table(["", "claim", "paper", "ours", "verdict"], rows, left=5)


def captions_table(results: Path, systems: tuple[str, ...] | None = None) -> str:
    """All settings of ``table2.csv``: CIDEr-D, METEOR and sentence similarity, and the relative gain of CIDEr-D over raw; ``systems`` as above."""
    table = pd.read_csv(results / "table2.csv", dtype=str, keep_default_na=False)
    rows = []
    for _, row in table[(table.space == "text") & (systems is None or table.system.isin(systems or ()))].iterrows():
        cells = [row.experiment.replace("_", "-").replace(":", ", "), f"`{row.system}`", row.n_seeds]
        for metric in ("cider_d", "meteor", "sbert_sim"):
            ends = f" [{float(row[metric + '_ci_low']):.3f}, {float(row[metric + '_ci_high']):.3f}]" if row[metric + "_ci_low"] else ""
            cells.append(f"{float(row[metric]):.3f}{ends}" if row[metric] else "n/c")
        gain = "cider_d_relative_gain"
        cells.append(f"{float(row[gain]):+.1%} [{float(row[gain + '_ci_low']):+.1%}, {float(row[gain + '_ci_high']):+.1%}]"
                     if row[gain] and row[gain + "_ci_low"] else "–")
        rows.append(cells)
    first = table.iloc[0]
    return (f"Test, n = {first.n_items} clips, {first.decoding}, 95 % intervals over recordings and training seeds.\n\n"
            + markdown_table(["setting", "system", "seeds", "CIDEr-D ↑", "METEOR ↑", "sbert_sim (all-MiniLM-L6-v2) ↑", "CIDEr-D over raw"], rows, left=2))


def encoder_table(results: Path) -> str:
    """How well mini-CLAP hears the test scenes."""
    table = pd.read_csv(results / "mini_clap.csv")
    return markdown_table(["test scenes", "n", "R@1", "R@10", "R@10, one caption each", "R@10 by chance"],
                          [[row[0], str(row[1]), *(f"{value:.3f}" for value in row[2:])] for row in table.itertuples(index=False, name=None)])


def timing_table(results: Path) -> str:
    """Seconds and peak memory of every stage, and how long a newcomer waits for what."""
    table = pd.read_csv(results / "timing.csv", dtype={"stage": str})
    rows = [[row.stage, row.device, f"{row.wall_s:.0f}", f"{row.peak_memory_mb:.0f}"] for row in table.itertuples()]
    default = table[table.stage.str.isdigit()]                           # the appendices have letters
    rows.append(["a default run, 00 to 11", "", f"{default.wall_s.sum():.0f}", f"{default.peak_memory_mb.max():.0f}"])
    until = table.set_index("stage").wall_s.cumsum()
    return markdown_table(["stage", "device", "seconds", "peak memory (MB)"], rows) + (
        f"\nAfter the install: the first figure in {until['00']:.0f} s, Table 1 in {until['06'] / 60:.0f} min, zero-shot captions in "
        f"{until['07'] / 60:.0f} min. `python -m dl caption` works at once, with the weights that ship.\n")
