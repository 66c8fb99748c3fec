"""The modality gap (``gap``, ``neighbours``) and captions (``captions``, ``caption_runs``, ``java``), measured with intervals (``bootstrap``).

Here stands what a metric is called where it is shown.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

TITLES = {
    "pair_cosine": "pair cosine", "cosine_margin": "cosine margin", "centroid_gap": "centroid gap", "rmg": "RMG", "recall_at_10": "R@10",
    "effective_rank": "effective rank", "bleu_4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider_d": "CIDEr-D", "spice": "SPICE",
    "spider": "SPIDEr", "sbert_sim": "SBERT similarity",
}
ARROWS = {"higher": " ↑", "lower": " ↓"}         # a metric's better side, by ``DIRECTION`` of its module




# ----------------------------------------------------------------------------------------------------
# Retrieval and topology (metric groups 8 and 9): who ranks first, who stays neighbour to whom, how many directions are used.


CUTOFFS = (1, 5, 10)
RETRIEVAL_METRICS = tuple(
    f"{direction}{rule}{name}"
    for direction in ("", "text_to_audio_") for rule in ("", "label_")
    for name in (*(f"recall_at_{k}" for k in CUTOFFS), "map_at_10")
)


# ------------------------------------------------------------------------------------------------------------ weighted means
def weight_rows(weights: ArrayLike | None, n: int) -> NDArray:
    """(R, n) weights, each row divided by its sum; None gives one uniform row."""
    rows = np.ones((1, n)) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    with np.errstate(invalid="ignore"):
        return rows / rows.sum(1, keepdims=True)


def weighted_mean(values: NDArray, weights: ArrayLike | None = None) -> NDArray:
    """sum_i w_i v_i over the items whose value is not NaN; (n,) -> (R,)."""
    rows, valid = weight_rows(weights, len(values)), ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return rows @ np.where(valid, values, 0.0) / (rows @ valid)


def quadratic(rows: NDArray, matrix: NDArray) -> NDArray:
    """sum_ij w_i w_j k_ij for each weighting; (R, n), (n, n) -> (R,)."""
    return np.einsum("ri,ri->r", rows @ matrix, rows)


def off_diagonal_mean(rows: NDArray, total: NDArray, diagonal: NDArray) -> NDArray:
    """From sum_ij w_i w_j k_ij to the mean over i != j; (R, n), (R,), (n,) -> (R,)."""
    squares = rows**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total - squares @ diagonal) / (1 - squares.sum(1))


def as_array(x: ArrayLike) -> NDArray:
    """float64 numpy array of an array or a CPU tensor."""
    return np.asarray(x, dtype=np.float64)


def covariance(x: NDArray, row: NDArray) -> NDArray:
    """sum_i w_i (x_i - mu)(x_i - mu)^T for one weighting; (n, D), (n,) -> (D, D)."""
    drawn = row > 0                                                   # a replicate leaves more than half of the clips out
    scaled = (x[drawn] - row @ x) * np.sqrt(row[drawn])[:, None]
    return scaled.T @ scaled


def for_each(value: Callable[[NDArray], float], rows: NDArray) -> NDArray:
    """A value that costs an eigen-decomposition, of each weighting, on all cores; NaN where no clip counts. (R, n) -> (R,)"""
    with threadpool_limits(1), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return np.array(list(pool.map(lambda row: np.nan if np.isnan(row).any() else value(row), rows)))


def squared_distances(x: NDArray, y: NDArray) -> NDArray:
    """||x_i - y_j||^2; (n, D), (m, D) -> (n, m)."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0.0)


