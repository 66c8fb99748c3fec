"""The frozen CLAP encoder [paper~]: one class, three doors, and a cache of the vectors.

The doors are mini-CLAP (``dl.mini_clap``), transformers' ``ClapModel``, and LAION's own ``.pt`` through laion-clap.
Both LAION doors hear 10 s of mono float32 at 48 kHz, repeat shorter clips to fill them, and read 77 tokens of a
caption [peer: LAION-CLAP]. On the same weights their rows lie 1e-5 apart: laion-clap rounds samples to 16 bits.
"""
from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from torch import Tensor, nn
from tqdm import tqdm

from dl.config import REPO, Profile
from dl.data import MIX_RECIPE, SAMPLING_RATE, AudioError, Split, check_waveform
from dl.store import Key, RowFile, content, key, load_checkpoint, save_checkpoint, sha256_file

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import ClapModel, ClapProcessor, PreTrainedTokenizerBase

CROP_SAMPLES = 480_000          # 10 s at 48 kHz [paper~]; beyond it both LAION libraries crop at random
CROP_RULE = "first-10s"         # [ours] of a longer clip the first 10 s are heard, always the same ones
MAX_TOKENS = 77                 # of a caption [peer: LAION-CLAP]
VECTORS_RECIPE = 1              # goes up when the same sounds and weights give other vectors (tests/test_recipes.py)
SHARD_SIZE = 512                # clips a cache file; a killed run repeats at most one
BATCHES_AT_A_TIME = 4           # [ours] more would only take memory
MINI_FOLDER = REPO / "data/mini/mini_clap"
TOKENIZER_VARIABLE = "DL_ROBERTA_TOKENIZER"
ROBERTA: dict[str, Any] = {                                                # [peer: roberta-base]
    "vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
AMODELS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}        # by width of patches [peer: LAION-CLAP]
# name: its backend, imported on use, and what that opens; any other name is a hub's or a path
ENCODERS: dict[str, tuple[str, str | Path]] = {
    "mini": ("dl.mini_clap:MiniClapBackend", MINI_FOLDER),
}


