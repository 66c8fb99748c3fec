"""Where this replication departs from the paper, or had to choose what the paper leaves unknown to us: one text for each place.

A comment with the word DEVIATION and an id in brackets marks the place in code; ``DEVIATIONS`` says what is done there, what the paper
has, and why. ``python -m dl readme`` and notebook 10 copy it from here; a test keeps marks and register the same.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dl.config import REPO
from dl.store import markdown_table

MARK = re.compile(r"#\s*DEVIATION\(([\w-]+)\)")


@dataclass(frozen=True)
class Deviation:
    """One departure: its id in the code, what is done here, what the paper has, and why ours is as it is."""

    id: str
    here: str
    paper: str
    why: str


DEVIATIONS = (
    Deviation("network", "three residual MLP blocks, form from SEED, 2 D wide", "three residual MLP blocks; the rest unknown",
              "SEED is the same first author's released predecessor; that the paper keeps its form is our inference"),
    Deviation("noise-schedule", "T = 1000, sqrt-linear betas 1e-4 to 0.02, x0 prediction (SEED)", "unknown", "SEED's code has these"),
    Deviation("prediction-losses", "L1, cross plus self prediction, equal weights", "a cross-sample prediction loss; form unknown",
              "SEED mixes cross and identity pairs under L1"),
    Deviation("topology-formula", "mean squared difference of off-diagonal cosines; three other forms for ablation",
              "a topology loss; formula unknown", "the simplest form that keeps the angles between captions; the ablation compares the others"),
    Deviation("topology-weight", "chosen on val from 0, 0.1, 1, 10", "unknown", "one criterion on val for every system"),
    Deviation("inference", "one step from k\\*, or DDIM in n steps; both chosen on val", "unknown",
              "SEED takes one step from k\\* = 50; val decides"),
    Deviation("training-recipe", "AdamW, few hundred steps, EMA", "unknown",
              "learning rate and weight decay are SEED's; the steps fit a laptop, and every trained system gets as many"),
    Deviation("data", "`data/mini`", "AudioCaps", "AudioCaps' clips are not free to pass on; the recordings here are"),
    Deviation("encoder", "mini-CLAP, 256-d", "a frozen CLAP, checkpoint unknown", "small enough to ship; profile paper takes LAION-CLAP"),
    Deviation("language-model", "SmolLM2-135M-Instruct, LoRA on q and v, one prefix vector, 400 steps, greedy (beam 4 under --full)",
              "a large language model; which one, and its training, unknown", "captions on two CPU cores; profile paper takes a 7B model and beam 4"),
)


def marks(root: Path = REPO) -> dict[str, list[str]]:
    """Every mark in the library: id -> the places that bear it.

    Args:
        root: the repository; ``dl/**/*.py`` below it is read.

    Returns:
        for each id its places as ``dl/bridge.py:169``, in order.

    Example:
        >>> marks()["network"]
        ['dl/bridge.py:169']
    """
    found: dict[str, list[str]] = {}
    for path in sorted((root / "dl").rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for name in MARK.findall(line):
                found.setdefault(name, []).append(f"{path.relative_to(root).as_posix()}:{number}")
    return found


def deviations_table(full: bool = False, root: Path = REPO) -> str:
    """The register in Markdown; ``full`` adds why, and the files that bear the mark.

    Raises:
        ValueError: a mark without an entry, or an entry without a mark.
    """
    places = marks(root)
    if unmatched := set(places) ^ {entry.id for entry in DEVIATIONS}:
        raise ValueError(f"deviations {', '.join(sorted(unmatched))} stand in code or in dl/report/deviations.py, not in both: add what is missing")
    head = ["id", "here", "in the paper", *(["why", "where"] if full else [])]
    files = {name: dict.fromkeys(place.partition(":")[0] for place in found) for name, found in places.items()}     # line numbers move
    rows = [[f"`{entry.id}`", entry.here, entry.paper, *([entry.why, ", ".join(f"`{file}`" for file in files[entry.id])] if full else [])]
            for entry in DEVIATIONS]
    return markdown_table(head, rows, left=len(head))
