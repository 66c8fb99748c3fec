"""Two runs at once on one results folder: the second is refused with one line, whatever became of the first."""
from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_pipeline import SETUP, ran, start, toy, wait_for, write_notebook  # noqa: F401

from dl.config import REPO, get_profile
from dl.run import run_stages
from dl.store import RowFile


def test_the_second_is_refused_and_the_lock_dies_with_its_process(toy, capsys, ledger):  # noqa: F811
    first = start(toy)
    try:
        with ledger.attempt("fault", "two runs at once"):
            for _ in range(3):
                assert run_stages(toy) == 2
                error = capsys.readouterr().err
                assert error == f"run_all: another run (process {first.pid}) is writing {toy.results}: wait for it, or stop it first\n"
            assert ran(toy) == "01 02", "the second wrote nothing"
        with ledger.attempt("bad input", "open port"):                      # while a stage runs, its kernel listens on this machine's own address alone
            tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
            listening = [c.laddr.ip for process in tree for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            assert listening and all(ipaddress.ip_address(ip).is_loopback for ip in listening), listening
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=120)
    write_notebook(toy.root / "notebooks/02_second.ipynb", SETUP, "ran('02')\n(out / 'table1.csv').write_text('x')\n(out / 'metrics.csv').write_text('x')")
    with ledger.attempt("fault", "two runs at once"):
        (toy.results / ".lock").write_text("4194304")                       # what stands in it does not matter, only who holds it
        assert run_stages(toy) == 0


def test_another_profile_is_another_folder(toy, ledger):  # noqa: F811
    with ledger.attempt("fault", "two runs at once"), toy.lock():
        other = type(toy)(get_profile("mini", data_dir=toy.profile.data_dir), toy.stages, toy.root)
        assert run_stages(other) == 0 and ran(other) == "01 02"


RACE = """
import sys, time
from pathlib import Path
from dl.config import get_profile
from dl.run import StageError
from dl.run import Run
gate, name = Path(sys.argv[1]), sys.argv[2]
run = Run(get_profile("smoke"))
while not gate.exists():
    time.sleep(0.001)
try:
    with run.lock():
        open(run.results / "held.txt", "a").write(name + " in\\n")
        time.sleep(1)
        open(run.results / "held.txt", "a").write(name + " out\\n")
except StageError as error:
    print(error)
"""


@pytest.mark.parametrize("competitors", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_of_many_that_start_at_once_one_gets_in(tmp_path, results_root, ledger, competitors):
    gate = tmp_path / "gate"
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(gate), str(number)], stdout=subprocess.PIPE, text=True, cwd=REPO)
                 for number in range(competitors)]
    time.sleep(1)
    gate.touch()
    refusals = [process.communicate(timeout=120)[0] for process in processes]
    with ledger.attempt("fault", "two runs at once"):
        lines = (results_root / "smoke/held.txt").read_text().split("\n")[:-1]
        assert [line.split()[1] for line in lines] == ["in", "out"] * (len(lines) // 2), "two were in at once"
        assert sum("another run (process" in refusal and refusal.count("\n") == 1 for refusal in refusals) == competitors - len(lines) // 2
        assert len(lines) < 2 * competitors


WRITER = """
import sys
from dl.store import RowFile
for number in range(40):
    RowFile(sys.argv[1], ("writer", "number", "value"), ("writer", "number")).add([{"writer": sys.argv[2], "number": number, "value": "x" * 2000}])
"""


def test_a_reader_never_meets_half_a_file(tmp_path, ledger):
    """Forty rewrites by another process while this one reads: every read is a whole file, with as many rows as before or more."""
    path = tmp_path / "rows.csv"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "a"], cwd=REPO)
    seen, file = [], RowFile(path, ("writer", "number", "value"), ("writer", "number"))
    with ledger.attempt("fault", "reading while another writes"):
        while process.poll() is None:
            seen.append(len(file.read()))
        assert process.returncode == 0 and seen == sorted(seen) and len(file.read()) == 40 and len(set(seen)) > 5


@pytest.mark.parametrize("alive", [True, False])
def test_left_over_files_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path, ledger, alive):
    path = RowFile(tmp_path / "rows.csv", ("a",), ("a",))
    process = subprocess.Popen(["sleep", "60"])
    if not alive:
        process.kill()
        process.wait()
    left = Path(tmp_path / f".rows.csv.{process.pid}.0123abcd.tmp")
    left.write_text("half a fi")
    with ledger.attempt("fault", "left-over files"):
        path.add([{"a": 1}])
        assert left.exists() == alive and path.read() == [{"a": "1"}]
    process.kill()
    process.wait()
    wait_for(lambda: process.returncode is not None, 10)
