"""The committed tables are what the code lays out from the committed ``metrics.csv``, cell by cell."""
from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from dl.config import REPO, get_profile
from dl.report import write_ablations, write_claims, write_comparison, write_table1, write_table2

MINI = REPO / "results/mini"
WRITERS = {"table1": write_table1, "table2": write_table2, "claims": write_claims, "ablations": write_ablations,
    "comparison": write_comparison}
PERMITTED: dict[str, tuple[str, str]] = {}      # file -> (a pattern of the committed text, what may stand there now)
NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def cells(path: Path) -> list[str]:
    """All cells of a CSV, its header too; of Markdown its lines."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8").split("\n")
    with open(path, newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in (*row, "(end of row)")]


def same(old: str, new: str) -> bool:
    """Equal text; a number may differ by 1e-9, in a sentence as well as alone."""
    if old == new:
        return True
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (old, new)]
    return NUMBER.sub("#", old) == NUMBER.sub("#", new) and numbers[1] == pytest.approx(numbers[0], rel=0, abs=1e-9)


def differences(name: str, old: list[str], new: list[str]) -> list[str]:
    """What is not the same, a line each; permitted differences left out."""
    if len(old) != len(new):
        return [f"{name}: {len(old)} cells or lines became {len(new)}"]
    pattern, now = PERMITTED.get(name, (r"(?!)", ""))
    return [f"{name}: {a!r} became {b!r}" for a, b in zip(old, new, strict=True)
            if not same(re.sub(pattern, now, a), b)]


@pytest.fixture(scope="module")
def relaid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with metrics.csv and search.csv of ``results/mini``, and every table laid out from them."""
    profile = get_profile("mini", results_root=tmp_path_factory.mktemp("relaid"))
    profile.results_dir.mkdir(parents=True)
    for name in ("metrics.csv", "search.csv"):
        shutil.copy(MINI / name, profile.results_dir)
    for write in WRITERS.values():         # the comparison reads the tables before it
        write(profile)
    return profile.results_dir


@pytest.mark.parametrize("name", [name + end for name in WRITERS for end in (".csv", ".md")])
def test_a_committed_table_is_laid_out_again(relaid, name):
    found = differences(name, cells(MINI / name), cells(relaid / name))
    assert not found, "\n".join(found[:20])


def test_a_moved_cell_is_seen():
    assert same("0.5 [0.1, 1,000]", "0.5000000001 [0.1, 1000]") and not same("0.5", "0.500001") and not same("a 1",
        "b 1") and not same("1", "")
    assert differences("x.csv", ["a", "1"], ["a", "2"]) == ["x.csv: '1' became '2'"] and differences("x.csv", ["a"],
        ["a", "b"])
