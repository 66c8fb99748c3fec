"""The modality gap: how far (mapped) audio vectors stand from their paired texts, in ten groups of metrics.

A metric takes unit-norm rows, audio (n, D) and text (n, D), pairs in order, and ``weights`` (R, n): R weightings of
the n clips, as ``dl.bootstrap`` draws them, or None for one uniform weighting. It gives (R,) float64. A mean over
pairs i != j leaves a clip with itself out, also where that clip was drawn twice.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr
from threadpoolctl import threadpool_limits

GAP_RECIPE = 1   # goes up when a metric gives another value for the same vectors (tests/test_recipes.py)
MIN_ITEMS = 20   # [ours] below this a neighbour or rank metric is not computed
CUTOFFS = (1, 5, 10)
HEAVY = ("frechet_distance", "effective_rank")   # one eigen-decomposition a weighting
RETRIEVAL_METRICS = tuple(f"{direction}{rule}{name}" for direction in ("", "text_to_audio_") for rule in ("", "label_")
                          for name in (*(f"recall_at_{k}" for k in CUTOFFS), "map_at_10"))
DIRECTION = {    # which side is better; a metric that is missing here has no better side of its own
    "pair_cosine": "higher", "cosine_margin": "higher", "centroid_gap": "lower", "rmg": "lower",
    "separability_accuracy": "lower", "separability_auc": "lower", "frechet_distance": "lower", "mmd2": "lower",
    "alignment": "lower", "gram_correlation": "higher", "linear_cka": "higher", "knn_overlap": "higher",
    "gap_length": "lower", "share_toward_text": "higher", **dict.fromkeys(RETRIEVAL_METRICS, "higher"),
}
ARROWS = {"higher": " ↑", "lower": " ↓"}         # a metric's better side, as ``DIRECTION`` of its module names it
TITLES = {
    "pair_cosine": "pair cosine", "cosine_margin": "cosine margin", "centroid_gap": "centroid gap", "rmg": "RMG",
    "recall_at_10": "R@10", "effective_rank": "effective rank", "bleu_4": "BLEU-4", "meteor": "METEOR",
    "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "spice": "SPICE", "spider": "SPIDEr", "sbert_sim": "SBERT similarity",
}
Weights = ArrayLike | None
GapFunction = Callable[[Weights], NDArray]


# ---------------------------------------------------------------------------------------------------- weighted means
def as_array(x: ArrayLike) -> NDArray:
    """float64 numpy array of an array or a CPU tensor."""
    return np.asarray(x, dtype=np.float64)


def weight_rows(weights: Weights, n: int) -> NDArray:
    """(R, n) weights, each row divided by its sum; None gives one uniform row."""
    rows = np.ones((1, n)) if weights is None else np.atleast_2d(as_array(weights))
    with np.errstate(invalid="ignore"):
        return rows / rows.sum(1, keepdims=True)


def weighted_mean(values: NDArray, weights: Weights = None) -> NDArray:
    """sum_i w_i v_i over the items whose value is not NaN; (n,) -> (R,)."""
    rows, valid = weight_rows(weights, len(values)), ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return rows @ np.where(valid, values, 0.0) / (rows @ valid)


def prepared(weights: Weights, audio: ArrayLike, text: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Both sets as float64 arrays, and ``weight_rows``."""
    audio, text = as_array(audio), as_array(text)
    return audio, text, weight_rows(weights, len(audio))


def _quadratic(rows: NDArray, matrix: NDArray) -> NDArray:
    """sum_ij w_i w_j k_ij of each weighting; (R, n), (n, n) -> (R,)."""
    return np.einsum("ri,ri->r", rows @ matrix, rows)


def _pair_mean(rows: NDArray, matrix: NDArray) -> NDArray:
    """Mean of k_ij over i != j; (R, n), (n, n) -> (R,)."""
    squares = rows**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (_quadratic(rows, matrix) - squares @ np.diag(matrix)) / (1 - squares.sum(1))


def _covariance(x: NDArray, row: NDArray) -> NDArray:
    """sum_i w_i (x_i - mu)(x_i - mu)^T for one weighting; (n, D), (n,) -> (D, D)."""
    drawn = row > 0                                                   # a replicate leaves many of the clips out
    scaled = (x[drawn] - row @ x) * np.sqrt(row[drawn])[:, None]
    return scaled.T @ scaled


