"""Several vectors for one sound: samplers with and without diffusion, what is read out of their samples, and what a control must match.

A sampler draws S unit vectors for every sound. Read out: the mean of the samples, their spread, or the consensus of their captions. ``frontier`` and
``weighted_spearman`` are the measures of ``dl.studies.generative``, which runs the experiments of notebook A3. [ours, unless marked]
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from dl.bootstrap import ClipCounts
from dl.caption_metrics import sentence_vectors
from dl.clap import Embeddings
from dl.config import Profile
from dl.experiments import fit_system
from dl.scheduler import standard_normal

NUM_SAMPLES = 5                                     # S
DIFFUSION = ("diffusion_link_ddim", "conditional_diffusion")


# ------------------------------------------------------------------------------------------------------------------- samples
@dataclass(frozen=True)
class Sampler:
    """A way to draw several vectors for a sound.

    Attributes:
        name: of the family: a stochastic system of ``dl.peers``, or ``<mapping>_noise`` (isotropic), ``<mapping>_residual`` (noise shaped
            like the errors of the mapping on train).
        sigma: root mean square length of the noise that is added to the unit vector; of ``_residual``, a multiple of the residuals.
        call: start_timestep and num_inference_steps of a diffusion system; empty means those chosen on val.
    """

    name: str
    sigma: float = 0.0
    call: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name with its setting, as captions in the cache and rows of the distribution are called."""
        if self.call:
            return f"{self.name}@k{self.call['start_timestep']}n{self.call['num_inference_steps']}"
        return f"{self.name}@s{self.sigma:.4g}" if self.name.endswith(("_noise", "_residual")) else self.name

    @property
    def setting(self) -> float:
        """The knob as a number: k*, or n of a system that starts from pure noise, or sigma."""
        return self.call["num_inference_steps" if self.name == "conditional_diffusion" else "start_timestep"] if self.call else self.sigma


def diffusion(name: str, start_timestep: int, num_inference_steps: int) -> Sampler:
    """A diffusion system entered at k* and sampled in n steps."""
    return Sampler(name, call={"start_timestep": start_timestep, "num_inference_steps": num_inference_steps})


def noised(mean: Tensor, sigma: float, noise_seeds: Sequence[int], shape: Tensor | None = None) -> Tensor:
    """norm(m + sigma eps L) for each noise seed, L = I / sqrt(D) unless ``shape`` (D, D) is given; (n, D) -> (S, n, D)."""
    draws = [standard_normal(mean.shape, torch.Generator().manual_seed(s), mean.device) for s in noise_seeds]
    return torch.stack([normalize(mean + sigma * (eps / mean.shape[1] ** 0.5 if shape is None else eps @ shape), dim=1) for eps in draws])


def draw_samples(
    profile: Profile, sampler: Sampler, train: Embeddings, audio: Tensor, seed: int, noise_seeds: Sequence[int] = range(NUM_SAMPLES)
) -> Tensor:
    """S vectors for every sound, one for each noise seed.

    ``_noise``: :func:`noised` of the mapping's answer. ``_residual``: the same with eps L drawn from N(0, C),
    C the second moments of t - m(a) on train.

    Args:
        audio: (n, D).
        seed: training seed of the system.

    Returns:
        (S, n, D) float32, unit norm.
    """
    mapping, _, kind = sampler.name.rpartition("_")
    if kind not in ("noise", "residual"):
        peer = fit_system(profile, sampler.name, train, seed)
        if sampler.call:
            peer.set_inference(**sampler.call)
        return torch.stack([peer(audio, noise_seed=s) for s in noise_seeds])
    peer, shape = fit_system(profile, mapping, train, seed), None
    if kind == "residual":
        residual = (train.text - peer(train.audio)[train.text_clip]).double()
        moments = residual.T @ residual / len(residual)
        shape = torch.linalg.cholesky(moments + 1e-9 * torch.eye(len(moments))).T.float()
    return noised(peer(audio), sampler.sigma, noise_seeds, shape)


def mean_vector(samples: Tensor) -> Tensor:
    """norm of the mean of the samples; (S, n, D) -> (n, D)."""
    return normalize(samples.mean(0), dim=1)


