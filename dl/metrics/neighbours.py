"""Retrieval and topology (metric groups 8 and 9): who ranks first, who stays neighbour to whom, how many directions are used.

The weighted means that all gap metrics share stand here too; ``dl.metrics.gap`` explains the notation and collects the metrics.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

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
