"""``python -m dl demo``: what the page shows; where Gradio and a Chromium are there, the page in a real browser."""
from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import soundfile
import torch
from test_caption_files import DIM, Encoder, checkpoints, quick, wav  # noqa: F401

from dl import caption_files as demo
from dl.__main__ import main
from dl.caption_files import answer_file, answer_scene, load_page, text
from dl.captioner import LLMCaptioner
from dl.config import REPO, get_profile
from dl.data import SAMPLING_RATE, load_split
from dl.store import key, save_checkpoint

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "${alert(1)}", "{{value}}", "a\nb\x1b[31m"]


def cache_train(root: Path, captions: list[str]) -> None:
    """Vectors of train in the cache of profile smoke, as notebook 02 leaves them."""
    drawn = torch.randn(2, len(captions), DIM, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(drawn, dim=2)
    lists = {"clip_ids": [f"clip-{i}" for i in range(len(captions))], "captions": captions, "skipped": []}
    tensors = {"audio": rows[0], "text": rows[1], "text_clip": torch.arange(len(captions))}
    save_checkpoint(root / "smoke/cache/embeddings/train.safetensors", tensors, lists, key("vectors", 1))


@pytest.fixture
def root(quick, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A results folder of its own: tiny checkpoints, no cache."""
    (tmp_path / "results/smoke").mkdir(parents=True)
    (tmp_path / "results/smoke/checkpoints").symlink_to(quick / "smoke/checkpoints")
    monkeypatch.setenv("DL_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


# -------------------------------------------------------------------------------------------- what the page shows
def test_a_file_is_seen_heard_captioned_and_placed(root, tmp_path):
    cache_train(root, [f"caption {i}" for i in range(40)] + ["caption 0"])
    page = load_page(get_profile("smoke"))
    shown = answer_file(page, wav(tmp_path / "a dog.wav", 12.5, 22_050, 2))
    assert "a dog.wav, 0:10</h3>" in shown, "the first 10 s are heard"
    assert shown.count("<audio") == 1 and shown.count('<img alt="') == 2
    sound = Encoder().embed_audio([demo.read_audio(tmp_path / "a dog.wav", 10)])
    _, link, captioner = demo.load_models(get_profile("smoke"))
    for vector in (sound, demo.bridged(link, sound)):
        assert f"<p>{text(captioner.generate(vector)[0])}</p>" in shown
    table = re.findall(r"<tr><td>(.*?)</td><td>(-?[\d.]+)</td><td>(.*?)</td><td>(-?[\d.]+)</td></tr>", shown)
    assert len(table) == demo.NEAREST
    for columns in ((0, 1), (2, 3)):
        words, cosines = zip(*[(row[columns[0]], float(row[columns[1]])) for row in table], strict=True)
        assert len(set(words)) == len(words) and list(cosines) == sorted(cosines, reverse=True)


def test_without_cached_vectors_one_line_says_so(root, tmp_path):
    shown = answer_file(load_page(get_profile("smoke")), wav(tmp_path / "a.wav", 2))
    assert shown.count('<img alt="') == 1 and "<table" not in shown and shown.count("without the bridge") == 1
    assert "left out: embeddings for split &#x27;train&#x27; are missing: run notebook 02, or ./run_all.sh" in shown


@pytest.mark.parametrize("make, message", [
    (lambda path: path.write_text("Dear reader"), "not readable as audio"),
    (lambda path: wav(path, 0.01), "too short; give at least"),
    (lambda path: wav(path, 3, silent=(0, 3)), "choose another file"),
])
def test_a_file_that_cannot_be_used_is_one_line_with_its_name_alone(tmp_path, make, message):
    path = tmp_path / "<img src=x onerror=alert(1)>.wav"
    make(path)
    shown = answer_file(lambda *_: pytest.fail("it was shown"), path)
    assert message in shown and "\n" not in shown and str(tmp_path) not in shown
    assert shown.startswith('<p class="dl-error" role="alert">&lt;img src=x onerror=alert(1)&gt;.wav: ')
    assert shown.count("<") == 2


def test_a_scene_is_shown_with_a_caption_that_belongs_to_it(root):
    split = load_split(get_profile("smoke"), "test")
    shown = answer_scene(load_page(get_profile("smoke")), split, 3)
    assert split.clip_ids[3] in shown and f"A caption that belongs to it: {text(split.captions[3][0])}" in shown


@pytest.mark.parametrize("words", HOSTILE)
def test_captions_stay_words(root, tmp_path, monkeypatch, words):
    cache_train(root, [words] * 3 + ["a", "b", "c", "d"])
    monkeypatch.setattr(LLMCaptioner, "generate", lambda self, vectors: [words] * len(vectors))
    page = load_page(get_profile("smoke"))
    shown = page(np.sin(np.arange(SAMPLING_RATE) / 20).astype(np.float32), words, words)
    assert set(re.findall(r"<(\w+)", shown)) == {"div", "h3", "audio", "img", "p", "table", "tr", "th", "td"}
    assert not set("${}`\x1b\n") & set(shown)
    assert shown.count(text(words)) == 6             # title, note, both captions, both columns of the table


@pytest.mark.parametrize("missing", ["gradio", "captioner"])
def test_what_is_not_there_is_one_line(tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setenv("DL_RESULTS", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # serve sets some of Gradio's variables
    monkeypatch.setitem(sys.modules, "gradio", None if missing == "gradio" else object())
    assert main(["demo", "--profile", "smoke"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    remedy = {"gradio": 'pip install -e ".[demo]"', "captioner": "./run_all.sh --profile smoke --only 07"}[missing]
    assert line.startswith("demo: ") and missing in line and line.endswith(remedy)


def test_the_page_names_no_other_host():
    assert demo.HOST == "127.0.0.1" and "//" not in demo.CSS + demo.ABOUT and "url(" not in demo.CSS


# ------------------------------------------------------------------------------------------------ in a real browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEMO = [sys.executable, "-m", "dl", "demo", "--profile", "smoke", "--port"]


@pytest.fixture
def server(checkpoints, tmp_path):  # noqa: F811
    """The command itself in profile smoke with tiny checkpoints: its address, process and temporary folder."""
    pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[demo]"')
    (tmp_path / "results/smoke").mkdir(parents=True)
    (tmp_path / "results/smoke/checkpoints").symlink_to(checkpoints / "smoke/checkpoints")
    (tmp_path / "temporary").mkdir()
    nearest = [HOSTILE[1], *(f"caption {i}" for i in range(demo.NEAREST - 1))]       # all of them are in the table
    cache_train(tmp_path / "results", nearest)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    own = {"DL_RESULTS": str(tmp_path / "results"), "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen([*DEMO, str(port)], cwd=REPO, stdout=subprocess.PIPE, text=True, env=os.environ | own)
    try:
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", process, tmp_path / "temporary"
    finally:
        process.kill()
        process.communicate()


def test_it_listens_on_this_machine_alone_and_leaves_nothing(server):
    address, process, folder = server
    port = int(address.rpartition(":")[2])
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [c.laddr for one in tree for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert [(place.ip, place.port) for place in listening] == [("127.0.0.1", port)]
    second = subprocess.run([*DEMO, str(port)], cwd=REPO, check=False, capture_output=True, text=True,
                            env=os.environ | {"DL_RESULTS": str(folder.parent / "results")})
    line = f"demo: port {port} of 127.0.0.1 is in use or is none: give another by --port N"
    assert second.returncode == 1 and second.stderr.splitlines()[-1] == line
    process.terminate()                              # SIGINT is ignored in a background job, and means the same
    assert process.wait(timeout=60) == 0 and not list(folder.glob("dl-demo-*"))


def test_the_page_in_chromium(server, tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason='needs Playwright: pip install -e ".[browser]"')
    if CHROMIUM is None:
        pytest.skip("needs a Chromium of the system: apt-get install chromium")
    address, _, folder = server
    names = ("scene.wav", "<img src=x onerror=alert(1)>.wav", "letter.wav")
    sound, hostile, letter = (tmp_path / name for name in names)
    soundfile.write(sound, load_split(get_profile("smoke"), "test").waveform(0), SAMPLING_RATE)
    hostile.write_text("Dear reader")
    letter.write_text("Dear reader")
    asked, dialogs = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)

        page.set_input_files("input[type=file]", sound)
        page.wait_for_selector(".dl-captions p")
        assert page.locator(".dl-captions p").count() == 2 and all(page.locator(".dl-captions p").all_inner_texts())
        assert page.locator(".dl-answer h3").first.inner_text().startswith("scene.wav, 0:")
        assert page.locator(".dl-answer td").count() == 4 * demo.NEAREST
        assert HOSTILE[1] in page.locator(".dl-answer td").all_inner_texts()
        assert page.evaluate("Array.from(document.querySelectorAll('.dl-answer img'), "
                             "x => x.complete && x.naturalWidth > 500)") == [True, True]
        page.wait_for_function("document.querySelector('.dl-answer audio').duration > 1")
        assert page.evaluate("document.querySelector('.dl-answer audio').play().then(() => true)")

        for path, name in ((letter, "letter.wav"), (hostile, "onerror=alert(1).wav")):
            page.set_input_files("input[type=file]", path)
            page.wait_for_function("said => document.querySelector('.dl-error')?.innerText.includes(said)",
                                   arg=f"{name}: not readable as audio")
            assert page.locator(".dl-answer, .dl-error *").count() == 0
        page.locator("input[type=radio]").first.click()
        page.wait_for_function("document.querySelector('.dl-answer h3')?.innerText.startsWith('mini-test-')")
        if keep := os.environ.get("DL_SCREENSHOT"):
            page.screenshot(path=keep, full_page=True)
        browser.close()
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))}
    assert dialogs == [] and hosts == {address.removeprefix("http://")}
    assert not [path for path in folder.rglob("*.wav")], "an upload was kept"
