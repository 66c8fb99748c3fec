"""What an encoder must offer, and the two LAION-CLAP doors of :class:`dl.encoder.clap.ClapEncoder`: transformers' ``ClapModel`` and laion-clap's own files.

Both hold frozen weights [paper~], hear mono float32 at 48 kHz of at most 10 s, repeat shorter clips to fill 10 s ("repeatpad"
[peer: LAION-CLAP]) and read at most 77 tokens of a caption [peer: LAION-CLAP]. laion-clap also rounds samples to 16 bits and
computes its own log-mel: on the same (random) weights the rows of both doors lie 1e-5 apart. transformers and laion-clap are
imported on use, never with this module.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dl.data import SAMPLING_RATE
from dl.encoder.clap import CROP_SAMPLES
from dl.encoder.laion import (
    SETTINGS_FILE,
    WEIGHTS_FILE,
    build_laion_clap,
    check_vocabulary,
    converted_folder,
    load_roberta_tokenizer,
    short_error,
)

if TYPE_CHECKING:
    from transformers import ClapModel, ClapProcessor, PreTrainedTokenizerBase

MAX_TOKENS = 77                            # [peer: LAION-CLAP]


class Backend(Protocol):
    """What an encoder must offer to stand behind :class:`dl.encoder.clap.ClapEncoder`; ``from_pretrained(where, device)`` makes it.

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
