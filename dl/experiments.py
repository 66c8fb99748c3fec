"""What Tables 1 and 2 run: tuning on val, fits, caption decoders, captions, scores on test.

On a CPU several processes of few threads do more than one of many: a bridge and a caption are made of small matrices.
Each fit, and the captions of each row, are kept on disk, so a killed run goes on where it was. The number of processes
depends on the machine and the number of parts alone: a resumed run gives the same bytes as an undisturbed one.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any
from weakref import WeakValueDictionary

import joblib
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dl.bootstrap import Draws, SystemScores, make_draws, make_reference, paired_difference, score_clips, text_floor
from dl.bridge import INFERENCE_FIELDS
from dl.caption_metrics import CaptionResults, Run, candidates_path, score_caption_runs, write_candidates
from dl.captioner import LLMCaptioner, language_model_version
from dl.captioner_train import DECODER_RECIPE, DECODING_FIELDS, train_captioner
from dl.clap import Embeddings
from dl.config import BridgeConfig, Profile, number_format
from dl.data import Split, ids_sha256
from dl.gap import gap_functions, gap_metrics
from dl.peers import PEERS_RECIPE, REGISTRY, DiffusionBridge, DiffusionLinkPeer, Peer, TrainedPeer, build, centre
from dl.report import TUNING_METRIC, comparisons
from dl.store import Key, MetricsFile, atomic_write, content, git_sha, key, search_file, search_paths
from dl.train import BRIDGE_RECIPE

MEMORY_GB = 5.0       # that all processes may take beside this one; a laptop of 8 GB is enough
GB_EACH = 2.3         # of a fit, or of a decoder at work, with SmolLM2-135M in float32; 2.1 GB were measured
Scores = dict[tuple[str, str], SystemScores]      # (system, space) -> scores
Trial = dict[str, Any]


def side_by_side(function: Callable, parts: Iterable[tuple], processes: int = 0, gb_each: float = 0.6) -> list:
    """``[function(*part) for part in parts]``, several calls at a time, the results in the order of ``parts``.

    Args:
        processes: at most so many; 0 takes one a core, or one a part where there are fewer than twice as many parts as
            cores. With one, or on a machine with a GPU, all is done in this process.
        gb_each: memory of one call, GB (10^9 bytes); ``MEMORY_GB`` bounds the sum.

    Raises:
        Exception: what the first failing call raised; calls that have not begun are left out.
    """
    parts, cores = list(parts), joblib.cpu_count()                  # those that this process may use
    wanted = processes or (len(parts) if len(parts) < 2 * cores else cores)
    count = min(wanted, len(parts), int(MEMORY_GB / gb_each))
    try:
        multiprocessing.Lock()
    except (ImportError, OSError):                                  # no /dev/shm: processes cannot wait for each other
        count = 1
    if count < 2 or torch.accelerator.is_available():
        return [function(*part) for part in parts]
    try:
        with parallel_config("loky", inner_max_num_threads=max(1, cores // count)):
            calls = (delayed(_call)(function, part, os.getpid()) for part in parts)
            return Parallel(count, batch_size=1, pre_dispatch=count)(calls)
    finally:
        get_reusable_executor().shutdown(kill_workers=True)         # idle ones would keep their memory


def _call(function: Callable, part: tuple, parent: int) -> object:
    _end_with(parent)
    return function(*part)


@cache
def _end_with(parent: int) -> None:
    """From now on this process ends when its parent does, however that happens."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------- Table 1: tuning on val, fits
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
INFERENCE: dict[str, list[Trial]] = {                         # tried on every fit
    "diffusion_link": grid(start_timestep=START_STEPS, num_inference_steps=[1]),
    "diffusion_link_ddim": [trial for trial in grid(start_timestep=START_STEPS, num_inference_steps=[5, 10])
                            if trial["num_inference_steps"] <= trial["start_timestep"]],
    "diffusion_bridge": grid(start_timestep=[100, 200, 300, 400, 500, 600, 700, 800], num_inference_steps=[5]),
    "conditional_diffusion": grid(start_timestep=[999], num_inference_steps=[10, 25, 50]),
}
ONLY_FULL = ("regression_mlp_topology", "conditional_diffusion", "text_to_audio")     # slow, and no rule demands them
WATCHED = (TUNING_METRIC, "pair_cosine", "centroid_gap", "recall_at_10", "effective_rank")