def spread(samples: Tensor) -> Tensor:
    """Mean squared distance of a sound's samples to their mean; (S, n, D) -> (n,)."""
    return (samples - samples.mean(0)).square().sum(-1).mean(0)


def match_sigma(mean: Tensor, target: float, noise_seeds: Sequence[int] = range(NUM_SAMPLES), steps: int = 20) -> float:
    """sigma in 0..4 at which :func:`noised` answers have the mean spread ``target``, by bisection; mean is (n, D)."""
    low, high = 0.0, 4.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if float(spread(noised(mean, middle, noise_seeds)).mean()) < target else (low, middle)
    return (low + high) / 2


# ----------------------------------------------------------------------------------------------------------------- consensus
def consensus(captions: list[list[str]], vectors_of: Callable[[list[str]], Tensor] = sentence_vectors) -> NDArray:
    """For each clip the sample whose caption is, on average, most similar to the other samples' captions (MBR); ties go to the first.

    Args:
        captions: S lists of n captions.
        vectors_of: sentences -> unit vectors (m, d); the similarity is their cosine.

    Returns:
        (n,) int, in 0..S-1.
    """
    sentences = list(dict.fromkeys(caption for sample in captions for caption in sample))
    vectors, place = vectors_of(sentences), {caption: i for i, caption in enumerate(sentences)}
    chosen = vectors[torch.tensor([[place[caption] for caption in sample] for sample in captions])]           # (S, n, d)
    risk = torch.einsum("snd,tnd->stn", chosen, chosen)
    return (risk.sum(1) - risk.diagonal().T).numpy().round(6).argmax(0)


# ----------------------------------------------------------------------------------------------------------------- measures
def weighted_ranks(values: NDArray, weights: NDArray) -> NDArray:
    """Mid-ranks of values (n,) when item i stands weights[r, i] times; (R, n)."""
    _, group = np.unique(values, return_inverse=True)
    members = np.eye(group.max() + 1)[group]                                # (n, g), which tie an item belongs to
    counts = weights @ members                                              # (R, g), in the order of the values
    return (np.cumsum(counts, 1) - counts / 2)[:, group]


def weighted_spearman(x: NDArray, y: NDArray, weights: NDArray) -> NDArray:
    """Spearman's correlation when item i stands weights[r, i] times; (R, n) -> (R,)."""
    w = weights / weights.sum(1, keepdims=True)
    ranks = [weighted_ranks(values, weights) for values in (x, y)]
    a, b = (rank - (w * rank).sum(1, keepdims=True) for rank in ranks)
    return (w * a * b).sum(1) / np.sqrt((w * a * a).sum(1) * (w * b * b).sum(1))


def of_weights(n: int, statistic: Callable[[NDArray], NDArray]) -> ClipCounts:
    """A metric that is any function of the clips' weights (R, n) -> (R,), as ``score_clips`` takes it."""
    def guarded(weights: NDArray) -> NDArray:
        values, counts = np.full(len(weights), np.nan), weights.sum(1) > 0
        if counts.any():
            with np.errstate(divide="ignore", invalid="ignore"):
                values[counts] = statistic(weights[counts])
        return values
    return ClipCounts(np.eye(n), guarded)


def frontier(pair_cosine: NDArray, frechet: NDArray, target: float, points: int = 100) -> float:
    """The lowest Frechet distance that a control reaches at a pair cosine of at least ``target``.

    The control's settings are joined by straight lines. Where ``target`` is above its highest pair cosine the control is taken at its highest one: it
    then loses on pair cosine, and the comparison is kind to it.

    Args:
        pair_cosine, frechet: (m,) along the control's knob.
        target: a pair cosine.

    Example:
        >>> float(frontier(np.array([0.5, 0.3]), np.array([0.4, 0.2]), 0.4))
        0.3
    """
    along = np.linspace(0, len(pair_cosine) - 1, (len(pair_cosine) - 1) * points + 1)
    cosine, distance = (np.interp(along, np.arange(len(pair_cosine)), values) for values in (pair_cosine, frechet))
    return distance[cosine >= min(target, cosine.max()) - 1e-12].min()
