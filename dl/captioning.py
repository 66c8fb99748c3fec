"""What Table 2 runs: caption decoders fitted once and kept, every system's vectors put into words, the words scored on test.

Two settings, the same language model, prompt and decoding in every row:

* zero-shot: one decoder is trained on text vectors -> their captions and never hears a sound; at test it is fed with audio
  vectors, raw or mapped. The mapping is trained on pairs (paper~), the decoder is not: this is *not* the text-only zero-shot of
  DRCap or WSAC. ``disjoint_halves`` serves a strict row, in which mapping and decoder share no recording. [ours]
* supervised: a decoder is trained on the audio vectors themselves, raw, or mapped by a frozen mapping.

Fits lie in ``<cache>/captioners``, captions in ``<cache>/captions``, both named by a hash of everything that determines them, so that
a run killed anywhere repeats no finished fit and no finished row.
"""
from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from dl.bridge.checkpoint import fingerprint
from dl.captioner.captioner import LLMCaptioner
from dl.captioner.training import INFERENCE_FIELDS, SOURCES, train_captioner
from dl.config import Profile
from dl.data import Split
from dl.encoder.clap import Embeddings
from dl.experiments import chosen, fit_system
from dl.metrics.caption_runs import CaptionResults, Run, candidates_path, score_caption_runs, write_candidates
from dl.peers import REGISTRY, build, centre
from dl.peers.trained import DiffusionBridge
from dl.precision import number_format
from dl.results import MetricsFile, atomic_write
from dl.workers import side_by_side

IN_USE: WeakValueDictionary[Path, LLMCaptioner] = WeakValueDictionary()       # decoders that somebody holds, by their checkpoint
GB_EACH = 2.3         # memory of a fit, or of a decoder at work, with SmolLM2-135M in float32: 2.1 GB were measured
NOISE_SEED = 0        # of a mapping that adds noise; its training seed is the decoder's seed
VAL_CLIPS = 128       # clips whose first caption makes the decoder's loss on val [ours]
TEXT_DECODERS = {     # decoders that are trained on text vectors alone: name -> what is done to the vectors
    "text": "the text vectors as they are",
    "text_noised": "norm(t + N(0, v I)), v as in Table 1's capdec [peer: CapDec]",
    "text_centred": "norm(centred t + N(0, v I)), v as in Table 1's c3 [peer: C3]",
    "text_bridged": "centred t through the text-only diffusion chain from k = 400 [peer: Diffusion Bridge]",
}


@dataclass(frozen=True)
class Row:
    """A row of Table 2: the vectors of ``system``, read in ``space``, go into ``decoder``.

    Attributes:
        system: a name of ``dl.peers.REGISTRY``, or text_ceiling (the vector of the clip's first reference).
        decoder: a name of ``TEXT_DECODERS``, or the system whose vectors of the training sounds trained it.
        space: text, or centred for a method whose own decoder lives in the centred text space.
    """

    system: str
    decoder: str = "text"
    space: str = "text"


ZERO_SHOT = tuple(Row(system) for system in ("raw", "ridge", "diffusion_bridge", "diffusion_link", "text_ceiling"))
SUPERVISED = (Row("raw", "raw"), Row("diffusion_link", "diffusion_link"))
OWN_DECODERS = (Row("capdec", "text_noised"), Row("c3", "text_centred", "centred"), Row("diffusion_bridge", "text_bridged", "centred"))


def zero_shot_rows(profile: Profile, full: bool = False, own_decoders: bool = True) -> tuple[Row, ...]:
    """The rows of the zero-shot setting.

    Args:
        full: every mapping that has a closed form or was tuned on val (an untuned one would be compared unfairly), and the methods
            with decoders of their own. ``capdec`` with the common decoder would be ``raw`` once more and is left out.
        own_decoders: False leaves the latter out of a full run: three more decoders a seed.
    """
    if not full:
        return ZERO_SHOT
    tuned = [name for name, peer in REGISTRY.items() if name not in ("capdec", "text_to_audio")
             and (not getattr(peer, "trained", False) or chosen(profile, name))]
    return (*(Row(name) for name in tuned), *(OWN_DECODERS if own_decoders else ()), Row("text_ceiling"))


def supervised_rows(full: bool = False) -> tuple[Row, ...]:
    """The rows of the supervised setting; ``full`` adds ridge, the control."""
    return (*SUPERVISED, Row("ridge", "ridge")) if full else SUPERVISED


