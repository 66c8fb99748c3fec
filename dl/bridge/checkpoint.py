"""Checkpoints: one safetensors file that is whole, unaltered, and made by the run that reads it, or is not used at all.

The file's header carries, as JSON text, the state (step, history), the fingerprint of the run, and a sha256 over both and all
tensors. One file, written by rename: a process killed at any moment leaves the old checkpoint or the new one.
"""
from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, uint8

from dl.results import atomic_write


def fingerprint(**parts: object) -> dict[str, str]:
    """What decides a run's result, one sha256 (64 hex digits) for each named part.

    Args:
        parts: tensors, paths of files (their content counts), values that JSON can hold, or lists of these.

    Example:
        >>> fingerprint(seed=0) == fingerprint(seed=0), fingerprint(seed=0) == fingerprint(seed=1)
        (True, False)
    """
    return {name: _sha256(value) for name, value in parts.items()}


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], state: dict, run: dict[str, str]) -> None:
    """Write tensors and state to ``path``, atomically.

    Args:
        path: the file.
        tensors: name -> tensor of any shape and dtype.
        state: JSON values.
        run: the fingerprint of the run.
    """
    text = json.dumps({"state": state, "run": run})
    metadata = {"checkpoint": text, "sha256": _sha256([text, tensors])}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, safetensors.torch.save(tensors, metadata=metadata))


def load_checkpoint(path: str | Path, run: dict[str, str]) -> tuple[dict[str, Tensor], dict] | None:
    """Read a checkpoint of this very run; anything else is left aside with one line on stderr.

    Args:
        path: the file; a missing one is no error.
        run: the fingerprint of the run that wants it.

    Returns:
        (tensors on the CPU, state), or None where training starts from the beginning: no file, a damaged file, or a file
        whose fingerprint differs.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        tensors = safetensors.torch.load(content)
        if _sha256([metadata["checkpoint"], tensors]) != metadata["sha256"]:
            raise ValueError("its checksum does not fit its content")
        stored = json.loads(metadata["checkpoint"])
    except (ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        reason = f"damaged ({' '.join(str(error).split())[:100]})"
    else:
        differing = sorted(name for name in stored["run"].keys() | run.keys() if stored["run"].get(name) != run.get(name))
        if not differing:
            return tensors, stored["state"]
        reason = f"from another run (its {', '.join(differing)} differ)"
    print(f"checkpoint {path.name} is {reason}: it is ignored, training starts from the beginning", file=sys.stderr, flush=True)
    return None


def _sha256(value: object) -> str:
    """sha256 of a tensor (dtype, shape, bytes), a file's content, a JSON value, or a list or dict of these."""
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    elif isinstance(value, Path):
        digest.update(value.read_bytes())
    elif isinstance(value, dict):
        digest.update("".join(f"{name} {_sha256(value[name])} " for name in sorted(value)).encode())
    elif isinstance(value, list | tuple):
        digest.update(" ".join(_sha256(item) for item in value).encode())
    else:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()
