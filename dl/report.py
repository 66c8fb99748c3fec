"""What is laid out from ``metrics.csv``: Tables 1 and 2, verdicts on the paper's claims, ablations, the comparison.

A part of a claim compares one figure with a threshold by its 95 % interval over training seeds, noise seeds and
recordings: **supported** if the interval lies on the claimed side, **partly_supported** if only the mean does,
**not_supported** if the mean does not, **not_tested** without the figure. The worst part decides.
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t as student_t

from dl.caption_metrics import CAPTION_DIRECTION, METRICS, SBERT_LABEL
from dl.config import REPO, Profile, get_profile
from dl.gap import ARROWS, DIRECTION, TITLES
from dl.peers import REGISTRY
from dl.store import SYSTEMS, MetricsFile, atomic_write, csv_text, markdown_table

BETTER = DIRECTION | CAPTION_DIRECTION                          # metric: which side is better
ENDS = ("", "_ci_low", "_ci_high")
GAIN, OVER_RIDGE = "cider_d_relative_gain", "cider_d_minus_ridge"


def interval(value: float, low: float = math.nan, high: float = math.nan, *, form: str = ".3f") -> str:
    """``0.355 [0.334, 0.376]``; with form ``+.1%`` ``+23.3 % [+7.0 %, +43.1 %]``; "n/c" without a value."""
    if math.isnan(value):
        return "n/c"
    text, *ends = (format(x, form).replace("%", " %") for x in (value, low, high) if not math.isnan(x))
    return text + (f" [{', '.join(ends)}]" if len(ends) == 2 else "")


def spread(name: str, row: Any) -> dict[str, float]:
    """``name``, ``name_ci_low`` and ``name_ci_high`` of a row of metrics.csv."""
    return dict(zip((name + end for end in ENDS), (row.value, row.ci_low, row.ci_high), strict=True))


def write_table(profile: Profile, name: str, rows: list[dict], columns: list[str], parts: list[str]) -> None:
    """Write ``results/<profile>/<name>.csv`` and, of the parts, ``<name>.md``, each whole."""
    atomic_write(profile.results_dir / f"{name}.csv", csv_text(rows, columns))
    atomic_write(profile.results_dir / f"{name}.md", "\n".join(parts))


def summed(frame: pd.DataFrame) -> dict[tuple[str, ...], Any]:
    """(experiment, split, system, space, metric) -> the row over all runs; beam search goes before greedy."""
    rows = frame[frame.seed == "all"].sort_values("decoding", key=lambda x: x.str.startswith("beam"), kind="stable")
    return {(row.experiment, row.split, row.system, row.space, row.metric): row for row in rows.itertuples()}


# ------------------------------------------------------------------------------------------ the claims and their rules
TUNING_METRIC = "rmg"   # [ours] the one criterion on val: it grows with distance across and with collapse within
DIFFUSION_PEERS = ("diffusion_bridge", "conditional_diffusion", "seed")
CONTROLS = ("ridge", "regression_mlp", "regression_mlp_topology")
VERDICTS = ("not_tested", "not_supported", "partly_supported", "supported")       # the worst first
CLAIM_COLUMNS = ["id", "claim", "paper_value", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence", "note"]
C1_METRICS = {"pair_cosine": "higher", "centroid_gap": "lower", "rmg": "lower"}


@dataclass(frozen=True)
class Part:
    """One figure and the side of ``threshold`` on which the claim puts it."""

    experiment: str                  # gap, zero_shot or supervised
    metric: str
    side: str                        # "higher", "lower", or "not_lower": the interval must reach the threshold
    baseline: str | None = None      # the system that diffusion_link is compared with, or None for its own figure
    threshold: float = 0.0
    exact: bool = False              # a count without spread: its value stands for its interval
    optional: bool = False           # a missing baseline is named instead of leaving the claim untested

    @property
    def key(self) -> tuple[str, ...]:
        """Where its row stands in metrics.csv: experiment, split, system, space, metric."""
        paired, minus = (":paired", f"-{self.baseline}") if self.baseline else ("", "")
        return self.experiment + paired, "test", f"diffusion_link{minus}", "text", self.metric

    def text(self, value: float, low: float, high: float) -> str:
        """``rmg of diffusion_link-raw -0.0500 [-0.0600, -0.0400]``; differences show their sign, gains are in %."""
        form = "+.1%" if self.metric == GAIN else "+.4f" if self.baseline else ".4f"
        figure = f"{value:,.0f}" if self.exact and not math.isnan(value) else interval(value, low, high, form=form)
        return f"{self.metric} of {self.key[2]} {figure}"


@dataclass(frozen=True)
class Rule:
    """A claim, what the paper reports, and the rule in words and as parts."""

    id: str
    claim: str
    paper_value: str
    rule: str
    parts: tuple[Part, ...]
    profiles: tuple[str, ...] | None = None      # where it can be tested; None: everywhere
    controlled: tuple[str, ...] = ()             # on these metrics the note names a control that does as well


VERDICT_RULES = (
    Rule("C1", "the bridge reduces the modality gap the most among prior diffusion-based methods",
         "most (no figure known)",
         "diffusion_link against each of diffusion_bridge, conditional_diffusion and seed that was run: pair_cosine "
         "higher, centroid_gap lower, rmg lower, each by its paired interval. The note says where ridge or a "
         "regression MLP equals the bridge or beats it.",
         tuple(Part("gap", metric, side, peer, optional=True)
               for peer in DIFFUSION_PEERS for metric, side in C1_METRICS.items()), controlled=tuple(C1_METRICS)),
    Rule("C2", "audio embeddings move collectively into the text distribution", "a figure",
         "centroid_gap falls from raw to diffusion_link by its paired interval, and the share of clips that move "
         "towards the text mean along mean_t - mean_a is at least .95 by its interval.",
         (Part("gap", "centroid_gap", "lower", "raw"), Part("gap", "share_toward_text", "higher", threshold=0.95))),
    Rule("C3", "zero-shot captioning gains up to 52.5 % in CIDEr over the raw audio vector", "+52.5 % relative",
         "relative gain of CIDEr-D, diffusion_link over raw with the same decoder trained on text vectors, above 0 "
         "by its paired interval; its size stands beside the paper's.",
         (Part("zero_shot", GAIN, "higher", "raw"),), controlled=("cider_d",)),
    Rule("C4", "fully supervised captioning gains up to 7.5 % in CIDEr over the raw audio vector", "+7.5 % relative",
         "relative gain of CIDEr-D, a decoder trained on bridged vectors over one trained on raw vectors, above 0 by "
         "its paired interval.",
         (Part("supervised", GAIN, "higher", "raw"),), controlled=("cider_d",)),
    Rule("C5", "a light module is enough: three residual MLP blocks on the frozen encoder's output",
         "three residual MLP blocks",
         "the three-block network has fewer than 10 million parameters, lowers rmg and centroid_gap against raw by "
         "their paired intervals, and the interval of its recall_at_10 minus raw's reaches 0.",
         (Part("gap", "rmg", "lower", "raw"), Part("gap", "centroid_gap", "lower", "raw"),
          Part("gap", "recall_at_10", "not_lower", "raw"),
          Part("gap", "parameters", "lower", threshold=1e7, exact=True))),
    Rule("C6", "no external knowledge is needed to reach the state of the art on AudioCaps",
         "state of the art (no figure known)",
         "only on AudioCaps with a 7B model: CIDEr-D above the best reported with retrieval, .705 zero-shot (DRCap), "
         "and above the best reported supervised figure, .911 (LAMB), by its interval; both figures are second-hand.",
         (Part("zero_shot", "cider_d", "higher", threshold=0.705),
          Part("supervised", "cider_d", "higher", threshold=0.911)), profiles=("paper",)),
)


def verdict(mean: float | None, ci_low: float | None, ci_high: float | None, side: str, threshold: float = 0.0) -> str:
    """The verdict on one figure with its 95 % interval (None or NaN where there is none).

    Args:
        side, threshold: see :class:`Part`. Without an interval a figure is at most partly_supported.

    Raises:
        ValueError: unknown side.
    """
    if side not in ("higher", "lower", "not_lower"):
        raise ValueError(f"unknown side {side!r}: choose higher, lower or not_lower")
    value, low, high = (math.nan if x is None else x - threshold for x in (mean, ci_low, ci_high))
    if math.isnan(value):
        return "not_tested"
    if side == "lower":
        value, low, high = -value, -high, -low
    if side == "not_lower":
        return "supported" if high >= 0 else "partly_supported" if math.isnan(high) and value >= 0 else "not_supported"
    return "supported" if low > 0 else "partly_supported" if value > 0 else "not_supported"


def combine(verdicts: list[str]) -> str:
    """The verdict on a claim from those on its parts: the worst of them."""
    return min(verdicts, key=VERDICTS.index, default="not_tested")


def comparisons(experiment: str) -> list[str]:
    """Baselines that the rules compare diffusion_link with in an experiment; gap adds the controls."""
    parts = [part for rule in VERDICT_RULES for part in rule.parts if part.experiment == experiment]
    found = {part.baseline for part in parts if part.baseline} | set(CONTROLS if experiment == "gap" else ())
    return sorted(found, key=SYSTEMS.index)


def judge(rule: Rule, frame: pd.DataFrame, profile_name: str) -> dict:
    """The claim's row of claims.csv from ``MetricsFile.frame()``, with the figure of the part that decided it.

    That is the worst part; of equally bad ones the one nearest to its threshold in widths of its interval.
    """
    row = {"id": rule.id, "claim": rule.claim, "paper_value": rule.paper_value, "n_seeds": 0, "verdict": "not_tested",
           "evidence": "", "decided_by": ""}
    if rule.profiles and profile_name not in rule.profiles:
        return row | {"note": f"tested in profile {' or '.join(rule.profiles)} only, this is {profile_name}"}
    figures, absent = summed(frame), []
    judged: list[tuple[str, float, Part, tuple[float, float, float]]] = []
    for part in rule.parts:
        found: Any = figures.get(part.key)
        if found is None and part.optional:
            absent.append(str(part.baseline))
            continue
        value, low, high = (getattr(found, name, math.nan) for name in ("value", "ci_low", "ci_high"))
        low, high = (value, value) if part.exact else (low, high)
        margin = abs(value - part.threshold) / (high - low) if high > low else math.inf
        judged.append((verdict(value, low, high, part.side, part.threshold), margin, part, (value, low, high)))
    notes = [f"{part.text(*figure)}: {word}" for word, _, part, figure in judged]
    notes += ["not run: " + ", ".join(dict.fromkeys(absent))] if absent else []
    notes += control_notes(figures, rule)
    row |= {"verdict": combine([entry[0] for entry in judged]), "note": "; ".join(notes)}
    worst = [entry for entry in judged if entry[0] == row["verdict"] and not math.isnan(entry[3][0])]
    if not worst:
        return row
    _, _, part, figure = min(worst, key=lambda entry: entry[1])
    experiment, split, system, _, metric = part.key
    decoding = figures[part.key].decoding
    runs = frame[(frame.experiment == part.experiment) & (frame.system == "diffusion_link") & (frame.seed != "all")
                 & (frame.split == "test") & (frame.decoding == decoding)]
    evidence = f"metrics.csv: experiment={experiment}, split={split}, system={system}, metric={metric}, seed=all"
    return row | dict(zip(("ours", "ci_low", "ci_high"), figure, strict=True)) | {
        "n_seeds": runs.seed.nunique(), "decided_by": part.text(*figure),
        "evidence": evidence + (f", decoding={decoding}" if decoding else "")}


def control_notes(figures: dict[tuple[str, ...], Any], rule: Rule) -> list[str]:
    """Where a control is not told apart from diffusion_link (the interval holds 0), or beats it."""
    notes = []
    for control in CONTROLS:
        equal, worse = [], []
        for metric in rule.controlled:
            row = figures.get(Part(rule.parts[0].experiment, metric, BETTER[metric], control).key)
            if row is None or math.isnan(row.ci_low):
                continue
            if row.ci_low <= 0 <= row.ci_high:
                equal.append(metric)
            elif (row.value > 0) != (BETTER[metric] == "higher"):
                worse.append(metric)
        notes += [f"{control} {word} diffusion_link on {', '.join(found)}"
                  for word, found in (("is not told apart from", equal), ("beats", worse)) if found]
    return notes


def write_claims(profile: Profile) -> list[dict]:
    """Judge every claim from ``metrics.csv``; write ``claims.csv`` and ``claims.md``; return the rows."""
    frame = MetricsFile(profile).frame()
    rows = [judge(rule, frame, profile.name) for rule in VERDICT_RULES]
    head = ["claim", "", "paper", "verdict", "the figure that decided, 95 % interval", "training seeds"]
    table = markdown_table(head, [[row["id"], row["claim"], row["paper_value"], row["verdict"].replace("_", " "),
                                   row["decided_by"], row["n_seeds"]] for row in rows], left=5)
    details = [f"**{row['id']}** {rule.rule}\n\n" + "".join(f"- {note}\n" for note in row["note"].split("; "))
               for rule, row in zip(VERDICT_RULES, rows, strict=True)]
    write_table(profile, "claims", rows, CLAIM_COLUMNS, [
        (f"# Verdicts on the paper's claims, profile {profile.name}\n\nThe rules were fixed before any system was "
         f"scored on test.\n\n{table}\n## Rules and figures\n"), *details])
    return rows


# ---------------------------------------------------------------------------------------- what both tables are made of
NOT_RANKED = ("text_floor", "text_ceiling", "text_to_audio")    # they read captions of the clip, or go the other way


def score_rows(frame: pd.DataFrame, experiment: str, metrics: list[str]) -> list[dict]:
    """One dict a (system, space) from the rows over all runs on test: systems in their order, text space first."""
    rows = []
    scored = frame[(frame.experiment == experiment) & (frame.split == "test")]
    for (system, space), group in scored.groupby(["system", "space"]):
        runs = group[group.seed != "all"]
        row = {"system": system, "space": space, "n_runs": len(runs[["seed", "noise_seed"]].drop_duplicates()),
               "n_seeds": runs.seed.nunique()}
        for found in group[(group.seed == "all") & group.metric.isin([*metrics, *COSTS])].itertuples():
            row |= {"n_items": found.n_items} | row | spread(found.metric, found)
            row |= {f"{found.metric}_sd": found.sd, f"{found.metric}_reason": found.reason}
        rows += [row] if "n_items" in row else []
    order = {system: place for place, system in enumerate(SYSTEMS)}
    rows.sort(key=lambda row: (order.get(row["system"], len(order)), row["system"], row["space"] != "text"))
    mark_best(rows, frame[frame.experiment == f"{experiment}:paired"], metrics)
    return rows


def mark_best(rows: list[dict], paired: pd.DataFrame, metrics: list[str]) -> None:
    """Set ``<metric>_mark`` to "best", or to "tie" where the paired interval of the difference from the best holds 0.

    Where that difference was not recorded, a tie is a row whose own interval holds the best mean.
    """
    paired = paired[(paired.split == "test") & (paired.seed == "all") & (paired.space == "text")]
    intervals = {(row.system, row.metric): (row.ci_low, row.ci_high) for row in paired.itertuples()}
    for metric in set(metrics) & set(BETTER):
        ranked = [row for row in rows if row["space"] == "text" and row["system"] not in NOT_RANKED
                  and not math.isnan(row.get(metric, math.nan))]
        best = sorted(ranked, key=lambda row: row[metric], reverse=BETTER[metric] == "higher")[:1]
        for row in ranked:
            ours, theirs = row["system"], best[0]["system"]
            pair = intervals.get((f"{ours}-{theirs}", metric)) or intervals.get((f"{theirs}-{ours}", metric))
            low, high = pair or (row[metric + "_ci_low"], row[metric + "_ci_high"])
            if row[metric] == best[0][metric]:
                row[metric + "_mark"] = "best"
            elif low <= (0 if pair else best[0][metric]) <= high:
                row[metric + "_mark"] = "tie"


def heading(metric: str) -> str:
    return metric.replace("sbert_sim", SBERT_LABEL) + ARROWS.get(BETTER.get(metric, ""), "")


def _name(row: dict) -> str:
    return row["system"] + ("" if row["space"] == "text" else f" ({row['space']} space)")


def _form(value: float) -> str:
    """Four decimals below .01, three below 10, one above."""
    return ".1f" if abs(value) >= 10 else ".3f" if abs(value) >= 0.01 or value == 0 else ".4f"


def _cell(row: dict, metric: str) -> str:
    """``**0.300** ± 0.010 [0.280, 0.320]``; blank without a row, n/c without a value."""
    if row.get(metric) is None:
        return ""
    form, sd = _form(row[metric]), row.get(metric + "_sd", math.nan)
    value, _, ends = interval(*(row[metric + end] for end in ENDS), form=form).partition(" ")
    shown = {"best": "**{}**", "tie": "*{}*"}.get(row.get(metric + "_mark", ""), "{}").format(value)
    return " ".join(filter(None, [shown, "" if math.isnan(sd) else f"± {sd:{form}}", ends]))


def _table(rows: list[dict], metrics: Iterable[str]) -> str:
    """A line a system, a cell a metric."""
    cells = [[_name(row), *(_cell(row, metric) for metric in metrics)] for row in rows]
    return markdown_table(["system", *map(heading, metrics)], cells)


# ---------------------------------------------------------------------------------------------------- Table 1: the gap
WATCHED = ("recall_at_10", "effective_rank")    # in every panel: they fall when a gap is closed by a collapse
GAP_PANELS = {
    "Distance and similarity": ("pair_cosine", "nonpair_cosine", "cosine_margin", "centroid_gap", "rmg"),
    "Distributions": ("separability_auc", "frechet_distance", "mmd2", "alignment", "uniformity"),
    "Retrieval": ("recall_at_1", "recall_at_5", "map_at_10", "text_to_audio_recall_at_10", "label_recall_at_10"),
    "Topology": ("gram_correlation", "linear_cka", "knn_overlap"),
    "The gap as one vector": ("gap_length", "direction_consistency", "orthogonality", "share_toward_text"),
}
FLAGS = ("uses_pairs", "uses_memory", "trained")
COSTS = ("parameters", "ms_per_1000")
TABLE1_LEGEND = (
    "Mean ± standard deviation over training seeds x noise seeds [95 % interval: one training seed, one noise seed "
    "and the recordings drawn anew]. **Bold**: best; *italic*: its difference from the best is within the interval. "
    "n/c: not computed."
)
REVERSE = (
    "\ntext_to_audio is the opposite direction, a second network with the roles swapped: first captions mapped among "
    "the sounds. It is not ranked; its retrieval looks for one sound among the sounds, not for one of five captions "
    "among all.\n"
)


def write_table1(profile: Profile) -> pd.DataFrame:
    """Table 1: every system's gap metrics on test, with what it uses and costs; returns the table as written.

    Raises:
        ValueError: there is nothing to show yet.
    """
    frame = MetricsFile(profile).frame()
    panels = {title: list(dict.fromkeys((*panel, *WATCHED))) for title, panel in GAP_PANELS.items()}
    metrics = list(dict.fromkeys(metric for panel in panels.values() for metric in panel))
    recorded = set(frame.metric[(frame.experiment == "gap") & (frame.split == "test")])
    metrics += sorted(recorded & set(DIRECTION) - set(metrics))
    rows = score_rows(frame, "gap", metrics)
    if not rows:
        raise ValueError("metrics.csv has no gap rows of split 'test': run notebook 05, or ./run_all.sh --only 05")
    for row in rows:
        method = REGISTRY.get(row["system"])
        row |= {flag: "" if method is None else ("yes" if getattr(method, flag) else "no") for flag in FLAGS}
    uses = [[_name(row), *(row[flag] for flag in FLAGS), f"{row['parameters']:,.0f}" if "parameters" in row else "",
             f"{row['ms_per_1000']:{_form(row['ms_per_1000'])}}" if "ms_per_1000" in row else "", row["n_items"],
             row["n_runs"]] for row in rows]
    head = ["system", "uses pairs", "uses a memory", "trained", "parameters", "ms per 1,000 vectors", "clips", "runs"]
    items = ", ".join(sorted({str(row["n_items"]) for row in rows}))
    parts = [(f"# Table 1. The modality gap by system\n\nProfile {profile.name}, split test, n = {items} clips. "
              f"{TABLE1_LEGEND}\n"), f"## What each system uses\n\n{markdown_table(head, uses)}{REVERSE}"]
    parts += [f"## {title}\n\n{_table(rows, panel)}" for title, panel in panels.items()]
    if reasons := sorted({f"- {m}: {row[m + '_reason']}" for row in rows for m in metrics if row.get(m + "_reason")}):
        parts.append("## Not computed\n\n" + "\n".join(reasons) + "\n")
    columns = ["system", "space", *FLAGS, *COSTS, "n_items", "n_runs",
               *(metric + end for metric in metrics for end in ("", "_sd", "_ci_low", "_ci_high", "_mark"))]
    write_table(profile, "table1", rows, columns, parts)
    return pd.DataFrame(rows)[[column for column in columns if column in set().union(*rows)]]


# --------------------------------------------------------------------------------------------------- Table 2: captions
DISJOINT = "zero_shot:disjoint"        # mapping and decoder trained on disjoint recordings
CAPTION_PANELS = {
    "zero_shot": ("2a. Zero-shot", (
        "The decoder is trained on text vectors and never hears a sound; at test it is fed with the row's vectors. A "
        "mapping that uses pairs was trained on audio-text pairs: this is not the text-only zero-shot of DRCap or "
        "WSAC. Rows share one decoder; capdec and rows in the centred space have decoders of their own, trained on "
        "text alone too.")),
    DISJOINT: ("2a, strict",
               "As 2a, but the mapping's pairs and the decoder's captions come from disjoint recordings of train."),
    "supervised": ("2b. Fully supervised",
                   "Each row has its own decoder, trained on the audio vectors of the row; the mapping is frozen."),
}
BLOCKS = (("cider_d", "spider", "spice", "meteor", "sbert_sim"), ("rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"))
SUBSETS = {"seen": "labels seen in train", "unseen": "a label not in train", "new_source": "sources not in train",
           "known_phrasing": "known phrasing", "heldout_phrasing": "held-out phrasing"}
PAPER_GAINS = {rule.parts[0].experiment: f"up to {rule.paper_value.removesuffix(' relative')}"
               for rule in VERDICT_RULES if rule.parts[0].metric == GAIN}
TABLE2_LEGEND = (
    "Mean ± standard deviation over training seeds [95 % interval: one training seed, and the recordings drawn anew]; "
    "table2.csv also has the 95 % t-interval over seeds (columns _t95: half its width). **Bold**: best of the panel; "
    "*italic*: its difference from the best is within the interval; text_ceiling reads the vector of a scored caption "
    "and is not ranked. n/c: not computed, with the reason at the end. Decoding is the same in every row that is "
    "compared. CIDEr-D is in its own "
    "scale [0, 10], as in the literature (a paper's 70.5 is 0.705); SPIDEr is its mean with SPICE. BLEU and METEOR "
    "are corpus scores, in every bootstrap replicate too; the other metrics are means over clips."
)


def write_table2(profile: Profile) -> pd.DataFrame:
    """Table 2, captions with and without the bridge, a panel a setting; returns the table as written.

    Raises:
        ValueError: no captions were scored yet.
    """
    frame = MetricsFile(profile).frame()
    parts = [("# Table 2. Captions with and without the bridge\n\n"
              f"Profile {profile.name}, split test. {TABLE2_LEGEND}\n")]
    rows: list[dict] = []
    lacking: dict[tuple[str, str], dict[str, None]] = {}            # (metric, reason): the panels that lack it
    for experiment, (title, about) in CAPTION_PANELS.items():
        decodings = sorted(set(frame.decoding[frame.experiment == experiment]))
        found = [row for name in decodings for row in _caption_rows(frame[frame.decoding == name], experiment, name)]
        rows += found
        parts += [f"## {title}\n\n{about}\n", *_caption_panel(found)] if found else []
        for row, metric in product(found, METRICS):
            if reason := row.get(f"{metric}_reason"):
                lacking.setdefault((metric, reason), {})[title.split(".")[0]] = None
    if not rows:
        raise ValueError("metrics.csv has no captioning rows of split 'test': run notebooks 07 and 08, "
                         "or ./run_all.sh --only 07, then 08")
    reasons = [f"- {metric} ({', '.join(panels)}): {reason}\n" for (metric, reason), panels in lacking.items()]
    parts += ["## Not computed\n\n" + "".join(reasons)] if reasons else []
    columns = ["experiment", "system", "space", "decoding", "n_items", "n_seeds",
               *(metric + end for metric in METRICS for end in ("", "_sd", "_ci_low", "_ci_high", "_t95", "_mark")),
               *(name + end for name in (GAIN, OVER_RIDGE) for end in ENDS), "paper_relative_gain",
               *(f"cider_d_{subset}{end}" for subset in SUBSETS for end in ENDS)]
    write_table(profile, "table2", rows, columns, parts)
    return pd.DataFrame(rows, columns=columns)


def _caption_rows(frame: pd.DataFrame, experiment: str, decoding: str) -> list[dict]:
    """The rows of one setting and decoding, each with its gains and its CIDEr-D on subsets."""
    figures, rows = summed(frame), score_rows(frame, experiment, list(METRICS))
    for row in rows:
        system, space = row["system"], row["space"]
        paper = {"raw": "", "diffusion_link": PAPER_GAINS.get(experiment, "?")}.get(system, "?")
        row |= {"experiment": experiment, "decoding": decoding, "paper_relative_gain": paper}
        row |= {f"{metric}_t95": t_half_width(row.get(f"{metric}_sd"), row["n_seeds"]) for metric in METRICS}
        wanted = {f"cider_d_{subset}": (experiment, f"test:{subset}", system, space, "cider_d") for subset in SUBSETS}
        if space == "text":
            wanted[GAIN] = (f"{experiment}:paired", "test", f"{system}-raw", space, GAIN)
            wanted[OVER_RIDGE] = (f"{experiment}:paired", "test", f"{system}-ridge", space, "cider_d")
        for name, key in wanted.items():
            row |= spread(name, figures[key]) if key in figures else {}
    return rows


def t_half_width(sd: float | None, n_seeds: int) -> float | None:
    """Half the 95 % t-interval of a mean over n seeds, t(.975, n - 1) s / sqrt(n); None with a single seed."""
    if n_seeds < 2 or sd is None or math.isnan(sd):
        return None
    return float(student_t.ppf(0.975, n_seeds - 1)) * sd / math.sqrt(n_seeds)


def _caption_panel(rows: list[dict]) -> list[str]:
    """Markdown of one setting: the metrics in two blocks, gains beside the paper's, and CIDEr-D on subsets."""
    def table(head: list[str], cells: list[list[str]], start: int = 4) -> str:
        first = [[_name(row), row["decoding"], row["n_items"], str(row["n_seeds"])][:start] for row in rows]
        body = [[*left, *right] for left, right in zip(first, cells, strict=True)]
        return markdown_table([*["system", "decoding", "n", "seeds"][:start], *head], body, left=2)

    def difference(row: dict, name: str, form: str) -> str:
        known = name in row and row["system"] != "raw"
        return interval(*(row[name + end] for end in ENDS), form=form) if known else ""

    parts = [table([*map(heading, block)], [[_cell(row, metric) for metric in block] for row in rows])
             for block in BLOCKS]
    gains = [[difference(row, GAIN, "+.1%"), row["paper_relative_gain"], difference(row, OVER_RIDGE, "+.3f")]
             for row in rows]
    parts.append(table(["CIDEr-D gain over raw, ours", "the paper's", "CIDEr-D minus ridge's"], gains))
    if subsets := [name for name in SUBSETS if any(f"cider_d_{name}" in row for row in rows)]:
        cells = [[_cell(row, f"cider_d_{name}") for name in subsets] for row in rows]
        parts += [("CIDEr-D on parts of the split; held-out and known phrasing have one reference a clip and "
                   "compare with each other only.\n"), table([SUBSETS[name] for name in subsets], cells, start=3)]
    return parts


