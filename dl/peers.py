"""Every system of Table 1 that maps an audio vector towards text, by name: closed forms and trained ones.

A *centred* peer (C3, Diffusion Bridge) answers in the space where a text reads norm(t - mean_t). ``space="centred"``
gives that answer, ``space="text"`` (the main row) takes it back by ``uncentre``. Notation: norm(x) = x / ||x||; mean_a
and mean_t are the means of the training vectors, a clip counting once in mean_a and a caption once in mean_t.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss, normalize

from dl.bridge import INFERENCE_FIELDS, BridgeNetwork, DiffusionLink, combined_losses, unit_rows
from dl.config import BridgeConfig
from dl.scheduler import DDIMScheduler, ddim_sample, standard_normal
from dl.store import content
from dl.train import LossFn, PairSampler, fit, seeded, train_bridge

PEERS_RECIPE = 1      # goes up when a system gives other vectors from the same data (tests/test_recipes.py)
Losses = dict[str, Tensor]
Pairs = tuple[Tensor, Tensor] | None      # paired rows of val, (v, D) each


def centre(embeddings: Tensor, mean: Tensor) -> Tensor:
    """Into the centred space of a modality: norm(e - mean). (B, D), (D,) -> (B, D) float32 unit norm. [peer: C3]"""
    return normalize(embeddings.double() - mean.double().to(embeddings.device), dim=-1).float()


def uncentre(centred_emb: Tensor, text_mean: Tensor, text_radius: float) -> Tensor:
    """Back from the centred text space: norm(mean_t + r_t u), r_t = sqrt(mean ||t - mean_t||^2) of the training split.

    Centring divides every text by its own distance to mean_t; their root mean square r_t is put back for all, so that
    the answer stands among the texts. [ours: the peers decode in the centred space and need no way back]
    (B, D), (D,) -> (B, D) float32 unit norm.
    """
    mean = text_mean.double().to(centred_emb.device)
    return normalize(mean + text_radius * centred_emb.double(), dim=-1).float()


class Peer:
    """What every peer offers: ``fit`` on the training split, then a call that maps audio vectors. Here: identity."""
    uses_pairs = False                  # fit looks at which caption belongs to which clip
    uses_memory = False                 # training captions are kept and read at test time
    trained = False                     # gradient steps were taken
    stochastic = False                  # the answer depends on noise_seed
    centred = False                     # the method answers in the centred text space
    decoder_noise_variance = 0.0        # v of the N(0, v I) noise on the texts that train the method's caption decoder
    fitted: tuple[str, ...] = ()        # names of the tensors that the map keeps, a memory apart
    audio_mean: Tensor
    text_mean: Tensor
    text_radius: float

    def fit(self, audio: Tensor, text: Tensor, text_clip: Tensor, *, seed: int = 0) -> Self:
        """Take what the method needs from the training split, and return the peer; a closed form ignores the seed.

        audio (n, D) and text (m, D) are float32 of unit norm, a row a clip and a row a caption; text_clip (m,) int64
        holds the row of ``audio`` that a caption belongs to.
        """
        audio, text = audio.detach().double().cpu(), text.detach().double().cpu()
        self.audio_mean, self.text_mean = audio.mean(0), text.mean(0)
        self.text_radius = float((text - self.text_mean).square().sum(1).mean().sqrt())
        self._fit(audio, text, text_clip.cpu())
        return self

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        """What the method adds to the two means; (n, D) and (m, D) float64."""

    def _map(self, audio: Tensor) -> Tensor:
        """The map before its last normalisation; (B, D) float64 -> (B, D) float64."""
        return audio

    def _answer(self, audio_emb: Tensor, noise_seed: int) -> Tensor:
        """The method's answer in its own space; (B, D) -> (B, D) float32 unit norm."""
        return normalize(self._map(audio_emb.detach().double().cpu()), dim=-1).float()

    def __call__(self, audio_emb: Tensor, noise_seed: int = 0, space: str = "text") -> Tensor:
        """Map audio vectors, (B, D) float32 unit norm -> the same, on the same device.

        ``noise_seed`` is that of the noise at test time; ``space`` is "text", or for a centred peer "centred".

        Raises:
            ValueError: the method does not answer in that space, or the embeddings do not fit.
        """
        if space not in (("text", "centred") if self.centred else ("text",)):
            raise ValueError(f"{type(self).__name__} does not answer in space {space!r}: use space='text'")
        answer = self._answer(audio_emb, noise_seed).to(audio_emb.device)
        return uncentre(answer, self.text_mean, self.text_radius) if self.centred and space == "text" else answer

    @property
    def num_parameters(self) -> int:
        """How many fitted numbers the map keeps, a memory apart (the tensors that ``fitted`` names)."""
        return sum(getattr(self, name).numel() for name in self.fitted)


