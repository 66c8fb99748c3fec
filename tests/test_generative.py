"""Notebook A3's experiments: samples, consensus, weighted ranks, the frontier of a control, pre-training on texts, and the verdict rules."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn.functional import normalize

from dl.clap import Embeddings
from dl.config import BridgeConfig, get_profile
from dl.data import Split
from dl.experiments import fit_system
from dl.plots import plot_consensus, plot_few_pairs, plot_pareto, plot_spread
from dl.plots.generative import knob
from dl.store import MetricsFile
from dl.studies import consensus as mbr
from dl.studies import generative, unpaired
from dl.studies.rules import RULES, named_on_val, verdicts
from dl.studies.samples import (
    Sampler,
    consensus,
    diffusion,
    draw_samples,
    frontier,
    match_sigma,
    mean_vector,
    noised,
    of_weights,
    spread,
    weighted_spearman,
)

DIM, N = 16, 40


def embeddings(split: str, n: int = N) -> Embeddings:
    """n clips of two captions each; a sound lies near its captions."""
    generator = torch.Generator().manual_seed(len(split))
    clean = torch.randn(n, DIM, generator=generator)
    text_clip = torch.arange(n).repeat_interleave(2)
    text = normalize(clean[text_clip] + 0.3 * torch.randn(2 * n, DIM, generator=generator) + 0.5, dim=1)
    audio = normalize(clean + 0.5 * torch.randn(n, DIM, generator=generator) - 0.5, dim=1)
    return Embeddings(split, [f"{split}-{i}" for i in range(n)], audio, text, text_clip, [f"{split} sound {i}" for i in range(2 * n)], [])


def data(of: Embeddings) -> Split:
    """The split that the embeddings were made from, a recording for every two clips."""
    captions = [of.captions[2 * i: 2 * i + 2] for i in range(len(of.clip_ids))]
    return Split(of.split, of.clip_ids, captions, pd.DataFrame({"recordings": [f"rec_{i // 2}" for i in range(len(captions))]}), lambda i: None)


@pytest.fixture
def profile(tmp_path):
    return get_profile("smoke", results_root=tmp_path, bridge=BridgeConfig(train_steps=3, batch_size=8), bootstrap_samples=60)


# ------------------------------------------------------------------------------------------------------------------- samples
def test_samples_are_seeded_and_of_unit_norm(profile):
    train = embeddings("train")
    for sampler in (diffusion("diffusion_link_ddim", 300, 3), diffusion("conditional_diffusion", 999, 2), Sampler("ridge_noise", 0.4),
                    Sampler("regression_mlp_noise", 0.4), Sampler("ridge_residual", 1.0)):
        drawn = draw_samples(profile, sampler, train, train.audio, 0, range(3))
        assert drawn.shape == (3, N, DIM) and torch.allclose(drawn.norm(dim=-1), torch.ones(3, N), atol=1e-5)
        assert torch.equal(drawn[2:], draw_samples(profile, sampler, train, train.audio, 0, [2]))
        assert not torch.equal(drawn[0], drawn[1])


def test_without_noise_a_control_is_its_mapping(profile):
    train = embeddings("train")
    for name in ("ridge_noise", "ridge_residual"):
        still = draw_samples(profile, Sampler(name, 0.0), train, train.audio, 0)
        assert torch.allclose(still[0], fit_system(profile, "ridge", train)(train.audio), atol=1e-6) and float(spread(still).max()) < 1e-9


def test_residual_noise_has_the_shape_of_the_errors():
    shape = torch.diag(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    mean = normalize(torch.ones(500, 4), dim=1)
    moved = noised(mean, 0.1, [0], shape)[0] - mean
    assert float(moved[:, 0].std()) > 2 * float(moved[:, 1].std())


def test_spread_of_unit_samples_is_what_their_mean_lacks():
    drawn = normalize(torch.randn(5, 7, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert torch.allclose(spread(drawn), 1 - drawn.mean(0).square().sum(-1), atol=1e-5)
    assert torch.allclose(mean_vector(drawn).norm(dim=1), torch.ones(7))


def test_a_control_is_given_the_spread_it_has_to_match():
    mean = normalize(torch.randn(200, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    for sigma in (0.1, 0.5):
        target = float(spread(noised(mean, sigma, range(5))).mean())
        assert match_sigma(mean, target) == pytest.approx(sigma, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------- consensus
def test_consensus_takes_the_caption_that_the_others_resemble():
    table = {"dog": (1.0, 0.0), "dogs": (0.98, 0.2), "a dog": (0.97, -0.24), "rain": (-1.0, 0.0)}
    vectors = lambda sentences: normalize(torch.tensor([table[s] for s in sentences]), dim=1)
    assert consensus([["rain", "rain"], ["dog", "dogs"], ["dogs", "rain"], ["a dog", "rain"]], vectors).tolist() == [1, 0]
    assert consensus([["dog"], ["dog"], ["rain"]], vectors).tolist() == [0]                            # a tie goes to the first
    assert consensus([["rain", "dog"]], vectors).tolist() == [0, 0]                                    # one sample has no choice
    assert mbr.pick([["a", "b"], ["c", "d"]], np.array([1, 0])) == ["c", "b"]


# ------------------------------------------------------------------------------------------------------------------ measures
def test_weighted_spearman_is_scipys_on_the_list_with_repeats():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 25).astype(float), rng.normal(size=25)                                   # x has ties
    weights = rng.integers(0, 4, (8, 25))
    expected = [spearmanr(np.repeat(x, row), np.repeat(y, row)).statistic for row in weights]
    assert weighted_spearman(x, y, weights.astype(float)) == pytest.approx(expected, abs=1e-12)


def test_a_weighting_without_clips_has_no_value():
    values = of_weights(3, lambda weights: weights.sum(1))(np.array([[1.0, 1, 1], [0, 0, 0]]))
    assert values[0] == 3 and np.isnan(values[1])


def test_the_frontier_is_the_best_a_control_reaches_at_no_less_pair_cosine():
    cosine, distance = np.array([0.6, 0.5, 0.3]), np.array([0.8, 0.2, 0.5])
    assert frontier(cosine, distance, 0.5) == pytest.approx(0.2)
    assert frontier(cosine, distance, 0.55) == pytest.approx(0.5)                                      # half-way between two settings
    assert frontier(cosine, distance, 0.3) == pytest.approx(0.2)                                       # it may keep its lower distance
    assert frontier(cosine, distance, 0.9) == pytest.approx(0.8)                                       # out of reach: at its highest pair cosine


# ------------------------------------------------------------------------------------------------------------ text-only start
def test_pretraining_sees_no_sound_and_is_what_the_bridge_starts_from(profile):
    train = embeddings("train")
    prior = unpaired.text_prior(profile, train.text, 0)
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    link = unpaired.pretrained_bridge(profile, prior, train, 0)
    assert all(torch.equal(before[name], value) for name, value in prior.state_dict().items())
    other = unpaired.text_prior(profile, train.text, 1)
    assert not torch.equal(link.network.output.weight, unpaired.pretrained_bridge(profile, other, train, 0).network.output.weight)
    assert torch.equal(link.network.output.weight, unpaired.pretrained_bridge(profile, prior, train, 0).network.output.weight)


def test_a_text_prior_learns_to_denoise(tmp_path):
    long = get_profile("smoke", results_root=tmp_path, bridge=BridgeConfig(train_steps=300, batch_size=64))
    angle = torch.linspace(0, 3, 200)[:, None]
    text = torch.cat([angle.cos(), angle.sin(), torch.zeros(200, DIM - 2)], dim=1)                     # an arc: 14 of 16 directions hold noise alone
    noisy = normalize(text + 0.8 * torch.randn(text.shape, generator=torch.Generator().manual_seed(0)) / DIM**0.5, dim=1)
    cleaned = unpaired.denoise(unpaired.text_prior(long, text, 0), None, 300)(noisy)
    assert float((cleaned * text).sum(1).mean()) > float((noisy * text).sum(1).mean()) + 0.05


def test_what_is_tuned_has_the_lowest_rmg_on_val():
    val = embeddings("val")
    options = {1.0: lambda audio: -audio, 2.0: lambda audio: val.first_text, 3.0: lambda audio: audio}
    assert unpaired.lowest_rmg(options, val) == 2.0


def test_a_familys_line_follows_its_knob():
    """Rows of metrics.csv stand by letter, k100 before k25; the line goes by number."""
    settings = [f"diffusion_link_ddim@k{k}n10" for k in (100, 200, 25)]
    frame = pd.DataFrame([{"experiment": "generative:distribution", "split": "test", "system": name, "metric": metric, "value": float(i),
                           "ci_low": 0, "ci_high": 1}
                          for i, name in enumerate(settings) for metric in ("pair_cosine", "frechet_distance")])
    figure, _ = plot_pareto(frame)
    assert figure.axes[0].lines[0].get_xdata().tolist() == [2.0, 0.0, 1.0]
    assert [knob(name) for name in ("conditional_diffusion@k999n5", "ridge_noise@s0.3")] == [5.0, 0.3]


# ------------------------------------------------------------------------------------------------------ whole parts, verdicts
def test_parts_record_rows_that_the_rules_and_the_figures_read(profile):
    train, val, test = (embeddings(name) for name in ("train", "val", "test"))
    split, ddim, conditional = data(test), diffusion("diffusion_link_ddim", 300, 3), diffusion("conditional_diffusion", 999, 2)
    _, clips = generative.run_spread(profile, train, val, test, split, options=[ddim, conditional, diffusion("diffusion_link_ddim", 100, 3)])
    families = {name: [Sampler(name, 0.0), Sampler(name, 0.3)] for name in generative.CONTROLS}
    families |= {sampler.name: [sampler] for sampler in (ddim, conditional)}
    generative.run_distribution(profile, train, val, test, split, wanted=families)
    unpaired.run_few_pairs(profile, train, val, test, split, fractions=(0.5, 1.0), progress=False)
    frame = MetricsFile(profile).frame()
    found = verdicts(frame)
    assert {verdict.part for verdict in found} == {"spread", "distribution", "few_pairs"}
    assert len([verdict for verdict in found if verdict.part == "few_pairs"]) == 4 and not any("no interval" in v.sentence for v in found)
    before = len(frame)
    generative.run_spread(profile, train, val, test, split, options=[ddim, conditional])
    assert len(MetricsFile(profile).frame()) == before                                                 # replaced, not piled up
    for figure, shown in (plot_spread(frame, clips), plot_few_pairs(frame), plot_pareto(frame)):
        assert len(shown) and figure.axes


def rows(part: str, **intervals: tuple[float, float]) -> list[dict]:
    """Paired rows with the given intervals; ``__`` in a name stands for ``-``."""
    return [{"experiment": f"generative:{part}:paired", "split": "test", "system": name.replace("__", "-"), "metric": "cider_d", "seed": "all",
             "noise_seed": "all", "value": (low + high) / 2, "ci_low": low, "ci_high": high} for name, (low, high) in intervals.items()]


def consensus_rows(**intervals: tuple[float, float]) -> pd.DataFrame:
    on_val = [{"experiment": "generative:mbr", "split": "val", "system": f"{name}@x-S5", "metric": "cider_d", "value": value, "seed": "0"}
              for name, value in (("diffusion_link_ddim", 0.3), ("conditional_diffusion", 0.4), ("ridge_noise", 0.9))]
    return pd.DataFrame(on_val + rows("mbr", **{f"conditional_diffusion_mbr__{name}": ends for name, ends in intervals.items()}))


def test_the_prize_needs_every_interval_above_zero():
    above, across = (0.01, 0.05), (-0.01, 0.05)
    assert named_on_val(consensus_rows()) == "conditional_diffusion"                                   # a control is never the candidate
    cases = [((above, above, above, above), "pays because of diffusion", True), ((above, above, across, above), "pays, but", False),
             ((above, across, above, above), "does not pay", False)]
    for ends, word, pays in cases:
        frame = consensus_rows(**dict(zip(("ridge", "regression_mlp", "ridge_noise_mbr", "mappings_mbr"), ends, strict=True)))
        (verdict,) = verdicts(frame)
        assert verdict.word.startswith(word) and verdict.pays == pays and len(verdict.evidence) == 4
        figure, shown = plot_consensus(frame)
        assert len(shown) == 4 and len(figure.axes) == 2


def test_an_absent_comparison_is_no_win():
    (verdict,) = verdicts(consensus_rows(ridge=(0.1, 0.2)))
    assert verdict.word == "does not pay" and "no interval" in verdict.sentence
    assert verdicts(pd.DataFrame(columns=["experiment", "system", "metric", "value", "ci_low", "ci_high", "split"])) == [] and set(RULES)
