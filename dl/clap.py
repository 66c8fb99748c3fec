"""The frozen CLAP encoder [paper~]: one class, three doors, and a cache of what it computed.

The doors are mini-CLAP (``dl.mini_clap``), transformers' ``ClapModel``, and LAION's own ``.pt`` files through laion-clap. The two
LAION doors hear mono float32 at 48 kHz of at most 10 s, repeat shorter clips to fill 10 s and read at most 77 tokens of a caption
[peer: LAION-CLAP]. laion-clap also rounds samples to 16 bits and computes its own log-mel: on the same weights the rows of both
doors lie 1e-5 apart. transformers and laion-clap are imported on use, never with this module.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from dl.config import REPO, Profile
from dl.data import MIX_RECIPE, SAMPLING_RATE, AudioError, Split, check_waveform
from dl.store import Key, RowFile, atomic_write, content, key, load_checkpoint, save_checkpoint, sha256_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import ClapModel, ClapProcessor, PreTrainedConfig, PreTrainedTokenizerBase

MAX_TOKENS = 77                 # of a caption [peer: LAION-CLAP]
CROP_SAMPLES = 480_000          # 10 s at 48 kHz [paper~]; beyond it both LAION libraries crop at random
CROP_RULE = "first-10s"         # [ours] CLAP's own processor crops at random, which changes the embedding from call to call
VECTORS_RECIPE = 1                         # goes up when the same sounds and weights give other vectors (tests/test_recipes.py)
SHARD_SIZE = 512                # clips a cache file; a killed run repeats at most one
BATCHES_AT_A_TIME = 4           # [ours] more would only take memory
MINI_FOLDER = REPO / "data/mini/mini_clap"
HUB, LAION = "dl.clap:HubClapBackend", "dl.clap:LaionClapBackend"
ENCODERS: dict[str, tuple[str, str | Path]] = {      # name: its backend, imported on use, and what that opens; any other name is a hub's or a path
    "mini": ("dl.mini_clap:MiniClapBackend", MINI_FOLDER),
}


class ClapEncoder:
    """Audio and text to one unit sphere.

    Example:
        >>> encoder = ClapEncoder.from_pretrained("mini")
        >>> encoder.embed_text(["A dog barks"]).shape
        torch.Size([1, 256])
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "mini", device: str | None = None) -> ClapEncoder:
        """Open a name of ``ENCODERS`` ("mini"), a ``ClapModel`` (hub name or folder), or a LAION-CLAP ``.pt`` (or the folder it was converted to).

        Args:
            device: "cpu", "cuda", ...; by default a GPU where there is one.

        Raises:
            FileNotFoundError: the weights are missing; the message says where they should be.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        path = Path(name_or_path)
        is_laion = path.suffix == ".pt" or (path / "laion_clap.json").is_file()
        kind, where = ENCODERS.get(str(name_or_path), (LAION if is_laion else HUB, name_or_path))
        return cls(resolve_name(kind).from_pretrained(where, device))

    @property
    def embed_dim(self) -> int:
        """D: 256 for "mini", 512 for LAION-CLAP."""
        return self.backend.embed_dim

    @property
    def weights_sha256(self) -> str:
        """Identifies the weights; part of every cache key."""
        return self.backend.weights_sha256

    @property
    def dtype(self) -> torch.dtype:
        """What the audio tower computes in: float32, or bfloat16 (``dl.config``); part of every cache key."""
        return getattr(self.backend, "dtype", torch.float32)

    def embed_audio(self, waveforms: Sequence[np.ndarray] | np.ndarray, sampling_rate: int = SAMPLING_RATE, batch_size: int = 16) -> Tensor:
        """Embed mono waveforms; beyond 10 s only the first 10 s are heard, always the same ones [ours].

        Args:
            waveforms: B arrays (samples,) float32, of any lengths; or one array (B, samples).
            sampling_rate: of all of them, in Hz.

        Returns:
            (B, D) float32 on the CPU, unit norm.

        Raises:
            AudioError: a waveform is empty, too short, silent or not finite; the message gives its place.
        """
        if getattr(waveforms, "ndim", 2) == 1 and len(waveforms):
            waveforms = [waveforms]  # type: ignore[list-item]      # one sound: a list of one
        elif len(waveforms) and np.ndim(waveforms[0]) == 0:
            raise ValueError("embed_audio takes a list of waveforms; put brackets around a single one")
        prepared = [crop(check_waveform(waveform, sampling_rate, f"waveform {place}")) for place, waveform in enumerate(waveforms)]
        return self._rows(self.backend.embed_audio, prepared, batch_size)

    def embed_text(self, captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed captions: a list of B strings -> (B, D) float32 on the CPU, unit norm; equal strings give equal rows."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        if wrong := [caption for caption in captions if not isinstance(caption, str)]:
            raise ValueError(f"embed_text takes a list of captions, each a string; {wrong[0]!r} is none")
        unique = sorted(set(captions))
        lengths = self.backend.token_counts(unique) if hasattr(self.backend, "token_counts") else map(len, unique)
        unique = [text for _, text in sorted(zip(lengths, unique, strict=True))]       # equal lengths side by side: little padding
        place = {text: row for row, text in enumerate(unique)}
        return self._rows(self.backend.embed_text, unique, batch_size)[[place[text] for text in captions]]

    def _rows(self, embed: Callable[[list], Tensor], items: list, batch_size: int) -> Tensor:
        """``embed`` of batches of the items, (len(items), D) float32; several batches at a time, each with its share of the cores, where the
        backend allows it: the operations of a small model are too short for all cores to join in each."""
        batches = [items[start: start + batch_size] for start in range(0, len(items), batch_size)]
        cores = torch.get_num_threads()
        count = min(cores, BATCHES_AT_A_TIME, len(batches)) if getattr(self.backend, "concurrent", False) else 1
        if count < 2:
            rows = [embed(batch) for batch in batches]
        else:
            try:
                with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(cores // count,)) as pool:
                    rows = list(pool.map(embed, batches))
            finally:
                torch.set_num_threads(cores)
        return torch.cat(rows).float().cpu() if rows else torch.empty(0, self.embed_dim)


@dataclass(frozen=True)
class Embeddings:
    """The vectors of one split, as every later module takes them.

    Attributes:
        audio: (n, D) float32, unit norm, one row a clip.
        text: (m, D) float32, unit norm, one row a caption; a clip's captions are consecutive.
        text_clip: (m,) int64, the row of ``audio`` that caption belongs to.
        captions: the m captions themselves.
        skipped: a line with id and reason for every clip whose sound could not be used.
    """

    split: str
    clip_ids: list[str]
    audio: Tensor
    text: Tensor
    text_clip: Tensor
    captions: list[str]
    skipped: list[str]

    @cached_property
    def key(self) -> str:
        """Names these vectors and captions by their content; vectors that were changed or picked have another name."""
        return content(self.audio, self.text, self.text_clip, list(self.captions))

    def kth_text(self, k: int) -> Tensor:
        """(n, D): caption k (from 0) of every clip; a clip with fewer captions answers with its last."""
        counts = torch.bincount(self.text_clip, minlength=len(self.clip_ids))
        first = counts.cumsum(0) - counts
        return self.text[first + torch.minimum(torch.tensor(k), counts - 1)]

    @property
    def first_text(self) -> Tensor:
        """(n, D): caption 1 of every clip, the `t` of the gap metrics."""
        return self.kth_text(0)


def crop(waveform: np.ndarray) -> np.ndarray:
    """Keep the first 480,000 samples (10 s at 48 kHz) of (samples,)."""
    return waveform[:CROP_SAMPLES]


def decode(split: Split, places: Sequence[int], workers: int = 4) -> Iterator[tuple[int, np.ndarray | AudioError]]:
    """Decode clips in threads, in order; a clip that cannot be used comes as its error."""
    def one(place: int) -> np.ndarray | AudioError:
        try:
            return check_waveform(crop(split.waveform(place)), SAMPLING_RATE, split.clip_ids[place])     # silent where it is heard
        except AudioError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(places, pool.map(one, places), strict=True)


def vectors_key(split: Split, encoder: ClapEncoder) -> Key:
    """What the vectors of a split depend on: encoder, crop, clips and captions, the sound files and how scenes are mixed from them."""
    return key("vectors", VECTORS_RECIPE, encoder=encoder.weights_sha256, dtype=str(encoder.dtype), crop=CROP_RULE,
               clips=content(split.clip_ids, split.frame.to_csv(index=False).split("\n")), captions=content([text for texts in split.captions for text in texts]),
               sounds=split.manifest, mixing=MIX_RECIPE)


def embed_split(profile: Profile, split: Split, encoder: ClapEncoder, progress: bool = True, accelerator: Accelerator | None = None) -> Embeddings:
    """Embed a split, or read what is there already; a killed call goes on at the shard of 512 clips it was in.

    Clips that cannot be read, or are empty, silent or too short are named in ``skipped``, and with those that are not on disk in
    ``results/<profile>/unusable_clips.csv``; the others are done.

    Args:
        progress: show clips per second on stderr.
        accelerator: an ``accelerate.Accelerator`` whose processes share the shards between them; each holds its own encoder. The
            result is that of one process (to rounding, where few clips make smaller shards).
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    name = vectors_key(split, encoder)
    final = profile.cache_dir / "embeddings" / f"{split.name}.safetensors"
    if found := load_checkpoint(final, name):
        _remove_shards(final)
        return _embeddings(split.name, *found)
    size = min(SHARD_SIZE, -(-len(split) // world))
    shards = final.with_name(f"{split.name}-{name.digest}-{size}")
    files = [shards / f"{start:08d}.safetensors" for start in range(0, len(split), size)]
    with tqdm(total=len(split), desc=f"{split.name}: audio", unit="clip", disable=not progress) as bar:
        for number, shard in enumerate(files):
            places = range(number * size, min((number + 1) * size, len(split)))
            if number % world == rank and load_checkpoint(shard, name) is None:    # nothing of it stays in memory
                _embed_shard(shard, split, places, encoder, name)
            bar.update(len(places))
    if accelerator is not None:
        accelerator.wait_for_everyone()                                              # every shard is there
    if rank == 0:
        _merge(profile, split, encoder, final, name, files)
        _remove_shards(final)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return load_embeddings(profile, split.name)


def _merge(profile: Profile, split: Split, encoder: ClapEncoder, final: Path, name: Key, files: list[Path]) -> None:
    """Put the shards together, embed the captions, and list the clips that could not be used."""
    parts = []
    for file in files:
        if (part := load_checkpoint(file, name)) is None:             # it was whole when it was written: disk or another program
            raise OSError(f"{file} cannot be read any more: run the same command again, it makes what is missing")
        parts.append(part)
    skipped = [reason for _, about in parts for reason in about["skipped"]]
    kept = torch.cat([tensors["places"] for tensors, _ in parts]).tolist()
    if not kept:
        raise AudioError(f"none of the {len(split)} clips of split '{split.name}' could be used: " + "; ".join(skipped[:3]))
    audio = torch.cat([tensors["audio"] for tensors, _ in parts])
    del parts                                         # their rows stand in audio now
    captions = [text for place in kept for text in split.captions[place]]
    counts = torch.tensor([len(split.captions[place]) for place in kept])
    tensors = {"audio": audio, "text": encoder.embed_text(captions), "text_clip": torch.repeat_interleave(torch.arange(len(kept)), counts)}
    lists = {"clip_ids": [split.clip_ids[place] for place in kept], "captions": captions, "skipped": skipped}
    unusable = RowFile(profile.results_dir / "unusable_clips.csv", ("split", "clip_id", "reason"), ("split", "clip_id"))
    unusable.remove(split=split.name)
    broken = [split.clip_ids[place] for place in sorted(set(range(len(split))) - set(kept))]
    if rows := [*((clip_id, "not on disk") for clip_id in split.missing), *zip(broken, skipped, strict=True)]:
        unusable.add([{"split": split.name, "clip_id": clip_id, "reason": reason} for clip_id, reason in rows])
    save_checkpoint(final, tensors, lists, name)


def _remove_shards(final: Path) -> None:
    """The shards of a finished split, and those that a killed run of other clips or weights left."""
    for folder in final.parent.glob(f"{final.stem}-*"):
        shutil.rmtree(folder)


def _embed_shard(shard: Path, split: Split, places: range, encoder: ClapEncoder, name: Key) -> None:
    """Embed some clips, in the order of their lengths so that a batch holds little padding, and store the good ones."""
    sounds: dict[int, np.ndarray] = {}
    errors: dict[int, AudioError] = {}
    for place, sound in decode(split, places):
        if isinstance(sound, AudioError):
            errors[place] = sound
        else:
            sounds[place] = sound
    by_length = sorted(sounds, key=lambda place: len(sounds[place]))
    rows = encoder.embed_audio([sounds[place] for place in by_length])
    tensors = {"audio": rows[np.argsort(by_length, kind="stable")].contiguous(), "places": torch.tensor(sorted(sounds), dtype=torch.int64)}
    save_checkpoint(shard, tensors, {"skipped": [str(errors[place]) for place in sorted(errors)]}, name)


def _embeddings(split: str, tensors: dict[str, Any], lists: dict[str, Any]) -> Embeddings:
    return Embeddings(split=split, **tensors, **lists)


def load_embeddings(profile: Profile, split: str) -> Embeddings:
    """Read the cached vectors of ``split`` without opening the encoder.

    Raises:
        FileNotFoundError: they are missing or damaged; the message says which command makes them.
    """
    found = load_checkpoint(profile.cache_dir / "embeddings" / f"{split}.safetensors")
    if found is None:
        raise FileNotFoundError(f"embeddings for split '{split}' are missing: run notebook 02, or "
                                f"./run_all.sh --profile {profile.name} --only 02")
    return _embeddings(split, *found)


# The doors ------------------------------------------------------------------------------------------------------------
class Backend(Protocol):
    """What an encoder must offer to stand behind :class:`dl.clap.ClapEncoder`; ``from_pretrained(where, device)`` makes it.

    It may also have ``dtype``, what its audio tower computes in; ``token_counts(captions)``, by which captions are put into batches in place
    of their letters; and ``concurrent``, True where several threads may embed at a time.

    Attributes:
        embed_dim: D.
        weights_sha256: identifies all that a vector depends on; part of every cache key.
    """

    embed_dim: int
    weights_sha256: str

    def embed_audio(self, waveforms: list[np.ndarray]) -> Tensor:
        """B arrays (samples,) float32 at 48 kHz, each of at most 480,000 samples -> (B, D), unit norm."""

    def embed_text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D), unit norm."""


class HubClapBackend:
    """transformers' ``ClapModel`` by hub name or folder, the default door; D = ``embed_dim`` is 512 for LAION's checkpoints.

    ``weights_sha256`` covers the weights, the tokenizer and the front end's settings: all that a vector depends on.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, model: ClapModel, processor: ClapProcessor, device: str) -> None:
        self.model, self.processor, self.device, self.embed_dim = model.eval().to(device), processor, device, model.config.projection_dim
        self.weights_sha256 = digest(model.state_dict(), tokenizer_text(processor.tokenizer), processor.feature_extractor.to_json_string())
        self.truncation = "fusion" if model.config.audio_config.enable_fusion else "rand_trunc"     # chooses the mel filters, too

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str = "cpu") -> HubClapBackend:
        """Open "laion/clap-htsat-unfused", another hub name, or a folder made by ``save_pretrained``.

        Raises:
            FileNotFoundError: neither a folder nor in the hub's cache, and the hub cannot be reached or does not know it.
            ValueError: not a CLAP model, weights missing, another sampling rate, or a tokenizer that does not fit.
        """
        from transformers import ClapModel, ClapProcessor, PreTrainedConfig

        where = str(name_or_path)
        again = "copy the whole folder again" if Path(where).is_dir() else f"fetch every file of it: hf download {where}"
        try:
            kind = PreTrainedConfig.get_config_dict(where)[0].get("model_type")
        except (OSError, ValueError):
            raise FileNotFoundError(f"no ClapModel at {where!r}: give a folder made by save_pretrained, or, once with a connection "
                                    f"and HF_HUB_OFFLINE unset, fetch it: hf download {where}") from None
        if kind != "clap":                                               # transformers would only warn, and start from random weights
            raise ValueError(f"{where} holds a {kind!r} model, not 'clap': give a ClapModel such as laion/clap-htsat-unfused")
        try:
            model, loading = ClapModel.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
            processor = ClapProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{where} is incomplete ({short_error(error)}): {again}") from None
        if absent := sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()}):
            raise ValueError(f"{where}: {len(absent)} weights are missing, {absent[0]} first, and would be random: {again}")
        if processor.feature_extractor.sampling_rate != SAMPLING_RATE:
            raise ValueError(f"{where} hears {processor.feature_extractor.sampling_rate} Hz: choose a CLAP of {SAMPLING_RATE} Hz")
        check_vocabulary(processor.tokenizer, model.config.text_config, where, again)
        return cls(model, processor, device)

    @torch.inference_mode()
    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> Tensor:
        """B arrays (samples,) float32 at 48 kHz, each of at most 480,000 samples -> (B, D) float32, unit norm.

        Raises:
            ValueError: a waveform is longer; the library would crop it at random.
        """
        check_lengths(waveforms)
        inputs = self.processor(audio=list(waveforms), sampling_rate=SAMPLING_RATE, truncation=self.truncation, padding="repeatpad",
                                return_tensors="pt")
        inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])      # a fused extractor marks a clip at random when none is longer
        return F.normalize(self.model.get_audio_features(**inputs.to(self.device)).pooler_output, dim=1)      # (B, D)

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, D) float32, unit norm."""
        tokens = self.processor.tokenizer(list(captions), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        tokens = tokens.to(self.device)                                                                       # (B, tokens)
        return F.normalize(self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output, dim=1)   # (B, D)


class LaionClapBackend:
    """LAION's official ``.pt`` through laion-clap itself, for exactly that checkpoint and front end; D = ``embed_dim`` = 512.

    ``weights_sha256`` covers the weights and the tokenizer: all that a vector depends on.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, clap: nn.Module, weights_sha256: str) -> None:
        self.clap, self.weights_sha256, self.embed_dim = clap.eval(), weights_sha256, clap.model.joint_embed_shape

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str = "cpu", *, tokenizer: str | Path | None = None) -> LaionClapBackend:
        """Open a ``.pt`` (converted on first use to the folder of its name beside it) or a converted folder.

        Args:
            tokenizer: folder or hub name of roberta-base's tokenizer; by default the environment variable
                DL_ROBERTA_TOKENIZER, then ``tokenizer/`` in the converted folder, then "roberta-base" from the hub or its cache.

        Raises:
            FileNotFoundError: no such file, or a folder without a conversion.
            ValueError: the file is a pickle that needs consent, the weights do not fit, or the tokenizer is not roberta-base's.
        """
        folder = converted_folder(Path(name_or_path))
        if not (folder / SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"{folder / SETTINGS_FILE} is missing: give LAION's .pt, or the folder that "
                                    "convert_laion_checkpoint made of it")
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        roberta = load_roberta_tokenizer(tokenizer, folder, settings["text_config"])
        state = load_file(folder / WEIGHTS_FILE)
        clap = build_laion_clap(settings["amodel"], settings["text_config"], roberta, device)
        try:
            clap.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not fit {settings['amodel']} ({short_error(error)}): "
                             "convert the .pt again and name its amodel") from None
        return cls(clap, digest(state, tokenizer_text(roberta), settings["amodel"]))

    @torch.inference_mode()
    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> Tensor:
        """As :meth:`HubClapBackend.embed_audio`: B arrays (samples,) -> (B, D) float32, unit norm."""
        check_lengths(waveforms)
        return torch.from_numpy(self.clap.get_audio_embedding_from_data(list(waveforms)))                     # (B, D)

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> (B, D) float32, unit norm."""
        return torch.from_numpy(self.clap.get_text_embedding(list(captions)))                                 # (B, D)


def check_lengths(waveforms: Sequence[np.ndarray]) -> None:
    """Raise ValueError for a waveform of more than 480,000 samples."""
    if (longest := max(map(len, waveforms), default=0)) > CROP_SAMPLES:
        raise ValueError(f"a waveform has {longest} samples: crop to {CROP_SAMPLES} first, as ClapEncoder.embed_audio does")


def digest(state: dict[str, Tensor], *settings: str) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, whatever file they came from, then over ``settings``."""
    total = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges and rules as one string, without the padding and truncation of the last call."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({key: value for key, value in rules.items() if key not in ("padding", "truncation")}, sort_keys=True)