# ------------------------------------------------------------------------------------------------------- closed forms
class Raw(Peer):
    """a as it is: the gap that every other row starts from."""


class MeanShift(Peer):
    """norm(a + mean_t - mean_a). [peer: Liang et al., NeurIPS 2022 (Mind the Gap)]"""
    fitted = ("audio_mean", "text_mean")

    def _map(self, audio: Tensor) -> Tensor:
        return audio + (self.text_mean - self.audio_mean)


class CapDec(Peer):
    """a as it is at test time: the decoder was trained on norm(t + N(0, v I)); the gap equals raw's.

    ``noise_variance`` is v; 0.016 as published for CLIP. [peer: Nukrai et al., EMNLP Findings 2022]
    """

    def __init__(self, noise_variance: float = 0.016) -> None:
        self.decoder_noise_variance = noise_variance


class C3(CapDec):
    """norm(a - mean_a), against texts centred alike; the decoder is trained on noisy centred texts.

    ``noise_variance`` as in CapDec, to be tuned anew for CLAP. [peer: Zhang et al., ICLR 2024 (Connect, Collapse,
    Corrupt)]
    """
    centred = True
    fitted = ("audio_mean", "text_mean")

    def _map(self, audio: Tensor) -> Tensor:
        return audio - self.audio_mean