# --------------------------------------------------------------------------------------------- ablations (notebook 09)
ABLATION_METRICS = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank")
ABLATION_STEPS = {"mini": 240}              # [ours] of every fit of an ablation; other profiles take those of Table 1
FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)     # [ours] shares of the training clips
ABLATIONS = {       # what is changed -> (the question, the variants in order); no rows: the base by another name
    "topology_weight": ("How much should the topology loss weigh? lambda = 0 leaves it out.",
                        "lambda_0 lambda_0.1 lambda_1 lambda_10"),
    "topology_form": ("Does the form of the topology loss matter? All four at lambda = 1, where the loss acts.",
                      "gram softmax_kl cross_gram distance"),
    "self_loss": ("Does it help that the network also predicts a text from its own noised self?", "self_on self_off"),
    "loss": ("Absolute or squared error: towards the conditional median or the mean?", "l1 l2"),
    "scale": (("On which scale s does the noise meet the vectors? lambda is scaled along, so that the ratio of the "
               "two losses stays."), "s_1 s_5 s_sqrt_D"),
    "centring": ("Is it easier to learn a map between vectors whose means were taken away?", "as_they_are centred"),
    "schedule": (("Does the noise schedule matter, or the number of levels T? Entered at the base's k*, and where "
                  "half the variance is noise."),
                 "scaled_linear linear cosine T_100 scaled_linear_half linear_half cosine_half T_100_half"),
    "blocks": ("How many residual blocks does the network need?", "blocks_1 blocks_2 blocks_3 blocks_4 blocks_5"),
    "width": ("How wide must it be?", "W_1D W_2D W_4D"),
    "ema": ("Does it help to average the weights of the last steps?", "ema_on ema_off"),
    "start_step": (("Where should the audio vector enter (k*), and in how many DDIM steps (n) should it leave? Same "
                    "fits, called otherwise."),
                   ("k000_n01 k025_n01 k025_n10 k100_n01 k100_n10 k300_n01 k300_n10 k600_n01 k600_n10 k300_n05 "
                    "k300_n50")),
    "entry_noise": ("Must noise be added to the audio vector where it enters? Same fits, one step, called otherwise.",
                    "noise_k000 none_k000 noise_k100 none_k100 noise_k300 none_k300 noise_k600 none_k600"),
    "pairs": ("How many pairs does it take, and do the controls take fewer?",
              " ".join(f"{system}_{100 * share:.0f}pct" for share in FRACTIONS
                       for system in ("diffusion_link", "ridge", "regression_mlp"))),
}
ABLATION_COLUMNS = ["name", "variant", "is_base", "metric", "mean", "sd", "ci_low", "ci_high", "difference",
                    "difference_ci_low", "difference_ci_high", "n_seeds", "train_steps"]


