"""What the parts of notebook A3 share: the light scores of captions, the draws of an interval, and how rows are recorded."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dl.bootstrap import Draws, make_draws, paired_difference, score_clips
from dl.caption_metrics import score_systems
from dl.clap import Embeddings
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.store import MetricsFile

METRICS = ("cider_d", "sbert_sim")


def caption_scores(lists: dict[str, list[str]], references: list[list[str]]) -> tuple[dict[str, dict[str, NDArray]], dict[str, str]]:
    """CIDEr-D and sbert_sim of each clip.

    Returns:
        (name -> metric -> (n,); metric -> why it has no value).
    """
    scored = score_systems(lists, references, quick=True)
    reasons = {metric: reason for scores in scored.values() for metric, reason in scores.reasons.items() if metric in METRICS}
    return {name: {metric: scores.clips[metric] for metric in METRICS} for name, scores in scored.items()}, reasons


def references(split: Split, clip_ids: list[str]) -> list[list[str]]:
    """The captions of some clips of a split."""
    return [split.captions[split.clip_ids.index(clip_id)] for clip_id in clip_ids]


def light_draws(split: Split, clip_ids: list[str], n_samples: int) -> Draws:
    """Replicates over recordings alone; the plain clip bootstrap, too narrow where scenes share recordings, is left out."""
    draws = make_draws([split.clusters[split.clip_ids.index(clip_id)] for clip_id in clip_ids], n_samples)
    return replace(draws, clip=np.zeros_like(draws.clip))


def record(profile: Profile, name: str, rows: list[dict], scored: dict, pairs: Iterable[tuple], test: Embeddings, **labels: Any) -> pd.DataFrame:
    """Replace the rows of ``generative:<name>`` in metrics.csv by these and the paired differences; return them as a table."""
    shared = {"experiment": f"generative:{name}:paired", "split": "test", "ids_sha256": ids_sha256(test.clip_ids), **labels}
    rows = rows + [row for ours, theirs in pairs for row in paired_difference(scored[ours], scored[theirs], **shared)]
    rows = [{column: value for column, value in row.items() if not column.startswith("clip_")} for row in rows]
    file = MetricsFile(profile)
    file.remove(experiment=[f"generative:{name}", f"generative:{name}:paired"])
    file.add(rows)
    return pd.DataFrame(rows)


def record_captions(profile: Profile, name: str, runs: dict[str, list], reasons: dict[str, str], pairs: Iterable[tuple], split: Split, test: Embeddings,
                    rows: list[dict] | tuple = (), notes: dict[str, str] | None = None) -> pd.DataFrame:
    """Score the captions of a part, greedy, on test and record them.

    Args:
        runs: system -> (seed, noise seed, metric -> (n,)) of each run, as ``caption_scores`` gives them.
        reasons: metric -> why it has no value.
        pairs: (ours, theirs) whose difference is recorded.
        rows: rows of another split that belong to the part.
        notes: system -> what stands in column reason.
    """
    draws = light_draws(split, test.clip_ids, profile.bootstrap_samples)
    scored = {system: score_clips(system, of_system, draws) for system, of_system in runs.items()}
    for scores in scored.values():
        scores.reasons |= reasons
    shared = {"experiment": f"generative:{name}", "split": "test", "decoding": "greedy", "ids_sha256": ids_sha256(test.clip_ids)}
    found = [row | {"reason": row["reason"] or (notes or {}).get(system, "")} for system, scores in scored.items() for row in scores.rows(False, **shared)]
    return record(profile, name, [*rows, *found], scored, pairs, test, decoding="greedy")
