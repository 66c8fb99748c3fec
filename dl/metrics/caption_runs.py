"""Scores of captioning runs as rows of ``metrics.csv``, and the candidates file that ``aac-metrics-eval`` reads.

Splits beside ``test``: ``test:seen``, ``test:unseen`` and ``test:new_source`` are clips of ``data/mini`` (as in Table 1; BLEU and METEOR
are those of the subset, CIDEr-D keeps the IDF of all clips). ``test:heldout_phrasing`` scores every clip against its one reference that
uses a phrasing kept out of train, ``test:known_phrasing`` against one of its other references, the first: one reference each, so that
the two compare with each other (and not with ``test``, which has five).
"""
from __future__ import annotations

import ast
import csv
import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.metrics.bootstrap import Draws, SystemScores, make_draws, paired_difference, score_clips
from dl.metrics.captions import CaptionScores, check_captions, score_lists
from dl.metrics.java import one_line
from dl.results import atomic_write

Run = tuple[int, int, list[str]]                  # training seed of decoder and mapping, noise seed, n candidates
Key = tuple[str, str]                             # system, space
OURS, BASELINE = "diffusion_link", "raw"
RELATIVE = "cider_d"                              # the claims speak of its relative gain


@dataclass(eq=False)
class CaptionResults:
    """What :func:`score_caption_runs` returns.

    Attributes:
        rows: for ``MetricsFile.add``.
        scores: (system, space) -> values, replicates and intervals on the whole split.
        clips: (system, space) -> (seed, noise_seed) -> scores of each clip on the whole split, for error analysis.
    """

    rows: list[dict] = field(default_factory=list)
    scores: dict[Key, SystemScores] = field(default_factory=dict)
    clips: dict[Key, dict[tuple[int, int], CaptionScores]] = field(default_factory=dict)


def score_caption_runs(
    profile: Profile, experiment: str, runs: dict[str | Key, list[Run]], split: Split, *, clip_ids: list[str] | None = None,
    decoding: str = "greedy", strict: bool | None = None,
) -> CaptionResults:
    """Score every system's captions with all metrics, intervals, subsets and paired differences.

    Args:
        profile: gives the number of bootstrap samples and the data set's name.
        experiment: "zero_shot" or "supervised".
        runs: system, or (system, space), -> its runs (seed, noise_seed, candidates); all systems in one call, so that text is
            tokenised once. Candidates are in the order of ``clip_ids``.
        split: references, recordings and subsets of the clips.
        clip_ids: the clips that were captioned (some may have been skipped); None means all of ``split``.
        decoding: "greedy" or "beam 4", named in every row.
        strict: a metric that cannot run is an error; None asks the environment variable DL_STRICT.

    Returns:
        rows: on the split each run and the sum over runs, on subsets the sum over runs. Under ``<experiment>:paired``: diffusion_link
        minus every other system, in every metric; and relative gains in CIDEr-D (``cider_d_relative_gain``, 0.15 is 15 %), of
        diffusion_link over every other system and of every other system over raw.

    Raises:
        ValueError: candidates and clips do not fit, or a clip id is unknown.
        MetricNotComputed: under ``strict``.

    Example:
        >>> results = score_caption_runs(profile, "zero_shot", {"raw": [(0, 0, raw)], "diffusion_link": [(0, 0, bridged)]}, split)
        >>> MetricsFile(profile).add(results.rows)
    """
    clip_ids = split.clip_ids if clip_ids is None else list(clip_ids)
    if unknown := set(clip_ids) - set(split.clip_ids):
        raise ValueError(f"clip {min(unknown)} is not in split '{split.name}': give the ids of the clips that were captioned")
    position = {clip_id: i for i, clip_id in enumerate(split.clip_ids)}
    place = [position[clip_id] for clip_id in clip_ids]
    frame, captions = split.frame.iloc[place], [split.captions[i] for i in place]
    by_key = {(key, "text") if isinstance(key, str) else key: of_system for key, of_system in runs.items()}
    wanted = {"": captions, **phrasing_references(frame, captions)}
    scored = score_lists({(name, *key, seed, noise_seed): (given, references) for name, references in wanted.items()
                          for key, of_system in by_key.items() for seed, noise_seed, given in of_system}, strict)
    draws = make_draws([split.clusters[i] for i in place], profile.bootstrap_samples)
    shared = {"experiment": experiment, "dataset": profile.data_dir.name, "ids_sha256": ids_sha256(clip_ids), "decoding": decoding}
    results = CaptionResults(scores=_score(by_key, scored, "", draws, None))
    results.clips = {key: {(seed, noise): scored["", *key, seed, noise] for seed, noise, _ in of_system} for key, of_system in by_key.items()}
    for (_, space), scores in results.scores.items():
        results.rows += scores.rows(**shared, split=split.name, space=space)
    results.rows += _paired_rows(results.scores, shared, split.name)
    subsets = {name: _score(by_key, scored, "", draws, mask) for name, mask in clip_subsets(frame).items() if mask.any()}
    subsets |= {name: _score(by_key, scored, name, draws, None) for name in wanted if name}
    for name, of_subset in subsets.items():
        part = f"{split.name}:{name}"
        for (_, space), scores in of_subset.items():
            results.rows += scores.rows(each_run=False, **shared, split=part, space=space)
        results.rows += _paired_rows(of_subset, shared, part)
    return results


