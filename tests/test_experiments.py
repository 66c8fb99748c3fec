"""Tuning and scoring: equal budgets, one criterion, shared fits; rows of other systems are left alone."""
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
from dl.experiments import FITS, ONLY_FULL, WATCHED, chosen, fit_system, map_runs, score_table, table1_systems
from dl.peers import REGISTRY
from dl.report import VERDICT_RULES
from dl.store import MetricsFile


@pytest.fixture
def profile(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    bridge = BridgeConfig(train_steps=4, batch_size=8)
    return get_profile("smoke", results_root=tmp_path, bridge=bridge, noise_seeds=(0, 1))


def embeddings(split: str, n: int = 30, dim: int = 8) -> Embeddings:
    generator = torch.Generator().manual_seed(len(split))
    clean = torch.randn(n, dim, generator=generator)
    text = normalize(clean.repeat_interleave(2, 0) + 0.2 * torch.randn(2 * n, dim, generator=generator) + 0.5, dim=1)
    audio = normalize(clean + 0.3 * torch.randn(n, dim, generator=generator) - 0.5, dim=1)
    return Embeddings(split, [str(i) for i in range(n)], audio, text, torch.arange(n).repeat_interleave(2),
                      [f"caption {i}" for i in range(2 * n)], [])


def test_every_tuned_system_has_eight_fits_and_a_search_marks_its_lowest_rmg(profile, monkeypatch):
    assert {len(trials) for trials in FITS.values()} == {8}
    monkeypatch.setitem(FITS, "ridge", experiments.grid(alpha=[1e-3, 1e3]))
    best = experiments.search(profile, "ridge", embeddings("train"), embeddings("val"))
    rows = pd.read_csv(profile.results_dir / "search.csv")
    rmg = rows[rows.metric == "rmg"].set_index("trial").value
    assert len(rmg) == 2 and set(rows.metric) == set(WATCHED) and set(rows.split) == {"val"}
    assert rows[rows.chosen == 1].trial.unique().tolist() == [rmg.idxmin()]
    assert chosen(profile, "ridge") == best


def test_ddim_searches_over_calls_of_the_bridges_own_fit(profile, monkeypatch):
    calls = experiments.grid(start_timestep=[100, 900], num_inference_steps=[5])
    monkeypatch.setitem(experiments.INFERENCE, "diffusion_link_ddim", calls)
    best = experiments.search(profile, "diffusion_link_ddim", embeddings("train"), embeddings("val"))
    bridge = {k: v for k, v in chosen(profile, "diffusion_link").items() if k in ("topology_weight", "learning_rate")}
    assert bridge and best in [bridge | call for call in calls]
    assert len(list((profile.cache_dir / "fits").glob("*.safetensors"))) == 1


def test_choices_made_on_mini_hold_for_its_encoder_alone(profile):
    assert chosen(profile, "ridge") != {} == chosen(profile, "mean_shift")
    assert chosen(replace(profile, encoder="laion/clap-htsat-unfused"), "ridge") == {}


def test_what_the_profile_sets_reaches_every_system_without_a_recipe_of_its_own(profile):
    bridge = BridgeConfig(train_steps=2, batch_size=6, learning_rate=1e-3, topology_weight=0.3)
    set_here = replace(profile, name="paper", encoder="other", bridge=bridge)
    systems = {"diffusion_link": (2, 6, 1e-3, 0.3), "seed": (2, 6, 1e-3, 0.0), "diffusion_bridge": (2, 64, 8e-5, 0.0)}
    for system, expected in systems.items():
        config = fit_system(set_here, system, embeddings("train")).config
        found = (config.train_steps, config.batch_size, config.learning_rate, config.topology_weight)
        assert found == expected, system


def test_only_stochastic_systems_have_noise_seeds(profile):
    train, val = embeddings("train"), embeddings("val")
    assert len(map_runs(fit_system(profile, "ridge", train), val.audio, 0, (0, 1))) == 1
    link = fit_system(profile, "diffusion_link", train, start_timestep=100)
    (_, _, first), (_, _, second) = map_runs(link, val.audio, 0, (0, 1))
    assert not torch.equal(first, second)


def test_parts_of_the_split_are_scored_with_the_watched_metrics(profile):
    profile = replace(profile, max_clips={"test": 40}, bootstrap_samples=50)            # enough of the seen ones
    split, systems = load_split(profile, "test"), ["raw", "mean_shift", "c3", "text_floor"]
    test = replace(embeddings("test", len(split.clip_ids)), clip_ids=split.clip_ids)
    scores, rows = score_table(profile, systems, embeddings("train"), test, split)
    assert list(scores) == [("raw", "text"), ("mean_shift", "text"), ("c3", "text"), ("c3", "centred"),
                            ("text_floor", "text")]
    frame = pd.DataFrame(rows)
    parts = frame[frame.split != "test"]
    assert set(parts.split) == {"test:seen", "test:unseen", "test:new_source"}
    assert set(parts.space) == {"text"} and set(parts.seed) == {"all"}
    assert (parts.groupby(["split", "system"]).metric.agg(set) == set(WATCHED)).all()
    seen = parts[(parts.split == "test:seen") & (parts.system == "raw")].set_index("metric")
    mask = torch.tensor((split.frame.seen == "1").to_numpy())
    expected = (test.audio[mask].double().mean(0) - test.first_text[mask].double().mean(0)).norm()
    assert seen.n_items.unique() == [int(mask.sum())]
    assert seen.value["centroid_gap"] == pytest.approx(float(expected))
    assert seen.ci_low["rmg"] < seen.value["rmg"] < seen.ci_high["rmg"]
    whole = frame[(frame.split == "test") & (frame.system == "c3") & (frame.seed == "all") & (frame.space == "text")]
    assert set(scores["c3", "text"].points) | {"parameters", "ms_per_1000"} == set(whole.metric)
    assert (whole.set_index("metric").value[["parameters", "ms_per_1000"]] > 0).all()


def test_a_default_table_leaves_out_only_rows_that_no_rule_demands():
    default, full = table1_systems(), table1_systems(full=True)
    assert full == [*(name for name in REGISTRY if name != "capdec"), "text_floor"]
    assert default == [name for name in full if name not in ONLY_FULL]
    assert not {part.baseline for rule in VERDICT_RULES for part in rule.parts if not part.optional} & set(ONLY_FULL)
    assert {"seed", "diffusion_bridge"} < set(default), "C1 keeps a peer of each kind"


def test_recorded_rows_replace_those_of_their_own_systems_and_no_others(profile):
    def rows(system: str, value: float, *, seeds: int = 1, **more: str) -> list[dict]:
        row = {"experiment": "gap", "split": "test", "metric": "rmg", "value": value, "noise_seed": 0} | more
        return [{**row, "system": system, "seed": seed} for seed in range(seeds)]

    full = [*rows("raw", 1, seeds=3), *rows("c3", 1), *rows("c3", 1, space="centred"), *rows("seed", 1, seeds=3),
            *rows("raw", 1, split="val"), *rows("raw", 1, split="test:seen"), *rows("raw", 1, experiment="zero_shot"),
            *rows("raw", 1, decoding="beam 4"), *rows("seed-raw", 1, experiment="gap:paired")]
    experiments.record_rows(profile, full)
    experiments.record_rows(profile, rows("raw", 2) + rows("c3", 2))
    frame = MetricsFile(profile).frame()
    new, old = frame[frame.value == 2], frame[frame.value == 1]
    assert new.system.tolist() == ["raw", "c3"] and set(new.space) == {"text"}
    assert len(old) == len(full) - 3 - 1 and set(old.system[old.space == "centred"]) == {"c3"}
    assert set(old.system[old.experiment == "gap"]) == {"raw", "c3", "seed"} and "val" in set(old.split)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU there is one process")
def test_scores_side_by_side_are_those_of_one_process(profile):
    split, systems = load_split(profile, "test"), ["raw", "c3", "seed", "text_floor"]
    test = replace(embeddings("test", len(split.clip_ids)), clip_ids=split.clip_ids)
    (alone, rows), (together, others) = (
        score_table(replace(profile, processes=count), systems, embeddings("train"), test, split) for count in (1, 2))
    assert list(alone) == list(together)
    assert len(list((profile.cache_dir / "fits").glob("*.safetensors"))) == len(profile.seeds)
    measured, other = (pd.DataFrame(found).query("metric != 'ms_per_1000'").reset_index(drop=True)
                       for found in (rows, others))
    pd.testing.assert_frame_equal(measured, other, rtol=1e-6, atol=1e-9)
