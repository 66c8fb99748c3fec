"""Score tables (``table1.csv``, ``table1.md``) made from ``metrics.csv``: nothing is computed here, only laid out.

The CSV holds everything in one row a system and space. The Markdown file shows it in panels; retrieval R@10 and effective rank
stand at the end of every panel, because a gap can be closed by sending everything to one point, and these two then fall.
"""
from __future__ import annotations

import math

import pandas as pd

from dl.caption_metrics import CAPTION_DIRECTION
from dl.config import Profile
from dl.gap import ARROWS, DIRECTION
from dl.store import SYSTEMS, MetricsFile, atomic_write, csv_text, markdown_table

WATCHED = ("recall_at_10", "effective_rank")
GAP_PANELS = {
    "Distance and similarity": ("pair_cosine", "nonpair_cosine", "cosine_margin", "centroid_gap", "rmg"),
    "Distributions": ("separability_auc", "frechet_distance", "mmd2", "alignment", "uniformity"),
    "Retrieval": ("recall_at_1", "recall_at_5", "map_at_10", "text_to_audio_recall_at_10", "label_recall_at_10"),
    "Topology": ("gram_correlation", "linear_cka", "knn_overlap"),
    "The gap as one vector": ("gap_length", "direction_consistency", "orthogonality", "share_toward_text"),
}
FLAGS = ("uses_pairs", "uses_memory", "trained")
COSTS = ("parameters", "ms_per_1000")
BETTER = DIRECTION | CAPTION_DIRECTION                           # metric: which side is better
NOT_RANKED = ("text_floor", "text_ceiling", "text_to_audio")    # bounds, and the opposite direction
LEGEND = (
    "Mean ± standard deviation over training seeds x noise seeds [95 % interval: one training seed, one noise seed and the recordings "
    "drawn anew]. **Bold**: best; *italic*: its difference from the best is within the interval. n/c: not computed."
)


def write_table(profile: Profile, name: str, rows: list[dict], columns: list[str], markdown: str) -> None:
    """Write ``results/<profile>/<name>.csv`` and ``<name>.md``, each whole."""
    atomic_write(profile.results_dir / f"{name}.csv", csv_text(rows, columns))
    atomic_write(profile.results_dir / f"{name}.md", markdown)


def write_table1(profile: Profile, split: str = "test", traits: dict | None = None) -> pd.DataFrame:
    """Table 1: every system's gap metrics on a split, with what it uses and costs.

    Args:
        profile: whose ``metrics.csv`` is read and whose tables are written.
        split: which rows of ``metrics.csv``.
        traits: system -> object with ``uses_pairs``, ``uses_memory``, ``trained``; the registry of ``dl.peers`` by default.

    Returns:
        the table as written to CSV: ``<metric>``, ``<metric>_sd``, ``_ci_low``, ``_ci_high`` and ``_mark`` (best, tie or blank).

    Raises:
        ValueError: there is nothing to show yet.
    """
    if traits is None:
        from dl.peers import REGISTRY

        traits = REGISTRY
    frame = MetricsFile(profile).frame()
    metrics = list(dict.fromkeys(metric for panel in GAP_PANELS.values() for metric in (*panel, *WATCHED)))
    metrics += sorted(set(frame.metric[(frame.experiment == "gap") & (frame.split == split)]) & set(DIRECTION) - set(metrics))
    rows = score_rows(frame, "gap", split, metrics)
    if not rows:
        raise ValueError(f"metrics.csv has no gap rows for split {split!r}: run notebook 05, or ./run_all.sh --only 05")
    for row in rows:
        method = traits.get(row["system"])
        row |= {flag: "" if method is None else ("yes" if getattr(method, flag) else "no") for flag in FLAGS}
    columns = ["system", "space", *FLAGS, *COSTS, "n_items", "n_runs", *(m + end for m in metrics for end in ("", "_sd", "_ci_low", "_ci_high", "_mark"))]
    items = ", ".join(sorted({str(row["n_items"]) for row in rows}))
    parts = [f"# Table 1. The modality gap by system\n\nProfile {profile.name}, split {split}, n = {items} clips. {LEGEND}\n", _method_panel(rows)]
    for title, panel in GAP_PANELS.items():
        shown = list(dict.fromkeys((*panel, *WATCHED)))
        parts.append(f"## {title}\n\n" + markdown_table(["system", *map(_heading, shown)], [[_name(row), *(_cell(row, m) for m in shown)] for row in rows]))
    if reasons := sorted({f"- {m}: {row[m + '_reason']}" for row in rows for m in metrics if row.get(m + "_reason")}):
        parts.append("## Not computed\n\n" + "\n".join(reasons) + "\n")
    write_table(profile, "table1", rows, columns, "\n".join(parts))
    return pd.DataFrame(rows)[[c for c in columns if c in set().union(*rows)]]


