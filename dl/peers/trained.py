"""Peers that take gradient steps: Diffusion-Link itself, its controls without noise, and the other diffusion methods.

All use ``dl.bridge.network.BridgeNetwork`` and ``dl.bridge.training.fit``, so that the rows of Table 1 differ in method, not in network or
budget. Hyper-parameters are the fields of ``BridgeConfig`` as keyword arguments of ``__init__``; a class's ``defaults`` hold what
its recipe changes. k*, n and add_noise act at a call only: ``set_inference`` changes them on a fitted peer without new training.
"""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from dl.bridge.losses import combined_losses
from dl.bridge.network import INFERENCE_FIELDS, BridgeNetwork, DiffusionLink, unit_rows
from dl.bridge.scheduler import DDIMScheduler, ddim_sample, standard_normal
from dl.bridge.training import LossFn, PairSampler, fit, seeded, train_bridge
from dl.config import BridgeConfig
from dl.peers.base import Peer, centre, uncentre


class TrainedPeer(Peer):
    """What the trained peers share: hyper-parameters, a resumable fit, a seeded call.

    A method adds :meth:`loss_fn` and :meth:`_bridge`.

    Args:
        hyper_parameters: fields of ``BridgeConfig``; what is not given comes from the class's ``defaults``.

    Attributes:
        config: the hyper-parameters in force.
        network: the fitted network, EMA weights.
        history: the training history, one row for each of at most about 50 points (see ``dl.bridge.training.fit``).

    Raises:
        TypeError: a hyper-parameter that BridgeConfig does not have.
    """

    uses_pairs = True
    trained = True
    stochastic = True
    defaults = BridgeConfig()
    betas = (0.9, 0.999)
    network: nn.Module
    history: pd.DataFrame

    def __init__(self, **hyper_parameters: Any) -> None:
        self.config = replace(self.defaults, **hyper_parameters)

    def set_inference(self, **values: Any) -> TrainedPeer:
        """Change start_timestep, num_inference_steps or add_noise; the fit stays.

        Raises:
            ValueError: another hyper-parameter, which would need a new fit.
        """
        if other := sorted(set(values) - set(INFERENCE_FIELDS)):
            raise ValueError(f"{', '.join(other)} cannot change after the fit: only {', '.join(INFERENCE_FIELDS)} can")
        self.config = replace(self.config, **values)
        return self

    def fit(
        self, audio: Tensor, text: Tensor, text_clip: Tensor, *, seed: int = 0,
        checkpoint_path: str | Path | None = None, progress: bool = False, **context: Any,
    ) -> TrainedPeer:
        """Train on the training split.

        Args:
            audio, text, text_clip: (n, D), (m, D), (m,), as for every peer.
            seed: training seed.
            checkpoint_path: where the fit is kept and resumed from (see ``dl.bridge.training.fit``).
            progress: show a progress bar.
            context: ``val``, a pair of (v, D) tensors, for the bridge's history; else not used.

        Returns:
            The peer itself.
        """
        audio = unit_rows(audio, None, "audio")
        text = unit_rows(text, audio.shape[1], "text")
        super().fit(audio, text, text_clip)
        self._train(audio, text, text_clip, seed, checkpoint_path, progress, context)
        return self

    def _train(
        self, audio: Tensor, text: Tensor, text_clip: Tensor, seed: int, checkpoint_path: str | Path | None, progress: bool, context: dict
    ) -> None:
        """Set ``network`` and ``history``."""
        config, embed_dim = self.config, audio.shape[1]
        with seeded(seed, audio.device):
            network = BridgeNetwork(embed_dim, config.num_blocks, config.width_factor, config.dropout, self.condition_dim(embed_dim))
        self.network = network.to(audio.device)
        self.scheduler = DDIMScheduler(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule)
        self.history = fit(
            self.network, self.loss_fn(audio, text, text_clip), config, seed=seed, checkpoint_path=checkpoint_path,
            identity={"recipe": [type(self).__name__, Path(__file__)], "data": [audio, text, text_clip]}, progress=progress, betas=self.betas,
        )

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        """The function that draws a batch of (n, D), (m, D), (m,) and computes its losses."""
        raise NotImplementedError

    def _bridge(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        """The map (B, D) -> (B, D) float32, unit norm in and out."""
        raise NotImplementedError

    def condition_dim(self, embed_dim: int) -> int:
        """Width of the vector that the network takes beside the sample; 0 for none."""
        return 0

    def __call__(self, audio_emb: Tensor, noise_seed: int = 0, space: str = "text") -> Tensor:
        """Map audio vectors, as every peer does; ``noise_seed`` is that of the noise added at test time, if any.

        Raises:
            ValueError: the method does not answer in that space, or the embeddings do not fit.
        """
        if space not in (("text", "centred") if self.centred else ("text",)):
            raise ValueError(f"{type(self).__name__} does not answer in space {space!r}: use space='text'")
        audio = unit_rows(audio_emb, self.network.embed_dim, "audio_emb").to(next(self.network.parameters()).device)
        with torch.no_grad():
            answer = self._bridge(audio, torch.Generator().manual_seed(noise_seed))
        return self._into(space, answer).to(audio_emb.device)

    def _into(self, space: str, answer: Tensor) -> Tensor:
        """The answer in the space asked for."""
        return uncentre(answer.cpu(), self.text_mean.cpu(), self.text_radius) if self.centred and space == "text" else answer

    @property
    def num_parameters(self) -> int:
        """Parameters of the network, and the means where the map uses them."""
        return super().num_parameters + sum(parameter.numel() for parameter in self.network.parameters())


class DiffusionLinkPeer(TrainedPeer):
    """Diffusion-Link, method section by section in ``dl.bridge.network`` and ``dl.bridge.training``; one step unless told otherwise."""

    source = "Nam et al. 2025 (Diffusion-Link, arXiv 2510.11330), as far as it is known"
    link: DiffusionLink

    def _train(
        self, audio: Tensor, text: Tensor, text_clip: Tensor, seed: int, checkpoint_path: str | Path | None, progress: bool, context: dict
    ) -> None:
        self.link, self.history = train_bridge(
            self.config, audio, text, text_clip, seed=seed, checkpoint_path=checkpoint_path, progress=progress, val=context.get("val"),
        )
        self.network = self.link.network

    def _bridge(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        config = self.config
        return self.link(audio, config.start_timestep, config.num_inference_steps, config.add_noise, generator)


class DiffusionLinkDDIM(DiffusionLinkPeer):
    """Diffusion-Link sampled in several DDIM steps; the training is the same, so the checkpoint may be shared."""

    defaults = BridgeConfig(num_inference_steps=5)


class SeedSetting(DiffusionLinkPeer):
    """Our network in SEED's setting: lambda = 0, k* = 50, one step."""

    defaults = BridgeConfig(topology_weight=0.0, start_timestep=50, num_inference_steps=1)
    source = "Nam et al., Interspeech 2025 (SEED, arXiv 2505.16798), its loss and start step on our network"


class TextToAudio(DiffusionLinkPeer):
    """The opposite direction: a second network, the roles of audio and text swapped; a call takes text vectors."""

    source = "Diffusion-Link's recipe, roles swapped"

    def _train(
        self, audio: Tensor, text: Tensor, text_clip: Tensor, seed: int, checkpoint_path: str | Path | None, progress: bool, context: dict
    ) -> None:
        context = {**context, "val": context["val"][::-1]} if context.get("val") else context
        rows = torch.arange(len(text))
        super()._train(text, audio[text_clip.to(audio.device)], rows, seed, checkpoint_path, progress, context)


class RegressionMLP(TrainedPeer):
    """The bridge's network as plain regression, audio to text: k = 0 and no noise, in training and at test. [ours: a control]

    It tells how much of the bridge's gain needs diffusion at all. The text rows of the bridge's batch are left out.
    """

    stochastic = False
    defaults = BridgeConfig(topology_weight=0.0, self_weight=0.0, start_timestep=0, num_inference_steps=1, add_noise=False)
    source = "control: the bridge's network without noise"

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        sampler, scale = PairSampler(text_clip, len(audio)), audio.shape[1] ** 0.5
        x_audio, x_text, level = scale * audio, scale * text, torch.tensor(0)

        def losses(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            clips, captions = sampler.draw(self.config.batch_size, generator)
            return combined_losses(network(x_audio[clips], level), None, x_text[captions], self.config)

        return losses

    def _bridge(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        return normalize(self.network(audio.shape[1] ** 0.5 * audio, torch.tensor(0)), dim=-1)


class RegressionMLPTopology(RegressionMLP):
    """The regression control with the bridge's topology loss. [ours: a control]"""

    defaults = replace(RegressionMLP.defaults, topology_weight=1.0)
    source = "control: the bridge's network without noise, with L_topo"


class ConditionalDiffusion(TrainedPeer):
    """f(x^k, k, a): only the text vector is noised and the audio vector is a condition; sampling starts from pure noise.

    Loss: L1 between f and x_t. At test: x^{k*} = eps with k* = T - 1, then n DDIM steps [peer: 10 to 50].
    """

    defaults = BridgeConfig(topology_weight=0.0, self_weight=0.0, start_timestep=999, num_inference_steps=10)
    source = "after DiffGAP (arXiv 2503.12131) and the DALL-E 2 prior; its own hyper-parameters are unknown"

    def condition_dim(self, embed_dim: int) -> int:
        return embed_dim

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        sampler, scale = PairSampler(text_clip, len(audio)), audio.shape[1] ** 0.5
        x_audio, x_text = scale * audio, scale * text

        def losses(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            clips, captions = sampler.draw(self.config.batch_size, generator)
            x, noise, timesteps = _noise(x_text[captions], self.scheduler, generator)
            prediction = network(self.scheduler.add_noise(x, noise, timesteps), timesteps, x_audio[clips])
            return combined_losses(prediction, None, x, self.config)

        return losses

    def _bridge(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        x_audio = audio.shape[1] ** 0.5 * audio
        timesteps = self.scheduler.inference_timesteps(self.config.start_timestep, self.config.num_inference_steps)
        noise = standard_normal(audio.shape, generator, audio.device)
        sample = ddim_sample(lambda sample, timestep: self.network(sample, timestep, x_audio), self.scheduler, noise, timesteps)
        return normalize(sample, dim=-1)


class DiffusionBridge(TrainedPeer):
    """A text-only DDPM; the audio vector enters its reverse chain half-way, without added noise.

    u = 5 norm(norm(e) - mean of its modality). Training: x0 prediction, mean squared error weighted by abar_k / (1 - abar_k), cosine
    betas; the noised vector is renormalised to norm 5 before the network, in training and in sampling. Test: u of the audio vector
    enters at k* = 600, 5 DDIM steps, normalise. Published: Adam, lr 8e-5, betas (.9, .99), batch 64, EMA .995, a 1-D U-Net, 3 M steps.
    Ours: our network, far fewer steps, the EMA updated at every step and our spacing of the 5 levels.
    """

    uses_pairs = False
    stochastic = False
    centred = True
    fitted = ("audio_mean", "text_mean")
    defaults = BridgeConfig(
        beta_schedule="squaredcos_cap_v2", loss="l2", topology_weight=0.0, self_weight=0.0, dropout=0.0, learning_rate=8e-5,
        weight_decay=0.0, lr_schedule="constant", batch_size=64, ema_decay=0.995, start_timestep=600, num_inference_steps=5, add_noise=False,
    )
    betas = (0.9, 0.99)
    norm = 5.0
    source = "Lee et al., CVPR 2025 (Diffusion Bridge); our network replaces its U-Net, and the training is shorter"

    def loss_fn(self, audio: Tensor, text: Tensor, text_clip: Tensor) -> LossFn:
        clean = self.norm * centre(text, self.text_mean)

        def losses(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
            captions = torch.randint(len(clean), (self.config.batch_size,), generator=generator)
            x, noise, timesteps = _noise(clean[captions], self.scheduler, generator)
            prediction = network(self._project(self.scheduler.add_noise(x, noise, timesteps)), timesteps)
            errors = mse_loss(prediction, x, reduction="none").mean(dim=1)
            return {"loss": (self.scheduler.snr(timesteps) * errors).mean(), "loss_unweighted": errors.mean()}

        return losses

    def _project(self, sample: Tensor) -> Tensor:
        return self.norm * normalize(sample, dim=-1)

    def _reverse(self, centred_emb: Tensor, start_timestep: int) -> Tensor:
        timesteps = self.scheduler.inference_timesteps(start_timestep, self.config.num_inference_steps)
        sample = ddim_sample(self.network, self.scheduler, self.norm * centred_emb, timesteps, project=self._project)
        return normalize(sample, dim=-1)

    def _bridge(self, audio: Tensor, generator: torch.Generator) -> Tensor:
        return self._reverse(centre(audio, self.audio_mean), self.config.start_timestep)

    @torch.no_grad()
    def map_text(self, text_emb: Tensor, start_timestep: int = 400, space: str = "centred") -> Tensor:
        """The chain that the texts which train its caption decoder pass through; (B, D) -> (B, D) float32 unit norm. [peer]"""
        text = unit_rows(text_emb, self.network.embed_dim, "text_emb").to(next(self.network.parameters()).device)
        answer = self._reverse(centre(text, self.text_mean), start_timestep)
        return self._into(space, answer).to(text_emb.device)


def _noise(x: Tensor, scheduler: DDIMScheduler, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, D) with its noise eps (B, D) and its level k (B,), uniform in 0..T-1."""
    timesteps = torch.randint(scheduler.num_train_timesteps, (len(x),), generator=generator).to(x.device)
    return x, standard_normal(x.shape, generator, x.device), timesteps


REGISTRY: dict[str, type[TrainedPeer]] = {
    "regression_mlp": RegressionMLP,
    "regression_mlp_topology": RegressionMLPTopology,
    "diffusion_bridge": DiffusionBridge,
    "conditional_diffusion": ConditionalDiffusion,
    "seed": SeedSetting,
    "diffusion_link": DiffusionLinkPeer,
    "diffusion_link_ddim": DiffusionLinkDDIM,
    "text_to_audio": TextToAudio,
}
