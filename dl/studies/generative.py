"""Where does the generative view pay? What notebook A3 runs: several samples a sound, beside controls that have no diffusion in them.

In Table 1 ridge and a regression MLP tie one-step Diffusion-Link: at a small k* its optimum is a conditional mean, which regression finds too.
A generative model can do more: give *several* answers (``dl.studies.consensus``), learn from texts without sounds (``dl.studies.unpaired``), and, here,
say how sure it is and keep the spread of the texts. Each is set against the same thing done without diffusion. [ours: all of it]

* ``run_spread``: does the spread of the samples tell how wrong their mean will be? Controls: three figures that need no samples.
* ``run_distribution``: Frechet distance at equal pair cosine. Controls: ridge and the regression MLP with noise added.

What is open (k*, n, sigma) is chosen on val, training seed 0, by the rules of ``choose_spread`` and ``worst_advantage``; test is scored once, and
``dl.studies.rules`` judges by rules that were written before.
"""
from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl.bootstrap import ClipCounts, Draws, SystemScores, make_reference, score_clips
from dl.clap import Embeddings
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.experiments import START_STEPS, fit_system
from dl.gap import Reference, effective_rank, frechet_distance, mmd2, top_k
from dl.peers import Projection, Ridge
from dl.studies.rows import light_draws, record
from dl.studies.samples import (
    DIFFUSION,
    Sampler,
    diffusion,
    draw_samples,
    frontier,
    mean_vector,
    of_weights,
    spread,
    weighted_spearman,
)

SPREAD_SAMPLES = 10                                 # of run_spread, which generates no captions
REPLICATES = 200                                    # of run_distribution: an eigen-decomposition each
CONTROLS = ("ridge_noise", "regression_mlp_noise", "ridge_residual")                # of run_distribution


# -------------------------------------------------------------------------------------------------------------------- spread
def trivial_predictors(profile: Profile, train: Embeddings, audio: Tensor) -> dict[str, NDArray]:
    """What might tell an error without samples, larger = worse.

    nearest_audio: distance to the nearest training sound; ridge_norm: -|ridge(a)|; projection_entropy: entropy of projection's weights.
    """
    ridge, projection = fit_system(profile, "ridge", train), fit_system(profile, "projection", train)
    assert isinstance(ridge, Ridge) and isinstance(projection, Projection)
    before = ridge.text_mean + (audio.double() - ridge.audio_mean) @ ridge.matrix
    weights = torch.softmax(projection.scale * audio @ train.text.T, dim=1)
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(1)
    return {"nearest_audio": (1 - (audio @ train.audio.T).max(1).values).numpy(), "ridge_norm": -before.norm(dim=1).numpy(),
            "projection_entropy": entropy.numpy()}


def spread_and_error(profile: Profile, sampler: Sampler, train: Embeddings, of: Embeddings, seed: int) -> tuple[NDArray, NDArray]:
    """Spread of a sound's samples, and 1 - cos(their mean, caption 1); (n,) each."""
    samples = draw_samples(profile, sampler, train, of.audio, seed, range(SPREAD_SAMPLES))
    return spread(samples).numpy(), 1 - (mean_vector(samples) * of.first_text).sum(1).numpy()


def choose_spread(profile: Profile, train: Embeddings, val: Embeddings, options: Iterable[Sampler]) -> list[Sampler]:
    """Of each family the sampler whose spread has the highest Spearman correlation with the error on val, training seed 0."""
    best: dict[str, tuple[float, Sampler]] = {}
    for sampler in options:
        value = float(weighted_spearman(*spread_and_error(profile, sampler, train, val, 0), np.ones((1, len(val.clip_ids))))[0])
        best[sampler.name] = max(best.get(sampler.name, (-2.0, sampler)), (value, sampler), key=lambda entry: entry[0])
    return [sampler for _, sampler in best.values()]