class ReAlign(Peer):
    """e = norm((a - mean_a) sqrt(tr_t / tr_a) + mean_t), then norm(e - mean_e + mean_t). [peer: arXiv 2602.07026]

    tr is the mean squared distance to the mean; mean_e is the mean of e over the training clips: normalising moves the
    centroid, the last step takes it back.
    """
    fitted = ("audio_mean", "text_mean", "drift")

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

    ``shrinkage`` is s of C <- (1 - s) C + s (tr C / D) I, in 0..1, the same for both modalities. [ours]
    [peer: as CORAL, Sun et al., AAAI 2016]
    """

    def __init__(self, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        self.matrix = self._power(audio - self.audio_mean, -0.5) @ self._power(text - self.text_mean, 0.5)

    def _power(self, centred: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        values = (1 - self.shrinkage) * values.clamp_min(0) + self.shrinkage * values.mean()
        return vectors * values.clamp_min(1e-12).pow(exponent) @ vectors.T


class Memory(Peer):
    """Answers made of the training captions M, (m, D), kept; ``_read`` turns cosines a M^T into answers."""
    uses_memory = True

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        self.memory = text.float()

    def _read(self, cosines: Tensor) -> Tensor:
        raise NotImplementedError

    def _map(self, audio: Tensor) -> Tensor:
        return torch.cat([self._read(rows @ self.memory.T) for rows in audio.float().split(256)])


class Projection(Memory):
    """w = softmax(scale a M^T) over the training captions M, answer norm(w M). [peer: DeCap, ICLR 2023; WSAC; DRCap]

    ``scale`` is 100 as published.
    """

    def __init__(self, scale: float = 100.0) -> None:
        self.scale = scale

    def _read(self, cosines: Tensor) -> Tensor:
        return torch.softmax(self.scale * cosines, dim=1) @ self.memory


class NearestText(Memory):
    """The training caption with the highest cosine: the argmax row of a M^T."""

    def _read(self, cosines: Tensor) -> Tensor:
        return self.memory[cosines.argmax(1)]


class Procrustes(Linear):
    """norm(mean_t + (a - mean_a) R), R = U V^T, SVD U S V^T = A^T T: the best orthogonal map. [ours: centred]

    [peer: Schoenemann, 1966]
    """
    uses_pairs = True

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        u, _, vh = torch.linalg.svd(a.T @ t)
        self.matrix = u @ vh


class Ridge(Linear):
    """norm(mean_t + (a - mean_a) M), M = (A^T A + lambda I)^-1 A^T T, lambda = alpha tr(A^T A) / D.

    Centring leaves the intercept without a penalty. ``alpha`` is the penalty as a share of the mean eigenvalue of
    A^T A, so that it does not depend on the number of pairs. [ours]
    """
    uses_pairs = True

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = alpha

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        gram = a.T @ a
        self.penalty = self.alpha * float(gram.diagonal().mean()) or 1.0      # all sounds alike: A and M are 0
        self.matrix = torch.linalg.solve(gram + self.penalty * torch.eye(len(gram), dtype=gram.dtype), a.T @ t)


class PLSHead(Linear):
    """PLS-SVD: U S V^T = T^T A, keep k directions; norm(mean_t + U_k V_k^T (a - mean_a)).

    Audio's scores on its k shared directions are read as text's scores on theirs [ours: the way back into the text
    space]. ``num_directions`` is k; 100 as published, at most D. [peer: PLSHead-100, COMET, arXiv 2605.29628]
    """
    uses_pairs = True
    fitted = ("audio_mean", "text_mean", "audio_directions", "text_directions")

    def __init__(self, num_directions: int = 100) -> None:
        self.num_directions = num_directions

    def _fit(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> None:
        a, t = self._pairs(audio, text, text_clip)
        u, _, vh = torch.linalg.svd(t.T @ a)
        self.audio_directions, self.text_directions = vh[: self.num_directions].T, u[:, : self.num_directions]
        self.matrix = self.audio_directions @ self.text_directions.T


# ------------------------------------------------------------------------------------------------------ gradient steps
class TrainedPeer(Peer):
    """What the trained peers share: hyper-parameters, a resumable fit, a seeded call.

    A method adds ``_losses`` (or ``loss_fn``) and ``_bridge``. Its hyper-parameters are fields of ``BridgeConfig``;
    what is not given comes from ``defaults``. After a fit, ``network`` holds the EMA weights and ``history`` the
    losses (see ``dl.train.fit``).
    """
    uses_pairs = True
    trained = True
    stochastic = True
    conditional = False                 # the network takes the audio vector beside the sample
    defaults = BridgeConfig()
    betas = (0.9, 0.999)
    network: nn.Module
    history: pd.DataFrame

    def __init__(self, **hyper_parameters: Any) -> None:
        self.config = replace(self.defaults, **hyper_parameters)

    def set_inference(self, **values: Any) -> None:
        """Change start_timestep, num_inference_steps or add_noise; the fit stays.

        Raises:
            ValueError: another hyper-parameter, which would need a new fit.
        """
        if other := sorted(set(values) - set(INFERENCE_FIELDS)):
            raise ValueError(f"{', '.join(other)} cannot change after the fit: only {', '.join(INFERENCE_FIELDS)} can")
        self.config = replace(self.config, **values)

    def fit(self, audio: Tensor, text: Tensor, text_clip: Tensor, *, seed: int = 0,
            checkpoint_path: str | Path | None = None, progress: bool = False, val: Pairs = None) -> Self:
        """Train on the training split, and return the peer; the device of ``audio`` is where it runs.

        ``checkpoint_path`` keeps the fit (see ``dl.train.fit``); ``val``, paired rows (v, D) each, is for the history
        of the bridge (see ``dl.train.train_bridge``).
        """
        audio = unit_rows(audio, None, "audio")
        text = unit_rows(text, audio.shape[1], "text")
        super().fit(audio, text, text_clip)
        self._train(audio, text, text_clip, val, seed=seed, checkpoint_path=checkpoint_path, progress=progress)
        return self

    def _train(self, audio: Tensor, text: Tensor, text_clip: Tensor, val: Pairs, *, seed: int, **how: Any) -> None:
        """Set ``network`` and ``history``."""
        config, embed_dim = self.config, audio.shape[1]
        with seeded(seed, audio.device):
            self.network = BridgeNetwork(embed_dim, config.num_blocks, config.width_factor, config.dropout,
                                         condition_dim=embed_dim if self.conditional else 0).to(audio.device)
        self.scheduler = DDIMScheduler(config.num_train_timesteps, config.beta_start, config.beta_end,
                                       config.beta_schedule)
        identity: dict[str, object] = {"system": [type(self).__name__, PEERS_RECIPE],
                                       "data": content(audio, text, text_clip)}
        self.history = fit(self.network, self.loss_fn(audio, text, text_clip), config, seed=seed, identity=identity,
                           betas=self.betas, **how)

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        """The function that draws a batch of (n, D), (m, D), (m,) and computes its losses."""
        sampler, scale = PairSampler(text_clip, len(audio)), audio.shape[1] ** 0.5

        def losses(network: nn.Module, generator: Generator) -> Losses:
            clips, captions = sampler.draw(self.config.batch_size, generator)
            return self._losses(network, scale * audio[clips], scale * text[captions], generator)

        return losses

    def _losses(self, network: nn.Module, x_audio: Tensor, x_text: Tensor, generator: Generator) -> Losses:
        """The losses of a batch of scaled pairs, (B, D) each."""
        raise NotImplementedError

    def _noised(self, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """x (B, D) at the levels k (B,), uniform in 0..T-1; and k."""
        timesteps = torch.randint(self.scheduler.num_train_timesteps, (len(x),), generator=generator).to(x.device)
        return self.scheduler.add_noise(x, standard_normal(x.shape, generator, x.device), timesteps), timesteps

    def _bridge(self, audio: Tensor, generator: Generator) -> Tensor:
        """The map (B, D) -> (B, D) float32, unit norm in and out."""
        raise NotImplementedError

    def _unit(self, embeddings: Tensor, name: str) -> Tensor:
        """The embeddings, checked, of unit norm and on the network's device."""
        return unit_rows(embeddings, self.network.embed_dim, name).to(next(self.network.parameters()).device)

    @torch.no_grad()
    def _answer(self, audio_emb: Tensor, noise_seed: int) -> Tensor:
        return self._bridge(self._unit(audio_emb, "audio_emb"), Generator().manual_seed(noise_seed))

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, and the means where the map uses them."""
        return super().num_parameters + sum(parameter.numel() for parameter in self.network.parameters())


class DiffusionLinkPeer(TrainedPeer):
    """Diffusion-Link, as far as it is known: ``dl.bridge`` and ``dl.train``. [paper: Nam et al., arXiv 2510.11330]"""
    link: DiffusionLink

    def _train(self, audio: Tensor, text: Tensor, text_clip: Tensor, val: Pairs, *, seed: int, **how: Any) -> None:
        self.link, self.history = train_bridge(self.config, audio, text, text_clip, val=val, seed=seed, **how)
        self.network = self.link.network

    def _bridge(self, audio: Tensor, generator: Generator) -> Tensor:
        config = self.config
        return self.link(audio, config.start_timestep, config.num_inference_steps, config.add_noise, generator)


class DiffusionLinkDDIM(DiffusionLinkPeer):
    """Diffusion-Link sampled in several DDIM steps; the training is the same, so the checkpoint may be shared."""
    defaults = BridgeConfig(num_inference_steps=5)


class SeedSetting(DiffusionLinkPeer):
    """Our network in the setting of [SEED] (arXiv 2505.16798): lambda = 0, k* = 50, one step."""
    defaults = BridgeConfig(topology_weight=0.0, start_timestep=50, num_inference_steps=1)


class TextToAudio(DiffusionLinkPeer):
    """The opposite direction: a second network, the roles of audio and text swapped; a call takes text vectors."""

    def _train(self, audio: Tensor, text: Tensor, text_clip: Tensor, val: Pairs, *, seed: int, **how: Any) -> None:
        paired_audio = audio[text_clip.to(audio.device)]
        super()._train(text, paired_audio, torch.arange(len(text)), val and val[::-1], seed=seed, **how)


class RegressionMLP(TrainedPeer):
    """The bridge's network as plain regression, audio to text: k = 0 and no noise, in training and at test. [ours]

    It tells how much of the bridge's gain needs diffusion at all. The text rows of the bridge's batch are left out.
    """
    stochastic = False
    defaults = BridgeConfig(topology_weight=0.0, self_weight=0.0, start_timestep=0, num_inference_steps=1,
                            add_noise=False)

    def _losses(self, network: nn.Module, x_audio: Tensor, x_text: Tensor, generator: Generator) -> Losses:
        return combined_losses(network(x_audio, torch.tensor(0)), None, x_text, self.config)

    def _bridge(self, audio: Tensor, generator: Generator) -> Tensor:
        return normalize(self.network(audio.shape[1] ** 0.5 * audio, torch.tensor(0)), dim=-1)


class RegressionMLPTopology(RegressionMLP):
    """The regression control with the bridge's topology loss. [ours: a control]"""
    defaults = replace(RegressionMLP.defaults, topology_weight=1.0)


