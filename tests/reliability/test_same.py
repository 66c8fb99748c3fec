"""The same seed gives the same bytes; other thread counts and batch sizes move figures by the last digits only."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dl.config import REPO

TOLERANCE = 1e-5            # of a coordinate of a unit vector; metrics are compared relatively beside it
WEIGHT_TOLERANCE = 1e-3     # of a trained weight: AdamW divides a small gradient by its size


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> list[tuple[dict, dict]]:
    """(tensors, captions) of two runs with two threads, one with one; with ``--slow`` four and three too."""
    folder, threads = tmp_path_factory.mktemp("same"), "2 2 1 4 3" if request.config.getoption("--slow") else "2 2 1"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
                                "OMP_WAIT_POLICY": "passive"}         # threads that wait do not take the machine
    done = subprocess.run([sys.executable, REPO / "tests/reliability/same.py", folder, *threads.split()], cwd=REPO,
                          capture_output=True, text=True, check=False, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(load_file(folder / f"{place}.safetensors"), json.loads((folder / f"{place}.json").read_text()))
            for place in range(len(threads.split()))]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative where a value is above 1."""
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1)).max())


def test_the_same_seed_gives_the_same_bytes(runs, ledger):
    (first, captions), (second, again) = runs[:2]
    for name, value in first.items():
        with ledger.attempt("same bytes", "same threads"):
            assert torch.equal(value, second[name]), name
    with ledger.attempt("same bytes", "same threads"):
        assert captions == again
    audio = first["audio, all at once"]
    assert distance(audio[0], audio[1]) > 1000 * TOLERANCE, "the comparison cannot tell two scenes apart"


def test_other_numbers_of_threads_move_the_last_digits_only(runs, ledger):
    first, captions = runs[0]
    for name in first:
        ledger.measure(f"threads: {name}", max(distance(other[name], first[name]) for other, _ in runs[2:]),
                       WEIGHT_TOLERANCE if "weights" in name else TOLERANCE, "largest difference")
    for _, said in runs[2:]:
        with ledger.attempt("same bytes", "captions of other threads"):
            assert said == captions


@pytest.mark.parametrize("what", ["audio", "text", "bridge"])
def test_other_batch_sizes_move_the_last_digits_only(runs, ledger, what):
    apart = max(distance(found[f"{what}, all at once"], found[f"{what}, one by one"]) for found, _ in runs)
    ledger.measure(f"batch 1 or all: {what}", apart, TOLERANCE, "largest difference")
    with ledger.attempt("same bytes", "captions of other batches"):
        assert all(said["at once"] == said["one by one"] for _, said in runs)
