"""LAION's official ``.pt`` files and the package laion-clap 1.1.7, with its import traps kept in a small scope.

The files are pickles: :func:`convert_laion_checkpoint` turns one into safetensors and settings, once. The package wants
torchvision, three tokenizers and RoBERTa from the hub before it does anything: :func:`build_laion_clap` gives it none of them.
transformers and laion-clap are imported on use, never with this module.
"""
from __future__ import annotations

import importlib.util
import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dl.results import atomic_write, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKENIZER_VARIABLE = "DL_ROBERTA_TOKENIZER"
SETTINGS_FILE, WEIGHTS_FILE = "laion_clap.json", "model.safetensors"
AMODELS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}     # width of the patch embedding [peer: LAION-CLAP]
OLD_BUFFERS = ("text_branch.embeddings.position_ids", "text_branch.embeddings.token_type_ids")   # in files of older transformers


def convert_laion_checkpoint(pt_path: str | Path, out_dir: str | Path, *, amodel: str | None = None,
                             allow_pickle: bool = False, sha256: str | None = None) -> Path:
    """Turn LAION's ``.pt``, a pickle, into safetensors and settings, once; afterwards the pickle is never opened again.

    The file's SHA-256 is printed. The pickle is read with ``weights_only=True``, which runs no code of the file. Where that is
    refused, it is read only with ``allow_pickle=True`` and its own ``sha256``: do so only for a file you trust.

    Args:
        pt_path: such as ``music_audioset_epoch_15_esc_90.14.pt`` (HTSAT-base) or ``630k-audioset-best.pt`` (HTSAT-tiny).
        out_dir: gets ``model.safetensors`` and ``laion_clap.json``.
        amodel: laion-clap's name of the audio tower; by default read off the weights.
        allow_pickle: consent to run the code inside the file that ``sha256`` names.
        sha256: wherever it is given, the file must have it.

    Returns:
        ``out_dir`` as a Path.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another SHA-256, a pickle without consent, a fused checkpoint, or not LAION-CLAP weights.

    Example:
        >>> convert_laion_checkpoint("630k-audioset-best.pt", "630k-audioset-best")    # doctest: +SKIP
    """
    pt_path, out_dir = Path(pt_path), Path(out_dir)
    if not pt_path.is_file():
        raise FileNotFoundError(f"{pt_path} is missing: download it from LAION's CLAP page, then give its path")
    found = sha256_file(pt_path)
    print(f"{pt_path.name}  sha256 {found}")
    if sha256 is not None and sha256.lower() != found:
        raise ValueError(f"{pt_path} has sha256 {found}, not {sha256}: download it again, or name this one if you trust it")
    state = {name.removeprefix("module."): value for name, value in
             read_checkpoint(pt_path, out_dir, found, allow_pickle and sha256 is not None).items()}
    state = {name: value.detach().clone().contiguous() for name, value in state.items() if name not in OLD_BUFFERS}
    patches, words = (state.get(name) for name in ("audio_branch.patch_embed.proj.weight", "text_branch.embeddings.word_embeddings.weight"))
    if patches is None or words is None:
        raise ValueError(f"{pt_path} is no LAION-CLAP with HTSAT and RoBERTa towers: give 630k-audioset-best.pt or "
                         "another of LAION's HTSAT files")
    if any("fusion_model" in name or "mel_conv" in name for name in state):
        raise ValueError(f"{pt_path} is a fused checkpoint: choose an unfused one, or laion/clap-htsat-fused by its hub name")
    amodel = amodel or AMODELS.get(len(patches))
    if amodel not in AMODELS.values():
        raise ValueError(f"{pt_path}: unknown audio tower {amodel!r}: amodel is one of {', '.join(AMODELS.values())}")
    text_config = {                                                      # sizes from the weights, the rest [peer: roberta-base]
        "vocab_size": words.shape[0], "hidden_size": words.shape[1], "num_attention_heads": words.shape[1] // 64,
        "num_hidden_layers": 1 + max(int(name.split(".")[3]) for name in state if name.startswith("text_branch.encoder.layer.")),
        "intermediate_size": len(state["text_branch.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(state["text_branch.embeddings.position_embeddings.weight"]),
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / SETTINGS_FILE).unlink(missing_ok=True)                    # gone while the weights change, back at the end
    temporary = out_dir / f".{WEIGHTS_FILE}.{os.getpid()}.tmp"
    try:
        save_file(state, temporary)
        temporary.replace(out_dir / WEIGHTS_FILE)
    finally:
        temporary.unlink(missing_ok=True)
    settings = {"source": pt_path.name, "source_sha256": found, "amodel": amodel, "enable_fusion": False, "text_config": text_config}
    atomic_write(out_dir / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")
    return out_dir


def converted_folder(path: Path) -> Path:
    """``path`` itself, or for ``name.pt`` the folder ``name`` beside it, converted now if it is not yet of this very file."""
    folder = path.with_suffix("") if path.suffix == ".pt" else path
    settings = folder / SETTINGS_FILE
    if path == folder:
        return folder
    if settings.is_file():
        of = json.loads(settings.read_text(encoding="utf-8"))["source_sha256"]
        if not path.is_file() or of == sha256_file(path):
            return folder
    return convert_laion_checkpoint(path, folder)


def read_checkpoint(path: Path, out_dir: Path, sha256: str, consent: bool) -> dict[str, Tensor]:
    """The state dict inside ``path``; beyond torch's own names only numpy's scalars, part of LAION's training state, are allowed."""
    scalar = importlib.import_module("numpy.core.multiarray").scalar
    allowed: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), np.dtype,
               np.dtypes.Int64DType, np.dtypes.Float64DType, np.dtypes.Float32DType]
    try:
        with torch.serialization.safe_globals(allowed):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not consent:
            raise ValueError(f"{path} is a pickle that can run code: if you trust it, convert it once in Python: from dl.encoder.laion import "
                             f"convert_laion_checkpoint; convert_laion_checkpoint({str(path)!r}, {str(out_dir)!r}, allow_pickle=True, "
                             f"sha256={sha256!r})") from None
        stored = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a torch checkpoint ({short_error(error)}): download it again") from None
    state = stored.get("state_dict", stored) if isinstance(stored, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_roberta_tokenizer(tokenizer: str | Path | None, folder: Path, text_config: dict) -> PreTrainedTokenizerBase:
    """roberta-base's tokenizer from ``tokenizer``, the environment variable, ``folder``/tokenizer or the hub, in this order.

    Raises:
        ValueError: it does not open, or it is not the text tower's.
    """
    from transformers import RobertaConfig, RobertaTokenizer

    beside = folder / "tokenizer"
    where = str(tokenizer or os.environ.get(TOKENIZER_VARIABLE) or (beside if beside.is_dir() else "roberta-base"))
    advice = f"set {TOKENIZER_VARIABLE} to a folder with roberta-base's tokenizer files, or fetch it once: hf download roberta-base"
    try:
        roberta = RobertaTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {where!r} ({short_error(error)}): {advice}") from None
    check_vocabulary(roberta, RobertaConfig(**text_config), where, advice)
    return roberta


def build_laion_clap(amodel: str, text_config: dict, tokenizer: PreTrainedTokenizerBase, device: str = "cpu") -> Any:
    """An untrained ``laion_clap.CLAP_Module`` without the hub: RoBERTa from ``text_config``, the tokenizer as given."""
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    laion_clap = import_laion_clap()
    with (torch.random.fork_rng(), patch.object(RobertaTokenizer, "from_pretrained", lambda *_, **__: tokenizer),
          patch.object(RobertaModel, "from_pretrained", lambda *_, **__: RobertaModel(RobertaConfig(**text_config)))):
        return laion_clap.CLAP_Module(enable_fusion=False, device=device, amodel=amodel)


def import_laion_clap() -> ModuleType:
    """Import laion_clap without torchvision and the hub; ``sys.path`` and ``sys.modules["torchvision"]`` stay as they were.

    Raises:
        ModuleNotFoundError: laion-clap is not installed.
    """
    if "laion_clap" in sys.modules:
        return sys.modules["laion_clap"]
    if importlib.util.find_spec("laion_clap") is None:
        raise ModuleNotFoundError("the package laion-clap is missing: pip install laion-clap==1.1.7")
    # transformers loads these lazily and remembers whether torchvision is there: both must be settled before the stub can be seen
    from transformers import BartModel, BartTokenizer, BertModel, BertTokenizer, RobertaModel, RobertaTokenizer  # noqa: F401
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    path = list(sys.path)
    with ExitStack() as scope:
        scope.enter_context(torchvision_stub())
        scope.callback(lambda: sys.path.__setitem__(slice(None), path))  # laion_clap appends its folder, for good
        for tokenizer in {BartTokenizer, BertTokenizer, RobertaTokenizer}:        # it loads all three from the hub on import
            scope.enter_context(patch.object(tokenizer, "from_pretrained", lambda *_, **__: None))
        return importlib.import_module("laion_clap")


@contextmanager
def torchvision_stub() -> Iterator[None]:
    """While inside, where torchvision is absent, whatever laion_clap imports from it exists; our way uses none of it."""
    absent = importlib.util.find_spec("torchvision") is None
    names = ["torchvision" + part for part in ("", ".datasets", ".ops", ".ops.misc", ".transforms")] if absent else []
    stub = ModuleType("torchvision")
    vars(stub)["__getattr__"] = lambda name: type(name, (), {})
    sys.modules.update(dict.fromkeys(names, stub))
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, text_config: PreTrainedConfig, where: str, advice: str) -> None:
    """Refuse a tokenizer that is not the text tower's: offline, transformers may answer with 5 tokens, and all captions embed alike.

    Raises:
        ValueError: ``len(tokenizer)`` is not ``text_config.vocab_size`` (50,265 for roberta-base), or the padding ids differ.
    """
    if len(tokenizer) != text_config.vocab_size:
        raise ValueError(f"the tokenizer of {where} has {len(tokenizer)} tokens, the text tower {text_config.vocab_size}: {advice}")
    if tokenizer.pad_token_id != text_config.pad_token_id:
        raise ValueError(f"the tokenizer of {where} pads with id {tokenizer.pad_token_id}, "
                         f"the text tower with {text_config.pad_token_id}: {advice}")


def short_error(error: Exception) -> str:
    """An error's first 160 characters on one line."""
    return " ".join(str(error).split())[:160]
