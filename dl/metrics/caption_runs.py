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
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

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
COLUMN_NAME = re.compile(r"(?P<system>\w+?)(?P<space>_centred)?_seed_(?P<seed>\d+)(?:_noise_(?P<noise>\d+))?")   # see candidates_column


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
    profile: Profile, experiment: str, runs: Mapping[str, list[Run]] | Mapping[Key, list[Run]], split: Split, *, clip_ids: list[str] | None = None,
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
        diffusion_link over every other system and of every other system over raw; of two systems the seeds that both have.

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
    by_key: dict[Key, list[Run]] = {(key, "text") if isinstance(key, str) else key: of_system for key, of_system in runs.items()}
    wanted = {"": captions, **phrasing_references(frame, captions)}
    scored = score_lists({(name, *key, seed, noise_seed): (given, references) for name, references in wanted.items()
                          for key, of_system in by_key.items() for seed, noise_seed, given in of_system}, strict)
    draws = make_draws([split.clusters[i] for i in place], profile.bootstrap_samples)
    shared = {"experiment": experiment, "dataset": profile.data_dir.name, "ids_sha256": ids_sha256(clip_ids), "decoding": decoding}
    results = CaptionResults(scores={})
    results.clips = {key: {(seed, noise): scored["", *key, seed, noise] for seed, noise, _ in of_system} for key, of_system in by_key.items()}
    parts = {split.name: ("", None)} | {f"{split.name}:{name}": ("", mask) for name, mask in clip_subsets(frame).items() if mask.any()}
    parts |= {f"{split.name}:{name}": (name, None) for name in wanted if name}
    for part, (references, mask) in parts.items():
        score = partial(_score, scored=scored, name=references, draws=draws, mask=mask)
        of_part = score(by_key)
        results.scores = results.scores or of_part
        for (_, space), scores in of_part.items():
            results.rows += scores.rows(each_run=part == split.name, **shared, split=part, space=space)
        results.rows += _paired_rows(by_key, of_part, score, shared, part)
    return results


