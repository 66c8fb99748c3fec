"""What Table 1 runs: hyper-parameters tuned on val with equal budgets, fits kept on disk, every system scored on test.

Every trial is a row of ``search.csv``; the criterion is the same for all systems: the lowest RMG on val ([ours], ``dl.report.claims``).
A tuned system gets eight fits of ``train_steps`` steps (a closed form: eight values of its parameter); the start step k* and the number of steps n
act at a call only and are swept on the fits. DDIM is called on the fit that was chosen for one step. Only the final fits, seeds 0, 1, 2, ever meet test.
"""
from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from dl.bridge.network import INFERENCE_FIELDS
from dl.config import BridgeConfig, Profile
from dl.data import Split, ids_sha256
from dl.encoder.clap import Embeddings
from dl.metrics.bootstrap import Draws, SystemScores, make_draws, make_reference, paired_difference, score_clips, score_system, text_floor
from dl.metrics.gap import gap_functions, gap_metrics
from dl.peers import REGISTRY, Peer, build
from dl.peers.trained import DiffusionLinkPeer, TrainedPeer
from dl.report.claims import TUNING_METRIC, comparisons
from dl.results import git_sha, search_file, search_paths
from dl.workers import side_by_side

Trial = dict[str, Any]


def grid(**choices: Iterable) -> list[Trial]:
    """Every combination of the choices, the last one varying fastest."""
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


START_STEPS = (0, 25, 50, 100, 200, 300, 400, 500, 600)      # k*
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
FITS: dict[str, list[Trial]] = {                              # eight a system; DDIM takes diffusion_link's
    "ridge": grid(alpha=[1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0]),
    "pls_head": grid(num_directions=[10, 20, 30, 50, 70, 100, 150, 256]),
    "projection": grid(scale=[5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0, 200.0]),
    "regression_mlp": grid(learning_rate=LEARNING_RATES, dropout=[0.1, 0.3]),
    "regression_mlp_topology": grid(topology_weight=[0.1, 1.0], learning_rate=[5e-4, 1e-3], dropout=[0.1, 0.3]),
    "seed": grid(learning_rate=LEARNING_RATES, dropout=[0.0, 0.1]),
    "diffusion_link": grid(topology_weight=[0.0, 0.1, 1.0, 10.0], learning_rate=[5e-4, 1e-3]),
    "diffusion_bridge": grid(learning_rate=[8e-5, 2.5e-4, 5e-4, 1e-3], batch_size=[64, 256]),
    "conditional_diffusion": grid(learning_rate=LEARNING_RATES, dropout=[0.0, 0.1]),
}
INFERENCE: dict[str, list[Trial]] = {                         # swept on every fit
    "diffusion_link": grid(start_timestep=START_STEPS, num_inference_steps=[1]),
    "diffusion_link_ddim": [trial for trial in grid(start_timestep=START_STEPS, num_inference_steps=[5, 10])
                            if trial["num_inference_steps"] <= trial["start_timestep"]],
    "diffusion_bridge": grid(start_timestep=[100, 200, 300, 400, 500, 600, 700, 800], num_inference_steps=[5]),
    "conditional_diffusion": grid(start_timestep=[999], num_inference_steps=[10, 25, 50]),
}
ONLY_FULL = ("regression_mlp_topology", "conditional_diffusion", "text_to_audio")    # slow, and no rule demands them (C1: "that was run")
WATCHED = (TUNING_METRIC, "pair_cosine", "centroid_gap", "recall_at_10", "effective_rank")


def chosen(profile: Profile, system: str) -> Trial:
    """The hyper-parameters that ``search.csv`` marks as chosen for a system; none where it was not tuned.

    A profile's own search comes first, else that of ``mini``, which is committed; with another encoder the profile's defaults hold.
    """
    for path in search_paths(profile):
        if path.is_file():
            frame = pd.read_csv(path, dtype=str)
            best = frame[(frame.system == system) & (frame.chosen == "1")]
            if len(best):
                return json.loads(best.params.iloc[0])
    return {}


