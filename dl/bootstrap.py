"""Intervals: resample the recordings behind the clips, draw a training seed and a noise seed, score, repeat.

Scenes share recordings: a scene counts the product of how often each of its recordings was drawn (pigeonhole
bootstrap: Owen, Annals of Applied Statistics 2007). Beside it stands the clip bootstrap, which is too narrow here.
A resampled squared distance exceeds that of the clips, so replicates are shifted by their mean excess over the value
of the run they were drawn from, before the 2.5 and 97.5 percentiles are taken. [ours]
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dl.gap import HEAVY, GapFunction, Reference, gap_functions, median_bandwidth, not_computed_reason, weighted_mean
from dl.peers import centre

if TYPE_CHECKING:
    from dl.clap import Embeddings

BOOTSTRAP_RECIPE = 1   # goes up when the same scores get other intervals (tests/test_recipes.py)
HEAVY_SAMPLES = 200    # [ours] replicates of metrics that cost an eigen-decomposition each; recordings only, no clips
Run = tuple[int, int]  # training seed, noise seed


@dataclass(frozen=True, eq=False)
class Draws:
    """The random part of R replicates, the same for every system."""

    cluster: NDArray        # (R, n) float64, how often each clip counts when recordings are resampled
    clip: NDArray           # (R, n) float64, how often each clip counts when clips are resampled
    seed: NDArray           # (R,) in [0, 1), which training seed (as a share of the list)
    noise_seed: NDArray     # (R,) in [0, 1), which noise seed


def make_draws(clusters: list[tuple[str, ...]], n_samples: int = 1000, seed: int = 0) -> Draws:
    """Draw R = ``n_samples`` replicates; ``clusters`` names the recordings of each of the n clips."""
    rng = np.random.default_rng(seed)
    place = {name: i for i, name in enumerate(dict.fromkeys(name for members in clusters for name in members))}
    counts, clip = (rng.multinomial(n, np.full(n, 1 / n), size=n_samples) for n in (len(place), len(clusters)))
    cluster = np.stack([counts[:, [place[name] for name in set(members)]].prod(1) for members in clusters], axis=1)
    return Draws(cluster.astype(float), clip.astype(float), rng.random(n_samples), rng.random(n_samples))


def make_reference(embeddings: Embeddings, labels: list[frozenset[str]] | None = None,
                   means: tuple[Tensor, Tensor] | None = None) -> Reference:
    """The texts of a split as gap metrics take them.

    ``labels`` of each clip are for the label-aware retrieval; ``means`` (mean_a, mean_t) of the training split put the
    reference into the centred space.
    """
    audio, text = embeddings.audio, embeddings.text
    if means is not None:
        audio, text = centre(audio, means[0]), centre(text, means[1])
    first = text[_caption_rows(embeddings.text_clip, 0)].numpy()
    return Reference(first, text.numpy(), embeddings.text_clip.numpy(), median_bandwidth(first), audio.numpy(),
                     tuple(labels) if labels else None)


def text_floor(embeddings: Embeddings, reference: Reference) -> tuple[NDArray, Reference]:
    """Caption 2 of each clip in place of its audio vector, (n, D), and a reference in which no clip meets it.

    Raises:
        ValueError: a clip has one caption only.
    """
    rows = _caption_rows(embeddings.text_clip, 1).numpy()
    return reference.gallery[rows], replace(reference, exclude=rows)


def _caption_rows(text_clip: Tensor, k: int) -> Tensor:
    """Row of caption k (from 0) of every clip; (n,) int64."""
    counts = torch.bincount(text_clip)
    if int(counts.min()) <= k:
        raise ValueError(f"clip {int(counts.argmin())} has {int(counts.min())} captions, "
                         f"caption {k + 1} is asked for: leave this row out")
    return counts.cumsum(0) - counts + k


@dataclass(eq=False)
class SystemScores:
    """What one system scored on the clips that count."""

    system: str
    runs: list[Run]                         # (seed, noise_seed) of each of the K runs
    n_items: int                            # how many clips count
    points: dict[str, NDArray]              # metric -> (K,) values
    replicates: dict[str, NDArray]          # metric -> (R,) with recordings resampled; NaN where not computed
    clip_replicates: dict[str, NDArray]     # the same with clips resampled
    reasons: dict[str, str]                 # metric -> why it has no value

    def rows(self, each_run: bool = True, **labels: Any) -> list[dict]:
        """Rows for ``MetricsFile.add``: each run (unless not ``each_run``), then the mean over runs with its interval.

        The mean has seed = noise_seed = "all". ``labels`` are columns that all rows share (experiment, split, ...).
        """
        out = []
        for metric, values in self.points.items():
            shared = {**labels, "system": self.system, "n_items": self.n_items, "metric": metric}
            reason = self.reasons.get(metric, "")
            if each_run:
                out += [{**shared, "seed": seed, "noise_seed": noise_seed, "value": float(value),
                         "reason": "" if np.isfinite(value) else reason}
                        for (seed, noise_seed), value in zip(self.runs, values, strict=True)]
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            out.append({**shared, "seed": "all", "noise_seed": "all", "value": self.mean(metric), "sd": sd,
                        "reason": reason, **_intervals(self.replicates[metric], self.clip_replicates[metric])})
        return out

    def mean(self, metric: str) -> float:
        """Mean over runs, each training seed with equal weight."""
        return float(np.mean([self.points[metric][runs].mean() for runs in _runs_by_seed(self.runs)]))


def score_system(system: str, mapped: Iterable[tuple[int, int, ArrayLike]], reference: Reference, draws: Draws,
                 mask: NDArray | None = None, heavy_samples: int = HEAVY_SAMPLES) -> SystemScores:
    """All gap metrics, with intervals, of each run (seed, noise_seed, (n, D) unit-norm vectors); see ``score_clips``.

    Example:
        >>> raw = score_system("raw", [(0, 0, audio)], make_reference(embeddings), make_draws(split.clusters))
        >>> MetricsFile(profile).add(raw.rows(experiment="gap", split="test"))
    """
    functions = [(seed, noise_seed, gap_functions(vectors, reference)) for seed, noise_seed, vectors in mapped]
    return score_clips(system, functions, draws, mask, heavy_samples)


@dataclass(frozen=True, eq=False)
class ClipCounts:
    """A metric of a whole corpus (BLEU): ``statistic`` of the summed counts (n, c) of clips; (R, c) -> (R,)."""

    counts: NDArray
    statistic: Callable[[NDArray], NDArray]

    def __call__(self, weights: NDArray) -> NDArray:
        """The corpus in which clip i stands ``weights[r, i]`` times; (R, n) -> (R,), NaN where no clip counts."""
        return np.where(weights.sum(1) > 0, self.statistic(weights @ self.counts), np.nan)


def score_clips(system: str, scores: Sequence[tuple[int, int, Mapping[str, ArrayLike | ClipCounts | GapFunction]]],
                draws: Draws, mask: NDArray | None = None, heavy_samples: int = HEAVY_SAMPLES) -> SystemScores:
    """Values and replicates of any metrics: means over clips (CIDEr-D), of counts (BLEU, METEOR), ``gap_functions``.

    Args:
        scores: (seed, noise_seed, metric -> (n,) score of each clip, or a function of weights (R, n)) of each run.
        draws: replicates, the same object for systems that will be compared.
        mask: (n,) bool, the clips that count (a subset such as the seen ones); the gallery stays whole.
        heavy_samples: replicates of ``dl.gap.HEAVY`` metrics, whose clip interval stays blank; 0 leaves both blank.
    """
    kept = np.ones(draws.clip.shape[1]) if mask is None else np.asarray(mask, dtype=float)
    weights = np.concatenate([draws.cluster, draws.clip]) * kept
    runs, half = [(seed, noise_seed) for seed, noise_seed, _ in scores], len(draws.seed)
    by_seed = _runs_by_seed(runs)
    chosen = (by_seed[int(u * len(by_seed))] for u in draws.seed)
    drawn = np.array([of_seed[int(v * len(of_seed))] for of_seed, v in zip(chosen, draws.noise_seed, strict=True)])
    points = {metric: np.empty(len(runs)) for metric in scores[0][2]}
    replicates = {metric: np.full(2 * half, np.nan) for metric in points}
    for run, (_, _, by_metric) in enumerate(scores):
        mine = np.flatnonzero(np.tile(drawn == run, 2))
        few = mine[mine < min(heavy_samples, half)]
        all_drawings, few_drawings = (np.concatenate([kept[None], weights[index]]) for index in (mine, few))
        for metric, values in by_metric.items():
            index, drawings = (few, few_drawings) if metric in HEAVY else (mine, all_drawings)
            with np.errstate(divide="ignore", invalid="ignore"):      # a degenerate weighting or set of vectors: NaN
                stacked = values(drawings) if callable(values) else weighted_mean(np.asarray(values, float), drawings)
            points[metric][run], replicates[metric][index] = stacked[0], stacked[1:]

    n_items = int(kept.sum())
    reasons = {metric: not_computed_reason(metric, n_items) or "no value: the weights or vectors are degenerate"
               for metric, values in points.items() if not np.isfinite(values).all()}
    for metric, values in replicates.items():
        excess = values.reshape(2, half) - points[metric][drawn]
        known = ~np.isnan(excess)
        shift = np.where(known, excess, 0).sum(1) / np.maximum(known.sum(1), 1)
        replicates[metric] = values.reshape(2, half) - shift[:, None]
    by_recording, by_clip = ({metric: both[i] for metric, both in replicates.items()} for i in (0, 1))
    return SystemScores(system, runs, n_items, points, by_recording, by_clip, reasons)


def paired_difference(system: SystemScores, baseline: SystemScores, relative: bool = False,
                      **labels: Any) -> list[dict]:
    """Rows of system - baseline, replicate by replicate on the same recordings and seeds.

    One row a metric, system = ``<system>-<baseline>``, value = difference of the means, with both intervals;
    ``relative`` gives (system - baseline) / baseline, and the metric's name ends in ``_relative_gain``. ``labels`` are
    columns that all rows share.

    Raises:
        ValueError: the two were scored on different draws or clips.
    """
    def minus(ours: Any, theirs: Any) -> Any:
        return np.divide(ours - theirs, theirs) if relative else ours - theirs

    rows = []
    for metric in sorted(system.points.keys() & baseline.points.keys()):
        ours, theirs = system.replicates[metric], baseline.replicates[metric]
        if len(ours) != len(theirs) or system.n_items != baseline.n_items:
            raise ValueError(f"{system.system} and {baseline.system} were scored on different draws: "
                             "score both with the same Draws and mask")
        rows.append({
            **labels, "system": f"{system.system}-{baseline.system}", "seed": "all", "noise_seed": "all",
            "n_items": system.n_items, "metric": metric + ("_relative_gain" if relative else ""),
            "value": minus(system.mean(metric), baseline.mean(metric)),
            "reason": system.reasons.get(metric) or baseline.reasons.get(metric, ""),
            **_intervals(minus(ours, theirs),
                         minus(system.clip_replicates[metric], baseline.clip_replicates[metric])),
        })
    return rows


def _runs_by_seed(runs: list[Run]) -> list[list[int]]:
    """Positions of the runs of each training seed, noise seeds in order."""
    order = sorted(range(len(runs)), key=runs.__getitem__)
    return [list(of_seed) for _, of_seed in groupby(order, key=lambda i: runs[i][0])]


def _intervals(replicates: NDArray, clip_replicates: NDArray) -> dict[str, float | None]:
    """Columns of both intervals; None where fewer than 40 replicates have a value."""
    out: dict[str, float | None] = {}
    for prefix, values in (("", replicates), ("clip_", clip_replicates)):
        known = values[~np.isnan(values)]
        low, high = map(float, np.percentile(known, [2.5, 97.5])) if len(known) >= 40 else (None, None)
        out |= {f"{prefix}ci_low": low, f"{prefix}ci_high": high}
    return out
