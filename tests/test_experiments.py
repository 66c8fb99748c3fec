"""Tuning and scoring: equal budgets, one criterion, fits shared where only the call differs."""
from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import normalize

from dl import experiments
from dl.clap import Embeddings
from dl.config import BridgeConfig, get_profile
from dl.data import load_split
from dl.peers import REGISTRY
from dl.report import VERDICT_RULES


@pytest.fixture
def profile(tmp_path):
    return get_profile("smoke", results_root=tmp_path, bridge=BridgeConfig(train_steps=4, batch_size=8), noise_seeds=(0, 1))


def embeddings(split: str, n: int = 30, dim: int = 8) -> Embeddings:
    generator = torch.Generator().manual_seed(len(split))
    clean = torch.randn(n, dim, generator=generator)
    text = normalize(clean.repeat_interleave(2, 0) + 0.2 * torch.randn(2 * n, dim, generator=generator) + 0.5, dim=1)
    audio = normalize(clean + 0.3 * torch.randn(n, dim, generator=generator) - 0.5, dim=1)
    return Embeddings(split, [str(i) for i in range(n)], audio, text, torch.arange(n).repeat_interleave(2), [f"caption {i}" for i in range(2 * n)], [])


def test_every_tuned_system_has_eight_fits():
    assert {len(trials) for trials in experiments.FITS.values()} == {8}


def test_a_search_marks_its_lowest_rmg_and_is_read_back(profile, monkeypatch):
    monkeypatch.setitem(experiments.FITS, "ridge", experiments.grid(alpha=[1e-3, 1e3]))
    best = experiments.search(profile, "ridge", embeddings("train"), embeddings("val"), progress=False)
    rows = pd.read_csv(profile.results_dir / "search.csv")
    rmg = rows[rows.metric == "rmg"].set_index("trial").value
    assert set(rows.split) == {"val"} and rows[rows.chosen == 1].trial.unique().tolist() == [rmg.idxmin()]
    assert experiments.chosen(profile, "ridge") == best


def test_what_was_not_tuned_has_no_choice(profile):
    assert experiments.chosen(profile, "mean_shift") == {}


def test_choices_made_on_mini_hold_for_its_encoder_alone(profile):
    assert experiments.chosen(profile, "ridge") != {}
    assert experiments.chosen(replace(profile, encoder="laion/clap-htsat-unfused"), "ridge") == {}


def test_what_the_profile_sets_reaches_every_system_without_a_recipe_of_its_own(profile):
    set_here = replace(profile, name="paper", encoder="other", bridge=BridgeConfig(train_steps=2, batch_size=6, learning_rate=1e-3, topology_weight=0.3))
    fits = {system: experiments.fit_system(set_here, system, embeddings("train")).config for system in ("diffusion_link", "seed", "diffusion_bridge")}
    assert {system: (c.batch_size, c.learning_rate, c.topology_weight) for system, c in fits.items()} == {
        "diffusion_link": (6, 1e-3, 0.3), "seed": (6, 1e-3, 0.0), "diffusion_bridge": (64, 8e-5, 0.0)}