def chosen(profile: Profile, system: str) -> Trial:
    """The hyper-parameters that ``search.csv`` marks as chosen for a system; none where it was not tuned.

    A profile's own search comes first, else the committed one of ``mini``, which holds for its encoder alone.
    """
    for path in filter(Path.is_file, search_paths(profile)):
        frame = pd.read_csv(path, dtype=str)
        best = frame[(frame.system == system) & (frame.chosen == "1")]
        if len(best):
            return json.loads(best.params.iloc[0])
    return {}


def table1_systems(full: bool = False) -> list[str]:
    """The rows of Table 1; ``full`` adds ``ONLY_FULL``. ``capdec`` maps no vector, as ``raw``."""
    return [name for name in REGISTRY if name != "capdec" and (full or name not in ONLY_FULL)] + ["text_floor"]


def fit_system(profile: Profile, system: str, train: Embeddings, seed: int = 0, val: Embeddings | None = None,
               **hyper_parameters: Any) -> Peer:
    """Fit a system, or read the same fit from the cache; ``hyper_parameters`` go over the chosen ones.

    Trained systems take ``profile.bridge.train_steps`` steps. Two systems that differ at a call only (one step, DDIM)
    share a fit. With ``val`` the history of a new fit of the bridge holds its pair cosine on val.
    """
    peer = unfitted(profile, system, **hyper_parameters)
    if not isinstance(peer, TrainedPeer):
        return peer.fit(train.audio, train.text, train.text_clip, seed=seed)
    family = "bridge" if isinstance(peer, DiffusionLinkPeer) else system
    path = profile.cache_dir / "fits" / f"{family}-{fit_key(peer, train, seed).digest}-{seed}.safetensors"
    return peer.fit(train.audio, train.text, train.text_clip, seed=seed, checkpoint_path=path,
                    val=None if val is None else (val.audio, val.first_text))


def unfitted(profile: Profile, system: str, **hyper_parameters: Any) -> Peer:
    """A system with the hyper-parameters chosen on val, and ``hyper_parameters`` over them.

    What the profile itself sets holds for every trained system whose recipe has no value of its own.
    """
    values = {**chosen(profile, system), **hyper_parameters}
    kind = REGISTRY[system]
    if not issubclass(kind, TrainedPeer):
        return build(system, **values)
    common, recipe, own = (asdict(config) for config in (BridgeConfig(), kind.defaults, profile.bridge))
    base = {name: value for name, value in own.items() if value != common[name] and recipe[name] == common[name]}
    base |= {"train_steps": profile.bridge.train_steps}
    base |= {"batch_size": profile.bridge.batch_size} if profile.name == "smoke" else {}
    return kind(**{**base, **values})


def fit_key(peer: Peer, train: Embeddings, seed: int) -> Key:
    """Names a fit by what decides it, before it is made; two systems that differ at a call only share it."""
    if not isinstance(peer, TrainedPeer):
        settings = {name: value for name, value in vars(peer).items() if isinstance(value, int | float | str)}
        return key("fit", PEERS_RECIPE, system=type(peer).__name__, settings=settings, data=train.key)
    settings = {name: value for name, value in asdict(peer.config).items() if name not in INFERENCE_FIELDS}
    kind = "bridge" if isinstance(peer, DiffusionLinkPeer) else type(peer).__name__
    return key("fit", PEERS_RECIPE, bridge=BRIDGE_RECIPE, system=kind, settings=settings, seed=seed, data=train.key)


def mapping_key(profile: Profile, system: str, train: Embeddings, seed: int, space: str = "text") -> Key:
    """Names the vectors that a system gives: its fit, how it is called, and the noise seed of :data:`NOISE_SEED`."""
    if system not in REGISTRY:
        return key("mapping", PEERS_RECIPE, system=system)
    peer = unfitted(profile, system)
    settings = asdict(peer.config) if isinstance(peer, TrainedPeer) else {}
    call = {name: value for name, value in settings.items() if name in INFERENCE_FIELDS}
    return key("mapping", PEERS_RECIPE, fit=fit_key(peer, train, seed if peer.trained else 0), call=call,
               noise_seed=NOISE_SEED, space=space)


