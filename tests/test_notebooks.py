"""The notebooks: their anatomy, and that every checked output holds in the smoke profile.

nbval runs copies that papermill prepared with profile=smoke, in order and in one process, on results in a temporary
folder. The folded answers of the exercises are code: in these copies they stand in cells of their own, where a student
would paste them, and must run. ``test_notebooks_apart.py`` runs the other half, so that two processes share the work.
"""
from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import write_notebook

from dl.config import REPO
from dl.run import STAGES, parameter_names, read_notebook

NOTEBOOKS = {stage.number: REPO / "notebooks" / stage.notebook for stage in STAGES}
CHAIN = ("02", "03", "04", "05", "06", "07", "08", "10", "11")        # each reads what those before it made
APART = ("00", "01", "02", "09", "A1", "A2", "A3")                    # they need no more than the vectors of 02
THREAD = ("01", "02", "03", "04", "05", "06", "07", "08", "11")       # the clip we follow passes through them
CHECKED = "# NBVAL_CHECK_OUTPUT"
ANSWER = re.compile(r"<details><summary>Answer</summary>\n\n```python\n(.*?)\n```", re.DOTALL)
ABSOLUTE = re.compile(r"""["'(\s](/(home|root|work|tmp|Users|mnt|usr|opt|var)/|[A-Z]:\\)[^\s"']*""")


def answers(cell: dict) -> list[str]:
    """The code of the folded answers in a cell of prose."""
    return ANSWER.findall(cell["source"]) if cell["cell_type"] == "markdown" else []


def is_literal(node: ast.stmt) -> bool:
    try:
        ast.literal_eval(node.value)
    except (AttributeError, ValueError):
        return False
    return isinstance(node, ast.Assign)


def is_python(source: str) -> bool:
    try:
        return bool(compile(source, "answer", "exec"))
    except SyntaxError:
        return False


def anatomy(path: Path) -> list[str]:
    """What is wrong with a notebook, a line each; empty if nothing."""
    cells = read_notebook(path)
    code, prose = ([cell["source"] for cell in cells if cell["cell_type"] == kind] for kind in ("code", "markdown"))
    checked = [cell for cell in cells if cell["cell_type"] == "code" and cell["source"].lstrip().startswith(CHECKED)]
    tagged = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    folded = [answer for cell in cells for answer in answers(cell)]
    opening, everything = "\n".join(prose[:3]), "\n".join(code + prose)
    follows = "### The clip we follow" in everything and "thread_clip(" in everything
    rules = {
        "exactly one cell is tagged 'parameters'": len(tagged) == 1,
        "the parameters cell holds literals only": all(map(is_literal, ast.parse("\n".join(tagged)).body)),
        "the parameters cell sets profile": "profile = " in "\n".join(tagged),
        "no cell installs packages": not re.search(r"^\s*[!%]\s*(pip|conda|apt)\b", "\n".join(code), re.MULTILINE),
        "no absolute path": not ABSOLUTE.search(everything),
        "its source has 300 kB at most": len(everything.encode()) < 300_000,
        "at least 2 cells are checked": len(checked) >= 2,
        "a checked cell has a stored output": all(cell["outputs"] for cell in checked),
        "a checked cell shows no progress bar": not any("tqdm" in cell["source"] for cell in checked),
        "at least half of the cells are prose": len(prose) * 2 >= len(cells),
        "it opens with a title": cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# "),
        "the answers to exercises are Python": all(map(is_python, folded)),
        "an exercise has a folded answer that is code": bool(folded) or not path.name[0].isdigit(),
        "the clip we follow passes through it": follows or not path.name.startswith(THREAD),
        **{f"a line '{word}:' stands near its top": re.search(rf"\b{word}\b\W*[:|]", opening, re.IGNORECASE)
           for word in ("needs", "makes", "time")},
    }
    return [rule for rule, kept in rules.items() if not kept]


def tree() -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for folder in ("data/mini", "notebooks")
            for path in sorted((REPO / folder).rglob("*"))
            if path.is_file() and ".ipynb_checkpoints" not in path.parts}


def nbval(notebooks: list[Path], folder: Path, *options: str) -> tuple[int, str]:
    """``pytest --nbval-lax`` on copies in ``folder``: its exit code and the end of what it printed."""
    import nbformat
    from papermill import execute_notebook

    (folder / "pytest.ini").write_text("[pytest]\n")
    for path in notebooks:
        copy = folder / path.name
        execute_notebook(str(path), str(copy), {"profile": "smoke"}, kernel_name="python3", prepare_only=True,
                         progress_bar=False)
        prepared = nbformat.read(copy, as_version=4)
        prepared.cells = [part for cell in prepared.cells
                          for part in (cell, *map(nbformat.v4.new_code_cell, answers(cell)))]
        nbformat.write(prepared, copy)
    paths = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"DL_RESULTS": str(folder / "results"), "PYTHONPATH": paths}
    environment.pop("JPY_SESSION_NAME", None)             # nobody moves a slider here
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-cell-timeout=600", "-p", "no:cacheprovider",
         "-c", "pytest.ini", "--color=no", *options, *(path.name for path in notebooks)],
        check=False, capture_output=True, text=True, cwd=folder, env=environment)
    return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)[-6000:]


