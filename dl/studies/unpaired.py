"""Few pairs and much text: a bridge pre-trained on texts alone, then on 1 to 100 % of the pairs (part 3 of notebook A3).

Texts without sounds are cheap, and L_self is a loss on texts alone: the network learns to denoise them before it meets a sound. Two uses [ours]:

* ``pretrained``: those weights, then the bridge's own training on the pairs, as many steps again;
* ``ridge_text_prior``: ridge from the same pairs, its answer then denoised by the text-only network in one step from k* without added noise.

Beside them, on the same pairs: ``scratch`` (the bridge as ever), ``ridge`` (its penalty tuned on val for that number of pairs) and
``regression_mlp``; and with no pair at all ``mean_shift``, ``projection``, ``diffusion_bridge`` and ``mean_shift_text_prior``. k* of every row that
has one is chosen on val with training seed 0, by RMG. Every fit takes the steps of an ablation (``dl.studies.variants.STEPS``; the rows
without pairs are Table 1's fits), and the fits on few pairs are those of ablation ``pairs``: they lie in ``<cache>/pairs``, by share and seed.
``run_few_pairs_captions`` puts the answers of four of them into words, at the smallest share, where they differ most.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from dl.bootstrap import SystemScores, make_reference, score_clips
from dl.bridge import DiffusionLink, bridge_losses
from dl.clap import Embeddings
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.experiments import FITS, START_STEPS, Row, caption_rows, chosen, fit_system, short_hash
from dl.gap import Reference, rmg, top_k
from dl.peers import DiffusionLinkPeer
from dl.studies.ablations import base_config, few_pairs
from dl.studies.rows import caption_scores, light_draws, record, record_captions, references
from dl.studies.samples import of_weights
from dl.studies.variants import FRACTIONS
from dl.train import PairSampler, fit, seeded

ALPHAS = (*(trial["alpha"] for trial in FITS["ridge"]), 10.0, 30.0)
Mapping = Callable[[Tensor], Tensor]


def text_prior(profile: Profile, text: Tensor, seed: int, progress: bool = False) -> DiffusionLink:
    """A bridge's network trained on L_self alone: mean |f(x_t^k, k) - x_t| over texts (m, D), no sound among them."""
    config = replace(base_config(profile), self_weight=0.0, topology_weight=0.0)
    with seeded(seed, text.device):
        link = DiffusionLink.from_config(config, text.shape[1])
    x_text = link.scale * text

    def loss_fn(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        x = x_text[torch.randint(len(x_text), (config.batch_size,), generator=generator)]
        return bridge_losses(network, link.scheduler, x, x, config, generator)

    path = profile.cache_dir / "fits" / f"text_prior-{short_hash(config=asdict(config))}-{seed}.safetensors"
    fit(link.network, loss_fn, config, seed=seed, identity={"recipe": "text prior", "data": [text]}, checkpoint_path=path, progress=progress)
    return link.eval()


def pretrained_bridge(profile: Profile, prior: DiffusionLink, pairs: Embeddings, seed: int, progress: bool = False) -> DiffusionLink:
    """The bridge's own training on ``pairs`` from the weights of ``prior``, which stay as they are; ``profile`` says where the fit is kept."""
    config = base_config(profile)
    link = DiffusionLink.from_config(config, pairs.audio.shape[1])
    link.load_state_dict(prior.state_dict())
    sampler, x_audio, x_text = PairSampler(pairs.text_clip, len(pairs.audio)), link.scale * pairs.audio, link.scale * pairs.text

    def loss_fn(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        clips, captions = sampler.draw(config.batch_size, generator)
        return bridge_losses(network, link.scheduler, x_audio[clips], x_text[captions], config, generator)

    path = profile.cache_dir / "fits" / f"pretrained-{short_hash(config=asdict(config))}-{seed}.safetensors"
    fit(link.network, loss_fn, config, seed=seed, checkpoint_path=path, progress=progress,
        identity={"recipe": "pretrained bridge", "start": list(prior.network.state_dict().values()),
                  "data": [pairs.audio, pairs.text, pairs.text_clip]})
    return link.eval()


def light_metrics(mapped: Tensor, reference: Reference) -> dict:
    """RMG, pair cosine and R@10, as ``score_clips`` takes them."""
    audio, text = mapped.double().numpy(), reference.text.astype(float)
    found, n = top_k(audio @ reference.gallery.astype(float).T, 10), len(text)
    return {
        "rmg": of_weights(n, lambda weights: rmg(audio, text, weights)),
        "pair_cosine": np.einsum("id,id->i", audio, text),
        "recall_at_10": (reference.gallery_clip[found] == np.arange(n)[:, None]).any(1).astype(float),
    }


def lowest_rmg(options: dict[float, Mapping], val: Embeddings) -> float:
    """The option whose answers have the lowest RMG on val."""
    text = val.first_text
    return min(options, key=lambda option: float(rmg(options[option](val.audio), text)[0]))


def denoise(link: DiffusionLink, mapping: Mapping | None, start_timestep: int) -> Mapping:
    """a -> the network's one-step answer from k* = ``start_timestep``, no noise added, for the vector that ``mapping`` gives (None: a itself)."""
    def mapped(audio: Tensor) -> Tensor:
        entry = audio if mapping is None else mapping(audio)
        return link(entry, start_timestep=start_timestep, num_inference_steps=1, add_noise=False)
    return mapped


def mappings(profile: Profile, train: Embeddings, fraction: float, seed: int, prior: DiffusionLink, tuned: dict[str, float], val: Embeddings,
             progress: bool = False) -> dict[str, Mapping]:
    """Every row at one share of the pairs and one training seed, fitted.

    Args:
        fraction: of the clips; 0 gives the rows without pairs.
        tuned: filled at the first call (row -> its k*, or ridge's penalty), kept at the next ones.
        val: what they are chosen on.
    """
    def best(name: str, options: dict[float, Mapping]) -> Mapping:
        if name not in tuned:
            tuned[name] = lowest_rmg(options, val)
        return options[tuned[name]]

    if fraction == 0:
        plain = {name: fit_system(profile, name, train, seed) for name in ("mean_shift", "projection", "diffusion_bridge")}    # Table 1's fits
        return plain | {"mean_shift_text_prior": best("mean_shift_text_prior", {k: denoise(prior, plain["mean_shift"], k) for k in START_STEPS})}
    pairs = few_pairs(train, fraction, seed)
    steps = base_config(profile).train_steps
    place = profile if fraction == 1 else replace(profile, results_root=profile.cache_dir / "pairs" / f"{fraction:g}-{seed}")
    ridge = best("ridge", {alpha: fit_system(place, "ridge", pairs, alpha=alpha) for alpha in ALPHAS})
    scratch = fit_system(place, "diffusion_link", pairs, seed, progress, **asdict(base_config(profile)))
    assert isinstance(scratch, DiffusionLinkPeer)
    pretrained = pretrained_bridge(place, prior, pairs, seed, progress)
    return {
        "pretrained": best("pretrained", {k: denoise(pretrained, None, k) for k in START_STEPS}),
        "ridge_text_prior": best("ridge_text_prior", {k: denoise(prior, ridge, k) for k in START_STEPS}),
        "scratch": best("scratch", {k: denoise(scratch.link, None, k) for k in START_STEPS}),
        "ridge": ridge,
        "regression_mlp": fit_system(place, "regression_mlp", pairs, seed, progress, **chosen(profile, "regression_mlp"), train_steps=steps),
    }


def run_few_pairs(profile: Profile, train: Embeddings, val: Embeddings, test: Embeddings, split: Split, seeds: tuple[int, ...] | None = None,
                  fractions: tuple[float, ...] = FRACTIONS, progress: bool = True) -> pd.DataFrame:
    """Part 3. Rows ``<system>@<share of the pairs>`` of ``generative:few_pairs``; under ``:paired`` pretrained and ridge_text_prior minus the others.

    The training seed also draws the pairs, so an interval holds the luck of the draw.

    Returns:
        the rows recorded; column reason holds the k* or penalty that val chose.
    """
    seeds, reference = profile.seeds if seeds is None else seeds, make_reference(test)
    draws, scored, rows, pairs = light_draws(split, test.clip_ids, profile.bootstrap_samples), {}, [], []
    for fraction in (0.0, *fractions):
        runs: dict[str, list] = {}
        tuned: dict[str, float] = {}
        for seed in seeds:
            prior = text_prior(profile, train.text, seed)
            for name, mapping in mappings(profile, train, fraction, seed, prior, tuned, val).items():
                runs.setdefault(name, []).append((seed, 0, light_metrics(mapping(test.audio), reference)))
            if progress:
                print(f"{fraction:.0%} of the pairs, seed {seed}: {tuned}", flush=True)
        for name, of_name in runs.items():
            label = f"{name}@{fraction:g}"
            scores: SystemScores = score_clips(label, of_name, draws)
            scored[label] = scores
            note = f"{'alpha' if name == 'ridge' else 'k*'} = {tuned[name]:g}" if name in tuned else ""
            rows += [row | {"reason": row["reason"] or note}
                     for row in scores.rows(False, experiment="generative:few_pairs", split="test", ids_sha256=ids_sha256(test.clip_ids))]
        if fraction:
            pairs += [(f"{ours}@{fraction:g}", f"{theirs}@{fraction:g}") for ours in ("pretrained", "ridge_text_prior")
                      for theirs in ("scratch", "ridge", "regression_mlp")]
    return record(profile, "few_pairs", rows, scored, pairs, test)


def run_few_pairs_captions(profile: Profile, train: Embeddings, val: Embeddings, test: Embeddings, split: Split, seeds: tuple[int, ...] | None = None,
                           fraction: float = FRACTIONS[0]) -> pd.DataFrame:
    """The same in words: rows ``<system>@<share>`` of ``generative:few_pairs_captions``, zero-shot captions by the common decoder, greedy.

    The decoder knows the texts of all training clips and no sound, as ever; only the mapping is short of pairs.

    Returns:
        the rows recorded, CIDEr-D and sbert_sim, with paired differences from ridge, regression_mlp and scratch.
    """
    runs: dict[str, list] = {}
    tuned: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for seed in profile.seeds if seeds is None else seeds:
        maps = mappings(profile, train, fraction, seed, text_prior(profile, train.text, seed), tuned, val)
        rows = {Row(f"{name}@{fraction:g}"): maps[name](test.audio) for name in ("pretrained", "scratch", "ridge", "regression_mlp")}
        captions = caption_rows(profile, rows, seed, train, val, test, num_beams=1, vectors_of=rows.__getitem__)
        scores, reasons = caption_scores({row.system: given for row, given in captions.items()}, references(split, test.clip_ids))
        for name, of_clip in scores.items():
            runs.setdefault(name, []).append((seed, 0, of_clip))
    pairs = [(f"{ours}@{fraction:g}", f"{theirs}@{fraction:g}") for ours in ("pretrained", "scratch") for theirs in ("ridge", "regression_mlp", "scratch")
             if ours != theirs]
    return record_captions(profile, "few_pairs_captions", runs, reasons, pairs, split, test)
