"""Shared fixtures: no test reaches for a network, none writes into ``results/``."""
from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"               # before any import of huggingface_hub reads it
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "reliability"))
from ledger import COLUMNS, LEDGER

from dl.config import REPO
from dl.store import atomic_write, csv_text

LONGEST = ("test_notebooks.py", "test_notebooks_apart.py", "test_paper_profile.py")      # begun first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--write-reliability", action="store_true",
                     help="write what tests/reliability counted to results/reliability.csv")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several test processes hands its part of the ledger to the first."""
    if hasattr(session.config, "workeroutput"):
        counts = [[*key, *counts] for key, counts in LEDGER.counts.items()]
        session.config.workeroutput["ledger"] = [counts, LEDGER.measures]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error: object) -> None:
    """The first process takes the part of another over."""
    counts, measures = getattr(node, "workeroutput", {}).get("ledger", ([], {}))
    for kind, part, good, bad in counts:
        LEDGER.add(kind, part, good, bad)
    for part, measure in measures.items():
        LEDGER.measures[part] = max(tuple(measure), LEDGER.measures.get(part, (0.0, 0.0, "")))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not (LEDGER.counts or LEDGER.measures):
        return
    terminalreporter.section("reliability")
    for line in LEDGER.lines():
        terminalreporter.line(line)
    if config.getoption("--write-reliability"):
        of = "slow" if config.getoption("--slow") else "fast"
        path = atomic_write(REPO / "results/reliability.csv", csv_text(LEDGER.rows(of), COLUMNS))
        terminalreporter.line(f"written to {path.relative_to(REPO)}")


@pytest.fixture
def results_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary results folder: ``get_profile`` and every process started by the test write there."""
    root = tmp_path / "results"
    monkeypatch.setenv("DL_RESULTS", str(root))
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small are slower on two threads, and their figures are those of one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