def ablation_rows(frame: pd.DataFrame, n_seeds: int, train_steps: int) -> list[dict]:
    """One row an ablation, variant and metric: value and interval, and the paired difference from the base.

    Args:
        frame: ``MetricsFile.frame()``; the rows of an ablation are recorded together, or not at all.
        n_seeds: training seeds of the profile; a row without an s.d. has one.
        train_steps: of every fit, closed forms apart.
    """
    figures, rows = summed(frame[frame.split == "test"]), []
    found = {(experiment, system, metric): row for (experiment, _, system, _, metric), row in figures.items()}
    for name, (_, listed) in ABLATIONS.items():
        experiment, labels = f"ablation:{name}", listed.split()
        same = [label for label in labels if (experiment, label, "rmg") not in found]
        if len(same) == len(labels):
            continue
        pairs = [f"{ours}-{theirs}" for ours, theirs in permutations(labels, 2)]
        labels, same = (labels, same) if same else (["base", *labels], ["base"])
        labels = [*labels, *(pair for pair in pairs if (f"{experiment}:paired", pair, "rmg") in found)]
        for label, metric in product(labels, ABLATION_METRICS):
            row = {"name": name, "variant": label, "is_base": int(label in same), "metric": metric}
            own = found.get(("ablation:base", "base", metric) if label in same else (experiment, label, metric))
            if own is not None:
                row |= {"mean": own.value, "sd": own.sd, "ci_low": own.ci_low, "ci_high": own.ci_high,
                        "n_seeds": 1 if math.isnan(own.sd) else n_seeds,
                        "train_steps": 0 if label.startswith("ridge") else train_steps}
            if paired := found.get((f"{experiment}:paired", label if own is None else f"{label}-base", metric)):
                row |= spread("difference", paired)
            rows.append({key: float(f"{x:.6g}") if isinstance(x, float) else x for key, x in row.items()})
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
        raise ValueError("metrics.csv has no rows of ablations: run notebook 09 with full = True, or "
                         "./run_all.sh --only 09 --full")
    table = pd.DataFrame(rows, columns=ABLATION_COLUMNS)
    outside = (table.difference_ci_low > 0) | (table.difference_ci_high < 0)
    table["cell"] = [_ablation_cell(row, bold) for row, bold in zip(table.itertuples(), outside, strict=True)]
    items = ", ".join(sorted(set(frame.n_items[frame.experiment == "ablation:base"])))
    tested = int(table.difference.notna().sum())
    parts = [
        (f"# Ablations of the bridge\n\nProfile {source.name}, split test, n = {items} clips, {len(source.seeds)} "
         f"training seeds, {steps} steps a fit. One thing is changed at a time; the base is `diffusion_link` as it "
         "was chosen on val, trained for the same steps as every variant; nothing is tuned again and nothing is "
         "chosen here. Mean ± standard deviation over training seeds [95 % interval: one training seed, one noise "
         "seed and the recordings drawn anew]. **Bold**: the paired 95 % interval of the difference from the base "
         f"leaves 0 out. That is so for {outside.sum()} of {tested} differences on this page; were there no "
         f"effect at all, about {round(0.05 * tested)} would be.\n")]
    for name, own in table.groupby("name", sort=False):
        cells = own.pivot(index="variant", columns="metric", values="cell")[list(ABLATION_METRICS)]
        base = set(own.variant[own.is_base == 1])
        single, between = (own.variant[known].unique() for known in (own["mean"].notna(), own["mean"].isna()))
        lines = [[f"`{variant}`" + " (base)" * (variant in base), *cells.loc[variant]] for variant in single]
        parts.append(f"## {name}\n\n{ABLATIONS[name][0]}\n\n"
                     + markdown_table(["variant", *map(heading, ABLATION_METRICS)], lines))
        if len(between):
            lines = [[f"`{pair}`", *cells.loc[pair]] for pair in between]
            parts.append("Paired differences at the same pairs:\n\n"
                         + markdown_table(["difference", *ABLATION_METRICS], lines))
    write_table(profile, "ablations", rows, ABLATION_COLUMNS, parts)
    return table[ABLATION_COLUMNS]


