"""What is read never becomes code: no pickle without consent, no shell, no tag of a caption; only the demo listens.

Ids and paths: test_bad_tables. The ports of a running stage: test_two_runs. The port that the demo opens: test_demo.
"""
from __future__ import annotations

import ast
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from nbformat import v4
from test_bad_weights import TRACE, Hostile

from dl import caption_files as demo
from dl.caption_metrics import markdown_text
from dl.clap import convert_laion_checkpoint
from dl.config import REPO, get_profile
from dl.plots import audio_player
from dl.report import write_report, write_table1
from dl.store import MetricsFile, markdown_table

# ---------------------------------------------------------------------------------------------- what code may not call
DANGERS = re.compile(
    r"\b(?:pickle|joblib|dill)\.loads?\(|shelve\.open\(|yaml\.load\(|torch\.load\((?!.*weights_only=)"
    r"|(?<![.\w])(?:eval|exec|compile)\(|os\.(?:system|popen)\(|subprocess\.get\w+\(|tempfile\.mktemp\("
    r"|requests\.get\(|urlopen\(|shell=True|trust_remote_code=True|allow_pickle=True|weights_only=False|escape=False")
SERVERS = re.compile(
    r"\.(?:launch|serve_forever|create_server|start_server|bind|listen)\(|HTTPServer"
    r"|^ *(?:import|from) (?:gradio|uvicorn|fastapi|starlette|flask|aiohttp|socketserver|http|socket)\b", re.MULTILINE)
# By design: a LAION checkpoint that its user names, with its sha256, after reading what it can do.
ALLOWED = {("dl/clap.py", "weights_only=False"), ("dl/clap.py", "allow_pickle=True")}


def found(search: re.Pattern, source: str) -> list[str]:
    """What a search finds in Python code without comments and docstrings, each call on one line."""
    tree = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return search.findall(ast.unparse(tree))


def sources() -> dict[str, str]:
    """Every module of dl and the code of every notebook."""
    files = {f"dl/{path.name}": path.read_text(encoding="utf-8") for path in (REPO / "dl").rglob("*.py")}
    for path in (REPO / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        files[path.name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return files


def test_the_code_calls_nothing_dangerous():
    dangers = {(name, danger) for name, source in sources().items() for danger in found(DANGERS, source)}
    assert dangers - ALLOWED == set() and ALLOWED & dangers, "an exception that is no longer needed is struck out"


def test_only_the_demo_listens_and_on_this_machine_alone(ledger):
    """One call of one module, when asked for by ``python -m dl demo``: on 127.0.0.1, not shared, in no tunnel."""
    with ledger.attempt("bad input", "open port"):
        servers = {name: calls for name, source in sources().items() if (calls := found(SERVERS, source))}
        assert list(servers) == ["dl/caption_files.py"]
        assert [call.strip() for call in servers["dl/caption_files.py"]] == ["import gradio", ".launch("]
        tree = ast.parse(sources()["dl/caption_files.py"])
        launch, = (it for it in ast.walk(tree) if isinstance(it, ast.Call) and "launch" in ast.unparse(it.func))
        how = {keyword.arg: ast.unparse(keyword.value) for keyword in launch.keywords}
        assert how["server_name"] == "HOST" and demo.HOST == "127.0.0.1"
        assert {how[name] for name in ("share", "pwa", "mcp_server", "enable_monitoring", "ssr_mode")} == {"False"}
        assert how["max_file_size"] == "LARGEST_MB * 2 ** 20" and demo.LARGEST_MB <= 100
        assert "GRADIO_ANALYTICS_ENABLED': 'False'" in ast.unparse(tree)


@pytest.mark.parametrize("search, source", [
    *[(DANGERS, source) for source in (
        "pickle.load(open('x', 'rb'))", "eval(text)", "subprocess.run('ls', shell=True)", "torch.load(path)",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "os.system('ls')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)", "frame.to_html(escape=False)")],
    *[(SERVERS, source) for source in (
        "app.launch(share=True)", "import socket", "from http.server import HTTPServer", "import gradio as g",
        "s.bind(('', 80))")],
])
def test_the_searches_see_it(search, source):
    assert found(search, source)
    assert not found(search, "import html\nmodel.eval(); subprocess.run(['ls']); re.compile('x'); x.show()\n"
                             "torch.load(p, weights_only=True); np.load(p)")


@pytest.mark.parametrize("consent", [{}, {"allow_pickle": True}, {"allow_pickle": True, "sha256": "0" * 64}])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, capsys, ledger, consent):
    """Without the flag and the sha256 of this very file nothing inside it runs; its sha256 is printed first."""
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Hostile()}, tmp_path / "clap.pt")
    with ledger.attempt("bad input", "pickle"):
        with pytest.raises(ValueError, match="a pickle that can run code: if you trust it|has sha256"):
            convert_laion_checkpoint(tmp_path / "clap.pt", tmp_path / "out", **consent)
        assert re.search(r"clap\.pt  sha256 [0-9a-f]{64}", capsys.readouterr().out) and not TRACE.exists()


