"""Models with nothing to download: a captioner over a Llama of random weights, and Diffusion Bridge's 1-D U-Net."""
from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from dl.config import BridgeConfig, CaptionerConfig

HEADS, HEAD_DIM = 4, 32       # of every attention of the U-Net


# ----------------------------------------------------------------------------------------------------------- captioner
def random_captioner(embed_dim: int, settings: CaptionerConfig, llama: dict, device: torch.device | str) -> nn.Module:
    """``LLMCaptioner`` over a Llama of random weights that is made on the device.

    Args:
        embed_dim: D.
        settings: the captioner's; the language model that they name is not looked up.
        llama: fields of LlamaConfig that are not Llama-2-7B's.
    """
    if not hasattr(transformers, "GgufConfig"):      # dl reads SmolLM2 with it; an older transformers has none
        transformers.GgufConfig = None
    from dl import captioner

    with mock.patch.object(captioner, "load_language_model",
                           lambda name, revision, dtype, *_: random_llama(settings.prompt, llama, dtype, device)):
        return captioner.LLMCaptioner(embed_dim, settings).to(device)


def random_llama(prompt: str, llama: dict, dtype: torch.dtype, device: torch.device | str) -> tuple:
    """As ``load_language_model``: (frozen model, tokenizer)."""
    config = LlamaConfig(**llama)
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model.eval().requires_grad_(False), word_tokenizer(prompt, config.vocab_size)