def _for_each(value: Callable[[NDArray], float], rows: NDArray) -> NDArray:
    """A value that costs an eigen-decomposition, of each weighting, on all cores; NaN where no clip counts."""
    with threadpool_limits(1), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.array(list(pool.map(lambda row: np.nan if np.isnan(row).any() else value(row), rows)))


# --------------------------------------------------------------------------- 1-3: cosines, centroids, relative gap
def pair_cosine(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """sum_i w_i cos(a_i, t_i), in -1..1. [similarity of matched pairs; (paper~) one of its two criteria]"""
    return weighted_mean(np.einsum("id,id->i", as_array(audio), as_array(text)), weights)


def nonpair_cosine(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """Mean of cos(a_i, t_j) over i != j, in -1..1."""
    audio, text, rows = prepared(weights, audio, text)
    return _pair_mean(rows, audio @ text.T)


def cosine_margin(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """pair_cosine - nonpair_cosine: a map that sends everything to one point gains in the first only. [ours]"""
    return pair_cosine(audio, text, weights) - nonpair_cosine(audio, text, weights)


def centroid_gap(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """||sum_i w_i a_i - sum_i w_i t_i||, in 0..2. [Liang et al., NeurIPS 2022]

    Without any gap, sampling n clips still leaves about sqrt(tr S / n), S = cov(a_i - t_i).
    """
    audio, text, rows = prepared(weights, audio, text)
    return np.linalg.norm(rows @ (audio - text), axis=1)


def rmg(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """Relative modality gap P / (P + (W_a + W_t) / 2), in 0..1. [Schrodi et al., ICLR 2025]

    d = (1 - cos) / 2; P = sum_i w_i d(a_i, t_i); W_a, W_t = mean of d over i != j inside a modality.
    """
    audio, text, rows = prepared(weights, audio, text)
    paired = rows @ ((audio - text) ** 2).sum(1) / 4      # (1 - cos) / 2 = ||a - t||^2 / 4 on the unit sphere
    within = sum((1 - _pair_mean(rows, x @ x.T)) / 2 for x in (audio, text)) / 2
    return paired / (paired + within)


# ---------------------------------------------------------------------------------------- 4: can they be told apart
def separability_functions(audio: ArrayLike, text: ArrayLike, seed: int = 0) -> dict[str, GapFunction]:
    """Accuracy and AUC of a logistic regression that tells a from t on clips it was not fitted on. [ours]

    ``seed`` splits the clips into two halves; a clip's two vectors stay together; each half is judged by the other
    half's classifier (inputs times sqrt(D), C = 1). AUC counts pairs (t_i, a_j) of one half, ties as 0.5. Both are 0.5
    where the gap is closed.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    n, d = np.shape(text)
    fold = np.random.default_rng(seed).permutation(n) % 2
    inputs = np.concatenate([as_array(audio), as_array(text)]) * np.sqrt(d)
    with threadpool_limits(1):        # the same bits on any number of cores, and faster at this size
        model, halves = LogisticRegression(max_iter=300), PredefinedSplit(np.tile(fold, 2))
        score = cross_val_predict(model, inputs, np.repeat([0, 1], n), cv=halves, method="decision_function")
    score = score.reshape(2, n)                                       # of audio, of text
    accuracy = ((score[0] < 0) + (score[1] > 0).astype(float)) / 2
    difference = score[1][:, None] - score[0]
    wins = ((difference > 0) + 0.5 * (difference == 0)) * (fold[:, None] == fold)

    def auc(weights: Weights = None) -> NDArray:
        rows = weight_rows(weights, n)
        second_half = rows @ fold
        return _quadratic(rows, wins) / (second_half**2 + (1 - second_half) ** 2)

    return {"separability_accuracy": partial(weighted_mean, accuracy), "separability_auc": auc}


# ----------------------------------------------------------------------------------- 5-7: distances of distributions
def frechet_distance(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """||mu_a - mu_t||^2 + tr(C_a + C_t - 2 (C_a^(1/2) C_t C_a^(1/2))^(1/2)), >= 0. [Heusel et al., NeurIPS 2017]

    C <- (1 - s) C + s (tr C / D) I, with s of Ledoit and Wolf (2004) for each set, from all its items (n is near D).
    """
    from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance

    audio, text, rows = prepared(weights, audio, text)
    shrinkage = [ledoit_wolf_shrinkage(x) for x in (audio, text)]

    def distance(row: NDArray) -> float:
        c_a, c_t = (shrunk_covariance(_covariance(x, row), s) for x, s in zip((audio, text), shrinkage, strict=True))
        root = np.linalg.cholesky(c_a + 1e-12 * np.eye(len(c_a)))
        overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ c_t @ root), 0)).sum()
        return ((row @ audio - row @ text) ** 2).sum() + np.trace(c_a) + np.trace(c_t) - 2 * overlap

    return _for_each(distance, rows)


def median_bandwidth(text: ArrayLike) -> float:
    """sigma = median of ||t_i - t_j|| over i < j, of the raw texts: one value for all systems. [median heuristic]"""
    from scipy.spatial.distance import pdist

    return float(np.median(pdist(as_array(text))))


def mmd2(audio: ArrayLike, text: ArrayLike, bandwidth: float, weights: Weights = None) -> NDArray:
    """Unbiased squared MMD: mean over i != j of k(a_i, a_j) + k(t_i, t_j) - k(a_i, t_j) - k(a_j, t_i).

    k(x, y) = exp(-||x - y||^2 / (2 sigma^2)), sigma = ``bandwidth``; NaN for sigma 0. [Gretton et al., JMLR 2012,
    lemma 6, for equal sizes and without the pairs k(a_i, t_i)] It may fall below 0 where the sets agree.
    """
    from sklearn.metrics.pairwise import rbf_kernel

    audio, text, rows = prepared(weights, audio, text)
    if bandwidth == 0:                       # all texts alike: no scale to measure on
        return np.full(len(rows), np.nan)
    gamma = 1 / (2 * bandwidth**2)
    crossed = rbf_kernel(audio, text, gamma)
    return _pair_mean(rows, rbf_kernel(audio, gamma=gamma) + rbf_kernel(text, gamma=gamma) - crossed - crossed.T)


def alignment(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """sum_i w_i ||a_i - t_i||^2, in 0..4. [Wang & Isola, ICML 2020, alpha = 2]"""
    return weighted_mean(((as_array(audio) - as_array(text)) ** 2).sum(1), weights)


def uniformity(audio: ArrayLike, weights: Weights = None) -> NDArray:
    """log of the mean over i != j of exp(-2 ||a_i - a_j||^2), <= 0; 0: one point. [Wang & Isola, ICML 2020, t = 2]"""
    from sklearn.metrics.pairwise import rbf_kernel

    kernel = rbf_kernel(as_array(audio), gamma=2)
    return np.log(_pair_mean(weight_rows(weights, len(kernel)), kernel))


# ------------------------------------------------------------------------------------------------------ 8: retrieval
def top_k(similarity: NDArray, k: int) -> NDArray:
    """Columns of the k largest entries of each row, largest first, ties by column; (q, g) -> (q, min(k, g)) int64."""
    k = min(k, similarity.shape[1])
    columns = np.sort(torch.topk(torch.from_numpy(similarity), k, sorted=False).indices.numpy(), axis=1)
    found = np.take_along_axis(similarity, columns, 1)
    top = np.take_along_axis(columns, np.argsort(-found, axis=1, kind="stable"), 1)
    tied = (similarity >= found.min(1, keepdims=True)).sum(1) > k     # the k-th place is shared: sort the whole row
    top[tied] = np.argsort(-similarity[tied], axis=1, kind="stable")[:, :k]
    return top


def nearest_captions(vectors: ArrayLike, gallery: ArrayLike, captions: list[str],
                     k: int = 5) -> list[list[tuple[str, float]]]:
    """Of each vector (q, D) the k nearest wordings with their cosines, nearest first, each wording once.

    ``gallery`` (m, D), unit norm, holds the vectors of ``captions``; equal wordings have equal vectors.
    """
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    wordings = sorted(first, key=first.__getitem__)
    cosine = as_array(vectors) @ as_array(gallery)[[first[wording] for wording in wordings]].T
    return [[(wordings[column], float(row[column])) for column in columns]
            for row, columns in zip(cosine, top_k(cosine, k), strict=True)]


def ranking_scores(ranking: NDArray, relevant: NDArray) -> dict[str, NDArray]:
    """R@1/5/10 (1 if any relevant item is among the first k: AudioCaps' rule) and AP@10 of each query.

    AP@10 = sum_{r <= 10} rel_r P_r / min(#relevant, 10), P_r = share of relevant items among the first r.
    (q, 10) int, the first ten of the gallery, and (q, g) bool -> name -> (q,) in 0..1, NaN without a relevant item.
    """
    hits = np.take_along_axis(relevant, ranking, 1)
    count = relevant.sum(1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    scores = {f"recall_at_{k}": hits[:, :k].any(1).astype(float) for k in CUTOFFS}
    scores["map_at_10"] = (hits * precision).sum(1) / np.clip(count, 1, 10)
    return {name: np.where(count > 0, value, np.nan) for name, value in scores.items()}


def retrieval(audio: ArrayLike, gallery: ArrayLike, gallery_clip: ArrayLike, weights: Weights = None,
              labels: Sequence[Iterable[str]] | None = None, exclude: ArrayLike | None = None) -> dict[str, NDArray]:
    """Retrieval in both directions; the gallery stays whole, clips are weighted.

    Audio to text: clip i asks the whole gallery, hits are its own captions. Text to audio: each caption asks the n
    clips, the hit is its own clip; a clip's score is the mean over its captions. With ``label_`` in front, captions
    (clips) with the same set of labels count as relevant too.

    Args:
        audio: (n, D) unit norm.
        gallery: (m, D) unit norm, all captions.
        gallery_clip: (m,) int, the clip of each caption.
        weights: (R, n); the identity gives the score of each clip.
        labels: the set of labels of each clip, or None.
        exclude: (n,) int, a gallery row that clip i must not meet (in ``text_floor`` it *is* the vector), or None.

    Returns:
        names of ``RETRIEVAL_METRICS`` (with ``label_`` only if labels are given) -> (R,) in 0..1; NaN: none relevant.
    """
    audio, gallery, gallery_clip = as_array(audio), as_array(gallery), np.asarray(gallery_clip)
    clips = np.arange(len(audio))
    relevant = {"": gallery_clip == clips[:, None]}
    if labels is not None:
        number = {members: i for i, members in enumerate(dict.fromkeys(map(frozenset, labels)))}
        group = np.array([number[frozenset(members)] for members in labels])
        relevant["label_"] = group[gallery_clip] == group[:, None]
    similarity = audio @ gallery.T
    if exclude is not None:
        similarity[clips, exclude] = -np.inf
        for matrix in relevant.values():
            matrix[clips, exclude] = False
    found_texts, found_clips = (top_k(np.ascontiguousarray(x), 10) for x in (similarity, similarity.T))
    scores: dict[str, NDArray] = {}
    for rule, matrix in relevant.items():
        scores |= {rule + name: score for name, score in ranking_scores(found_texts, matrix).items()}
        of_captions = pd.DataFrame(ranking_scores(found_clips, matrix.T))
        if exclude is not None:
            of_captions.loc[exclude] = np.nan
        of_clips = of_captions.groupby(gallery_clip).mean().reindex(clips)
        scores |= {f"text_to_audio_{rule}{name}": of_clips[name].to_numpy() for name in of_clips}
    return {name: weighted_mean(score, weights) for name, score in scores.items()}


# ------------------------------------------------------------------------------------------------------- 9: topology
def gram_correlation(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """Pearson correlation of cos(a_i, a_j) with cos(t_i, t_j) over i != j, in -1..1. [ours: what L_topo asks for]"""
    audio, text, rows = prepared(weights, audio, text)
    a, t = audio @ audio.T, text @ text.T
    mean_a, mean_t = _pair_mean(rows, a), _pair_mean(rows, t)
    variances = (_pair_mean(rows, a * a) - mean_a**2) * (_pair_mean(rows, t * t) - mean_t**2)
    return (_pair_mean(rows, a * t) - mean_a * mean_t) / np.sqrt(variances)


def linear_cka(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """||A^T T||_F^2 / (||A^T A||_F ||T^T T||_F) of the centred sets, in 0..1. [Kornblith et al., ICML 2019]

    In Gram form, so that a weighting costs O(n^2): with K = A A^T, L = T T^T,
    ||A_c^T T_c||_F^2 = w'(K * L) w - 2 w'((K w) * (L w)) + (w'K w)(w'L w).
    """
    audio, text, rows = prepared(weights, audio, text)
    k, l = audio @ audio.T, text @ text.T

    def hsic(x: NDArray, y: NDArray) -> NDArray:
        crossed = np.einsum("ri,ri,ri->r", rows, rows @ x, rows @ y)
        return _quadratic(rows, x * y) - 2 * crossed + _quadratic(rows, x) * _quadratic(rows, y)

    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def knn_overlap(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """sum_i w_i |N(a_i) & N(t_i)| / 10, in 0..1; N: the ten nearest of one modality. [Huh et al., ICML 2024]"""
    audio, text = as_array(audio), as_array(text)
    member = np.zeros((2, len(audio), len(audio)), dtype=bool)
    for flags, x in zip(member, (audio, text), strict=True):
        similarity = x @ x.T
        np.fill_diagonal(similarity, -np.inf)
        np.put_along_axis(flags, top_k(similarity, 10), True, axis=1)
    return weighted_mean((member[0] & member[1]).sum(1) / 10, weights)


def effective_rank(audio: ArrayLike, weights: Weights = None) -> NDArray:
    """exp(-sum_k p_k log p_k), p = covariance eigenvalues over their sum, in 1..D. [Roy & Vetterli, 2007]"""
    audio = as_array(audio)

    def rank(row: NDArray) -> float:
        eigenvalues = np.maximum(np.linalg.eigvalsh(_covariance(audio, row)), 0)
        with np.errstate(invalid="ignore"):                           # one point has no spread: 0 / 0
            return np.exp(entr(eigenvalues / eigenvalues.sum()).sum())

    return _for_each(rank, weight_rows(weights, len(audio)))


# ----------------------------------------------------------------------------------------- 10: the gap as one vector
def gap_length(audio: ArrayLike, text: ArrayLike, weights: Weights = None, group_size: int = 100) -> NDArray:
    """Length of the mean gap of a group of pairs: sqrt(||g||^2 + tr S / group_size). [C3, ICLR 2024; our reading]

    g = mean of a_i - t_i, S = their covariance. C3 shuffles the pairs once and looks at the lengths of the mean gaps
    of groups of 100; this is the root mean square of those lengths over all shuffles.
    """
    audio, text, rows = prepared(weights, audio, text)
    gaps = audio - text
    squared = ((rows @ gaps) ** 2).sum(1)
    spread = np.maximum(rows @ (gaps**2).sum(1) - squared, 0)
    return np.sqrt(squared + spread / group_size)


def direction_consistency(audio: ArrayLike, text: ArrayLike, weights: Weights = None,
                          group_size: int = 100) -> NDArray:
    """Cosine between the mean gaps of two groups: ||g||^2 / (||g||^2 + tr S / group_size), in 0..1. [C3; our reading]

    As a ratio of expectations, for groups as in ``gap_length``; near 1: the gap is one constant vector.
    """
    return (centroid_gap(audio, text, weights) / gap_length(audio, text, weights, group_size)) ** 2


def orthogonality(audio: ArrayLike, text: ArrayLike, weights: Weights = None) -> NDArray:
    """sum_i w_i |cos(a_i - mean a, g)|, in 0..1; 0: the gap is orthogonal to the spread of audio. [C3; our reading]

    C3 plots the signed cosine of differences of audio vectors, whose mean is 0 by symmetry; its size can be compared.
    """
    audio, text, rows = prepared(weights, audio, text)
    mean, gap = rows @ audio, rows @ (audio - text)
    along = audio @ gap.T - (mean * gap).sum(1)
    length = np.sqrt(np.maximum((audio**2).sum(1)[:, None] - 2 * audio @ mean.T + (mean**2).sum(1), 1e-24))
    return np.einsum("ri,ir->r", rows, np.abs(along) / length / np.maximum(np.linalg.norm(gap, axis=1), 1e-12))


def share_toward_text(audio: ArrayLike, text: ArrayLike, raw_audio: ArrayLike, weights: Weights = None) -> NDArray:
    """Share of clips that moved along the gap: (a_i - raw_i) . (mean_t - mean_raw) > 0. [ours: claim C2]"""
    audio, text, raw_audio = as_array(audio), as_array(text), as_array(raw_audio)
    moved = (audio - raw_audio) @ (text.mean(0) - raw_audio.mean(0)) > 0
    return weighted_mean(moved.astype(float), weights)


# ------------------------------------------------------------------------------------------------------ all together
@dataclass(frozen=True, eq=False)
class Reference:
    """The side that stays when systems change: one split's texts. Vectors are unit norm."""

    text: NDArray                                          # (n, D) caption 1 of each clip
    gallery: NDArray                                       # (m, D) all captions
    gallery_clip: NDArray                                  # (m,) int, the clip of each caption
    bandwidth: float                                       # sigma of mmd2: median_bandwidth of the raw texts
    raw_audio: NDArray | None = None                       # (n, D) the encoder's own; None: no share_toward_text
    labels: tuple[frozenset[str], ...] | None = None       # the set of labels of each clip
    exclude: NDArray | None = None                         # (n,) the gallery row that clip i must not meet


PAIRED = (       # metrics of the two sets alone, function(audio, text, weights)
    pair_cosine, nonpair_cosine, cosine_margin, centroid_gap, rmg, alignment, gram_correlation, linear_cka, gap_length,
    direction_consistency, orthogonality, frechet_distance, knn_overlap,
)


def gap_metrics(audio_emb: ArrayLike, reference: Reference, weights: Weights = None,
                only: Collection[str] | None = None) -> dict[str, NDArray]:
    """All metrics, or ``only`` some, of audio vectors (n, D), raw or mapped, unit norm, in the reference's space.

    Returns metric -> (R,) float64; NaN where ``not_computed_reason`` says why.
    """
    with np.errstate(divide="ignore", invalid="ignore"):      # a degenerate weighting or set of vectors gives NaN
        return {name: metric(weights) for name, metric in gap_functions(audio_emb, reference, only).items()}


def gap_functions(audio_emb: ArrayLike, reference: Reference,
                  only: Collection[str] | None = None) -> dict[str, GapFunction]:
    """The same unweighted: each metric as a function of ``weights``; rankings and classifiers are made once.

    Raises:
        ValueError: ``only`` names a metric that does not exist.
    """
    audio, text = as_array(audio_emb), as_array(reference.text)
    n = len(audio)
    functions: dict[str, GapFunction] = {metric.__name__: partial(metric, audio, text) for metric in PAIRED}
    functions |= {metric.__name__: partial(metric, audio) for metric in (uniformity, effective_rank)}
    functions["mmd2"] = partial(mmd2, audio, text, reference.bandwidth)
    if reference.raw_audio is not None:
        functions["share_toward_text"] = partial(share_toward_text, audio, text, reference.raw_audio)
    blank = partial(weighted_mean, np.full(n, np.nan))
    functions |= dict.fromkeys(("separability_accuracy", "separability_auc"), blank)
    wanted = {*functions, *RETRIEVAL_METRICS} if only is None else set(only)
    if wanted & set(RETRIEVAL_METRICS):
        gallery, of_clip = reference.gallery, reference.gallery_clip
        ranked = retrieval(audio, gallery, of_clip, np.eye(n), reference.labels, reference.exclude)
        functions |= {name: partial(weighted_mean, score) for name, score in ranked.items()}
    if n >= MIN_ITEMS and wanted & {"separability_accuracy", "separability_auc"}:
        functions |= separability_functions(audio, text)
    if unknown := set(only or ()) - set(functions):
        raise ValueError(f"no gap metric is called {', '.join(sorted(unknown))}: choose among {', '.join(functions)}")
    return {name: blank if not_computed_reason(name, n) else function
            for name, function in functions.items() if name in wanted}


def not_computed_reason(metric: str, n_items: int) -> str:
    """Why a metric has no value among that many items; blank if it has one."""
    ranks = metric in RETRIEVAL_METRICS or metric.startswith(("knn_overlap", "effective_rank", "separability"))
    if ranks and n_items < MIN_ITEMS:
        return f"a neighbour or rank metric needs at least {MIN_ITEMS} items, here are {n_items}"
    return "needs at least 2 items" if n_items < 2 else ""