# ----------------------------------------------------------------------------------------------------------- captions
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a dog <b onmouseover='alert(1)'>barks</b>",
    "[click](javascript:alert(1))", "![x](javascript:alert(1))", "</td></table><script>alert(1)</script>",
    "<iframe src='https://example.org'>", "`</code><script>alert(1)</script>`", "&lt;script&gt;",
    "$$</script><script>alert(1)</script>$$", "\"><svg onload=alert(1)>", "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]", "[click](JaVaScRiPt:alert(1))", "[click](vbscript:x)",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
]


class Tags(HTMLParser):
    """Tags, handlers and addresses that a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag in ("script", "iframe", "object", "embed", "svg", "form", "base", "link"):
            self.found.append(tag)
        code = re.compile(r"\s*(javascript|vbscript|data:text)", re.IGNORECASE)
        self.found += [name for name, value in attrs if name.startswith("on")
                       or (name in ("href", "src", "action") and code.match(value or ""))]


def test_the_parser_sees_what_a_browser_would_run():
    assert all(Tags(text).found for text in ("<script>", "<b onclick=x>", "<a href='javascript:x'>"))
    assert Tags("plain <a href='https://x'> <img src='data:image/png;base64,x'>").found == []


def page_of(folder: Path, *texts: str) -> str:
    """The report of a notebook that shows texts: as a cell of Markdown, and as outputs in Markdown and HTML."""
    cells = [v4.new_markdown_cell(text) for text in texts]
    cells += [v4.new_code_cell("x", outputs=[v4.new_output("display_data", {kind: text})])
              for text in texts for kind in ("text/markdown", "text/html")]
    (folder / "10.ipynb").write_text(v4.writes(v4.new_notebook(cells=cells)), encoding="utf-8")
    return write_report(get_profile("smoke"), folder / "10.ipynb").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_caption_stays_text(ledger, text, tmp_path, results_root):
    """In Markdown as the notebooks show it, in a table, in the report, above a player."""
    with ledger.attempt("bad input", "caption shown"):
        table = markdown_table(["caption"], [[text]])
        shown = page_of(tmp_path, f"* reference: {markdown_text(text)}", text, table, f"| {text} |")
        words = re.sub(r"<[^>]*>", "", shown.partition("<body>")[2])
        assert re.search(r"alert|example|script|click|dog|x", words), "what was written is still to be read"
        player = audio_player(np.zeros(2400, np.float32), 24_000, text).data
        assert Tags(shown).found + Tags(player).found + Tags(pd.DataFrame({text: [text]}).to_html()).found == []


def test_a_report_of_hostile_results_stays_text(results_root, ledger, tmp_path):
    """Systems and reasons from the files of a run: a table shown in the report runs nothing."""
    profile = get_profile("smoke")
    shared = {"experiment": "gap", "split": "test", "seed": "all", "noise_seed": "all", "n_items": 3}
    MetricsFile(profile).add([row for text in HOSTILE for row in (
        {**shared, "system": f"raw{text}", "metric": "rmg", "value": 0.5, "reason": ""},
        {**shared, "system": "raw", "metric": "pair_cosine", "value": None, "reason": text})])
    table = write_table1(profile)
    with ledger.attempt("bad input", "caption shown"):
        page = page_of(tmp_path, (profile.results_dir / "table1.md").read_text(encoding="utf-8"), table.to_html())
        assert Tags(page).found == [] and len(page) > 5000
        loaded = re.search(r"<[^<>]*(?:src|href)=\"https?://(?!arxiv\.org)", page)
        assert not loaded, "nothing is loaded from a network"


def test_the_committed_report_runs_nothing():
    for path in (REPO / "results").glob("*/report.html"):
        assert Tags(path.read_text(encoding="utf-8")).found == [], path
