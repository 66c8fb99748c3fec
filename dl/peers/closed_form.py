"""Peers with a closed form: maps from audio vectors towards text vectors that need no gradient step.

Notation: a, t are unit-norm audio and text embeddings of the training split, mean_a and mean_t their means, norm(x) = x / ||x||.
A clip counts once in mean_a, a caption once in mean_t; a method that uses pairs takes every (clip, caption) pair with equal weight.
Sums run in float64, answers are float32. Hyper-parameters are keyword arguments of ``__init__`` and are tuned on val.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from dl.peers.base import Peer


class Raw(Peer):
    """a as it is: the gap that every other row starts from."""

    source = "the frozen encoder"


class MeanShift(Peer):
    """norm(a + mean_t - mean_a)."""

    fitted = ("audio_mean", "text_mean")
    source = "Liang et al., NeurIPS 2022 (Mind the Gap)"

    def _map(self, audio: Tensor) -> Tensor:
        return audio + (self.text_mean - self.audio_mean)


class C3(Peer):
    """norm(a - mean_a), against texts centred alike; the decoder is trained on noisy centred texts.

    Args:
        noise_variance: v of the decoder's N(0, v I); 0.016 as published for CLIP, to be tuned anew for CLAP.
    """

    centred = True
    fitted = ("audio_mean", "text_mean")
    source = "Zhang et al., ICLR 2024 (Connect, Collapse, Corrupt)"

    def __init__(self, noise_variance: float = 0.016) -> None:
        self.decoder_noise_variance = noise_variance

    def _map(self, audio: Tensor) -> Tensor:
        return audio - self.audio_mean


class CapDec(Peer):
    """a as it is at test time: the decoder alone was made robust, trained on norm(t + N(0, v I)); its gap equals raw's.

    Args:
        noise_variance: v; 0.016 as published for CLIP.
    """

    source = "Nukrai et al., EMNLP Findings 2022 (CapDec)"

    def __init__(self, noise_variance: float = 0.016) -> None:
        self.decoder_noise_variance = noise_variance


class ReAlign(Peer):
    """e = norm((a - mean_a) sqrt(tr_t / tr_a) + mean_t), then norm(e - mean_e + mean_t); tr is the mean squared distance to the mean.

    mean_e is the mean of e over the training clips: normalising moves the centroid, the last step takes it back.
    """

    fitted = ("audio_mean", "text_mean", "drift")
    source = "ReAlign, arXiv 2602.07026"

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        spread = (audio - self.audio_mean).square().sum(1).mean().sqrt()
        self.gain = self.text_radius / float(spread.clamp_min(1e-12))
        self.drift = self.text_mean - self._scaled(audio).mean(0)

    def _scaled(self, audio: Tensor) -> Tensor:
        return normalize((audio - self.audio_mean) * self.gain + self.text_mean, dim=-1)

    def _map(self, audio: Tensor) -> Tensor:
        return self._scaled(audio) + self.drift


class Linear(Peer):
    """A linear map between the centred modalities: norm(mean_t + (a - mean_a) M); ``_fit`` finds M, (D, D)."""

    fitted: tuple[str, ...] = ("audio_mean", "text_mean", "matrix")
    matrix: Tensor

    def _map(self, audio: Tensor) -> Tensor:
        return self.text_mean + (audio - self.audio_mean) @ self.matrix

    def _pairs(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> tuple[Tensor, Tensor]:
        """Every (clip, caption) pair about its own mean: A, T (m, D) each."""
        paired_audio = audio[text_clip]
        self.audio_mean = paired_audio.mean(0)
        return paired_audio - self.audio_mean, text - self.text_mean


class WhiteningColouring(Linear):
    """norm(mean_t + C_t^(1/2) C_a^(-1/2) (a - mean_a)): the second moments of text, without looking at pairs.

    Args:
        shrinkage: s of C <- (1 - s) C + s (tr C / D) I, in 0..1, the same for both modalities. [ours]
    """

    source = "whitening and colouring, as CORAL (Sun et al., AAAI 2016)"

    def __init__(self, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        self.matrix = self._power(audio - self.audio_mean, -0.5) @ self._power(text - self.text_mean, 0.5)

    def _power(self, centred: Tensor, exponent: float) -> Tensor:
        covariance = centred.T @ centred / len(centred)
        values, vectors = torch.linalg.eigh(covariance)
        values = (1 - self.shrinkage) * values.clamp_min(0) + self.shrinkage * values.mean()
        return vectors * values.clamp_min(1e-12).pow(exponent) @ vectors.T


class Memory(Peer):
    """Answers made of the training captions M, (m, D), which are kept; ``_read`` turns the cosines a M^T into an answer."""

    uses_memory = True

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        self.memory = text.float()

    def _read(self, cosines: Tensor) -> Tensor:
        raise NotImplementedError

    def _map(self, audio: Tensor) -> Tensor:
        return torch.cat([self._read(rows @ self.memory.T) for rows in audio.float().split(256)])


class Projection(Memory):
    """w = softmax(scale a M^T) over the training captions M, answer norm(w M).

    Args:
        scale: inverse temperature; 100 as published.
    """

    source = "projection decoding: DeCap (ICLR 2023), WSAC, DRCap"

    def __init__(self, scale: float = 100.0) -> None:
        self.scale = scale

    def _read(self, cosines: Tensor) -> Tensor:
        return torch.softmax(self.scale * cosines, dim=1) @ self.memory


class NearestText(Memory):
    """The training caption with the highest cosine: the argmax row of a M^T."""

    source = "nearest neighbour among the training captions"

    def _read(self, cosines: Tensor) -> Tensor:
        return self.memory[cosines.argmax(1)]


class Procrustes(Linear):
    """norm(mean_t + (a - mean_a) R), R = U V^T from the SVD U S V^T = A^T T: the best rotation or reflection.

    [ours: centred, without a scale]
    """

    uses_pairs = True
    source = "orthogonal Procrustes (Schoenemann, 1966)"

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        u, _, vh = torch.linalg.svd(a.T @ t)
        self.matrix = u @ vh


class Ridge(Linear):
    """norm(mean_t + (a - mean_a) M), M = (A^T A + lambda I)^-1 A^T T, lambda = alpha tr(A^T A) / D.

    The intercept is not penalised (it is what centring does).

    Args:
        alpha: penalty as a share of the mean eigenvalue of A^T A, so that it does not depend on how many pairs there are. [ours]
    """

    uses_pairs = True
    source = "ridge regression"

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        gram = a.T @ a
        self.penalty = self.alpha * float(gram.diagonal().mean()) or 1.0      # all sounds alike: A is 0, and so is M, whatever lambda
        self.matrix = torch.linalg.solve(gram + self.penalty * torch.eye(len(gram), dtype=gram.dtype), a.T @ t)


class PLSHead(Linear):
    """PLS-SVD: U S V^T = T^T A, keep k directions; norm(mean_t + U_k V_k^T (a - mean_a)).

    Audio's scores on its k shared directions are read as text's scores on theirs. [ours: the way back into the text space]

    Args:
        num_directions: k; 100 as published, at most D.
    """

    uses_pairs = True
    fitted = ("audio_mean", "text_mean", "audio_directions", "text_directions")
    source = "PLSHead-100 (COMET, arXiv 2605.29628)"

    def __init__(self, num_directions: int = 100) -> None:
        self.num_directions = num_directions

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        u, _, vh = torch.linalg.svd(t.T @ a)
        k = min(self.num_directions, len(u))
        self.audio_directions, self.text_directions = vh[:k].T, u[:, :k]

    def _map(self, audio: Tensor) -> Tensor:
        return self.text_mean + (audio - self.audio_mean) @ self.audio_directions @ self.text_directions.T
