"""From ``metrics.csv`` to what is read: Tables 1 and 2, verdicts on the paper's claims, ours beside the paper's, the page, the cards.

Nothing is computed here but verdicts. A claim is a list of parts; a part compares one figure of ``metrics.csv`` with a threshold, by its
95 % interval over training seeds, noise seeds and recordings. Differences between two systems are paired
(``dl.bootstrap.paired_difference``) and stand under the experiment ``<experiment>:paired`` and the system ``<ours>-<baseline>``.

A part, and a claim of one part: **supported** if the interval lies on the claimed side, **partly_supported** if only the mean does,
**not_supported** if the mean does not, **not_tested** without the figure. A claim of several parts: supported if all are, partly
supported if all are at least that, not supported if one is not, not tested if one is not tested.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student_t

from dl.caption_metrics import CAPTION_DIRECTION, METRICS, SBERT_LABEL
from dl.config import REPO, Profile, get_profile
from dl.gap import ARROWS, DIRECTION
from dl.store import SYSTEMS, MetricsFile, atomic_write, csv_text, markdown_table

BETTER = DIRECTION | CAPTION_DIRECTION                          # metric: which side is better
ENDS = ("", "_ci_low", "_ci_high")
GAIN, OVER_RIDGE = "cider_d_relative_gain", "cider_d_minus_ridge"


def interval(value: float | None, low: float | None = None, high: float | None = None, form: str = ".3f") -> str:
    """``0.355 [0.334, 0.376]``, ``+23.3 % [+7.0 %, +43.1 %]`` (form ``+.1%``); "n/c" without a value, no brackets without an interval."""
    if value is None or math.isnan(value):
        return "n/c"
    text, *ends = (format(x, form).replace("%", " %") for x in (value, low, high) if x is not None and not math.isnan(x))
    return text + (f" [{', '.join(ends)}]" if len(ends) == 2 else "")


def write_table(profile: Profile, name: str, rows: list[dict], columns: list[str] | tuple[str, ...], markdown: str) -> None:
    """Write ``results/<profile>/<name>.csv`` and ``<name>.md``, each whole."""
    atomic_write(profile.results_dir / f"{name}.csv", csv_text(rows, columns))
    atomic_write(profile.results_dir / f"{name}.md", markdown)


# ------------------------------------------------------------------------------------------------ the claims and their rules
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

    def text(self, value: float | None, low: float | None, high: float | None) -> str:
        """``rmg of diffusion_link-raw -0.0500 [-0.0600, -0.0400]``; differences show their sign, gains are in %."""
        form = "+.1%" if self.metric == GAIN else ",.0f" if self.exact else "+.4f" if self.baseline else ".4f"
        return f"{self.metric} of {self.system} {interval(value, *(() if self.exact else (low, high)), form=form)}"


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
    """The verdict on a claim from those on its parts: the worst of them."""
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
    row = {"id": rule.id, "claim": rule.claim, "paper_value": rule.paper_value, "n_seeds": 0, "verdict": "not_tested",
           "evidence": "", "decided_by": ""}
    if rule.profiles and profile_name not in rule.profiles:
        return row | {"note": f"tested in profile {' or '.join(rule.profiles)} only, this is {profile_name}"}
    judged: list[tuple[str, Part, dict]] = []
    absent: list[str] = []
    for part in rule.parts:
        found = lookup(frame, part)
        if found is None and part.optional:
            absent.append(part.baseline or part.system)
            continue
        found = found or {"value": math.nan, "ci_low": math.nan, "ci_high": math.nan, "decoding": ""}
        judged.append((verdict(found["value"], found["ci_low"], found["ci_high"], part.side, part.threshold), part, found))
    notes = [f"{part.text(found['value'], found['ci_low'], found['ci_high'])}: {word}" for word, part, found in judged]
    if absent:
        notes.append("not run: " + ", ".join(dict.fromkeys(absent)))
    if rule.id in CONTROLLED:
        notes += control_notes(frame, *CONTROLLED[rule.id])
    row |= {"verdict": combine([word for word, _, _ in judged]), "note": "; ".join(notes)}
    deciding = min((entry[1:] for entry in judged if entry[0] == row["verdict"]), key=_margin, default=None)
    if deciding is None or math.isnan(deciding[1]["value"]):
        return row
    part, found = deciding
    runs = frame[(frame.experiment == part.experiment) & (frame.system == "diffusion_link") & (frame.seed != "all")
                 & (frame.split == "test")]
    decoding = found["decoding"]
    runs = runs[runs.decoding == decoding] if decoding else runs
    evidence = (f"metrics.csv: experiment={part.rows_experiment}, split=test, system={part.system}, metric={part.metric}, seed=all"
                + (f", decoding={decoding}" if decoding else ""))
    figures = {"ours": found["value"], "ci_low": found["ci_low"], "ci_high": found["ci_high"]}
    return row | figures | {"n_seeds": runs.seed.nunique(), "evidence": evidence, "decided_by": part.text(*figures.values())}


def _margin(entry: tuple[Part, dict]) -> float:
    """Distance of the mean from the threshold in widths of its interval; inf where there is no width."""
    part, found = entry
    width = found["ci_high"] - found["ci_low"]
    return abs(found["value"] - part.threshold) / width if width > 0 else math.inf


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
    table = markdown_table(["claim", "", "paper", "verdict", "the figure that decided, 95 % interval", "training seeds"], [
        [row["id"], row["claim"], row["paper_value"], row["verdict"].replace("_", " "), row["decided_by"], row["n_seeds"]]
        for row in rows], left=5)
    details = "\n".join(f"**{row['id']}** {rule.rule}\n\n" + "".join(f"- {note}\n" for note in row["note"].split("; "))
                        for rule, row in zip(VERDICT_RULES, rows, strict=True))
    write_table(profile, "claims", rows, CLAIM_COLUMNS,
                f"# Verdicts on the paper's claims, profile {profile.name}\n\nThe rules were fixed before any system was scored on test.\n"
                f"\n{table}\n## Rules and figures\n\n{details}")
    return rows


# -------------------------------------------------------------------------------------------------------- Table 1: the gap
WATCHED = ("recall_at_10", "effective_rank")     # at the end of every panel: a collapse to one point closes a gap and lowers these two
GAP_PANELS = {
    "Distance and similarity": ("pair_cosine", "nonpair_cosine", "cosine_margin", "centroid_gap", "rmg"),
    "Distributions": ("separability_auc", "frechet_distance", "mmd2", "alignment", "uniformity"),
    "Retrieval": ("recall_at_1", "recall_at_5", "map_at_10", "text_to_audio_recall_at_10", "label_recall_at_10"),
    "Topology": ("gram_correlation", "linear_cka", "knn_overlap"),
    "The gap as one vector": ("gap_length", "direction_consistency", "orthogonality", "share_toward_text"),
}
FLAGS = ("uses_pairs", "uses_memory", "trained")
COSTS = ("parameters", "ms_per_1000")
NOT_RANKED = ("text_floor", "text_ceiling", "text_to_audio")    # bounds, and the opposite direction
TABLE1_LEGEND = (
    "Mean ± standard deviation over training seeds x noise seeds [95 % interval: one training seed, one noise seed and the recordings "
    "drawn anew]. **Bold**: best; *italic*: its difference from the best is within the interval. n/c: not computed."
)
REVERSE = ("\ntext_to_audio is the opposite direction, a second network with the roles swapped: first captions mapped among the sounds. "
           "It is not ranked; its retrieval looks for one sound among the sounds, not for one of five captions among all.\n")


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
    items = ", ".join(sorted({str(row["n_items"]) for row in rows}))
    parts = [f"# Table 1. The modality gap by system\n\nProfile {profile.name}, split {split}, n = {items} clips. {TABLE1_LEGEND}\n"]
    uses = [[_name(row), *(row[flag] for flag in FLAGS), *(_plain(row, cost) for cost in COSTS), row["n_items"], row["n_runs"]]
            for row in rows]
    parts.append("## What each system uses\n\n" + markdown_table(
        ["system", "uses pairs", "uses a memory", "trained", "parameters", "ms per 1,000 vectors", "clips", "runs"], uses) + REVERSE)
    for title, panel in GAP_PANELS.items():
        shown = list(dict.fromkeys((*panel, *WATCHED)))
        body = [[_name(row), *(_cell(row, metric) for metric in shown)] for row in rows]
        parts.append(f"## {title}\n\n" + markdown_table(["system", *map(_heading, shown)], body))
    if reasons := sorted({f"- {m}: {row[m + '_reason']}" for row in rows for m in metrics if row.get(m + "_reason")}):
        parts.append("## Not computed\n\n" + "\n".join(reasons) + "\n")
    columns = ["system", "space", *FLAGS, *COSTS, "n_items", "n_runs",
               *(m + end for m in metrics for end in ("", "_sd", "_ci_low", "_ci_high", "_mark"))]
    write_table(profile, "table1", rows, columns, "\n".join(parts))
    return pd.DataFrame(rows)[[column for column in columns if column in set().union(*rows)]]


def score_rows(frame: pd.DataFrame, experiment: str, split: str, metrics: list[str]) -> list[dict]:
    """One dict a (system, space), in the order of ``SYSTEMS``, text space first, from the rows summed over runs."""
    chosen = frame[(frame.experiment == experiment) & (frame.split == split)]
    rows = []
    for (system, space), group in chosen.groupby(["system", "space"]):
        summary = group[group.seed == "all"].set_index("metric")
        runs = group[group.seed != "all"][["seed", "noise_seed"]].drop_duplicates()
        row = {"system": system, "space": space, "n_runs": len(runs)}
        for metric in (*metrics, *COSTS):
            if metric not in summary.index:
                continue
            found = summary.loc[metric]
            row |= {metric: found.value, "n_items": row.get("n_items", found.n_items)}
            row |= {f"{metric}_{end}": found[end] for end in ("sd", "ci_low", "ci_high", "reason")}
        if "n_items" in row:
            rows.append(row)
    order = {system: place for place, system in enumerate(SYSTEMS)}
    rows.sort(key=lambda row: (order.get(row["system"], len(order)), row["system"], row["space"] != "text"))
    mark_best(rows, frame[(frame.experiment == f"{experiment}:paired") & (frame.split == split) & (frame.seed == "all")], metrics)
    return rows


def mark_best(rows: list[dict], paired: pd.DataFrame, metrics: list[str]) -> None:
    """Set ``<metric>_mark``: "best", or "tie" where the difference from the best may be 0.

    A tie is read from the paired interval of the two systems where ``metrics.csv`` has it (it holds 0), else from the row's own
    interval (it holds the best mean). Bounds, the opposite direction and centred rows are not ranked.
    """
    intervals = {(row.system, row.metric): (row.ci_low, row.ci_high) for row in paired.itertuples() if row.space == "text"}
    for metric in metrics:
        ranked = [row for row in rows if row["space"] == "text" and row["system"] not in NOT_RANKED
                  and not math.isnan(row.get(metric, math.nan))]
        if metric not in BETTER or not ranked:
            continue
        best = (max if BETTER[metric] == "higher" else min)(ranked, key=lambda row: row[metric])
        for row in ranked:
            ours, theirs = row["system"], best["system"]
            pair = intervals.get((f"{ours}-{theirs}", metric)) or intervals.get((f"{theirs}-{ours}", metric))
            low, high = pair or (row[metric + "_ci_low"], row[metric + "_ci_high"])
            if row is best or row[metric] == best[metric]:
                row[metric + "_mark"] = "best"
            elif low <= (0 if pair else best[metric]) <= high:
                row[metric + "_mark"] = "tie"


def _heading(metric: str) -> str:
    return metric.replace("sbert_sim", SBERT_LABEL) + ARROWS.get(BETTER.get(metric, ""), "")


def _name(row: dict) -> str:
    return row["system"] + ("" if row["space"] == "text" else f" ({row['space']} space)")


def _form(value: float) -> str:
    """Four decimals below .01, three below 10, one above."""
    return ".1f" if abs(value) >= 10 else ".3f" if abs(value) >= 0.01 or value == 0 else ".4f"


def _plain(row: dict, name: str) -> str:
    """A cost: a count of parameters, or milliseconds; blank where it was not measured."""
    value = row.get(name, math.nan)
    return "" if math.isnan(value) else format(value, ",.0f" if name == "parameters" else _form(value))


def _cell(row: dict, metric: str) -> str:
    """``**0.300** ± 0.010 [0.280, 0.320]``; blank without a row, n/c without a value."""
    if row.get(metric) is None:
        return ""
    value, _, ends = interval(*(row[metric + end] for end in ENDS), form=(form := _form(row[metric]))).partition(" ")
    shown = {"best": "**{}**", "tie": "*{}*"}.get(row.get(metric + "_mark", ""), "{}").format(value)
    sd = row.get(metric + "_sd", math.nan)
    return " ".join(filter(None, [shown, "" if math.isnan(sd) else f"± {sd:{form}}", ends]))


# ------------------------------------------------------------------------------------------------------- Table 2: captions
DISJOINT = "zero_shot:disjoint"        # mapping and decoder trained on disjoint recordings
CAPTION_PANELS = {
    "zero_shot": ("2a. Zero-shot",
                  ("The decoder is trained on text vectors and never hears a sound; at test it is fed with the row's vectors. "
                  "A mapping that uses pairs was trained on audio-text pairs: this is not the text-only zero-shot of DRCap or WSAC. "
                  "Rows share one decoder; capdec and rows in the centred space have decoders of their own, trained on text alone too.")),
    DISJOINT: ("2a, strict", "As 2a, but the mapping's pairs and the decoder's captions come from disjoint recordings of train."),
    "supervised": ("2b. Fully supervised",
                   "Each row has its own decoder, trained on the audio vectors of the row; the mapping is frozen."),
}
BLOCKS = (("cider_d", "spider", "spice", "meteor", "sbert_sim"), ("rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"))
SUBSETS = {"seen": "labels seen in train", "unseen": "a label not in train", "new_source": "sources not in train",
           "known_phrasing": "known phrasing", "heldout_phrasing": "held-out phrasing"}
TABLE2_LEGEND = (
    "Mean ± standard deviation over training seeds [95 % interval: one training seed, and the recordings drawn anew]; table2.csv also has the "
    "95 % t-interval over seeds (columns _t95: half its width). **Bold**: best of the panel; *italic*: its difference from the best is within "
    "the interval; text_ceiling, a bound, is not ranked. n/c: not computed, with the reason at the end. Decoding is the same in every row "
    "that is compared. CIDEr-D is in its own scale [0, 10], as in the literature (a paper's 70.5 is 0.705); SPIDEr is its mean with SPICE. "
    "BLEU and METEOR are corpus scores, in every bootstrap replicate too; the other metrics are means over clips."
)


def write_table2(profile: Profile, split: str = "test") -> pd.DataFrame:
    """Table 2 from ``metrics.csv``: captions with and without the bridge, a panel a setting; write ``table2.csv`` and ``.md``.

    Returns:
        the table as written to CSV: experiment, system, space, decoding, n_items, n_seeds, every metric with ``_sd``, ``_ci_low``,
        ``_ci_high``, ``_t95`` and ``_mark``, the relative gain over raw, the paper's, and CIDEr-D minus ridge's.

    Raises:
        ValueError: no captions were scored yet.
    """
    frame = MetricsFile(profile).frame()
    parts = [f"# Table 2. Captions with and without the bridge\n\nProfile {profile.name}, split {split}. {TABLE2_LEGEND}\n"]
    rows: list[dict] = []
    lacking: dict[tuple[str, str], dict[str, None]] = {}            # (metric, reason): the panels that lack it
    for experiment, (title, about) in CAPTION_PANELS.items():
        if found := _caption_rows(frame, experiment, split):
            parts += [f"## {title}\n\n{about}\n", *_caption_panel(found)]
            rows += found
        for row in found:
            for metric in METRICS:
                if isinstance(reason := row.get(f"{metric}_reason"), str) and reason:
                    lacking.setdefault((metric, reason), {})[title.split(".")[0]] = None
    if not rows:
        raise ValueError(f"metrics.csv has no captioning rows for split {split!r}: run notebooks 07 and 08, "
                         "or ./run_all.sh --only 07, then 08")
    if lacking:
        parts.append("## Not computed\n\n" + "".join(f"- {metric} ({', '.join(panels)}): {reason}\n"
                                                     for (metric, reason), panels in lacking.items()))
    columns = ["experiment", "system", "space", "decoding", "n_items", "n_seeds",
               *(metric + end for metric in METRICS for end in ("", "_sd", "_ci_low", "_ci_high", "_t95", "_mark")),
               *(name + end for name in (GAIN, OVER_RIDGE) for end in ENDS), "paper_relative_gain",
               *(f"cider_d_{subset}{end}" for subset in SUBSETS for end in ENDS)]
    write_table(profile, "table2", rows, columns, "\n".join(parts))
    return pd.DataFrame(rows, columns=columns)


def _caption_rows(frame: pd.DataFrame, experiment: str, split: str) -> list[dict]:
    """The rows of one setting, decoding by decoding, each with its gains and its CIDEr-D on subsets."""
    rows = []
    paired = f"{experiment}:paired"
    for decoding in sorted(set(frame.decoding[frame.experiment == experiment])):
        part = frame[frame.decoding == decoding]
        summed = part[part.experiment.isin([experiment, paired]) & (part.seed == "all")].set_index(
            ["experiment", "split", "system", "space", "metric"]).sort_index()

        def figure(name: str, *key: str, summed: pd.DataFrame = summed) -> dict[str, float]:
            return {name + end: summed.at[key, end[1:] or "value"] for end in ENDS} if key in summed.index else {}

        for row in score_rows(part, experiment, split, list(METRICS)):
            system, space = row["system"], row["space"]
            mine = part[(part.experiment == experiment) & (part.split == split) & (part.system == system) & (part.space == space)]
            row |= {"experiment": experiment, "decoding": decoding, "n_seeds": mine.seed[mine.seed != "all"].nunique()}
            row["paper_relative_gain"] = paper_gain(experiment, system)
            row |= {f"{metric}_t95": t_half_width(row.get(f"{metric}_sd"), row["n_seeds"]) for metric in METRICS}
            if space == "text":
                row |= figure(GAIN, paired, split, f"{system}-raw", "text", GAIN)
                row |= figure(OVER_RIDGE, paired, split, f"{system}-ridge", "text", "cider_d")
            for subset in SUBSETS:
                row |= figure(f"cider_d_{subset}", experiment, f"{split}:{subset}", system, space, "cider_d")
            rows.append(row)
    return rows


def paper_gain(experiment: str, system: str) -> str:
    """What the paper's abstract says of a system's relative gain in CIDEr; "?" where nothing is known, blank for raw itself."""
    if system == "raw":
        return ""
    claims = {part.experiment: rule.paper_value for rule in VERDICT_RULES for part in rule.parts if part.metric == GAIN}
    return f"up to {claims[experiment].removesuffix(' relative')}" if system == "diffusion_link" and experiment in claims else "?"


def t_half_width(sd: float | None, n_seeds: int) -> float | None:
    """Half the width of the 95 % t-interval of a mean over n seeds, t(.975, n - 1) s / sqrt(n); None with a single seed."""
    if n_seeds < 2 or sd is None or math.isnan(sd):
        return None
    return float(student_t.ppf(0.975, n_seeds - 1)) * sd / math.sqrt(n_seeds)


def _caption_panel(rows: list[dict]) -> list[str]:
    """Markdown of one setting: the metrics in two blocks, gains beside the paper's, and CIDEr-D on subsets."""
    head = ["system", "decoding", "n", "seeds"]
    starts = [[_name(row), row["decoding"], row["n_items"], str(row["n_seeds"])] for row in rows]

    def difference(row: dict, name: str, form: str) -> str:
        return interval(*(row[name + end] for end in ENDS), form=form) if name in row and row["system"] != "raw" else ""

    parts = [markdown_table([*head, *map(_heading, block)], [[*start, *(_cell(row, metric) for metric in block)]
                                                             for start, row in zip(starts, rows, strict=True)], left=2)
             for block in BLOCKS]
    parts.append(markdown_table([*head, "CIDEr-D gain over raw, ours", "the paper's", "CIDEr-D minus ridge's"], [
        [*start, difference(row, GAIN, "+.1%"), row["paper_relative_gain"], difference(row, OVER_RIDGE, "+.3f")]
        for start, row in zip(starts, rows, strict=True)], left=2))
    if subsets := [name for name in SUBSETS if any(f"cider_d_{name}" in row for row in rows)]:
        parts.append("CIDEr-D on parts of the split; held-out and known phrasing have one reference a clip and compare with each "
                     "other only.\n")
        parts.append(markdown_table([*head[:3], *(SUBSETS[name] for name in subsets)], [
            [*start[:3], *(_cell(row, f"cider_d_{name}") for name in subsets)]
            for start, row in zip(starts, rows, strict=True)], left=2))
    return parts


