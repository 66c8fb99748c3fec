"""The notebooks: their anatomy, and that every checked output holds in the smoke profile.

nbval runs copies that papermill prepared with profile=smoke, in a temporary folder and in order, in one process, so that each
finds what the ones before it made. The results folder is temporary too. The folded answers of the exercises are code: in these copies
they stand in cells of their own, where a student would paste them, and must run.
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

NOTEBOOKS = [REPO / "notebooks" / stage.notebook for stage in STAGES if (REPO / "notebooks" / stage.notebook).is_file()]
CHECKED = "# NBVAL_CHECK_OUTPUT"
CELL_TIMEOUT_S = 600
THREAD = ("01", "02", "03", "04", "05", "06", "07", "08", "11")       # the notebooks that the clip we follow passes through
ANSWER = re.compile(r"<details><summary>Answer</summary>\n\n```python\n(.*?)\n```", re.DOTALL)


def answers(cell: dict) -> list[str]:
    """The code of the folded answers in a cell of prose."""
    return ANSWER.findall(cell["source"]) if cell["cell_type"] == "markdown" else []


def anatomy(path: Path) -> list[str]:
    """What is wrong with a notebook, a line each; empty if nothing."""
    cells = read_notebook(path)
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    prose = [cell["source"] for cell in cells if cell["cell_type"] == "markdown"]
    tagged = [cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    opening = "\n".join(prose[:3])
    everything = "\n".join(code + prose)
    wrong = []
    if len(tagged) != 1:
        wrong.append(f"{len(tagged)} cells are tagged 'parameters', not 1")
    for source in tagged:
        for node in ast.parse(source).body:
            try:
                assert isinstance(node, ast.Assign)
                ast.literal_eval(node.value)
            except (AssertionError, ValueError):
                wrong.append(f"the parameters cell holds more than literals: {ast.unparse(node)}")
        if "profile = " not in source:
            wrong.append("the parameters cell does not set profile")
    if re.search(r"^\s*[!%]\s*(pip|conda|apt)\b", "\n".join(code), re.MULTILINE):
        wrong.append("a cell installs packages")
    if found := re.search(r"""["'(\s](/(home|root|work|tmp|Users|mnt|usr|opt|var)/|[A-Z]:\\)[^\s"']*""", everything):
        wrong.append(f"an absolute path: {found.group().strip()}")
    if (size := len("".join(code + prose).encode())) >= 300_000:
        wrong.append(f"its source has {size} bytes, 300 kB at most")
    if (count := sum(source.lstrip().startswith(CHECKED) for source in code)) < 2:
        wrong.append(f"{count} cells begin with {CHECKED}, at least 2 are wanted")
    if any(CHECKED in source and "tqdm" in source for source in code):
        wrong.append("a progress bar in a checked cell: stderr differs from run to run")
    if any(source.lstrip().startswith(CHECKED) and not cell["outputs"] for cell in cells if cell["cell_type"] == "code" for source in [cell["source"]]):
        wrong.append("a checked cell has no stored output to check against: run the notebook in profile mini and save it")
    if len(prose) * 2 < len(cells):
        wrong.append(f"{len(prose)} of {len(cells)} cells are prose, at least half are wanted")
    if not (prose and prose[0].startswith("# ") and cells[0]["cell_type"] == "markdown"):
        wrong.append("it does not open with a title")
    for answer in (folded := [text for cell in cells for text in answers(cell)]):
        try:
            compile(answer, "answer", "exec")
        except SyntaxError as error:
            wrong.append(f"the answer to an exercise is not Python: {error}")
    if path.name[0].isdigit() and not folded:
        wrong.append("no exercise with a folded answer that is code")
    if path.name.startswith(THREAD) and ("### The clip we follow" not in everything or "thread_clip(" not in everything):
        wrong.append("the clip we follow does not pass through it")
    for word in ("needs", "makes", "time"):
        if not re.search(rf"\b{word}\b\W*[:|]", opening, re.IGNORECASE):
            wrong.append(f"no '{word}:' line near its top")
    return wrong


def tree(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".ipynb_checkpoints" not in path.parts}


def nbval(notebooks: list[Path], folder: Path) -> subprocess.CompletedProcess:
    """Prepare copies with profile=smoke in ``folder``, answers in cells of their own, and check them by ``pytest --nbval-lax``, stopping at
    the first that fails."""
    import nbformat
    from papermill import execute_notebook

    (folder / "pytest.ini").write_text("[pytest]\n")
    for path in notebooks:
        execute_notebook(str(path), str(folder / path.name), parameters={"profile": "smoke"}, kernel_name="python3", prepare_only=True,
                         progress_bar=False)
        prepared = nbformat.read(folder / path.name, as_version=4)
        prepared.cells = [part for cell in prepared.cells for part in (cell, *map(nbformat.v4.new_code_cell, answers(cell)))]
        nbformat.write(prepared, folder / path.name)
    environment = os.environ | {"DL_RESULTS": str(folder / "results"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
                                "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))}
    environment.pop("JPY_SESSION_NAME", None)             # nobody moves a slider here
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--nbval-lax", f"--nbval-cell-timeout={CELL_TIMEOUT_S}", "-p",
                           "no:cacheprovider", "-c", "pytest.ini", "--durations=5", *[path.name for path in notebooks]],
                          check=False, capture_output=True, text=True, cwd=folder, env=environment)


def summary(done: subprocess.CompletedProcess) -> str:
    """The end of what nbval printed, without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)[-4000:]


# --------------------------------------------------------------------------------------------------------- the notebooks
def test_every_notebook_is_a_stage():
    assert {path.name for path in (REPO / "notebooks").glob("*.ipynb")} <= {stage.notebook for stage in STAGES}


def test_anatomy_of_the_notebooks():
    assert {path.name: wrong for path in NOTEBOOKS if (wrong := anatomy(path))} == {}


def test_committed_outputs_are_light_and_free_of_errors():
    heavy = {}
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output["output_type"] == "error"], path.name
        assert "audio/wav" not in json.dumps(outputs), f"{path.name}: sound is embedded as Opus"
        assert "application/vnd.jupyter.widget" not in json.dumps([outputs, json.loads(path.read_text(encoding="utf-8"))["metadata"]]), f"{path.name}: a widget's state"
        if (size := path.stat().st_size) > 2_500_000:
            heavy[path.name] = size
    assert heavy == {}


@pytest.mark.skipif(not NOTEBOOKS, reason="notebooks/ is empty")
def test_notebooks_hold_in_smoke(tmp_path):
    """Every notebook runs with profile=smoke, its checked outputs hold, and neither data nor notebooks are touched."""
    before = tree(REPO / "data/mini") | tree(REPO / "notebooks")
    done = nbval(NOTEBOOKS, tmp_path)
    assert done.returncode == 0, summary(done)
    assert tree(REPO / "data/mini") | tree(REPO / "notebooks") == before


# ------------------------------------------------------------------------------------------- that the tests above can fail
def small_notebook(path: Path, shown: str = "4", **changes: str) -> Path:
    """A notebook of the house's anatomy with two checked cells, of which the first has the stored output ``shown``."""
    write_notebook(path, f"{CHECKED}\n2 + 2", f"{CHECKED}\nprofile in ('smoke', 'mini')", text="# A title\nneeds: nothing, makes: nothing, time: 1 s")
    notebook = json.loads(path.read_text())
    for place, text in ((2, shown), (3, "True")):
        notebook["cells"][place]["execution_count"] = 1
        notebook["cells"][place]["outputs"] = [{"output_type": "execute_result", "data": {"text/plain": [text]}, "metadata": {}, "execution_count": 1}]
    notebook["cells"] += [{"cell_type": "markdown", "id": f"prose{number}", "metadata": {}, "source": ["Why."]} for number in range(2)]
    text = json.dumps(notebook)
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_nbval_sees_a_flipped_output(tmp_path):
    for shown, expected in (("4", 0), ("5", 1)):
        folder = tmp_path / shown
        folder.mkdir()
        done = nbval([small_notebook(tmp_path / "00_small.ipynb", shown)], folder)
        assert done.returncode == expected, summary(done)
        prepared = read_notebook(folder / "00_small.ipynb")
        assert any('profile = "smoke"' in cell["source"] for cell in prepared)
    assert "Cell outputs differ" in summary(done)


def test_nbval_sees_an_answer_that_fails(tmp_path):
    answer = "<details><summary>Answer</summary>\\n\\n```python\\nassert 2 + 2 == 5, profile\\n```"
    path = small_notebook(tmp_path / "small" / "00_small.ipynb", **{"Why.": answer})
    done = nbval([path], tmp_path)
    assert done.returncode == 1, summary(done)
    assert "AssertionError: smoke" in summary(done)


def test_anatomy_accepts_a_good_notebook(tmp_path):
    path = small_notebook(tmp_path / "good.ipynb")
    assert anatomy(path) == []
    assert parameter_names(path) == ["profile"]


@pytest.mark.parametrize("changes, message", [
    ({"profile = 'mini'": "profile = str(1)"}, "more than literals"),
    ({"profile = 'mini'": "import os"}, "more than literals"),
    ({'"parameters"': '"something"'}, "0 cells are tagged"),
    ({"2 + 2": "!pip install x"}, "installs packages"),
    ({"2 + 2": "open('/tmp/x')"}, "an absolute path"),
    ({"2 + 2": "1" * 300_000}, "300 kB"),
    ({f"{CHECKED}\\n": ""}, "0 cells begin with"),
    ({"2 + 2": "tqdm(2)"}, "progress bar"),
    ({"# A title": "A title"}, "does not open with a title"),
    ({"needs": "wants"}, "no 'needs:' line"),
    ({'"markdown", "id": "prose': '"raw", "id": "prose'}, "at least half"),
    ({"Why.": "<details><summary>Answer</summary>\\n\\n```python\\n1 +\\n```"}, "is not Python"),
    ({"Why.": "Because."}, "no exercise"),
    ({"Why.": "# The dog"}, "the clip we follow"),
])
def test_anatomy_sees_a_bad_notebook(tmp_path, changes, message):
    assert [line for line in anatomy(small_notebook(tmp_path / "01_bad.ipynb", **changes)) if message in line]
