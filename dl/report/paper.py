"""``results/paper.csv``: what the paper and others report, typed by hand, one figure a line, and how far each figure can be trusted.

Only the paper's abstract and summaries of it were read. So most of its values are "?", and ``status`` says where each of the others comes
from; "recalled" is a figure that nobody checked against its source.
"""
from __future__ import annotations

import csv
import math
from pathlib import Path

import pandas as pd

from dl.config import REPO

PAPER_CSV = REPO / "results/paper.csv"
PAPER_COLUMNS = ("system", "setting", "dataset", "metric", "value", "bound", "unit", "claim", "status", "note")
STATUSES = ("abstract", "digest of the paper", "digest of COMET 2605.29628", "its README", "quoted by SLAM-LLM", "recalled", "?")
SETTINGS = ("gap", "zero_shot", "training_free", "supervised")
CAPTION_FIGURES = ("meteor", "cider", "spice", "spider", "fense")      # printed x 100
FIGURES = (*CAPTION_FIGURES, "cider_relative_gain", "modality_gap", "migration", "num_blocks", "state_of_the_art")
UNITS = ("percent", "relative percent", "blocks")
UNKNOWN, NOT_REPORTED = "?", "-"


def load_paper(path: str | Path = PAPER_CSV) -> pd.DataFrame:
    """Read ``paper.csv`` and check every line.

    Args:
        path: the file.

    Returns:
        its columns as text (``PAPER_COLUMNS``): ``value`` is a number, "?" (unknown to us) or "-" (not in what we read); ``figure`` is
        added, the value as float64, NaN where there is none.

    Raises:
        ValueError: a wrong column, or a line that breaks a rule; the message names the line and the rule.

    Example:
        >>> paper = load_paper()
        >>> paper[paper.claim == "C3"].value.item()
        '52.5'
    """
    path = Path(path)
    seen: dict[tuple[str, ...], int] = {}
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != PAPER_COLUMNS:
            raise ValueError(f"{path.name} line 1: columns are {','.join(header)}, wanted {','.join(PAPER_COLUMNS)}")
        for cells in reader:
            if problem := _problem(cells):
                raise ValueError(f"{path.name} line {reader.line_num}: {problem}")
            row = dict(zip(PAPER_COLUMNS, cells, strict=True))
            key = (row["system"], row["setting"], row["metric"])
            if key in seen:
                raise ValueError(f"{path.name} line {reader.line_num}: {' / '.join(key)} stands on line {seen[key]} already")
            seen[key] = reader.line_num
            rows.append(row | {"figure": _number(row["value"])})
    return pd.DataFrame(rows, columns=[*PAPER_COLUMNS, "figure"])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _problem(cells: list[str]) -> str | None:
    """What is wrong with a line; None if nothing."""
    if len(cells) != len(PAPER_COLUMNS):
        return f"{len(cells)} cells, wanted {len(PAPER_COLUMNS)} (quote a cell that holds a comma)"
    row = dict(zip(PAPER_COLUMNS, cells, strict=True))
    for column, known in (("setting", SETTINGS), ("metric", FIGURES), ("status", STATUSES), ("bound", ("", "up to")), ("unit", ("", *UNITS)),
                          ("claim", ("", *(f"C{number}" for number in range(1, 7))))):
        if row[column] not in known:
            return f"{column} {row[column]!r} is not one of {', '.join(repr(word) for word in known)}"
    if blank := [column for column in ("system", "dataset", "value") if not row[column].strip()]:
        return f"{blank[0]} is blank; an unknown value is '?'"
    value = row["value"]
    if value in (UNKNOWN, NOT_REPORTED):
        if row["unit"] or row["bound"]:
            return f"value {value!r} has no unit and no bound"
        if value == UNKNOWN and row["status"] not in ("?", "abstract") or value == NOT_REPORTED and row["status"] == "?":
            return f"value {value!r} does not go with status {row['status']!r}"
        return None
    if not math.isfinite(_number(value)):
        return f"value {value!r} is no number, '?' or '-'"
    if row["status"] == "?" or not row["unit"]:
        return "a number needs a unit and a status that says where it comes from"
    if row["unit"] == "percent" and not 1 < float(value) < 200:
        return f"{value} is no score x 100, as papers print them"
    return None