# ---------------------------------------------------------------------------------------------------- ablations (notebook 09)
ABLATION_METRICS = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank")
ABLATION_STEPS = {"mini": 240}                  # [ours] of every fit of an ablation; other profiles take those of Table 1
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)         # [ours] shares of the training clips, in notebooks 09 and A3
ABLATIONS = {       # what is changed -> (the question, the variants in order); a variant without rows is the base by another name
    "topology_weight": ("How much should the topology loss weigh? lambda = 0 leaves it out.",
                        "lambda_0 lambda_0.1 lambda_1 lambda_10"),
    "topology_form": ("Does the form of the topology loss matter? All four at lambda = 1, where the loss acts.",
                      "gram softmax_kl cross_gram distance"),
    "self_loss": ("Does it help that the network also predicts a text from its own noised self?", "self_on self_off"),
    "loss": ("Absolute or squared error: towards the conditional median or the mean?", "l1 l2"),
    "scale": ("On which scale s does the noise meet the vectors? lambda is scaled along, so that the ratio of the two losses stays.",
              "s_1 s_5 s_sqrt_D"),
    "centring": ("Is it easier to learn a map between vectors whose means were taken away?", "as_they_are centred"),
    "schedule": (("Does the noise schedule matter, or the number of levels T? Entered at the base's k*, and where half the variance "
                  "is noise."), "scaled_linear linear cosine T_100 scaled_linear_half linear_half cosine_half T_100_half"),
    "blocks": ("How many residual blocks does the network need?", "blocks_1 blocks_2 blocks_3 blocks_4 blocks_5"),
    "width": ("How wide must it be?", "W_1D W_2D W_4D"),
    "ema": ("Does it help to average the weights of the last steps?", "ema_on ema_off"),
    "start_step": (("Where should the audio vector enter (k*), and in how many DDIM steps (n) should it leave? Same fits, called "
                    "otherwise."), "k000_n01 k025_n01 k025_n10 k100_n01 k100_n10 k300_n01 k300_n10 k600_n01 k600_n10 k300_n05 k300_n50"),
    "entry_noise": ("Must noise be added to the audio vector where it enters? Same fits, one step, called otherwise.",
                    "noise_k000 none_k000 noise_k100 none_k100 noise_k300 none_k300 noise_k600 none_k600"),
    "pairs": ("How many pairs does it take, and do the controls take fewer?",
              " ".join(f"{system}_{100 * share:.0f}pct" for share in FRACTIONS
                       for system in ("diffusion_link", "ridge", "regression_mlp"))),
}