def clip_subsets(frame) -> dict[str, np.ndarray]:
    """Subsets of the clips of ``data/mini``, (n,) bool: all labels seen in train, some label unseen, no source shared with train."""
    if "seen" not in frame:
        return {}
    return {"seen": (frame.seen == "1").to_numpy(), "unseen": (frame.seen == "0").to_numpy(), "new_source": (frame.shares_source == "0").to_numpy()}


def phrasing_references(frame, captions: list[list[str]]) -> dict[str, list[list[str]]]:
    """For each phrasing one reference a clip: the held-out caption, and the first of the others; none where it is not marked."""
    if "heldout_captions" not in frame or not frame.heldout_captions.str.len().all():
        return {}
    heldout = [int(cell.split(";")[0]) - 1 for cell in frame.heldout_captions]
    return {"heldout_phrasing": [[of_clip[i]] for of_clip, i in zip(captions, heldout, strict=True)],
            "known_phrasing": [[of_clip[int(i == 0)]] for of_clip, i in zip(captions, heldout, strict=True)]}


def _score(by_key: dict[Key, list[Run]], scored: dict, name: str, draws: Draws, mask: np.ndarray | None) -> dict[Key, SystemScores]:
    """Values and replicates of every system against the references called ``name``."""
    out = {}
    for key, of_system in by_key.items():
        given = [(seed, noise, scored[name, *key, seed, noise]) for seed, noise, _ in of_system]
        out[key] = score_clips(key[0], [(seed, noise, scores.for_bootstrap()) for seed, noise, scores in given], draws, mask)
        out[key].reasons |= given[0][2].reasons
    return out


def _paired_rows(scores: dict[Key, SystemScores], shared: dict, split: str) -> list[dict]:
    """diffusion_link minus every other system, and relative gains, in the text space."""
    systems = {name: of_system for (name, space), of_system in scores.items() if space == "text"}
    labels = {**shared, "experiment": f"{shared['experiment']}:paired", "split": split, "space": "text"}
    rows = []
    for name, other in systems.items():
        if OURS in systems and name != OURS:
            rows += paired_difference(systems[OURS], other, **labels) + _relative_gain(systems[OURS], other, labels)
        if BASELINE in systems and name not in (BASELINE, OURS):
            rows += _relative_gain(other, systems[BASELINE], labels)
    return rows


def _relative_gain(system: SystemScores, baseline: SystemScores, labels: dict) -> list[dict]:
    """The row of (system - baseline) / baseline in CIDEr-D; n/c where the baseline scores 0."""
    ours, theirs = (replace(scores, points={RELATIVE: scores.points[RELATIVE]}) for scores in (system, baseline))
    ends = ("ci_low", "ci_high", "clip_ci_low", "clip_ci_high")
    if theirs.mean(RELATIVE) == 0:
        reason = f"{baseline.system} scores 0 in {RELATIVE}, a gain relative to it has no size"
        row = paired_difference(ours, theirs, **labels)[0]
        return [row | dict.fromkeys(ends) | {"metric": f"{RELATIVE}_relative_gain", "value": None, "reason": reason}]
    with np.errstate(divide="ignore", invalid="ignore"):                      # a replicate of a weak baseline may score 0
        row = paired_difference(ours, theirs, relative=True, **labels)[0]
    return [row | {end: None for end in ends if row[end] is None or not np.isfinite(row[end])}]