def table1_systems(full: bool = False) -> list[str]:
    """The rows of Table 1, in its order; without ``full`` those of ``ONLY_FULL`` are left out. ``capdec`` maps no vector, its row would be ``raw`` once more."""
    return [system for system in REGISTRY if system != "capdec" and (full or system not in ONLY_FULL)] + ["text_floor"]


def fit_system(
    profile: Profile, system: str, train: Embeddings, seed: int = 0, progress: bool = False, val: Embeddings | None = None, **hyper_parameters: Any
) -> Peer:
    """Fit a system, or read the same fit from the cache; ``hyper_parameters`` go over the chosen ones.

    Trained systems take ``profile.bridge.train_steps`` steps. Two systems that differ at a call only (one step, DDIM) share a fit.
    With ``val`` the history of a new fit of the bridge holds its pair cosine on val.
    """
    hyper_parameters = {**chosen(profile, system), **hyper_parameters}
    kind = REGISTRY[system]
    if not issubclass(kind, TrainedPeer):
        return build(system, **hyper_parameters).fit(train.audio, train.text, train.text_clip, seed=seed)
    peer = kind(**{"train_steps": profile.bridge.train_steps, **_base(profile, kind), **hyper_parameters})
    family = "bridge" if isinstance(peer, DiffusionLinkPeer) else system
    training = {name: value for name, value in asdict(peer.config).items() if name not in INFERENCE_FIELDS}
    key = hashlib.sha256(json.dumps(training, sort_keys=True).encode()).hexdigest()[:12]
    path = profile.cache_dir / "fits" / f"{family}-{key}-{seed}.safetensors"
    return peer.fit(train.audio, train.text, train.text_clip, seed=seed, checkpoint_path=path, progress=progress,
                    val=None if val is None else (val.audio, val.first_text))


def fit_systems(
    profile: Profile, systems: Iterable[str], train: Embeddings, val: Embeddings | None = None, progress: bool = False,
) -> dict[tuple[str, int], Peer]:
    """Fit every system with every training seed (a closed form: seed 0), several fits side by side where there is no GPU.

    Args:
        val: see :func:`fit_system`.

    Returns:
        (system, seed) -> peer.
    """
    fits = [(system, seed) for system in systems for seed in (profile.seeds if REGISTRY[system].trained else (0,))]
    kinds = {name: kind for name, kind in REGISTRY.items() if issubclass(kind, TrainedPeer)}
    trained = [(system, seed) for system, seed in fits if system in kinds]
    trained.sort(key=lambda fit: -kinds[fit[0]].defaults.self_weight)                  # text rows double a step; long fits first leave no core idle at the end
    side_by_side(_keep_fit, [(profile, system, train, seed, False, val) for system, seed in trained], profile.processes)
    return {(system, seed): fit_system(profile, system, train, seed, progress, val) for system, seed in fits}


def _keep_fit(profile: Profile, system: str, train: Embeddings, seed: int, progress: bool, val: Embeddings | None) -> None:
    """``fit_system`` for what it leaves in the cache."""
    fit_system(profile, system, train, seed, progress, val)


def _base(profile: Profile, kind: type[TrainedPeer]) -> Trial:
    """What a trained system takes from the profile before tuning: what the profile sets, where the system's recipe has no value of its own."""
    common, recipe, own = (asdict(config) for config in (BridgeConfig(), kind.defaults, profile.bridge))
    set_here = {name: value for name, value in own.items() if value != common[name] and recipe[name] == common[name]}
    return set_here | ({"batch_size": profile.bridge.batch_size} if profile.name == "smoke" else {})


def map_runs(peer: Peer, audio: Tensor, seed: int, noise_seeds: tuple[int, ...], space: str = "text") -> list[tuple[int, int, Tensor]]:
    """(seed, noise seed, mapped (n, D)) for every noise seed; one entry where the system adds no noise."""
    return [(seed, noise_seed, peer(audio, noise_seed=noise_seed, space=space)) for noise_seed in (noise_seeds if peer.stochastic else (0,))]