def fit_systems(profile: Profile, systems: Iterable[str], train: Embeddings,
                val: Embeddings | None = None) -> dict[tuple[str, int], Peer]:
    """(system, seed) -> peer: every system fitted with every training seed, a closed form with seed 0.

    Trained ones are fitted side by side where there is no GPU. ``val``: see :func:`fit_system`.
    """
    def keep(system: str, seed: int) -> None:
        fit_system(profile, system, train, seed, val)

    fits = [(system, seed) for system in systems for seed in (profile.seeds if REGISTRY[system].trained else (0,))]
    trained = [fit for fit in fits if REGISTRY[fit[0]].trained]
    side_by_side(keep, trained[::-1], profile.processes)            # the bridge's fits are the longest: they begin
    return {(system, seed): fit_system(profile, system, train, seed, val) for system, seed in fits}


def map_runs(peer: Peer, audio: Tensor, seed: int, noise_seeds: tuple[int, ...],
             space: str = "text") -> list[tuple[int, int, Tensor]]:
    """(seed, noise seed, mapped (n, D)) for every noise seed; one entry where the system adds no noise."""
    return [(seed, noise_seed, peer(audio, noise_seed=noise_seed, space=space))
            for noise_seed in (noise_seeds if peer.stochastic else (0,))]


def search(profile: Profile, system: str, train: Embeddings, val: Embeddings) -> Trial:
    """Tune one system on val with training seed 0, write every trial to ``search.csv``, and return the chosen one."""
    bridge = {name: value for name, value in chosen(profile, "diffusion_link").items() if name not in INFERENCE_FIELDS}
    reference, trials = make_reference(val), []
    for fit_trial in FITS.get(system, [bridge]):                    # DDIM calls the chosen networks in another way
        started = time.perf_counter()
        peer = fit_system(profile, system, train, **fit_trial)
        for call_trial in INFERENCE.get(system, [{}]):
            if isinstance(peer, TrainedPeer):
                peer.set_inference(**call_trial)
            scores = [gap_metrics(mapped, reference, only=WATCHED)
                      for _, _, mapped in map_runs(peer, val.audio, 0, profile.noise_seeds[:2])]
            means = {metric: sum(float(score[metric][0]) for score in scores) / len(scores) for metric in WATCHED}
            trials.append(({**fit_trial, **call_trial}, means, round(time.perf_counter() - started, 1)))
    best = min(trials, key=lambda trial: trial[1][TUNING_METRIC])[0]
    shared = {"system": system, "split": "val", "seed": 0, "noise_seed": "all", "git_sha": git_sha(),
              "train_steps": profile.bridge.train_steps if peer.trained else 0}
    file = search_file(profile)
    file.remove(system=system)
    file.add([{**shared, "trial": number, "params": json.dumps(params), "metric": metric, "value": value,
               "chosen": int(params == best), "wall_s": seconds}
              for number, (params, means, seconds) in enumerate(trials) for metric, value in means.items()])
    return best


