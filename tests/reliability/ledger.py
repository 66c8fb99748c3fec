"""The ledger of the reliability tests: what was tried, what became of it, what was measured."""
from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

KINDS = {                       # kind: (what is tried, what should become of it, what must not)
    "fault": ("faults", "survived", "lost"),
    "bad input": ("bad inputs", "clear", "silent"),
    "mutation": ("mutated inputs", "held", "crashed, hung or grew"),
    "same bytes": ("repetitions", "equal", "different"),
}
COLUMNS = ("kind", "part", "tried", "good", "good_means", "bad", "bad_means", "measured", "bound", "unit", "set")


class Ledger:
    """Counts by kind and part, and measured values with their bounds."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.measures: dict[str, tuple[float, float, str]] = {}

    def add(self, kind: str, part: str, good: int = 0, bad: int = 0) -> None:
        counts = self.counts.setdefault((kind, part), [0, 0])
        counts[0] += good
        counts[1] += bad

    @contextmanager
    def attempt(self, kind: str, part: str) -> Iterator[None]:
        """One attempt: good if the block ends, bad if it raises; a skipped one does not count."""
        try:
            yield
        except pytest.skip.Exception:
            raise
        except BaseException:
            self.add(kind, part, bad=1)
            raise
        self.add(kind, part, good=1)

    def measure(self, part: str, value: float, bound: float, unit: str) -> None:
        """Enter a measured value, and fail if it is above its bound."""
        self.measures[part] = (value, bound, unit)
        assert value <= bound, f"{part}: {value:g} {unit}, at most {bound:g} are allowed"

    def rows(self, of: str) -> list[dict]:
        """The lines of ``results/reliability.csv``; ``of`` names the set of tests, fast or slow."""
        counts = [{"kind": kind, "part": part, "tried": good + bad, "good": good, "good_means": KINDS[kind][1],
                   "bad": bad, "bad_means": KINDS[kind][2], "set": of}
                  for (kind, part), (good, bad) in sorted(self.counts.items())]
        return counts + [{"kind": "limit", "part": part, "measured": value, "bound": bound, "unit": unit, "set": of}
                         for part, (value, bound, unit) in sorted(self.measures.items())]

    def lines(self) -> Iterator[str]:
        """The summary: a line a kind, with its parts; then the limits."""
        for kind, (what, good_means, bad_means) in KINDS.items():
            parts = {part: counts for (of, part), counts in sorted(self.counts.items()) if of == kind}
            if parts:
                good, bad = map(sum, zip(*parts.values(), strict=True))
                each = ", ".join(f"{part} {sum(counts)}" for part, counts in parts.items())
                yield f"{what}: {good + bad} tried, {good} {good_means}, {bad} {bad_means}  ({each})"
        for part, (value, bound, unit) in sorted(self.measures.items()):
            yield f"limit: {part} {value:.3g} {unit}, allowed {bound:.3g}"


LEDGER = Ledger()


def peak_mb() -> float:
    """The largest memory of this process so far, MB (``ru_maxrss`` counts that of the process it was started from)."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@contextmanager
def nobody() -> Iterator[None]:
    """Inside, file permissions bind: the tests may run as root, whom none binds."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