# ----------------------------------------------------------------------------------------------------------------- 8: retrieval
def top_k(similarity: NDArray, k: int) -> NDArray:
    """Columns of the k largest entries of each row, largest first, ties by column; (q, g) -> (q, min(k, g)) int64."""
    k = min(k, similarity.shape[1])
    columns = np.sort(torch.topk(torch.from_numpy(similarity), k, sorted=False).indices.numpy(), axis=1)
    found = np.take_along_axis(similarity, columns, 1)
    order = np.argsort(-found, axis=1, kind="stable")
    top = np.take_along_axis(columns, order, 1)
    tied = (similarity >= found.min(1, keepdims=True)).sum(1) > k     # the k-th place is shared: sort these rows in full
    top[tied] = np.argsort(-similarity[tied], axis=1, kind="stable")[:, :k]
    return top


def nearest_captions(vectors: ArrayLike, gallery: ArrayLike, captions: list[str], k: int = 5) -> list[list[tuple[str, float]]]:
    """The k wordings nearest to each vector, nearest first, each wording once.

    Args:
        vectors: (q, D) unit norm.
        gallery: (m, D) unit norm, the vectors of ``captions``; equal wordings have equal vectors.

    Returns:
        q lists of (caption, cosine).

    Example:
        >>> nearest_captions(bridge(audio_emb), train.text, train.captions)[0][0]
    """
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    wordings = list(first)
    cosine = as_array(vectors) @ as_array(gallery)[list(first.values())].T
    return [[(wordings[column], float(row[column])) for column in columns] for row, columns in zip(cosine, top_k(cosine, k), strict=True)]


