"""Ablations: each variant differs from the base in what it names, scores are those of Table 1, finished work is not repeated."""
from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_experiments import embeddings

from dl.train import train_bridge
from dl.config import BridgeConfig, get_profile
from dl.data import Split
from dl.bootstrap import make_draws, make_reference, score_clips
from dl.gap import gap_metrics
from dl.store import MetricsFile
from dl.studies import ablations
from dl.studies.ablation_table import METRICS, lesson
from dl.studies.ablations import (
    ABLATIONS,
    Variant,
    base_config,
    few_pairs,
    five_metrics,
    is_base,
    resolve,
    run_ablations,
    scaled_bridge,
    write_ablations,
)


@pytest.fixture
def profile(tmp_path):
    return get_profile("smoke", results_root=tmp_path, bridge=BridgeConfig(train_steps=4, batch_size=8), noise_seeds=(0, 1), seeds=(0, 1))


def split_of(test) -> Split:
    n = len(test.clip_ids)
    return Split("test", test.clip_ids, [[]] * n, pd.DataFrame({"youtube_id": [f"r{i // 2}" for i in range(n)]}), lambda i: None)


def run(profile, names=("scale", "centring", "pairs"), **options) -> pd.DataFrame:
    test = embeddings("test")
    return run_ablations(profile, embeddings("train"), test, split_of(test), names, progress=False, **options)


# ----------------------------------------------------------------------------------------------------------------- the registry
def test_labels_are_unique_and_every_ablation_asks_something():
    for ablation in ABLATIONS.values():
        labels = [variant.label for variant in ablation.variants]
        assert len(labels) == len(set(labels)) >= 2 and "-" not in "".join(labels)
        assert "?" in ablation.question and {label for pair in ablation.compare for label in pair} <= set(labels)


def test_a_variant_changes_only_what_it_names(profile):
    base = base_config(profile)
    for ablation in ABLATIONS.values():
        for variant in ablation.variants:
            changed = {name for name, value in asdict(resolve(base, variant)).items() if value != asdict(base)[name]}
            allowed = set(variant.changes) | ({"start_timestep"} if variant.signal or "num_train_timesteps" in variant.changes else set())
            assert changed <= allowed, variant.label


def test_the_base_is_recognised_under_its_other_names(profile):
    base = replace(base_config(profile), topology_weight=0.1, start_timestep=0)
    names = {variant.label for ablation in ABLATIONS.values() for variant in ablation.variants if is_base(base, variant)}
    assert {"lambda_0.1", "blocks_3", "W_2D", "s_sqrt_D", "as_they_are", "ema_on", "k000_n01", "noise_k000", "diffusion_link_100pct"} <= names
    assert not names & {"lambda_1", "gram", "none_k000", "s_1", "centred", "ridge_100pct", "diffusion_link_10pct", "scaled_linear_half"}
    assert not is_base(replace(base, num_blocks=2), Variant("", {"num_blocks": 3}))


def test_another_number_of_levels_keeps_the_share_of_k_and_a_wanted_signal_is_met(profile):
    base = replace(base_config(profile), start_timestep=300, num_inference_steps=50)
    tenth = resolve(base, Variant("", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}))
    assert (tenth.start_timestep, tenth.num_inference_steps) == (30, 30)
    from dl.scheduler import DDIMScheduler

    for variant in ABLATIONS["schedule"].variants:
        config = resolve(base, variant)
        abar = DDIMScheduler(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule).alphas_cumprod
        assert variant.signal is None or float(abar[config.start_timestep]) == pytest.approx(0.5, abs=0.02)


def test_every_fit_takes_the_same_steps_and_mini_fewer_than_table_1(profile, tmp_path):
    assert base_config(profile).train_steps == 4
    mini = get_profile("mini", results_root=tmp_path)
    assert base_config(mini).train_steps == ablations.STEPS["mini"] < mini.bridge.train_steps
    assert all("train_steps" not in variant.changes for ablation in ABLATIONS.values() for variant in ablation.variants)


def test_the_names_that_change_are_fields_of_the_configuration():
    known = {f.name for f in fields(BridgeConfig)}
    assert {name for ablation in ABLATIONS.values() for variant in ablation.variants for name in variant.changes} <= known