def _ablation_cell(row: Any, bold: bool) -> str:
    """``**0.413 ± 0.000** [0.372, 0.446]``; of two variants their difference."""
    if math.isnan(row.mean):
        form = "+.1f" if abs(row.difference) >= 1 else "+.3f"
        return interval(row.difference, row.difference_ci_low, row.difference_ci_high, form=form)
    form = ".1f" if row.metric == "effective_rank" else ".3f"
    value, _, ends = interval(row.mean, row.ci_low, row.ci_high, form=form).partition(" ")
    value += "" if math.isnan(row.sd) else f" ± {row.sd:{form}}"
    return f"{f'**{value}**' if bold else value} {ends}"


# --------------------------------------------------------------------------------------------- ours beside the paper's
CAPTION_FIGURES = {"meteor": "METEOR", "cider": "CIDEr", "spice": "SPICE", "spider": "SPIDEr", "fense": "FENSE"}
COMPARISON_COLUMNS = ["part", "claim", "setting", "system", "metric", "ours", "ci_low", "ci_high", "n_seeds",
                      "verdict", "paper", "paper_status", "comparable", "evidence"]
COMPARED = {      # table -> (its settings, systems, our metrics: the paper's names)
    "table1": (("gap",), ("raw", *DIFFUSION_PEERS, "diffusion_link", "diffusion_link_ddim"),
               {"pair_cosine": "", "centroid_gap": "", "rmg": "", "recall_at_10": ""}),
    "table2": (("zero_shot", "supervised"), ("raw", "diffusion_link"),
               {"cider_d": "cider", "meteor": "meteor", "spice": "spice", "spider": "spider", "sbert_sim": ""}),
}
COMPARABLE = {
    "claim": "sign and rough size: other data, encoder and language model",
    "table": "no: other data, encoder and language model",
    "audiocaps": "yes: AudioCaps' test split; the README lists the other differences",
}
OTHERS = (
    "Others' figures on AudioCaps are not ranked with ours on `data/mini`: another test set, other references "
    "(composed here, written by people there), and CIDEr weighs a word by how rare it is in the references at hand. "
    "Two such scores share a name and not a scale.\n\n{table}\nScores x 100, as printed. \"-\": not in what we read; "
    "\"recalled\": not checked against the source. The order is no ranking.\n"
)