def fits_to_try(profile: Profile, system: str) -> list[Trial]:
    """The fits of a search; DDIM is another way to call the networks of ``diffusion_link``, so it takes that system's chosen fit."""
    if system != "diffusion_link_ddim":
        return FITS[system]
    return [{name: value for name, value in chosen(profile, "diffusion_link").items() if name not in INFERENCE_FIELDS}]


def sweep(peer: Peer, val: Embeddings, trials: list[Trial], noise_seeds: tuple[int, ...]) -> list[dict[str, float]]:
    """Score a fitted peer on val for each way of calling it: the mean of the watched metrics over noise seeds."""
    reference = make_reference(val)
    rows = []
    for trial in trials:
        if trial:
            peer.set_inference(**trial)
        scores = [gap_metrics(mapped, reference) for _, _, mapped in map_runs(peer, val.audio, 0, noise_seeds)]
        rows.append({metric: sum(float(score[metric][0]) for score in scores) / len(scores) for metric in WATCHED})
    return rows


def search(profile: Profile, system: str, train: Embeddings, val: Embeddings, progress: bool = True) -> Trial:
    """Tune one system on val with training seed 0, write every trial to ``search.csv``, and return the chosen one."""
    file = search_file(profile)
    number = 0
    rows: list[Trial] = []
    best: tuple[float, Trial] = (float("inf"), {})
    for fit_trial in fits_to_try(profile, system):
        started = time.perf_counter()
        call_trials = INFERENCE.get(system, [{}])
        peer = fit_system(profile, system, train, seed=0, progress=progress, **fit_trial)
        for call_trial, scores in zip(call_trials, sweep(peer, val, call_trials, profile.noise_seeds[:2]), strict=True):
            params = {**fit_trial, **call_trial}
            best = min(best, (scores[TUNING_METRIC], params), key=lambda entry: entry[0])
            shared: Trial = {"system": system, "trial": number, "params": json.dumps(params), "split": "val", "seed": 0, "noise_seed": "all",
                      "train_steps": profile.bridge.train_steps if peer.trained else 0, "git_sha": git_sha(),
                      "wall_s": round(time.perf_counter() - started, 1)}
            rows += [{**shared, "metric": metric, "value": value} for metric, value in scores.items()]
            number += 1
    for row in rows:
        row["chosen"] = int(json.loads(row["params"]) == best[1])
    file.remove(system=system)
    file.add(rows)
    return best[1]