def word_tokenizer(prompt: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """Whole words: <unk> <s> </s> as Llama's, a newline, the prompt's words, then word0, word1, ..."""
    pattern = r"\n|\w+|[^\w\s]"
    words = list(dict.fromkeys(["<unk>", "<s>", "</s>", "\n", *re.findall(pattern, prompt)]))
    words += [f"word{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def matrix_sizes(config: LlamaConfig) -> tuple[int, int]:
    """N, the numbers in the matrices of all layers, and H, those in the output matrix."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * hidden**2 + 3 * hidden * inner), hidden * config.vocab_size


def captioner_steps(captioner: nn.Module, batch: int, checkpointing: bool, tokens: int) -> tuple[list[float], int]:
    """``train_captioner`` on random captions of ``tokens`` tokens with eos: seconds of each step but the first, and
    the positions of a row."""
    from dl.captioner_train import train_captioner

    captioner.config = replace(captioner.config, batch_size=batch, gradient_checkpointing=checkpointing)
    base = captioner.language_model.get_base_model()
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(base.config.vocab_size - 16, (4 * batch, tokens - 1), generator=generator).tolist()
    captions = [" ".join(f"word{i}" for i in row) for row in words]
    embeddings = torch.randn(len(captions), captioner.embed_dim, generator=generator)
    marks: list[float] = []
    train_captioner(captioner, embeddings, captions, callback=lambda *_: marks.append(time.perf_counter()))
    with torch.inference_mode():
        positions = captioner.context(embeddings[:1]).shape[1] + tokens - 1
    return [later - earlier for earlier, later in pairwise(marks)], positions


# -------------------------------------------------------------------------------------------------------------- bridge
def bridge_products(config: BridgeConfig, embed_dim: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of a training step: R = 2 B rows (from audio, from text), W = width_factor D.

    Each Linear (k -> n): the output (R, k, n), the weight's gradient (k, R, n), and the input's (R, n, k) unless the
    input is data. L_topo, for both predictions: two Gram matrices (B, D, B), and the gradient of one of them, two
    products (B, B, D).
    """
    rows, batch, width = 2 * config.batch_size, config.batch_size, config.width_factor * embed_dim
    data = [(embed_dim, width), (2 * embed_dim, embed_dim)]
    block = [(width, width), (embed_dim, width), (width, width)]
    inside = [(embed_dim, embed_dim), *config.num_blocks * block, (width, embed_dim)]
    linear = [shape for k, n in data + inside for shape in ((rows, k, n), (k, rows, n))]
    gram, gradient = (batch, embed_dim, batch), (batch, batch, embed_dim)
    return linear + [(rows, n, k) for k, n in inside] + 2 * [gram, gram, gradient, gradient]


def product_factors(config: BridgeConfig, embed_dim: int, device: torch.device | str) -> list[tuple[Tensor, ...]]:
    """Left and right factor and the place of the product, for ``torch.mm`` on each of ``bridge_products``."""
    return [tuple(torch.randn(shape, device=device) for shape in ((m, k), (k, n), (m, n)))
            for m, k, n in bridge_products(config, embed_dim)]


class RMSNorm(nn.Module):
    """(B, C, L): each position to norm sqrt(C), times a learned gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class ResnetBlock(nn.Module):
    """(B, C, L) -> (B, C', L): two convolutions, the first scaled and shifted by the noise level; a shortcut."""

    def __init__(self, dim: int, dim_out: int, time_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, 2 * dim_out))
        self.first = nn.Sequential(nn.Conv1d(dim, dim_out, 3, padding=1), RMSNorm(dim_out))
        self.second = nn.Sequential(nn.Conv1d(dim_out, dim_out, 3, padding=1), RMSNorm(dim_out), nn.SiLU())
        self.shortcut = nn.Conv1d(dim, dim_out, 1) if dim != dim_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.mlp(time)[:, :, None].chunk(2, dim=1)
        return self.second(F.silu(self.first(x) * (scale + 1) + shift)) + self.shortcut(x)


class Attention(nn.Module):
    """(B, C, L) plus four heads over its positions; ``linear`` takes softmax over features for the queries and over
    positions for the keys, at a cost linear in L."""

    def __init__(self, dim: int, linear: bool = True) -> None:
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.linear, self.norm, self.to_qkv = linear, RMSNorm(dim), nn.Conv1d(dim, 3 * inner, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv1d(inner, dim, 1), RMSNorm(dim) if linear else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (HEADS, HEAD_DIM)) for part in self.to_qkv(self.norm(x)).chunk(3, dim=1))
        if self.linear:
            context = k.softmax(-1) @ v.transpose(2, 3)                                      # (B, 4, 32, 32)
            out = context.transpose(2, 3) @ (q.softmax(-2) * HEAD_DIM**-0.5)                 # (B, 4, 32, L)
        else:
            out = F.scaled_dot_product_attention(*(part.transpose(2, 3) for part in (q, k, v))).transpose(2, 3)
        return self.to_out(out.flatten(1, 2)) + x


class Unet1D(nn.Module):
    """Diffusion Bridge's network (Lee et al., CVPR 2025), untrained: D numbers are a sequence of one channel.

    Its published sizes, and the layers of ``Unet1D`` in denoising-diffusion-pytorch 2.3.4, which it derives from.
    It is called as ``dl.bridge.BridgeNetwork`` is.

    Args:
        embed_dim: D, a multiple of 8.
        dim: width of the first level.
        init_dim: width of the first convolution.
        dim_mults: width of each level over ``dim``.
    """

    def __init__(self, embed_dim: int = 512, dim: int = 512, init_dim: int = 32,
                 dim_mults: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        self.embed_dim, self.dim, time_dim = embed_dim, dim, 4 * dim
        widths = [init_dim, *(dim * factor for factor in dim_mults)]
        last = len(dim_mults) - 1
        self.init_conv = nn.Conv1d(1, init_dim, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Linear(dim, time_dim), nn.GELU(), nn.Linear(time_dim, time_dim))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            halve = nn.Conv1d(narrow, wide, 4, 2, 1) if level < last else nn.Conv1d(narrow, wide, 3, padding=1)
            double = [nn.Upsample(scale_factor=2)] if level else []
            blocks = [ResnetBlock(narrow, narrow, time_dim) for _ in range(2)]
            self.downs.append(nn.ModuleList([*blocks, Attention(narrow), halve]))
            blocks = [ResnetBlock(wide + narrow, wide, time_dim) for _ in range(2)]
            widen = nn.Sequential(*double, nn.Conv1d(wide, narrow, 3, padding=1))
            self.ups.insert(0, nn.ModuleList([*blocks, Attention(wide), widen]))
        first, last_block = (ResnetBlock(widths[-1], widths[-1], time_dim) for _ in range(2))
        self.middle = nn.ModuleList([first, Attention(widths[-1], linear=False), last_block])
        self.final_block, self.final_conv = ResnetBlock(2 * init_dim, init_dim, time_dim), nn.Conv1d(init_dim, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """sample (B, D), timestep () or (B,) -> (B, D)."""
        half = self.dim // 2
        angles = timestep.reshape(-1, 1) * torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
        time = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))      # (B or 1, 4 dim)
        x = entry = self.init_conv(sample[:, None])                                # (B, init_dim, D)
        kept = []
        for first, second, attention, resample in self.downs:
            kept.append(first(x, time))
            kept.append(attention(second(kept[-1], time)))
            x = resample(kept[-1])
        before, attention, after = self.middle
        x = after(attention(before(x, time)), time)
        for first, second, attention, resample in self.ups:
            x = first(torch.cat([x, kept.pop()], dim=1), time)
            x = resample(attention(second(torch.cat([x, kept.pop()], dim=1), time)))
        return self.final_conv(self.final_block(torch.cat([x, entry], dim=1), time))[:, 0]
