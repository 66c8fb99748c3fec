"""What both benchmarks share: rows that are on disk at once, a time budget, stop-watches, goals."""
from __future__ import annotations

import csv
import re
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from scipy.stats import binom

from dl.store import atomic_write, csv_text

GIB = 2**30
Pairs = list[tuple[float, float]]


class Recorder:
    """Rows of one CSV, written whole after every row; status is ``ok``, or ``not measured`` with a reason.

    Args:
        path: the CSV file.
        columns: its columns.
        about: cells that every row gets.
        budget_seconds: from now on; what would start later is not measured.
        order: sections, as the file has them.
        only: the sections measured now; of others the rows that the file holds stay. None: all of them.
    """

    def __init__(self, path: Path, columns: Sequence[str], about: dict, budget_seconds: float,
                 order: Sequence[str] = (), only: Sequence[str] | None = None) -> None:
        self.path, self.columns, self.about, self.order = path, columns, about, order
        self.end = time.monotonic() + budget_seconds
        self.rows: list[dict] = []
        if only is not None and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if row["section"] not in only]

    def add(self, section: str, name: str, status: str = "ok", **cells: object) -> None:
        """One row, written and shown."""
        row = {**self.about, "section": section, "name": name, "status": status, **cells}
        self.rows.append(row)
        if self.order:
            self.rows.sort(key=lambda row: self.order.index(row["section"]))
        atomic_write(self.path, csv_text(self.rows, self.columns))
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()
                 if key not in self.about and value not in ("", None)}
        print(*(f"{key} {value}" for key, value in shown.items()), sep=", ", flush=True)

    def attempt(self, section: str, name: str, measure: Callable[..., object], *given: object,
                **cells: object) -> None:
        """Call ``measure(*given)``, which adds rows. Whatever stops it becomes one row, and the benchmark goes on."""
        try:
            if time.monotonic() > self.end:
                raise TimeoutError("out of time")
            measure(*given)
        except Exception as error:      # noqa: BLE001  one failure must not cost the other rows
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.add(section, name, "not measured", reason=reason, **cells)

    def value(self, section: str, name: str, **cells: object) -> float:
        """The value of the first such row.

        Raises:
            LookupError: it was not measured.
        """
        wanted = {"section": section, "name": name, "status": "ok", **cells}
        for row in self.rows:
            if wanted.items() <= row.items():
                return row["value"]
        raise LookupError(f"{section}, {name} was not measured")

    def compare(self, section: str, name: str, pairs: Pairs, goal: str, reason: str,
                profile: Callable[[], str] = str, **cells: object) -> None:
        """One row: medians of both costs, the median of the ratios of the pairs, whether the goal is met.

        Args:
            pairs: costs (ours, theirs) that were measured one after the other.
            goal: such as ``ours / theirs <= 1.5``. It is met, or missed, only where the whole interval says so.
            profile: says where our time goes; called only where the goal is not met.
        """
        of, sign, bound = re.fullmatch(r"(ours / theirs|theirs / ours) (<=|>=) (\S+)", goal).groups()
        ratios = [ours / theirs if of == "ours / theirs" else theirs / ours for ours, theirs in pairs]
        low, high = median_interval(ratios)
        inside = [value <= float(bound) if sign == "<=" else value >= float(bound) for value in (low, high)]
        met = "yes" if all(inside) else "within noise" if any(inside) else "no"
        ours, theirs = (statistics.median(costs) for costs in zip(*pairs, strict=True))
        self.add(section, name, ours=ours, theirs=theirs, ratio=statistics.median(ratios), goal=goal, met=met,
                 ratio_low=low, ratio_high=high, ratio_min=min(ratios), ratio_max=max(ratios), repeats=len(pairs),
                 reason=reason, profile="" if met == "yes" else profile(), **{"unit": "s", **cells})


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics; of fewer than six values the least and the greatest."""
    values = sorted(values)
    left_out = max(0, int(binom.ppf(0.025, len(values), 0.5)) - 1)
    return values[left_out], values[-1 - left_out]


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, warmup: int = 1,
            seconds: float = 60) -> tuple[Pairs, object, object]:
    """Seconds of ours and theirs, called in turn, and what each answered last.

    Args:
        repeats: pairs; fewer, but at least three, once ``seconds`` have gone by.
        warmup: calls of each before the first pair.
    """
    for _ in range(warmup):
        ours()
        theirs()
    pairs: Pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < repeats and (len(pairs) < 3 or time.perf_counter() < end):
        began = time.perf_counter()
        found = ours()
        middle = time.perf_counter()
        wanted = theirs()
        pairs.append((middle - began, time.perf_counter() - middle))
    return pairs, found, wanted


def stopwatch(run: Callable[[], object], repeats: int, warmup: int = 1, calls: int = 1) -> list[float]:
    """Seconds of a call, ``repeats`` times; a GPU is waited for after ``calls`` calls: its queue stays full."""
    for _ in range(warmup):
        run()
    synchronize()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize()
        times.append((time.perf_counter() - began) / calls)
    return times


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def check_equal(ours: torch.Tensor, theirs: torch.Tensor, most: float, what: str) -> str:
    """How far two results lie apart, in words.

    Raises:
        AssertionError: further than ``most``; the comparison would be worthless.
    """
    apart = float((torch.as_tensor(ours).double() - torch.as_tensor(theirs).double()).abs().max())
    if not apart <= most:
        raise AssertionError(f"{what}: ours and theirs differ by {apart:.2g}, more than {most:g}")
    return f"{what} equal to {apart:.1g}"


def torch_profile(run: Callable[[], object], most: int = 8) -> str:
    """The operators that a call spends its CPU time in, with their shares of all operators' own time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return ", ".join(f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}"
                     for event in events[:most])


def versions(*names: str) -> dict[str, str]:
    """Of packages; "absent" where one is not installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found