# ---------------------------------------- Table 1: scores on test
def score_table(profile: Profile, systems: list[str], train: Embeddings, test: Embeddings,
                split: Split) -> tuple[Scores, list[dict]]:
    """Fit every system with every training seed and score it on test, several side by side where there is no GPU.

    Args:
        systems: names of the registry, and "text_floor".
        split: the test split, for recordings and labels.

    Returns:
        ((system, space) -> scores; the rows for ``metrics.csv``). A centred system is also scored in its own space,
        text_to_audio in space audio alone: its mapped texts among the sounds. Parts of the split (``test:seen``) have
        the watched metrics. The paired differences that the verdict rules ask for are among the rows.
    """
    place = [split.clip_ids.index(clip_id) for clip_id in test.clip_ids]               # clips may have been skipped
    frame = split.frame.iloc[place]
    labels = [frozenset(cell.split(";")) for cell in frame.labels] if "labels" in frame else None
    draws = make_draws([split.clusters[i] for i in place], profile.bootstrap_samples)
    subsets = {
        "test:seen": (frame.seen == "1").to_numpy(), "test:unseen": (frame.seen == "0").to_numpy(),
        "test:new_source": (frame.shares_source == "0").to_numpy(),
    } if "seen" in frame else {}
    shared: dict[str, Any] = {"dataset": profile.data_dir.name, "ids_sha256": ids_sha256(test.clip_ids)}
    gap = shared | {"experiment": "gap"}
    fitted = fit_systems(profile, [system for system in systems if system != "text_floor"], train)
    peers = {system: {seed: peer for (name, seed), peer in fitted.items() if name == system} for system in systems}
    parts = [(system, peers[system], test, labels, draws, subsets, profile.noise_seeds, gap) for system in systems]
    scores: Scores = {}
    rows: list[dict] = []
    for system, (its_scores, its_rows) in zip(systems, side_by_side(_score, parts, profile.processes, 1.2),
                                              strict=True):
        scores |= its_scores
        rows += its_rows
        if system == "text_floor":
            continue
        peer = next(iter(peers[system].values()))
        (space, *_), source = _spaces(system, peer, test)
        batch = source.audio[torch.arange(1000) % len(source.audio)]
        costs = {"parameters": peer.num_parameters,
                 "ms_per_1000": 1000 * median(repeat(partial(peer, batch), number=1, repeat=3))}
        rows += [{**gap, "system": system, "split": "test", "space": space, "seed": "all", "noise_seed": "all",
                  "n_items": len(test.clip_ids), "metric": metric, "value": value} for metric, value in costs.items()]
    pair: dict[str, Any] = {**shared, "experiment": "gap:paired", "split": "test", "space": "text"}
    for baseline in comparisons("gap"):
        if {("diffusion_link", "text"), (baseline, "text")} <= scores.keys():
            rows += paired_difference(scores["diffusion_link", "text"], scores[baseline, "text"], **pair)
    return scores, rows


def _spaces(system: str, peer: Peer, test: Embeddings) -> tuple[tuple[str, ...], Embeddings]:
    """The spaces that a system is scored in, and what it maps: text_to_audio the first captions, among the sounds."""
    if system == "text_to_audio":
        clips = torch.arange(len(test.clip_ids))
        return ("audio",), replace(test, audio=test.first_text, text=test.audio, text_clip=clips, captions=[])
    return ("text", "centred") if peer.centred else ("text",), test


def _score(system: str, peers: dict[int, Peer], test: Embeddings, labels: list[frozenset[str]] | None, draws: Draws,
           subsets: dict[str, NDArray], noise_seeds: tuple[int, ...], shared: dict) -> tuple[Scores, list[dict]]:
    """What ``score_table`` returns, of one system, given the peer of every training seed."""
    if system == "text_floor":
        mapped, reference = text_floor(test, make_reference(test, labels))
        floor = score_clips(system, [(0, 0, gap_functions(mapped, reference))], draws)
        return {(system, "text"): floor}, floor.rows(**shared, split="test", space="text")
    scores: Scores = {}
    rows: list[dict] = []
    peer = next(iter(peers.values()))
    spaces, source = _spaces(system, peer, test)
    for space in spaces:
        means = (peer.audio_mean.float(), peer.text_mean.float()) if space == "centred" else None
        reference = make_reference(source, labels, means)
        runs = [run for seed, of_seed in peers.items()
                for run in map_runs(of_seed, source.audio, seed, noise_seeds, "text" if space == "audio" else space)]
        functions = [(seed, noise_seed, gap_functions(vectors, reference)) for seed, noise_seed, vectors in runs]
        scores[system, space] = score_clips(system, functions, draws)
        rows += scores[system, space].rows(**shared, split="test", space=space)
        watched = [(seed, noise, {metric: of_run[metric] for metric in WATCHED}) for seed, noise, of_run in functions]
        for name, mask in subsets.items() if space == "text" else ():
            part = score_clips(system, watched, draws, mask, heavy_samples=0)
            rows += part.rows(each_run=False, **shared, split=name, space=space)
    return scores, rows


