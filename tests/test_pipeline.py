"""Stages, stamps and runs, on a repository of three tiny notebooks."""
from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dl import run as runner
from dl.__main__ import literal
from dl.config import REPO, get_profile
from dl.run import STAGES, Run, Stage, StageError, parameter_names, run_stages

SETUP = """
import os, time
from pathlib import Path
out = Path(os.environ["DL_RESULTS"]) / profile
out.mkdir(parents=True, exist_ok=True)
def ran(name): open(out / "ran.txt", "a").write(name + " ")
"""
FIRST = """
from dl import toy
ran('01')
(out / 'numbers.csv').write_text(str(toy.VALUE) + Path('data/in.csv').read_text())
"""
SECOND = """
ran('02')
(out / 'table1.csv').write_text((out / 'numbers.csv').read_text()[:1])
(out / 'metrics.csv').write_text('system,value\\nraw,.5\\n')
"""
WAITS = "ran('02')\n(out / 'pid').write_text(str(os.getpid()))\ntime.sleep(600)"
STAGES_3 = (
    Stage("01", "01_first.ipynb", reads=("{data}/**",), makes=("numbers.csv",)),
    Stage("02", "02_second.ipynb", after=("01",), makes=("table1.csv", "metrics.csv")),
    Stage("A1", "A1_apart.ipynb", reads=("{results}/search.csv",), default=False),
)


def write_notebook(path: Path, *code: str, parameters: str | None = "profile = 'mini'", text: str = "A title") -> None:
    from nbformat import v4

    tagged = [v4.new_code_cell(parameters, id="tagged", metadata={"tags": ["parameters"]})] if parameters else []
    cells = [v4.new_code_cell(source, id=f"cell{place}") for place, source in enumerate(code)]
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(text, id="text"), *tagged, *cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(v4.writes(notebook))


