"""Result files and checkpoints: atomic writing, ``metrics.csv``, ``search.csv``, ``provenance.json``, keys of results.

Every file of ``results/<profile>/`` is written whole or not at all, in an order that does not depend on the order of
the calls: a killed run leaves nothing half-written, and two equal runs leave equal files, their times apart.
"""
from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import math
import os
import platform
import secrets
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dl.config import REPO, Profile

SYSTEMS = (
    "raw", "mean_shift", "c3", "capdec", "realign", "whitening_colouring", "projection", "nearest_text", "procrustes",
    "ridge", "pls_head", "regression_mlp", "regression_mlp_topology", "diffusion_bridge", "conditional_diffusion",
    "seed", "diffusion_link", "diffusion_link_ddim", "text_to_audio", "text_floor", "text_ceiling",
)
METRIC_COLUMNS = (
    "run_id", "experiment", "system", "dataset", "split", "n_items", "ids_sha256", "seed", "noise_seed", "space",
    "decoding", "metric", "value", "ci_low", "ci_high", "status", "reason", "config_sha256", "git_sha", "versions",
    "device", "wall_s", "sd", "clip_ci_low", "clip_ci_high",
)
METRIC_KEY = ("experiment", "dataset", "split", "system", "space", "decoding", "metric", "seed", "noise_seed")
SEARCH_COLUMNS = ("system", "trial", "params", "split", "seed", "noise_seed", "train_steps", "metric", "value",
                  "chosen", "config_sha256", "git_sha", "wall_s")
SEARCH_KEY = ("system", "trial", "split", "seed", "noise_seed", "metric")
LIBRARIES = ("torch", "numpy", "scikit-learn", "transformers", "peft", "gguf", "soundfile", "soxr", "pandas",
             "laion-clap", "pycocoevalcap")


# -------------------------------------------------------------------------------------------------------------- files
def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write bytes, or text as UTF-8, so that a reader sees the old file or the new one, never a part.

    A temporary name in the same folder, flush to disk (fsync), rename. Missing folders are made. Returns the path.

    Raises:
        OSError: a full disk, a folder that may not be written; the message names the file and says what to do.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.*.tmp"):      # by a killed process
            process = left.name.removeprefix(f".{path.name}.").split(".")[0]
            if process.isdigit() and not psutil.pid_exists(int(process)):
                left.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror}): free space on its disk or make its "
                                   "folder writable, or set DL_RESULTS to another one; what was written before stays"
                      ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def csv_text(rows: list[dict], columns: tuple[str, ...] | list[str]) -> str:
    """Rows as CSV text with ``\\n`` line ends; floats keep 9 significant digits, None and NaN are blank."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return buffer.getvalue()


def markdown_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A GitHub Markdown table, the first ``left`` columns aligned left, the others right; ``|`` is escaped."""
    rule = "|" + "|".join([":--"] * left + ["--:"] * (len(header) - left)) + "|"
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", rule, *lines]) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{float(value):.9g}"
    if isinstance(value, bool):
        return str(int(value))
    return "" if value is None else str(value)


# ------------------------------------------------------------------------------------------------- where it came from
def git_sha() -> str:
    """The commit of this checkout, ``-dirty`` behind it if tracked files under dl/ differ; "unknown" outside git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        edited = git("status", "--porcelain", "--untracked-files=no", "--", "dl").strip()
        return git("rev-parse", "HEAD").strip() + ("-dirty" if edited else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _settings(profile: Profile) -> dict:
    """A profile's settings; folders count by their last name, so that moving a checkout changes nothing."""
    values = {name: value.name if isinstance(value, Path) else value for name, value in asdict(profile).items()}
    values.pop("results_root")
    return values


