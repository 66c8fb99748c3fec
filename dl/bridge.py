"""The bridge: a light network that predicts the clean text embedding, and the sampler around it.

Notation: a and t are the paired audio and text embeddings, unit norm, dimension D; s = sqrt(D) is the scale, x_a = s a
and x_t = s t. A unit vector in D = 512 has coordinates of about 0.044 and Gaussian diffusion assumes about 1: hence s.
Marks: [paper], (paper~), [SEED] (arXiv 2505.16798), [ours], as in ``dl.config``. We know no equation of the paper.
"""
from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from dl.config import BridgeConfig
from dl.scheduler import DDIMScheduler, ddim_sample, standard_normal
from dl.store import atomic_write

INFERENCE_FIELDS = ("start_timestep", "num_inference_steps", "add_noise")
TOPOLOGY_FORMS = ("gram", "softmax_kl", "cross_gram", "distance")

MODEL_CARD = """---
{{ card_data }}
---
A Diffusion-Link bridge: it maps a CLAP audio embedding (unit norm) to where its caption's text embedding would lie.
Load it with `DiffusionLink.from_pretrained(...)`. The frozen encoder and the training data are those of its profile.
"""


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A Linear layer whose weight and bias start at zero."""
    linear = nn.Linear(in_features, out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def unit_rows(embeddings: Tensor, embed_dim: int | None, name: str) -> Tensor:
    """Check embeddings (B, D) and divide each row by its norm: (B, D) float32 without gradient.

    Rows of unit norm (to 1e-5) stay as they are, bit for bit. ``embed_dim`` None takes any width. Raises ValueError
    (wrong shape or width, NaN or infinity, a zero row), which calls them ``name``.
    """
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
        shape = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise ValueError(f"{name} must be a torch tensor of shape (B, D), got {shape}")
    if embed_dim is not None and embeddings.shape[1] != embed_dim:
        raise ValueError(f"{name} is {embeddings.shape[1]} wide but the bridge expects {embed_dim}: "
                         "use the encoder it was trained on")
    embeddings = embeddings.detach().float()
    if not torch.isfinite(embeddings).all():
        raise ValueError(f"{name} holds NaN or infinity: check the audio files they come from")
    norms = embeddings.norm(dim=-1, keepdim=True)
    if (norms == 0).any():
        raise ValueError(f"{name} holds a row of zeros, which has no direction: check the audio files they come from")
    return embeddings / torch.where((norms - 1).abs() < 1e-5, torch.ones_like(norms), norms)


def timestep_embedding(timestep: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features of the noise level [SEED]: cos(k w_i) and sin(k w_i), w_i = max_period^(-i / (dim / 2)).

    k (B,) of any numeric dtype -> (B, dim) float32: dim/2 cosines, then dim/2 sines; dim is even.
    """
    steps = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (dim // 2))  # (dim/2,)
    angles = timestep.float()[:, None] * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (B, dim)


class ResidualBlock(nn.Module):
    """One residual MLP block of width W that is told the noise level; it starts as the identity [SEED].

    h = Linear(SiLU(LN(x))); h += Linear(SiLU(e)); h = Linear_0(Dropout(SiLU(LN(h)))); return x + h.
    Linear_0 starts at zero; e is the time embedding of width ``time_dim``.
    """

    def __init__(self, width: int, time_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.linear_in = nn.Linear(width, width)
        self.linear_time = nn.Linear(time_dim, width)
        self.norm_out = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = zero_linear(width, width)

    def forward(self, x: Tensor, time_emb: Tensor) -> Tensor:
        """x (B, W), time_emb (B or 1, time_dim) -> (B, W)."""
        h = self.linear_in(F.silu(self.norm_in(x)))  # (B, W)
        h = h + self.linear_time(F.silu(time_emb))  # (B, W), the noise level is added
        h = self.linear_out(self.dropout(F.silu(self.norm_out(h))))  # (B, W)
        return x + h  # (B, W)


class BridgeNetwork(nn.Module):
    """f(x^k, k): three residual MLP blocks that predict the clean text embedding (prediction_type "sample").

    Linear D -> W = width_factor D; blocks; LayerNorm -> SiLU -> Linear W -> D that starts at zero, so that the output
    at initialisation is exactly 0. Three blocks: [paper]; the rest: [SEED]. At D = 512: 9,725,440 parameters.
    ``condition_dim`` is the width of a vector that ``forward`` takes beside the sample; 0 in the bridge.
    """

    def __init__(self, embed_dim: int, num_blocks: int = 3, width_factor: int = 2, dropout: float = 0.1,
                 condition_dim: int = 0) -> None:
        super().__init__()
        width = width_factor * embed_dim
        self.embed_dim = embed_dim
        self.input = nn.Linear(embed_dim + condition_dim, width)
        self.time_mlp = nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.blocks = nn.ModuleList(ResidualBlock(width, embed_dim, dropout) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.output = zero_linear(width, embed_dim)

    def forward(self, sample: Tensor, timestep: Tensor | int, condition: Tensor | None = None) -> Tensor:
        """Predict the clean, scaled text embedding x_t, (B, D), from the noised x^k and its level k.

        ``sample`` is x^k, (B, D) float32 of about unit variance; ``timestep`` k, int64, (B,) or () for all rows;
        ``condition`` (B, condition_dim), only for a network that was built with one.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)  # (B,) or (1,)
        time_emb = self.time_mlp(timestep_embedding(timestep, 2 * self.embed_dim))  # (B or 1, 2D) -> (B or 1, D)
        if condition is not None:
            sample = torch.cat([sample, condition], dim=-1)  # (B, D + condition_dim)
        x = self.input(sample)  # (B, D) -> (B, W)
        for block in self.blocks:
            x = block(x, time_emb)  # (B, W)
        return self.output(F.silu(self.norm(x)))  # (B, W) -> (B, D)


class DiffusionLink(nn.Module, PyTorchModelHubMixin, model_card_template=MODEL_CARD,
                    paper_url="https://arxiv.org/abs/2510.11330"):
    """Bridge an audio embedding into the text distribution: scale, noise to level k*, denoise with f, L2-normalise.

    a -> x_a = s a -> x^{k*} = sqrt(abar_{k*}) x_a + sqrt(1 - abar_{k*}) eps -> f in n DDIM steps -> L2-normalise. With
    n = 1 the network's prediction is the answer [SEED: k* = 50, one step]; n > 1 is DDIM with eta = 0 [ours]. k* = 0
    still noises (abar_0 = .9999) and still maps. See ``BridgeNetwork`` and ``DDIMScheduler`` for their fields.

    ``embed_dim`` is D; ``scale`` s > 0, None takes sqrt(D), and it is stored with the weights; start_timestep,
    num_inference_steps and add_noise are the defaults of a call. Raises ValueError for a value out of its range.

    Example:
        >>> bridge = DiffusionLink(embed_dim=256)
        >>> bridge(torch.randn(4, 256), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 256])
    """

    def __init__(self, embed_dim: int, num_blocks: int = 3, width_factor: int = 2, dropout: float = 0.1,
                 num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 beta_schedule: str = "scaled_linear", scale: float | None = None, start_timestep: int = 50,
                 num_inference_steps: int = 1, add_noise: bool = True) -> None:
        super().__init__()
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale {scale} must be a positive number, or None for sqrt(embed_dim)")
        self.embed_dim = embed_dim
        # DEVIATION(network): but for the 3 blocks, SEED's
        self.network = BridgeNetwork(embed_dim, num_blocks, width_factor, dropout)
        # DEVIATION(noise-schedule): SEED's
        self.scheduler = DDIMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule)
        self.register_buffer("scale", torch.tensor(math.sqrt(embed_dim) if scale is None else float(scale)))
        self.scheduler.inference_timesteps(start_timestep, num_inference_steps)  # raises if they do not fit
        # DEVIATION(inference): k*, n and the way to the answer are unknown to us; SEED's are the defaults, val decides
        self.start_timestep, self.num_inference_steps, self.add_noise = start_timestep, num_inference_steps, add_noise

    @classmethod
    def from_config(cls, config: BridgeConfig, embed_dim: int) -> DiffusionLink:
        """An untrained bridge for ``embed_dim`` with the network, schedule and inference fields of ``config``."""
        known = cls._hub_mixin_init_parameters
        return cls(embed_dim, **{name: value for name, value in asdict(config).items() if name in known})

    @torch.no_grad()
    def forward(self, audio_emb: Tensor, start_timestep: int | None = None, num_inference_steps: int | None = None,
                add_noise: bool | None = None, generator: torch.Generator | None = None,
                return_trajectory: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Map audio embeddings into the text distribution; dropout is off and no gradient is kept, whatever the mode.

        Args:
            audio_emb: (B, D) float, rows of any norm > 0 (only their direction is used), finite.
            start_timestep: k* in 0..T-1; None takes the model's default, as for the next two.
            num_inference_steps: n in 1..k* (k* = 0 takes n = 1).
            add_noise: False sets eps = 0 in the forward formula, which makes the call deterministic [ours].
            generator: source of eps; None draws from torch's global one. The same state gives the same answer.
            return_trajectory: also return the samples on the way.

        Returns:
            (B, D) float32, unit norm; with return_trajectory also (n + 1, B, D) float32 on the scale of x: row 0 is
            x^{k*}, the last row is the answer before normalisation.

        Raises:
            ValueError: wrong shape or width, NaN or infinity, a zero row, k* or n out of range.
        """
        audio_emb = unit_rows(audio_emb, self.embed_dim, "audio_emb")  # (B, D)
        start_timestep = self.start_timestep if start_timestep is None else start_timestep
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        timesteps = self.scheduler.inference_timesteps(start_timestep, steps)  # (n,)
        x = self.scale * audio_emb  # (B, D)
        noise = torch.zeros_like(x)  # (B, D)
        if self.add_noise if add_noise is None else add_noise:
            noise = standard_normal(x.shape, generator, x.device)  # (B, D)
        sample = self.scheduler.add_noise(x, noise, timesteps[:1])  # (B, D)

        trajectory: list[Tensor] = []
        keep = (lambda _, sample: trajectory.append(sample)) if return_trajectory else None
        was_training = self.network.training
        self.network.eval()
        try:
            sample = ddim_sample(self.network, self.scheduler, sample, timesteps, callback=keep)  # (B, D)
        finally:
            self.network.train(was_training)
        bridged_emb = F.normalize(sample, dim=-1)  # (B, D), unit norm
        return (bridged_emb, torch.stack(trajectory)) if return_trajectory else bridged_emb

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype = torch.float32,
                        **kwargs: Any) -> str | None:
        """Write model.safetensors, config.json and a model card; each file appears whole or not at all.

        The network is stored in ``dtype``: torch.float16 halves the file, and a loaded bridge is float32 again.
        ``kwargs`` go to huggingface_hub's ``save_pretrained`` (``repo_id``, ``push_to_hub``, ...).
        """
        stored = copy.deepcopy(self)
        stored.network.to(dtype)
        stored._hub_mixin_config = self._hub_mixin_config | {name: getattr(self, name) for name in INFERENCE_FIELDS}
        kwargs["repo_id"] = kwargs.get("repo_id") or Path(save_directory).name
        with tempfile.TemporaryDirectory() as folder:
            url = super(DiffusionLink, stored).save_pretrained(folder, **kwargs)
            for file in sorted(Path(folder).iterdir(), reverse=True):  # weights first, config.json after them
                atomic_write(Path(save_directory) / file.name, file.read_bytes())
        return url

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> DiffusionLink:
        """Load a bridge from a folder or a hub repository, in float32 and evaluation mode; every weight must be there.

        Raises:
            FileNotFoundError: the folder has no bridge in it.
            ValueError: damaged files, weights that do not fit config.json, an unknown field in it.
        """
        path = Path(pretrained_model_name_or_path)
        is_hub_name = not path.is_dir() and not path.is_absolute() and len(path.parts) == 2
        if not is_hub_name and not (path / "model.safetensors").is_file():
            raise FileNotFoundError(f"no bridge in {path}: run notebook 05, or ./run_all.sh --only 05")
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (SafetensorError, RuntimeError, TypeError, AttributeError, json.JSONDecodeError,
                UnicodeDecodeError) as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(f"the bridge in {path} is damaged ({why}): copy or train it again") from error

    @classmethod
    def _from_pretrained(cls, *, config: dict | None = None, **kwargs: Any) -> DiffusionLink:
        """The mixin's loader, made strict about weights and config fields, and silent on stdout."""
        if unknown := set(config or {}) - set(cls._hub_mixin_init_parameters):
            raise ValueError(f"{kwargs.get('model_id')}/config.json has unknown fields {sorted(unknown)}: "
                             "remove them, or load it with the version that wrote it")
        with contextlib.redirect_stdout(io.StringIO()):
            return super()._from_pretrained(**{**kwargs, "strict": True})


def prediction_loss(prediction: Tensor, target: Tensor, loss: str = "l1") -> Tensor:
    """Mean over rows and coordinates of |f - x_t| ("l1" [SEED]) or of (f - x_t)^2 ("l2"); (B, D) twice -> () float.

    From audio it is L_cross (name: paper~, form: SEED), from text L_self [SEED].
    """
    if loss not in ("l1", "l2"):
        raise ValueError(f"unknown loss {loss!r}: choose l1 or l2")
    return F.l1_loss(prediction, target) if loss == "l1" else F.mse_loss(prediction, target)


def topology_loss(prediction: Tensor, target: Tensor, form: str = "gram", temperature: float = 0.1) -> Tensor:
    """L_topo: keep how the text embeddings of a batch stand to each other. The name is (paper~), each form is ours.

    With c_ij = cos(f_i, f_j) and g_ij = cos(t_i, t_j), over the pairs i != j:
        gram        mean (c_ij - g_ij)^2
        softmax_kl  mean_i KL(softmax_j(g_ij / tau) || softmax_j(c_ij / tau))
        cross_gram  mean (cos(f_i, t_j) - g_ij)^2
        distance    mean (||f_i - f_j|| - ||t_i - t_j||)^2 of the unit vectors

    f and t are (B, D) of any norm, B >= 2; ``temperature`` is tau > 0 [ours: 0.1]. Returns () float.

    Raises ValueError for an unknown form or fewer than two rows.
    """
    # DEVIATION(topology-formula): the paper's formula is unknown to us; "gram" is our default.
    if form not in TOPOLOGY_FORMS:
        raise ValueError(f"unknown topology_form {form!r}: choose one of {', '.join(TOPOLOGY_FORMS)}")
    if len(prediction) < 2:
        raise ValueError("the topology loss compares pairs of rows: use a batch of at least 2, or topology_weight=0")
    f, t = F.normalize(prediction, dim=-1, eps=1e-6), F.normalize(target, dim=-1)  # (B, D); f starts at 0, hence eps
    found, wanted = (f @ t.T if form == "cross_gram" else f @ f.T), t @ t.T  # cosines, (B, B)
    if form == "softmax_kl":
        others = ~torch.eye(len(f), dtype=torch.bool, device=f.device)  # the pairs i != j
        found, wanted = (F.log_softmax(cosine[others].view(len(f), -1) / temperature, dim=-1)
                         for cosine in (found, wanted))  # (B, B-1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    if form == "distance":  # sqrt(2 - 2 cos), kept off 0, where the root has no slope
        found, wanted = ((2 - 2 * cosine).clamp_min(1e-6).sqrt() for cosine in (found, wanted))
    squares = (found - wanted).square()
    return (squares.sum() - squares.diagonal().sum()) / (len(f) * (len(f) - 1))


def combined_losses(from_audio: Tensor, from_text: Tensor | None, target: Tensor,
                    config: BridgeConfig) -> dict[str, Tensor]:
    """L = L_cross + w L_self + lambda L_topo: loss, loss_cross, loss_self, loss_topology, () float each.

    ``from_audio`` is f(x_a^k, k), ``from_text`` f(x_t^k', k') or None (left out), ``target`` x_t, all (B, D).
    L_topo is averaged over the predictions that are there [ours]. A part whose weight is 0 is left out, and reads 0.
    """
    # DEVIATION(prediction-losses): only their names are known to us; L1, equal weights and the self term follow SEED.
    predictions = [from_audio] if from_text is None else [from_audio, from_text]
    parts = [prediction_loss(prediction, target, config.loss) for prediction in predictions]
    cross, self_, topology = parts[0], parts[1] if len(parts) > 1 else target.new_zeros(()), target.new_zeros(())
    if config.topology_weight:
        # DEVIATION(topology-weight): the paper's lambda is unknown to us; ours is chosen on val.
        topology = torch.stack([topology_loss(each, target, config.topology_form) for each in predictions]).mean()
    loss = cross + config.self_weight * self_ + config.topology_weight * topology
    return {"loss": loss, "loss_cross": cross, "loss_self": self_, "loss_topology": topology}


def bridge_losses(network: nn.Module, scheduler: DDIMScheduler, x_audio: Tensor, x_text: Tensor, config: BridgeConfig,
                  generator: torch.Generator) -> dict[str, Tensor]:
    """The losses of one batch of pairs: noise both members (paper~), predict the clean text from each, in one pass.

    ``x_audio`` and ``x_text`` are paired, scaled embeddings, (B, D) float32. k is uniform in 0..T-1; the audio row and
    the text row of a pair get an eps and a k of their own, all from ``generator``. With self_weight 0 the text rows
    are left out. Returns the losses of ``combined_losses``.
    """
    x = torch.cat([x_audio, x_text]) if config.self_weight else x_audio  # (2B or B, D)
    noise = standard_normal(x.shape, generator, x.device)  # (2B, D)
    timesteps = torch.randint(scheduler.num_train_timesteps, (len(x),), generator=generator).to(x.device)  # (2B,)
    prediction = network(scheduler.add_noise(x, noise, timesteps), timesteps)  # (2B, D)
    from_audio, *rest = prediction.split(len(x_audio))  # (B, D), (B, D)
    return combined_losses(from_audio, rest[0] if rest else None, x_text, config)
