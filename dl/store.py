"""Result files: atomic writing, ``metrics.csv`` in long form, ``search.csv``, ``provenance.json``.

Every file of ``results/<profile>/`` is written whole or not at all, in an order that does not depend on the order of the
calls, so that a run that was killed leaves nothing half-written and two equal runs leave equal files (their times apart).
"""
from __future__ import annotations

import contextlib
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
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, uint8

from dl.config import REPO, Profile

SYSTEMS = (
    "raw", "mean_shift", "c3", "capdec", "realign", "whitening_colouring", "projection", "nearest_text", "procrustes", "ridge",
    "pls_head", "regression_mlp", "regression_mlp_topology", "diffusion_bridge", "conditional_diffusion", "seed", "diffusion_link",
    "diffusion_link_ddim", "text_to_audio", "text_floor", "text_ceiling",
)
METRIC_COLUMNS = (
    "run_id", "experiment", "system", "dataset", "split", "n_items", "ids_sha256", "seed", "noise_seed", "space", "decoding",
    "metric", "value", "ci_low", "ci_high", "status", "reason", "config_sha256", "git_sha", "versions", "device", "wall_s",
    "sd", "clip_ci_low", "clip_ci_high",
)
METRIC_KEY = ("experiment", "dataset", "split", "system", "space", "decoding", "metric", "seed", "noise_seed")
SEARCH_COLUMNS = (
    "system", "trial", "params", "split", "seed", "noise_seed", "train_steps", "metric", "value", "chosen", "config_sha256", "git_sha", "wall_s",
)
SEARCH_KEY = ("system", "trial", "split", "seed", "noise_seed", "metric")
LIBRARIES = ("torch", "numpy", "scikit-learn", "transformers", "peft", "gguf", "soundfile", "soxr", "pandas", "laion-clap", "pycocoevalcap")


# ---------------------------------------------------------------------------------------------------------------- files
def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    A temporary name in the same folder, flush to disk (fsync), rename. Missing folders are made.

    Args:
        path: the file to write.
        data: bytes, or text that is stored as UTF-8 with ``\\n`` line ends.

    Returns:
        ``path`` as a Path.

    Raises:
        OSError: a full disk, a folder that may not be written; the message names the file and says what to do.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(path)
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror}): free space on its disk or make its folder writable, or set "
                                   "DL_RESULTS to another one; what was written before stays") from error
    return path


def _remove_left_over(path: Path) -> None:
    """Remove the temporary files of ``path`` that a killed process left behind."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.*.tmp"):
        process = file.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            file.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def csv_text(rows: list[dict], columns: tuple[str, ...] | list[str]) -> str:
    """Rows as CSV text with ``\\n`` line ends; floats keep 9 significant digits, None and NaN are blank."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(column)) for column in columns])
    return buffer.getvalue()


def markdown_table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A GitHub Markdown table; the first ``left`` columns are aligned left, the others right; ``|`` in a cell is escaped."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join([":--"] * left + ["--:"] * (len(header) - left)) + "|"]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) or type(value).__name__ in ("float32", "float64"):
        return f"{float(value):.9g}"
    return str(value)


# ------------------------------------------------------------------------------------------------------ where it came from
def git_sha() -> str:
    """The commit of this checkout, with ``-dirty`` when tracked files under dl/ differ from it; "unknown" outside git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(REPO), *arguments], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", "dl") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def short_sha(commit: str) -> str:
    """The first 12 digits of a commit, its ``-dirty`` kept."""
    return commit[:12] + commit[40:]


def config_sha256(profile: Profile) -> str:
    """Hash of a profile's settings; folders count by their last name, so that moving a checkout changes nothing."""
    settings = asdict(profile)
    for key, value in settings.items():
        if isinstance(value, Path):
            settings[key] = value.name
    settings.pop("results_root")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


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
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def write_provenance(profile: Profile, files: dict[str, Path]) -> Path:
    """Write ``provenance.json``: commit, settings, library versions, machine, and the sha256 of data and weights.

    Args:
        profile: the run's profile.
        files: a name for each input, and its file or folder; of a folder every file counts, sorted by name.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: an input is absent.
    """
    hashes = {}
    for name, path in files.items():
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"provenance input {name!r} is missing at {path}: run python -m dl check, or restore it with git")
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        lines = [f"{sha256_file(member)}  {member.relative_to(path) if path.is_dir() else member.name}" for member in members]
        digest = lines[0][:64] if path.is_file() else hashlib.sha256("\n".join(lines).encode()).hexdigest()
        hashes[name] = {"sha256": digest, "n_files": len(members)}
    settings = {key: str(value.name) if isinstance(value, Path) else value for key, value in asdict(profile).items() if key != "results_root"}
    record = {
        "profile": profile.name, "git_sha": git_sha(), "config_sha256": config_sha256(profile), "config": settings,
        "versions": library_versions(), "device": device_name(),
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cpu_count": os.cpu_count()}, "inputs": hashes,
    }
    return atomic_write(profile.results_dir / "provenance.json", json.dumps(record, indent=2, sort_keys=True) + "\n")


