"""Table 2 (``table2.csv``, ``table2.md``): captions with and without the bridge, laid out from the rows of ``metrics.csv``.

One table, two panels: 2a zero-shot, 2b fully supervised; a strict zero-shot panel where those rows exist. Best and ties are marked
as in Table 1, among rows of one setting and one decoding. The paper's relative gains stand beside ours; "?" is what is not known.
"""
from __future__ import annotations

import math

import pandas as pd
from scipy.stats import t as student_t

from dl.caption_metrics import METRICS, SBERT_LABEL
from dl.config import Profile
from dl.report.claims import VERDICT_RULES
from dl.report.tables import _cell, _heading, _name, score_rows, write_table
from dl.store import MetricsFile, markdown_table

DISJOINT = "zero_shot:disjoint"        # mapping and decoder trained on disjoint recordings
PANELS = {
    "zero_shot": ("2a. Zero-shot", "The decoder is trained on text vectors and never hears a sound; at test it is fed with the row's vectors. "
                  + "A mapping that uses pairs was trained on audio-text pairs: this is not the text-only zero-shot of DRCap or WSAC. "
                  + "Rows share one decoder; capdec and rows in the centred space have decoders of their own, trained on text alone too."),
    DISJOINT: ("2a, strict", "As 2a, but the mapping's pairs and the decoder's captions come from disjoint recordings of train."),
    "supervised": ("2b. Fully supervised", "Each row has its own decoder, trained on the audio vectors of the row; the mapping is frozen."),
}
BLOCKS = (("cider_d", "spider", "spice", "meteor", "sbert_sim"), ("rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4"))
SUBSETS = {"seen": "labels seen in train", "unseen": "a label not in train", "new_source": "sources not in train",
           "known_phrasing": "known phrasing", "heldout_phrasing": "held-out phrasing"}
GAIN, OVER_RIDGE = "cider_d_relative_gain", "cider_d_minus_ridge"
ENDS = ("", "_ci_low", "_ci_high")
LEGEND = (
    "Mean ± standard deviation over training seeds [95 % interval: one training seed, and the recordings drawn anew]; table2.csv also has the "
    "95 % t-interval over seeds (columns _t95: half its width). **Bold**: best of the panel; *italic*: its difference from the best is within "
    "the interval; text_ceiling, a bound, is not ranked. n/c: not computed, with the reason at the end. Decoding is the same in every row "
    "that is compared. CIDEr-D is in its own scale [0, 10], as in the literature (a paper's 70.5 is 0.705); SPIDEr is its mean with SPICE. "
    "BLEU and METEOR are corpus scores, in every bootstrap replicate too; the other metrics are means over clips."
)


def write_table2(profile: Profile, split: str = "test") -> pd.DataFrame:
    """Table 2 from ``metrics.csv``; write ``results/<profile>/table2.csv`` and ``.md``.

    Returns:
        the table as written to CSV: experiment, system, space, decoding, n_items, n_seeds, every metric with ``_sd``, ``_ci_low``,
        ``_ci_high``, ``_t95`` and ``_mark``, the relative gain over raw, the paper's, and CIDEr-D minus ridge's.

    Raises:
        ValueError: no captions were scored yet.
    """
    frame = MetricsFile(profile).frame()
    parts = [f"# Table 2. Captions with and without the bridge\n\nProfile {profile.name}, split {split}. {LEGEND}\n"]
    rows: list[dict] = []
    for experiment, (title, about) in PANELS.items():
        found = _panel_rows(frame, experiment, split)
        if found:
            parts += [f"## {title}\n\n{about}\n", *_panel(found)]
            rows += found
    if not rows:
        raise ValueError(f"metrics.csv has no captioning rows for split {split!r}: run notebooks 07 and 08, or ./run_all.sh --only 07, then 08")
    parts.append(_footnote(rows))
    columns = ["experiment", "system", "space", "decoding", "n_items", "n_seeds",
               *(metric + end for metric in METRICS for end in ("", "_sd", "_ci_low", "_ci_high", "_t95", "_mark")),
               *(name + end for name in (GAIN, OVER_RIDGE) for end in ENDS), "paper_relative_gain",
               *(f"cider_d_{subset}{end}" for subset in SUBSETS for end in ENDS)]
    write_table(profile, "table2", rows, columns, "\n".join(part for part in parts if part))
    return pd.DataFrame(rows, columns=columns)


