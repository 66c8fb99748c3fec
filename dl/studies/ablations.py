"""What notebook 09 runs: one thing about the bridge changed at a time, everything else as in Table 1's ``diffusion_link``.

The registry is ``dl.studies.variants``. A variant differs from the base, the ``diffusion_link`` that ``search.csv`` chose on val, in what it names
and in nothing else: the same steps (``STEPS``, fewer than Table 1's), seeds and learning rate, nothing tuned again. Ablations choose
nothing, so they are scored on test; what is reported is each variant's five figures and its paired difference from the base. [ours: all
of it, the paper's ablations are unknown]

Fits lie in the cache, scores of finished variants in ``<cache>/ablations``: a run killed anywhere goes on where it stopped. Rows go to
``metrics.csv`` as experiment ``ablation:<name>``, system = the variant's label; the base stands once, under ``ablation:base``.
"""
from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dl.bootstrap import ClipCounts, Draws, SystemScores, make_draws, make_reference, paired_difference, score_clips
from dl.bridge import INFERENCE_FIELDS, NETWORK_FIELDS, SCHEDULE_FIELDS, DiffusionLink, bridge_losses
from dl.clap import Embeddings
from dl.config import REPO, BridgeConfig, Profile, get_profile
from dl.data import Split, ids_sha256
from dl.experiments import chosen, fit_system, map_runs, select_clips, short_hash, side_by_side
from dl.gap import Reference, centroid_gap, effective_rank, rmg, top_k
from dl.peers import REGISTRY, build, centre, uncentre
from dl.scheduler import DDIMScheduler
from dl.store import MetricsFile, atomic_write
from dl.studies.ablation_table import METRICS, write_table
from dl.studies.variants import ABLATIONS, SMOKE, STEPS, Variant
from dl.train import BRIDGE_RECIPE, PairSampler, fit, seeded

REPLICATES = 200          # [ours] of the bootstrap over recordings and seeds; Table 1 takes 1,000
ARRAYS = ("points", "replicates", "clip_replicates")      # of SystemScores, as the cache keeps them
SCORING = 1               # counts up when the scoring below changes: scores in the cache are then made anew


def few_pairs(embeddings: Embeddings, fraction: float, seed: int) -> Embeddings:
    """A random share of a split's clips, at least two, each with all its captions; the smaller share lies inside the larger one.

    Clips are drawn, not recordings: 1 % of the scenes of data/mini touches more than 1 % of its recordings.

    Args:
        embeddings: of the training split.
        fraction: in (0, 1]; 1 gives the split itself.
        seed: of the draw.

    Raises:
        ValueError: a fraction outside (0, 1].

    Example:
        >>> len(few_pairs(train, 0.1, seed=0).clip_ids) == round(0.1 * len(train.clip_ids))
        True
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} is out of range: choose a share of the clips, above 0 and at most 1")
    if fraction == 1:
        return embeddings
    order = np.random.default_rng(seed).permutation(len(embeddings.clip_ids))
    return select_clips(embeddings, sorted(order[: max(2, round(fraction * len(order)))].tolist()))


# --------------------------------------------------------------------------------------------------------------------- fits
def base_config(profile: Profile) -> BridgeConfig:
    """The base: ``diffusion_link`` as it was chosen on val, with the profile's settings and the steps of an ablation (``dl.studies.variants.STEPS``)."""
    steps = STEPS.get(profile.name, profile.bridge.train_steps)
    return replace(profile.bridge, **{**chosen(profile, "diffusion_link"), "train_steps": steps})


def resolve(base: BridgeConfig, variant: Variant) -> BridgeConfig:
    """The bridge's configuration under a variant, its k* and n fitted to its number of levels."""
    config = replace(base, **variant.changes)
    if config.num_train_timesteps != base.num_train_timesteps:
        start = round(base.start_timestep * config.num_train_timesteps / base.num_train_timesteps)
        config = replace(config, start_timestep=start, num_inference_steps=min(base.num_inference_steps, max(start, 1)))
    if variant.signal is not None:
        abar = DDIMScheduler(*(getattr(config, name) for name in SCHEDULE_FIELDS)).alphas_cumprod
        config = replace(config, start_timestep=int((abar - variant.signal).abs().argmin()))
    return config


def is_base(base: BridgeConfig, variant: Variant) -> bool:
    """Whether a variant is the base itself under another name; it is then not fitted again."""
    return resolve(base, variant) == base and replace(variant, label="", changes={}) == Variant("")