def test_one_step_and_ddim_share_a_fit(profile):
    train, shared = embeddings("train"), {"topology_weight": 0.5, "learning_rate": 1e-3}
    one = experiments.fit_system(profile, "diffusion_link", train, **shared)
    files = list((profile.cache_dir / "fits").glob("*.safetensors"))
    ddim = experiments.fit_system(profile, "diffusion_link_ddim", train, **shared)
    assert len(files) == 1 and list((profile.cache_dir / "fits").glob("*.safetensors")) == files
    for a, b in zip(one.network.parameters(), ddim.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_budget_is_the_profiles_whatever_the_recipe_says(profile):
    longer = replace(profile, bridge=replace(profile.bridge, train_steps=6))
    for system in ("diffusion_bridge", "seed", "diffusion_link"):
        assert experiments.fit_system(longer, system, embeddings("train")).config.train_steps == 6


def test_only_stochastic_systems_have_noise_seeds(profile):
    train, val = embeddings("train"), embeddings("val")
    ridge = experiments.fit_system(profile, "ridge", train)
    link = experiments.fit_system(profile, "diffusion_link", train, start_timestep=100)
    assert len(experiments.map_runs(ridge, val.audio, 0, (0, 1))) == 1
    (_, _, first), (_, _, second) = experiments.map_runs(link, val.audio, 0, (0, 1))
    assert not torch.equal(first, second)


def test_parts_of_the_split_are_scored_with_the_watched_metrics(profile):
    profile = replace(profile, max_clips={"test": 40}, bootstrap_samples=50)            # enough of the seen ones for an interval
    split = load_split(profile, "test")
    test = replace(embeddings("test", len(split.clip_ids)), clip_ids=split.clip_ids)
    scores, rows = experiments.score_table(profile, ["raw", "mean_shift", "c3", "text_floor"], embeddings("train"), test, split, progress=False)
    assert set(scores) == {("raw", "text"), ("mean_shift", "text"), ("c3", "text"), ("c3", "centred"), ("text_floor", "text")}
    frame = pd.DataFrame(rows)
    parts = frame[frame.split != "test"]
    assert set(parts.split) == {"test:seen", "test:unseen", "test:new_source"} and set(parts.space) == {"text"} and set(parts.seed) == {"all"}
    assert (parts.groupby(["split", "system"]).metric.agg(set) == set(experiments.WATCHED)).all() and len(parts) == 3 * 3 * len(experiments.WATCHED)
    seen = parts[(parts.split == "test:seen") & (parts.system == "raw")].set_index("metric")
    mask = torch.tensor((split.frame.seen == "1").to_numpy())
    expected = (test.audio[mask].double().mean(0) - test.first_text[mask].double().mean(0)).norm()
    assert seen.n_items.unique() == [int(mask.sum())] and seen.value["centroid_gap"] == pytest.approx(float(expected))
    assert seen.ci_low["rmg"] < seen.value["rmg"] < seen.ci_high["rmg"]
    whole = frame[(frame.split == "test") & (frame.system == "c3") & (frame.seed == "all")]
    assert set(scores["c3", "text"].points) | {"parameters", "ms_per_1000"} == set(whole.metric[whole.space == "text"])


def test_a_default_table_leaves_out_only_rows_that_no_rule_demands():
    default, full = experiments.table1_systems(), experiments.table1_systems(full=True)
    assert full == [*(name for name in REGISTRY if name != "capdec"), "text_floor"]
    assert default == [name for name in full if name not in experiments.ONLY_FULL] and len(full) - len(default) == len(experiments.ONLY_FULL) == 3
    assert not {part.baseline for rule in VERDICT_RULES for part in rule.parts if not part.optional} & set(experiments.ONLY_FULL)
    assert {"seed", "diffusion_bridge"} < set(default), "C1 keeps a peer of each kind"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU there is one process")
def test_fits_side_by_side_are_those_of_one_process(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    train, val = embeddings("train"), embeddings("val")
    alone = experiments.fit_systems(profile, ["ridge", "seed", "diffusion_link"], train, val)
    together = experiments.fit_systems(replace(profile, processes=2, results_root=tmp_path / "other"), ["ridge", "seed", "diffusion_link"], train, val)
    assert list(alone) == list(together) == [("ridge", 0), ("seed", 0), ("seed", 1), ("diffusion_link", 0), ("diffusion_link", 1)]
    for name, peer in alone.items():
        assert torch.allclose(peer(val.audio), together[name](val.audio), atol=1e-5)
    assert together["diffusion_link", 1].history.val_pair_cosine.notna().all()
    fits = {path.name for path in (tmp_path / "other/smoke/cache/fits").glob("*.safetensors")}
    assert fits == {path.name for path in (profile.cache_dir / "fits").glob("*.safetensors")} and len(fits) == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU there is one process")
def test_scores_side_by_side_are_those_of_one_process(profile, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    split = load_split(profile, "test")
    test, systems = replace(embeddings("test", len(split.clip_ids)), clip_ids=split.clip_ids), ["raw", "c3", "seed", "text_floor"]
    (alone, rows), (together, others) = (
        experiments.score_table(replace(profile, processes=count), systems, embeddings("train"), test, split, progress=False) for count in (1, 2))
    assert list(alone) == list(together) == [("raw", "text"), ("c3", "text"), ("c3", "centred"), ("seed", "text"), ("text_floor", "text")]
    measured, other = (pd.DataFrame(found).query("metric != 'ms_per_1000'").reset_index(drop=True) for found in (rows, others))
    pd.testing.assert_frame_equal(measured, other, rtol=1e-6, atol=1e-9)
