"""Which number format the frozen networks compute in."""
from __future__ import annotations

import torch

FOUR_BIT = "4bit"                          # weights of 4 bits (NF4), computed with in bfloat16; of the language model only
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, FOUR_BIT: torch.bfloat16}


def resolve_dtype(dtype: str = "auto") -> torch.dtype:
    """The dtype that frozen weights are computed with: "float32", "bfloat16", "4bit", or "auto" for what the machine computes fastest.

    "auto" is bfloat16 where the GPU or the CPU (AMX or AVX512-BF16) multiplies bfloat16 in hardware, else float32.

    Raises:
        ValueError: another word.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"unknown dtype {dtype!r}: choose auto, float32, bfloat16 or 4bit")
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def number_format(dtype: str = "auto") -> str:
    """What names the weights' format in a hash: ``torch.bfloat16``, or ``4bit``."""
    return dtype if dtype == FOUR_BIT else str(resolve_dtype(dtype))
