"""The noise schedule, the forward noising and the DDIM sampler, with diffusers' names.

Notation (<variable name> -> <name in the papers>)
    original_samples, pred_original_sample -> x, or x^0: a clean embedding, and the network's prediction of it
    sample                                 -> x^k: the embedding at noise level k
    timestep                               -> k in 0..T-1, T = num_train_timesteps
    betas, alphas                          -> beta_k, alpha_k = 1 - beta_k
    alphas_cumprod, alpha_prod_t           -> abar_k = alpha_0 ... alpha_k (1 is clean, 0 is pure noise)
    beta_prod_t                            -> 1 - abar_k, the variance of the noise at level k
    noise, pred_epsilon                    -> eps ~ N(0, I), and the noise that the prediction implies
    start_timestep                         -> k*, the level at which the sampler enters
    num_inference_steps                    -> n

DDPM: Ho et al. 2020, arXiv 2006.11239. DDIM: Song et al. 2021, arXiv 2010.02502. Nothing is clipped.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")


def make_betas(beta_schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """The variances beta_0 .. beta_{T-1}, (T,) float32, computed exactly as diffusers does.

    ``beta_schedule`` is "scaled_linear" (linear in sqrt(beta)) [SEED], "linear" (Ho et al. 2020), or
    "squaredcos_cap_v2" (Nichol & Dhariwal 2021; it ignores beta_start and beta_end) [peer: Diffusion Bridge].

    Raises:
        ValueError: unknown schedule, T < 1, or betas outside (0, 1).
    """
    steps = num_train_timesteps
    if steps < 1:
        raise ValueError(f"num_train_timesteps is {steps}: give at least 1")
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(f"beta_start {beta_start} and beta_end {beta_end}: need 0 < beta_start <= beta_end < 1")
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if beta_schedule == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(alpha_bar)])
    raise ValueError(f"unknown beta_schedule {beta_schedule!r}: choose one of {', '.join(BETA_SCHEDULES)}")


class DDIMScheduler:
    """Forward noising (DDPM) and the deterministic reverse step (DDIM, eta = 0) for a network that predicts x^0.

    Equal to diffusers' DDPMScheduler.add_noise and DDIMScheduler.step with ``prediction_type="sample"``,
    ``clip_sample=False``, ``set_alpha_to_one=True``; only the choice of inference timesteps is ours. The defaults are
    SEED's, the schedules those of ``make_betas``. ``betas``, ``alphas`` and ``alphas_cumprod`` are (T,) float32.

    Example:
        >>> round(float(DDIMScheduler().alphas_cumprod[500]), 4)
        0.3313
    """

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
                 beta_schedule: str = "scaled_linear") -> None:
        self.num_train_timesteps = num_train_timesteps
        self.betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

    def inference_timesteps(self, start_timestep: int, num_inference_steps: int) -> Tensor:
        """The levels k* = k_1 > .. > k_n at which the network is asked: round(linspace(k*, 0, n + 1))[:-1] [ours].

        Returns (n,) int64. From the last of them the sampler goes to abar = 1, the clean embedding.

        Raises:
            ValueError: k* outside 0..T-1, or n outside 1..k* (k* = 0 takes n = 1).

        Example:
            >>> DDIMScheduler().inference_timesteps(50, 5).tolist()
            [50, 40, 30, 20, 10]
        """
        if not 0 <= start_timestep < self.num_train_timesteps:
            raise ValueError(f"start_timestep {start_timestep} is out of range: "
                             f"choose 0 to {self.num_train_timesteps - 1}")
        most = max(start_timestep, 1)
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps {num_inference_steps} does not fit "
                             f"start_timestep {start_timestep}: choose 1 to {most}")
        levels = torch.linspace(start_timestep, 0, num_inference_steps + 1, dtype=torch.float64)
        return levels.round().long()[:-1]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x^k = sqrt(abar_k) x + sqrt(1 - abar_k) eps: formula (4) of DDPM.

        x and eps are (B, D) float with coordinates of about unit variance; k is int64 in 0..T-1, (B,) or (1,) for one
        level that all rows share. Returns (B, D), dtype and device of x.
        """
        self.alphas_cumprod = self.alphas_cumprod.to(original_samples.device)
        alphas_cumprod = self.alphas_cumprod.to(original_samples.dtype)
        alpha_prod_t = alphas_cumprod[timesteps.to(original_samples.device)].unsqueeze(-1)  # (B or 1, 1)
        return alpha_prod_t**0.5 * original_samples + (1 - alpha_prod_t) ** 0.5 * noise

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_k / (1 - abar_k), (B,) float32; the Diffusion Bridge's loss weight [peer]."""
        alpha_prod_t = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_prod_t / (1 - alpha_prod_t)

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, prev_timestep: int) -> Tensor:
        """One reverse step from level k to a lower level: formula (12) of DDIM with eta = 0.

        Args:
            model_output: the network's prediction of x^0, (B, D).
            timestep: k, the level of ``sample``.
            sample: x^k, (B, D).
            prev_timestep: the level to go to, below k; -1 is the clean embedding (abar = 1).

        Returns:
            The sample at the lower level, (B, D).
        """
        # 1. abar at both levels
        alpha_prod_t = self.alphas_cumprod[timestep]
        alpha_prod_t_prev = self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else torch.ones_like(alpha_prod_t)
        beta_prod_t = 1 - alpha_prod_t

        # 2. "predicted x_0" of formula (12): the network gives it directly
        pred_original_sample = model_output

        # 3. the noise that this prediction implies: formula (4) of DDPM solved for eps
        pred_epsilon = (sample - alpha_prod_t**0.5 * pred_original_sample) / beta_prod_t**0.5

        # 4. "direction pointing to x_t" of formula (12), with sigma_t = 0
        pred_sample_direction = (1 - alpha_prod_t_prev) ** 0.5 * pred_epsilon

        # 5. x at the lower level, formula (12) without random noise
        return alpha_prod_t_prev**0.5 * pred_original_sample + pred_sample_direction