def record_rows(profile: Profile, rows: list[dict]) -> None:
    """Write rows to ``metrics.csv`` in place of those of the same experiment, split, system, space and decoding.

    All other rows stay: a quick run takes nothing away from what a longer one scored.
    """
    file = MetricsFile(profile)
    frame = pd.DataFrame([{"space": "text", "decoding": "", **row} for row in rows])
    for (space, decoding), made in frame.groupby(["space", "decoding"]):
        lists = {column: made[column].unique().tolist() for column in ("experiment", "split", "system")}
        file.remove(space=space, decoding=decoding, **lists)
    file.add(rows)


# ---------------------------------------- Table 2: rows and decoders
IN_USE: WeakValueDictionary[Path, LLMCaptioner] = WeakValueDictionary()       # decoders that somebody holds
NOISE_SEED = 0        # of a mapping that adds noise; its training seed is the decoder's seed
VAL_CLIPS = 128       # clips whose first caption makes the decoder's loss on val [ours]
TEXT_DECODERS = {     # decoders that are trained on text vectors alone: name -> the system whose mapping they need
    "text": "raw",                         # the text vectors as they are
    "text_noised": "capdec",               # norm(t + N(0, v I)), v as in Table 1 [peer: CapDec]
    "text_centred": "c3",                  # norm(centred t + N(0, v I)), v as in Table 1 [peer: C3]
    "text_bridged": "diffusion_bridge",    # centred t through the text-only chain, k = 400 [peer: Diffusion Bridge]
}


@dataclass(frozen=True)
class Row:
    """A row of Table 2: the vectors of ``system``, read in ``space``, go into ``decoder``."""

    system: str               # a name of ``dl.peers.REGISTRY``, or text_ceiling: the vector of the first reference
    decoder: str = "text"     # of ``TEXT_DECODERS``, or the system whose vectors of the training sounds trained it
    space: str = "text"       # or centred, for a method whose own decoder lives in the centred text space


ZERO_SHOT = tuple(Row(system) for system in ("raw", "ridge", "diffusion_bridge", "diffusion_link", "text_ceiling"))
SUPERVISED = (Row("raw", "raw"), Row("diffusion_link", "diffusion_link"))
DISJOINT = (Row("raw"), Row("ridge"), Row("diffusion_link"))
OWN_DECODERS = (Row("capdec", "text_noised"), Row("c3", "text_centred", "centred"),
                Row("diffusion_bridge", "text_bridged", "centred"))


def zero_shot_rows(profile: Profile, full: bool = False, own_decoders: bool = True) -> tuple[Row, ...]:
    """The rows of the zero-shot setting.

    Args:
        full: every mapping that has a closed form or was tuned on val (an untuned one would be compared unfairly), and
            the methods with decoders of their own. ``capdec`` with the common decoder would be ``raw`` once more.
        own_decoders: False leaves the latter out of a full run: three more decoders a seed.
    """
    if not full:
        return ZERO_SHOT
    tuned = [name for name, peer in REGISTRY.items()
             if name not in ("capdec", "text_to_audio") and (not peer.trained or chosen(profile, name))]
    return (*map(Row, tuned), *(OWN_DECODERS if own_decoders else ()), Row("text_ceiling"))


def supervised_rows(full: bool = False) -> tuple[Row, ...]:
    """The rows of the supervised setting; ``full`` adds ridge, the control."""
    return (*SUPERVISED, Row("ridge", "ridge")) if full else SUPERVISED


def system_vectors(profile: Profile, row: Row, train: Embeddings, embeddings: Embeddings, seed: int) -> Tensor:
    """The vectors that a row feeds to its decoder, one a clip: (n, D) float32, unit norm."""
    if row.system == "text_ceiling":
        return embeddings.first_text
    peer = fit_system(profile, row.system, train, seed if REGISTRY[row.system].trained else 0)
    return peer(embeddings.audio, noise_seed=NOISE_SEED, space=row.space)