def clip_subsets(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Subsets of the clips of ``data/mini``, (n,) bool: all labels seen in train, some label unseen, no source shared with train."""
    if "seen" not in frame:
        return {}
    return {"seen": (frame.seen == "1").to_numpy(), "unseen": (frame.seen == "0").to_numpy(), "new_source": (frame.shares_source == "0").to_numpy()}


def phrasing_references(frame: pd.DataFrame, captions: list[list[str]]) -> dict[str, list[list[str]]]:
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


def _paired_rows(by_key: dict[Key, list[Run]], scores: dict[Key, SystemScores], score: Callable[[dict[Key, list[Run]]], dict[Key, SystemScores]],
                 shared: dict, split: str) -> list[dict]:
    """diffusion_link minus every other system, and relative gains, in the text space; of two systems the training seeds that both have."""
    labels = {**shared, "experiment": f"{shared['experiment']}:paired", "split": split, "space": "text"}

    def both(first: str, second: str) -> tuple[SystemScores, SystemScores] | None:
        keys = [(first, "text"), (second, "text")]
        seeds = [{seed for seed, _, _ in by_key[key]} for key in keys]
        if seeds[0] == seeds[1]:
            return scores[keys[0]], scores[keys[1]]
        if not (common := seeds[0] & seeds[1]):
            return None
        limited = score({key: [run for run in by_key[key] if run[0] in common] for key in keys})
        return limited[keys[0]], limited[keys[1]]

    rows = []
    for name in [name for name, space in scores if space == "text"]:
        if (OURS, "text") in scores and name != OURS and (pair := both(OURS, name)):
            rows += paired_difference(*pair, **labels) + _relative_gain(*pair, labels)
        if (BASELINE, "text") in scores and name not in (BASELINE, OURS) and (pair := both(name, BASELINE)):
            rows += _relative_gain(*pair, labels)
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
def candidates_path(profile: Profile, experiment: str, decoding: str = "greedy") -> Path:
    """``results/<profile>/captions/<experiment>.csv``, every system of a setting; another decoding than greedy is appended (``_beam4``)."""
    return profile.results_dir / "captions" / f"{experiment}{'' if decoding == 'greedy' else '_' + decoding.replace(' ', '')}.csv"


def candidates_column(system: str, space: str = "text", seed: int = 0, noise_seed: int = 0) -> str:
    """``<system>_seed_<n>``; another space than text, and another noise seed than 0, are named: ``c3_centred_seed_1``, ``raw_seed_0_noise_2``."""
    return system + ("" if space == "text" else f"_{space}") + f"_seed_{seed}" + (f"_noise_{noise_seed}" if noise_seed else "")


def write_candidates(path: str | Path, clip_ids: list[str], runs: dict[Key, list[Run]], references: list[list[str]]) -> Path:
    """Write the captions of a setting: clip_id, the references caption_1 .. caption_R once, then a column for each system and seed.

    ``aac-metrics-eval`` reads it, one column at a time, and finds the references by their names (R at most 5); it scores after
    ``aac-metrics-download``::

        aac-metrics-eval -i results/mini/captions/zero_shot_beam4.csv -cands diffusion_link_seed_0

    A caption stays text whatever it holds: white space and line ends become one blank; a candidate that a spreadsheet would take
    for a formula gets a leading ', which the tokenizer removes; ``aac-metrics-eval`` evaluates a reference with [ and ] as Python,
    so such a reference is written as a list literal of one string, which it reads back as that string. A clip with fewer references
    than R has ``[]``, which it reads as none.

    Args:
        runs: (system, space) -> its runs, in the order of the columns (:func:`candidates_column`).

    Raises:
        ValueError: lists of different lengths, or no run, or two runs of one name.
    """
    columns = {}
    for key, of_system in runs.items():
        for seed, noise_seed, given in of_system:
            name = candidates_column(*key, seed, noise_seed)
            if name in columns:
                raise ValueError(f"two runs are called {name}: give each system and seed once")
            check_captions(given, references, name)
            columns[name] = given
    if not columns:
        raise ValueError("no run to write: give at least one (seed, noise_seed, candidates)")
    if len(clip_ids) != len(references):
        raise ValueError(f"{len(clip_ids)} clip ids for {len(references)} clips: give one a clip, in order")
    width = max(map(len, references))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["clip_id", *(f"caption_{k + 1}" for k in range(width)), *columns])
    for i, clip_id in enumerate(clip_ids):
        wanted = [_reference_cell(caption) for caption in references[i]] + ["[]"] * (width - len(references[i]))
        writer.writerow([clip_id, *wanted, *(_candidate_cell(given[i]) for given in columns.values())])
    return atomic_write(path, buffer.getvalue())


def read_candidates(path: str | Path) -> tuple[list[str], dict[Key, list[Run]], list[list[str]]]:
    """What :func:`write_candidates` wrote: clip ids, (system, space) -> runs, references (white space as written)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: found for name in (rows[0] if rows else ()) if (found := COLUMN_NAME.fullmatch(name))}
    if not columns or not {"clip_id", "caption_1"} <= rows[0].keys():
        raise ValueError(f"{path} is no candidates file: it needs the columns clip_id, caption_1 and one like diffusion_link_seed_0")
    runs: dict[Key, list[Run]] = {}
    for name, found in columns.items():
        key = (found["system"], "centred" if found["space"] else "text")
        runs.setdefault(key, []).append((int(found["seed"]), int(found["noise"] or 0), [row[name].removeprefix("'") for row in rows]))
    names = [name for name in rows[0] if name.removeprefix("caption_").isdigit()]
    try:
        references = [[caption for name in names for caption in _read_reference(row[name])] for row in rows]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{path}: a reference in brackets is no list of captions as Python writes it, ['A dog barks']: write it so") from None
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
    texts = ast.literal_eval(cell) if "[" in cell and "]" in cell else [cell]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{cell!r} is no list of captions")
    return texts


def markdown_text(caption: str) -> str:
    """A caption as one line of plain Markdown: what could be a table, link, tag or emphasis is escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()<>#!|~&$" else letter for letter in one_line(caption))


