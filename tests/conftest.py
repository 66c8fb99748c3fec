"""Shared fixtures: no test reaches for a network, none writes into ``results/``."""
from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"               # before any import of huggingface_hub reads it
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--write-reliability", action="store_true", help="write what tests/reliability counted to results/reliability.csv")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))


@pytest.fixture
def results_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary results folder: ``get_profile`` and every process started by the test write there."""
    root = tmp_path / "results"
    monkeypatch.setenv("DL_RESULTS", str(root))
    return root