def load_paper() -> pd.DataFrame:
    """``results/paper.csv``: what the paper and others report, typed by hand, one figure a line, all columns as text.

    Only the paper's abstract and summaries of it were read. ``value`` is a number, "?" (unknown to us) or "-" (not in
    what we read); ``status`` says where it comes from, and "recalled" was checked against no source.
    """
    return pd.read_csv(REPO / "results/paper.csv", dtype=str, keep_default_na=False)


def _paper(row: Any) -> dict[str, str]:
    """A value of ``paper.csv`` as it is shown ("up to +52.5 % relative", "91.1", "?"), and where it comes from."""
    shown = {"relative percent": f"+{row.value} % relative", "blocks": f"{row.value} blocks"}.get(row.unit, row.value)
    return {"paper": f"{row.bound} {shown}".strip(), "paper_status": row.status}


def comparison_rows(results: Path) -> list[dict]:
    """Rows of ``comparison.csv`` from ``paper.csv`` and the tables that ``results/<profile>`` has.

    ``ours`` is blank where nothing was computed, ``paper`` is "?" where nothing is known.
    """
    def table(name: str) -> list[dict[str, str]]:
        path = results / f"{name}.csv"
        return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.is_file() else []

    paper, rows = load_paper(), []
    on_audiocaps = get_profile(results.name).data_dir.name == "audiocaps"
    comparable = COMPARABLE["audiocaps" if on_audiocaps else "table"]
    for claim in table("claims"):
        known = paper[paper.claim == claim["id"]].iloc[0]
        is_gain = known.metric == "cider_relative_gain"
        said = dict(part.split("=") for part in claim["evidence"].split(", ") if "=" in part)
        rows.append({
            "part": "claims", "claim": claim["id"], "setting": known.setting, **_paper(known),
            "metric": said.get("metric", known.metric),
            "system": said.get("system", "diffusion_link-raw" if is_gain else "diffusion_link"),
            **{name: claim[name] for name in ("ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence")},
            "comparable": COMPARABLE["claim"] if is_gain and not on_audiocaps else comparable})
    for part, (settings, systems, metrics) in COMPARED.items():
        for row in table(part):
            setting, system = row.get("experiment", "gap"), row["system"]
            if setting not in settings or system not in systems or row["space"] != "text":
                continue
            theirs = paper[(paper.system == ("Diffusion-Link" if system == "diffusion_link" else ""))
                           & (paper.setting == setting)]
            where = [f"{column}={row[column]}" for column in ("experiment", "system", "decoding") if column in row]
            for metric, name in metrics.items():
                found = theirs[theirs.metric == name]
                rows.append({
                    "part": part, "setting": setting, "system": system, "metric": metric, "ours": row.get(metric, ""),
                    **{end: row.get(f"{metric}_{end}", "") for end in ("ci_low", "ci_high")},
                    "n_seeds": row.get("n_seeds", ""), "comparable": comparable,
                    **(_paper(found.iloc[0]) if len(found) else {"paper": "?", "paper_status": "?"}),
                    "evidence": f"{part}.csv: {', '.join(where)}"})
    others = paper[(paper.system != "Diffusion-Link") & paper.metric.isin(CAPTION_FIGURES)]
    rows += [{"part": "others", "setting": row.setting, "system": row.system + (f" ({row.note})" if row.note else ""),
              "metric": row.metric, **_paper(row), "comparable": comparable,
              "evidence": "results/paper.csv"} for row in others.itertuples(index=False)]
    return rows