def scaled_bridge(config: BridgeConfig, train: Embeddings, scale: float, seed: int, checkpoint_path: str | Path | None = None, progress: bool = False) -> DiffusionLink:
    """``dl.train.train_bridge`` with another scale s; at s = sqrt(D) it is the same network, bit for bit.

    The prediction losses grow with s and L_topo does not, so lambda is multiplied by s / sqrt(D).
    """
    width = train.audio.shape[1]
    config = replace(config, topology_weight=config.topology_weight * scale / width**0.5)
    with seeded(seed, train.audio.device):
        link = DiffusionLink(width, scale=scale, **{name: getattr(config, name) for name in NETWORK_FIELDS + SCHEDULE_FIELDS + INFERENCE_FIELDS})
    link = link.to(train.audio.device)
    sampler = PairSampler(train.text_clip, len(train.audio))

    def loss_fn(network: torch.nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        clips, captions = sampler.draw(config.batch_size, generator)
        return bridge_losses(network, link.scheduler, link.scale * train.audio[clips], link.scale * train.text[captions], config, generator)

    fit(link.network, loss_fn, config, seed=seed, checkpoint_path=checkpoint_path, progress=progress,
        identity={"recipe": "scaled bridge", "scale": float(scale), "data": [train.audio, train.text, train.text_clip]})
    return link.eval()


def variant_runs(
    profile: Profile, variant: Variant, train: Embeddings, audio: Tensor, seed: int, progress: bool = False
) -> list[tuple[int, int, Tensor]]:
    """Fit one variant with one training seed, or read the fit, and map ``audio``: (seed, noise seed, mapped (n, D)) for each noise seed.

    A fit on other data lies in a folder of its own, because ``fit_system`` names fits by their settings alone.
    """
    config, pairs = resolve(base_config(profile), variant), few_pairs(train, variant.fraction, seed)
    place = profile if variant.fraction == 1 else replace(profile, results_root=profile.cache_dir / "pairs" / f"{variant.fraction:g}-{seed}")
    if variant.system != "diffusion_link":
        own = chosen(profile, variant.system) | ({"train_steps": config.train_steps} if REGISTRY[variant.system].trained else {})
        return map_runs(fit_system(place, variant.system, pairs, seed, progress, **own), audio, seed, profile.noise_seeds)
    if variant.scale is not None:
        path = profile.cache_dir / "fits" / f"scaled-{short_hash(config=asdict(config), scale=float(variant.scale))}-{seed}.safetensors"
        link = scaled_bridge(config, pairs, variant.scale, seed, path, progress)
        noise_seeds = profile.noise_seeds if config.add_noise else (0,)
        return [(seed, noise_seed, link(audio.to(train.audio.device), generator=torch.Generator().manual_seed(noise_seed)).to(audio.device))
                for noise_seed in noise_seeds]
    middle = build("raw").fit(pairs.audio, pairs.text, pairs.text_clip)
    if variant.centred:
        place = replace(profile, results_root=profile.cache_dir / "centred")
        pairs = replace(pairs, audio=centre(pairs.audio, middle.audio_mean), text=centre(pairs.text, middle.text_mean))
        audio = centre(audio, middle.audio_mean)
    peer = fit_system(place, "diffusion_link", pairs, seed, progress, **asdict(config))
    peer.stochastic = config.add_noise
    runs = map_runs(peer, audio, seed, profile.noise_seeds)
    return [(s, k, uncentre(mapped, middle.text_mean, middle.text_radius)) for s, k, mapped in runs] if variant.centred else runs


def fit_variants(profile: Profile, variants: Iterable[Variant], train: Embeddings, seeds: tuple[int, ...]) -> None:
    """Put the fits of many variants into the cache, several side by side where there is no GPU; each fit once, however many variants call it."""
    config = base_config(profile)
    distinct: dict[str, Variant] = {}
    for variant in variants:
        training = {name: value for name, value in asdict(resolve(config, variant)).items() if name not in INFERENCE_FIELDS}
        distinct.setdefault(short_hash(of=[variant.system, variant.fraction, variant.scale, variant.centred], training=training), variant)
    trained = [variant for variant in distinct.values() if REGISTRY[variant.system].trained]
    side_by_side(_keep_fit, [(profile, variant, train, seed) for variant in trained for seed in seeds], profile.processes)


def _keep_fit(profile: Profile, variant: Variant, train: Embeddings, seed: int) -> None:
    variant_runs(profile, variant, train, train.audio[:2], seed)


# ------------------------------------------------------------------------------------------------------------------- scores
class WeightedMetric(ClipCounts):
    """A metric that is any function of the clips' weights (R, n) -> (R,), as ``score_clips`` takes it."""

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(weights.sum(1) > 0, self.statistic(weights), np.nan)


def five_metrics(mapped: Tensor, reference: Reference) -> dict[str, np.ndarray | ClipCounts]:
    """The five figures of ``METRICS``, as ``dl.gap.gap_metrics`` defines them, in the form that ``score_clips`` takes."""
    audio, text = mapped.numpy().astype(np.float64), reference.text.astype(np.float64)
    found = top_k(audio @ reference.gallery.astype(np.float64).T, 10)
    nothing = np.empty((len(audio), 0))
    return {
        "pair_cosine": np.einsum("id,id->i", audio, text),
        "centroid_gap": WeightedMetric(nothing, lambda weights: centroid_gap(audio, text, weights)),
        "rmg": WeightedMetric(nothing, lambda weights: rmg(audio, text, weights)),
        "recall_at_10": (reference.gallery_clip[found] == np.arange(len(audio))[:, None]).any(1).astype(float),
        "effective_rank": WeightedMetric(nothing, lambda weights: effective_rank(audio, weights)),
    }


def score_file(profile: Profile, variant: Variant, train: Embeddings, test: Embeddings, draws: Draws, seeds: tuple[int, ...]) -> Path:
    """Where a variant's scores are kept, named by everything they depend on."""
    settings = {f.name: getattr(variant, f.name) for f in fields(Variant) if f.name not in ("label", "changes")}
    settings["config"] = asdict(resolve(base_config(profile), variant))
    tuned = {} if variant.system == "diffusion_link" else chosen(profile, variant.system)
    key = short_hash(settings=settings, tuned=tuned, seeds=list(seeds), noise_seeds=list(profile.noise_seeds), scoring=[SCORING, len(draws.seed)],
                     train=[train.audio, train.text, train.text_clip], test=[test.audio, test.text, test.text_clip], recipe=BRIDGE_RECIPE)
    return profile.cache_dir / "ablations" / f"{key}.json"


def score_variant(profile: Profile, variant: Variant, train: Embeddings, test: Embeddings, draws: Draws, seeds: tuple[int, ...],
                  progress: bool = False) -> tuple[str, SystemScores]:
    """Fit and score one variant, or read its scores from the cache.

    Returns:
        (key that names everything the scores depend on, scores of all runs with their replicates).
    """
    seeds = seeds if REGISTRY[variant.system].trained or variant.fraction < 1 else (0,)
    path = score_file(profile, variant, train, test, draws, seeds)
    if not path.is_file():
        reference = make_reference(test)
        runs = [run for seed in seeds for run in variant_runs(profile, variant, train, test.audio, seed, progress)]
        scores = score_clips(variant.label, [(seed, noise, five_metrics(mapped, reference)) for seed, noise, mapped in runs], draws)
        stored = {name: {metric: values.tolist() for metric, values in getattr(scores, name).items()} for name in ARRAYS}
        atomic_write(path, json.dumps({"runs": scores.runs, "n_items": scores.n_items, **stored}))
    stored = json.loads(path.read_text())
    points, replicates, clip_replicates = ({metric: np.array(values, dtype=float) for metric, values in stored[name].items()} for name in ARRAYS)
    return path.stem, SystemScores(variant.label, [(seed, noise) for seed, noise in stored["runs"]], stored["n_items"], points, replicates, clip_replicates)


def summary_rows(scores: SystemScores, each_seed: bool, **labels: object) -> list[dict]:
    """Rows of one variant: seed "all" with its s.d. over training seeds and its interval; ``each_seed`` adds each seed's mean over noise seeds."""
    rows = []
    for row in scores.rows(each_run=False, **labels):
        values = pd.Series(scores.points[row["metric"]], index=[seed for seed, _ in scores.runs]).groupby(level=0).mean()
        rows.append({**row, "sd": float(values.std()) if len(values) > 1 else None})
        if each_seed:
            rows += [{**labels, "system": scores.system, "n_items": scores.n_items, "metric": row["metric"], "seed": seed, "noise_seed": "all",
                      "value": float(value)} for seed, value in values.items()]
    return rows


def selection(profile: Profile, names: Iterable[str] | None = None) -> dict[str, tuple[Variant, ...]]:
    """The variants to run: all of them, those of ``names``, or in profile smoke the first few of two ablations.

    Raises:
        ValueError: an unknown name.
    """
    if names is None and profile.name == "smoke":
        return {name: ABLATIONS[name].variants[:count] for name, count in SMOKE.items()}
    names = list(ABLATIONS if names is None else names)
    if unknown := sorted(set(names) - set(ABLATIONS)):
        raise ValueError(f"unknown ablation {', '.join(unknown)}: choose from {', '.join(ABLATIONS)}")
    return {name: ABLATIONS[name].variants for name in names}


def run_ablations(profile: Profile, train: Embeddings, test: Embeddings, split: Split, names: Iterable[str] | None = None,
                  seeds: tuple[int, ...] | None = None, progress: bool = True, each_seed: bool = False) -> pd.DataFrame:
    """Fit and score every variant, write their rows to ``metrics.csv`` at the end, then ``ablations.csv`` and ``ablations.md``.

    Args:
        train, test: embeddings; fits see train only.
        split: the test split, for its recordings.
        names: which ablations; None takes all (in profile smoke two of them).
        seeds: training seeds; None takes the profile's.
        progress: print a line for each variant, and a bar for each fit.
        each_seed: also record a row for every training seed.

    Returns:
        what :func:`write_ablations` returns.
    """
    seeds = profile.seeds if seeds is None else seeds
    draws = make_draws([split.clusters[split.clip_ids.index(clip_id)] for clip_id in test.clip_ids], REPLICATES)
    file, config, rows = MetricsFile(profile), base_config(profile), []
    labels: dict[str, Any] = {"split": "test", "ids_sha256": ids_sha256(test.clip_ids)}

    def record(variant: Variant, name: str) -> SystemScores:
        key, scores = score_variant(profile, variant, train, test, draws, seeds, progress)
        scores.system = variant.label
        run = {**labels, "run_id": f"{profile.name}-{key[:8]}-{file.run['git_sha'][:8]}"}
        rows.extend(summary_rows(scores, each_seed, experiment=f"ablation:{name}", **run))
        if name != "base":
            rows.extend(paired_difference(scores, base, experiment=f"ablation:{name}:paired", **run))
        if progress:
            print(f"{name:>16} {variant.label:<22} " + " ".join(f"{metric} {scores.mean(metric):.4f}" for metric in METRICS), flush=True)
        return scores

    wanted = selection(profile, names)
    everything = [Variant("base"), *(variant for variants in wanted.values() for variant in variants)]
    if not all(score_file(profile, variant, train, test, draws, seeds).is_file() for variant in everything if REGISTRY[variant.system].trained):
        fit_variants(profile, everything, train, seeds)
    base = record(Variant("base"), "base")
    for name, variants in wanted.items():
        done = {variant.label: record(variant, name) for variant in variants if not is_base(config, variant)}
        for ours, theirs in ABLATIONS[name].compare:
            if ours in done and theirs in done:
                rows.extend(paired_difference(done[ours], done[theirs], experiment=f"ablation:{name}:paired", **labels))
    for name in ("base", *wanted):
        file.remove(experiment=[f"ablation:{name}", f"ablation:{name}:paired"])
    file.add([{column: value for column, value in row.items() if not column.startswith("clip_")} for row in rows])
    return write_ablations(profile)


def ablation_rows(profile: Profile) -> tuple[pd.DataFrame, Profile]:
    """The rows of all ablations in ``metrics.csv``, and the profile they are of: this one, or mini, whose rows are committed, where it has none.

    Raises:
        ValueError: there are none at all; the message says how to make them.
    """
    known = {f"ablation:{name}{end}" for name in ("base", *ABLATIONS) for end in ("", ":paired")}
    for source in (profile, get_profile("mini", results_root=profile.results_root), get_profile("mini", results_root=REPO / "results")):
        frame = MetricsFile(source).frame()
        if len(frame := frame[frame.experiment.isin(known)]):
            return frame, source
    raise ValueError("metrics.csv has no rows of ablations: run notebook 09 with full = True, or ./run_all.sh --only 09 --full")


def write_ablations(profile: Profile) -> pd.DataFrame:
    """Write ``ablations.csv`` and ``ablations.md`` from the rows of ``metrics.csv``; nothing is fitted or scored.

    Returns:
        the table as written: one row an ablation, variant and metric, the base among the variants of each ablation.
    """
    frame, source = ablation_rows(profile)
    config = base_config(source)
    base_labels = {name: [variant.label for variant in ablation.variants if is_base(config, variant)] for name, ablation in ABLATIONS.items()}
    return write_table(profile, frame, source, base_labels, config.train_steps)