# -------------------------------------------------------------------------------------------------------------- vectors
def caption_pairs(embeddings: Embeddings, split: Split | None = None) -> tuple[Tensor, list[str]]:
    """Text vectors and their captions, one row a caption.

    Args:
        embeddings: of any split.
        split: the data they were made from; where given, the captions are compared with it.

    Returns:
        (text vectors (N, D), N captions), row by row.

    Raises:
        ValueError: the embeddings hold other captions than the split.
    """
    if split is not None:
        place = {clip_id: i for i, clip_id in enumerate(split.clip_ids)}
        expected = [caption for clip_id in embeddings.clip_ids for caption in split.captions[place[clip_id]]]
        if expected != embeddings.captions:
            raise ValueError(f"the embeddings of split '{embeddings.split}' hold other captions than {embeddings.split}.csv: run notebook 02 again")
    return embeddings.text, embeddings.captions


def system_vectors(profile: Profile, row: Row, train: Embeddings, embeddings: Embeddings, seed: int) -> Tensor:
    """The vectors that a row feeds to its decoder, one a clip: (n, D) float32, unit norm."""
    if row.system == "text_ceiling":
        return embeddings.first_text
    peer = fit_system(profile, row.system, train, seed if REGISTRY[row.system].trained else 0)
    return peer(embeddings.audio, noise_seed=NOISE_SEED, space=row.space)


def decoder_pairs(profile: Profile, decoder: str, train: Embeddings, seed: int, of: Embeddings | None = None) -> tuple[Tensor, list[str]]:
    """What trains a decoder: vectors and captions, one row a caption.

    Args:
        decoder: see :class:`Row`. A sound's vector is paired with each of its captions.
        train: the training split, on which mappings are fitted.
        seed: of the mapping, and of the noise of ``text_noised`` and ``text_centred`` (one draw a caption).
        of: the split whose pairs are wanted; None takes ``train``.

    Returns:
        (vectors (N, D) float32, unit norm; N captions).

    Raises:
        ValueError: no decoder or system has that name.
    """
    of = train if of is None else of
    text, captions = caption_pairs(of)
    noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(seed))
    if decoder == "text":
        return text, captions
    if decoder == "text_noised":
        return normalize(text + build("capdec", **chosen(profile, "capdec")).decoder_noise_variance ** 0.5 * noise, dim=1), captions
    if decoder == "text_centred":
        peer = fit_system(profile, "c3", train)
        return normalize(centre(text, peer.text_mean) + peer.decoder_noise_variance ** 0.5 * noise, dim=1), captions
    if decoder == "text_bridged":
        bridge = fit_system(profile, "diffusion_bridge", train, seed)
        assert isinstance(bridge, DiffusionBridge)
        return bridge.map_text(text), captions
    if decoder not in REGISTRY:
        raise ValueError(f"unknown decoder {decoder!r}: choose one of {', '.join([*TEXT_DECODERS, *REGISTRY])}")
    return system_vectors(profile, Row(decoder), train, of, seed)[of.text_clip], captions


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
    return replace(embeddings, clip_ids=[embeddings.clip_ids[i] for i in clips], audio=embeddings.audio[clips], text=embeddings.text[rows],
                   text_clip=new[embeddings.text_clip[rows]], captions=[embeddings.captions[i] for i in rows.tolist()])