@pytest.fixture
def toy(tmp_path, results_root, monkeypatch) -> Run:
    """A repository with two default stages and one apart."""
    monkeypatch.setattr(runner, "find_device", lambda: "cpu")
    root = tmp_path / "repository"
    monkeypatch.setenv("PYTHONPATH", str(root))           # the notebooks' dl, not ours
    for name, text in {"dl/__init__.py": "", "dl/toy.py": "VALUE = 7\n", "data/in.csv": "a\n",
                       "data/sounds/x.opus": "x"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    write_notebook(root / "notebooks/01_first.ipynb", SETUP, FIRST)
    write_notebook(root / "notebooks/02_second.ipynb", SETUP, SECOND)
    write_notebook(root / "notebooks/A1_apart.ipynb", SETUP, "ran('A1')")
    return Run(get_profile("smoke", data_dir=root / "data"), STAGES_3, root)


def ran(run: Run) -> str:
    """The stages that ran since the last question."""
    path = run.results / "ran.txt"
    text = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    return text.strip()


def plan(run: Run) -> list[str | None]:
    run.hashed.clear()
    return [*runner.plan(run, run.chosen()).values()]


def test_second_run_skips_all_and_each_change_has_its_reason(toy, capsys):
    assert plan(toy) == ["it has not run yet"] * 2
    assert run_stages(toy) == 0 and ran(toy) == "01 02"
    assert run_stages(toy) == 0 and ran(toy) == ""
    out = capsys.readouterr().out
    assert "SKIP 01 first: up to date" in out and "0 stages run, 2 up to date" in out

    source, second = toy.root / "notebooks/01_first.ipynb", "stage 01 runs first"
    text = source.read_text()
    for path, content, reasons in (
        (toy.root / "dl/toy.py", "VALUE = 8", [None, None]),
        (toy.root / "data/in.csv", "b\n", ["data/in.csv changed", second]),
        (toy.root / "data/sounds/x.opus", "y", ["data/sounds changed", second]),
        (toy.root / "data/in.csv", None, ["data/in.csv is missing", second]),
        (toy.results / "numbers.csv", None, ["numbers.csv is missing", second]),
        (toy.results / "table1.csv", "edited", [None, "table1.csv changed"]),
        (toy.results / "metrics.csv", "somebody else's rows too", [None, None]),
        (toy.results / "metrics.csv", None, [None, "metrics.csv is missing"]),
        (source, text.replace("ran('01')", "ran('01') "), ["notebooks/01_first.ipynb changed", second]),
        (source, text.replace("A title", "Title"), [None, None]),                       # words decide nothing
    ):
        before = path.read_bytes()
        path.unlink() if content is None else path.write_text(content)
        assert plan(toy) == reasons
        path.write_bytes(before)
    assert plan(toy) == [None, None]
    assert plan(replace(toy, profile=replace(toy.profile, bootstrap_samples=7)))[0] == "profile smoke changed"

    (toy.root / "data/link").symlink_to(toy.root / "data/sounds")             # data behind a link are read too
    (toy.root / "data/sounds/loop").symlink_to(toy.root / "data")             # a loop ends
    assert plan(toy)[0] == "data/link is new"
    for name in ("link", "sounds/loop"):
        (toy.root / "data" / name).unlink()

    write_notebook(source, SETUP, FIRST + "  # other code")
    assert run_stages(toy) == 0 and ran(toy) == "01 02", "02 reads what 01 read"


def test_dry_run_only_from_and_force(toy, capsys):
    assert run_stages(toy, dry_run=True) == 0 and not toy.results.exists()
    reason = "it has not run yet"
    assert capsys.readouterr().out.splitlines()[1:] == [f"RUN  01 first: {reason}", f"RUN  02 second: {reason}"]
    assert toy.chosen() == [*STAGES_3[:2]] and toy.chosen(start="02") == [STAGES_3[1]]
    for force, names in ((False, "A1"), (False, ""), (True, "A1")):
        assert run_stages(toy, only=["A1"], force=force) == 0 and ran(toy) == names


def test_wrong_calls_end_in_one_line(toy, capsys):
    def error(asked: dict | None = None, **options) -> str:
        assert run_stages(replace(toy, asked=asked or {}), **options) == 2
        return capsys.readouterr().err

    assert error(only=["07"]) == "run_all: unknown stage '07': choose one of 01 02 A1\n"
    taken = "run_all: none of these stages takes the parameter "
    assert error({"seeds": 2}) == f"{taken}'seeds': leave --seeds out\n"
    assert error({"depth": 3}) == f"{taken}'depth': leave -p depth out\n"
    assert error({"profile": "mini"}) == "run_all: choose the profile by --profile, not by -p\n"
    for path in (toy.root / "notebooks").iterdir():
        path.unlink()
    assert error(only=["A1"]) == "run_all: notebooks/A1_apart.ipynb is not part of this version\n"
    assert error() == "run_all: there is no notebook to run in notebooks/\n"


def test_a_stage_may_write_a_file_that_it_reads(toy):
    write = "ran('A1')\nimport random\n(out / 'search.csv').write_text(str(random.random()))"
    write_notebook(toy.root / "notebooks/A1_apart.ipynb", SETUP, write)
    assert run_stages(toy, only=["A1"]) == 0 and toy.reason(STAGES_3[2]) is None
    (toy.results / "search.csv").write_text("edited")
    toy.hashed.clear()
    assert toy.reason(STAGES_3[2]) == f"{toy.results / 'search.csv'} changed"


def test_parameters_reach_the_notebooks_that_declare_them(toy):
    got = "(out / 'got.txt').write_text(f'{profile} {full} {seeds}')"
    write_notebook(toy.root / "notebooks/A1_apart.ipynb", SETUP, got,
                   parameters="profile = 'mini'\nfull = False\nseeds = None")
    asked = replace(toy, asked={"full": True, "seeds": 2})
    assert run_stages(asked, only=["A1"]) == 0 and (toy.results / "got.txt").read_text() == "smoke True 2"
    assert toy.reason(STAGES_3[2]) == "parameters changed" and asked.reason(STAGES_3[2]) is None
    assert asked.parameters(STAGES_3[0]) == {"profile": "smoke"}


@pytest.mark.parametrize("text, value", [("1", 1), ("False", False), ("1e-3", 1e-3), ("cosine", "cosine")])
def test_values_of_parameters_are_read_as_python_writes_them(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


@pytest.mark.parametrize("parameters", [None, "profil = 'mini'"])
def test_papermill_may_not_guess(tmp_path, parameters):
    write_notebook(tmp_path / "x.ipynb", "1", parameters=parameters)
    with pytest.raises(StageError, match="one cell tagged 'parameters' must set 'profile'"):
        parameter_names(tmp_path / "x.ipynb")


def test_records_and_last_screen(toy, capsys):
    assert run_stages(toy) == 0
    with open(toy.results / "timing.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["device"]) for row in rows] == [("01", "cpu"), ("02", "cpu")]
    assert all(float(row["wall_s"]) > 0 and 10 < float(row["peak_memory_mb"]) < 4000 for row in rows)
    record = json.loads((toy.results / "provenance.json").read_text())
    assert set(record["stages"]) == {"01", "02"} and record["inputs"]["data/in.csv"]["n_files"] == 1
    assert (toy.results / "notebooks/01_first.ipynb").is_file()
    assert not [path for path in toy.results.rglob(".*") if path.name != ".lock"]
    out = capsys.readouterr().out
    assert "2 stages run, 0 up to date" in out and "metrics.csv, timing.csv, provenance.json; 0 figures" in out


def test_a_failing_notebook_says_where_and_the_run_goes_on_there(toy, capsys):
    path, failed = (toy.root / "notebooks/02_second.ipynb"), toy.results / "notebooks/02_second.failed.ipynb"
    write_notebook(path, SETUP, "ran('02')\nraise ValueError('the gap is too wide')")
    assert run_stages(toy) == 1
    error = capsys.readouterr().err
    for words in ("stage 02 failed in cell [4] of 02_second.ipynb", "ValueError: the gap is too wide", "--only 02"):
        assert words in error
    assert str(failed) in error and failed.is_file() and not (toy.results / "notebooks/02_second.ipynb").exists()
    write_notebook(path, SETUP, SECOND)
    assert ran(toy) == "01 02"
    assert run_stages(toy) == 0 and ran(toy) == "02" and not failed.exists()


@pytest.mark.parametrize("code, words", [
    ("ran('01')", "01_first.ipynb ended without"), ("os.kill(os.getpid(), 9)", "stage 01: the kernel died"),
])
def test_a_stage_that_makes_nothing_is_an_error(toy, capsys, code, words):
    write_notebook(toy.root / "notebooks/01_first.ipynb", SETUP, code)
    assert run_stages(toy) == 1 and words in capsys.readouterr().err
    assert toy.reason(STAGES_3[0]) == "it has not run yet"


@pytest.mark.parametrize("error", [RuntimeError("Kernel didn't respond in 600 seconds"), KeyError("No such kernel")])
def test_a_kernel_that_does_not_start_is_an_error(toy, capsys, monkeypatch, error):
    import papermill

    def slow(*_, start_timeout, **__):
        assert start_timeout >= 300
        raise error
    monkeypatch.setattr(papermill, "execute_notebook", slow)
    assert run_stages(toy) == 1
    said = capsys.readouterr().err
    assert said.startswith("run_all: stage 01: the kernel died") and said.count("\n") == 1
    assert "did not start (" in said and "goes on from here" in said


def start(run: Run) -> subprocess.Popen:
    """The same run in a process of its own, waiting in stage 02 until it is stopped."""
    write_notebook(run.root / "notebooks/02_second.ipynb", SETUP, WAITS, SECOND)
    code = (f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
            "from pathlib import Path; from test_pipeline import *\n"
            f"runner.find_device = lambda: 'cpu'\nroot = Path({str(run.root)!r})\n"
            "raise SystemExit(run_stages(Run(get_profile('smoke', data_dir=root / 'data'), STAGES_3, root)))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        wait_for(lambda: (run.results / "pid").exists() or process.poll() is not None, 300)    # a busy machine is slow
        assert process.poll() is None, process.stderr.read()
    except BaseException:
        process.kill()
        raise
    return process


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_run_leaves_nothing_behind_and_goes_on(toy, number, code):
    process = start(toy)
    kernel = psutil.Process(int((toy.results / "pid").read_text()))
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    if number != signal.SIGKILL:
        assert re.fullmatch(r"\s*run_all: stopped in stage 02 after .* goes on from there\n", error), error
        assert not [path for path in toy.results.rglob(".*") if path.name != ".lock"]
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 60)
    assert ran(toy) == "01 02"
    write_notebook(toy.root / "notebooks/02_second.ipynb", SETUP, SECOND)
    assert run_stages(toy) == 0                                          # the lock fell with its process
    assert ran(toy) == "02"                                              # and stage 01 is not repeated


def test_an_edit_of_dl_is_said_and_a_recipe_decides(toy, capsys):
    module = toy.root / "dl/toy.py"
    assert run_stages(toy) == 0
    tables = replace(STAGES_3[0], lays_out=True)
    before = toy.parts(tables)["dl"]
    module.write_text("VALUE = 7  # a comment\n")
    capsys.readouterr()
    assert run_stages(toy) == 0
    assert "SKIP 01 first: up to date; dl has changed since 01 ran (--force runs it " in capsys.readouterr().out
    assert toy.parts(tables)["dl"] != before, "tables are laid out anew after every edit"
    module.write_text("VALUE = 7\nTOY_RECIPE = 1\n")
    assert toy.reason(STAGES_3[0]) == "TOY_RECIPE is new"
    assert run_stages(toy) == 0
    module.write_text("VALUE = 7\nTOY_RECIPE = 2\n")
    assert toy.reason(STAGES_3[0]) == "TOY_RECIPE changed"


def test_the_table_of_stages():
    numbers = [stage.number for stage in STAGES]
    assert numbers == [f"{place:02d}" for place in range(12)] + ["A1", "A2", "A3"]
    for place, stage in enumerate(STAGES):
        assert stage.notebook.startswith(f"{stage.number}_") and set(stage.after) <= set(numbers[:place])
        assert stage.default == (not stage.number.startswith("A"))
    assert {path.name for path in (REPO / "notebooks").glob("*.ipynb")} <= {stage.notebook for stage in STAGES}
    promised = [pattern for stage in STAGES for pattern in stage.makes if pattern != "metrics.csv"]
    assert len(promised) == len(set(promised)), "a file belongs to one stage"