def hold_in_smoke(numbers: tuple[str, ...], folder: Path) -> None:
    """The notebooks run, their checked outputs hold, and neither data nor notebooks are touched."""
    before = tree()
    code, said = nbval([NOTEBOOKS[number] for number in numbers], folder, "-x")
    assert code == 0, said
    assert tree() == before


# ------------------------------------------------------------------------------------------------------ the notebooks
def test_every_notebook_is_a_stage_and_is_run():
    assert set((REPO / "notebooks").glob("*.ipynb")) == set(NOTEBOOKS.values())
    assert {*CHAIN, *APART} == set(NOTEBOOKS)


def test_anatomy_of_the_notebooks():
    assert {path.name: wrong for path in NOTEBOOKS.values() if (wrong := anatomy(path))} == {}


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_committed_outputs_are_light_and_free_of_errors(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    stored = json.dumps([outputs, notebook["metadata"]])
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "audio/wav" not in stored, "sound is embedded as Opus"
    assert "application/vnd.jupyter.widget" not in stored, "a widget's state"
    assert path.stat().st_size < 2_500_000


def test_the_chain_holds_in_smoke(tmp_path):
    hold_in_smoke(CHAIN, tmp_path)


# --------------------------------------------------------------------------------------- that the tests above can fail
def small_notebook(path: Path, shown: str = "4", **changes: str) -> Path:
    """A notebook of the house's anatomy with two checked cells; the first has the stored output ``shown``."""
    write_notebook(path, f"{CHECKED}\n2 + 2", f"{CHECKED}\nprofile in ('smoke', 'mini')",
                   text="# A title\nneeds: nothing, makes: nothing, time: 1 s")
    notebook = json.loads(path.read_text())
    for cell, text in zip(notebook["cells"][2:], (shown, "True"), strict=True):
        cell["execution_count"] = 1
        cell["outputs"] = [{"output_type": "execute_result", "data": {"text/plain": [text]}, "metadata": {},
                            "execution_count": 1}]
    prose = {"cell_type": "markdown", "metadata": {}, "source": ["Why."]}
    notebook["cells"] += [{"id": f"prose{number}", **prose} for number in range(2)]
    text = json.dumps(notebook)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_nbval_sees_a_flipped_output_and_an_answer_that_fails(tmp_path):
    failing = "<details><summary>Answer</summary>\\n\\n```python\\nassert 2 + 2 == 5, profile\\n```"
    given = [small_notebook(tmp_path / "A1_good.ipynb"), small_notebook(tmp_path / "A2_flipped.ipynb", "5"),
             small_notebook(tmp_path / "A3_failing.ipynb", **{"Why.": failing})]
    (tmp_path / "copies").mkdir()
    code, said = nbval(given, tmp_path / "copies")
    assert code == 1 and set(re.findall(r"FAILED (\S+)::", said)) == {"A2_flipped.ipynb", "A3_failing.ipynb"}, said
    assert "Cell outputs differ" in said and "AssertionError: smoke" in said


def test_anatomy_accepts_a_good_notebook(tmp_path):
    path = small_notebook(tmp_path / "good.ipynb")
    assert anatomy(path) == [] and parameter_names(path) == ["profile"]


@pytest.mark.parametrize(("old", "new", "rule"), [
    ("profile = 'mini'", "profile = str(1)", "literals only"),
    ("profile = 'mini'", "import os", "literals only"),
    ('"parameters"', '"something"', "exactly one cell is tagged"),
    ("2 + 2", "!pip install x", "installs packages"),
    ("2 + 2", "open('/tmp/x')", "no absolute path"),
    ("2 + 2", "1" * 300_000, "300 kB"),
    (f"{CHECKED}\\n", "", "at least 2 cells are checked"),
    ("2 + 2", "tqdm(2)", "progress bar"),
    ("# A title", "A title", "opens with a title"),
    ("needs", "wants", "a line 'needs:'"),
    ('{"id": "prose0", "cell_type": "markdown"', '{"id": "prose0", "cell_type": "raw"', "at least half"),
    ("Why.", "<details><summary>Answer</summary>\\n\\n```python\\n1 +\\n```", "are Python"),
    ("Why.", "Because.", "an exercise has"),
    ("Why.", "# The dog", "the clip we follow"),
])
def test_anatomy_sees_a_bad_notebook(tmp_path, old, new, rule):
    assert [line for line in anatomy(small_notebook(tmp_path / "01_bad.ipynb", **{old: new})) if rule in line]