def ablation_rows(frame: pd.DataFrame, n_seeds: int, train_steps: int) -> list[dict]:
    """One row an ablation, variant and metric: value and interval, and the paired difference from the base.

    Args:
        frame: ``MetricsFile.frame()``; the rows of an ablation are recorded together, or not at all.
        n_seeds: training seeds of the profile; a row without an s.d. has one.
        train_steps: of every fit, closed forms apart.
    """
    frame = frame[(frame.seed == "all") & frame.experiment.str.startswith("ablation:")]
    found = {(row.experiment, row.system, row.metric): row for row in frame.itertuples()}
    rows = []
    for name, (_, listed) in ABLATIONS.items():
        experiment, labels = f"ablation:{name}", listed.split()
        same = [label for label in labels if (experiment, label, "rmg") not in found]
        if len(same) == len(labels):
            continue
        pairs = [f"{ours}-{theirs}" for ours, theirs in permutations(labels, 2)]
        labels, same = (labels, same) if same else (["base", *labels], ["base"])
        for label in [*labels, *(pair for pair in pairs if (f"{experiment}:paired", pair, "rmg") in found)]:
            steps = 0 if label.startswith("ridge") else train_steps
            for metric in ABLATION_METRICS:
                row = {"name": name, "variant": label, "is_base": int(label in same), "metric": metric}
                own = found["ablation:base", "base", metric] if label in same else found.get((experiment, label, metric))
                if own is not None:
                    row |= {"mean": own.value, "sd": own.sd, "ci_low": own.ci_low, "ci_high": own.ci_high,
                            "n_seeds": 1 if math.isnan(own.sd) else n_seeds, "train_steps": steps}
                if paired := found.get((f"{experiment}:paired", label if own is None else f"{label}-base", metric)):
                    row |= {"difference": paired.value, "difference_ci_low": paired.ci_low, "difference_ci_high": paired.ci_high}
                rows.append({key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()})
    return rows


