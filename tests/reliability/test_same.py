"""The same seed on the same machine gives the same bytes; other thread counts and batch sizes move figures by the last digits only."""
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
WEIGHT_TOLERANCE = 1e-3     # of a trained weight: AdamW divides a small gradient by its own size, so a last digit can grow to a step


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> list[tuple[int, dict, dict]]:
    """(threads, tensors, captions) of two runs with two threads and one with one; with ``--slow`` four and three threads too."""
    folder, threads = tmp_path_factory.mktemp("same"), [2, 2, 1, *([4, 3] if request.config.getoption("--slow") else [])]
    done = subprocess.run([sys.executable, REPO / "tests/reliability/same.py", folder, *map(str, threads)], capture_output=True, text=True, check=False,
                          cwd=REPO, timeout=1800, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]),
                                                                  "OMP_WAIT_POLICY": "passive"})      # threads that wait do not take the machine
    assert done.returncode == 0, done.stderr[-3000:]
    return [(count, load_file(folder / f"{place}.safetensors"), json.loads((folder / f"{place}.json").read_text())) for place, count in enumerate(threads)]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative where a value is above 1."""
    return float(((ours - theirs).abs() / theirs.abs().clamp_min(1)).max())


def test_the_same_seed_gives_the_same_bytes(runs, ledger):
    (_, first, captions), (_, second, again) = runs[:2]
    for name, value in first.items():
        with ledger.attempt("same bytes", "same threads"):
            assert torch.equal(value, second[name]), name
    with ledger.attempt("same bytes", "same threads"):
        assert captions == again


def test_other_numbers_of_threads_move_the_last_digits_only(runs, ledger):
    _, first, captions = runs[0]
    for name in first:
        ledger.measure(f"threads: {name}", max(distance(other[name], first[name]) for _, other, _ in runs[2:]),
                       WEIGHT_TOLERANCE if "weights" in name else TOLERANCE, "largest difference")
    for threads, _, said in runs[2:]:
        with ledger.attempt("same bytes", "captions of other threads"):
            assert said == captions, threads


@pytest.mark.parametrize("what", ["audio", "text", "bridge"])
def test_other_batch_sizes_move_the_last_digits_only(runs, ledger, what):
    ledger.measure(f"batch 1 or all: {what}", max(distance(run[f"{what}, all at once"], run[f"{what}, one by one"]) for _, run, _ in runs),
                   TOLERANCE, "largest difference")
    with ledger.attempt("same bytes", "captions of other batches"):
        assert all(said["at once"] == said["one by one"] for _, _, said in runs)


def test_other_seeds_give_other_bytes(runs):
    """The comparison can tell runs apart: two of the scenes are not taken for each other."""
    audio = runs[0][1]["audio, all at once"]
    assert distance(audio[0], audio[1]) > 1000 * TOLERANCE