class Backend(Protocol):
    """What stands behind :class:`ClapEncoder`; ``from_pretrained(where, device)`` makes it.

    It may have ``dtype``, what its audio tower computes in; ``token_counts(captions)``, by which captions are put into
    batches in place of their letters; and ``concurrent``, True where several threads may embed at a time.
    """

    embed_dim: int
    weights_sha256: str         # identifies all that a vector depends on; part of every cache key

    def embed_audio(self, waveforms: list[np.ndarray]) -> Tensor:
        """B arrays (samples,) float32 at 48 kHz, of at most 480,000 samples -> (B, D), unit norm."""

    def embed_text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D), unit norm."""


class ClapEncoder:
    """Audio and text to one unit sphere.

    Example:
        >>> encoder = ClapEncoder.from_pretrained("mini")
        >>> encoder.embed_text(["A dog barks"]).shape == (1, encoder.embed_dim)
        True
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.embed_dim = backend.embed_dim                          # D; 512 for LAION-CLAP
        self.weights_sha256 = backend.weights_sha256                # as the next, part of every cache key
        self.dtype: torch.dtype = getattr(backend, "dtype", torch.float32)      # what the audio tower computes in

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "mini", device: str | None = None) -> ClapEncoder:
        """Open a name of ``ENCODERS``, a ``ClapModel`` (hub name or folder), or a LAION-CLAP ``.pt``.

        ``device`` is "cpu", "cuda", ...; by default a GPU where there is one. FileNotFoundError: no weights.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        door = "dl.clap:LaionClapBackend" if Path(name_or_path).suffix == ".pt" else "dl.clap:HubClapBackend"
        kind, where = ENCODERS.get(str(name_or_path), (door, name_or_path))
        return cls(resolve_name(kind).from_pretrained(where, device))

    def embed_audio(self, waveforms: Sequence[np.ndarray] | np.ndarray, sampling_rate: int = SAMPLING_RATE,
                    batch_size: int = 16) -> Tensor:
        """Embed mono waveforms; beyond 10 s only the first 10 s are heard [ours].

        Args:
            waveforms: B arrays (samples,) float32, of any lengths; or one array (B, samples) or (samples,).
            sampling_rate: of all of them, in Hz.

        Returns:
            (B, D) float32 on the CPU, unit norm.

        Raises:
            AudioError: a waveform is empty, too short, silent or not finite; the message gives its place.
        """
        if getattr(waveforms, "ndim", 2) == 1 and len(waveforms):
            waveforms = [waveforms]  # type: ignore[list-item]
        elif len(waveforms) and np.ndim(waveforms[0]) == 0:
            raise ValueError("embed_audio takes a list of waveforms; put brackets around a single one")
        prepared = [crop(check_waveform(waveform, sampling_rate, f"waveform {place}"))
                    for place, waveform in enumerate(waveforms)]
        return self._rows(self.backend.embed_audio, prepared, batch_size)

    def embed_text(self, captions: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed a list of B captions -> (B, D) float32 on the CPU, unit norm; equal strings give equal rows."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        if wrong := [caption for caption in captions if not isinstance(caption, str)]:
            raise ValueError(f"embed_text takes a list of captions, each a string; {wrong[0]!r} is none")
        unique = sorted(set(captions))
        lengths = self.backend.token_counts(unique) if hasattr(self.backend, "token_counts") else map(len, unique)
        unique = [text for _, text in sorted(zip(lengths, unique, strict=True))]       # side by side: little padding
        place = {text: row for row, text in enumerate(unique)}
        return self._rows(self.backend.embed_text, unique, batch_size)[[place[text] for text in captions]]

    def _rows(self, embed: Callable[[list], Tensor], items: list, batch_size: int) -> Tensor:
        """``embed`` of batches, several at a time on a share of the cores each: a small model fills few."""
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
        """Names these vectors and captions by their content."""
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
    """The first 480,000 of (samples,)."""
    return waveform[:CROP_SAMPLES]


def vectors_key(split: Split, encoder: ClapEncoder) -> Key:
    """What the vectors depend on: encoder, crop, clips, captions, sound files, and how scenes are mixed from them."""
    return key("vectors", VECTORS_RECIPE, encoder=encoder.weights_sha256, dtype=str(encoder.dtype), crop=CROP_RULE,
               clips=content(split.clip_ids, split.frame.to_csv(index=False).split("\n")),
               captions=content([text for texts in split.captions for text in texts]),
               sounds=split.manifest, mixing=MIX_RECIPE)


def load_embeddings(profile: Profile, split: str) -> Embeddings:
    """Read the cached vectors of ``split`` without the encoder; FileNotFoundError says which command makes them."""
    found = load_checkpoint(profile.cache_dir / "embeddings" / f"{split}.safetensors")
    if found is None:
        raise FileNotFoundError(f"embeddings for split '{split}' are missing: run notebook 02, or "
                                f"./run_all.sh --profile {profile.name} --only 02")
    parts: dict[str, Any] = {**found[0], **found[1]}
    return Embeddings(split=split, **parts)


def embed_split(profile: Profile, split: Split, encoder: ClapEncoder, progress: bool = True,
                accelerator: Accelerator | None = None) -> Embeddings:
    """Embed a split, or read what is there already; a killed call goes on at the shard of 512 clips it was in.

    Clips that cannot be used are named in ``skipped``, and with those that are not on disk in
    ``results/<profile>/unusable_clips.csv``. The processes of ``accelerator`` share the shards, each with its own
    encoder; the result is that of one process (to rounding, where few clips make smaller shards).
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    wait = accelerator.wait_for_everyone if accelerator is not None else lambda: None
    name = vectors_key(split, encoder)
    final = profile.cache_dir / "embeddings" / f"{split.name}.safetensors"
    if load_checkpoint(final, name) is None:
        size = min(SHARD_SIZE, -(-len(split) // world))
        shards = final.with_name(f"{split.name}-{name.digest}-{size}")
        files = [shards / f"{start:08d}.safetensors" for start in range(0, len(split), size)]
        with tqdm(total=len(split), desc=f"{split.name}: audio", unit="clip", disable=not progress) as bar:
            for number, shard in enumerate(files):
                places = range(number * size, min((number + 1) * size, len(split)))
                if number % world == rank and load_checkpoint(shard, name) is None:    # nothing of it stays in memory
                    _embed_shard(shard, split, places, encoder, name)
                bar.update(len(places))
        wait()                                                      # for every shard
        if rank == 0:
            _merge(profile, split, encoder, final, name, files)
        wait()
    if rank == 0:
        for folder in final.parent.glob(f"{final.stem}-*"):         # also those that a killed run of other clips left
            shutil.rmtree(folder)
    return load_embeddings(profile, split.name)


def decode(split: Split, places: Sequence[int], workers: int = 4) -> Iterator[tuple[int, np.ndarray | AudioError]]:
    """Decode clips in threads, in order; a clip that cannot be used comes as its error."""
    def one(place: int) -> np.ndarray | AudioError:
        try:                                                        # a sound must not be silent where it is heard
            return check_waveform(crop(split.waveform(place)), SAMPLING_RATE, split.clip_ids[place])
        except AudioError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        yield from zip(places, pool.map(one, places), strict=True)


def _embed_shard(shard: Path, split: Split, places: range, encoder: ClapEncoder, name: Key) -> None:
    """Embed some clips, by length so that a batch holds little padding, and store the rows of the good ones."""
    sounds, skipped = {}, []
    for place, sound in decode(split, places):
        if isinstance(sound, AudioError):
            skipped.append(str(sound))
        else:
            sounds[place] = sound
    by_length = sorted(sounds, key=lambda place: len(sounds[place]))
    rows = encoder.embed_audio([sounds[place] for place in by_length])
    tensors = {"audio": rows[np.argsort(by_length, kind="stable")], "places": torch.tensor(list(sounds)).long()}
    save_checkpoint(shard, tensors, {"skipped": skipped}, name)


def _merge(profile: Profile, split: Split, encoder: ClapEncoder, final: Path, name: Key, files: list[Path]) -> None:
    """Put the shards together, embed the captions, and list the clips that could not be used."""
    rows, kept, skipped = [], [], []
    for file in files:
        if (part := load_checkpoint(file, name)) is None:           # it was whole when it was written
            raise OSError(f"{file} cannot be read any more: run the same command again, it makes what is missing")
        rows.append(part[0]["audio"])
        kept += part[0]["places"].tolist()
        skipped += part[1]["skipped"]
    if not kept:
        raise AudioError(f"none of the {len(split)} clips of split '{split.name}' could be used: "
                         + "; ".join(skipped[:3]))
    captions = [text for place in kept for text in split.captions[place]]
    counts = torch.tensor([len(split.captions[place]) for place in kept])
    tensors = {"audio": torch.cat(rows), "text": encoder.embed_text(captions),
               "text_clip": torch.repeat_interleave(torch.arange(len(kept)), counts)}
    columns = ("split", "clip_id", "reason")
    unusable = RowFile(profile.results_dir / "unusable_clips.csv", columns, columns[:2])
    unusable.remove(split=split.name)
    broken = [split.clip_ids[place] for place in sorted(set(range(len(split))) - set(kept))]
    if reasons := dict.fromkeys(split.missing, "not on disk") | dict(zip(broken, skipped, strict=True)):
        unusable.add([{"split": split.name, "clip_id": clip_id, "reason": why} for clip_id, why in reasons.items()])
    lists = {"clip_ids": [split.clip_ids[place] for place in kept], "captions": captions, "skipped": skipped}
    save_checkpoint(final, tensors, lists, name)


class HubClapBackend:
    """transformers' ``ClapModel`` by hub name or folder, the default door; D is 512 for LAION's checkpoints.

    ``weights_sha256`` covers the weights, the tokenizer and the front end's settings.
    """

    def __init__(self, model: ClapModel, processor: ClapProcessor, device: str) -> None:
        self.model, self.processor, self.device = model.eval().to(device), processor, device
        self.embed_dim = model.config.projection_dim
        self.weights_sha256 = digest(model.state_dict(), tokenizer_text(processor.tokenizer),
                                     processor.feature_extractor.to_json_string())
        fused = model.config.audio_config.enable_fusion
        self.truncation = "fusion" if fused else "rand_trunc"       # it chooses the mel filters, too

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str = "cpu") -> HubClapBackend:
        """Open "laion/clap-htsat-unfused", another hub name, or a folder made by ``save_pretrained``.

        Raises:
            FileNotFoundError: neither in a folder nor in the hub's cache, and the hub does not give it.
            ValueError: weights are missing, or the tokenizer does not fit.
        """
        from transformers import ClapModel, ClapProcessor

        where = str(name_or_path)
        try:
            model, loading = ClapModel.from_pretrained(where, dtype=torch.float32, output_loading_info=True)
            processor = ClapProcessor.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"no whole ClapModel at {where!r} ({short_error(error)}): give a folder made by "
                                    "save_pretrained, or, once with a connection and HF_HUB_OFFLINE unset, fetch it: "
                                    f"hf download {where}") from None
        again = f"copy the whole folder again, or hf download {where}"
        if absent := sorted(set(loading["missing_keys"]) & {name for name, _ in model.named_parameters()}):
            raise ValueError(f"{where}: {len(absent)} weights of a ClapModel are missing, {absent[0]} first, "
                             f"and would be random: {again}")
        check_vocabulary(processor.tokenizer, model.config.text_config.vocab_size, where, again)
        return cls(model, processor, device)

    @torch.inference_mode()
    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> Tensor:
        """See :class:`Backend`."""
        inputs = self.processor(audio=list(waveforms), sampling_rate=SAMPLING_RATE, truncation=self.truncation,
                                padding="repeatpad", return_tensors="pt")
        inputs["is_longer"] = torch.zeros_like(inputs["is_longer"])         # a fused model marks one clip at random
        return F.normalize(self.model.get_audio_features(**inputs.to(self.device)).pooler_output, dim=1)

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """See :class:`Backend`."""
        tokens = self.processor.tokenizer(list(captions), padding=True, truncation=True, max_length=MAX_TOKENS,
                                          return_tensors="pt").to(self.device)      # (B, tokens)
        return F.normalize(self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output, dim=1)