def write_ablations(profile: Profile) -> pd.DataFrame:
    """Write ``ablations.csv`` and ``ablations.md``; a profile without rows of ablations shows those of mini.

    Returns:
        the table as written: one row an ablation, variant and metric, the base among the variants of each ablation.

    Raises:
        ValueError: there are no rows at all; the message says how to make them.
    """
    committed = (get_profile("mini", results_root=root) for root in (profile.results_root, REPO / "results"))
    for source in (profile, *committed):
        frame, steps = MetricsFile(source).frame(), ABLATION_STEPS.get(source.name, source.bridge.train_steps)
        if rows := ablation_rows(frame, len(source.seeds), steps):
            break
    else:
        raise ValueError("metrics.csv has no rows of ablations: run notebook 09 with full = True, or ./run_all.sh --only 09 --full")
    columns = ["name", "variant", "is_base", "metric", "mean", "sd", "ci_low", "ci_high", "difference", "difference_ci_low",
               "difference_ci_high", "n_seeds", "train_steps"]
    table = pd.DataFrame(rows, columns=columns)
    outside = (table.difference_ci_low > 0) | (table.difference_ci_high < 0)
    table["cell"] = [_ablation_cell(row, bold) for row, bold in zip(table.itertuples(), outside, strict=True)]
    items, tested = ", ".join(sorted(set(frame.n_items[frame.experiment == "ablation:base"]))), int(table.difference.notna().sum())
    parts = [
        (f"# Ablations of the bridge\n\nProfile {source.name}, split test, n = {items} clips, {len(source.seeds)} training seeds, "
        f"{steps} steps a fit. One thing is changed at a time; the base is `diffusion_link` as it was chosen on val, trained for the "
        "same steps as every variant; nothing is tuned again and nothing is chosen here. Mean ± standard deviation over training seeds "
        "[95 % interval: one training seed, one noise seed and the recordings drawn anew]. "
        "**Bold**: the paired 95 % interval of the difference from the base leaves 0 out. "
        f"That is so for {outside.sum()} of {tested} differences on this page; were there no effect at all, about "
        f"{round(0.05 * tested)} would be.\n")]
    for name, own in table.groupby("name", sort=False):
        variants, between = (list(dict.fromkeys(own.variant[mask])) for mask in (own["mean"].notna(), own["mean"].isna()))
        cells = own.pivot(index="variant", columns="metric", values="cell")[list(ABLATION_METRICS)]
        base = set(own.variant[own.is_base == 1])
        parts.append(f"## {name}\n\n{ABLATIONS[name][0]}\n\n" + markdown_table(["variant", *map(_heading, ABLATION_METRICS)], [
            [f"`{variant}`" + " (base)" * (variant in base), *cells.loc[variant]] for variant in variants]))
        parts += ["Paired differences at the same pairs:\n\n" + markdown_table(["difference", *ABLATION_METRICS], [
            [f"`{pair}`", *cells.loc[pair]] for pair in between])] if between else []
    write_table(profile, "ablations", rows, columns, "\n".join(parts))
    return table[columns]


