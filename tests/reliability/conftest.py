"""What the reliability tests count: faults tried and survived, bad inputs and what became of them, limits measured.

Every test of this folder enters what it tried into the ledger; the run ends with its summary (``tests/conftest.py``).
``./run_all.sh test --slow --write-reliability`` keeps it as ``results/reliability.csv``; no other run touches that file.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from ledger import LEDGER, Ledger, peak_mb


@pytest.fixture
def ledger() -> Ledger:
    """The one ledger of this run."""
    return LEDGER


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """After every file: none of the bad inputs made the test process grow without bound."""
    yield
    LEDGER.measure("peak memory of the test process", peak_mb() / 1000, 8, "GB")


def pytest_configure(config: pytest.Config) -> None:
    """hypothesis tries the same examples at every run and keeps nothing; no deadline, the machine may be busy; ten times as many with ``--slow``."""
    examples = 1000 if config.getoption("--slow") else 100
    settings.register_profile("reliability", max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("reliability")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter (pytest's own are closed to ``nobody``)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