class LaionClapBackend:
    """LAION's official ``.pt`` through laion-clap itself; D is 512. ``weights_sha256``: of weights and tokenizer."""

    def __init__(self, clap: nn.Module, weights_sha256: str) -> None:
        self.clap, self.weights_sha256, self.embed_dim = clap.eval(), weights_sha256, clap.model.joint_embed_shape

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device: str = "cpu", *,
                        tokenizer: str | Path | None = None) -> LaionClapBackend:
        """Open a ``.pt``; see :func:`read_laion_checkpoint` for what is refused.

        ``tokenizer`` is the folder or hub name of roberta-base's tokenizer; by default the environment variable
        DL_ROBERTA_TOKENIZER, then the folder ``name/tokenizer`` beside ``name.pt``, then "roberta-base" from the hub.
        """
        from transformers import RobertaTokenizer

        path = Path(name_or_path)
        state = read_laion_checkpoint(path)
        amodel = AMODELS.get(len(state.get("audio_branch.patch_embed.proj.weight", ())))
        layers = sum(name.endswith("intermediate.dense.weight") for name in state)
        if not (amodel and layers):
            raise ValueError(f"{path} is no LAION-CLAP with HTSAT and RoBERTa towers: give 630k-audioset-best.pt or "
                             "another of LAION's HTSAT files")
        beside = path.with_suffix("") / "tokenizer"
        where = str(tokenizer or os.environ.get(TOKENIZER_VARIABLE) or (beside if beside.is_dir() else "roberta-base"))
        advice = (f"set {TOKENIZER_VARIABLE} to a folder with roberta-base's tokenizer files, "
                  "or fetch it once: hf download roberta-base")
        try:
            roberta = RobertaTokenizer.from_pretrained(where)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer at {where!r} ({short_error(error)}): {advice}") from None
        check_vocabulary(roberta, ROBERTA["vocab_size"], where, advice)
        clap = build_laion_clap(amodel, {"num_hidden_layers": layers}, roberta, device)
        try:
            clap.model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit {amodel} ({short_error(error)}): "
                             "give an unfused file, or laion/clap-htsat-fused by its hub name") from None
        return cls(clap, digest(state, tokenizer_text(roberta), amodel))

    @torch.inference_mode()
    def embed_audio(self, waveforms: Sequence[np.ndarray]) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(self.clap.get_audio_embedding_from_data(list(waveforms)))

    @torch.inference_mode()
    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """See :class:`Backend`."""
        return torch.from_numpy(self.clap.get_text_embedding(list(captions)))


