"""Verdicts on the paper's claims C1-C6, by rules that were committed before any system was scored on test.

A claim is a list of parts; a part compares one figure of ``metrics.csv`` with a threshold, by its 95 % interval over training seeds,
noise seeds and recordings. Differences between two systems are paired (``dl.bootstrap.paired_difference``) and stand in
``metrics.csv`` under the experiment ``<experiment>:paired`` and the system ``<ours>-<baseline>``.

A part, and a claim of one part: **supported** if the interval lies on the claimed side, **partly_supported** if only the mean does,
**not_supported** if the mean does not, **not_tested** without the figure. A claim of several parts: supported if all are, partly
supported if all are at least that, not supported if one is not, not tested if one is not tested.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd

from dl.config import Profile
from dl.store import SYSTEMS, MetricsFile, atomic_write, csv_text, markdown_table

TUNING_METRIC = "rmg"   # [ours] the one criterion on val for every row: it grows with distance across and with collapse within
DIFFUSION_PEERS = ("diffusion_bridge", "conditional_diffusion", "seed")
CONTROLS = ("ridge", "regression_mlp", "regression_mlp_topology")
CLAIM_COLUMNS = ("id", "claim", "paper_value", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence", "note")
C1_METRICS = {"pair_cosine": "higher", "centroid_gap": "lower", "rmg": "lower"}
CONTROLLED = {          # claims whose note also names a control that does as well; the verdict does not ask it
    "C1": ("gap", C1_METRICS), "C3": ("zero_shot", {"cider_d": "higher"}), "C4": ("supervised", {"cider_d": "higher"}),
}


@dataclass(frozen=True)
class Part:
    """One figure and the side of ``threshold`` on which the claim puts it.

    Attributes:
        experiment: gap, zero_shot or supervised.
        metric: its name in metrics.csv.
        side: "higher", "lower", or "not_lower" (the interval must reach the threshold).
        baseline: the system that diffusion_link is compared with, or None for its own figure.
        threshold: 0 for differences.
        exact: the figure has no spread (a count); its value stands for its interval.
        optional: a missing baseline is named instead of leaving the claim untested.
    """

    experiment: str
    metric: str
    side: str
    baseline: str | None = None
    threshold: float = 0.0
    exact: bool = False
    optional: bool = False

    @property
    def system(self) -> str:
        """The system's name in metrics.csv."""
        return "diffusion_link" if self.baseline is None else f"diffusion_link-{self.baseline}"

    @property
    def rows_experiment(self) -> str:
        """The experiment's name in metrics.csv."""
        return self.experiment if self.baseline is None else f"{self.experiment}:paired"


@dataclass(frozen=True)
class Rule:
    """A claim, what the paper reports, the rule in words, its parts, and the profiles in which it can be tested (None: all)."""

    id: str
    claim: str
    paper_value: str
    rule: str
    parts: tuple[Part, ...]
    profiles: tuple[str, ...] | None = None


VERDICT_RULES = (
    Rule("C1", "the bridge reduces the modality gap the most among prior diffusion-based methods", "most (no figure known)",
         "diffusion_link against each of diffusion_bridge, conditional_diffusion and seed that was run: pair_cosine higher, centroid_gap "
         "lower, rmg lower, each by its paired interval. The note says where ridge or a regression MLP equals the bridge or beats it.",
         tuple(Part("gap", metric, side, peer, optional=True) for peer in DIFFUSION_PEERS for metric, side in C1_METRICS.items())),
    Rule("C2", "audio embeddings move collectively into the text distribution", "a figure",
         "centroid_gap falls from raw to diffusion_link by its paired interval, and the share of clips that move towards the text mean "
         "along mean_t - mean_a is at least .95 by its interval.",
         (Part("gap", "centroid_gap", "lower", "raw"), Part("gap", "share_toward_text", "higher", threshold=0.95))),
    Rule("C3", "zero-shot captioning gains up to 52.5 % in CIDEr over the raw audio vector", "+52.5 % relative",
         "relative gain of CIDEr-D, diffusion_link over raw with the same decoder trained on text vectors, above 0 by its paired interval; "
         "its size stands beside the paper's.",
         (Part("zero_shot", "cider_d_relative_gain", "higher", "raw"),)),
    Rule("C4", "fully supervised captioning gains up to 7.5 % in CIDEr over the raw audio vector", "+7.5 % relative",
         "relative gain of CIDEr-D, a decoder trained on bridged vectors over one trained on raw vectors, above 0 by its paired interval.",
         (Part("supervised", "cider_d_relative_gain", "higher", "raw"),)),
    Rule("C5", "a light module is enough: three residual MLP blocks on the frozen encoder's output", "three residual MLP blocks",
         "the three-block network has fewer than 10 million parameters, lowers rmg and centroid_gap against raw by their paired intervals, "
         "and the interval of its recall_at_10 minus raw's reaches 0.",
         (Part("gap", "rmg", "lower", "raw"), Part("gap", "centroid_gap", "lower", "raw"),
          Part("gap", "recall_at_10", "not_lower", "raw"), Part("gap", "parameters", "lower", threshold=1e7, exact=True))),
    Rule("C6", "no external knowledge is needed to reach the state of the art on AudioCaps", "state of the art (no figure known)",
         "only on AudioCaps with a 7B model: CIDEr-D above the best reported with retrieval, .705 zero-shot (DRCap), and above the best "
         "reported supervised figure, .911 (LAMB), by its interval; both figures are second-hand.",
         (Part("zero_shot", "cider_d", "higher", threshold=0.705), Part("supervised", "cider_d", "higher", threshold=0.911)), ("paper",)),
)


