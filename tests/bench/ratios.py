"""Two ways to do the same thing, timed in turn in one process: the rows of bench.csv, each with its ratio and its goal."""
from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from recorder import Recorder, installed
from scipy.stats import binom

from dl.store import atomic_write, csv_text

COLUMNS = ("section", "name", "over", "size", "ours", "theirs", "unit", "ratio", "goal", "met", "ratio_low", "ratio_high", "ratio_min", "ratio_max",
           "repeats", "device", "threads", "versions", "status", "reason", "profile")
LIBRARIES = ("torch", "transformers", "peft", "laion-clap", "aac-metrics")
Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Goal:
    """What a ratio of two costs has to be, such as ``ours / theirs <= 1.5`` or ``theirs / ours >= 20``."""

    of: str                              # "ours / theirs" or "theirs / ours"
    sign: str                            # "<=" or ">="
    bound: float

    def ratio(self, ours: float, theirs: float) -> float:
        """The ratio that the goal speaks of."""
        return ours / theirs if self.of == "ours / theirs" else theirs / ours

    def met(self, low: float, high: float) -> str:
        """yes or no where the whole interval says so, else "within noise"."""
        inside = [value <= self.bound if self.sign == "<=" else value >= self.bound for value in (low, high)]
        return "yes" if all(inside) else "within noise" if any(inside) else "no"

    def __str__(self) -> str:
        return f"{self.of} {self.sign} {self.bound:g}"


def at_most(bound: float) -> Goal:
    """Ours may cost ``bound`` times what theirs costs."""
    return Goal("ours / theirs", "<=", bound)


def faster(bound: float) -> Goal:
    """Theirs has to cost ``bound`` times what ours costs."""
    return Goal("theirs / ours", ">=", bound)


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], repeats: int, warmup: int = 1, seconds: float = 60.0) -> tuple[Pairs, object, object]:
    """Seconds of ours and theirs, called in turn: ours, theirs, ours, theirs, ...

    Args:
        repeats: pairs; fewer, but at least three, once ``seconds`` have gone by.
        warmup: calls of each before the first pair.

    Returns:
        (the pairs, what ours answered last, what theirs answered last), so that what was timed can be compared.
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


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call, by the host's clock."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def median_interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics; of fewer than six values the least and the greatest."""
    values = sorted(values)
    left_out = max(0, int(binom.ppf(0.025, len(values), 0.5)) - 1)
    return values[left_out], values[-1 - left_out]


def check_equal(ours: torch.Tensor, theirs: torch.Tensor, most: float, what: str) -> str:
    """How far two results lie apart, in words.

    Raises:
        AssertionError: further than ``most``; the comparison would be worthless.
    """
    apart = float((torch.as_tensor(ours).double() - torch.as_tensor(theirs).double()).abs().max())
    if not apart <= most:
        raise AssertionError(f"{what}: ours and theirs differ by {apart:.2g}, more than {most:g}")
    return f"{what} equal to {apart:.1g}"


class Ratios(Recorder):
    """Rows of bench.csv. With ``only``, the rows of other sections that the file holds stay as they are.

    Args:
        path, budget_seconds: as for :class:`Recorder`.
        sections: all of them, in the order of the file.
        only: those measured now.
        limit: seconds that one measurement may take.
    """

    columns = COLUMNS

    def __init__(self, path: Path, budget_seconds: float, sections: tuple[str, ...], only: tuple[str, ...], limit: float = 300.0) -> None:
        super().__init__(path, budget_seconds, torch.device("cpu"))
        self.limit = limit
        self.sections = sections
        self.about = {"device": "cpu", "threads": torch.get_num_threads(), "versions": "; ".join(f"{name} {installed(name)}" for name in LIBRARIES)}
        if path.is_file() and set(only) != set(sections):
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if row["section"] not in only]

    def compare(self, section: str, name: str, pairs: Pairs, goal: Goal, reason: str = "", *, unit: str = "s",
                profile: Callable[[], str] | None = None, **where: object) -> None:
        """One comparison: medians of both costs, median of the ratios of the pairs, whether the goal is met.

        Args:
            pairs: costs (ours, theirs) that were measured one after the other.
            reason: what was compared, and why a goal that is missed is missed.
            profile: says where our time goes; called only where the goal is not met.
            where: over and size, or another device.
        """
        ratios = [goal.ratio(*pair) for pair in pairs]
        low, high = median_interval(ratios)
        met = goal.met(low, high)
        ours, theirs = (statistics.median(costs) for costs in zip(*pairs, strict=True))
        self._add({"section": section, "name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": statistics.median(ratios),
                   "goal": str(goal), "met": met, "ratio_low": low, "ratio_high": high, "ratio_min": min(ratios), "ratio_max": max(ratios),
                   "repeats": len(pairs), "status": "ok", "reason": reason, "profile": profile() if profile and met != "yes" else "", **where})

    def part(self, section: str, measure: Callable[[], None]) -> None:
        """Call what measures a whole section; what it cannot even set up costs one row."""
        try:
            measure()
        except Exception as error:                       # noqa: BLE001  one failure must not cost the other rows
            self.not_measured(section, "set-up", f"{type(error).__name__}: {error}")

    def cost(self, section: str, name: str, over: str, size: int, seconds: list[float]) -> None:
        """One cost at one size, with nothing beside it: a point of the figure."""
        self._add({"section": section, "name": name, "over": over, "size": size, "ours": statistics.median(seconds), "unit": "s",
                   "repeats": len(seconds), "status": "ok"})

    def _add(self, row: dict) -> None:
        super()._add(row)
        self.rows.sort(key=lambda row: self.sections.index(row["section"]))
        atomic_write(self.path, csv_text(self.rows, self.columns))

    @staticmethod
    def shown(row: dict) -> str:
        """A row as one line for the terminal."""
        head = f"{row['section']}: {row['name']}" + (f" at {row['size']} {row['over']}" if row.get("size") else "")
        if row["status"] != "ok":
            return f"{head}: not measured: {row['reason']}"
        if "ratio" not in row:
            return f"{head}: {row['ours']:.4g} {row['unit']}"
        return (f"{head}: {row['ours']:.4g} against {row['theirs']:.4g} {row['unit']}, ratio {row['ratio']:.4g} "
                f"[{row['ratio_low']:.4g}, {row['ratio_high']:.4g}], goal {row['goal']}: {row['met']}")


def torch_profile(run: Callable[[], object], most: int = 6) -> str:
    """The operators that a call spends its CPU time in, with their shares of all operators' time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return ", ".join(f"{event.key.removeprefix('aten::')} {event.self_cpu_time_total / total:.0%}" for event in events[:most] if event.self_cpu_time_total > 0.005 * total)


def python_profile(run: Callable[[], object], most: int = 6) -> str:
    """The functions that a call spends its time in, what they call left out, with their shares."""
    import cProfile
    import pstats

    seen = cProfile.Profile()
    seen.runcall(run)
    table = sorted(pstats.Stats(seen).stats.items(), key=lambda entry: -entry[1][2])
    total = sum(numbers[2] for _, numbers in table)
    return ", ".join(f"{Path(file).stem}.{function} {numbers[2] / total:.0%}".replace("~.", "") for (file, _, function), numbers in table[:most] if numbers[2] > 0.005 * total)