def _ablation_cell(row: Any, bold: bool) -> str:
    """``**0.413 ± 0.000** [0.372, 0.446]``; of two variants their difference."""
    if math.isnan(row.mean):
        form = "+.1f" if abs(row.difference) >= 1 else "+.3f"
        return interval(row.difference, row.difference_ci_low, row.difference_ci_high, form)
    form = ".1f" if row.metric == "effective_rank" else ".3f"
    value, _, ends = interval(row.mean, row.ci_low, row.ci_high, form).partition(" ")
    value += "" if math.isnan(row.sd) else f" ± {row.sd:{form}}"
    return f"{f'**{value}**' if bold else value} {ends}"


# ---------------------------------------------------------------------------------------------------- ours beside the paper's
PAPER_CSV = REPO / "results/paper.csv"
UNKNOWN, NOT_REPORTED = "?", "-"
CAPTION_FIGURES = ("meteor", "cider", "spice", "spider", "fense")       # as papers print them, x 100
COMPARISON_COLUMNS = ("part", "claim", "setting", "system", "metric", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "paper",
                      "paper_status", "comparable", "evidence")
TABLE1_SYSTEMS = ("raw", "diffusion_bridge", "conditional_diffusion", "seed", "diffusion_link", "diffusion_link_ddim")
TABLE1_METRICS = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10")
TABLE2_METRICS = {"cider_d": "cider", "meteor": "meteor", "spice": "spice", "spider": "spider", "sbert_sim": None}   # ours: the paper's
SETTING_WORDS = {"gap": "gap", "zero_shot": "zero-shot", "training_free": "training-free", "supervised": "supervised"}
COMPARABLE = {
    "claim": "sign and rough size: other data, encoder and language model",
    "table": "no: other data, encoder and language model",
    "audiocaps": "yes: AudioCaps' test split; see the differences register for the rest",
}
WHY_APART = (
    "Others' figures on AudioCaps are not ranked with ours on `data/mini`: another test set, other references (composed here, written by people "
    "there), and CIDEr weighs a word by how rare it is in the references at hand. Two such scores share a name and not a scale."
)