# --------------------------------------------------------------------------------------------------------------------- pairs
def test_few_pairs_are_nested_whole_clips():
    train = embeddings("train")
    small, large = few_pairs(train, 0.1, 3), few_pairs(train, 0.5, 3)
    assert (len(small.clip_ids), len(large.clip_ids)) == (3, 15) and set(small.clip_ids) < set(large.clip_ids)
    for part in (small, large):
        place = [train.clip_ids.index(clip_id) for clip_id in part.clip_ids]
        assert torch.equal(part.audio, train.audio[place]) and torch.bincount(part.text_clip).tolist() == [2] * len(place)
        for row, clip in enumerate(part.text_clip.tolist()):
            original = train.captions.index(part.captions[row])
            assert int(train.text_clip[original]) == place[clip] and torch.equal(part.text[row], train.text[original])


def test_few_pairs_draw_by_seed_and_refuse_what_is_no_share():
    train = embeddings("train")
    assert few_pairs(train, 1, 0) is train and few_pairs(train, 0.3, 0).clip_ids != few_pairs(train, 0.3, 1).clip_ids
    assert few_pairs(train, 0.3, 0).clip_ids == few_pairs(train, 0.3, 0).clip_ids and len(few_pairs(train, 1e-6, 0).clip_ids) == 2
    for fraction in (0, -0.1, 1.01):
        with pytest.raises(ValueError, match="choose a share"):
            few_pairs(train, fraction, 0)


# ---------------------------------------------------------------------------------------------------------------------- fits
def test_a_scaled_bridge_at_sqrt_d_is_the_bridge(profile):
    train, config = embeddings("train"), base_config(profile)
    ours = scaled_bridge(config, train, train.audio.shape[1] ** 0.5, seed=1)
    library, _ = train_bridge(config, train.audio, train.text, train.text_clip, seed=1, progress=False)
    for a, b in zip(ours.network.parameters(), library.network.parameters(), strict=True):
        assert torch.equal(a, b)
    other = scaled_bridge(config, train, 1.0, seed=1)
    assert float(other.scale) == 1.0 and not torch.equal(other.network.output.weight, ours.network.output.weight)


def test_centring_leaves_the_text_mean_where_it_was(profile):
    train, test = embeddings("train"), embeddings("test")
    mapped = ablations.variant_runs(profile, Variant("centred", centred=True), train, test.audio, 0)[0][2]
    assert torch.allclose(mapped.norm(dim=1), torch.ones(len(mapped)), atol=1e-5)
    assert float((mapped.mean(0) - train.text.mean(0)).norm()) < float((test.audio.mean(0) - train.text.mean(0)).norm())


def test_fits_on_fewer_pairs_leave_the_base_fit_alone(profile, capsys):
    train, test = embeddings("train"), embeddings("test")
    first = ablations.variant_runs(profile, Variant("base"), train, test.audio, 0)
    for variant in (Variant("few", fraction=0.3), Variant("centred", centred=True), Variant("mlp", system="regression_mlp", fraction=0.3)):
        ablations.variant_runs(profile, variant, train, test.audio, 0)
    again = ablations.variant_runs(profile, Variant("base"), train, test.audio, 0)
    assert torch.equal(first[0][2], again[0][2]) and "another run" not in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------------- scores
def test_the_five_figures_are_those_of_table_1():
    test, reference = embeddings("test"), make_reference(embeddings("test"))
    draws = make_draws([(f"r{i // 2}",) for i in range(len(test.clip_ids))], 40)
    scores = score_clips("raw", [(0, 0, five_metrics(test.audio, reference))], draws)
    weights = np.concatenate([np.ones((1, len(test.clip_ids))), draws.cluster])
    wanted = gap_metrics(test.audio, reference, weights)
    for metric in METRICS:
        assert scores.points[metric][0] == pytest.approx(wanted[metric][0], abs=1e-6)
        spread = wanted[metric][1:] - np.mean(wanted[metric][1:] - wanted[metric][0])
        assert scores.replicates[metric] == pytest.approx(spread, abs=1e-5)