def standard_normal(shape: torch.Size, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """eps ~ N(0, I), float32, drawn where the generator lives: a CPU generator gives one answer on every device."""
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where).to(device)


def ddim_sample(model: Callable[[Tensor, Tensor], Tensor], scheduler: DDIMScheduler, sample: Tensor, timesteps: Tensor,
                project: Callable[[Tensor], Tensor] | None = None,
                callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Take ``sample`` from level timesteps[0] to the clean embedding, one network call for each timestep.

    It draws no random number and changes none of its arguments. With one timestep it returns the network's prediction
    of x^0.

    Args:
        model: (sample (B, D), timestep () int64) -> prediction of x^0 (B, D).
        scheduler: gives abar and the step.
        sample: x^{k*}, (B, D).
        timesteps: (n,) int64, decreasing, from ``inference_timesteps``.
        project: applied to the sample before each network call (the Diffusion Bridge renormalises it), or None.
        callback: called as callback(i, sample): i = 0 for the entering sample, then i = 1..n after each step.

    Returns:
        x^0, (B, D), on the scale of ``sample``.

    Example:
        >>> scheduler, x = DDIMScheduler(), torch.ones(1, 2)
        >>> ddim_sample(lambda sample, timestep: x, scheduler, torch.zeros(1, 2), scheduler.inference_timesteps(50, 5))
        tensor([[1., 1.]])
    """
    if callback is not None:
        callback(0, sample)
    for i, (timestep, prev_timestep) in enumerate(pairwise([*timesteps.tolist(), -1])):
        if project is not None:
            sample = project(sample)
        model_output = model(sample, torch.tensor(timestep, device=sample.device))
        sample = scheduler.step(model_output, timestep, sample, prev_timestep)
        if callback is not None:
            callback(i + 1, sample)
    return sample