def load_paper(path: Path = PAPER_CSV) -> pd.DataFrame:
    """``results/paper.csv``: what the paper and others report, typed by hand, one figure a line, as text.

    Only the paper's abstract and summaries of it were read: ``value`` is a number, "?" (unknown to us) or "-" (not in what we read), and
    ``status`` says where a figure comes from; "recalled" was checked against no source.
    """
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def paper_text(row: pd.Series) -> str:
    """A value of ``paper.csv`` as it is shown: "up to +52.5 % relative", "91.1", "?", "-"."""
    shown = {"relative percent": f"+{row.value} % relative", "blocks": f"{row.value} blocks"}.get(row.unit, row.value)
    return f"{row.bound} {shown}".strip()


def comparison_rows(results: Path) -> list[dict]:
    """Every row of ``comparison.csv`` from claims.csv, table1.csv, table2.csv and ``paper.csv``.

    Args:
        results: ``results/<profile>``; of an absent table there are no rows.

    Returns:
        rows with the columns of ``COMPARISON_COLUMNS``; ``part`` is claims, table1, table2 or others. ``ours`` is blank where nothing
        was computed, ``paper`` is "?" where nothing is known.
    """
    def table(name: str) -> list[dict[str, str]]:
        path = results / f"{name}.csv"
        return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.is_file() else []

    def figure(row: dict[str, str], metric: str) -> dict[str, str]:
        return {name: row.get(metric + end, "") for name, end in zip(("ours", "ci_low", "ci_high"), ENDS, strict=True)}

    def evidence(text: str, name: str) -> str:
        return text.partition(f"{name}=")[2].partition(",")[0]

    paper = load_paper()
    on_audiocaps = get_profile(results.name).data_dir.name == "audiocaps"
    comparable = COMPARABLE["audiocaps" if on_audiocaps else "table"]
    rows = []
    for claim in table("claims"):
        known = paper[paper.claim == claim["id"]].iloc[0]
        is_gain = known.metric == "cider_relative_gain"
        rows.append({
            "part": "claims", "claim": claim["id"], "setting": known.setting,
            "system": evidence(claim["evidence"], "system") or ("diffusion_link-raw" if is_gain else "diffusion_link"),
            "metric": evidence(claim["evidence"], "metric") or known.metric,
            **{name: claim[name] for name in ("ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence")},
            "paper": paper_text(known), "paper_status": known.status,
            "comparable": COMPARABLE["claim"] if is_gain and not on_audiocaps else comparable})
    for row in table("table1"):
        if row["system"] in TABLE1_SYSTEMS and row["space"] == "text":
            rows += [{"part": "table1", "setting": "gap", "system": row["system"], "metric": metric, **figure(row, metric),
                      "paper": UNKNOWN, "paper_status": UNKNOWN, "comparable": comparable,
                      "evidence": f"table1.csv: system={row['system']}"} for metric in TABLE1_METRICS]
    for row in table("table2"):
        setting, system = row["experiment"], row["system"]
        if setting in ("zero_shot", "supervised") and system in ("raw", "diffusion_link") and row["space"] == "text":
            for metric, theirs in TABLE2_METRICS.items():
                known = paper[(paper.system == "Diffusion-Link") & (paper.setting == setting) & (paper.metric == theirs)
                              & (system == "diffusion_link")]
                rows.append({
                    "part": "table2", "setting": setting, "system": system, "metric": metric, **figure(row, metric),
                    "n_seeds": row["n_seeds"], "paper": paper_text(known.iloc[0]) if len(known) else UNKNOWN,
                    "paper_status": known.status.iloc[0] if len(known) else UNKNOWN, "comparable": comparable,
                    "evidence": f"table2.csv: experiment={setting}, system={system}, decoding={row['decoding']}"})
    others = paper[(paper.system != "Diffusion-Link") & paper.metric.isin(CAPTION_FIGURES)]
    rows += [{"part": "others", "setting": row.setting, "system": row.system + (f" ({row.note})" if row.note else ""),
              "metric": row.metric, "paper": paper_text(row), "paper_status": row.status, "comparable": comparable,
              "evidence": "results/paper.csv"} for row in others.itertuples(index=False)]
    return rows