# -------------------------------------------------------------------------------------------------------------- row files
class RowFile:
    """A CSV of rows with a key: ``add`` replaces rows with the same key, sorts, and writes the file whole.

    Args:
        path: the CSV file; it need not exist.
        columns: its columns, in order.
        key: the columns that identify a row; they also give the order.
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
        raise ValueError(f"{self.path} is not as it was written ({reason}): get it back with git, or move it away and run its stages again")

    def add(self, rows: list[dict]) -> None:
        """Add rows; a row whose key is there already replaces the old one.

        Raises:
            ValueError: a row has a column that the file does not know.
        """
        kept = {self._key(row): row for row in self.read()}
        for row in rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(f"unknown columns {sorted(unknown)} for {self.path.name}: known are {', '.join(self.columns)}")
            kept[self._key(row)] = row
        ordered = [kept[key] for key in sorted(kept, key=lambda key: [_order(part) for part in key])]
        atomic_write(self.path, csv_text(ordered, self.columns))

    def remove(self, **where: str | list[str]) -> int:
        """Drop the rows whose columns equal ``where``, or one of a list (a stage clears its own rows before it records); return how many."""
        rows = self.read()
        wanted = {column: {str(value) for value in (values if isinstance(values, list) else [values])} for column, values in where.items()}
        kept = [row for row in rows if any(row[column] not in values for column, values in wanted.items())]
        if len(kept) < len(rows):
            atomic_write(self.path, csv_text(kept, self.columns))
        return len(rows) - len(kept)

    def _key(self, row: dict) -> tuple[str, ...]:
        return tuple(_cell(row.get(column)) for column in self.key)


def _order(part: str) -> tuple:
    """Known systems in the order of ``SYSTEMS``, then numbers by size, then words by letter ("all" after the seeds)."""
    if part in SYSTEMS:
        return (0, SYSTEMS.index(part), "")
    return (1, int(part), "") if part.isdigit() else (2, 0, part)


class MetricsFile(RowFile):
    """``results/<profile>/metrics.csv``, one number a row.

    ``seed`` and ``noise_seed`` are numbers, or ``all`` in the row that sums the runs up (its value is their mean, ``sd`` their
    standard deviation, ``ci_low``/``ci_high`` the 95 % interval over seeds and recordings, ``clip_ci_*`` the same with clips
    resampled one by one). A subset of a split is written after a colon: ``test:seen``. ``space`` is text, centred or audio;
    ``decoding`` is blank where nothing is decoded.

    Hashes stand in it with their first digits, 16 (commits 12); a test set's ids give the whole one (``dl.data.ids_sha256``),
    ``provenance.json`` the others.

    Args:
        profile: gives the folder, the configuration's hash and the run id ``<profile>-<config>-<commit>``.

    Example:
        >>> MetricsFile(profile).add([dict(experiment="gap", system="raw", split="test", metric="rmg", value=.42, n_items=600)])
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile.results_dir / "metrics.csv", METRIC_COLUMNS, METRIC_KEY)
        commit, config = git_sha(), config_sha256(profile)
        self.run = {
            "run_id": f"{profile.name}-{config[:8]}-{commit[:8]}", "dataset": profile.data_dir.name, "config_sha256": config[:16],
            "git_sha": short_sha(commit), "device": device_name(),
            "versions": "; ".join(f"{name} {number}" for name, number in library_versions().items() if name in ("python", "torch")),
        }

    def add(self, rows: list[dict]) -> None:
        """Record rows; what the row leaves out (run id, dataset, hashes, versions, device) is filled in.

        A value that is absent or not finite becomes status ``not_computed`` and must carry a ``reason``.

        Raises:
            ValueError: unknown column, or a missing value without a reason.
        """
        complete = []
        for row in rows:
            row = {**self.run, "space": "text", **row, "ids_sha256": str(row.get("ids_sha256") or "")[:16]}
            value = row.get("value")
            if value is None or value == "" or not math.isfinite(float(value)):
                if not row.get("reason"):
                    raise ValueError(f"{row.get('system')}/{row.get('metric')} has no value and no reason: say why it was not computed")
                row.update(value=None, status="not_computed")
            else:
                row.setdefault("status", "ok")
            complete.append(row)
        super().add(complete)

    def frame(self) -> pd.DataFrame:
        """All rows as a table: value, sd and interval ends as float64 (NaN where blank), the rest as text."""
        frame = pd.DataFrame(self.read(), columns=list(METRIC_COLUMNS), dtype=str)
        for column in ("value", "sd", "ci_low", "ci_high", "clip_ci_low", "clip_ci_high", "wall_s"):
            frame[column] = pd.to_numeric(frame[column].replace("", None))
        return frame


