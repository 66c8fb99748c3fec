"""Two runs at once on one results folder: the second is refused with one line, whatever became of the first."""
from __future__ import annotations

import ipaddress
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from test_pipeline import SETUP, ran, start, write_notebook

from dl.config import REPO, get_profile
from dl.run import run_stages
from dl.store import RowFile


def test_the_second_is_refused_and_the_lock_dies_with_its_process(toy, capsys, ledger):
    first = start(toy)
    try:
        with ledger.attempt("fault", "two runs at once"):
            for _ in range(3):
                assert run_stages(toy) == 2
                error = f"run_all: another run (process {first.pid}) is writing {toy.results}: wait for it, or stop it"
                assert capsys.readouterr().err == f"{error} first\n"
            assert ran(toy) == "01 02", "the second wrote nothing"
        with ledger.attempt("bad input", "open port"):      # a stage's kernel listens on this machine's own address
            tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
            listening = [connection.laddr.ip for process in tree for connection in process.net_connections("inet")
                         if connection.status == psutil.CONN_LISTEN]
            assert listening and all(ipaddress.ip_address(ip).is_loopback for ip in listening), listening
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.communicate(timeout=120)
    write_notebook(toy.root / "notebooks/02_second.ipynb", SETUP,
                   "ran('02')\n(out / 'table1.csv').write_text('x')\n(out / 'metrics.csv').write_text('x')")
    with ledger.attempt("fault", "two runs at once"):
        (toy.results / ".lock").write_text("4194304")           # what stands in it does not matter, only who holds it
        assert run_stages(toy) == 0


def test_another_profile_is_another_folder(toy, ledger):
    with ledger.attempt("fault", "two runs at once"), toy.lock():
        other = type(toy)(get_profile("mini", data_dir=toy.profile.data_dir), toy.stages, toy.root)
        assert run_stages(other) == 0 and ran(other) == "01 02"


RACE = """
import sys, time
from pathlib import Path
from dl.config import get_profile
from dl.run import Run, StageError
run = Run(get_profile("smoke"))
while not Path(sys.argv[1]).exists():
    time.sleep(0.001)
try:
    with run.lock(), open(run.results / "held.txt", "a", buffering=1) as held:
        held.write("in\\n")
        time.sleep(1)
        held.write("out\\n")
except StageError as error:
    print(error)
"""


@pytest.mark.parametrize("competitors", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_of_many_that_start_at_once_one_gets_in(tmp_path, results_root, ledger, competitors):
    gate = tmp_path / "gate"
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(gate)], stdout=subprocess.PIPE, text=True, cwd=REPO)
                 for _ in range(competitors)]
    time.sleep(1)
    gate.touch()
    refusals = [process.communicate(timeout=120)[0] for process in processes]
    with ledger.attempt("fault", "two runs at once"):
        lines = (results_root / "smoke/held.txt").read_text().split()
        got_in = len(lines) // 2
        assert lines == ["in", "out"] * got_in, "two were in at once"
        refused = sum("another run (process" in text and text.count("\n") == 1 for text in refusals)
        assert 0 < refused == competitors - got_in


WRITER = """
import sys
from dl.store import RowFile
for number in range(40):
    RowFile(sys.argv[1], ("number", "value"), ("number",)).add([{"number": number, "value": "x" * 2000}])
"""


def test_a_reader_never_meets_half_a_file(tmp_path, ledger):
    """Forty rewrites by another process while this one reads: every read is a whole file, never a shorter one."""
    file = RowFile(tmp_path / "rows.csv", ("number", "value"), ("number",))
    process, seen = subprocess.Popen([sys.executable, "-c", WRITER, str(file.path)], cwd=REPO), []
    with ledger.attempt("fault", "reading while another writes"):
        while process.poll() is None:
            seen.append(len(file.read()))
        assert process.returncode == 0 and seen == sorted(seen) and len(file.read()) == 40 and len(set(seen)) > 5


@pytest.mark.parametrize("alive", [True, False])
def test_left_over_files_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path, ledger, alive):
    file = RowFile(tmp_path / "rows.csv", ("a",), ("a",))
    with subprocess.Popen(["sleep", "60"]) as process:
        if not alive:
            process.kill()
            process.wait()
        left = tmp_path / f".rows.csv.{process.pid}.0123abcd.tmp"
        left.write_text("half a fi")
        with ledger.attempt("fault", "left-over files"):
            file.add([{"a": 1}])
            assert left.exists() == alive and file.read() == [{"a": "1"}]
        process.kill()