def score_rows(frame: pd.DataFrame, experiment: str, split: str, metrics: list[str]) -> list[dict]:
    """One dict a (system, space), in the order of ``SYSTEMS``, text space first, from the rows summed over runs.

    Args:
        frame: ``MetricsFile.frame()``.
        experiment: which rows.
        split: which rows.
        metrics: which metrics, and the costs beside them.
    """
    chosen = frame[(frame.experiment == experiment) & (frame.split == split)]
    rows = []
    for (system, space), group in chosen.groupby(["system", "space"]):
        summary = group[group.seed == "all"].set_index("metric")
        row = {"system": system, "space": space, "n_runs": len(group[group.seed != "all"][["seed", "noise_seed"]].drop_duplicates())}
        for metric in (*metrics, *COSTS):
            if metric not in summary.index:
                continue
            found = summary.loc[metric]
            row |= {metric: found.value, "n_items": row.get("n_items", found.n_items)}
            row |= {f"{metric}_{end}": found[end] for end in ("sd", "ci_low", "ci_high", "reason")}
        if "n_items" in row:
            rows.append(row)
    rows.sort(key=lambda row: (SYSTEMS.index(row["system"]) if row["system"] in SYSTEMS else len(SYSTEMS), row["system"], row["space"] != "text"))
    mark_best(rows, frame[(frame.experiment == f"{experiment}:paired") & (frame.split == split) & (frame.seed == "all")], metrics)
    return rows


def mark_best(rows: list[dict], paired: pd.DataFrame, metrics: list[str]) -> None:
    """Set ``<metric>_mark``: "best", or "tie" where the difference from the best may be 0.

    A tie is read from the paired interval of the two systems where ``metrics.csv`` has it (it holds 0), else from the row's own
    interval (it holds the best mean). Bounds, the opposite direction and centred rows are not ranked.
    """
    intervals = {(row.system, row.metric): (row.ci_low, row.ci_high) for row in paired.itertuples() if row.space == "text"}
    for metric in metrics:
        ranked = [row for row in rows if row["space"] == "text" and row["system"] not in NOT_RANKED and not math.isnan(row.get(metric, math.nan))]
        if metric not in BETTER or not ranked:
            continue
        best = (max if BETTER[metric] == "higher" else min)(ranked, key=lambda row: row[metric])
        for row in ranked:
            pair = intervals.get((f"{row['system']}-{best['system']}", metric)) or intervals.get((f"{best['system']}-{row['system']}", metric))
            low, high = pair or (row[metric + "_ci_low"], row[metric + "_ci_high"])
            if row is best or row[metric] == best[metric]:
                row[metric + "_mark"] = "best"
            elif low <= (0 if pair else best[metric]) <= high:
                row[metric + "_mark"] = "tie"


def _method_panel(rows: list[dict]) -> str:
    body = [[_name(row), *(row[flag] for flag in FLAGS), _count(row.get("parameters")), _number(row.get("ms_per_1000")), row["n_items"], row["n_runs"]]
            for row in rows]
    head = ["system", "uses pairs", "uses a memory", "trained", "parameters", "ms per 1,000 vectors", "clips", "runs"]
    reverse = ("\ntext_to_audio is the opposite direction, a second network with the roles swapped: first captions mapped among the sounds. It is not "
               "ranked; its retrieval looks for one sound among the sounds, not for one of five captions among all.\n")
    return "## What each system uses\n\n" + markdown_table(head, body) + (reverse if any(row["system"] == "text_to_audio" for row in rows) else "")


def _heading(metric: str) -> str:
    return metric + ARROWS.get(BETTER.get(metric, ""), "")


def _name(row: dict) -> str:
    return row["system"] + ("" if row["space"] == "text" else f" ({row['space']} space)")


def _count(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.0f}"


def _number(value: float | None, like: float | None = None) -> str:
    """Four decimals below .01, three below 10, one above; ``like`` takes the decimals of another figure."""
    if value is None or math.isnan(value):
        return ""
    size = abs(value if like is None else like)
    return f"{value:.{1 if size >= 10 else 3 if size >= 0.01 or size == 0 else 4}f}"


def _cell(row: dict, metric: str) -> str:
    value = row.get(metric)
    if value is None:
        return ""
    if math.isnan(value):
        return "n/c"
    shown = {"best": "**{}**", "tie": "*{}*"}.get(row.get(metric + "_mark", ""), "{}").format(_number(value))
    if not math.isnan(row.get(metric + "_sd", math.nan)):
        shown += f" ± {_number(row[metric + '_sd'], value)}"
    if not math.isnan(row[metric + "_ci_low"]):
        shown += f" [{_number(row[metric + '_ci_low'], value)}, {_number(row[metric + '_ci_high'], value)}]"
    return shown
