"""The table of ablations (``ablations.csv``, ``ablations.md``) from the rows of ``metrics.csv``, and the sentence that each one earns.

No sentence about an outcome is typed: ``lesson`` composes it from the paired differences and their intervals.
"""
from __future__ import annotations

import math
from typing import Any

import pandas as pd

from dl.config import Profile
from dl.gap import ARROWS, DIRECTION
from dl.report import write_table as write_files
from dl.store import markdown_table
from dl.studies.variants import ABLATIONS

METRICS = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank")
COLUMNS = ("name", "variant", "is_base", "metric", "mean", "sd", "ci_low", "ci_high", "difference", "difference_ci_low", "difference_ci_high",
           "n_seeds", "train_steps")
CONTROL_STEPS = {"ridge": 0}           # a closed form takes none


def table_rows(frame: pd.DataFrame, base_labels: dict[str, list[str]], n_seeds: int, train_steps: int) -> list[dict]:
    """One row an ablation, variant and metric, in the order of the registry; the base among the variants of every ablation.

    Args:
        frame: rows ``ablation:*`` of ``metrics.csv``.
        base_labels: ablation -> labels under which the base stands in it.
        n_seeds: training seeds of the profile; a row without an s.d. has one.
        train_steps: of every fit, closed forms apart.
    """
    found = {(row.experiment, row.system, row.metric): row for row in frame[frame.seed == "all"].itertuples()}
    rows = []
    for name, ablation in ABLATIONS.items():
        experiment, same = f"ablation:{name}", base_labels.get(name, [])
        labels = [variant.label for variant in ablation.variants if variant.label in same or (experiment, variant.label, METRICS[0]) in found]
        if all(label in same for label in labels):
            continue
        for label in labels if same else ["base", *labels]:
            is_base = label in same or label == "base"
            for metric in METRICS:
                own = found["ablation:base", "base", metric] if is_base else found[experiment, label, metric]
                paired = found.get((f"{experiment}:paired", f"{label}-base", metric))
                rows.append({"name": name, "variant": label, "is_base": int(is_base), "metric": metric, "mean": own.value, "sd": own.sd,
                             "ci_low": own.ci_low, "ci_high": own.ci_high, **_difference(paired), "n_seeds": 1 if math.isnan(own.sd) else n_seeds,
                             "train_steps": CONTROL_STEPS.get(label.rsplit("_", 1)[0], train_steps)})
        for ours, theirs in ablation.compare:
            compared = [(metric, found.get((f"{experiment}:paired", f"{ours}-{theirs}", metric))) for metric in METRICS]
            rows += [{"name": name, "variant": f"{ours}-{theirs}", "is_base": 0, "metric": metric, **_difference(paired)}
                     for metric, paired in compared if paired]
    return [{key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def _difference(paired: Any) -> dict:
    return {} if paired is None else {"difference": paired.value, "difference_ci_low": paired.ci_low, "difference_ci_high": paired.ci_high}


def beyond(row: dict) -> bool:
    """Whether a difference's 95 % interval leaves 0 out; False without an interval."""
    low, high = row.get("difference_ci_low", math.nan), row.get("difference_ci_high", math.nan)
    return low > 0 or high < 0


def signed(row: dict) -> str:
    """``+0.012 [+0.003, +0.020], worse``; the side is said only of a difference beyond its interval."""
    decimals = 1 if abs(row["difference"]) >= 1 else 3
    better = DIRECTION.get(row["metric"])
    side = "" if better is None or not beyond(row) else ", better" if (row["difference"] > 0) == (better == "higher") else ", worse"
    return f"{row['difference']:+.{decimals}f} [{row['difference_ci_low']:+.{decimals}f}, {row['difference_ci_high']:+.{decimals}f}]{side}"


def lesson(rows: list[dict]) -> str:
    """What the rows of one ablation say: for each metric how many variants differ from the base beyond their interval, and which the most."""
    rows = [row for row in rows if not math.isnan(row.get("difference", math.nan)) and not math.isnan(row.get("mean", math.nan))]
    number = len({row["variant"] for row in rows})
    parts, none = [], []
    for metric in METRICS:
        differing = [row for row in rows if row["metric"] == metric and beyond(row)]
        if differing:
            most = max(differing, key=lambda row: abs(row["difference"]))
            count = f"{len(differing)} of {number}, most " if number > 1 else ""
            parts.append(f"{metric}: {count}`{most['variant']}` ({signed(most)})")
        else:
            none.append(metric)
    if not parts:
        subject = f"None of {number} variants differs" if number > 1 else "The variant does not differ"
        return f"{subject} from the base beyond its interval in any of the {len(METRICS)} figures."
    return "Beyond its interval from the base: " + "; ".join(parts) + "." + (f" Within it everywhere: {', '.join(none)}." if none else "")


def panel(rows: list[dict]) -> str:
    """One ablation as a Markdown table: mean ± s.d. [interval]; bold where the difference from the base is beyond its interval."""
    by_variant: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["metric"]] = row
    body = []
    for variant, cells in by_variant.items():
        if "mean" in cells[METRICS[0]]:
            mark = " (base)" if cells[METRICS[0]]["is_base"] else ""
            body.append([f"`{variant}`{mark}", *(_cell(cells[metric]) for metric in METRICS)])
    text = markdown_table(["variant", *(metric + ARROWS.get(DIRECTION.get(metric, ""), "") for metric in METRICS)], body)
    compared = [[f"`{variant}`", *(signed(cells[metric]) for metric in METRICS)]
                for variant, cells in by_variant.items() if "mean" not in cells[METRICS[0]]]
    return text + (f"\nPaired differences at the same pairs:\n\n{markdown_table(['difference', *METRICS], compared)}" if compared else "")


def _cell(row: dict) -> str:
    decimals = 1 if row["metric"] == "effective_rank" else 3
    shown = f"{row['mean']:.{decimals}f}" + ("" if math.isnan(row["sd"]) else f" ± {row['sd']:.{decimals}f}")
    return (f"**{shown}**" if beyond(row) else shown) + f" [{row['ci_low']:.{decimals}f}, {row['ci_high']:.{decimals}f}]"


def write_table(profile: Profile, frame: pd.DataFrame, source: Profile, base_labels: dict[str, list[str]], train_steps: int) -> pd.DataFrame:
    """Write ``ablations.csv`` and ``ablations.md``.

    Args:
        profile: whose results folder is written.
        frame: rows ``ablation:*``.
        source: the profile that the rows are of (for its name and seeds).
        base_labels, train_steps: see :func:`table_rows`.

    Returns:
        the table as written.
    """
    rows = table_rows(frame, base_labels, len(source.seeds), train_steps)
    tested = [row for row in rows if "difference" in row]
    outside = sum(map(beyond, tested))
    items = ", ".join(sorted({str(n) for n in frame.n_items}))
    parts = [
        (f"# Ablations of the bridge\n\nProfile {source.name}, split test, n = {items} clips, {len(source.seeds)} training seeds, "
        f"{train_steps} steps a fit. "
        "One thing is changed at a time; the base is `diffusion_link` as it was chosen on val, trained for the same steps as every variant; "
        "nothing is tuned again and nothing is chosen here. "
        "Mean ± standard deviation over training seeds [95 % interval: one training seed, one noise seed and the recordings drawn anew]. "
        "**Bold**: the paired 95 % interval of the difference from the base leaves 0 out. "
        f"That is so for {outside} of {len(tested)} differences on this page; were there no effect at all, about {round(0.05 * len(tested))} "
        "would be.\n")]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        parts.append(f"## {name}\n\n{ABLATIONS[name].question}\n\n{panel(own)}\n{lesson(own)}\n")
    write_files(profile, "ablations", rows, list(COLUMNS), "\n".join(parts))
    return pd.DataFrame(rows, columns=list(COLUMNS))