# ------------------------------------------------------------------------------------------------------------ fits, captions
def short_hash(**parts: object) -> str:
    """Twelve hex digits that change when a part does (see ``dl.bridge.checkpoint.fingerprint``)."""
    return hashlib.sha256(json.dumps(fingerprint(**parts), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class DecoderFit:
    """A decoder's training data and where its fit is kept; ``load`` trains it, or reads it if that was done before."""

    profile: Profile
    name: str
    seed: int
    vectors: Tensor
    captions: list[str]
    val: tuple[Tensor, list[str]]

    @property
    def key(self) -> str:
        """Hash of what determines the fit: settings, pairs, seed, code."""
        config = {name: value for name, value in asdict(self.profile.captioner).items() if name not in INFERENCE_FIELDS}
        return short_hash(config=config, dtype=number_format(self.profile.captioner.dtype), seed=self.seed,
                          pairs=[self.vectors, self.captions], val=list(self.val), code=list(SOURCES))

    @property
    def path(self) -> Path:
        """The fit's checkpoint."""
        return self.profile.cache_dir / "captioners" / f"{self.name}-{self.seed}-{self.key}.safetensors"

    def load(self, progress: bool = False, accelerator: Accelerator | None = None) -> LLMCaptioner:
        """The fitted captioner in eval mode, its history (step, loss, val_loss, lr) as the attribute ``history``.

        One that is still in use somewhere is given again: a second 7B model would not fit beside it.
        """
        if (captioner := IN_USE.get(self.path)) is not None and self.path.is_file():
            return captioner
        captioner = LLMCaptioner(self.vectors.shape[1], self.profile.captioner, seed=self.seed)
        captioner.history = train_captioner(captioner, self.vectors, self.captions, seed=self.seed, checkpoint_path=self.path,
                                            val=self.val, progress=progress, accelerator=accelerator)
        IN_USE[self.path] = captioner
        return captioner.eval()


def decoder_fit(profile: Profile, train_on: str, seed: int, train: Embeddings, val: Embeddings) -> DecoderFit:
    """The fit of the decoder called ``train_on``; nothing is trained yet. Its loss on val: the first captions of the first clips."""
    vectors, captions = decoder_pairs(profile, train_on, train, seed)
    part = select_clips(val, list(range(min(VAL_CLIPS, len(val.clip_ids)))))
    val_vectors, val_captions = decoder_pairs(profile, train_on, train, seed, part)
    counts = torch.bincount(part.text_clip)
    first = counts.cumsum(0) - counts
    return DecoderFit(profile, train_on, seed, vectors, captions, (val_vectors[first], [val_captions[i] for i in first.tolist()]))


def fit_captioner(profile: Profile, train_on: str, seed: int, train: Embeddings, val: Embeddings, progress: bool = False) -> LLMCaptioner:
    """A decoder trained on ``train_on``: read from the cache, gone on with where it was interrupted, or trained.

    Args:
        train_on: "text", another of ``TEXT_DECODERS``, "raw", or the name of a mapping.
        seed: of the projector, the adapter, the order of the batches, and of the mapping.
        train, val: the splits; val only watches.

    Example:
        >>> fit_captioner(profile, "text", 0, train, val).generate(test.first_text[:2])
    """
    return decoder_fit(profile, train_on, seed, train, val).load(progress)


def decoding_name(num_beams: int) -> str:
    """How metrics.csv calls it: greedy, beam 4."""
    return "greedy" if num_beams == 1 else f"beam {num_beams}"


def caption_file(profile: Profile, row: Row, fit: DecoderFit, vectors: Tensor, num_beams: int | None = None) -> Path:
    """The cache file of a row's captions, named by everything that determines them."""
    beams = num_beams or profile.captioner.num_beams
    key = short_hash(fit=fit.key, vectors=vectors, decoding=[beams, profile.captioner.max_new_tokens])
    name = f"{row.decoder}-{row.system}-{row.space}-{fit.seed}-{decoding_name(beams).replace(' ', '')}-{key}.json"
    return profile.cache_dir / "captions" / name


def caption_rows(profile: Profile, rows: Iterable[Row], seed: int, train: Embeddings, val: Embeddings, test: Embeddings, *,
                 num_beams: int | None = None, vectors_of: Callable[[Row], Tensor] | None = None, progress: bool = False) -> dict[Row, list[str]]:
    """The captions of the test clips for every row, one training seed; what the cache holds is not generated again.

    Args:
        rows: rows with one decoder follow each other or not, it is loaded once.
        num_beams: None takes the profile's; 1 is greedy.
        vectors_of: row -> (n, D), where the vectors are not those of :func:`system_vectors`.

    Returns:
        row -> n captions.
    """
    rows, found = list(rows), {}
    beams = profile.captioner.num_beams if num_beams is None else num_beams
    for decoder in dict.fromkeys(row.decoder for row in rows):
        fit, captioner = decoder_fit(profile, decoder, seed, train, val), None
        for row in (row for row in rows if row.decoder == decoder):
            vectors = vectors_of(row) if vectors_of else system_vectors(profile, row, train, test, seed)
            path = caption_file(profile, row, fit, vectors, beams)
            if (texts := read_texts(path, len(vectors))) is None:
                captioner = captioner or fit.load(progress)
                texts = captioner.generate(vectors, num_beams=beams, max_new_tokens=profile.captioner.max_new_tokens)
                atomic_write(path, json.dumps(texts, indent=0))
            found[row] = texts
    return {row: found[row] for row in rows}


def caption_seeds(profile: Profile, rows: Iterable[Row], seeds: Iterable[int], train: Embeddings, val: Embeddings, test: Embeddings, *,
                  num_beams: int | None = None) -> dict[int, dict[Row, list[str]]]:
    """:func:`caption_rows` for several training seeds; where there is no GPU, decoders are fitted and captions generated side by side.

    Returns:
        seed -> row -> n captions.
    """
    rows, seeds = list(rows), list(seeds)
    if profile.processes != 1 and not torch.accelerator.is_available():       # on a GPU, which two decoders may not fit, rows follow each other
        lists = [(row, seed) for row in rows for seed in seeds]
        missing = [(row, seed) for row, seed in lists if not caption_file(
            profile, row, decoder_fit(profile, row.decoder, seed, train, val), system_vectors(profile, row, train, test, seed), num_beams).is_file()]
        fits = dict.fromkeys((row.decoder, seed) for row, seed in missing)
        side_by_side(_keep_decoder, [(profile, decoder, seed, train, val) for decoder, seed in fits], profile.processes, GB_EACH)
        side_by_side(_keep_captions, [(profile, row, seed, train, val, test, num_beams) for row, seed in lists if missing], profile.processes, GB_EACH)
    return {seed: caption_rows(profile, rows, seed, train, val, test, num_beams=num_beams) for seed in seeds}


def _keep_decoder(profile: Profile, decoder: str, seed: int, train: Embeddings, val: Embeddings) -> None:
    decoder_fit(profile, decoder, seed, train, val).load()


def _keep_captions(profile: Profile, row: Row, seed: int, train: Embeddings, val: Embeddings, test: Embeddings, num_beams: int | None) -> None:
    caption_rows(profile, [row], seed, train, val, test, num_beams=num_beams)


def read_texts(path: Path, n: int) -> list[str] | None:
    """The n captions of a cache file; None where there is no file, and, with a line on stderr, where it is damaged."""
    if not path.is_file():
        return None
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(texts, list) and len(texts) == n and all(isinstance(text, str) for text in texts):
            return texts
        reason = f"not {n} captions"
    except ValueError as error:
        reason = " ".join(str(error).split())[:100]
    print(f"captions {path} are damaged ({reason}): they are generated anew", file=sys.stderr, flush=True)
    return None


def disjoint_rows(profile: Profile, seed: int, train: Embeddings, split: Split, val: Embeddings, test: Embeddings, *,
                  num_beams: int | None = None, progress: bool = False) -> dict[Row, list[str]]:
    """The strict zero-shot rows raw, ridge and diffusion_link: the mapping learns from one half of the recordings, the decoder from the other.

    Args:
        split: the training split, for its recordings. A clip that mixes both halves serves neither, so that both learn from less.
    """
    for_mapping, for_decoder = disjoint_halves(train, split)
    apart = replace(profile, results_root=profile.cache_dir / "disjoint")              # its fits must not push out those on all of train

    def vectors(row: Row) -> Tensor:
        return fit_system(apart, row.system, for_mapping, seed, **chosen(profile, row.system))(test.audio, noise_seed=NOISE_SEED)

    rows = (Row("raw"), Row("ridge"), Row("diffusion_link"))
    return caption_rows(profile, rows, seed, for_decoder, val, test, num_beams=num_beams, vectors_of=vectors, progress=progress)


# --------------------------------------------------------------------------------------------------------- scores and files
def score_and_record(profile: Profile, experiment: str, captions: dict[int, dict[Row, list[str]]], test: Embeddings, split: Split, *,
                     num_beams: int | None = None, strict: bool | None = None) -> CaptionResults:
    """Score a setting's captions; its rows in ``metrics.csv`` and its file in ``captions/`` replace those of an earlier run.

    Args:
        experiment: zero_shot, zero_shot:disjoint or supervised.
        captions: seed -> row -> n captions of the test clips (:func:`caption_rows`).
        num_beams: how they were decoded; None means the profile's way.
        strict: a metric that cannot run is an error (see ``dl.metrics.captions``).

    Returns:
        the scores, those of each clip among them.
    """
    decoding = decoding_name(profile.captioner.num_beams if num_beams is None else num_beams)
    runs: dict[tuple[str, str], list[Run]] = {}
    for seed, of_row in captions.items():
        for row, texts in of_row.items():
            runs.setdefault((row.system, row.space), []).append((seed, NOISE_SEED, texts))
    results = score_caption_runs(profile, experiment, runs, split, clip_ids=test.clip_ids, decoding=decoding, strict=strict)
    name, references = experiment.replace(":", "-"), [split.captions[split.clip_ids.index(clip_id)] for clip_id in test.clip_ids]
    written = write_candidates(candidates_path(profile, name, decoding), test.clip_ids, runs, references)
    for path in {written.with_name(f"{name}.csv"), *written.parent.glob(f"{name}_*.csv")} - {written}:
        path.unlink(missing_ok=True)
    file = MetricsFile(profile)
    for recorded in (experiment, f"{experiment}:paired"):
        file.remove(experiment=recorded)
    file.add(results.rows)
    return results