# LAION's official files ---------------------------------------------------------------------------------------------------


TOKENIZER_VARIABLE = "DL_ROBERTA_TOKENIZER"
SETTINGS_FILE, WEIGHTS_FILE = "laion_clap.json", "model.safetensors"
AMODELS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}     # width of the patch embedding [peer: LAION-CLAP]
OLD_BUFFERS = ("text_branch.embeddings.position_ids", "text_branch.embeddings.token_type_ids")   # in files of older transformers


def convert_laion_checkpoint(pt_path: str | Path, out_dir: str | Path, *, amodel: str | None = None,
                             allow_pickle: bool = False, sha256: str | None = None) -> Path:
    """Turn LAION's ``.pt``, a pickle, into safetensors and settings, once; afterwards the pickle is never opened again.

    The file's SHA-256 is printed. The pickle is read with ``weights_only=True``, which runs no code of the file. Where that is
    refused, it is read only with ``allow_pickle=True`` and its own ``sha256``: do so only for a file you trust.

    Args:
        pt_path: such as ``music_audioset_epoch_15_esc_90.14.pt`` (HTSAT-base) or ``630k-audioset-best.pt`` (HTSAT-tiny).
        out_dir: gets ``model.safetensors`` and ``laion_clap.json``.
        amodel: laion-clap's name of the audio tower; by default read off the weights.
        allow_pickle: consent to run the code inside the file that ``sha256`` names.
        sha256: wherever it is given, the file must have it.

    Returns:
        ``out_dir`` as a Path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another SHA-256, a pickle without consent, a fused checkpoint, or not LAION-CLAP weights.

    Example:
        >>> convert_laion_checkpoint("630k-audioset-best.pt", "630k-audioset-best")    # doctest: +SKIP
    """
    pt_path, out_dir = Path(pt_path), Path(out_dir)
    if not pt_path.is_file():
        raise FileNotFoundError(f"{pt_path} is missing: download it from LAION's CLAP page, then give its path")
    found = sha256_file(pt_path)
    print(f"{pt_path.name}  sha256 {found}")
    if sha256 is not None and sha256.lower() != found:
        raise ValueError(f"{pt_path} has sha256 {found}, not {sha256}: download it again, or name this one if you trust it")
    state = {name.removeprefix("module."): value for name, value in
             read_checkpoint(pt_path, out_dir, found, allow_pickle and sha256 is not None).items()}
    state = {name: value.detach().clone().contiguous() for name, value in state.items() if name not in OLD_BUFFERS}
    patches, words = (state.get(name) for name in ("audio_branch.patch_embed.proj.weight", "text_branch.embeddings.word_embeddings.weight"))
    if patches is None or words is None:
        raise ValueError(f"{pt_path} is no LAION-CLAP with HTSAT and RoBERTa towers: give 630k-audioset-best.pt or "
                         "another of LAION's HTSAT files")
    if any("fusion_model" in name or "mel_conv" in name for name in state):
        raise ValueError(f"{pt_path} is a fused checkpoint: choose an unfused one, or laion/clap-htsat-fused by its hub name")
    amodel = amodel or AMODELS.get(len(patches))
    if amodel not in AMODELS.values():
        raise ValueError(f"{pt_path}: unknown audio tower {amodel!r}: amodel is one of {', '.join(AMODELS.values())}")
    text_config = {                                                      # sizes from the weights, the rest [peer: roberta-base]
        "vocab_size": words.shape[0], "hidden_size": words.shape[1], "num_attention_heads": words.shape[1] // 64,
        "num_hidden_layers": 1 + max(int(name.split(".")[3]) for name in state if name.startswith("text_branch.encoder.layer.")),
        "intermediate_size": len(state["text_branch.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state["text_branch.embeddings.position_embeddings.weight"]),
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / SETTINGS_FILE).unlink(missing_ok=True)                    # gone while the weights change, back at the end
    temporary = out_dir / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    try:
        save_file(state, temporary)
        temporary.replace(out_dir / WEIGHTS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    settings = {"source": pt_path.name, "source_sha256": found, "amodel": amodel, "enable_fusion": False, "text_config": text_config}
    atomic_write(out_dir / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    return out_dir


def converted_folder(path: Path) -> Path:
    """``path`` itself, or for ``name.pt`` the folder ``name`` beside it, converted now if it is not yet of this very file."""
    folder = path.with_suffix("") if path.suffix == ".pt" else path
    settings = folder / SETTINGS_FILE
    if path == folder:
        return folder
    if settings.is_file():
        of = json.loads(settings.read_text(encoding="utf-8"))["source_sha256"]
        if not path.is_file() or of == sha256_file(path):
            return folder
    return convert_laion_checkpoint(path, folder)


def read_checkpoint(path: Path, out_dir: Path, sha256: str, consent: bool) -> dict[str, Tensor]:
    """The state dict inside ``path``; beyond torch's own names only numpy's scalars, part of LAION's training state, are allowed."""
    scalar = importlib.import_module("numpy.core.multiarray").scalar
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), np.dtype,
               np.dtypes.Int64DType, np.dtypes.Float64DType, np.dtypes.Float32DType]
    try:
        with torch.serialization.safe_globals(allowed):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not consent:
            raise ValueError(f"{path} is a pickle that can run code: if you trust it, convert it once in Python: from dl.clap import "
                             f"convert_laion_checkpoint; convert_laion_checkpoint({str(path)!r}, {str(out_dir)!r}, allow_pickle=True, "
                             f"sha256={sha256!r})") from None
        stored = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a torch checkpoint ({short_error(error)}): download it again") from None
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_roberta_tokenizer(tokenizer: str | Path | None, folder: Path, text_config: dict) -> PreTrainedTokenizerBase:
    """roberta-base's tokenizer from ``tokenizer``, the environment variable, ``folder``/tokenizer or the hub, in this order.

    Raises:
        ValueError: it does not open, or it is not the text tower's.
    """
    from transformers import RobertaConfig, RobertaTokenizer

    beside = folder / "tokenizer"
    where = str(tokenizer or os.environ.get(TOKENIZER_VARIABLE) or (beside if beside.is_dir() else "roberta-base"))
    advice = f"set {TOKENIZER_VARIABLE} to a folder with roberta-base's tokenizer files, or fetch it once: hf download roberta-base"
    try:
        roberta = RobertaTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {where!r} ({short_error(error)}): {advice}") from None
    check_vocabulary(roberta, RobertaConfig(**text_config), where, advice)
    return roberta


def build_laion_clap(amodel: str, text_config: dict, tokenizer: PreTrainedTokenizerBase, device: str = "cpu") -> Any:
    """An untrained ``laion_clap.CLAP_Module`` without the hub: RoBERTa from ``text_config``, the tokenizer as given."""
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    laion_clap = import_laion_clap()
    with (torch.random.fork_rng(), patch.object(RobertaTokenizer, "from_pretrained", lambda *_, **__: tokenizer),
          patch.object(RobertaModel, "from_pretrained", lambda *_, **__: RobertaModel(RobertaConfig(**text_config)))):
        return laion_clap.CLAP_Module(enable_fusion=False, device=device, amodel=amodel)


def import_laion_clap() -> ModuleType:
    """Import laion_clap without torchvision and the hub; ``sys.path`` and ``sys.modules["torchvision"]`` stay as they were.

    Raises:
        ModuleNotFoundError: laion-clap is not installed.
    """
    if "laion_clap" in sys.modules:
        return sys.modules["laion_clap"]
    if importlib.util.find_spec("laion_clap") is None:
        raise ModuleNotFoundError("the package laion-clap is missing: pip install laion-clap==1.1.7")
    # transformers loads these lazily and remembers whether torchvision is there: both must be settled before the stub can be seen
    from transformers import BartModel, BartTokenizer, BertModel, BertTokenizer, RobertaModel, RobertaTokenizer  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    path = list(sys.path)
    with ExitStack() as scope:
        scope.enter_context(torchvision_stub())
        scope.callback(lambda: sys.path.__setitem__(slice(None), path))  # laion_clap appends its folder, for good
        for tokenizer in {BartTokenizer, BertTokenizer, RobertaTokenizer}:        # it loads all three from the hub on import
            scope.enter_context(patch.object(tokenizer, "from_pretrained", lambda *_, **__: None))
        return importlib.import_module("laion_clap")


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """While inside, where torchvision is absent, whatever laion_clap imports from it exists; our way uses none of it."""
    absent = importlib.util.find_spec("torchvision") is None
    names = ["torchvision" + part for part in ("", ".datasets", ".ops", ".ops.misc", ".transforms")] if absent else []
    stub = ModuleType("torchvision")
    vars(stub)["__getattr__"] = lambda name: type(name, (), {})
    sys.modules.update(dict.fromkeys(names, stub))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, text_config: PreTrainedConfig, where: str, advice: str) -> None:
    """Refuse a tokenizer that is not the text tower's: offline, transformers may answer with 5 tokens, and all captions embed alike.

    Raises:
        ValueError: ``len(tokenizer)`` is not ``text_config.vocab_size`` (50,265 for roberta-base), or the padding ids differ.
    """
    if len(tokenizer) != text_config.vocab_size:
        raise ValueError(f"the tokenizer of {where} has {len(tokenizer)} tokens, the text tower {text_config.vocab_size}: {advice}")
    if tokenizer.pad_token_id != text_config.pad_token_id:
        raise ValueError(f"the tokenizer of {where} pads with id {tokenizer.pad_token_id}, "
                         f"the text tower with {text_config.pad_token_id}: {advice}")


def short_error(error: Exception) -> str:
    """An error's first 160 characters on one line."""
    return " ".join(str(error).split())[:160]