def config_sha256(profile: Profile) -> str:
    """Hash of a profile's settings, wherever its folders lie."""
    return hashlib.sha256(json.dumps(_settings(profile), sort_keys=True).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Python and the libraries that can move a figure, by their installed version; an absent one is left out."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name() -> str:
    """The GPU's name if torch sees one, else ``cpu``."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def write_provenance(profile: Profile, files: dict[str, Path]) -> Path:
    """Write ``provenance.json``: commit, settings, library versions, machine, and the sha256 of data and weights.

    Args:
        files: a name for each input, and its file or folder; of a folder every file counts, sorted by name.

    Raises:
        FileNotFoundError: an input is absent.
    """
    inputs = {}
    for name, path in files.items():
        if not path.exists():
            raise FileNotFoundError(f"provenance input {name!r} is missing at {path}: run python -m dl check, "
                                    "or restore it with git")
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        lines = [f"{sha256_file(member)}  {member.relative_to(path)}" for member in members]
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest() if path.is_dir() else sha256_file(path)
        inputs[name] = {"sha256": digest, "n_files": len(members) or 1}
    machine = {"system": platform.system(), "architecture": platform.machine(), "cpu_count": os.cpu_count()}
    record = {"profile": profile.name, "git_sha": git_sha(), "config_sha256": config_sha256(profile),
              "config": _settings(profile), "versions": library_versions(), "device": device_name(),
              "machine": machine, "inputs": inputs}
    return atomic_write(profile.results_dir / "provenance.json", json.dumps(record, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------------------- row files
class RowFile:
    """A CSV of rows: ``add`` replaces rows with the same key, sorts by the key, and writes the file whole.

    Args:
        path: the CSV file; it need not exist.
        columns: its columns, in order.
        key: the columns that identify a row.
    """

    def __init__(self, path: str | Path, columns: tuple[str, ...], key: tuple[str, ...]) -> None:
        self.path, self.columns, self.key = Path(path), columns, key

    def read(self) -> list[dict[str, str]]:
        """All rows as text, in the file's order; an absent file has none.

        Raises:
            ValueError: it is not the file that ``add`` wrote: cut off, edited, or of another version.
        """
        if not self.path.exists():
            return []
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                rows, columns = list(reader), reader.fieldnames or ()
        except (csv.Error, UnicodeDecodeError) as error:
            reason = str(error)
        else:
            bad = [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]
            if set(columns) == set(self.columns) and not bad:
                return rows
            reason = f"row {bad[0]} has more or fewer cells than the header" if bad else "other columns"
        raise ValueError(f"{self.path} is not as it was written ({reason}): get it back with git, or move it away "
                         "and run its stages again")

    def add(self, rows: list[dict]) -> None:
        """Add rows; a row whose key is there already replaces the old one.

        Raises:
            ValueError: a row has a column that the file does not know, or :meth:`read` refuses the file.
        """
        kept = {self._key(row): row for row in self.read()}
        for row in rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(f"unknown columns {sorted(unknown)} for {self.path.name}: "
                                 f"known are {', '.join(self.columns)}")
            kept[self._key(row)] = row
        ordered = sorted(kept, key=lambda key: [_order(part) for part in key])
        atomic_write(self.path, csv_text([kept[key] for key in ordered], self.columns))

    def remove(self, **where: str | list[str]) -> int:
        """Drop the rows whose columns equal ``where``, or one of a list; return how many."""
        rows = self.read()
        wanted = {column: {str(value) for value in (values if isinstance(values, list) else [values])}
                  for column, values in where.items()}
        kept = [row for row in rows if any(row[column] not in values for column, values in wanted.items())]
        if len(kept) < len(rows):
            atomic_write(self.path, csv_text(kept, self.columns))
        return len(rows) - len(kept)

    def _key(self, row: dict) -> tuple[str, ...]:
        return tuple(_cell(row.get(column)) for column in self.key)


def _order(part: str) -> tuple:
    """Known systems in the order of ``SYSTEMS``, then numbers by size, then words ("all" after the seeds)."""
    if part in SYSTEMS:
        return (0, SYSTEMS.index(part), "")
    return (1, int(part), "") if part.isdigit() else (2, 0, part)


class MetricsFile(RowFile):
    """``results/<profile>/metrics.csv``, one number a row.

    ``seed`` and ``noise_seed`` are numbers, or ``all`` in the row that sums the runs up: its value is their mean,
    ``sd`` their standard deviation, ``ci_low``/``ci_high`` the 95 % interval over seeds and recordings, ``clip_ci_*``
    the same with clips resampled one by one. A subset of a split stands after a colon: ``test:seen``. ``space`` is
    text, centred or audio; ``decoding`` is blank where nothing is decoded. Hashes are cut to 16 digits, commits to 12.

    Example:
        >>> MetricsFile(profile).add([dict(experiment="gap", system="raw", split="test", metric="rmg", value=.42)])
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile.results_dir / "metrics.csv", METRIC_COLUMNS, METRIC_KEY)
        commit, config, versions = git_sha(), config_sha256(profile), library_versions()
        self.run = {
            "run_id": f"{profile.name}-{config[:8]}-{commit[:8]}", "dataset": profile.data_dir.name,
            "config_sha256": config[:16], "git_sha": commit[:12] + commit[40:], "device": device_name(),
            "versions": "; ".join(f"{name} {versions[name]}" for name in ("python", "torch")),
        }

    def add(self, rows: list[dict]) -> None:
        """Record rows; what a row leaves out (run id, dataset, hashes, versions, device) is filled in.

        A value that is absent or not finite becomes status ``not_computed`` and must carry a ``reason``.

        Raises:
            ValueError: unknown column, or a missing value without a reason.
        """
        complete = []
        for row in rows:
            row = {**self.run, "space": "text", "status": "ok", **row}
            row["ids_sha256"] = str(row.get("ids_sha256") or "")[:16]
            if row.get("value") in (None, "") or not math.isfinite(float(row["value"])):
                if not row.get("reason"):
                    raise ValueError(f"{row.get('system')}/{row.get('metric')} has no value and no reason: "
                                     "say why it was not computed")
                row.update(value=None, status="not_computed")
            complete.append(row)
        super().add(complete)

    def frame(self) -> pd.DataFrame:
        """All rows as a table: value, sd and interval ends as float64 (NaN where blank), the rest as text."""
        frame = pd.DataFrame(self.read(), columns=list(METRIC_COLUMNS), dtype=str)
        for column in ("value", "sd", "ci_low", "ci_high", "clip_ci_low", "clip_ci_high", "wall_s"):
            frame[column] = pd.to_numeric(frame[column].replace("", None))
        return frame