class ConditionalDiffusion(TrainedPeer):
    """f(x^k, k, a): only the text vector is noised, the audio vector is a condition; sampling starts from noise.

    Loss: L1 between f and x_t. At test: x^{k*} = eps with k* = T - 1, then n DDIM steps. [peer: after DiffGAP, arXiv
    2503.12131 (10 to 50 steps), and the DALL-E 2 prior; its own hyper-parameters are unknown]
    """
    conditional = True
    defaults = BridgeConfig(topology_weight=0.0, self_weight=0.0, start_timestep=999, num_inference_steps=10)

    def _losses(self, network: nn.Module, x_audio: Tensor, x_text: Tensor, generator: Generator) -> Losses:
        sample, timesteps = self._noised(x_text, generator)
        return combined_losses(network(sample, timesteps, x_audio), None, x_text, self.config)

    def _bridge(self, audio: Tensor, generator: Generator) -> Tensor:
        x_audio = audio.shape[1] ** 0.5 * audio
        timesteps = self.scheduler.inference_timesteps(self.config.start_timestep, self.config.num_inference_steps)
        noise = standard_normal(audio.shape, generator, audio.device)
        sample = ddim_sample(lambda x, k: self.network(x, k, x_audio), self.scheduler, noise, timesteps)
        return normalize(sample, dim=-1)