def digest(state: dict[str, Tensor], *settings: str) -> str:
    """SHA-256 over names, types, shapes and bytes of the tensors, whatever their file, and over ``settings``."""
    total = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges and rules as one string, without the padding and truncation of the last call."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    return json.dumps(kept, sort_keys=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int, where: str, advice: str) -> None:
    """Refuse a tokenizer that is not the text tower's: offline, transformers may answer with one of 5 tokens."""
    if len(tokenizer) != size:
        raise ValueError(f"the tokenizer of {where} has {len(tokenizer)} tokens, the text tower {size}: {advice}")


def short_error(error: Exception) -> str:
    """An error's first 160 characters on one line."""
    return " ".join(str(error).split())[:160]


def read_laion_checkpoint(path: str | Path, *, allow_pickle: bool = False, sha256: str = "") -> dict[str, Tensor]:
    """The weights of an unfused ``.pt``, such as ``630k-audioset-best.pt``; its SHA-256 is printed.

    The file is a pickle, read with ``weights_only=True``, which runs no code of it; numpy's scalars are allowed, as a
    training state holds them. Where that is refused, it is read only with ``allow_pickle=True`` and its own
    ``sha256``: do so only for a file you trust.

    FileNotFoundError: no such file. ValueError: another SHA-256, a pickle without consent, or no torch file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is missing: download it from LAION's CLAP page, then give its path")
    found = sha256_file(path)
    print(f"{Path(path).name}  sha256 {found}")
    if sha256 not in ("", found):
        raise ValueError(f"{path} has sha256 {found}, not {sha256}: download it again, or name this one")
    scalar = (importlib.import_module("numpy.core.multiarray").scalar, "numpy.core.multiarray.scalar")
    types: list[Any] = [np.dtype, np.dtypes.Int64DType, np.dtypes.Float64DType, np.dtypes.Float32DType]
    try:
        with torch.serialization.safe_globals([scalar, *types]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not (allow_pickle and sha256):
            raise ValueError(f"{path} is a pickle that can run code: if you trust it, make one of it that cannot, "
                             "in Python: from dl.clap import convert_laion_checkpoint; convert_laion_checkpoint("
                             f"{str(path)!r}, 'clean.pt', allow_pickle=True, sha256={found!r})") from None
        stored = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a torch checkpoint ({short_error(error)}): download it again") from None
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    old = ("text_branch.embeddings.position_ids", "text_branch.embeddings.token_type_ids")      # of older transformers
    state = {name.removeprefix("module."): value for name, value in stored.items() if isinstance(value, Tensor)}
    return {name: value.detach() for name, value in state.items() if name not in old}


def convert_laion_checkpoint(path: str | Path, out: str | Path, **consent: Any) -> None:
    """Write the weights of a ``.pt`` alone to ``out``, a ``.pt`` that opens without consent."""
    torch.save(read_laion_checkpoint(path, **consent), out)


def build_laion_clap(amodel: str, text_config: dict, tokenizer: object, device: str = "cpu") -> Any:
    """An untrained ``laion_clap.CLAP_Module`` without the hub; ``text_config`` is what differs from roberta-base."""
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    laion_clap = import_laion_clap()
    config = RobertaConfig(**ROBERTA | text_config)
    with (torch.random.fork_rng(), patch.object(RobertaTokenizer, "from_pretrained", lambda *_, **__: tokenizer),
          patch.object(RobertaModel, "from_pretrained", lambda *_, **__: RobertaModel(config))):
        return laion_clap.CLAP_Module(enable_fusion=False, device=device, amodel=amodel)


def import_laion_clap() -> ModuleType:
    """Import laion_clap without torchvision and the hub; ``sys.path`` and ``sys.modules["torchvision"]`` stay."""
    if "laion_clap" in sys.modules:
        return sys.modules["laion_clap"]
    # transformers loads these on use and remembers whether torchvision is there: both before the stub can be seen
    from transformers import BartModel, BertModel, PreTrainedTokenizerBase, RobertaModel  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    stub = ModuleType("torchvision")                                # what laion_clap imports from it exists, unused
    vars(stub)["__getattr__"] = lambda name: type(name, (), {})
    absent = importlib.util.find_spec("torchvision") is None
    names = ["torchvision" + part for part in ("", ".datasets", ".ops", ".ops.misc", ".transforms")] if absent else []
    sys.modules.update(dict.fromkeys(names, stub))
    path = list(sys.path)
    try:
        with patch.object(PreTrainedTokenizerBase, "from_pretrained", lambda *_, **__: None):        # it fetches three
            return importlib.import_module("laion_clap")
    finally:
        sys.path[:] = path                                          # laion_clap appends its folder
        for name in names:
            sys.modules.pop(name, None)