def verdict(mean: float | None, ci_low: float | None, ci_high: float | None, side: str, threshold: float = 0.0) -> str:
    """The verdict on one figure.

    Args:
        mean: its value, None or NaN if it was not computed.
        ci_low: lower end of its 95 % interval, None or NaN if it has none (then at most partly_supported).
        ci_high: upper end.
        side: "higher", "lower" or "not_lower".
        threshold: what it is compared with.

    Returns:
        supported, partly_supported, not_supported or not_tested.

    Raises:
        ValueError: unknown side.
    """
    if side not in ("higher", "lower", "not_lower"):
        raise ValueError(f"unknown side {side!r}: choose higher, lower or not_lower")
    if mean is None or math.isnan(mean):
        return "not_tested"
    low, high = (math.nan if end is None else end for end in (ci_low, ci_high))
    has_interval = not (math.isnan(low) or math.isnan(high))
    if side == "not_lower":
        if not has_interval:
            return "partly_supported" if mean >= threshold else "not_supported"
        return "supported" if high >= threshold else "not_supported"
    sign = 1 if side == "higher" else -1
    if has_interval and sign * (low if side == "higher" else high) > sign * threshold:
        return "supported"
    return "partly_supported" if sign * mean > sign * threshold else "not_supported"


def combine(verdicts: list[str]) -> str:
    """The verdict on a claim from those on its parts (the module's head says how)."""
    for worst in ("not_tested", "not_supported", "partly_supported"):
        if worst in verdicts:
            return worst
    return "supported" if verdicts else "not_tested"


def comparisons(experiment: str) -> list[str]:
    """Baselines that the rules compare diffusion_link with in an experiment; gap adds the controls."""
    found = [part.baseline for rule in VERDICT_RULES for part in rule.parts if part.experiment == experiment and part.baseline]
    return sorted(set(found) | (set(CONTROLS) if experiment == "gap" else set()), key=SYSTEMS.index)


def lookup(frame: pd.DataFrame, part: Part, split: str = "test") -> dict | None:
    """The row of metrics.csv that a part speaks of (summed over runs, in the text space; beam before greedy), or None."""
    rows = frame[(frame.experiment == part.rows_experiment) & (frame.system == part.system) & (frame.metric == part.metric)
                 & (frame.split == split) & (frame.seed == "all") & (frame.space == "text")]
    if rows.empty:
        return None
    rows = rows.sort_values("decoding", key=lambda column: ~column.str.startswith("beam"), kind="stable")
    row = rows.iloc[0].to_dict()
    return row | ({"ci_low": row["value"], "ci_high": row["value"]} if part.exact else {})


