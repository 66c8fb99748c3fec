"""What the reliability tests share; each enters what it tried into the ledger, and the run ends with its summary.

``./run_all.sh test --slow --write-reliability`` keeps it as ``results/reliability.csv``; no other run does.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from ledger import LEDGER, Ledger, peak_mb
from test_caption_files import checkpoints, quick  # noqa: F401, fixtures
from test_captioning import language_model, profile  # noqa: F401
from test_environment import clone  # noqa: F401
from test_pipeline import toy  # noqa: F401


def pytest_configure(config: pytest.Config) -> None:
    """hypothesis tries the same examples at every run, keeps nothing and has no deadline: the machine may be busy."""
    settings.register_profile("reliability", max_examples=1000 if config.getoption("--slow") else 100, deadline=None,
                              derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    settings.load_profile("reliability")
    config.addinivalue_line("markers", "attempt(kind, part): the whole test is one attempt of the ledger")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    mark = pyfuncitem.get_closest_marker("attempt")
    with LEDGER.attempt(*mark.args) if mark else nullcontext():
        return (yield)


@pytest.fixture
def ledger() -> Ledger:
    return LEDGER


@pytest.fixture(scope="module", autouse=True)
def bounded() -> Iterator[None]:
    """None of a file's bad inputs made the test process grow without bound."""
    yield
    LEDGER.measure("peak memory of the test process", peak_mb() / 1000, 8, "GB")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter (pytest's own are closed to ``nobody``)."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