class DiffusionBridge(TrainedPeer):
    """A text-only DDPM; the audio vector enters its reverse chain half-way, without added noise.

    u = 5 norm(norm(e) - mean of its modality). Training: x0 prediction, mean squared error weighted by
    abar_k / (1 - abar_k), cosine betas; the noised vector is renormalised to norm 5 before the network, in training
    and in sampling. Test: u of the audio vector enters at k* = 600, 5 DDIM steps, normalise. Published: Adam, lr 8e-5,
    betas (.9, .99), batch 64, EMA .995, a 1-D U-Net, 3 M steps. Ours: our network, far fewer steps, the EMA updated at
    every step and our spacing of the 5 levels. [peer: Lee et al., CVPR 2025]
    """
    uses_pairs = False
    stochastic = False
    centred = True
    fitted = ("audio_mean", "text_mean")
    defaults = BridgeConfig(
        beta_schedule="squaredcos_cap_v2", loss="l2", topology_weight=0.0, self_weight=0.0, dropout=0.0,
        learning_rate=8e-5, weight_decay=0.0, lr_schedule="constant", batch_size=64, ema_decay=0.995,
        start_timestep=600, num_inference_steps=5, add_noise=False)
    betas = (0.9, 0.99)
    norm = 5.0

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        clean = self.norm * centre(text, self.text_mean)

        def losses(network: nn.Module, generator: Generator) -> Losses:
            x = clean[torch.randint(len(clean), (self.config.batch_size,), generator=generator)]
            sample, timesteps = self._noised(x, generator)
            errors = mse_loss(network(self._project(sample), timesteps), x, reduction="none").mean(dim=1)
            return {"loss": (self.scheduler.snr(timesteps) * errors).mean(), "loss_unweighted": errors.mean()}

        return losses

    def _project(self, sample: Tensor) -> Tensor:
        return self.norm * normalize(sample, dim=-1)

    def _reverse(self, centred_emb: Tensor, start_timestep: int) -> Tensor:
        timesteps = self.scheduler.inference_timesteps(start_timestep, self.config.num_inference_steps)
        sample = ddim_sample(self.network, self.scheduler, self.norm * centred_emb, timesteps, project=self._project)
        return normalize(sample, dim=-1)

    def _bridge(self, audio: Tensor, generator: Generator) -> Tensor:
        return self._reverse(centre(audio, self.audio_mean), self.config.start_timestep)

    @torch.no_grad()
    def map_text(self, text_emb: Tensor, start_timestep: int = 400) -> Tensor:
        """The chain for the texts that train its decoder [peer]; (B, D) -> (B, D) float32 unit norm, centred."""
        centred_emb = centre(self._unit(text_emb, "text_emb"), self.text_mean)
        return self._reverse(centred_emb, start_timestep).to(text_emb.device)


TRAINED: dict[str, type[TrainedPeer]] = {
    "regression_mlp": RegressionMLP, "regression_mlp_topology": RegressionMLPTopology,
    "diffusion_bridge": DiffusionBridge, "conditional_diffusion": ConditionalDiffusion, "seed": SeedSetting,
    "diffusion_link": DiffusionLinkPeer, "diffusion_link_ddim": DiffusionLinkDDIM, "text_to_audio": TextToAudio,
}
REGISTRY: dict[str, type[Peer]] = {
    "raw": Raw, "mean_shift": MeanShift, "c3": C3, "capdec": CapDec, "realign": ReAlign,
    "whitening_colouring": WhiteningColouring, "projection": Projection, "nearest_text": NearestText,
    "procrustes": Procrustes, "ridge": Ridge, "pls_head": PLSHead, **TRAINED,
}


def build(name: str, **hyper_parameters: Any) -> Peer:
    """Make the system called ``name``, unfitted. Raises ValueError, with the known names, if there is none."""
    if name not in REGISTRY:
        raise ValueError(f"unknown system {name!r}: choose one of {', '.join(REGISTRY)}")
    return REGISTRY[name](**hyper_parameters)
