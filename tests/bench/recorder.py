"""What a benchmark needs around its measurements: rows that are on disk at once, a guard, a time budget, a stop-watch."""
from __future__ import annotations

import gc
import math
import resource
import signal
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dl.store import atomic_write, csv_text, device_name

COLUMNS = ("section", "name", "value", "unit", "batch", "seq_len", "dtype", "repeats", "value_min", "value_max",
           "card", "torch", "transformers", "peft", "status", "reason")
LIBRARIES = ("torch", "transformers", "peft")
LIMIT = 180.0            # seconds that one guarded measurement may take
GIB = 2**30


class OutOfTime(Exception):
    """A measurement ran past its limit."""


class Recorder:
    """Rows of one CSV, written whole after every row; status is ``ok``, or ``not measured`` with a reason.

    Args:
        path: the CSV file; an old one is replaced.
        budget_seconds: from now on; what would start later is written as not measured, "out of time".
        device: where the measurements run.
    """

    columns = COLUMNS
    limit = LIMIT

    def __init__(self, path: Path, budget_seconds: float, device: torch.device) -> None:
        self.path, self.device = path, device
        self.rows: list[dict] = []
        self.end = time.monotonic() + budget_seconds
        self.about = {"card": device_name() if device.type == "cuda" else "cpu", **{name: installed(name) for name in LIBRARIES}}

    def record(self, section: str, name: str, unit: str, values: float | list[float], reason: str = "", **where: object) -> None:
        """One row: the median of ``values``, with their least and greatest.

        Args:
            section, name, unit: what was measured.
            values: one for each repeat, or one number that was derived.
            reason: how the number comes about, where the name does not say it.
            where: batch, seq_len, dtype.
        """
        values = values if isinstance(values, list) else [values]
        if not all(math.isfinite(value) for value in values):
            self.not_measured(section, name, "the value is not finite", unit=unit, **where)
            return
        self._add({"section": section, "name": name, "value": statistics.median(values), "unit": unit, **where, "repeats": len(values),
                   "value_min": min(values), "value_max": max(values), "status": "ok", "reason": reason})

    def not_measured(self, section: str, name: str, reason: str, **where: object) -> None:
        """One row without a value."""
        self._add({"section": section, "name": name, "status": "not measured", "reason": " ".join(reason.split())[:300], **where})

    def attempt(self, measure: Callable[[], None], section: str, name: str, **where: object) -> None:
        """Call ``measure``, which records rows; whatever stops it becomes one row, and the benchmark goes on."""
        left = min(self.limit, self.end - time.monotonic())
        if left <= 0:
            self.not_measured(section, name, "out of time", **where)
            return
        self._reset_memory()
        before = signal.signal(signal.SIGALRM, _raise_out_of_time)
        signal.setitimer(signal.ITIMER_REAL, left, 1.0)  # again every second: an exception raised inside a destructor is swallowed
        try:
            measure()
        except Exception as error:                       # noqa: BLE001  one failure must not cost the other rows
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.not_measured(section, name, f"{type(error).__name__}: {error}", **where)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def value(self, section: str, name: str, **where: object) -> float | None:
        """The value of the first such row that was measured, else None."""
        wanted = {"section": section, "name": name, "status": "ok", **where}
        return next((row["value"] for row in self.rows if all(row.get(key) == value for key, value in wanted.items())), None)

    def share(self, section: str, name: str, values: list[float], ceiling: float | None, reason: str, **where: object) -> None:
        """``values`` as shares of a measured number of the same unit, ``ceiling``."""
        if ceiling is None:
            self.not_measured(section, name, "what it is a share of was not measured", unit="share", **where)
        else:
            self.record(section, name, "share", [value / ceiling for value in values], reason, **where)

    def peak_memory(self, section: str, name: str = "peak_memory", **where: object) -> None:
        """GiB that tensors held at most since the measurement began; without a GPU, what the process has held at most so far."""
        if self.device.type == "cuda":
            self.record(section, name, "GiB", torch.cuda.max_memory_allocated() / GIB, **where)
        else:
            self.record(section, name, "GiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, "of the process", **where)

    def _reset_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _add(self, row: dict) -> None:
        self.rows.append({**self.about, **row})
        atomic_write(self.path, csv_text(self.rows, self.columns))
        print(self.shown(row), flush=True)

    @staticmethod
    def shown(row: dict) -> str:
        """A row as one line for the terminal."""
        place = ", ".join(f"{key} {row[key]}" for key in ("batch", "seq_len", "dtype") if row.get(key) is not None)
        shown = f"{row['value']:.4g} {row['unit']}" if row["status"] == "ok" else f"not measured: {row['reason']}"
        return f"{row['section']}: {row['name']} ({place}) {shown}"


def stopwatch(run: Callable[[], object], device: torch.device, repeats: int, warmup: int = 3, host: bool = False) -> list[float]:
    """Seconds of each of ``repeats`` calls, after ``warmup`` ones (no more than repeats).

    On a GPU by events that are read at the end, so that the queue never runs dry; with ``host`` (and without a GPU) by the host's
    clock around a finished call, work of the host included.
    """
    for _ in range(min(warmup, repeats)):
        run()
    synchronize(device)
    if host or device.type != "cuda":
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            run()
            synchronize(device)
            times.append(time.perf_counter() - began)
        return times
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in marks:
        first.record()
        run()
        last.record()
    synchronize(device)
    return [first.elapsed_time(last) / 1000 for first, last in marks]       # events count milliseconds


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _raise_out_of_time(*_: object) -> None:
    raise OutOfTime("this measurement ran past its limit")


def installed(name: str) -> str:
    """The version of a package, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
