"""``kill -9`` in every kind of stage, at random moments and in the middle of a file: the figures come out equal."""
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

EQUAL = ("captions/*.csv", "table2.*", "claims.*", "cache/embeddings/**/*", "cache/captions/*")      # byte for byte


def figures(root: Path) -> list[dict]:
    """``metrics.csv`` without times."""
    with open(root / "smoke/metrics.csv", newline="", encoding="utf-8") as file:
        return [row | {"wall_s": ""} for row in csv.DictReader(file) if row["metric"] != "ms_per_1000"]


def contents(root: Path) -> dict[Path, bytes]:
    paths = [path for pattern in EQUAL for path in (root / "smoke").glob(pattern) if path.is_file()]
    return {path.relative_to(root): path.read_bytes() for path in paths}


@pytest.mark.parametrize("rounds", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_in_every_stage_ends_with_the_same_figures(tmp_path, ledger, rounds):
    """One round: six kills, each in another stage; each next start goes on, the last one ends."""
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "OMP_NUM_THREADS": "1"}
    chain = [sys.executable, REPO / "tests/reliability/chain.py", tmp_path, str(rounds), str(rounds)]
    done = subprocess.run(chain, capture_output=True, text=True, check=False, cwd=REPO, env=environment, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    kills = report["kills"]
    assert [kill["stage"] for kill in kills] == list(STAGES) * rounds
    missed = [kill for kill in kills if kill["code"] != -9 or (kill["way"] == WAYS[0] and kill["in"] != kill["stage"])]
    assert len(missed) <= rounds, f"too many kills came after the end of their stage: {missed}"
    in_a_file = [kill for kill in kills if kill["way"] != WAYS[0] and kill["code"] == -9]
    assert len(in_a_file) >= 3 * rounds and all(kill["left"] for kill in in_a_file), "no temporary file was left"

    expected, others = figures(tmp_path / "undisturbed"), contents(tmp_path / "undisturbed")
    assert len(expected) > 400 and len(others) >= 10
    for number, end in enumerate(report["rounds"]):
        root = tmp_path / f"round-{number}"
        wrong = [what for what, is_wrong in {
            "the last start failed": end["code"] != 0, "other figures": figures(root) != expected,
            "other files": contents(root) != others, "finished files were made again": end["made again"],
            "temporary files of killed processes are still there": end["left"]}.items() if is_wrong]
        for kill in kills:
            if kill["round"] == number and kill["code"] == -9:
                ledger.add("fault", f"kill -9 in {kill['stage']}", good=not wrong, bad=bool(wrong))
        assert not wrong, (end, done.stderr[-3000:])


def smoke(root: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "dl", "run", "--profile", "smoke"], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=REPO, env=os.environ | {"DL_RESULTS": str(root)},
                            start_new_session=True)


@pytest.mark.slow
def test_the_real_smoke_run_is_killed_in_seven_stages(tmp_path, ledger):
    """The notebooks themselves: killed at a random moment of seven stages, resumed each time."""
    whole = smoke(tmp_path / "undisturbed")
    said = whole.communicate(timeout=3000)[0]
    assert whole.returncode == 0, said[-3000:]
    with open(tmp_path / "undisturbed/smoke/timing.csv", newline="", encoding="utf-8") as file:
        timing = {row["stage"]: row for row in csv.DictReader(file)}
    for stage, row in timing.items():
        peak = float(row["peak_memory_mb"]) / 1000
        ledger.measure(f"peak memory of stage {stage}, profile smoke", peak, 8, "GB")

    rng, root, stages = random.Random(0), tmp_path / "killed", ("02", "04", "05", "06", "07", "08", "10")
    for stage in stages:
        run = smoke(root)
        next(line for line in run.stdout if line.startswith(f"RUN  {stage}"))
        time.sleep(rng.random() * float(timing[stage]["wall_s"]))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate(timeout=120)
    last = smoke(root)
    said = last.communicate(timeout=3000)[0]
    same = last.returncode == 0 and figures(root) == figures(tmp_path / "undisturbed")
    ledger.add("fault", "kill -9 in the real smoke run", good=len(stages) * same, bad=len(stages) * (not same))
    assert same, said[-3000:]
    assert "SKIP 02" in said and "SKIP 04" in said, "finished stages are not repeated"
    assert not list(root.rglob("*.tmp"))