def decoder_pairs(profile: Profile, decoder: str, train: Embeddings, seed: int,
                  of: Embeddings | None = None) -> tuple[Tensor, list[str]]:
    """What trains a decoder: vectors and captions, one row a caption; a sound's vector goes with each of its captions.

    Args:
        decoder: see :class:`Row`.
        train: the training split, on which mappings are fitted.
        seed: of the mapping, and of the noise of ``text_noised`` and ``text_centred`` (one draw a caption).
        of: the split whose pairs are wanted; None takes ``train``.

    Returns:
        (vectors (N, D) float32, unit norm; N captions).
    """
    of = train if of is None else of
    noise = torch.randn(of.text.shape, generator=torch.Generator().manual_seed(seed))
    if decoder == "text":
        vectors = of.text
    elif decoder == "text_noised":
        variance = build("capdec", **chosen(profile, "capdec")).decoder_noise_variance
        vectors = normalize(of.text + variance**0.5 * noise, dim=1)
    elif decoder == "text_centred":
        peer = fit_system(profile, "c3", train)
        vectors = normalize(centre(of.text, peer.text_mean) + peer.decoder_noise_variance**0.5 * noise, dim=1)
    elif decoder == "text_bridged":
        bridge = fit_system(profile, "diffusion_bridge", train, seed)
        assert isinstance(bridge, DiffusionBridge)
        vectors = bridge.map_text(of.text)
    else:
        vectors = system_vectors(profile, Row(decoder), train, of, seed)[of.text_clip]
    return vectors, of.captions


def disjoint_halves(embeddings: Embeddings, split: Split, seed: int = 0) -> tuple[Embeddings, Embeddings]:
    """Two parts of a split's clips that share no recording; a clip that mixes recordings of both parts is in neither.

    Args:
        split: the data the embeddings were made from.
        seed: of the draw that deals the recordings out.
    """
    place = {clip_id: i for i, clip_id in enumerate(split.clip_ids)}
    clusters = [set(split.clusters[place[clip_id]]) for clip_id in embeddings.clip_ids]
    names = sorted(set().union(*clusters))
    first = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]}
    return (select_clips(embeddings, [i for i, members in enumerate(clusters) if members <= first]),
            select_clips(embeddings, [i for i, members in enumerate(clusters) if not members & first]))


def select_clips(embeddings: Embeddings, clips: list[int]) -> Embeddings:
    """Some clips of a split with their captions, in the order of ``clips`` (places, from 0, ascending)."""
    new = torch.full((len(embeddings.clip_ids),), -1)
    new[clips] = torch.arange(len(clips))
    rows = (new[embeddings.text_clip] >= 0).nonzero().squeeze(1)
    return replace(embeddings, clip_ids=[embeddings.clip_ids[i] for i in clips], audio=embeddings.audio[clips],
                   text=embeddings.text[rows], text_clip=new[embeddings.text_clip[rows]],
                   captions=[embeddings.captions[i] for i in rows.tolist()])


@dataclass(frozen=True)
class DecoderFit:
    """A decoder's training data and where its fit is kept; ``load`` trains it, or reads it if that was done before."""

    profile: Profile
    name: str                 # see :class:`Row`
    seed: int
    train: Embeddings
    val: Embeddings

    @property
    def key(self) -> Key:
        """What decides the fit; no mapping is fitted for it."""
        captioner = self.profile.captioner
        settings = {name: value for name, value in asdict(captioner).items() if name not in DECODING_FIELDS}
        mapping = mapping_key(self.profile, TEXT_DECODERS.get(self.name, self.name), self.train, self.seed)
        return key("decoder", DECODER_RECIPE, settings=settings, dtype=number_format(captioner.dtype), seed=self.seed,
                   trained_on=self.name, mapping=mapping, data=self.train.key, val=self.val.key,
                   language_model=language_model_version(captioner.language_model, captioner.revision))

    @property
    def path(self) -> Path:
        return self.profile.cache_dir / "captioners" / f"{self.name}-{self.seed}-{self.key.digest}.safetensors"

    @property
    def val_pairs(self) -> tuple[Tensor, list[str]]:
        """What watches it: the first caption of every clip of ``val``."""
        vectors, captions = decoder_pairs(self.profile, self.name, self.train, self.seed, self.val)
        first = np.unique(self.val.text_clip, return_index=True)[1]
        return vectors[first], [captions[i] for i in first]

    def load(self, progress: bool = False, accelerator: Accelerator | None = None) -> LLMCaptioner:
        """The fitted captioner in eval mode, its history (step, loss, val_loss, lr) as the attribute ``history``.

        One that is still in use somewhere is given again: a second 7B model would not fit beside it.
        """
        if (captioner := IN_USE.get(self.path)) is not None and self.path.is_file():
            return captioner
        vectors, captions = decoder_pairs(self.profile, self.name, self.train, self.seed)
        captioner = LLMCaptioner(vectors.shape[1], self.profile.captioner, seed=self.seed)
        captioner.history = train_captioner(captioner, vectors, captions, seed=self.seed, checkpoint_path=self.path,
                                            val=self.val_pairs, progress=progress, accelerator=accelerator)
        IN_USE[self.path] = captioner
        return captioner.eval()


