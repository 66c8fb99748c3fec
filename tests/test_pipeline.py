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
from dl.run import STAGES, Run, Stage, StageError, parameter_names, recipes, run_stages, seconds_text

SETUP = """
import os, time
from pathlib import Path
out = Path(os.environ["DL_RESULTS"]) / profile
out.mkdir(parents=True, exist_ok=True)
def ran(name): open(out / "ran.txt", "a").write(name + " ")
"""
FIRST = "from dl import toy\nran('01')\n(out / 'numbers.csv').write_text(str(toy.VALUE) + Path('data/in.csv').read_text())"
SECOND = """
ran('02')
(out / 'table1.csv').write_text('system,pair_cosine,unknown\\nraw,' + (out / 'numbers.csv').read_text()[:1] + ',2\\nother,3,4\\n')
head = 'experiment,system,split,metric,seed,noise_seed,space,decoding,dataset,value\\n'
(out / 'metrics.csv').write_text(head + 'gap,raw,test,rmg,0,0,text,,toy,.5\\n')
"""
STAGES_3 = (
    Stage("01", "01_first.ipynb", reads=("{data}/**",), makes=("numbers.csv",)),
    Stage("02", "02_second.ipynb", after=("01",), makes=("table1.csv", "metrics.csv")),
    Stage("A1", "A1_apart.ipynb", reads=("{results}/search.csv",), default=False),
)