def search_file(profile: Profile) -> RowFile:
    """``results/<profile>/search.csv``: every tuning trial on val, the rejected ones too; ``params`` is a JSON object."""
    return RowFile(profile.results_dir / "search.csv", SEARCH_COLUMNS, SEARCH_KEY)


def search_paths(profile: Profile) -> list[Path]:
    """Where choices made on val stand, the profile's own first; those of ``mini``, which are committed, hold for its encoder alone."""
    return [profile.results_dir / "search.csv", *([REPO / "results/mini/search.csv"] if profile.encoder == "mini" else [])]




# ----------------------------------------------------------------------------------------------------
# Checkpoints: one safetensors file that is whole, unaltered, and made by the run that reads it, or is not used at all.


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
        recipe: the number beside the algorithm, such as ``dl.train.BRIDGE_RECIPE``. It goes up when the same parts give another result.
        parts: JSON values, and other keys, of which the digest counts. Arrays name themselves by :func:`content`.

    Raises:
        TypeError: a part that is no JSON value.

    Example:
        >>> key("mapping", 1, system="ridge", data=key("vectors", 1, crop="first 10 s")).digest
    """
    made = Key(kind=kind, recipe=recipe, **{name: part.digest if isinstance(part, Key) else part for name, part in parts.items()})
    return Key(json.loads(json.dumps(made)))              # tuples become lists, as in a file's header


def content(*arrays: Tensor | list[str]) -> str:
    """Sixteen hex digits of the content of arrays (dtype, shape, bytes) and texts: the name of data that come without a file."""
    return _sha256(list(arrays))[:16]


def save_checkpoint(path: str | Path, tensors: dict[str, Tensor], state: dict, run: Key) -> None:
    """Write tensors, a state and the key of what made them to one safetensors file, atomically.

    All that is no tensor goes into one entry of the header: safetensors writes several in an order that changes from run to run.

    Args:
        tensors: name -> tensor of any shape and dtype.
        state: JSON values.
        run: the key of the run; it stands in the header in clear.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"state": state, "key": run}
    metadata = {"about": json.dumps({**about, "sha256": _sha256([about, tensors])})}
    atomic_write(path, safetensors.torch.save(tensors, metadata=metadata))


def load_checkpoint(path: str | Path, run: Key | None = None) -> tuple[dict[str, Tensor], dict] | None:
    """Read what :func:`save_checkpoint` wrote for this very run; anything else is left aside with one line on stderr.

    Args:
        run: the key of the run that wants it; None takes any.

    Returns:
        (tensors on the CPU, state), or None: no file, a damaged one, or one whose key differs; the line names the parts that do.
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
        stored = about["key"]
        differing = sorted(name for name in stored.keys() | (run or stored).keys() if run and stored.get(name) != run.get(name))
        if not differing:
            return tensors, about["state"]
        reason = f"is from another run (its {', '.join(differing)} differ)"
    print(f"{path.parent.name}/{path.name} {reason}: it is not used, all in it is made anew", file=sys.stderr, flush=True)
    return None


def _sha256(value: object) -> str:
    """sha256 of a tensor (dtype, shape, bytes), a JSON value, or a list or dict of these."""
    digest = hashlib.sha256()
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    elif isinstance(value, dict):
        digest.update("".join(f"{name} {_sha256(value[name])} " for name in sorted(value)).encode())
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor | list | tuple | dict) for item in value):
        digest.update(" ".join(_sha256(item) for item in value).encode())
    else:
        digest.update(json.dumps(value).encode())
    return digest.hexdigest()