def write_comparison(profile: Profile) -> list[dict]:
    """Write ``results/<profile>/comparison.csv`` and ``.md``; return the rows."""
    rows = comparison_rows(profile.results_dir)
    parts: dict[str, dict] = {"claims": {}, **{name: {} for name in COMPARED}, "others": {}}
    for row in rows:                                    # part -> (setting, system) -> metric -> row
        parts[row["part"]].setdefault((row["setting"].replace("_", "-"), row["system"]), {})[row["metric"]] = row
    head = ["claim", "setting", "the paper", "status", "ours, 95 % interval", "verdict", "comparable"]
    claims = markdown_table(head, [
        [row["claim"], row["setting"].replace("_", "-"), row["paper"], row["paper_status"],
         f"{row['metric']} of {row['system']}: {_ours(row)}" if row["ours"] else "not computed",
         row["verdict"].replace("_", " "), row["comparable"]] for row in rows if row["part"] == "claims"], left=7)
    tables = []
    for part, (_, _, metrics) in COMPARED.items():
        lines = [line for (setting, system), cells in parts[part].items() for line in (
            [setting, f"`{system}`", "ours", *(_ours(cells[metric]) for metric in metrics)],
            ["", "", "the paper", *(cells[metric]["paper"] for metric in metrics)])]
        tables += [markdown_table([part.replace("table", "Table "), "", "", *metrics], lines, left=3)] if lines else []
    others = markdown_table(["system", "setting", *CAPTION_FIGURES.values(), "status"], [
        [system, setting, *(cells[metric]["paper"] for metric in CAPTION_FIGURES), cells["cider"]["paper_status"]]
        for (setting, system), cells in parts["others"].items()], left=2)
    write_table(profile, "comparison", rows, COMPARISON_COLUMNS, [
        (f"# Ours beside the paper's, profile {profile.name}\n\n"
         "\"?\" is unknown to us: only the paper's abstract and summaries of it were read.\n"),
        "## The claims\n", claims, "## Tables\n", "\n".join(tables), "## What others report on AudioCaps\n",
        OTHERS.format(table=others)])
    return rows