def ranking_scores(ranking: NDArray, relevant: NDArray) -> dict[str, NDArray]:
    """R@1/5/10 (1 if any relevant item is among the first k: AudioCaps' rule) and AP@10 of each query.

    AP@10 = sum_{r <= 10} rel_r P_r / min(#relevant, 10), P_r = share of relevant items among the first r.

    Args:
        ranking: (q, 10) int, the first ten of the gallery, best first.
        relevant: (q, g) bool.

    Returns:
        name -> (q,) float64 in 0..1, NaN for a query without a relevant item.
    """
    hits = np.take_along_axis(relevant, ranking, 1)
    count = relevant.sum(1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    scores = {f"recall_at_{k}": hits[:, :k].any(1).astype(float) for k in CUTOFFS}
    scores["map_at_10"] = (hits * precision).sum(1) / np.clip(count, 1, 10)
    return {name: np.where(count > 0, value, np.nan) for name, value in scores.items()}


def retrieval(audio: ArrayLike, gallery: ArrayLike, gallery_clip: ArrayLike, weights: ArrayLike | None = None,
              labels: Sequence[Iterable[str]] | None = None, exclude: ArrayLike | None = None) -> dict[str, NDArray]:
    """``retrieval_scores``, weighted: the gallery stays whole while ``weights`` (R, n) weight the clips that ask; name -> (R,) in 0..1."""
    return {name: weighted_mean(score, weights) for name, score in retrieval_scores(audio, gallery, gallery_clip, labels, exclude).items()}


def retrieval_scores(audio: ArrayLike, gallery: ArrayLike, gallery_clip: ArrayLike, labels: Sequence[Iterable[str]] | None = None,
                     exclude: ArrayLike | None = None) -> dict[str, NDArray]:
    """Both directions; ``label_`` in front: captions (clips) with the same set of labels count as relevant too.

    Audio to text: clip i asks the whole gallery, hits are its own captions. Text to audio: each caption asks the n clips, the hit is
    its own clip; a clip's score is the mean over its captions.

    Args:
        audio: (n, D) unit norm.
        gallery: (m, D) unit norm, all captions.
        gallery_clip: (m,) int, the clip of each caption.
        labels: the set of labels of each clip, or None.
        exclude: (n,) int, a gallery row that clip i must not meet (it *is* the vector under test, as in ``text_floor``), or None.

    Returns:
        the names of ``RETRIEVAL_METRICS`` (those with ``label_`` only if labels are given) -> (n,) in 0..1, NaN where nothing is relevant.
    """
    audio, gallery, gallery_clip = as_array(audio), as_array(gallery), np.asarray(gallery_clip)
    n, clips = len(audio), np.arange(len(audio))
    relevant = {"": gallery_clip[None] == clips[:, None]}
    if labels is not None:
        number = {members: i for i, members in enumerate(dict.fromkeys(map(frozenset, labels)))}
        group = np.array([number[frozenset(members)] for members in labels])
        relevant["label_"] = group[gallery_clip][None] == group[:, None]
    similarity = audio @ gallery.T
    if exclude is not None:
        similarity[clips, exclude] = -np.inf
        for matrix in relevant.values():
            matrix[clips, exclude] = False
    found_texts, found_clips = top_k(similarity, 10), top_k(np.ascontiguousarray(similarity.T), 10)
    values = {}
    for rule, matrix in relevant.items():
        for name, score in ranking_scores(found_texts, matrix).items():
            values[rule + name] = score
        for name, score in ranking_scores(found_clips, matrix.T).items():
            asked = ~np.isnan(score)
            if exclude is not None:
                asked[exclude] = False
            counts = np.bincount(gallery_clip[asked], minlength=n)
            total = np.bincount(gallery_clip[asked], score[asked], minlength=n)
            values["text_to_audio_" + rule + name] = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
    return values


# ------------------------------------------------------------------------------------------------------------------ 9: topology
def gram_correlation(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """Pearson correlation of cos(a_i, a_j) with cos(t_i, t_j) over i != j, in -1..1. [ours: what L_topo asks for]"""
    audio, text = as_array(audio), as_array(text)
    a, t, rows = audio @ audio.T, text @ text.T, weight_rows(weights, len(audio))

    def mean(matrix: NDArray) -> NDArray:
        return off_diagonal_mean(rows, quadratic(rows, matrix), np.diag(matrix))

    mean_a, mean_t = (off_diagonal_mean(rows, ((rows @ x) ** 2).sum(1), (x**2).sum(1)) for x in (audio, text))
    return (mean(a * t) - mean_a * mean_t) / np.sqrt((mean(a * a) - mean_a**2) * (mean(t * t) - mean_t**2))


def linear_cka(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """||A^T T||_F^2 / (||A^T A||_F ||T^T T||_F) of the centred sets, in 0..1. [Kornblith et al., ICML 2019]

    In Gram form, so that a weighting costs O(n^2): with K = A A^T, L = T T^T,
    ||A_c^T T_c||_F^2 = w'(K * L) w - 2 w'((K w) * (L w)) + (w'K w)(w'L w).
    """
    k, l = (x @ x.T for x in (as_array(audio), as_array(text)))
    rows = weight_rows(weights, len(k))
    rows_k, rows_l = rows @ k, rows @ l

    def hsic(x: NDArray, y: NDArray, rows_x: NDArray, rows_y: NDArray) -> NDArray:
        crossed = np.einsum("ri,ri,ri->r", rows, rows_x, rows_y)
        return quadratic(rows, x * y) - 2 * crossed + np.einsum("ri,ri->r", rows_x, rows) * np.einsum("ri,ri->r", rows_y, rows)

    return hsic(k, l, rows_k, rows_l) / np.sqrt(hsic(k, k, rows_k, rows_k) * hsic(l, l, rows_l, rows_l))


def knn_overlap(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None, k: int = 10) -> NDArray:
    """sum_i w_i |N_k(a_i) & N_k(t_i)| / k, in 0..1; N_k = the k nearest clips in the item's own modality. [Huh et al., ICML 2024]"""
    audio, text = as_array(audio), as_array(text)
    member = np.zeros((2, len(audio), len(audio)), dtype=bool)
    for flags, x in zip(member, (audio, text)):
        similarity = x @ x.T
        np.fill_diagonal(similarity, -np.inf)
        np.put_along_axis(flags, top_k(similarity, k), True, axis=1)
    return weighted_mean((member[0] & member[1]).sum(1) / k, weights)


def effective_rank(audio: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """exp(-sum_k p_k log p_k), p = covariance eigenvalues over their sum, in 1..D. [Roy & Vetterli, 2007, on the covariance]"""
    audio = as_array(audio)

    def rank(row: NDArray) -> float:
        eigenvalues = np.maximum(np.linalg.eigvalsh(covariance(audio, row)), 0)
        with np.errstate(invalid="ignore"):                           # one point has no spread: 0 / 0
            p = eigenvalues / eigenvalues.sum()
        return np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum())

    return for_each(rank, weight_rows(weights, len(audio)))




# ----------------------------------------------------------------------------------------------------
# Gap metrics: how far a set of (mapped) audio vectors stands from its paired texts, in ten groups.


MIN_ITEMS = 20   # [ours] below this a neighbour or rank metric is not computed
HEAVY = ("frechet_distance", "effective_rank")   # one eigen-decomposition a weighting
GapFunction = Callable[[ArrayLike | None], NDArray]   # weights (R, n), or None for uniform ones -> (R,)
DIRECTION = {    # which side is better; a metric that is missing here has no better side of its own
    "pair_cosine": "higher", "cosine_margin": "higher", "centroid_gap": "lower", "rmg": "lower", "separability_accuracy": "lower",
    "separability_auc": "lower", "frechet_distance": "lower", "mmd2": "lower", "alignment": "lower", "gram_correlation": "higher",
    "linear_cka": "higher", "knn_overlap": "higher", "gap_length": "lower", "share_toward_text": "higher",
    **{name: "higher" for name in RETRIEVAL_METRICS},
}


# ------------------------------------------------------------------------------------- 1-3: cosines, centroids, relative gap
def pair_cosine(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """sum_i w_i cos(a_i, t_i), in -1..1. [similarity of matched pairs; (paper~) one of its two criteria]"""
    return weighted_mean(np.einsum("id,id->i", as_array(audio), as_array(text)), weights)


def nonpair_cosine(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """Mean of cos(a_i, t_j) over i != j, in -1..1."""
    audio, text = as_array(audio), as_array(text)
    rows = weight_rows(weights, len(audio))
    total = np.einsum("rd,rd->r", rows @ audio, rows @ text)
    return off_diagonal_mean(rows, total, np.einsum("id,id->i", audio, text))


def cosine_margin(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """pair_cosine - nonpair_cosine: a map that sends everything to one point gains the first and nothing here. [ours]"""
    return pair_cosine(audio, text, weights) - nonpair_cosine(audio, text, weights)


def centroid_gap(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """||sum_i w_i a_i - sum_i w_i t_i||, in 0..2. [Liang et al., NeurIPS 2022]

    It is the gap of *these* n clips: were there none at all, sampling would still leave about sqrt(tr S / n), S = cov(a_i - t_i).
    """
    gaps = as_array(audio) - as_array(text)
    return np.linalg.norm(weight_rows(weights, len(gaps)) @ gaps, axis=1)


def rmg(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """Relative modality gap P / (P + (W_a + W_t) / 2), in 0..1. [Schrodi et al., ICLR 2025]

    d = (1 - cos) / 2; P = sum_i w_i d(a_i, t_i); W_a, W_t = mean of d over i != j inside a modality.
    """
    audio, text = as_array(audio), as_array(text)
    rows = weight_rows(weights, len(audio))

    def within(x: NDArray) -> NDArray:
        return (1 - off_diagonal_mean(rows, ((rows @ x) ** 2).sum(1), (x**2).sum(1))) / 2

    paired = rows @ ((audio - text) ** 2).sum(1) / 4      # (1 - cos) / 2 = ||a - t||^2 / 4 on the unit sphere
    return paired / (paired + (within(audio) + within(text)) / 2)


# --------------------------------------------------------------------------------------------------- 4: can they be told apart
def separability(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None, seed: int = 0) -> dict[str, NDArray]:
    """``separability_accuracy`` and ``separability_auc`` of ``separability_functions``, (R,) each."""
    return {name: function(weights) for name, function in separability_functions(audio, text, seed).items()}


def separability_functions(audio: ArrayLike, text: ArrayLike, seed: int = 0) -> dict[str, GapFunction]:
    """Accuracy and AUC of a logistic regression that tells a from t on clips it was not fitted on (0.5 = closed).

    Clips are split into two halves by ``seed``; a clip's two vectors stay together; each half is judged by the other half's
    classifier (inputs times sqrt(D), C = 1). [ours] AUC counts pairs (t_i, a_j) of one half, ties as one half.
    """
    from sklearn.linear_model import LogisticRegression

    audio, text = as_array(audio), as_array(text)
    n, scale = len(audio), np.sqrt(audio.shape[1])
    fold = np.random.default_rng(seed).permutation(n) % 2
    audio_score, text_score = np.empty(n), np.empty(n)
    for half in (0, 1):
        fit, held = fold != half, fold == half
        inputs = np.concatenate([audio[fit], text[fit]]) * scale
        with threadpool_limits(1):    # the same bits on any number of cores, and faster at this size
            model = LogisticRegression(max_iter=300).fit(inputs, np.repeat([0, 1], fit.sum()))
        audio_score[held], text_score[held] = model.decision_function(audio[held] * scale), model.decision_function(text[held] * scale)
    accuracy = ((audio_score < 0) + (text_score > 0).astype(float)) / 2
    difference = text_score[:, None] - audio_score[None]
    wins = ((difference > 0) + 0.5 * (difference == 0)) * (fold[:, None] == fold[None])

    def auc(weights: ArrayLike | None = None) -> NDArray:
        rows = weight_rows(weights, n)
        second_half = rows @ fold
        return quadratic(rows, wins) / (second_half**2 + (1 - second_half) ** 2)

    return {"separability_accuracy": partial(weighted_mean, accuracy), "separability_auc": auc}


# --------------------------------------------------------------------------------------------- 5-7: distances of distributions
def frechet_distance(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """||mu_a - mu_t||^2 + tr(C_a + C_t - 2 (C_a^(1/2) C_t C_a^(1/2))^(1/2)), >= 0. [Heusel et al., NeurIPS 2017]

    C <- (1 - s) C + s (tr C / D) I, with s of Ledoit and Wolf (2004) for each set, from all its items (n is near D). Its floor is
    the value of the row ``text_floor``: another caption of the same clips against caption 1.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    audio, text = as_array(audio), as_array(text)
    shrinkage = [ledoit_wolf_shrinkage(x) for x in (audio, text)]

    def distance(row: NDArray) -> float:
        mu_a, mu_t = row @ audio, row @ text
        c_a, c_t = (_shrunk(covariance(x, row), s) for x, s in zip((audio, text), shrinkage))
        root = np.linalg.cholesky(c_a + 1e-12 * np.eye(len(c_a)))
        eigenvalues = np.linalg.eigvalsh(root.T @ c_t @ root)
        overlap = np.sqrt(np.maximum(eigenvalues, 0)).sum()
        return ((mu_a - mu_t) ** 2).sum() + np.trace(c_a) + np.trace(c_t) - 2 * overlap

    return for_each(distance, weight_rows(weights, len(audio)))


def _shrunk(covariance: NDArray, shrinkage: float) -> NDArray:
    d = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)


def median_bandwidth(text: ArrayLike) -> float:
    """sigma = median of ||t_i - t_j|| over i < j, of the raw texts: one value for all systems. [the median heuristic]"""
    distances = squared_distances(as_array(text), as_array(text))
    return float(np.sqrt(np.median(distances[np.triu_indices(len(distances), 1)])))


def mmd2(audio: ArrayLike, text: ArrayLike, bandwidth: float, weights: ArrayLike | None = None) -> NDArray:
    """Squared maximum mean discrepancy, unbiased: mean over i != j of k(a_i, a_j) + k(t_i, t_j) - k(a_i, t_j) - k(a_j, t_i).

    k(x, y) = exp(-||x - y||^2 / (2 sigma^2)), sigma = ``bandwidth``. [Gretton et al., JMLR 2012, lemma 6, in its form for equal
    sizes: pairs are not independent, so k(a_i, t_i) stays out.] It may fall below 0 where the two sets agree.
    """
    audio, text = as_array(audio), as_array(text)
    kernel = [np.exp(-squared_distances(x, y) / (2 * bandwidth**2)) for x, y in ((audio, audio), (text, text), (audio, text))]
    h = kernel[0] + kernel[1] - kernel[2] - kernel[2].T
    rows = weight_rows(weights, len(audio))
    return off_diagonal_mean(rows, quadratic(rows, h), np.diag(h))


def alignment(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """sum_i w_i ||a_i - t_i||^2, in 0..4. [Wang & Isola, ICML 2020, alpha = 2]"""
    return weighted_mean(((as_array(audio) - as_array(text)) ** 2).sum(1), weights)


def uniformity(audio: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """log of the mean over i != j of exp(-2 ||a_i - a_j||^2), <= 0; 0 = all at one point. [Wang & Isola, ICML 2020, t = 2]"""
    audio = as_array(audio)
    rows = weight_rows(weights, len(audio))
    kernel = np.exp(-2 * squared_distances(audio, audio))
    return np.log(off_diagonal_mean(rows, quadratic(rows, kernel), np.diag(kernel)))


# -------------------------------------------------------------------------------------------------- 10: the gap as one vector
def gap_length(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None, group_size: int = 100) -> NDArray:
    """Length of the mean gap over a group of pairs: sqrt(||g||^2 + tr S / group_size). [C3: Zhang et al., ICLR 2024; our reading]

    g = mean of a_i - t_i, S = their covariance. C3's published analysis shuffles the pairs once, averages the gap over groups of
    100 and looks at the lengths; this is their root mean square over all shuffles. A group of 1 gives the gap of single pairs, a
    large one tends to ``centroid_gap``.
    """
    squared, spread = _mean_gap(audio, text, weights)
    return np.sqrt(squared + spread / group_size)


def direction_consistency(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None, group_size: int = 100) -> NDArray:
    """Cosine between the mean gaps of two groups of pairs: ||g||^2 / (||g||^2 + tr S / group_size), in 0..1. [C3; our reading]

    As a ratio of expectations, for groups as in ``gap_length``; near 1: the gap is one constant vector.
    """
    squared, spread = _mean_gap(audio, text, weights)
    return squared / (squared + spread / group_size)


def _mean_gap(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None) -> tuple[NDArray, NDArray]:
    """||g||^2 and tr S of the gap vectors a_i - t_i; (R,) each."""
    gaps = as_array(audio) - as_array(text)
    rows = weight_rows(weights, len(gaps))
    squared = ((rows @ gaps) ** 2).sum(1)
    return squared, np.maximum(rows @ (gaps**2).sum(1) - squared, 0)


def orthogonality(audio: ArrayLike, text: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """sum_i w_i |cos(a_i - mean a, g)|, in 0..1; 0: the gap stands across what audio vectors differ in. [C3; our reading]

    C3 plots the signed cosine of differences of audio vectors, whose mean is 0 by symmetry; the size is what can be compared.
    """
    audio, text = as_array(audio), as_array(text)
    rows = weight_rows(weights, len(audio))
    mean, gap = rows @ audio, rows @ (audio - text)
    along = audio @ gap.T - (mean * gap).sum(1)
    length = np.sqrt(np.maximum((audio**2).sum(1)[:, None] - 2 * audio @ mean.T + (mean**2).sum(1), 1e-24))
    return np.einsum("ri,ir->r", rows, np.abs(along) / length / np.maximum(np.linalg.norm(gap, axis=1), 1e-12))


def share_toward_text(audio: ArrayLike, text: ArrayLike, raw_audio: ArrayLike, weights: ArrayLike | None = None) -> NDArray:
    """Share of clips whose vector moved along mean_t - mean_a: (a_i - raw_i) . (mean_t - mean_raw) > 0. [ours: claim C2]"""
    audio, text, raw_audio = as_array(audio), as_array(text), as_array(raw_audio)
    moved = (audio - raw_audio) @ (text.mean(0) - raw_audio.mean(0)) > 0
    return weighted_mean(moved.astype(float), weights)


# --------------------------------------------------------------------------------------------------------------- all together
@dataclass(frozen=True, eq=False)
class Reference:
    """The side that stays when systems change: one split's texts. Vectors are unit norm.

    Attributes:
        text: (n, D) caption 1 of each clip.
        gallery: (m, D) all captions.
        gallery_clip: (m,) int, the clip of each caption.
        bandwidth: sigma of ``mmd2``, ``median_bandwidth(text)`` of the raw texts.
        raw_audio: (n, D) the encoder's own audio vectors, or None (then ``share_toward_text`` is left out).
        labels: the set of labels of each clip, or None.
        exclude: (n,) gallery row that clip i must not meet, or None; see ``retrieval``.
    """

    text: NDArray
    gallery: NDArray
    gallery_clip: NDArray
    bandwidth: float
    raw_audio: NDArray | None = None
    labels: tuple[frozenset[str], ...] | None = None
    exclude: NDArray | None = None


PAIRED = (       # metrics of the two sets alone, function(audio, text, weights)
    pair_cosine, nonpair_cosine, cosine_margin, centroid_gap, rmg, alignment, gram_correlation, linear_cka, gap_length, direction_consistency,
    orthogonality, frechet_distance, knn_overlap,
)


def gap_metrics(audio_emb: ArrayLike, reference: Reference, weights: ArrayLike | None = None) -> dict[str, NDArray]:
    """All ten groups of one set of vectors.

    Args:
        audio_emb: (n, D) raw or mapped audio vectors, unit norm, in the reference's space.
        reference: the split's texts.
        weights: (R, n) clip weightings, or None for the value itself.

    Returns:
        metric -> (R,) float64; NaN where ``not_computed_reason`` says why.
    """
    with np.errstate(divide="ignore", invalid="ignore"):      # a degenerate weighting or set of vectors gives NaN
        return {name: function(weights) for name, function in gap_functions(audio_emb, reference).items()}


def gap_functions(audio_emb: ArrayLike, reference: Reference) -> dict[str, GapFunction]:
    """The same before it is weighted: each metric as a function of ``weights`` alone; rankings and classifiers are made here, once."""
    audio, text = as_array(audio_emb), as_array(reference.text)
    functions: dict[str, GapFunction] = {metric.__name__: partial(metric, audio, text) for metric in PAIRED}
    functions |= {metric.__name__: partial(metric, audio) for metric in (uniformity, effective_rank)}
    functions["mmd2"] = partial(mmd2, audio, text, reference.bandwidth)
    if reference.raw_audio is not None:
        functions["share_toward_text"] = partial(share_toward_text, audio, text, reference.raw_audio)
    scores = retrieval_scores(audio, reference.gallery, reference.gallery_clip, reference.labels, reference.exclude)
    functions |= {name: partial(weighted_mean, score) for name, score in scores.items()}
    blank = partial(weighted_mean, np.full(len(audio), np.nan))
    few = dict.fromkeys(("separability_accuracy", "separability_auc"), blank)
    functions |= separability_functions(audio, text) if len(audio) >= MIN_ITEMS else few
    return {name: blank if not_computed_reason(name, len(audio)) else function for name, function in functions.items()}


def not_computed_reason(metric: str, n_items: int) -> str:
    """Why a metric has no value among that many items; blank if it has one."""
    ranks = metric in RETRIEVAL_METRICS or metric in ("knn_overlap", "effective_rank") or metric.startswith("separability")
    if ranks and n_items < MIN_ITEMS:
        return f"a neighbour or rank metric needs at least {MIN_ITEMS} items, here are {n_items}"
    return "needs at least 2 items" if n_items < 2 else ""
