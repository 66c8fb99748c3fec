"""Gap metrics and their intervals: worked examples by hand, plain-loop references, invariances, and what a bootstrap must do."""
from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import roc_auc_score

from dl.clap import Embeddings
from dl import gap as metrics
from dl.bootstrap import make_draws, make_reference, paired_difference, score_clips, score_system, text_floor
from dl.gap import Reference, gap_functions, gap_metrics, median_bandwidth
from dl.gap import nearest_captions, ranking_scores, retrieval, top_k, weight_rows


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clouds(n: int = 60, d: int = 8, gap: float = 1.0, noise: float = 0.4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Paired unit vectors (audio, text), (n, d): shared content, an offset along the first axis, noise on both."""
    rng = np.random.default_rng(seed)
    content, offset = rng.standard_normal((n, d)), np.eye(d)[0] * gap * 2
    return (unit(content + sign * offset + noise * rng.standard_normal((n, d))) for sign in (-1, 1))


def reference_of(text: np.ndarray, copies: int = 5, seed: int = 1, **more) -> Reference:
    rng = np.random.default_rng(seed)
    gallery = unit(np.repeat(text, copies, axis=0) + 0.1 * rng.standard_normal((len(text) * copies, text.shape[1])))
    gallery[::copies] = text
    return Reference(text, gallery, np.repeat(np.arange(len(text)), copies), median_bandwidth(text), **more)


AXES = np.eye(3)   # three orthogonal unit vectors


# ------------------------------------------------------------------------------------------------------------ worked examples
def test_cosines_by_hand():
    audio, text = AXES[[0, 1]], np.array([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    assert metrics.pair_cosine(audio, text) == pytest.approx([0.8])              # (.6 + 1) / 2
    assert metrics.nonpair_cosine(audio, text) == pytest.approx([0.4])           # (cos(a0, t1) + cos(a1, t0)) / 2 = (0 + .8) / 2
    assert metrics.cosine_margin(audio, text) == pytest.approx([0.4])
    assert metrics.centroid_gap(audio, text) == pytest.approx([np.hypot(0.2, 0.4)])   # means (.5, .5) and (.3, .9)
    assert metrics.alignment(audio, text) == pytest.approx([0.4])                # ||a0 - t0||^2 = .16 + .64, halved


def test_rmg_by_hand():
    """a = (e0, e1), t = (e2, e2): P = 1/2, W_a = 1/2, W_t = 0, so RMG = .5 / (.5 + .25) = 2/3."""
    assert metrics.rmg(AXES[[0, 1]], AXES[[2, 2]]) == pytest.approx([2 / 3])


def test_rmg_punishes_distance_and_collapse():
    audio, text = clouds()
    collapsed = unit(audio * 0.05 + text.mean(0))
    assert metrics.rmg(text, text) == pytest.approx([0.0]), "nothing apart, nothing collapsed"
    assert metrics.centroid_gap(collapsed, text) < metrics.centroid_gap(audio, text)
    point = unit(np.tile(text.mean(0), (len(text), 1)))
    spread = unit(text + 0.65 * np.random.default_rng(1).standard_normal(text.shape))
    assert metrics.pair_cosine(spread, text) < metrics.pair_cosine(point, text), "by distance alone one point would win"
    assert metrics.rmg(spread, text) < metrics.rmg(point, text)


def test_uniformity_and_alignment_by_hand():
    assert metrics.uniformity(AXES[:2]) == pytest.approx([-4.0])                 # ||e0 - e1||^2 = 2, log exp(-2 * 2)
    assert metrics.uniformity(AXES[[0, 0, 0]]) == pytest.approx([0.0])
    assert metrics.alignment(AXES[:2], -AXES[:2]) == pytest.approx([4.0])


def test_effective_rank_counts_equal_directions():
    cross = np.concatenate([AXES, -AXES])
    assert metrics.effective_rank(cross) == pytest.approx([3.0])
    assert metrics.effective_rank(cross[[0, 3]]) == pytest.approx([1.0])
    assert metrics.effective_rank(cross, np.array([[1, 1, 0, 1, 1, 0]])) == pytest.approx([2.0])


def test_gap_vector_by_hand():
    """Gaps (1, 0, 1) and (1, 0, -1): g = (1, 0, 0), tr S = 1."""
    text = np.zeros((2, 3))
    audio = np.array([[1.0, 0, 1], [1.0, 0, -1]])
    assert metrics.gap_length(audio, text, group_size=1) == pytest.approx([np.sqrt(2)])
    assert metrics.gap_length(audio, text, group_size=100) == pytest.approx([np.sqrt(1.01)])
    assert metrics.direction_consistency(audio, text, group_size=1) == pytest.approx([0.5])
    assert metrics.orthogonality(audio, text) == pytest.approx([0.0]), "audio differs along z, the gap lies along x"
    assert metrics.orthogonality(np.array([[2.0, 0, 0], [0.0, 0, 0]]), text) == pytest.approx([1.0])


def test_gap_length_is_that_of_shuffled_groups():
    audio, text = clouds(400, 8)
    rng, gaps = np.random.default_rng(0), audio - text
    groups = gaps[rng.integers(0, 400, (20_000, 100))].mean(1)
    assert metrics.gap_length(audio, text)[0] == pytest.approx(np.sqrt((groups**2).sum(1).mean()), rel=2e-3)


def test_share_toward_text_by_hand():
    raw, text = AXES[[0, 0, 0, 0]], AXES[[1, 1, 1, 1]]                          # direction e1 - e0
    moved = np.array([AXES[1], unit(AXES[:1] + AXES[1:2])[0], AXES[0], -AXES[1]])   # projections on it: 2, > 0, 0, 0
    assert metrics.share_toward_text(moved, text, raw) == pytest.approx([0.5])


# --------------------------------------------------------------------------------------------------------------- references
def test_frechet_equals_the_matrix_square_root_formula():
    from sklearn.covariance import ledoit_wolf

    audio, text = clouds(80, 6)
    c_a, c_t = ledoit_wolf(audio)[0], ledoit_wolf(text)[0]
    expected = ((audio.mean(0) - text.mean(0)) ** 2).sum() + np.trace(c_a + c_t - 2 * sqrtm(c_a @ c_t).real)
    assert metrics.frechet_distance(audio, text) == pytest.approx([expected], rel=1e-6)
    assert metrics.frechet_distance(audio, audio) == pytest.approx([0.0], abs=1e-8)


def test_mmd2_equals_the_plain_loop():
    audio, text = clouds(15, 4)

    def k(x, y):
        return np.exp(-((x - y) ** 2).sum() / (2 * 0.7**2))

    pairs = list(itertools.permutations(range(15), 2))
    expected = np.mean([k(audio[i], audio[j]) + k(text[i], text[j]) - k(audio[i], text[j]) - k(audio[j], text[i]) for i, j in pairs])
    assert metrics.mmd2(audio, text, 0.7) == pytest.approx([expected])


def test_mmd2_is_zero_on_average_where_sets_agree_though_pairs_do_not():
    """Paired, dependent samples of one distribution: the estimate has mean 0; with k(a_i, t_i) left in it would not."""
    values = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shared = rng.standard_normal((12, 3))
        values.append(metrics.mmd2(*(shared + 0.3 * rng.standard_normal((12, 3)) for _ in range(2)), bandwidth=1.5)[0])
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)


def test_median_bandwidth_by_hand():
    assert median_bandwidth(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)    # distances 1, 3, 2


def test_gram_correlation_equals_corrcoef():
    audio, text = clouds(20)
    upper = np.triu_indices(20, 1)
    assert metrics.gram_correlation(audio, text) == pytest.approx([np.corrcoef((audio @ audio.T)[upper], (text @ text.T)[upper])[0, 1]])


def test_linear_cka_equals_the_feature_form_and_ignores_rotation():
    audio, text = clouds(40)
    a, t = audio - audio.mean(0), text - text.mean(0)
    expected = np.linalg.norm(a.T @ t) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(t.T @ t))
    assert metrics.linear_cka(audio, text) == pytest.approx([expected])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    assert metrics.linear_cka(audio, 3 * audio @ turn) == pytest.approx([1.0])


def test_knn_overlap_equals_the_plain_loop():
    audio, text = clouds(30)
    expected = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        near = [set(sorted(others, key=lambda j: -x[i] @ x[j])[:10]) for x in (audio, text)]
        expected.append(len(near[0] & near[1]) / 10)
    assert metrics.knn_overlap(audio, text) == pytest.approx([np.mean(expected)])


def test_separability_opens_and_closes():
    audio, text = clouds(200, gap=2.0)
    apart = metrics.separability(audio, text)
    assert apart["separability_accuracy"] > 0.97 and apart["separability_auc"] > 0.99
    audio, text = clouds(400, gap=0.0)
    closed = metrics.separability(audio, text)
    assert abs(closed["separability_accuracy"] - 0.5) < 0.06 and abs(closed["separability_auc"] - 0.5) < 0.06


def test_separability_is_scikit_learns_auc_on_held_out_clips():
    from sklearn.linear_model import LogisticRegression

    audio, text = clouds(100, gap=0.3)
    fold, expected, right = np.random.default_rng(0).permutation(100) % 2, [], []
    for half in (0, 1):
        fit, held = fold != half, fold == half
        model = LogisticRegression(max_iter=300).fit(np.concatenate([audio[fit], text[fit]]) * 8**0.5, np.repeat([0, 1], 50))
        inputs, truth = np.concatenate([audio[held], text[held]]) * 8**0.5, np.repeat([0, 1], 50)
        expected.append(roc_auc_score(truth, model.decision_function(inputs)))
        right.append(model.score(inputs, truth))
    scores = metrics.separability(audio, text)
    assert scores["separability_auc"] == pytest.approx([np.mean(expected)])
    assert scores["separability_accuracy"] == pytest.approx([np.mean(right)])


# ---------------------------------------------------------------------------------------------------------------- retrieval
def test_ranking_scores_by_hand():
    """Relevant items on ranks 2, 3 and 12 of 12: AP@10 = (1/2 + 2/3) / 3."""
    similarity, relevant = -np.arange(12.0)[None], np.zeros((1, 12), dtype=bool)
    relevant[0, [1, 2, 11]] = True
    scores = ranking_scores(top_k(similarity, 10), relevant)
    assert [scores[f"recall_at_{k}"][0] for k in (1, 5, 10)] == [0, 1, 1]
    assert scores["map_at_10"] == pytest.approx([(1 / 2 + 2 / 3) / 3])


def test_top_k_breaks_ties_by_column():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 4, (50, 30)).astype(float)
    assert np.array_equal(top_k(similarity, 7), np.argsort(-similarity, axis=1, kind="stable")[:, :7])
    assert top_k(np.zeros((2, 3)), 10).tolist() == [[0, 1, 2]] * 2


def test_nearest_captions_come_nearest_first_and_each_wording_once():
    gallery = unit(np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    near, up = nearest_captions(np.array([[1.0, 0.0], [0.0, 1.0]]), gallery, ["rain", "wind", "rain", "bird", "dog"], k=3)
    assert near == [("rain", 1.0), ("wind", pytest.approx(0.5**0.5)), ("bird", 0.0)]
    assert [caption for caption, _ in up] == ["bird", "wind", "rain"]
    assert len(nearest_captions(torch.eye(2)[:1], torch.from_numpy(gallery), ["a", "b", "c", "d", "e"], k=9)[0]) == 5


def test_retrieval_hits_any_own_caption_in_both_directions():
    """Two clips, two captions each; clip 0 ranks its second caption first; clip 1 ranks a caption of clip 0 first."""
    audio = np.array([[1.0, 0.0], [0.8, 0.6]])
    gallery = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    scores = retrieval(audio, gallery, [0, 0, 1, 1])
    assert scores["recall_at_1"] == pytest.approx([0.5]) and scores["recall_at_5"] == pytest.approx([1.0])
    # clip 0 finds its captions on ranks 1 and 4, clip 1 (cosines -.8, .8, .6, -.6) on ranks 2 and 3
    assert scores["map_at_10"] == pytest.approx([((1 + 2 / 4) / 2 + (1 / 2 + 2 / 3) / 2) / 2])
    # captions ask: 0 finds clip 1, 1 finds clip 0, 2 finds clip 1, 3 (cosines 0, -.6) finds clip 0
    assert scores["text_to_audio_recall_at_1"] == pytest.approx([0.5])
    assert scores["text_to_audio_map_at_10"] == pytest.approx([0.75])
    weighted = retrieval(audio, gallery, [0, 0, 1, 1], weights=[[1, 0], [0, 1], [3, 1]])
    assert weighted["recall_at_1"] == pytest.approx([1, 0, 0.75])


def test_label_aware_retrieval_counts_captions_of_clips_with_the_same_labels():
    audio, gallery = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])   # each finds the other's caption
    scores = retrieval(audio, gallery, [0, 1], labels=[("dog", "rain"), ("rain", "dog")])
    assert scores["recall_at_1"] == pytest.approx([0.0]) and scores["label_recall_at_1"] == pytest.approx([1.0])
    assert scores["text_to_audio_label_recall_at_1"] == pytest.approx([1.0])
    apart = retrieval(audio, gallery, [0, 1], labels=[("dog",), ("rain",)])
    assert apart["label_recall_at_1"] == pytest.approx([0.0]), "other labels do not count"


def test_text_floor_does_not_meet_itself():
    _, text = clouds(40)
    reference = reference_of(text)
    second = reference.gallery[1::5]
    kept, masked = (retrieval(second, reference.gallery, reference.gallery_clip, exclude=rows) for rows in (None, np.arange(40) * 5 + 1))
    assert kept["recall_at_1"] == pytest.approx([1.0]) and kept["map_at_10"] > masked["map_at_10"]
    without = np.delete(np.arange(200), np.arange(40) * 5 + 1)
    lone = retrieval(second, reference.gallery[without], reference.gallery_clip[without])
    for name in ("text_to_audio_recall_at_1", "text_to_audio_map_at_10"):
        assert masked[name] == pytest.approx(lone[name]), "in this direction the masked caption simply does not ask"


def test_reference_and_text_floor_from_embeddings():
    audio, text = clouds(30)
    gallery = torch.from_numpy(reference_of(text, copies=3).gallery).float()
    embeddings = Embeddings("test", [str(i) for i in range(30)], torch.from_numpy(audio).float(), gallery, torch.arange(30).repeat_interleave(3),
                            [""] * 90, [])
    reference = make_reference(embeddings)
    assert np.array_equal(reference.text, embeddings.first_text.numpy()) and reference.bandwidth == median_bandwidth(reference.text)
    vectors, masked = text_floor(embeddings, reference)
    assert np.array_equal(vectors, embeddings.kth_text(1).numpy()) and masked.exclude.tolist() == [3 * i + 1 for i in range(30)]
    assert gap_metrics(vectors, masked)["map_at_10"] < gap_metrics(vectors, reference)["map_at_10"]
    means = embeddings.audio.mean(0), gallery.mean(0)
    centred = make_reference(embeddings, means=means)
    assert np.allclose(centred.gallery, unit(gallery.numpy() - means[1].numpy()), atol=1e-6) and centred.bandwidth > reference.bandwidth
    with pytest.raises(ValueError, match="captions"):
        text_floor(Embeddings("test", ["a"], gallery[:1], gallery[:1], torch.zeros(1, dtype=torch.int64), [""], []), reference)


# ------------------------------------------------------------------------------------------------------ weights, invariances
WEIGHTED = [metrics.pair_cosine, metrics.centroid_gap, metrics.alignment, metrics.linear_cka, metrics.gap_length,
            metrics.direction_consistency, metrics.orthogonality]


@pytest.mark.parametrize("metric", WEIGHTED, ids=lambda f: f.__name__)
def test_integer_weights_equal_duplicated_rows(metric):
    audio, text = clouds(25)
    weights = np.random.default_rng(2).integers(0, 4, (3, 25))
    expected = [metric(np.repeat(audio, w, axis=0), np.repeat(text, w, axis=0))[0] for w in weights]
    assert metric(audio, text, weights=weights) == pytest.approx(expected)


def test_integer_weights_equal_duplicated_rows_for_the_heavy_ones():
    audio, _ = clouds(25)
    weights = np.random.default_rng(2).integers(0, 4, 25)
    assert metrics.effective_rank(audio, weights) == pytest.approx(metrics.effective_rank(np.repeat(audio, weights, axis=0)))
    halves = np.array([[1.0] * 12 + [0.0] * 13])
    assert metrics.effective_rank(audio, halves) == pytest.approx(metrics.effective_rank(audio[:12]))


@pytest.mark.parametrize("name", ["nonpair_cosine", "rmg", "mmd2", "uniformity", "gram_correlation"])
def test_weights_on_pairs_equal_the_plain_loop(name):
    """Means over pairs leave an item with itself out, also when it was drawn twice."""
    audio, text = clouds(12, 4)
    w = np.random.default_rng(3).integers(0, 4, 12).astype(float)
    pairs = list(itertools.permutations(range(12), 2))
    share = np.array([w[i] * w[j] for i, j in pairs]) / sum(w[i] * w[j] for i, j in pairs)

    def mean(f):
        return sum(p * f(i, j) for p, (i, j) in zip(share, pairs))

    def k(x, y):
        return np.exp(-((x - y) ** 2).sum() / 2)

    if name == "nonpair_cosine":
        value, expected = metrics.nonpair_cosine(audio, text, w), mean(lambda i, j: audio[i] @ text[j])
    elif name == "rmg":
        paired = (w / w.sum()) @ ((1 - (audio * text).sum(1)) / 2)
        inside = mean(lambda i, j: (1 - audio[i] @ audio[j]) / 2) + mean(lambda i, j: (1 - text[i] @ text[j]) / 2)
        value, expected = metrics.rmg(audio, text, w), paired / (paired + inside / 2)
    elif name == "mmd2":
        value = metrics.mmd2(audio, text, 1.0, w)
        expected = mean(lambda i, j: k(audio[i], audio[j]) + k(text[i], text[j]) - k(audio[i], text[j]) - k(audio[j], text[i]))
    elif name == "uniformity":
        value, expected = metrics.uniformity(audio, w), np.log(mean(lambda i, j: np.exp(-2 * ((audio[i] - audio[j]) ** 2).sum())))
    else:
        x, y = (np.array([v[i] @ v[j] for i, j in pairs]) for v in (audio, text))
        covariance = np.cov(x, y, aweights=share, ddof=0)
        value, expected = metrics.gram_correlation(audio, text, w), covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert value == pytest.approx([expected])


def test_weight_rows_scale_does_not_matter():
    assert weight_rows([[2, 2], [1, 3]], 2).tolist() == [[0.5, 0.5], [0.25, 0.75]]


def test_order_of_clips_changes_nothing_but_the_order_of_pairs_does():
    audio, text = clouds(50)
    reference = reference_of(text, raw_audio=audio)
    order = np.random.default_rng(0).permutation(50)
    turned = Reference(text[order], reference.gallery.reshape(50, 5, -1)[order].reshape(250, -1), reference.gallery_clip,
                       reference.bandwidth, raw_audio=audio[order])
    before, after = gap_metrics(audio, reference), gap_metrics(audio[order], turned)
    for name in before.keys() - {"separability_accuracy", "separability_auc"}:     # its split goes by position
        assert after[name] == pytest.approx(before[name], abs=1e-6), name
    shuffled = gap_metrics(audio[order], reference)
    assert shuffled["centroid_gap"] == pytest.approx(before["centroid_gap"]) and shuffled["mmd2"] != pytest.approx(before["mmd2"], abs=1e-9)
    assert shuffled["pair_cosine"] < before["pair_cosine"] and shuffled["recall_at_1"] < before["recall_at_1"]


def test_identical_sets_have_no_gap():
    _, text = clouds(50)
    values = gap_metrics(text, reference_of(text))
    expected = {"pair_cosine": 1, "centroid_gap": 0, "rmg": 0, "frechet_distance": 0, "mmd2": 0, "alignment": 0, "recall_at_1": 1,
                "gram_correlation": 1, "linear_cka": 1, "knn_overlap": 1, "gap_length": 0}
    for name, value in expected.items():
        assert values[name] == pytest.approx([value], abs=1e-8), name


def test_gap_metrics_has_the_promised_names():
    promised = [
        "pair_cosine", "nonpair_cosine", "cosine_margin", "centroid_gap", "rmg", "separability_accuracy", "separability_auc",
        "frechet_distance", "mmd2", "alignment", "uniformity", "recall_at_1", "recall_at_5", "recall_at_10", "map_at_10",
        "gram_correlation", "linear_cka", "knn_overlap", "effective_rank", "gap_length", "direction_consistency", "orthogonality",
        "text_to_audio_recall_at_10", "text_to_audio_map_at_10", "label_recall_at_10", "text_to_audio_label_recall_at_10",
    ]
    audio, text = clouds(25)
    values = gap_metrics(torch.from_numpy(audio).float(), reference_of(text, raw_audio=audio, labels=tuple(frozenset({i}) for i in range(25))))
    assert set(promised) <= set(values) and all(value.shape == (1,) and np.isfinite(value).all() for value in values.values())
    assert set(metrics.DIRECTION) <= set(values)


def test_below_twenty_items_neighbour_and_rank_metrics_are_not_computed():
    audio, text = clouds(19)
    scores = score_system("raw", [(0, 0, audio)], reference_of(text), make_draws([(str(i),) for i in range(19)], 50))
    by_metric = {row["metric"]: row for row in scores.rows() if row["seed"] == "all"}
    for name in ("recall_at_10", "text_to_audio_map_at_10", "knn_overlap", "effective_rank", "separability_auc"):
        assert np.isnan(by_metric[name]["value"]) and "at least 20 items, here are 19" in by_metric[name]["reason"]
    assert by_metric["rmg"]["value"] > 0 and by_metric["rmg"]["reason"] == ""


# ---------------------------------------------------------------------------------------------------------------- bootstrap
def test_a_scene_weighs_the_product_of_its_recordings():
    clusters = [("a",), ("b",), ("a", "b"), ("b", "b"), ("c",)]
    draws = make_draws(clusters, 200)
    a, b, both, twice, c = draws.cluster.T
    assert np.array_equal(both, a * b) and np.array_equal(twice, b) and np.array_equal(a + b + c, np.full(200, 3.0))
    assert np.array_equal(draws.clip.sum(1), np.full(200, 5.0))
    assert np.array_equal(make_draws(clusters, 200).cluster, draws.cluster) and not np.array_equal(make_draws(clusters, 200, 1).cluster, draws.cluster)


def test_cluster_interval_is_wider_where_clips_repeat_one_another():
    """40 recordings, each heard in 10 clips with one score: the clip bootstrap believes in 400 independent clips."""
    score = np.repeat(np.random.default_rng(0).standard_normal(40), 10)
    draws = make_draws([(str(i // 10),) for i in range(400)], 1000)
    row = score_clips("x", [(0, 0, {"cider_d": score})], draws).rows()[-1]
    expected = 2 * 1.96 * score.std() / np.sqrt(40)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(expected, rel=0.15)
    assert row["clip_ci_high"] - row["clip_ci_low"] == pytest.approx(expected / np.sqrt(10), rel=0.15)
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_point_values_runs_and_spread():
    audio, text = clouds(40)
    runs = [(s, k, unit(audio + 0.05 * np.random.default_rng(10 * s + k).standard_normal(audio.shape))) for s in (0, 1) for k in (0, 1, 2)]
    reference, draws = reference_of(text), make_draws([(str(i // 2),) for i in range(40)], 120)
    scores = score_system("seed", runs, reference, draws, heavy_samples=60)
    rows = [row for row in scores.rows(experiment="gap", split="test") if row["metric"] == "rmg"]
    singles = [gap_metrics(vectors, reference)["rmg"][0] for _, _, vectors in runs]
    assert [row["value"] for row in rows[:-1]] == pytest.approx(singles)
    assert [(row["seed"], row["noise_seed"]) for row in rows[:-1]] == [(s, k) for s, k, _ in runs]
    assert rows[-1]["value"] == pytest.approx(np.mean(singles)) and rows[-1]["sd"] == pytest.approx(np.std(singles, ddof=1))
    for metric in ("rmg", "recall_at_10", "mmd2", "effective_rank"):
        summary = [row for row in scores.rows() if row["metric"] == metric][-1]
        assert summary["ci_low"] <= summary["value"] <= summary["ci_high"], metric
    assert np.isfinite(scores.replicates["effective_rank"]).sum() == 60 and np.isfinite(scores.replicates["rmg"]).all()


def test_replicates_are_the_metric_of_the_drawn_run_and_weights_shifted_by_one_number():
    audio, text = clouds(40)
    other = unit(audio + text)
    reference, draws = reference_of(text), make_draws([(str(i // 2),) for i in range(40)], 50)
    scores = score_system("x", [(0, 0, audio), (7, 0, other)], reference, draws, heavy_samples=0)
    expected = np.array([metrics.centroid_gap((audio, other)[int(u * 2)], text, w)[0] for u, w in zip(draws.seed, draws.cluster)])
    shift = expected - scores.replicates["centroid_gap"]
    drawn = scores.points["centroid_gap"][(draws.seed * 2).astype(int)]
    assert scores.replicates["centroid_gap"].mean() == pytest.approx(drawn.mean()), "the shift is the mean excess over the runs drawn"
    assert shift == pytest.approx(np.full(50, shift[0])) and shift[0] > 0, "resampled centroids lie further apart; the shift takes that out"


def test_interval_covers_what_sixty_clips_show_about_95_times_in_100():
    """A centroid gap in 32 dimensions: resampling adds noise of its own, without the shift the interval sits too high."""
    points, intervals = [], []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        audio, text = 0.1 * rng.standard_normal((2, 60, 32))
        audio[:, 0] += 0.2
        draws = make_draws([(str(i),) for i in range(60)], 200, seed)
        points.append(metrics.centroid_gap(audio, text)[0])
        replicates = metrics.centroid_gap(audio, text, draws.cluster)
        intervals.append(np.percentile(replicates, [2.5, 97.5]))
    shifts = [np.mean(interval) - point for interval, point in zip(intervals, points)]
    target = np.mean(points)
    unshifted = sum(low <= target <= high for low, high in intervals)
    shifted = sum(low - shift <= target <= high - shift for (low, high), shift in zip(intervals, shifts))
    assert 88 <= shifted <= 100 and unshifted < 80


def test_mask_scores_a_subset_against_the_whole_gallery():
    audio, text = clouds(50)
    reference, draws = reference_of(text), make_draws([(str(i),) for i in range(50)], 60)
    mask = np.arange(50) < 30
    scores = score_system("raw", [(0, 0, audio)], reference, draws, mask=mask, heavy_samples=0)
    assert scores.n_items == 30
    assert scores.points["rmg"] == pytest.approx(metrics.rmg(audio[:30], text[:30]))
    assert scores.points["recall_at_1"] == pytest.approx(retrieval(audio, reference.gallery, reference.gallery_clip, mask[None].astype(float))["recall_at_1"])


def test_functions_made_once_score_every_subset():
    """Rankings and the classifier are made for all clips; a subset takes a few of the functions, with the numbers of its own scoring."""
    audio, text = clouds(50)
    reference, draws, mask = reference_of(text), make_draws([(str(i // 2),) for i in range(50)], 60), np.arange(50) < 30
    functions, watched = gap_functions(audio, reference), ("rmg", "recall_at_10", "effective_rank")
    whole = score_clips("raw", [(0, 0, functions)], draws)
    part = score_clips("raw", [(0, 0, {metric: functions[metric] for metric in watched})], draws, mask, heavy_samples=0)
    assert tuple(part.points) == watched and part.n_items == 30
    for metric, value in gap_metrics(audio, reference).items():
        assert whole.points[metric] == pytest.approx(value), metric
    alone = score_system("raw", [(0, 0, audio)], reference, draws, mask, heavy_samples=0)
    for metric in watched:
        assert part.points[metric] == alone.points[metric] and np.array_equal(part.replicates[metric], alone.replicates[metric], equal_nan=True)
    assert np.isnan(part.replicates["effective_rank"]).all() and np.isfinite(part.replicates["rmg"]).all()


def test_heavy_metrics_do_not_depend_on_the_number_of_threads(monkeypatch):
    audio, text = clouds(40)
    draws = make_draws([(str(i),) for i in range(40)], 30)
    values = {}
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        values[threads] = metrics.frechet_distance(audio, text, draws.cluster), metrics.effective_rank(audio, draws.cluster)
    assert np.array_equal(values[1], values[3]) and np.isfinite(values[1]).all()
    assert values[1][1][7] == metrics.effective_rank(audio, draws.cluster[7])[0], "in the order of the weightings"


def test_a_weighting_without_clips_has_no_value():
    audio, text = clouds(25)
    weights = np.stack([np.zeros(25), np.ones(25)])
    for name, value in gap_metrics(audio, reference_of(text), weights).items():
        assert np.isnan(value[0]) and np.isfinite(value[1]), name


def test_paired_difference_cancels_what_two_systems_share():
    audio, text = clouds(60, noise=1.0)
    reference, draws = reference_of(text), make_draws([(str(i // 3),) for i in range(60)], 400)
    nearer = unit(audio + 0.05 * text)
    raw, ours = (score_system(name, [(0, 0, x)], reference, draws, heavy_samples=0) for name, x in (("raw", audio), ("ours", nearer)))
    rows = {row["metric"]: row for row in paired_difference(ours, raw, experiment="gap:paired")}
    row, own = rows["pair_cosine"], [r for r in raw.rows() if r["metric"] == "pair_cosine"][-1]
    assert row["system"] == "ours-raw" and row["value"] == pytest.approx(ours.mean("pair_cosine") - raw.mean("pair_cosine"))
    assert 0 < row["ci_low"] < row["value"] < row["ci_high"]
    assert row["ci_high"] - row["ci_low"] < 0.5 * (own["ci_high"] - own["ci_low"]), "recordings are common to both"
    zero = {row["metric"]: row for row in paired_difference(raw, raw)}["rmg"]
    assert (zero["value"], zero["ci_low"], zero["ci_high"]) == (0, 0, 0)


def test_relative_gain_and_different_draws():
    draws = make_draws([(str(i),) for i in range(50)], 200)
    base, better = (score_clips(name, [(0, 0, {"cider_d": values})], draws) for name, values in (("raw", np.full(50, 0.4)), ("dl", np.full(50, 0.5))))
    row = paired_difference(better, base, relative=True)[0]
    assert row["metric"] == "cider_d_relative_gain"
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0.25, 0.25, 0.25))
    with pytest.raises(ValueError, match="same Draws"):
        paired_difference(better, score_clips("raw", [(0, 0, {"cider_d": np.full(50, 0.4)})], make_draws([(str(i),) for i in range(50)], 100)))


@pytest.mark.slow
def test_speed_of_a_full_table():
    """8 systems x 15 runs at n = 600, D = 256, 1000 replicates: the cheap metrics of one system in seconds."""
    audio, text = clouds(600, 256)
    runs = [(s, k, audio) for s in range(3) for k in range(5)]
    draws = make_draws([(str(i // 3), str(i % 50)) for i in range(600)], 1000)
    start = time.process_time()
    score_system("x", runs, reference_of(text), draws, heavy_samples=0)
    assert time.process_time() - start < 30
