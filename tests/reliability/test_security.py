"""What is read never becomes code: no pickle without consent, no shell, no tag out of a caption; nothing listens but the demo, on 127.0.0.1.

That ids make no paths stands in test_bad_tables, that a running stage opens no port to a network in test_two_runs, and which port
the demo really opens in test_demo.
"""
from __future__ import annotations

import ast
import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_bad_weights import Hostile

from dl import caption_files as demo
from dl.caption_metrics import markdown_text
from dl.clap import convert_laion_checkpoint
from dl.config import REPO, get_profile
from dl.plots import audio_player
from dl.report import write_report, write_table1
from dl.store import MetricsFile, markdown_table

# -------------------------------------------------------------------------------------------------------- what code may not call
FORBIDDEN = {
    "pickle.load": "a pickle runs code", "pickle.loads": "a pickle runs code", "joblib.load": "a pickle", "dill.load": "a pickle",
    "eval": "runs text", "exec": "runs text", "compile": "runs text", "os.system": "a shell", "os.popen": "a shell", "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell", "yaml.load": "runs code; safe_load does not", "tempfile.mktemp": "a race", "socket.socket": "a port",
    "urllib.request.urlopen": "a network", "requests.get": "a network", "http.server.HTTPServer": "a port", "shelve.open": "a pickle",
}
FLAGS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False, "escape": False}
# By design: a LAION checkpoint that its user names, with its sha256, after reading what it can do.
ALLOWED = {("dl/clap.py", "weights_only=False"), ("dl/clap.py", "allow_pickle=True")}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a call's target; blank where it is no name."""
    if isinstance(node, ast.Attribute):
        return f"{left}.{node.attr}" if (left := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """What of FORBIDDEN and FLAGS a piece of Python calls; torch.load without weights_only=True too."""
    found = []
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))):
        if not isinstance(node, ast.Call):
            continue
        name, flags = dotted(node.func), {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        found += [name] if name in FORBIDDEN else []
        found += [f"{flag}={value}" for flag, value in FLAGS.items() if flags.get(flag) is value]
        if name == "torch.load" and "weights_only" not in flags:
            found.append("torch.load without weights_only")
    return found


def sources() -> dict[str, str]:
    """Every module of dl and the code of every notebook."""
    found = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in sorted((REPO / "dl").rglob("*.py"))}
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
        found[f"notebooks/{path.name}"] = "\n".join("".join(cell["source"]) for cell in cells)
    return found


def test_the_code_calls_nothing_dangerous():
    found = {(name, danger) for name, source in sources().items() for danger in dangers(source)}
    assert found - ALLOWED == set() and ALLOWED & found, "an exception that is no longer needed is struck out"


@pytest.mark.parametrize("source", [
    "import pickle\npickle.load(open('x', 'rb'))", "eval(text)", "subprocess.run('ls', shell=True)", "torch.load(path)", "torch.load(p, weights_only=False)",
    "np.load(p, allow_pickle=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "os.system('ls')", "frame.to_html(escape=False)",
])
def test_the_search_sees_it(source):
    assert dangers(source)
    assert not dangers("model.eval(); subprocess.run(['ls']); torch.load(p, weights_only=True); re.compile('x'); np.load(p)")


# --------------------------------------------------------------------------------------------------------------- what listens
SERVERS = {"launch", "serve_forever", "create_server", "start_server", "bind", "listen", "HTTPServer", "ThreadingHTTPServer"}
SERVER_PACKAGES = {"gradio", "uvicorn", "fastapi", "starlette", "flask", "aiohttp", "socketserver", "http.server", "socket"}


def listeners(source: str) -> list[tuple[str, dict[str, str]]]:
    """What of a piece of Python could listen: (call, its keywords as written), and ("import", {package: ""})."""
    found = []
    for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE))):
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in SERVERS:
            found.append((dotted(node.func).rpartition(".")[2], {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}))
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [("import", {name: ""}) for name in names if SERVER_PACKAGES & {name, name.split(".")[0]}]
    return found


def test_only_the_demo_listens_and_on_this_machine_alone(ledger):
    """One call of one module, when asked for by ``python -m dl demo``: on 127.0.0.1, neither shared nor seen by a tunnel."""
    with ledger.attempt("bad input", "open port"):
        found = {name: calls for name, source in sources().items() if (calls := listeners(source))}
        assert list(found) == ["dl/caption_files.py"]
        (_, package), (call, how) = sorted(found["dl/caption_files.py"])
        assert list(package) == ["gradio"] and call == "launch" and demo.HOST == "127.0.0.1"
        assert how["server_name"] == "HOST" and {how[name] for name in ("share", "pwa", "mcp_server", "enable_monitoring", "ssr_mode")} == {"False"}
        assert how["max_file_size"] == "LARGEST_MB * 2 ** 20" and demo.LARGEST_MB <= 100
        assert "GRADIO_ANALYTICS_ENABLED': 'False'" in ast.unparse(ast.parse(sources()["dl/caption_files.py"]))


