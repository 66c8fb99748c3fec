"""Where does the generative view pay? What notebook A3 runs: several samples a sound, beside controls that have no diffusion in them.

In Table 1 ridge and a regression MLP tie one-step Diffusion-Link: at a small k* its optimum is a conditional mean, which regression finds too.
A generative model can do three things more: give *several* answers, say how sure it is, and keep the spread of the texts. (A fourth, to learn
from texts without sounds, stands in ``dl.studies.unpaired``.) Each is set against the same thing done without diffusion. [ours: all of it]

* ``run_mbr``: S vectors a sound, each put into words; the caption nearest to the others is the answer (minimum Bayes risk, MBR [peer: machine
  translation]). Controls: ridge + isotropic noise, five mappings without noise, and the single captions of ridge and of the regression MLP.
* ``run_spread``: does the spread of the samples tell how wrong their mean will be? Controls: three figures that need no samples.
* ``run_distribution``: Frechet distance at equal pair cosine. Controls: ridge and the regression MLP with noise added.

What is open (k*, n, sigma, S) is chosen on val, training seed 0, by the rules of ``choose_mbr``, ``choose_spread`` and ``worst_advantage``; test is
scored once, and ``dl.report.generative`` judges by rules that were written before. Captions are kept by ``dl.captioning``: a killed run goes on.
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl.captioning import Row, caption_rows, select_clips, system_vectors
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.encoder.clap import Embeddings
from dl.experiments import START_STEPS, fit_system
from dl.metrics.bootstrap import ClipCounts, Draws, SystemScores, make_draws, make_reference, paired_difference, score_clips
from dl.metrics.captions import sentence_vectors
from dl.metrics.gap import Reference, frechet_distance, mmd2
from dl.metrics.java import JavaError, find_java, ptb_tokenize
from dl.metrics.neighbours import effective_rank, top_k
from dl.results import MetricsFile
from dl.studies.samples import (
    NUM_SAMPLES,
    Sampler,
    consensus,
    diffusion,
    draw_samples,
    frontier,
    match_sigma,
    mean_vector,
    of_weights,
    spread,
    weighted_spearman,
)

VAL_CLIPS = 100                                     # clips of val on which the samplers of run_mbr are compared
SPREAD_SAMPLES = 10                                 # of run_spread, which generates no captions
REPLICATES = 200                                    # of run_distribution: an eigen-decomposition each
SINGLES = ("ridge", "regression_mlp")               # the prize is to beat both
MAPPINGS = ("ridge", "regression_mlp", "procrustes", "pls_head", "projection")      # five answers without diffusion and without noise
DIFFUSION = ("diffusion_link_ddim", "conditional_diffusion")
CONTROLS = ("ridge_noise", "regression_mlp_noise", "ridge_residual")                # of run_distribution


# ----------------------------------------------------------------------------------------------------------------- consensus
def caption_scores(lists: dict[str, list[str]], references: list[list[str]]) -> tuple[dict[str, dict[str, NDArray]], dict[str, str]]:
    """CIDEr-D and sbert_sim of each clip, as ``dl.metrics.captions`` computes them, without the metrics that take minutes.

    Returns:
        (name -> metric -> (n,); metric -> why it has no value).
    """
    captions = list(dict.fromkeys(caption for given in [*lists.values(), *references] for caption in given))
    place, vectors = {caption: i for i, caption in enumerate(captions)}, sentence_vectors(captions).double()
    wanted = torch.stack([vectors[[place[caption] for caption in of_clip]].mean(0) for of_clip in references])
    scores = {name: {"cider_d": np.full(len(given), np.nan), "sbert_sim": (vectors[[place[c] for c in given]] * wanted).sum(1).numpy()}
              for name, given in lists.items()}
    try:
        tokens = dict(zip(captions, ptb_tokenize(find_java(), captions), strict=True))
        from pycocoevalcap.cider.cider import Cider
    except (JavaError, ModuleNotFoundError) as error:
        return scores, {"cider_d": f"no PTB tokens: {error}"}
    expected = {i: [tokens[caption] for caption in of_clip] for i, of_clip in enumerate(references)}
    for name, given in lists.items():
        scores[name]["cider_d"] = np.asarray(Cider().compute_score(expected, {i: [tokens[c]] for i, c in enumerate(given)})[1], dtype=float)
    return scores, {}


def pick(captions: list[list[str]], which: NDArray) -> list[str]:
    """Caption ``which[i]`` of clip i."""
    return [captions[s][i] for i, s in enumerate(which)]


def sample_captions(profile: Profile, wanted: list[tuple[Sampler, int]], seed: int, train: Embeddings, val: Embeddings, of: Embeddings,
                    fixed: tuple[Row, ...] = ()) -> tuple[list[list[list[str]]], dict[str, list[str]]]:
    """Greedy captions of samples by the common decoder, which was trained on text and is loaded once.

    Args:
        wanted: samplers, and how many samples of each.
        fixed: rows of Table 2 that are captioned beside them.

    Returns:
        (for each sampler its S lists of n captions, and for a diffusion system a last one, that of the samples' mean;
        system -> captions of ``fixed``).
    """
    vectors: dict[Row, Tensor] = {row: system_vectors(profile, row, train, of, seed) for row in fixed}
    rows: list[list[Row]] = []
    for sampler, size in wanted:
        samples = draw_samples(profile, sampler, train, of.audio, seed, range(size))
        found = {Row(f"{sampler.label}-{s}"): sample for s, sample in enumerate(samples)}
        if sampler.name in DIFFUSION:
            found[Row(f"{sampler.label}-mean{size}")] = mean_vector(samples)
        vectors |= found
        rows.append(list(found))
    captions = caption_rows(profile, vectors, seed, train, val, of, num_beams=1, vectors_of=vectors.__getitem__)
    return [[captions[row] for row in of_sampler] for of_sampler in rows], {row.system: captions[row] for row in fixed}


def mbr_options(profile: Profile, train: Embeddings, val: Embeddings) -> list[Sampler]:
    """What val chooses from: DDIM entered at two heights, conditional diffusion, and ridge + noise of the same three spreads."""
    options = [diffusion("diffusion_link_ddim", k, 10) for k in (200, 400)] + [diffusion("conditional_diffusion", 999, 50)]
    audio = val.audio[:VAL_CLIPS]
    mean = fit_system(profile, "ridge", train)(audio)
    spreads = [float(spread(draw_samples(profile, option, train, audio, 0)).mean()) for option in options]
    return options + [Sampler("ridge_noise", round(match_sigma(mean, target), 3)) for target in spreads]


def choose_mbr(
    profile: Profile, train: Embeddings, val: Embeddings, val_split: Split, options: list[Sampler]
) -> tuple[dict[str, tuple[Sampler, int]], list[dict]]:
    """For each family the sampler and S, 3 or 5, with the highest CIDEr-D of its MBR captions on val, training seed 0 (without Java: sbert_sim).

    Returns:
        (family -> (sampler, S); rows of metrics.csv, split val).
    """
    part = select_clips(val, list(range(min(VAL_CLIPS, len(val.clip_ids)))))
    lists, found = {}, {}
    sampled, _ = sample_captions(profile, [(sampler, NUM_SAMPLES) for sampler in options], 0, train, val, part)
    for sampler, captions in zip(options, sampled, strict=True):
        for size in (3, NUM_SAMPLES):
            found[f"{sampler.label}-S{size}"] = (sampler, size)
            lists[f"{sampler.label}-S{size}"] = pick(captions, consensus(captions[:size]))
    scores, reasons = caption_scores(lists, references(val_split, part.clip_ids))
    best: dict[str, tuple[float, str]] = {}
    for label, (sampler, _) in found.items():
        value = float(scores[label]["sbert_sim" if reasons else "cider_d"].mean())
        best[sampler.name] = max(best.get(sampler.name, (-1.0, "")), (value, label), key=lambda entry: entry[0])
    shared = {"experiment": "generative:mbr", "split": "val", "seed": 0, "noise_seed": "all", "n_items": len(part.clip_ids),
              "ids_sha256": ids_sha256(part.clip_ids), "decoding": "greedy"}
    rows = [{**shared, "system": label, "metric": name, "value": float(values.mean()), "reason": reasons.get(name, "")}
            for label, of_label in scores.items() for name, values in of_label.items()]
    return {name: found[label] for name, (_, label) in best.items()}, rows


def run_mbr(
    profile: Profile, train: Embeddings, val: Embeddings, test: Embeddings, val_split: Split, split: Split,
    seeds: tuple[int, ...] | None = None, options: list[Sampler] | None = None, progress: bool = True,
) -> pd.DataFrame:
    """Part 1. Choose on val, caption test with the samples of every family, score, and record ``generative:mbr``.

    Rows ``<family>_mbr``; ``<family>_mean``, the mean of the samples as one vector; ``<family>_best``, the sample with the highest CIDEr-D, picked
    with the references in hand: what a choice among the samples could gain at most; the singles; ``mappings_mbr``. Differences under ``:paired``.

    Args:
        seeds: training seeds of decoder and mapping; None takes the profile's.
        options: see :func:`mbr_options`, which None takes.

    Returns:
        the rows recorded.
    """
    best, rows = choose_mbr(profile, train, val, val_split, mbr_options(profile, train, val) if options is None else options)
    expected, runs, reasons = references(split, test.clip_ids), {}, {}
    for seed in profile.seeds if seeds is None else seeds:
        sampled, fixed = sample_captions(profile, list(best.values()), seed, train, val, test, tuple(Row(name) for name in MAPPINGS))
        samples = {"mappings": list(fixed.values())}
        lists = {name: fixed[name] for name in SINGLES}
        for (name, (_, size)), captions in zip(best.items(), sampled, strict=True):
            samples[name] = captions[:size]
            lists |= {f"{name}_mean": captions[size]} if name in DIFFUSION else {}
        if progress:
            print(f"seed {seed} captioned: {', '.join(f'{sampler.label} S = {size}' for sampler, size in best.values())}", flush=True)
        for name, captions in samples.items():
            lists[f"{name}_mbr"] = pick(captions, consensus(captions))
        parts = {f"{name}-{s}": given for name, captions in samples.items() for s, given in enumerate(captions)}
        scores, reasons = caption_scores(lists | parts, expected)
        for name, captions in samples.items():
            each = [scores.pop(f"{name}-{s}") for s in range(len(captions))]
            top = np.nan_to_num([of_sample["cider_d"] for of_sample in each]).argmax(0)
            scores[f"{name}_best"] = {metric: np.stack([of_sample[metric] for of_sample in each])[top, np.arange(len(top))] for metric in each[0]}
        for name, of_clip in scores.items():
            runs.setdefault(name, []).append((seed, 0, of_clip))
    draws = light_draws(split, test.clip_ids, profile.bootstrap_samples)
    scored = {name: score_clips(name, of_name, draws) for name, of_name in runs.items()}
    for scores in scored.values():
        scores.reasons |= reasons
    settings = {name: f"{sampler.label}, S = {size}" for name, (sampler, size) in best.items()}
    rows += [row | {"reason": row["reason"] or settings.get(name.rsplit("_", 1)[0], "")} for name, scores in scored.items()
             for row in scores.rows(False, experiment="generative:mbr", split="test", decoding="greedy", ids_sha256=ids_sha256(test.clip_ids))]
    answers = [name for name in scored if name.endswith(("_mbr", "_mean"))]
    pairs = [(ours, theirs) for ours in answers for theirs in SINGLES]
    pairs += [(f"{name}_mbr", f"{control}_mbr") for name in DIFFUSION for control in ("ridge_noise", "mappings")
              if {name, control} <= {*best, "mappings"}]
    return record(profile, "mbr", rows, scored, pairs, test, decoding="greedy")


# -------------------------------------------------------------------------------------------------------------------- spread
def trivial_predictors(profile: Profile, train: Embeddings, audio: Tensor) -> dict[str, NDArray]:
    """What might tell an error without samples, larger = worse.

    nearest_audio: distance to the nearest training sound; ridge_norm: -|ridge(a)|; projection_entropy: entropy of projection's weights.
    """
    ridge, projection = fit_system(profile, "ridge", train), fit_system(profile, "projection", train)
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
                statistic = of_weights(len(error), lambda weights, x=values, y=error: weighted_spearman(x, y, weights))
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
    reference, scored = make_reference(of), {}
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


# ---------------------------------------------------------------------------------------------------------------------- rows
def references(split: Split, clip_ids: list[str]) -> list[list[str]]:
    """The captions of some clips of a split."""
    return [split.captions[split.clip_ids.index(clip_id)] for clip_id in clip_ids]


def light_draws(split: Split, clip_ids: list[str], n_samples: int) -> Draws:
    """Replicates over recordings alone; the plain clip bootstrap, too narrow where scenes share recordings, is left out."""
    draws = make_draws([split.clusters[split.clip_ids.index(clip_id)] for clip_id in clip_ids], n_samples)
    return replace(draws, clip=np.zeros_like(draws.clip))


def record(profile: Profile, name: str, rows: list[dict], scored: dict, pairs: Iterable[tuple], test: Embeddings, **labels: object) -> pd.DataFrame:
    """Replace the rows of ``generative:<name>`` in metrics.csv by these and the paired differences; return them as a table."""
    shared = {"experiment": f"generative:{name}:paired", "split": "test", "ids_sha256": ids_sha256(test.clip_ids), **labels}
    rows = rows + [row for ours, theirs in pairs for row in paired_difference(scored[ours], scored[theirs], **shared)]
    rows = [{column: value for column, value in row.items() if not column.startswith("clip_")} for row in rows]
    file = MetricsFile(profile)
    file.remove(experiment=[f"generative:{name}", f"generative:{name}:paired"])
    file.add(rows)
    return pd.DataFrame(rows)
