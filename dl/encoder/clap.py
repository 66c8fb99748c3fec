"""The frozen CLAP encoder: one class, three doors, and a cache of what it computed.

``ClapEncoder.from_pretrained("mini")`` opens the weights that ship in ``data/mini/mini_clap``; a hub name or folder opens
transformers' ``ClapModel``; a LAION-CLAP ``.pt`` opens laion-clap itself. All give unit-norm float32 rows (B, D) [paper~].
"""
from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from dl.config import REPO, Profile
from dl.data import SAMPLING_RATE, AudioError, Split, check_waveform, ids_sha256
from dl.results import RowFile, atomic_write

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dl.encoder.backends import Backend

CROP_SAMPLES = 480_000          # 10 s at 48 kHz [paper~]; beyond it both LAION libraries crop at random
CROP_RULE = "first-10s"         # [ours] CLAP's own processor crops at random, which changes the embedding from call to call
SHARD_SIZE = 512                # clips a cache file; a killed run repeats at most one
BATCHES_AT_A_TIME = 4           # [ours] more would only take memory
MINI_FOLDER = REPO / "data/mini/mini_clap"
HUB, LAION = "dl.encoder.backends:HubClapBackend", "dl.encoder.backends:LaionClapBackend"
ENCODERS: dict[str, tuple[str, str | Path]] = {      # name: its backend, imported on use, and what that opens; any other name is a hub's or a path
    "mini": ("dl.encoder.mini_clap:MiniClapBackend", MINI_FOLDER),
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
        """What the audio tower computes in: float32, or bfloat16 (``dl.precision``); part of every cache key."""
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
        prepared = [crop(check_waveform(waveform, sampling_rate, f"waveform {place}")) for place, waveform in enumerate(waveforms)]
        return self._rows(self.backend.embed_audio, prepared, batch_size)

    def embed_text(self, captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed captions: a list of B strings -> (B, D) float32 on the CPU, unit norm; equal strings give equal rows."""
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


def cache_key(split: Split, encoder: ClapEncoder) -> str:
    """What the vectors depend on: the encoder's weights and number format, the crop rule, the clips and the captions."""
    captions = [text for texts in split.captions for text in texts]
    parts = [encoder.weights_sha256, str(encoder.dtype), CROP_RULE, ids_sha256(split.clip_ids), split.frame.to_csv(index=False), *captions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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
    key = cache_key(split, encoder)
    final = profile.cache_dir / "embeddings" / f"{split.name}.safetensors"
    if (found := _read(final)) and found[1].get("key") == key:
        _remove_shards(final)
        return Embeddings(split=split.name, **found[0], **found[1]["lists"])
    size = min(SHARD_SIZE, -(-len(split) // world))
    shards = final.with_name(f"{split.name}-{key[:16]}-{size}")
    files = [shards / f"{start:08d}.safetensors" for start in range(0, len(split), size)]
    with tqdm(total=len(split), desc=f"{split.name}: audio", unit="clip", disable=not progress) as bar:
        for number, shard in enumerate(files):
            places = range(number * size, min((number + 1) * size, len(split)))
            if number % world == rank and _read(shard) is None:        # nothing of it stays in memory: no more for a million clips than for one shard
                _embed_shard(shard, split, places, encoder)
            bar.update(len(places))
    if accelerator is not None:
        accelerator.wait_for_everyone()                                              # every shard is there
    if rank == 0:
        _merge(profile, split, encoder, final, key, files)
        _remove_shards(final)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return load_embeddings(profile, split.name)


def _merge(profile: Profile, split: Split, encoder: ClapEncoder, final: Path, key: str, files: list[Path]) -> None:
    """Put the shards together, embed the captions, and list the clips that could not be used."""
    parts = []
    for file in files:
        if (part := _read(file)) is None:             # it was whole when it was written: disk or another program
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
    _write(final, tensors, {"key": key, "lists": lists})


def _remove_shards(final: Path) -> None:
    """The shards of a finished split, and those that a killed run of other clips or weights left."""
    for folder in final.parent.glob(f"{final.stem}-*"):
        shutil.rmtree(folder)


def _embed_shard(shard: Path, split: Split, places: range, encoder: ClapEncoder) -> None:
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
    _write(shard, tensors, {"skipped": [str(errors[place]) for place in sorted(errors)]})


def _write(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """All that is no tensor goes into one entry: safetensors writes several in an order that changes from run to run."""
    atomic_write(path, save(tensors, {"about": json.dumps({**about, "sha256": _digest(tensors)})}))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name].numpy()).data)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Tensors and what was written about them; None where there is no file, and, with a line on stderr, where it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        tensors = load_file(path)
        if about.pop("sha256", None) not in (None, _digest(tensors)):
            raise ValueError("its checksum does not fit its content")
        if not about.keys() & {"lists", "skipped"}:
            raise ValueError("its header does not say whose vectors they are")
    except (SafetensorError, ValueError, AttributeError) as error:
        print(f"embeddings {path} are damaged ({' '.join(str(error).split())[:100]}): they are made anew", file=sys.stderr, flush=True)
        return None
    return tensors, about


def load_embeddings(profile: Profile, split: str) -> Embeddings:
    """Read the cached vectors of ``split`` without opening the encoder.

    Raises:
        FileNotFoundError: they are missing or damaged; the message says which command makes them.
    """
    found = _read(profile.cache_dir / "embeddings" / f"{split}.safetensors")
    if found is None:
        raise FileNotFoundError(f"embeddings for split '{split}' are missing: run notebook 02, or "
                                f"./run_all.sh --profile {profile.name} --only 02")
    return Embeddings(split=split, **found[0], **found[1]["lists"])