def write_comparison(profile: Profile) -> list[dict]:
    """Write ``results/<profile>/comparison.csv`` and ``.md``; return the rows."""
    rows = comparison_rows(profile.results_dir)
    parts = [(f"# Ours beside the paper's, profile {profile.name}\n\n"
              "\"?\" is unknown to us: only the paper's abstract and summaries of it were read.\n"), "## The claims\n"]
    parts.append(markdown_table(["claim", "setting", "the paper", "status", "ours, 95 % interval", "verdict", "comparable"], [
        [row["claim"], SETTING_WORDS[row["setting"]], row["paper"], row["paper_status"],
         f"{row['metric']} of {row['system']}: {_ours(row)}" if row["ours"] else "not computed",
         row["verdict"].replace("_", " "), row["comparable"]] for row in rows if row["part"] == "claims"], left=7))
    parts.append("## Tables\n")
    tables = []
    for part, name, metrics in (("table1", "Table 1", TABLE1_METRICS), ("table2", "Table 2", TABLE2_METRICS)):
        lines = []
        for (setting, system), cells in _grouped(rows, part).items():
            lines.append([SETTING_WORDS[setting], f"`{system}`", "ours", *(_ours(cells[metric]) for metric in metrics)])
            lines.append(["", "", "the paper", *(cells[metric]["paper"] for metric in metrics)])
        tables += [markdown_table([name, "", "", *metrics], lines, left=3)] if lines else []
    others = [[system, SETTING_WORDS[setting], *(cells[metric]["paper"] for metric in CAPTION_FIGURES), cells["cider"]["paper_status"]]
              for (setting, system), cells in _grouped(rows, "others").items()]
    names = ["METEOR", "CIDEr", "SPICE", "SPIDEr", "FENSE"]
    parts += ["\n".join(tables), "## What others report on AudioCaps\n",
              (f"{WHY_APART}\n\n{markdown_table(['system', 'setting', *names, 'status'], others, left=2)}\nScores x 100, as printed. "
              f"\"{NOT_REPORTED}\": not in what we read; \"recalled\": not checked against the source. The order is no ranking.\n")]
    write_table(profile, "comparison", rows, COMPARISON_COLUMNS, "\n".join(parts))
    return rows


