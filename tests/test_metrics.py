"""Gap metrics and their intervals: worked examples, plain-loop and scikit-learn references, and bootstraps."""
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dl import gap as metrics
from dl.bootstrap import make_draws, make_reference, paired_difference, score_clips, score_system, text_floor
from dl.clap import Embeddings
from dl.gap import Reference, gap_functions, gap_metrics, median_bandwidth, nearest_captions, retrieval, top_k

AXES = np.eye(3)   # three orthogonal unit vectors


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clouds(n: int = 60, d: int = 8, gap: float = 1.0, noise: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Paired unit vectors (audio, text), (n, d): shared content, an offset along the first axis, noise on both."""
    rng = np.random.default_rng(0)
    content, offset = rng.standard_normal((n, d)), np.eye(d)[0] * gap * 2
    return (unit(content + sign * offset + noise * rng.standard_normal((n, d))) for sign in (-1, 1))


def reference_of(text: np.ndarray, **more) -> Reference:
    """Five captions a clip, the first of them ``text``."""
    noise = 0.1 * np.random.default_rng(1).standard_normal((5 * len(text), text.shape[1]))
    gallery = unit(np.repeat(text, 5, axis=0) + noise)
    gallery[::5] = text
    return Reference(text, gallery, np.repeat(np.arange(len(text)), 5), median_bandwidth(text), **more)


def draws_of(n: int, samples: int, share: int = 1):
    """Replicates of n clips, ``share`` of which come from one recording."""
    return make_draws([(str(i // share),) for i in range(n)], samples)


# --------------------------------------------------------------------------------------------------- worked examples
def test_cosines_and_distances_by_hand():
    audio, text = AXES[[0, 1]], np.array([[0.6, 0.8, 0.0], [0.0, 1.0, 0.0]])
    assert metrics.pair_cosine(audio, text) == pytest.approx([0.8])              # (.6 + 1) / 2
    assert metrics.nonpair_cosine(audio, text) == pytest.approx([0.4])           # (0 + .8) / 2
    assert metrics.cosine_margin(audio, text) == pytest.approx([0.4])
    assert metrics.centroid_gap(audio, text) == pytest.approx([np.hypot(0.2, 0.4)])   # means (.5, .5) and (.3, .9)
    assert metrics.alignment(audio, text) == pytest.approx([0.4])                # ||a0 - t0||^2 = .16 + .64, halved
    assert metrics.rmg(AXES[[0, 1]], AXES[[2, 2]]) == pytest.approx([2 / 3])     # P = W_a = 1/2, W_t = 0
    assert metrics.uniformity(AXES[:2]) == pytest.approx([-4.0])                 # ||e0 - e1||^2 = 2, log exp(-2 * 2)
    assert median_bandwidth(np.array([[0.0], [1.0], [3.0]])) == pytest.approx(2.0)    # distances 1, 3, 2


def test_effective_rank_counts_equal_directions():
    cross = np.concatenate([AXES, -AXES])
    assert metrics.effective_rank(cross) == pytest.approx([3.0])
    assert metrics.effective_rank(cross, [[1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 0, 0]]) == pytest.approx([2.0, 1.0])


def test_gap_vector_by_hand():
    """Gaps (1, 0, 1) and (1, 0, -1): g = (1, 0, 0), tr S = 1."""
    text, audio = np.zeros((2, 3)), np.array([[1.0, 0, 1], [1.0, 0, -1]])
    assert metrics.gap_length(audio, text, group_size=1) == pytest.approx([np.sqrt(2)])
    assert metrics.gap_length(audio, text, group_size=100) == pytest.approx([np.sqrt(1.01)])
    assert metrics.direction_consistency(audio, text, group_size=1) == pytest.approx([0.5])
    assert metrics.orthogonality(audio, text) == pytest.approx([0.0]), "audio differs along z, the gap lies along x"
    assert metrics.orthogonality(np.array([[2.0, 0, 0], [0.0, 0, 0]]), text) == pytest.approx([1.0])
    raw, along = AXES[[0, 0, 0, 0]], AXES[[1, 1, 1, 1]]                           # direction e1 - e0
    moved = np.array([AXES[1], unit(AXES[:1] + AXES[1:2])[0], AXES[0], -AXES[1]])     # projections 2, > 0, 0, 0
    assert metrics.share_toward_text(moved, along, raw) == pytest.approx([0.5])


def test_gap_length_is_that_of_shuffled_groups():
    audio, text = clouds(400, 8)
    groups = (audio - text)[np.random.default_rng(0).integers(0, 400, (20_000, 100))].mean(1)
    assert metrics.gap_length(audio, text)[0] == pytest.approx(np.sqrt((groups**2).sum(1).mean()), rel=2e-3)


# -------------------------------------------------------------------------------------------------------- references
def test_frechet_equals_the_matrix_square_root_formula():
    audio, text = clouds(80, 6)
    c_a, c_t = ledoit_wolf(audio)[0], ledoit_wolf(text)[0]
    expected = ((audio.mean(0) - text.mean(0)) ** 2).sum() + np.trace(c_a + c_t - 2 * sqrtm(c_a @ c_t).real)
    assert metrics.frechet_distance(audio, text) == pytest.approx([expected], rel=1e-6)


def test_linear_cka_equals_the_feature_form_and_ignores_rotation():
    audio, text = clouds(40)
    a, t = audio - audio.mean(0), text - text.mean(0)
    expected = np.linalg.norm(a.T @ t) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(t.T @ t))
    assert metrics.linear_cka(audio, text) == pytest.approx([expected])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    assert metrics.linear_cka(audio, 3 * audio @ turn) == pytest.approx([1.0])


def test_knn_overlap_equals_the_plain_loop():
    audio, text = clouds(30)
    near = [[set(np.argsort(-np.delete(x @ x[i], i), kind="stable")[:10]) for i in range(30)] for x in (audio, text)]
    expected = np.mean([len(a & t) / 10 for a, t in zip(*near, strict=True)])
    assert metrics.knn_overlap(audio, text) == pytest.approx([expected])


def test_separability_is_scikit_learns_auc_on_held_out_clips():
    audio, text = clouds(100, gap=0.3)
    fold, expected, right = np.random.default_rng(0).permutation(100) % 2, [], []
    for half in (0, 1):
        fit, held = fold != half, fold == half
        given, inputs = (np.concatenate([audio[half], text[half]]) * 8**0.5 for half in (fit, held))
        truth = np.repeat([0, 1], 50)
        model = LogisticRegression(max_iter=300).fit(given, truth)
        expected.append(roc_auc_score(truth, model.decision_function(inputs)))
        right.append(model.score(inputs, truth))
    scores = {name: metric() for name, metric in metrics.separability_functions(audio, text).items()}
    assert scores["separability_auc"] == pytest.approx([np.mean(expected)])
    assert scores["separability_accuracy"] == pytest.approx([np.mean(right)])


@pytest.mark.parametrize("name", ["nonpair_cosine", "rmg", "mmd2", "uniformity", "gram_correlation"])
def test_weights_on_pairs_equal_the_plain_loop(name):
    """Means over pairs leave an item with itself out, also when it was drawn twice."""
    audio, text = clouds(12, 4)
    w = np.random.default_rng(3).integers(0, 4, 12).astype(float)
    pairs = list(itertools.permutations(range(12), 2))
    share = np.array([w[i] * w[j] for i, j in pairs]) / sum(w[i] * w[j] for i, j in pairs)

    def mean(f):
        return sum(p * f(i, j) for p, (i, j) in zip(share, pairs, strict=True))

    def k(x, y, scale=2.0):
        return np.exp(-((x - y) ** 2).sum() / scale)

    def rmg():
        paired = (w / w.sum()) @ ((1 - (audio * text).sum(1)) / 2)
        inside = mean(lambda i, j: (2 - audio[i] @ audio[j] - text[i] @ text[j]) / 2)
        return paired / (paired + inside / 2)

    def gram_correlation():
        x, y = (np.array([v[i] @ v[j] for i, j in pairs]) for v in (audio, text))
        covariance = np.cov(x, y, aweights=share, ddof=0)
        return covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])

    def kernels(i, j):
        return k(audio[i], audio[j]) + k(text[i], text[j]) - k(audio[i], text[j]) - k(audio[j], text[i])

    expected = {"nonpair_cosine": lambda: mean(lambda i, j: audio[i] @ text[j]), "rmg": rmg,
                "mmd2": lambda: mean(kernels),
                "uniformity": lambda: np.log(mean(lambda i, j: k(audio[i], audio[j], 0.5))),
                "gram_correlation": gram_correlation}[name]()
    given = (audio,) if name == "uniformity" else (audio, text, 1.0) if name == "mmd2" else (audio, text)
    assert getattr(metrics, name)(*given, weights=w) == pytest.approx([expected])


@pytest.mark.parametrize("name", ["pair_cosine", "centroid_gap", "alignment", "linear_cka", "gap_length",
                                  "direction_consistency", "orthogonality", "effective_rank"])
def test_integer_weights_equal_duplicated_rows(name):
    given = tuple(clouds(25))[: 1 if name == "effective_rank" else 2]
    metric, weights = getattr(metrics, name), np.random.default_rng(2).integers(0, 4, (3, 25))
    expected = [metric(*(np.repeat(x, row, axis=0) for x in given))[0] for row in weights]
    assert metric(*given, weights=weights) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- retrieval
def test_ranking_by_hand():
    """Relevant items on ranks 2, 3 and 12 of 12: AP@10 = (1/2 + 2/3) / 3."""
    relevant = np.isin(np.arange(12), [1, 2, 11])[None]
    scores = metrics.ranking_scores(top_k(-np.arange(12.0)[None], 10), relevant)
    assert [scores[f"recall_at_{k}"][0] for k in (1, 5, 10)] == [0, 1, 1]
    assert scores["map_at_10"] == pytest.approx([(1 / 2 + 2 / 3) / 3])
    ties = np.random.default_rng(0).integers(0, 4, (50, 30)).astype(float)
    assert np.array_equal(top_k(ties, 7), np.argsort(-ties, axis=1, kind="stable")[:, :7]), "ties go by column"
    assert top_k(np.zeros((2, 3)), 10).tolist() == [[0, 1, 2]] * 2


def test_nearest_captions_come_nearest_first_and_each_wording_once():
    gallery = unit(np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    near, up = nearest_captions(AXES[:2, :2], gallery, ["rain", "wind", "rain", "bird", "dog"], k=3)
    assert near == [("rain", 1.0), ("wind", pytest.approx(0.5**0.5)), ("bird", 0.0)]
    assert [caption for caption, _ in up] == ["bird", "wind", "rain"]
    assert len(nearest_captions(torch.eye(2)[:1], torch.from_numpy(gallery), list("abcde"), k=9)[0]) == 5


def test_retrieval_hits_any_own_caption_in_both_directions():
    """Two clips, two captions each; clip 0 ranks its second caption first; clip 1 ranks a caption of clip 0 first."""
    audio = np.array([[1.0, 0.0], [0.8, 0.6]])
    gallery = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    scores = retrieval(audio, gallery, [0, 0, 1, 1], weights=[[1, 1], [1, 0], [0, 1], [3, 1]])
    assert scores["recall_at_1"] == pytest.approx([0.5, 1, 0, 0.75])
    assert scores["recall_at_5"] == pytest.approx([1.0] * 4)
    # clip 0 finds its captions on ranks 1 and 4, clip 1 (cosines -.8, .8, .6, -.6) on ranks 2 and 3
    assert scores["map_at_10"][0] == pytest.approx(((1 + 2 / 4) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    # captions ask: 0 finds clip 1, 1 finds clip 0, 2 finds clip 1, 3 (cosines 0, -.6) finds clip 0
    assert scores["text_to_audio_recall_at_1"][0] == pytest.approx(0.5)
    assert scores["text_to_audio_map_at_10"][0] == pytest.approx(0.75)


def test_label_aware_retrieval_counts_captions_of_clips_with_the_same_labels():
    audio, gallery = np.eye(2), np.eye(2)[::-1]                       # each finds the other's caption
    scores = retrieval(audio, gallery, [0, 1], labels=[("dog", "rain"), ("rain", "dog")])
    assert scores["recall_at_1"] == 0 and scores["label_recall_at_1"] == scores["text_to_audio_label_recall_at_1"] == 1
    assert retrieval(audio, gallery, [0, 1], labels=[("dog",), ("rain",)])["label_recall_at_1"] == 0


def test_text_floor_does_not_meet_itself():
    audio, text = clouds(30)
    gallery = torch.from_numpy(reference_of(text).gallery).float()
    ids, clip = [str(i) for i in range(30)], torch.arange(30).repeat_interleave(5)
    embeddings = Embeddings("test", ids, torch.from_numpy(audio).float(), gallery, clip, [""] * 150, [])
    reference = make_reference(embeddings)
    assert np.array_equal(reference.text, embeddings.first_text.numpy())
    vectors, masked = text_floor(embeddings, reference)
    assert np.array_equal(vectors, embeddings.kth_text(1).numpy()) and masked.exclude.tolist() == [*range(1, 150, 5)]
    met, apart = (gap_metrics(vectors, which) for which in (reference, masked))
    assert met["recall_at_1"] == 1 and apart["map_at_10"] < met["map_at_10"]
    rows = np.delete(np.arange(150), masked.exclude)
    lone = retrieval(vectors, reference.gallery[rows], reference.gallery_clip[rows])
    assert apart["text_to_audio_map_at_10"] == pytest.approx(lone["text_to_audio_map_at_10"]), "it does not ask"
    centred = make_reference(embeddings, means=(embeddings.audio.mean(0), gallery.mean(0)))
    assert np.allclose(centred.gallery, unit(gallery.numpy() - gallery.mean(0).numpy()), atol=1e-6)
    with pytest.raises(ValueError, match=r"clip 0 has 1 captions, caption 2 is asked for"):
        text_floor(Embeddings("test", ["a"], gallery[:1], gallery[:1], clip[:1], [""], []), reference)


# ------------------------------------------------------------------------------------------------------ all together
def test_gap_metrics_has_the_promised_names():
    promised = [
        "pair_cosine", "nonpair_cosine", "cosine_margin", "centroid_gap", "rmg", "separability_accuracy",
        "separability_auc", "frechet_distance", "mmd2", "alignment", "uniformity", "recall_at_1", "recall_at_5",
        "recall_at_10", "map_at_10", "gram_correlation", "linear_cka", "knn_overlap", "effective_rank", "gap_length",
        "direction_consistency", "orthogonality", "text_to_audio_recall_at_10", "text_to_audio_map_at_10",
        "label_recall_at_10", "text_to_audio_label_recall_at_10",
    ]
    audio, text = clouds(25)
    reference = reference_of(text, raw_audio=audio, labels=tuple(frozenset({i}) for i in range(25)))
    weights = np.stack([np.zeros(25), np.ones(25)])                   # a weighting without clips has no value
    values = gap_metrics(torch.from_numpy(audio).float(), reference, weights)
    assert set(promised) | set(metrics.DIRECTION) <= set(values)
    for name, value in values.items():
        assert np.isnan(value[0]) and np.isfinite(value[1]), name


def test_identical_sets_have_no_gap():
    _, text = clouds(50)
    values = gap_metrics(text, reference_of(text))
    for name in ("centroid_gap", "rmg", "frechet_distance", "mmd2", "alignment", "gap_length"):
        assert values[name] == pytest.approx([0], abs=1e-8), name
    for name in ("pair_cosine", "recall_at_1", "gram_correlation", "linear_cka", "knn_overlap"):
        assert values[name] == pytest.approx([1]), name


def test_a_part_of_the_metrics_has_the_values_of_the_whole():
    audio, text = clouds(50)
    reference, only = reference_of(text), ("rmg", "recall_at_10", "effective_rank", "separability_auc", "mmd2")
    part, whole = (gap_metrics(audio, reference, only=names) for names in (only, None))
    assert part == {metric: whole[metric] for metric in only}
    with pytest.raises(ValueError, match="no gap metric is called share_toward_text: choose among pair_cosine"):
        gap_functions(audio, reference, ("rmg", "share_toward_text"))


def test_below_twenty_items_neighbour_and_rank_metrics_are_not_computed():
    audio, text = clouds(19)
    scores = score_system("raw", [(0, 0, audio)], reference_of(text), draws_of(19, 50))
    by_metric = {row["metric"]: row for row in scores.rows() if row["seed"] == "all"}
    for name in ("recall_at_10", "text_to_audio_map_at_10", "knn_overlap", "effective_rank", "separability_auc"):
        assert np.isnan(by_metric[name]["value"]) and "at least 20 items, here are 19" in by_metric[name]["reason"]
    assert by_metric["rmg"]["value"] > 0 and by_metric["rmg"]["reason"] == ""


# --------------------------------------------------------------------------------------------------------- bootstrap
def test_a_scene_weighs_the_product_of_its_recordings():
    draws = make_draws([("a",), ("b",), ("a", "b"), ("b", "b"), ("c",)], 200)
    a, b, both, twice, c = draws.cluster.T
    assert np.array_equal(both, a * b) and np.array_equal(twice, b) and np.array_equal(a + b + c, np.full(200, 3.0))
    assert np.array_equal(draws.clip.sum(1), np.full(200, 5.0))


def test_cluster_interval_is_wider_where_clips_repeat_one_another():
    """40 recordings, each heard in 10 clips with one score: the clip bootstrap believes in 400 independent clips."""
    score = np.repeat(np.random.default_rng(0).standard_normal(40), 10)
    row = score_clips("x", [(0, 0, {"cider_d": score})], draws_of(400, 1000, share=10)).rows()[-1]
    expected = 2 * 1.96 * score.std() / np.sqrt(40)
    assert row["ci_high"] - row["ci_low"] == pytest.approx(expected, rel=0.15)
    assert row["clip_ci_high"] - row["clip_ci_low"] == pytest.approx(expected / np.sqrt(10), rel=0.15)


def test_point_values_runs_and_spread():
    audio, text = clouds(40)
    runs = [(s, k, unit(audio + 0.05 * np.random.default_rng(10 * s + k).standard_normal(audio.shape)))
            for s in (0, 1) for k in (0, 1, 2)]
    reference = reference_of(text)
    scores = score_system("seed", runs, reference, draws_of(40, 120, share=2), heavy_samples=60)
    rows = [row for row in scores.rows(experiment="gap", split="test") if row["metric"] == "rmg"]
    singles = [gap_metrics(vectors, reference, only=["rmg"])["rmg"][0] for _, _, vectors in runs]
    assert [row["value"] for row in rows[:-1]] == pytest.approx(singles)
    assert [(row["seed"], row["noise_seed"]) for row in rows] == [*((s, k) for s, k, _ in runs), ("all", "all")]
    assert (rows[-1]["value"], rows[-1]["sd"]) == pytest.approx((np.mean(singles), np.std(singles, ddof=1)))
    assert np.isfinite(scores.replicates["effective_rank"]).sum() == 60 and np.isfinite(scores.replicates["rmg"]).all()


def test_replicates_are_the_metric_of_the_drawn_run_and_weights_shifted_by_one_number():
    audio, text = clouds(40)
    both, draws = (audio, unit(audio + text)), draws_of(40, 50, share=2)
    scores = score_system("x", [(0, 0, both[0]), (7, 0, both[1])], reference_of(text), draws, heavy_samples=0)
    pairs = zip(draws.seed, draws.cluster, strict=True)
    expected = np.array([metrics.centroid_gap(both[int(u * 2)], text, w)[0] for u, w in pairs])
    found, drawn = scores.replicates["centroid_gap"], scores.points["centroid_gap"][(draws.seed * 2).astype(int)]
    shift = expected - found
    assert found.mean() == pytest.approx(drawn.mean()), "the shift is the mean excess over the runs drawn"
    assert shift == pytest.approx(np.full(50, shift[0])) and shift[0] > 0, "resampled centroids lie further apart"


def test_mask_scores_a_subset_against_the_whole_gallery():
    audio, text = clouds(50)
    reference, mask = reference_of(text), np.arange(50) < 30
    scores = score_system("raw", [(0, 0, audio)], reference, draws_of(50, 60), mask=mask, heavy_samples=0)
    ranked = retrieval(audio, reference.gallery, reference.gallery_clip, mask[None].astype(float))
    assert scores.n_items == 30 and scores.points["rmg"] == pytest.approx(metrics.rmg(audio[:30], text[:30]))
    assert scores.points["recall_at_1"] == pytest.approx(ranked["recall_at_1"])


def test_paired_difference_cancels_what_two_systems_share():
    audio, text = clouds(60, noise=1.0)
    reference, draws = reference_of(text), draws_of(60, 400, share=3)
    raw, ours = (score_system(name, [(0, 0, x)], reference, draws, heavy_samples=0)
                 for name, x in (("raw", audio), ("ours", unit(audio + 0.05 * text))))
    rows = {row["metric"]: row for row in paired_difference(ours, raw, experiment="gap:paired")}
    row, own = rows["pair_cosine"], [r for r in raw.rows() if r["metric"] == "pair_cosine"][-1]
    gain = ours.mean("pair_cosine") - raw.mean("pair_cosine")
    assert row["system"] == "ours-raw" and row["value"] == pytest.approx(gain)
    assert 0 < row["ci_low"] < row["value"] < row["ci_high"]
    assert row["ci_high"] - row["ci_low"] < 0.5 * (own["ci_high"] - own["ci_low"]), "recordings are common to both"


def test_relative_gain_and_different_draws():
    draws = draws_of(50, 200)
    base, better = (score_clips(name, [(0, 0, {"cider_d": np.full(50, value)})], draws)
                    for name, value in (("raw", 0.4), ("dl", 0.5)))
    row = paired_difference(better, base, relative=True)[0]
    assert row["metric"] == "cider_d_relative_gain"
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((0.25, 0.25, 0.25))
    with pytest.raises(ValueError, match="raw were scored on different draws: score both with the same Draws"):
        paired_difference(better, score_clips("raw", [(0, 0, {"cider_d": np.full(50, 0.4)})], draws_of(50, 100)))
