"""Several captions for one sound and a choice among them (part 1 of notebook A3): minimum Bayes risk, MBR [peer: machine translation].

S vectors a sound, each put into words; the caption nearest to the others is the answer. Controls: ridge + isotropic noise, five mappings without
noise, and the single captions of ridge and of the regression MLP. The sampler and S are chosen on val, training seed 0. [ours]
"""
from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from dl.clap import Embeddings
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.experiments import Row, caption_rows, fit_system, select_clips, system_vectors
from dl.studies.rows import caption_scores, record_captions, references
from dl.studies.samples import DIFFUSION, NUM_SAMPLES, Sampler, consensus, diffusion, draw_samples, match_sigma, mean_vector, spread

VAL_CLIPS = 100                                     # clips of val on which the samplers are compared
SINGLES = ("ridge", "regression_mlp")               # the prize is to beat both
MAPPINGS = ("ridge", "regression_mlp", "procrustes", "pls_head", "projection")      # five answers without diffusion and without noise


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
    expected = references(split, test.clip_ids)
    runs: dict[str, list] = {}
    reasons: dict[str, str] = {}
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
    settings = {name: f"{sampler.label}, S = {size}" for name, (sampler, size) in best.items()}
    notes = {name: settings.get(name.rsplit("_", 1)[0], "") for name in runs}
    answers = [name for name in runs if name.endswith(("_mbr", "_mean"))]
    pairs = [(ours, theirs) for ours in answers for theirs in SINGLES]
    pairs += [(f"{name}_mbr", f"{control}_mbr") for name in DIFFUSION for control in ("ridge_noise", "mappings")
              if {name, control} <= {*best, "mappings"}]
    return record_captions(profile, "mbr", runs, reasons, pairs, split, test, rows, notes)