def _grouped(rows: list[dict], part: str) -> dict[tuple[str, str], dict[str, dict]]:
    """(setting, system) -> metric -> row, of one part."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault((row["setting"], row["system"]), {})[row["metric"]] = row
    return found


def _ours(row: dict[str, str]) -> str:
    """Our value of a row of ``comparison.csv`` with its interval; a figure without spread has none."""
    value, low, high = (float(row[name]) if row[name] else math.nan for name in ("ours", "ci_low", "ci_high"))
    form = "+.1%" if row["metric"] == GAIN else "+.3f" if "-" in row["system"] else ",.0f" if abs(value) >= 1000 else ".3f"
    return interval(value, *((low, high) if low < high else ()), form=form)


# ------------------------------------------------------------------------------------------- the page and the models' cards
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Diffusion-Link, replicated</title>
<style>body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; }} th, td {{ border-bottom: 1px solid #e4e4e4; padding: .25rem .6rem; }}
img {{ max-width: 100%; }} pre {{ white-space: pre-wrap; }}</style></head>
<body>
{body}
</body></html>
"""


def write_report(profile: Profile, notebook: Path) -> Path:
    """``results/<profile>/report.html``: notebook 10 as it was executed, without its code and its checks, figures inside.

    Args:
        profile: where it is written.
        notebook: the executed notebook.

    Returns:
        its path. The page runs nothing and loads nothing.
    """
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_anchor_links=True,
                            embed_images=True, sanitize_html=True)
    return atomic_write(profile.results_dir / "report.html", PAGE.format(body=exporter.from_filename(str(notebook))[0]))