def _panel_rows(frame: pd.DataFrame, experiment: str, split: str) -> list[dict]:
    """The rows of one setting, decoding by decoding, each with its gains and its CIDEr-D on subsets."""
    rows = []
    known = frame[frame.experiment.isin([experiment, f"{experiment}:paired"]) & (frame.seed == "all")]
    for decoding in sorted(set(frame.decoding[frame.experiment == experiment])):
        part = frame[frame.decoding == decoding]
        summed = known[known.decoding == decoding].set_index(["experiment", "split", "system", "space", "metric"]).sort_index()

        for row in score_rows(part, experiment, split, list(METRICS)):
            system, space = row["system"], row["space"]
            mine = part[(part.experiment == experiment) & (part.split == split) & (part.system == system) & (part.space == space)]
            row |= {"experiment": experiment, "decoding": decoding, "n_seeds": mine.seed[mine.seed != "all"].nunique()}
            row["paper_relative_gain"] = paper_gain(experiment, system)
            row |= {f"{metric}_t95": t_half_width(row.get(f"{metric}_sd"), row["n_seeds"]) for metric in METRICS}
            if space == "text":
                paired = f"{experiment}:paired"
                row |= _figure(GAIN, summed, paired, split, f"{system}-raw", "text", GAIN)
                row |= _figure(OVER_RIDGE, summed, paired, split, f"{system}-ridge", "text", "cider_d")
            for subset in SUBSETS:
                row |= _figure(f"cider_d_{subset}", summed, experiment, f"{split}:{subset}", system, space, "cider_d")
            rows.append(row)
    return rows


def _figure(name: str, summed: pd.DataFrame, *key: str) -> dict[str, float]:
    """One figure of the rows summed over runs and the ends of its interval under ``name``; nothing where there is no such row."""
    return {name + end: summed.at[key, end[1:] or "value"] for end in ENDS} if key in summed.index else {}


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


def _panel(rows: list[dict]) -> list[str]:
    """Markdown of one setting: the metrics in two blocks, gains beside the paper's, and CIDEr-D on subsets."""
    head = ["system", "decoding", "n", "seeds"]

    def start(row: dict) -> list[str]:
        return [_name(row), row["decoding"], row["n_items"], str(row["n_seeds"])]

    parts = [markdown_table([*head, *map(_label, block)], [[*start(row), *(_cell(row, metric) for metric in block)] for row in rows], left=2)
             for block in BLOCKS]
    parts.append(markdown_table([*head, "CIDEr-D gain over raw, ours", "the paper's", "CIDEr-D minus ridge's"], [
        [*start(row), "" if row["system"] == "raw" else _signed(row, GAIN, percent=True), row["paper_relative_gain"], _signed(row, OVER_RIDGE)]
        for row in rows], left=2))
    subsets = [name for name in SUBSETS if any(f"cider_d_{name}" in row for row in rows)]
    if subsets:
        parts.append("CIDEr-D on parts of the split; held-out and known phrasing have one reference a clip and compare with each other only.\n")
        parts.append(markdown_table([*head[:3], *(SUBSETS[name] for name in subsets)],
                                    [[*start(row)[:3], *(_cell(row, f"cider_d_{name}") for name in subsets)] for row in rows], left=2))
    return parts


def _label(metric: str) -> str:
    return _heading(metric).replace("sbert_sim", SBERT_LABEL)


def _signed(row: dict, name: str, percent: bool = False) -> str:
    """A difference with its sign and interval; a gain as "+15.8 %"."""
    value = row.get(name)
    if value is None:
        return ""
    if math.isnan(value):
        return "n/c"
    value, low, high = ((100 if percent else 1) * row[name + end] for end in ENDS)
    digits = 1 if percent else 3
    return f"{value:+.{digits}f}" + (" %" if percent else "") + ("" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]")


def _footnote(rows: list[dict]) -> str:
    """Why a metric is n/c, once for each reason, with the panels that lack it."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for metric in METRICS:
            reason = row.get(f"{metric}_reason")
            if reason and not isinstance(reason, float):
                lacking.setdefault((metric, reason), []).append(PANELS[row["experiment"]][0].split(".")[0])
    lines = [f"- {metric} ({', '.join(dict.fromkeys(panels))}): {reason}" for (metric, reason), panels in lacking.items()]
    return "## Not computed\n\n" + "\n".join(lines) + "\n" if lines else ""