def _ours(row: dict[str, str]) -> str:
    """Our value of a row of ``comparison.csv`` with its interval; a figure without spread has none."""
    value, low, high = (float(row[name] or "nan") for name in ("ours", "ci_low", "ci_high"))
    form = "+.1%" if row["metric"] == GAIN else "+.3f" if "-" in row["system"] else ".3f"
    form = ",.0f" if abs(value) >= 1000 else form
    return interval(value, *([low, high] if low < high else []), form=form)


# ---------------------------------------------------------------------------------------------- the page and the cards
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Diffusion-Link, replicated</title>
<style>body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; font-size: 13px; } th, td { border-bottom: 1px solid #ddd; padding: .25rem .6rem; }
img { max-width: 100%; } pre { white-space: pre-wrap; }</style></head>
<body>BODY</body></html>
"""
ALLOWED_TAGS = [
    "a", "b", "blockquote", "br", "code", "details", "div", "em", "h1", "h2", "h3", "h4", "hr", "i", "li", "ol", "p",
    "pre", "small", "span", "strong", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "ul"]
CARDS = {      # checkpoint: (table, rows, metrics, what the hub calls the task)
    "bridge": ("table1", ["raw", "diffusion_link", "text_floor"],
               ["pair_cosine", "centroid_gap", "rmg", "recall_at_10", "effective_rank"], "audio-to-text-embedding"),
    "captioner": ("table2", ["raw", "diffusion_link", "text_ceiling"], ["cider_d", "meteor", "sbert_sim"],
                  "audio-captioning"),
}


def write_report(profile: Profile, notebook: Path) -> Path:
    """``results/<profile>/report.html``: the executed notebook 10 without its code. No script, nothing to load."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_anchor_links=True,
        embed_images=True, sanitize_html=True, config=Config({"SanitizeHTML": {"tags": ALLOWED_TAGS}}))
    body, _ = exporter.from_filename(str(notebook))
    return atomic_write(profile.results_dir / "report.html", PAGE.replace("BODY", body))