def test_a_run_records_each_variant_its_difference_and_the_base_once(profile):
    table = run(profile)
    frame = MetricsFile(profile).frame()
    assert set(frame.split) == {"test"} and set(frame.seed) == {"all"} and set(frame.metric) == set(METRICS)
    assert (frame[frame.experiment == "ablation:base"].system == "base").all() and "s_sqrt_D" not in set(frame.system)
    difference = frame[(frame.experiment == "ablation:scale:paired") & (frame.system == "s_1-base")].set_index("metric").value
    own = frame[(frame.experiment == "ablation:scale") & (frame.system == "s_1")].set_index("metric").value
    base = frame[frame.experiment == "ablation:base"].set_index("metric").value
    assert difference.to_dict() == pytest.approx((own - base).to_dict(), abs=1e-8)
    compared = set(frame[frame.experiment == "ablation:pairs:paired"].system)
    assert {"diffusion_link_10pct-ridge_10pct", "diffusion_link_1pct-regression_mlp_1pct", "ridge_100pct-base"} <= compared
    seeds = table.set_index(["variant", "metric"]).n_seeds
    assert seeds["ridge_100pct", "rmg"] == 1 and seeds["ridge_10pct", "rmg"] == 2 and seeds["s_1", "rmg"] == 2
    assert frame[frame.system == "s_1"].run_id.nunique() == 1 != frame[frame.experiment == "ablation:scale"].run_id.nunique()


def test_each_seed_can_be_recorded_and_the_summary_is_their_mean(profile):
    run(profile, ["ema"], each_seed=True)
    frame = MetricsFile(profile).frame()
    rows = frame[(frame.experiment == "ablation:ema") & (frame.system == "ema_off") & (frame.metric == "rmg")].set_index("seed").value
    assert set(rows.index) == {"0", "1", "all"} and rows["all"] == pytest.approx(rows[["0", "1"]].mean(), abs=1e-8)


def test_finished_variants_are_not_fitted_again(profile, monkeypatch):
    first = run(profile)
    monkeypatch.setattr(ablations, "variant_runs", lambda *_: pytest.fail("fitted again"))
    pd.testing.assert_frame_equal(run(profile), first)
    with pytest.raises(BaseException, match="fitted again"):
        run(replace(profile, noise_seeds=(0, 1, 2)))


def test_a_fit_that_several_variants_call_is_made_once(profile, monkeypatch):
    made = []
    monkeypatch.setattr(ablations, "side_by_side", lambda function, parts, processes: made.extend(parts))
    ablations.fit_variants(profile, [Variant("base"), *ABLATIONS["start_step"].variants, *ABLATIONS["blocks"].variants, Variant("ridge", system="ridge")],
                           embeddings("train"), (0, 1))
    assert [(variant.label, seed) for _, variant, _, seed in made] == [
        (label, seed) for label in ("base", "blocks_1", "blocks_2", "blocks_4", "blocks_5") for seed in (0, 1)]


def test_running_one_ablation_leaves_the_rows_of_the_others_and_of_other_experiments(profile):
    MetricsFile(profile).add([{"experiment": "gap", "system": "raw", "split": "test", "seed": 0, "noise_seed": 0, "metric": "rmg", "value": 0.5}])
    run(profile, ["scale"])
    run(profile, ["ema"])
    assert {"gap", "ablation:scale", "ablation:ema", "ablation:base"} <= set(MetricsFile(profile).frame().experiment)


def test_profile_smoke_runs_a_few_and_unknown_names_are_refused(profile):
    assert {name: len(variants) for name, variants in ablations.selection(profile).items()} == ablations.SMOKE
    assert list(ablations.selection(replace(profile, name="mini"))) == list(ABLATIONS)
    with pytest.raises(ValueError, match="unknown ablation"):
        ablations.selection(profile, ["nothing"])


# --------------------------------------------------------------------------------------------------------------------- table
def test_the_table_holds_the_base_in_every_ablation_and_is_written(profile):
    table = run(profile)
    for _, rows in table.groupby("name"):
        assert rows[rows.is_base == 1].metric.tolist() == list(METRICS)
    pd.testing.assert_frame_equal(pd.read_csv(profile.results_dir / "ablations.csv"), table, check_dtype=False)
    text = (profile.results_dir / "ablations.md").read_text()
    assert all(f"## {name}" in text for name in ("scale", "centring", "pairs")) and "## ema" not in text and "`s_sqrt_D` (base)" in text
    write_ablations(profile)
    assert (profile.results_dir / "ablations.md").read_text() == text


def difference(variant: str, metric: str, value: float, low: float, high: float) -> dict:
    return {"variant": variant, "metric": metric, "mean": 1.0, "difference": value, "difference_ci_low": low, "difference_ci_high": high}


