"""``kill -9`` in every kind of stage, at random moments and in the middle of a file: what was finished stays, and the figures come out equal."""
from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chain import STAGES, WAYS

from dl.config import REPO

TIMES = {"wall_s"}                       # columns that hold a time
TIMED = {"ms_per_1000"}                  # metrics that are one


def figures(folder: Path) -> list[tuple]:
    """``metrics.csv`` without times."""
    with open(folder / "smoke/metrics.csv", newline="", encoding="utf-8") as file:
        return [tuple((name, cell) for name, cell in row.items() if name not in TIMES) for row in csv.DictReader(file) if row["metric"] not in TIMED]


def contents(folder: Path) -> dict[str, bytes]:
    """Every other file that must come out equal, byte for byte."""
    root = folder / "smoke"
    patterns = ("captions/*.csv", "table2.*", "claims.*", "cache/embeddings/**/*", "cache/captions/*")
    paths = [path for pattern in patterns for path in root.glob(pattern) if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_figures(tmp_path, ledger, rounds):
    """One round: six kills, each in another stage, resumed five times; the last start ends. 1 round fast, 6 more slow."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, REPO / "tests/reliability/chain.py", tmp_path, str(rounds), str(rounds)], capture_output=True, text=True,
                          check=False, cwd=REPO, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    kills = report["kills"]
    assert [kill["stage"] for kill in kills] == list(STAGES) * rounds
    missed = [kill for kill in kills if kill["code"] != -9 or (kill["way"] == WAYS[0] and kill["in"] != kill["stage"])]
    assert len(missed) <= rounds, f"too many kills came after the end of their stage: {missed}"
    in_a_file = [kill for kill in kills if kill["way"] != WAYS[0] and kill["code"] == -9]
    assert len(in_a_file) >= 3 * rounds and all(kill["left"] for kill in in_a_file), "a kill in a write leaves a temporary file"

    expected, others = figures(tmp_path / "undisturbed"), contents(tmp_path / "undisturbed")
    assert len(expected) > 400 and len(others) >= 10
    for number, end in enumerate(report["rounds"]):
        root = tmp_path / f"round-{number}"
        same = end["code"] == 0 and figures(root) == expected and contents(root) == others and not end["made again"] and not end["left"]
        for kill in kills:
            if kill["round"] == number and kill["code"] == -9:
                ledger.add("fault", f"kill -9 in {kill['stage']}", good=same, bad=not same)
        assert end["code"] == 0, done.stderr[-3000:]
        assert figures(root) == expected
        assert contents(root) == others
        assert end["made again"] == [], "what was finished was made again"
        assert end["left"] == [], "temporary files of killed processes are removed by the next write"


def smoke(root: Path) -> subprocess.Popen:
    """``./run_all.sh --profile smoke`` with its results in a folder of their own."""
    return subprocess.Popen([sys.executable, "-m", "dl", "run", "--profile", "smoke"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO,
                            env=os.environ | {"DL_RESULTS": str(root)}, start_new_session=True)


@pytest.mark.slow
def test_the_real_smoke_run_is_killed_in_seven_stages(tmp_path, ledger):
    """The notebooks themselves, the real encoder and language model: killed at a random moment of seven stages, resumed each time."""
    whole = smoke(tmp_path / "undisturbed")
    said = whole.communicate(timeout=3000)[0]
    assert whole.returncode == 0, said[-3000:]
    with open(tmp_path / "undisturbed/smoke/timing.csv", newline="", encoding="utf-8") as file:
        timing = list(csv.DictReader(file))
    seconds = {row["stage"]: float(row["wall_s"]) for row in timing}
    for row in timing:
        ledger.measure(f"peak memory of stage {row['stage']}, profile smoke", float(row["peak_memory_mb"]) / 1000, 8, "GB")

    rng, killed, root = random.Random(0), [], tmp_path / "killed"
    for stage in ("02", "04", "05", "06", "07", "08", "10"):
        run = smoke(root)
        for line in run.stdout:
            if line.startswith(f"RUN  {stage}"):
                break
        time.sleep(rng.random() * seconds[stage])
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate(timeout=120)
        killed.append(stage)
    last = smoke(root)
    said = last.communicate(timeout=3000)[0]
    same = last.returncode == 0 and figures(root) == figures(tmp_path / "undisturbed")
    ledger.add("fault", "kill -9 in the real smoke run", good=len(killed) * same, bad=len(killed) * (not same))
    assert last.returncode == 0, said[-3000:]
    assert figures(root) == figures(tmp_path / "undisturbed")
    assert "SKIP 02" in said and "SKIP 04" in said, "finished stages are not repeated"
    assert not list(root.rglob("*.tmp"))