def score_table(
    profile: Profile, systems: list[str], train: Embeddings, test: Embeddings, split: Split, progress: bool = True
) -> tuple[dict[tuple[str, str], SystemScores], list[dict]]:
    """Fit every system with every training seed and score it on test, several systems side by side where there is no GPU.

    Args:
        systems: names of the registry, and "text_floor".
        split: the test split, for recordings and labels.

    Returns:
        ((system, space) -> scores; the rows for ``metrics.csv``). A centred system is also scored in its own space, text_to_audio in
        space audio alone: its mapped texts among the sounds. Parts of the split (``test:seen``) have the watched metrics; the paired
        differences that the verdict rules ask for are among the rows.
    """
    place = [split.clip_ids.index(clip_id) for clip_id in test.clip_ids]               # clips may have been skipped
    frame = split.frame.iloc[place]
    labels = [frozenset(cell.split(";")) for cell in frame.labels] if "labels" in frame else None
    draws = make_draws([split.clusters[i] for i in place], profile.bootstrap_samples)
    subsets = {
        "test:seen": (frame.seen == "1").to_numpy(), "test:unseen": (frame.seen == "0").to_numpy(),
        "test:new_source": (frame.shares_source == "0").to_numpy(),
    } if "seen" in frame else {}
    shared: dict[str, Any] = {"experiment": "gap", "dataset": profile.data_dir.name, "ids_sha256": ids_sha256(test.clip_ids)}
    fitted = fit_systems(profile, [system for system in systems if system != "text_floor"], train, progress=progress)
    peers = {system: {seed: peer for (name, seed), peer in fitted.items() if name == system} for system in systems}
    parts = [(system, peers[system], test, labels, draws, subsets, profile.noise_seeds, shared) for system in systems]
    scores: dict[tuple[str, str], SystemScores] = {}
    rows: list[dict] = []
    for system, (of_system, rows_of_system) in zip(systems, side_by_side(_score, parts, profile.processes, gb_each=1.2), strict=True):
        scores |= of_system
        rows += rows_of_system
        if system == "text_floor":
            continue
        space, source = ("audio", opposite(test)) if system == "text_to_audio" else ("text", test)
        peer = next(iter(peers[system].values()))
        costs = {"parameters": peer.num_parameters, "ms_per_1000": time_per_1000(peer, source.audio)}
        rows += [{**shared, "system": system, "split": "test", "space": space, "seed": "all", "noise_seed": "all", "n_items": len(test.clip_ids),
                  "metric": metric, "value": value} for metric, value in costs.items()]
    ours = scores.get(("diffusion_link", "text"))
    for baseline in comparisons("gap"):
        if ours and (baseline, "text") in scores:
            rows += paired_difference(ours, scores[baseline, "text"], **{**shared, "experiment": "gap:paired"}, split="test", space="text")
    return scores, rows


def _score(
    system: str, peers: dict[int, Peer], test: Embeddings, labels: list[frozenset[str]] | None, draws: Draws, subsets: dict[str, NDArray],
    noise_seeds: tuple[int, ...], shared: dict[str, Any],
) -> tuple[dict[tuple[str, str], SystemScores], list[dict]]:
    """What ``score_table`` returns, of one system, given the peer of every training seed."""
    if system == "text_floor":
        mapped, reference = text_floor(test, make_reference(test, labels))
        floor = score_system(system, [(0, 0, mapped)], reference, draws)
        return {(system, "text"): floor}, floor.rows(**shared, split="test", space="text")
    scores: dict[tuple[str, str], SystemScores] = {}
    rows: list[dict] = []
    peer = next(iter(peers.values()))
    spaces, source = (("audio",), opposite(test)) if system == "text_to_audio" else (("text", "centred") if peer.centred else ("text",), test)
    for space in spaces:
        reference = make_reference(source, labels, (peer.audio_mean.float(), peer.text_mean.float()) if space == "centred" else None)
        runs = [run for seed, of_seed in peers.items()
                for run in map_runs(of_seed, source.audio, seed, noise_seeds, "text" if space == "audio" else space)]
        functions = [(seed, noise_seed, gap_functions(vectors, reference)) for seed, noise_seed, vectors in runs]
        scores[system, space] = score_clips(system, functions, draws)
        rows += scores[system, space].rows(**shared, split="test", space=space)
        watched = [(seed, noise_seed, {metric: of_run[metric] for metric in WATCHED}) for seed, noise_seed, of_run in functions]
        for name, mask in subsets.items() if space == "text" else ():
            rows += score_clips(system, watched, draws, mask, heavy_samples=0).rows(each_run=False, **shared, split=name, space=space)
    return scores, rows


def opposite(embeddings: Embeddings) -> Embeddings:
    """A split with the roles swapped, for text_to_audio: the first caption of each clip is what is mapped, its sound what is looked for."""
    return replace(embeddings, audio=embeddings.first_text, text=embeddings.audio, text_clip=torch.arange(len(embeddings.clip_ids)), captions=[])


def time_per_1000(peer: Peer, audio: Tensor, repeats: int = 3) -> float:
    """Milliseconds to map 1,000 vectors, the median of ``repeats`` calls, or of those that a second had room for."""
    batch = audio[torch.arange(1000) % len(audio)]
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1000:
        started = time.perf_counter()
        peer(batch)
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[len(times) // 2]