def test_a_lesson_is_made_from_the_intervals():
    within = [difference(name, metric, 0.01, -0.01, 0.03) for name in ("a", "b") for metric in METRICS]
    assert lesson(within) == "None of 2 variants differs from the base beyond its interval in any of the 5 figures."
    outside = [difference("b", "rmg", 0.02, 0.01, 0.03) if row["variant"] == "b" and row["metric"] == "rmg" else row for row in within]
    said = lesson(outside)
    assert "rmg: 1 of 2, most `b` (+0.020 [+0.010, +0.030], worse)" in said
    assert "Within it everywhere: pair_cosine, centroid_gap, recall_at_10, effective_rank." in said
    better = [difference("b", "rmg", -0.02, -0.03, -0.01)] + [row for row in within if row["metric"] != "rmg"]
    assert "better" in lesson(better)
    frame = pd.concat([pd.DataFrame(outside), fake("x", ["base"], "base")])       # rows of a table: the base has an empty cell for its difference
    assert lesson(frame.to_dict("records")) == said
    assert lesson(within[: len(METRICS)]).startswith("The variant does not differ")


def test_a_variant_without_an_interval_is_not_beyond_it():
    from dl.studies.ablation_table import beyond

    assert not beyond({"difference": 1.0, "difference_ci_low": math.nan, "difference_ci_high": math.nan}) and not beyond({})


def test_without_rows_of_its_own_a_profile_reads_the_committed_ones(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(ablations, "REPO", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--only 09 --full"):
        write_ablations(profile)


# ------------------------------------------------------------------------------------------------------------------- figures
@pytest.fixture
def figures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dl.plots import ablations as module

    yield module
    plt.close("all")


def fake(name: str, labels: list[str], base: str) -> pd.DataFrame:
    rows = []
    for place, label in enumerate(labels):
        for metric in METRICS:
            row = {"name": name, "variant": label, "is_base": int(label == base), "metric": metric, "mean": 0.4 + place / 50, "sd": 0.01,
                   "ci_low": 0.35 + place / 50, "ci_high": 0.45 + place / 50, "n_seeds": 3, "train_steps": 600}
            if label != base:
                row |= {"difference": place / 50, "difference_ci_low": place / 50 - 0.03, "difference_ci_high": place / 50 + 0.03}
            rows.append(row)
    return pd.DataFrame(rows)


def test_a_filled_dot_is_a_difference_beyond_its_interval(figures):
    table = fake("blocks", ["blocks_1", "blocks_2", "blocks_3"], "blocks_1")
    figure, data = figures.ablation_figure("blocks", table)
    assert len(figure.axes) == len(METRICS) and len(data) == len(table)
    dots = {y: line.get_markerfacecolor() for line in figure.axes[0].lines if line.get_marker() in ("o", "D") for y in line.get_ydata()}
    assert dots == {-1: "#009E73", -2: "white", -3: "black"}    # the base, +0.02 within +-0.03, +0.04 beyond it


def test_all_ablations_stand_below_each_other_without_the_differences_between_variants(figures):
    table = pd.concat([fake("blocks", ["blocks_1", "blocks_2"], "blocks_1"), fake("pairs", ["a", "b"], "a")])
    between = {"name": "pairs", "variant": "a-b", "metric": "rmg", "difference": 1.0, "difference_ci_low": 0.5, "difference_ci_high": 1.5}
    figure, data = figures.all_ablations_figure(pd.concat([table, pd.DataFrame([between])]), ["blocks", "pairs"])
    assert len(figure.axes) == len(METRICS) and "a-b" not in set(data.variant)


def test_start_steps_and_pairs_read_the_axis_from_the_labels(figures):
    _, data = figures.start_step_figure(fake("start_step", ["k000_n01", "k300_n01", "k300_n10"], "k000_n01"))
    assert set(data.start_timestep) == {0, 300} and set(data.num_inference_steps) == {1, 10}
    _, data = figures.pairs_figure(fake("pairs", [v.label for v in ABLATIONS["pairs"].variants], "diffusion_link_100pct"))
    assert set(data.percent) == {1, 3, 10, 30, 100} and set(data.system) == {"diffusion_link", "ridge", "regression_mlp"}


def test_the_labels_of_the_registry_are_those_the_figures_expect():
    from dl.studies.variants import SMOKE

    assert all(v.label.startswith("k") and "_n" in v.label for v in ABLATIONS["start_step"].variants)
    assert all(v.label.endswith("pct") for v in ABLATIONS["pairs"].variants) and set(SMOKE) <= set(ABLATIONS)
