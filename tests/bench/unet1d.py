"""The 1-D U-Net of Diffusion Bridge (Lee et al., CVPR 2025), untrained: a vector of D numbers is a sequence of length D with one channel.

Written from its published sizes (base width 512, first convolution 32, multipliers 1, 2, 4, 8) after the public implementation that it
derives from, ``Unet1D`` of the package denoising-diffusion-pytorch (2.3.4): same layers, same names, so that the one loads the other's
weights. A test compares both where that package is installed.
"""
from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 4, 32                          # of every attention


class RMSNorm(nn.Module):
    """Each position to norm sqrt(C), times a learned gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)."""
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class Block(nn.Module):
    """Convolution of 3, norm, shift by the noise level, SiLU."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv1d(dim, dim_out, 3, padding=1), RMSNorm(dim_out)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, C, L) -> (B, C', L)."""
        x = self.norm(self.proj(x))
        if scale_shift is not None:
            x = x * (scale_shift[0] + 1) + scale_shift[1]
        return F.silu(x)


class ResnetBlock(nn.Module):
    """Two blocks beside a shortcut."""

    def __init__(self, dim: int, dim_out: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.block1, self.block2 = Block(dim, dim_out), Block(dim_out, dim_out)
        self.res_conv = nn.Conv1d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time_emb: Tensor) -> Tensor:
        """x (B, C, L), time_emb (B, time_dim) -> (B, C', L)."""
        h = self.block1(x, self.mlp(time_emb)[:, :, None].chunk(2, dim=1))
        return self.block2(h) + self.res_conv(x)


class Attention(nn.Module):
    """Four heads over the positions; in the middle of the network only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Conv1d(dim, 3 * HEADS * HEAD_DIM, 1, bias=False), nn.Conv1d(HEADS * HEAD_DIM, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)."""
        q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)).transpose(2, 3) for part in self.to_qkv(x).chunk(3, dim=1))   # (B, 4, L, 32)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2))


class LinearAttention(nn.Module):
    """The same at a cost that is linear in L: softmax over features for the queries, over positions for the keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_qkv = nn.Conv1d(dim, 3 * HEADS * HEAD_DIM, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv1d(HEADS * HEAD_DIM, dim, 1), RMSNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)."""
        q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)) for part in self.to_qkv(x).chunk(3, dim=1))       # (B, 4, 32, L)
        context = k.softmax(-1) @ v.transpose(2, 3)                                                        # (B, 4, 32, 32)
        return self.to_out((context.transpose(2, 3) @ (q.softmax(-2) * HEAD_DIM**-0.5)).flatten(1, 2))


class PreNorm(nn.Module):
    """Norm, then ``fn``, beside a shortcut."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn = nn.ModuleDict({"fn": fn, "norm": RMSNorm(dim)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> (B, C, L)."""
        return self.fn["fn"](self.fn["norm"](x)) + x


class Unet1D(nn.Module):
    """Predicts x^0 from x^k and k; called as ``dl.bridge.BridgeNetwork`` is.

    Args:
        embed_dim: D, a multiple of 2^(number of multipliers - 1).
        dim: width of the first level.
        init_dim: width of the first convolution.
        dim_mults: width of each level over ``dim``.
    """

    def __init__(self, embed_dim: int = 512, dim: int = 512, init_dim: int = 32, dim_mults: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.embed_dim, self.dim = embed_dim, dim
        widths, time_dim = [init_dim, *(dim * factor for factor in dim_mults)], 4 * dim
        levels = list(pairwise(widths))
        self.init_conv = nn.Conv1d(1, init_dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        self.downs = nn.ModuleList(nn.ModuleList([
            ResnetBlock(narrow, narrow, time_dim), ResnetBlock(narrow, narrow, time_dim), PreNorm(narrow, LinearAttention(narrow)),
            nn.Conv1d(narrow, wide, 4, 2, 1) if place < len(levels) - 1 else nn.Conv1d(narrow, wide, 3, padding=1),
        ]) for place, (narrow, wide) in enumerate(levels))
        self.mid_block1, self.mid_block2 = (ResnetBlock(widths[-1], widths[-1], time_dim) for _ in range(2))
        self.mid_attn = PreNorm(widths[-1], Attention(widths[-1]))
        self.ups = nn.ModuleList(nn.ModuleList([
            ResnetBlock(wide + narrow, wide, time_dim), ResnetBlock(wide + narrow, wide, time_dim), PreNorm(wide, LinearAttention(wide)),
            nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv1d(wide, narrow, 3, padding=1)) if place else nn.Conv1d(wide, narrow, 3, padding=1),
        ]) for place, (narrow, wide) in reversed(list(enumerate(levels))))
        self.final_res_block = ResnetBlock(2 * init_dim, init_dim, time_dim)
        self.final_conv = nn.Conv1d(init_dim, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample (B, D), timestep () or (B,) -> (B, D)."""
        half = self.dim // 2
        angles = timestep.reshape(-1, 1) * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, device=sample.device))
        time_emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))      # (B or 1, 4 dim)
        x = entry = self.init_conv(sample[:, None])                                    # (B, init_dim, D)
        kept = []
        for first, second, attention, resample in self.downs:
            x = first(x, time_emb)
            kept.append(x)
            x = attention(second(x, time_emb))
            kept.append(x)
            x = resample(x)                                                            # (B, wide, L / 2), in the last level (B, wide, L)
        x = self.mid_block2(self.mid_attn(self.mid_block1(x, time_emb)), time_emb)
        for first, second, attention, resample in self.ups:
            x = first(torch.cat([x, kept.pop()], dim=1), time_emb)
            x = attention(second(torch.cat([x, kept.pop()], dim=1), time_emb))
            x = resample(x)
        return self.final_conv(self.final_res_block(torch.cat([x, entry], dim=1), time_emb))[:, 0]