def write_notebook(path: Path, *code: str, parameters: str | None = "profile = 'mini'", text: str = "# A title") -> None:
    cells = [{"cell_type": "markdown", "id": "text", "metadata": {}, "source": [text]}]
    if parameters is not None:
        cells.append({"cell_type": "code", "id": "parameters", "metadata": {"tags": ["parameters"]}, "source": [parameters],
                      "outputs": [], "execution_count": None})
    cells += [{"cell_type": "code", "id": f"cell{place}", "metadata": {}, "source": source.splitlines(keepends=True), "outputs": [],
               "execution_count": None} for place, source in enumerate(code)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def toy(tmp_path, results_root, monkeypatch) -> Run:
    """A repository with two default stages and one apart."""
    monkeypatch.setattr(runner, "find_device", lambda: "cpu")
    root = tmp_path / "repository"
    monkeypatch.setenv("PYTHONPATH", str(root))           # the notebooks' dl, not ours
    for folder in ("dl", "data/sounds", "notebooks"):
        (root / folder).mkdir(parents=True)
    (root / "dl/__init__.py").touch()
    (root / "dl/toy.py").write_text("from dl.below import VALUE\n")
    (root / "dl/below.py").write_text("VALUE = 7\n")
    (root / "dl/apart.py").touch()
    (root / "data/in.csv").write_text("a\n")
    (root / "data/sounds/x.opus").write_text("x")
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


def plan(run: Run) -> dict[str, str | None]:
    run.forget_files()
    return runner.plan(run, run.chosen())


# ------------------------------------------------------------------------------------------------------ what has to run
def test_second_run_skips_all_and_each_change_has_its_reason(toy, capsys):
    assert plan(toy) == {"01": "it has not run yet", "02": "it has not run yet"}
    assert run_stages(toy) == 0
    assert ran(toy) == "01 02"
    assert run_stages(toy) == 0
    assert ran(toy) == ""
    out = capsys.readouterr().out
    assert "SKIP 01 first: up to date" in out
    assert "0 stages run, 2 up to date" in out

    notebooks, where = toy.root / "notebooks", toy.results
    undo = {path: path.read_bytes() for path in [*toy.root.rglob("*.*"), *where.glob("*.csv")] if path.is_file()}

    def after(path: Path, content: str | None) -> dict[str, str | None]:
        path.unlink() if content is None else path.write_text(content)
        reasons = plan(toy)
        path.write_bytes(undo[path])
        return reasons

    first = {"02": "stage 01 runs first"}
    assert after(toy.root / "dl/below.py", "VALUE = 8") == {"01": None, "02": None}
    assert after(toy.root / "dl/apart.py", "VALUE = 8") == {"01": None, "02": None}
    assert after(toy.root / "data/in.csv", "b\n") == {"01": "data/in.csv changed"} | first
    assert after(toy.root / "data/sounds/x.opus", "y") == {"01": "data/sounds changed"} | first
    assert after(toy.root / "data/in.csv", None) == {"01": "data/in.csv is no longer read"} | first
    numbers, table, metrics = (where / name for name in ("numbers.csv", "table1.csv", "metrics.csv"))
    assert after(numbers, None) == {"01": f"{numbers} is missing"} | first
    assert after(table, "edited") == {"01": None, "02": f"{table} differs from what was written"}
    assert after(metrics, metrics.read_text().splitlines()[0]) == {"01": None, "02": f"1 of its rows are missing in {metrics}"}
    assert after(metrics, metrics.read_text() + "gap,ridge,test,rmg,0,0,text,,toy,.4\n") == {"01": None, "02": None}     # somebody else's row
    source = notebooks / "01_first.ipynb"
    assert after(source, source.read_text().replace("ran('01')", "ran('01') ")) == {"01": "notebooks/01_first.ipynb changed"} | first
    assert after(source, source.read_text().replace("A title", "Title")) == {"01": None, "02": None}        # words decide nothing
    assert plan(toy) == {"01": None, "02": None}
    longer = Run(get_profile("smoke", data_dir=toy.profile.data_dir, bootstrap_samples=7), STAGES_3, toy.root)
    assert plan(longer)["01"] == "profile smoke changed"

    (toy.root / "data/link").symlink_to(toy.root / "data/sounds")         # data behind a link are read too; a loop is entered once
    (toy.root / "data/sounds/loop").symlink_to(toy.root / "data")
    assert plan(toy)["01"] == "data/link is new"
    for name in ("link", "sounds/loop"):
        (toy.root / "data" / name).unlink()

    write_notebook(source, SETUP, FIRST + "  # other code")
    assert run_stages(toy) == 0
    assert ran(toy) == "01 02", "02 reads what 01 read"


def test_dry_run_runs_nothing(toy, capsys):
    assert run_stages(toy, dry_run=True) == 0
    assert not toy.results.exists()
    assert capsys.readouterr().out.splitlines()[1:] == ["RUN  01 first: it has not run yet", "RUN  02 second: it has not run yet"]


def test_only_from_and_force(toy):
    assert [stage.number for stage in toy.chosen()] == ["01", "02"]
    assert [stage.number for stage in toy.chosen(only=["A1"])] == ["A1"]
    assert [stage.number for stage in toy.chosen(start="02")] == ["02"]
    assert run_stages(toy, only=["A1"]) == 0
    assert run_stages(toy, only=["A1"]) == 0
    assert ran(toy) == "A1"
    assert run_stages(toy, only=["A1"], force=True) == 0
    assert ran(toy) == "A1"


def test_wrong_calls_end_in_one_line(toy, capsys):
    assert run_stages(toy, only=["07"]) == 2
    assert run_stages(Run(toy.profile, STAGES_3, toy.root, seeds=2)) == 2
    (toy.root / "notebooks/A1_apart.ipynb").unlink()
    assert run_stages(toy, only=["A1"]) == 2
    for name in ("01_first", "02_second"):
        (toy.root / f"notebooks/{name}.ipynb").unlink()
    assert run_stages(toy) == 2
    assert capsys.readouterr().err.splitlines() == [
        "run_all: unknown stage '07': choose one of 01 02 A1", "run_all: none of these stages takes the parameter 'seeds': leave --seeds out",
        "run_all: notebooks/A1_apart.ipynb is not part of this version", "run_all: there is no notebook to run in notebooks/"]


def test_a_stage_may_write_a_file_that_it_reads(toy):
    write_notebook(toy.root / "notebooks/A1_apart.ipynb", SETUP, "ran('A1')\nimport random\n(out / 'search.csv').write_text(str(random.random()))")
    assert run_stages(toy, only=["A1"]) == 0
    assert toy.reason(STAGES_3[2]) is None
    (toy.results / "search.csv").write_text("edited")
    toy.forget_files()
    assert toy.reason(STAGES_3[2]) == f"{toy.results / 'search.csv'} changed"


# -------------------------------------------------------------------------------------------------------------- parameters
def test_parameters_reach_the_notebooks_that_declare_them(toy, capsys):
    path = toy.root / "notebooks/A1_apart.ipynb"
    write_notebook(path, SETUP, "(out / 'got.txt').write_text(f'{profile} {full} {seeds}')", parameters="profile = 'mini'\nfull = False\nseeds = None")
    asked = Run(toy.profile, STAGES_3, toy.root, full=True, seeds=2)
    assert run_stages(asked, only=["A1"]) == 0
    assert (toy.results / "got.txt").read_text() == "smoke True 2"
    assert toy.reason(STAGES_3[2]) == "parameters changed"
    assert asked.reason(STAGES_3[2]) is None
    assert asked.parameters(STAGES_3[0]) == {"profile": "smoke"}
    by_name = Run(toy.profile, STAGES_3, toy.root, extra={"full": True, "seeds": 2})          # -p full True -p seeds 2
    assert by_name.reason(STAGES_3[2]) is None
    for extra, message in (({"depth": 3}, "takes the parameter 'depth': leave -p depth out"), ({"profile": "mini"}, "by --profile")):
        assert run_stages(Run(toy.profile, STAGES_3, toy.root, extra=extra), only=["A1"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("text, value", [("1", 1), ("False", False), ("1e-3", 1e-3), ("cosine", "cosine"), ("a/b c", "a/b c")])
def test_values_of_parameters_are_read_as_python_writes_them(text, value):
    assert literal(text) == value and type(literal(text)) is type(value)


@pytest.mark.parametrize("parameters, message", [(None, "0 cells tagged 'parameters'"), ("profil = 'mini'", "does not set 'profile'")])
def test_papermill_may_not_guess(tmp_path, parameters, message):
    write_notebook(tmp_path / "x.ipynb", "1", parameters=parameters)
    with pytest.raises(StageError, match=message):
        parameter_names(tmp_path / "x.ipynb")


# ---------------------------------------------------------------------------------------------------------- what can happen
def test_records_and_last_screen(toy, capsys):
    assert run_stages(toy) == 0
    with open(toy.results / "timing.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["device"]) for row in rows] == [("01", "cpu"), ("02", "cpu")]
    assert all(float(row["wall_s"]) > 0 and 10 < float(row["peak_memory_mb"]) < 4000 for row in rows)
    record = json.loads((toy.results / "provenance.json").read_text())
    assert set(record["stages"]) == {"01", "02"}
    assert record["inputs"]["data/in.csv"]["n_files"] == 1
    assert (toy.results / "notebooks/01_first.ipynb").is_file()
    assert not [path for path in toy.results.rglob(".*") if path.name != ".lock"]
    out = capsys.readouterr().out
    assert "2 stages run, 0 up to date" in out and "metrics.csv, timing.csv, provenance.json; 0 figures" in out


def test_a_failing_notebook_says_where_and_the_run_goes_on_there(toy, capsys):
    path = toy.root / "notebooks/02_second.ipynb"
    write_notebook(path, SETUP, "ran('02')\nraise ValueError('the gap is too wide')")
    assert run_stages(toy) == 1
    error = capsys.readouterr().err
    assert "stage 02 failed in cell [4] of 02_second.ipynb" in error
    assert "ValueError: the gap is too wide" in error
    assert "--only 02" in error
    failed = toy.results / "notebooks/02_second.failed.ipynb"
    assert str(failed) in error
    assert failed.is_file()
    assert not (toy.results / "notebooks/02_second.ipynb").exists()
    write_notebook(path, SETUP, SECOND)
    ran(toy)
    assert run_stages(toy) == 0
    assert ran(toy) == "02"
    assert not failed.exists()


def test_a_promised_file_that_is_not_made_is_an_error(toy, capsys):
    write_notebook(toy.root / "notebooks/01_first.ipynb", SETUP, "ran('01')")
    assert run_stages(toy) == 1
    assert "01_first.ipynb ended without" in capsys.readouterr().err
    assert toy.reason(STAGES_3[0]) == "it has not run yet"


def test_a_kernel_that_dies_is_an_error(toy, capsys):
    write_notebook(toy.root / "notebooks/01_first.ipynb", SETUP, "os.kill(os.getpid(), 9)")
    assert run_stages(toy) == 1
    assert "the kernel died" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("Kernel didn't respond in 600 seconds"), KeyError("No such kernel named python3")])
def test_a_kernel_that_does_not_start_is_an_error(toy, capsys, monkeypatch, error):
    import papermill

    def slow(*_, start_timeout, **__):
        assert start_timeout >= 300
        raise error
    monkeypatch.setattr(papermill, "execute_notebook", slow)
    assert run_stages(toy) == 1
    said = capsys.readouterr().err
    assert said.startswith("run_all: stage 01: the kernel did not start (") and said.count("\n") == 1 and "goes on from here" in said


def start(run: Run) -> subprocess.Popen:
    """The same run in a process of its own, waiting in stage 02 until it is stopped."""
    write_notebook(run.root / "notebooks/02_second.ipynb", SETUP, "ran('02')\n(out / 'pid').write_text(str(os.getpid()))\ntime.sleep(600)", SECOND)
    code = (f"import sys; sys.path[:0] = [{str(REPO)!r}, {str(REPO / 'tests')!r}]\n"
            "from pathlib import Path; from test_pipeline import *\n"
            f"runner.find_device = lambda: 'cpu'\nroot = Path({str(run.root)!r})\n"
            "raise SystemExit(run_stages(Run(get_profile('smoke', data_dir=root / 'data'), STAGES_3, root)))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: (run.results / "pid").exists() or process.poll() is not None, 300)      # a busy machine takes long
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
def test_a_stopped_run_leaves_nothing_behind_and_goes_on(toy, number, code, capsys):
    process = start(toy)
    kernel = psutil.Process(int((toy.results / "pid").read_text()))
    assert run_stages(toy) == 2                                            # meanwhile nobody else may write there
    assert f"another run (process {process.pid}) is writing" in capsys.readouterr().err
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    if number != signal.SIGKILL:
        assert re.fullmatch(r"\s*run_all: stopped in stage 02 after .* goes on from there\n", error), error
        assert not [path for path in toy.results.rglob(".*") if path.name != ".lock"]
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, 60)
    assert ran(toy) == "01 02"
    write_notebook(toy.root / "notebooks/02_second.ipynb", SETUP, SECOND)
    assert run_stages(toy) == 0                                            # the lock fell with its process
    assert ran(toy) == "02"                                                # and stage 01 is not repeated


# --------------------------------------------------------------------------------------------------------------- recipes
def test_an_edit_of_dl_is_said_and_a_recipe_decides(toy, capsys):
    module = toy.root / "dl/toy.py"
    assert run_stages(toy) == 0
    module.write_text(module.read_text() + "# a comment\n")
    capsys.readouterr()
    assert run_stages(toy) == 0
    assert "SKIP 01 first: up to date; dl has changed since 01 ran (--force runs it again)" in capsys.readouterr().out
    module.write_text(module.read_text() + "TOY_RECIPE = 1\n")
    assert toy.reason(toy.stages[0]) == "TOY_RECIPE is new"
    assert run_stages(toy) == 0
    module.write_text(module.read_text().replace("RECIPE = 1", "RECIPE = 2"))
    assert toy.reason(toy.stages[0]) == "TOY_RECIPE changed"


def test_a_stage_that_lays_out_runs_after_every_edit(toy):
    stage = replace(toy.stages[0], lays_out=True)
    before = toy.parts(stage)["dl"]
    (toy.root / "dl/toy.py").write_text("VALUE = 1  # another comment\n")
    assert toy.parts(stage)["dl"] != before


def test_the_recipes_of_dl():
    assert {"BRIDGE_RECIPE", "PEERS_RECIPE", "DECODER_RECIPE"} <= set(recipes(REPO / "dl"))


# -------------------------------------------------------------------------------------------------------------- real stages
def test_the_table_of_stages():
    numbers = [stage.number for stage in STAGES]
    assert numbers == [f"{place:02d}" for place in range(12)] + ["A1", "A2", "A3"]
    for place, stage in enumerate(STAGES):
        assert stage.notebook.startswith(f"{stage.number}_")
        assert set(stage.after) <= set(numbers[:place])
        assert stage.default == (not stage.number.startswith("A"))
    known = {stage.notebook for stage in STAGES}
    assert {path.name for path in (REPO / "notebooks").glob("*.ipynb")} <= known
    promised = [pattern for stage in STAGES for pattern in stage.makes if pattern != "metrics.csv"]
    assert len(promised) == len(set(promised)), "a file belongs to one stage"


def test_the_key_of_metrics_is_that_of_results(toy):
    from dl.store import METRIC_KEY

    toy.results.mkdir(parents=True)
    (toy.results / "metrics.csv").write_text(",".join(METRIC_KEY) + ",value\n" + ",".join(METRIC_KEY) + ",1\n")
    assert list(toy.metric_rows()) == ["|".join(METRIC_KEY)]


def test_deciding_takes_seconds(results_root):
    """A second run of the real stages hashes data/mini and nothing more."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "dl", "run", "--list"], cwd=REPO, check=True, capture_output=True)
    run = Run(get_profile("mini"))
    for stage in STAGES:
        for pattern in stage.reads:
            run.read_files(pattern)
    assert time.monotonic() - began < 10


def test_seconds_text():
    assert [seconds_text(value) for value in (6.6, 184, 7500)] == ["7 s", "3 min 04 s", "2 h 05 min"]