def write_cards(profile: Profile) -> list[Path]:
    """The README of each shipped checkpoint in the hub's format: ``dl/cards`` with figures of the tables."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    cards = []
    for name, (table, systems, metrics, task) in CARDS.items():
        folder, path = profile.results_dir / "checkpoints" / name, profile.results_dir / f"{table}.csv"
        if not folder.is_dir() or not path.is_file():
            continue
        rows = pd.read_csv(path).query("space == 'text'").drop_duplicates("system").set_index("system")
        rows = rows.reindex(systems)                    # of Table 2 the zero-shot rows, which come first
        ours = rows.loc["diffusion_link"]
        data = ModelCardData(
            model_name=f"diffusion-link-{name}-mini", license="mit", library_name="diffusion-link",
            datasets=["data/mini"], tags=["audio", "clap", "audio-captioning", "modality-gap"], eval_results=[
                EvalResult(task_type=task, dataset_type="mini", dataset_name="data/mini, test",
                           metric_type=metric, metric_name=TITLES[metric], metric_value=round(float(ours[metric]), 3))
                for metric in metrics])
        figures = markdown_table(["", *(TITLES[metric] for metric in metrics)], [
            [f"`{system}`", *(interval(*(row[metric + end] for end in ENDS)) for metric in metrics)]
            for system, row in rows.iterrows()])
        template = REPO / f"dl/cards/{name}.md"
        card = ModelCard.from_template(data, template_path=str(template), figures=figures, **ours.to_dict())
        cards.append(atomic_write(folder / "README.md", str(card).rstrip() + "\n"))
    return cards