def judge(rule: Rule, frame: pd.DataFrame, profile_name: str) -> dict:
    """One row of claims.csv: the verdict, and the figure of the part that decided it (the worst, then the narrowest).

    Args:
        rule: the claim.
        frame: ``MetricsFile.frame()``.
        profile_name: which profile the figures come from.

    Returns:
        the columns of ``CLAIM_COLUMNS``, and ``decided_by``, the deciding figure in words.
    """
    row = {"id": rule.id, "claim": rule.claim, "paper_value": rule.paper_value, "n_seeds": 0, "verdict": "not_tested", "evidence": "",
           "decided_by": ""}
    if rule.profiles and profile_name not in rule.profiles:
        return row | {"note": f"tested in profile {' or '.join(rule.profiles)} only, this is {profile_name}"}
    judged: list[tuple] = []
    absent: list[str] = []
    for part in rule.parts:
        found = lookup(frame, part)
        if found is None and part.optional:
            absent.append(part.baseline or part.system)
            continue
        value, low, high = (found[key] for key in ("value", "ci_low", "ci_high")) if found else (None, None, None)
        judged.append((verdict(value, low, high, part.side, part.threshold), part, value, low, high))
    row["verdict"] = combine([entry[0] for entry in judged])
    notes = [f"{_figure(part, value, low, high)}: {word}" for word, part, value, low, high in judged]
    if absent:
        notes.append("not run: " + ", ".join(dict.fromkeys(absent)))
    if rule.id in CONTROLLED:
        notes += control_notes(frame, *CONTROLLED[rule.id])
    row["note"] = "; ".join(notes)
    deciding = min((entry for entry in judged if entry[0] == row["verdict"]), key=_margin, default=None)
    if deciding is None or deciding[2] is None:
        return row
    _, part, value, low, high = deciding
    runs = frame[(frame.experiment == part.experiment) & (frame.system == "diffusion_link") & (frame.seed != "all") & (frame.split == "test")]
    decoding = (lookup(frame, part) or {}).get("decoding")
    if decoding:
        runs = runs[runs.decoding == decoding]
    evidence = (f"metrics.csv: experiment={part.rows_experiment}, split=test, system={part.system}, metric={part.metric}, seed=all"
                + (f", decoding={decoding}" if decoding else ""))
    return row | {"ours": value, "ci_low": low, "ci_high": high, "n_seeds": runs.seed.nunique(), "evidence": evidence,
                  "decided_by": _figure(part, value, low, high)}


def control_notes(frame: pd.DataFrame, experiment: str = "gap", metrics: dict[str, str] = C1_METRICS) -> list[str]:
    """Where ridge or a regression MLP equals diffusion_link (the paired interval holds 0) or beats it, on a claim's metrics."""
    notes = []
    for control in CONTROLS:
        words: dict[str, list[str]] = {"equals": [], "beats": []}
        for metric, side in metrics.items():
            row = lookup(frame, Part(experiment, metric, side, control))
            if row is None or math.isnan(row["ci_low"]):
                continue
            if row["ci_low"] <= 0 <= row["ci_high"]:
                words["equals"].append(metric)
            elif (row["value"] > 0) != (side == "higher"):
                words["beats"].append(metric)
        notes += [f"{control} {word} diffusion_link on {', '.join(found)}" for word, found in words.items() if found]
    return notes


def write_claims(profile: Profile) -> list[dict]:
    """Judge every claim from ``metrics.csv``; write ``claims.csv`` and ``claims.md``; return the rows."""
    frame = MetricsFile(profile).frame()
    rows = [judge(rule, frame, profile.name) for rule in VERDICT_RULES]
    atomic_write(profile.results_dir / "claims.csv", csv_text(rows, CLAIM_COLUMNS))
    table = markdown_table(["claim", "", "paper", "verdict", "the figure that decided, 95 % interval", "training seeds"], [
        [row["id"], row["claim"], row["paper_value"], row["verdict"].replace("_", " "), row["decided_by"], row["n_seeds"]] for row in rows
    ], left=5)
    details = "\n".join(f"**{row['id']}** {rule.rule}\n\n" + "".join(f"- {note}\n" for note in row["note"].split("; "))
                        for rule, row in zip(VERDICT_RULES, rows))
    head = f"# Verdicts on the paper's claims, profile {profile.name}\n\nThe rules were fixed before any system was scored on test.\n"
    atomic_write(profile.results_dir / "claims.md", f"{head}\n{table}\n## Rules and figures\n\n{details}")
    return rows


def _figure(part: Part, value: float | None, low: float | None, high: float | None) -> str:
    """A part's figure in words: ``rmg of diffusion_link-raw -0.0500 [-0.0600, -0.0400]``; differences show their sign, gains are in %."""
    def number(x: float | None) -> str:
        if x is None or math.isnan(x):
            return "not computed"
        if part.metric.endswith("_relative_gain"):
            return f"{100 * x:+.1f} %"
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:+.4f}" if part.baseline else f"{x:.4f}"
    without = low is None or math.isnan(low) or part.exact
    return f"{part.metric} of {part.system} {number(value)}" + ("" if without else f" [{number(low)}, {number(high)}]")


def _margin(entry: tuple) -> float:
    """Distance of the mean from the threshold in half-widths of its interval; inf where there is no width."""
    _, part, value, low, high = entry
    if value is None or low is None or math.isnan(low) or high == low:
        return math.inf
    return abs(value - part.threshold) / (high - low)