def run_spread(profile: Profile, train: Embeddings, val: Embeddings, test: Embeddings, split: Split, seeds: tuple[int, ...] | None = None,
               options: list[Sampler] | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Part 2. Spearman correlation of each predictor with 1 - cos(mean of the samples, caption 1); recorded as ``generative:spread``.

    The metric is called ``spearman:<system>``, the column system names the predictor.

    Returns:
        (the rows recorded; spread and error of each clip at the first seed: system, spread, error).
    """
    seeds = profile.seeds if seeds is None else seeds
    if options is None:
        options = [diffusion("diffusion_link_ddim", k, 10) for k in (100, 200, 400, 600)]
        options += [diffusion("conditional_diffusion", 999, n) for n in (5, 10, 25)]
    draws, trivial = light_draws(split, test.clip_ids, profile.bootstrap_samples), trivial_predictors(profile, train, test.audio)
    rows, clips, scored, pairs = [], [], {}, []
    for sampler in choose_spread(profile, train, val, options):
        runs: dict[str, list] = {}
        for seed in seeds:
            measured, error = spread_and_error(profile, sampler, train, test, seed)
            if seed == seeds[0]:
                clips.append(pd.DataFrame({"system": sampler.name, "spread": measured, "error": error}))
            for name, values in {"sample_spread": measured, **trivial}.items():
                statistic = of_weights(len(error), partial(weighted_spearman, values, error))
                runs.setdefault(name, []).append((seed, 0, {f"spearman:{sampler.name}": statistic}))
        for name, of_name in runs.items():
            scored[name, sampler.name] = score_clips(name, of_name, draws)
            rows += [row | {"reason": row["reason"] or sampler.label} for row in scored[name, sampler.name].rows(
                False, experiment="generative:spread", split="test", ids_sha256=ids_sha256(test.clip_ids))]
        pairs += [(("sample_spread", sampler.name), (name, sampler.name)) for name in trivial]
    return record(profile, "spread", rows, scored, pairs, test), pd.concat(clips, ignore_index=True)


# -------------------------------------------------------------------------------------------------------------- distribution
def families() -> dict[str, list[Sampler]]:
    """The two diffusion families and the controls, each along its knob.

    DDIM's knob is k*. Conditional diffusion starts from pure noise and has no k*: its knob is n, from the conditional mean (n = 1) to full sampling.
    """
    sigmas = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    return {
        "diffusion_link_ddim": [diffusion("diffusion_link_ddim", k, 10) for k in START_STEPS if k >= 10],
        "conditional_diffusion": [diffusion("conditional_diffusion", 999, n) for n in (1, 2, 5, 10, 25, 50)],
        **{name: [Sampler(name, sigma) for sigma in sigmas] for name in ("ridge_noise", "regression_mlp_noise")},
        "ridge_residual": [Sampler("ridge_residual", sigma) for sigma in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)],
    }


def distribution_metrics(mapped: Tensor, reference: Reference) -> dict[str, NDArray | ClipCounts]:
    """Pair cosine, R@10, Frechet distance, MMD^2 and effective rank, as ``score_clips`` takes them."""
    audio, text = mapped.double().numpy(), reference.text.astype(float)
    found, n = top_k(audio @ reference.gallery.astype(float).T, 10), len(text)
    return {
        "pair_cosine": np.einsum("id,id->i", audio, text),
        "recall_at_10": (reference.gallery_clip[found] == np.arange(n)[:, None]).any(1).astype(float),
        "frechet_distance": of_weights(n, lambda weights: frechet_distance(audio, text, weights)),
        "mmd2": of_weights(n, lambda weights: mmd2(audio, text, reference.bandwidth, weights)),
        "effective_rank": of_weights(n, lambda weights: effective_rank(audio, weights)),
    }


def advantage(ours: SystemScores, control: list[SystemScores]) -> tuple[float, NDArray]:
    """Frechet distance minus the control's at no less pair cosine: (value, (R,) replicates on the same recordings); below 0 is better."""
    def difference(cosines: NDArray, distances: NDArray) -> float:
        return float(distances[0] - frontier(cosines[1:], distances[1:], cosines[0]))
    every = [ours, *control]
    value = difference(*(np.array([scores.mean(name) for scores in every]) for name in ("pair_cosine", "frechet_distance")))
    cosines, distances = (np.stack([scores.replicates[name] for scores in every], 1) for name in ("pair_cosine", "frechet_distance"))
    return value, np.array([difference(*both) if np.isfinite(both).all() else np.nan for both in zip(cosines, distances, strict=True)])


def worst_advantage(ours: SystemScores, scored: dict[str, list[SystemScores]]) -> float:
    """The advantage against the control that is hardest to beat; on val the lowest one names a family's setting."""
    return max(advantage(ours, scored[control])[0] for control in CONTROLS)


def score_families(profile: Profile, train: Embeddings, of: Embeddings, draws: Draws, seeds: tuple[int, ...],
                   wanted: dict[str, list[Sampler]]) -> dict[str, list[SystemScores]]:
    """Scores of one sample a sound, for every family along its knob; the noise seed is the training seed."""
    reference = make_reference(of)
    scored: dict[str, list[SystemScores]] = {}
    for name, samplers in wanted.items():
        for sampler in samplers:
            runs = [(seed, seed, distribution_metrics(draw_samples(profile, sampler, train, of.audio, seed, [seed])[0], reference)) for seed in seeds]
            scored.setdefault(name, []).append(score_clips(sampler.label, runs, draws))
    return scored


def run_distribution(profile: Profile, train: Embeddings, val: Embeddings, test: Embeddings, split: Split, seeds: tuple[int, ...] | None = None,
                     wanted: dict[str, list[Sampler]] | None = None) -> pd.DataFrame:
    """Part 4. Every family on test, each diffusion family's setting chosen on val; recorded as ``generative:distribution``.

    Rows ``<family>@<setting>``; under ``:paired`` ``<chosen>-<control>`` with metric frechet_at_pair_cosine (:func:`advantage`).

    Returns:
        the rows recorded.
    """
    wanted, seeds, n_val = families() if wanted is None else wanted, profile.seeds if seeds is None else seeds, len(val.clip_ids)
    once = Draws(np.ones((1, n_val)), np.zeros((1, n_val)), np.zeros(1), np.zeros(1))
    on_val = score_families(profile, train, val, once, (0,), wanted)
    on_test = score_families(profile, train, test, light_draws(split, test.clip_ids, min(REPLICATES, profile.bootstrap_samples)), seeds, wanted)
    shared = {"split": "test", "ids_sha256": ids_sha256(test.clip_ids)}
    every = [scores for of_family in on_test.values() for scores in of_family]
    rows = [row for scores in every for row in scores.rows(False, experiment="generative:distribution", **shared)]
    for name in DIFFUSION:
        chosen = on_test[name][int(np.argmin([worst_advantage(scores, on_val) for scores in on_val[name]]))]
        for control in CONTROLS:
            value, replicates = advantage(chosen, on_test[control])
            known = replicates[np.isfinite(replicates)]
            low, high = np.percentile(known, [2.5, 97.5]) if len(known) >= 40 else (None, None)
            rows.append({**shared, "experiment": "generative:distribution:paired", "system": f"{chosen.system}-{control}",
                         "seed": "all", "noise_seed": "all",
                         "n_items": len(test.clip_ids), "metric": "frechet_at_pair_cosine", "value": value, "ci_low": low, "ci_high": high})
    return record(profile, "distribution", rows, {}, [], test)