# ---------------------------------------------------------------------------------------------------------- candidates files
def candidates_path(profile: Profile, experiment: str, system: str, space: str = "text", decoding: str = "greedy") -> Path:
    """``results/<profile>/captions/<experiment>_<system>.csv``; another space than text or another decoding than greedy is appended."""
    more = ("" if space == "text" else f"_{space}") + ("" if decoding == "greedy" else f"_{decoding.replace(' ', '')}")
    return profile.results_dir / "captions" / f"{experiment}_{system}{more}.csv"


def write_candidates(path: str | Path, clip_ids: list[str], runs: list[Run], references: list[list[str]]) -> Path:
    """Write one system's captions as ``aac-metrics-eval -i FILE`` reads them (it scores after ``aac-metrics-download``).

    Columns: clip_id, seed, noise_seed, caption_predicted (the first run, whose seeds stand before it), caption_1 .. caption_R, then
    ``caption_predicted_seed_<s>_noise_<k>`` for each further run (``aac-metrics-eval -cands`` takes that name).

    A caption stays text whatever it holds: white space and line ends become one blank; a candidate that a spreadsheet would take
    for a formula gets a leading ', which the tokenizer removes; ``aac-metrics-eval`` evaluates a reference with [ and ] as Python,
    so such a reference is written as a list literal of one string, which it reads back as that string. A clip with fewer references
    than R has ``[]``, which it reads as none.

    Raises:
        ValueError: lists of different lengths, or no run.
    """
    if not runs:
        raise ValueError("no run to write: give at least one (seed, noise_seed, candidates)")
    for seed, _, given in runs:
        check_captions(given, references, f"seed {seed}")
    if len(clip_ids) != len(references):
        raise ValueError(f"{len(clip_ids)} clip ids for {len(references)} clips: give one a clip, in order")
    width = max(map(len, references))
    (seed, noise_seed, first), *others = runs
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["clip_id", "seed", "noise_seed", "caption_predicted", *(f"caption_{k + 1}" for k in range(width)),
                     *(f"caption_predicted_seed_{s}_noise_{k}" for s, k, _ in others)])
    for i, clip_id in enumerate(clip_ids):
        wanted = [_reference_cell(caption) for caption in references[i]] + ["[]"] * (width - len(references[i]))
        writer.writerow([clip_id, seed, noise_seed, _candidate_cell(first[i]), *wanted, *(_candidate_cell(given[i]) for _, _, given in others)])
    return atomic_write(path, buffer.getvalue())


def read_candidates(path: str | Path) -> tuple[list[str], list[Run], list[list[str]]]:
    """What :func:`write_candidates` wrote: clip ids, runs, references (white space as written)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"clip_id", "seed", "noise_seed", "caption_predicted", "caption_1"} <= rows[0].keys():
        raise ValueError(f"{path} is no candidates file: it needs the columns clip_id, seed, noise_seed, caption_predicted, caption_1")
    names = {(int(rows[0]["seed"]), int(rows[0]["noise_seed"])): "caption_predicted"}
    for name in rows[0]:
        if name.startswith("caption_predicted_seed_"):
            seed, noise_seed = name.removeprefix("caption_predicted_seed_").split("_noise_")
            names[int(seed), int(noise_seed)] = name
    runs = [(*run, [row[name].removeprefix("'") for row in rows]) for run, name in names.items()]
    columns = [name for name in rows[0] if name.removeprefix("caption_").isdigit()]
    references = [[caption for name in columns for caption in _read_reference(row[name])] for row in rows]
    return [row["clip_id"] for row in rows], runs, references


def _is_formula(text: str) -> bool:
    return text[:1] in ("=", "+", "-", "@") and bool(text)


def _candidate_cell(caption: str) -> str:
    text = one_line(caption)
    return f"'{text}" if _is_formula(text) or text.startswith("'") else text


def _reference_cell(caption: str) -> str:
    text = one_line(caption)
    return repr([text]) if _is_formula(text) or ("[" in text and "]" in text) else text


def _read_reference(cell: str) -> list[str]:
    return ast.literal_eval(cell) if "[" in cell and "]" in cell else [cell]


def markdown_text(caption: str) -> str:
    """A caption as one line of plain Markdown: what could be a table, link, tag or emphasis is escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#!|~&$" else letter for letter in one_line(caption))


