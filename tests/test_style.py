"""The code passes ruff and mypy as pyproject.toml sets them up."""
from __future__ import annotations

import subprocess
import sys

import pytest

from dl.config import REPO


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=REPO, capture_output=True, text=True, check=False,
                          timeout=300)


def test_ruff_finds_nothing_in_code_and_notebooks():
    done = run("ruff", "check", "--no-cache", ".")
    assert done.returncode == 0, done.stdout


def test_the_types_of_dl_hold(tmp_path):
    done = run("mypy", "--cache-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "no issues found" in done.stdout


@pytest.mark.parametrize(("line", "tool", "finding"), [
    ("import os\n", ("ruff", "check", "--no-cache"), "F401"),
    ("def double(x: int) -> str:\n    return 2 * x\n", ("mypy", "--cache-dir=/dev/null"), "return-value"),
])
def test_a_fault_would_be_found(line, tool, finding, tmp_path):
    (tmp_path / "faulty.py").write_text(line)
    done = run(*tool, str(tmp_path / "faulty.py"))
    assert done.returncode == 1
    assert finding in done.stdout