def decoder_fit(profile: Profile, train_on: str, seed: int, train: Embeddings, val: Embeddings) -> DecoderFit:
    """The fit of the decoder called ``train_on``; nothing is trained yet. The first clips of ``val`` watch it.

    Raises:
        ValueError: no decoder or system has that name.

    Example:
        >>> decoder_fit(profile, "text", 0, train, val).load().generate(test.first_text[:2])
    """
    if train_on not in TEXT_DECODERS and train_on not in REGISTRY:
        raise ValueError(f"unknown decoder {train_on!r}: choose one of {', '.join([*TEXT_DECODERS, *REGISTRY])}")
    watched = select_clips(val, list(range(min(VAL_CLIPS, len(val.clip_ids)))))
    return DecoderFit(profile, train_on, seed, train, watched)


# ---------------------------------------- Table 2: captions and scores
def decoding_name(num_beams: int) -> str:
    """How metrics.csv calls it: greedy, beam 4."""
    return "greedy" if num_beams == 1 else f"beam {num_beams}"


def _caption_path(fit: DecoderFit, row: Row, test: Embeddings, beams: int, vectors: Tensor | None = None) -> Path:
    """The cache file of a row's captions; its name holds decoder, mapping or the vectors given, clips and decoding."""
    mapping: Key | str = content(vectors) if vectors is not None else mapping_key(
        fit.profile, row.system, fit.train, fit.seed, row.space)
    name = key("captions", DECODER_RECIPE, decoder=fit.key, mapping=mapping, clips=test.key, beams=beams,
               max_new_tokens=fit.profile.captioner.max_new_tokens)
    decoding = decoding_name(beams).replace(" ", "")
    file = f"{row.decoder}-{row.system}-{row.space}-{fit.seed}-{decoding}-{name.digest}.json"
    return fit.profile.cache_dir / "captions" / file


def _read_texts(path: Path, n: int) -> list[str] | None:
    """The n captions of a cache file; None where there is no file, and, with a line on stderr, where it is damaged."""
    if not path.is_file():
        return None
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        texts = None
    if isinstance(texts, list) and len(texts) == n and all(isinstance(text, str) for text in texts):
        return texts
    print(f"captions {path} are damaged (not {n} texts): they are generated anew", file=sys.stderr, flush=True)
    return None


def caption_rows(profile: Profile, rows: Iterable[Row], seed: int, train: Embeddings, val: Embeddings,
                 test: Embeddings, *, num_beams: int | None = None,
                 vectors_of: Callable[[Row], Tensor] | None = None) -> dict[Row, list[str]]:
    """row -> the captions of the n test clips, one training seed; what the cache holds is not generated again.

    Args:
        num_beams: None takes the profile's; 1 is greedy.
        vectors_of: row -> (n, D), where the vectors are not those of :func:`system_vectors`.
    """
    rows, found, beams = list(rows), {}, num_beams or profile.captioner.num_beams
    for decoder in dict.fromkeys(row.decoder for row in rows):              # each is loaded once
        fit, captioner = decoder_fit(profile, decoder, seed, train, val), None
        for row in (row for row in rows if row.decoder == decoder):
            vectors = vectors_of(row) if vectors_of else None
            path = _caption_path(fit, row, test, beams, vectors)
            if (texts := _read_texts(path, len(test.clip_ids))) is None:
                vectors = system_vectors(profile, row, train, test, seed) if vectors is None else vectors
                captioner = captioner or fit.load()
                texts = captioner.generate(vectors, num_beams=beams, max_new_tokens=profile.captioner.max_new_tokens)
                atomic_write(path, json.dumps(texts, indent=0))
            found[row] = texts
    return {row: found[row] for row in rows}