@pytest.mark.parametrize("source", ["app.launch(share=True)", "import socket", "from http.server import HTTPServer", "import gradio as g", "s.bind(('', 80))"])
def test_the_search_for_servers_sees_it(source):
    assert listeners(source) and not listeners("import html\nplot.show()")


# ------------------------------------------------------------------------------------------------------------------- pickles
@pytest.mark.parametrize("consent", [{}, {"allow_pickle": True}, {"allow_pickle": True, "sha256": "0" * 64}])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, capsys, ledger, consent):
    """Without the flag and the sha256 of this very file nothing inside it runs; its sha256 is printed first."""
    trace = Path(tempfile.gettempdir(), "reliability-was-unpickled")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Hostile()}, tmp_path / "clap.pt")
    with ledger.attempt("bad input", "pickle"):
        with pytest.raises(ValueError, match="a pickle that can run code: if you trust it|has sha256"):
            convert_laion_checkpoint(tmp_path / "clap.pt", tmp_path / "out", **consent)
        assert re.search(r"clap\.pt  sha256 [0-9a-f]{64}", capsys.readouterr().out) and not trace.exists()


# ------------------------------------------------------------------------------------------------------------------ captions
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a dog <b onmouseover='alert(1)'>barks</b>", "[click](javascript:alert(1))",
    "![x](javascript:alert(1))", "</td></table><script>alert(1)</script>", "<iframe src='https://example.org'>", "`</code><script>alert(1)</script>`",
    "$$</script><script>alert(1)</script>$$", "&lt;script&gt;", "\"><svg onload=alert(1)>", "<javascript:alert(1)>", "[x]: javascript:alert(1)\n\n[x]",
    "[click](JaVaScRiPt:alert(1))", "[click](data:text/html;base64,PHNjcmlwdD4=)", "[click](vbscript:x)",
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
        self.found += [name for name, _ in attrs if name.startswith("on")]
        self.found += [value for name, value in attrs if name in ("href", "src", "action") and value and re.match(r"\s*(javascript|vbscript|data:text)", value, re.IGNORECASE)]


def test_the_parser_sees_what_a_browser_would_run():
    seen = [Tags(text).found for text in ("<script>", "<b onclick=x>", "<a href='javascript:x'>", "<a href='https://x'>", "plain", "<img src='data:image/png;base64,x'>")]
    assert list(map(bool, seen)) == [True, True, True, False, False, False]


def page_of(folder: Path, *texts: str) -> str:
    """The report of a notebook that shows texts: as a cell of Markdown, and as outputs in Markdown and HTML."""
    from nbformat import v4

    cells = [v4.new_markdown_cell(text) for text in texts]
    cells += [v4.new_code_cell("x", outputs=[v4.new_output("display_data", {kind: text})]) for text in texts for kind in ("text/markdown", "text/html")]
    notebook = folder / "10.ipynb"
    notebook.write_text(v4.writes(v4.new_notebook(cells=cells)), encoding="utf-8")
    return write_report(get_profile("smoke"), notebook).read_text(encoding="utf-8")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_caption_stays_text(ledger, text, tmp_path, results_root):
    """In Markdown as the notebooks show it, in a table, in the report, above a player."""
    with ledger.attempt("bad input", "caption shown"):
        shown = page_of(tmp_path, f"* reference: {markdown_text(text)}", text, markdown_table(["caption"], [[text]]), f"| {text} |")
        assert Tags(shown).found == []
        words = re.sub(r"<[^>]*>", "", shown.partition("<body>")[2])
        assert re.search(r"alert|example|script|click|dog", words) or "x" in words, "what was written is still to be read"
        assert Tags(audio_player(np.zeros(2400, np.float32), 24_000, text).data).found == []
        assert Tags(pd.DataFrame({text: [text]}).to_html()).found == []


def test_a_report_of_hostile_results_stays_text(results_root, ledger, tmp_path):
    """Systems and reasons from the files of a run: whatever stands in them, a table shown in the report runs nothing."""
    profile = get_profile("smoke")
    file = MetricsFile(profile)
    shared = {"experiment": "gap", "split": "test", "seed": "all", "noise_seed": "all", "n_items": 3}
    file.add([{**shared, "system": f"raw{text}", "metric": "rmg", "value": 0.5, "reason": ""} for text in HOSTILE]
             + [{**shared, "system": "raw", "metric": "pair_cosine", "value": None, "reason": text} for text in HOSTILE])
    table = write_table1(profile)
    with ledger.attempt("bad input", "caption shown"):
        text = page_of(tmp_path, (profile.results_dir / "table1.md").read_text(encoding="utf-8"), table.to_html())
        assert Tags(text).found == [] and len(text) > 5000
        assert not re.search(r"<[^<>]*(?:src|href)=\"https?://(?!arxiv\.org)", text), "nothing is loaded from a network"


def test_the_committed_report_runs_nothing():
    for path in sorted((REPO / "results").glob("*/report.html")):
        assert Tags(path.read_text(encoding="utf-8")).found == [], path