def search_file(profile: Profile) -> RowFile:
    """``results/<profile>/search.csv``: every tuning trial on val, rejected ones too; ``params`` is a JSON object."""
    return RowFile(profile.results_dir / "search.csv", SEARCH_COLUMNS, SEARCH_KEY)


def search_paths(profile: Profile) -> list[Path]:
    """Where choices made on val stand: the profile's own, then, for mini's encoder, those of ``mini`` in git."""
    shipped = [REPO / "results/mini/search.csv"] if profile.encoder == "mini" else []
    return [profile.results_dir / "search.csv", *shipped]


# --------------------------------------------------------------------------------------------------------- checkpoints
class Key(dict[str, Any]):
    """What decides a result, its parts in clear. See :func:`key`."""

    @property
    def digest(self) -> str:
        """Sixteen hex digits that change when a part does."""
        return hashlib.sha256(json.dumps(self, sort_keys=True).encode()).hexdigest()[:16]


def key(kind: str, recipe: int, **parts: Any) -> Key:
    """Name a result by what decides it; nothing is computed.

    Args:
        kind: what the result is (vectors, mapping, decoder, captions).
        recipe: the number beside the algorithm, such as ``dl.train.BRIDGE_RECIPE``. It goes up when the same parts
            give another result.
        parts: JSON values, and other keys, of which the digest counts. Arrays name themselves by :func:`content`.

    Raises:
        TypeError: a part that is no JSON value.

    Example:
        >>> key("mapping", 1, system="ridge", data=key("vectors", 1, crop="first 10 s")).digest
    """
    parts = {name: part.digest if isinstance(part, Key) else part for name, part in parts.items()}
    return Key(json.loads(json.dumps({"kind": kind, "recipe": recipe, **parts})))      # tuples become lists


def content(*arrays: Tensor | list[str]) -> str:
    """Sixteen hex digits of arrays (dtype, shape, bytes) and texts: the name of data that come without a file."""
    return _sha256(list(arrays))[:16]


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], state: dict, run: Key) -> None:
    """Write tensors and a state of JSON values to one safetensors file, atomically, with the key of what made them.

    All that is no tensor goes into one entry of the header: safetensors writes several in an order of its own.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"state": state, "key": run}
    metadata = {"about": json.dumps({**about, "sha256": _sha256([about, tensors])})}
    atomic_write(path, safetensors.torch.save(tensors, metadata=metadata))


def load_checkpoint(path: str | Path, run: Key | None = None) -> tuple[dict[str, Tensor], dict] | None:
    """Read what :func:`save_checkpoint` wrote for the run of this key; None takes that of any run.

    Returns:
        (tensors on the CPU, state), or None: no file, a damaged one, or one whose key differs; a line on stderr says
        why, and which parts differ.
    """
    path = Path(path)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _sha256([{"state": about["state"], "key": about["key"]}, tensors]) != about["sha256"]:
            raise ValueError("its checksum does not fit its content")
    except KeyError:
        reason = "is of another version of dl"
    except (ValueError, TypeError, OverflowError, AttributeError, SafetensorError) as error:
        reason = f"is damaged ({' '.join(str(error).split())[:100]})"
    else:
        stored, wanted = about["key"], about["key"] if run is None else run
        differing = sorted(name for name in stored | wanted if stored.get(name) != wanted.get(name))
        if not differing:
            return tensors, about["state"]
        reason = f"is from another run (its {', '.join(differing)} differ)"
    print(f"{path.parent.name}/{path.name} {reason}: it is not used, all in it is made anew",
          file=sys.stderr, flush=True)
    return None


def _sha256(value: object) -> str:
    """sha256 of a tensor (dtype, shape, bytes), a JSON value, or a list or dict of these."""
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, dict):
        digest.update("".join(f"{name} {_sha256(value[name])} " for name in sorted(value)).encode())
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor | list | tuple | dict) for item in value):
        digest.update(" ".join(_sha256(item) for item in value).encode())
    else:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()