def caption_seeds(profile: Profile, rows: Iterable[Row], seeds: Iterable[int], train: Embeddings, val: Embeddings,
                  test: Embeddings, *, num_beams: int | None = None) -> dict[int, dict[Row, list[str]]]:
    """seed -> :func:`caption_rows`; without a GPU, decoders and captions are made side by side."""
    rows, seeds = list(rows), list(seeds)

    def fit(decoder: str, seed: int) -> DecoderFit:
        return decoder_fit(profile, decoder, seed, train, val)

    def keep_decoder(decoder: str, seed: int) -> None:
        fit(decoder, seed).load()

    def keep_captions(row: Row, seed: int) -> None:
        caption_rows(profile, [row], seed, train, val, test, num_beams=num_beams)

    if profile.processes != 1 and not torch.accelerator.is_available():       # a GPU may not hold two decoders
        beams = num_beams or profile.captioner.num_beams
        missing = [(row, seed) for row in rows for seed in seeds
                   if not _caption_path(fit(row.decoder, seed), row, test, beams).is_file()]
        decoders = dict.fromkeys((row.decoder, seed) for row, seed in missing)
        side_by_side(keep_decoder, decoders, profile.processes, GB_EACH)
        side_by_side(keep_captions, missing, profile.processes, GB_EACH)
    return {seed: caption_rows(profile, rows, seed, train, val, test, num_beams=num_beams) for seed in seeds}


def disjoint_rows(profile: Profile, seed: int, train: Embeddings, split: Split, val: Embeddings, test: Embeddings, *,
                  num_beams: int | None = None) -> dict[Row, list[str]]:
    """The strict zero-shot rows: the mapping learns from one half of the recordings, the decoder from the other.

    ``split`` is the training split, for its recordings. A clip that mixes both halves serves neither.
    """
    for_mapping, for_decoder = disjoint_halves(train, split)

    def vectors(row: Row) -> Tensor:
        return fit_system(profile, row.system, for_mapping, seed)(test.audio, noise_seed=NOISE_SEED)

    return caption_rows(profile, DISJOINT, seed, for_decoder, val, test, num_beams=num_beams, vectors_of=vectors)


def score_and_record(profile: Profile, experiment: str, captions: dict[int, dict[Row, list[str]]], test: Embeddings,
                     split: Split, *, num_beams: int | None = None, strict: bool | None = None) -> CaptionResults:
    """Score a setting's captions, record its rows (:func:`record_rows`), and write its file in ``captions/``.

    Args:
        experiment: zero_shot, zero_shot:disjoint or supervised.
        captions: seed -> row -> n captions of the test clips (:func:`caption_rows`).
        num_beams: how they were decoded; None means the profile's way.
        strict: a metric that cannot run is an error (see ``dl.caption_metrics``).

    Returns:
        the scores, those of each clip among them.
    """
    decoding = decoding_name(num_beams or profile.captioner.num_beams)
    runs: dict[tuple[str, str], list[Run]] = {}
    for seed, of_row in captions.items():
        for row, texts in of_row.items():
            runs.setdefault((row.system, row.space), []).append((seed, NOISE_SEED, texts))
    results = score_caption_runs(profile, experiment, runs, split, clip_ids=test.clip_ids, decoding=decoding,
                                 strict=strict)
    references = [split.captions[split.clip_ids.index(clip_id)] for clip_id in test.clip_ids]
    path = candidates_path(profile, experiment.replace(":", "-"), decoding)
    write_candidates(path, test.clip_ids, runs, references)
    record_rows(profile, results.rows)
    return results
