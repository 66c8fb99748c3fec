"""A full disk, a folder that may not be written, no Java, no home: what was computed stays, one line has a remedy."""
from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ledger import nobody
from test_bad_sounds import Vectors
from test_bad_tables import KEPT, audiocaps, rows
from test_captioning import embeddings
from test_pipeline import SETUP, ran, write_notebook

from dl import caption_metrics, captioner, check, store
from dl.caption_metrics import METRICS, score_captions
from dl.clap import embed_split, load_embeddings
from dl.config import REPO, BridgeConfig, get_profile
from dl.data import load_split
from dl.run import run_stages
from dl.store import MetricsFile, atomic_write
from dl.train import train_bridge

REMEDY = "free space on its disk or make its folder writable, or set DL_RESULTS to another"


def full(after: int):
    """A stand-in for ``os.fsync`` on a disk that is full from the ``after``-th call on."""
    calls = []

    def fsync(_):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fsync


# --------------------------------------------------------------------------------------------------------- disk full
@pytest.mark.parametrize("how", ["simulated", "a file system of 256 KiB"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, ledger, how):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    mounted = how != "simulated"
    if mounted and (os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode):
        pytest.skip("a file system cannot be mounted here")
    try:
        path = atomic_write(tmp_path / "x.csv", "old")
        if not mounted:
            monkeypatch.setattr(store.os, "fsync", full(0))
        with ledger.attempt("bad input", "disk full"):
            with pytest.raises(OSError, match=rf"x\.csv cannot be written \(No space left on device\): {REMEDY}"):
                atomic_write(path, "x" * 400_000)
            assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_in_the_middle_of_every_kind_of_stage(results_root, tmp_path, monkeypatch, ledger):
    """Embedding, training, metrics: each keeps what was written before, and goes on when there is space again."""
    profile = get_profile("paper", data_dir=audiocaps(tmp_path / "data", rows("1,a,0,A tone")))
    split, e = load_split(profile, "val"), embeddings("train")
    checkpoint, file = profile.cache_dir / "bridge.safetensors", MetricsFile(profile)
    file.add([KEPT])
    before = file.path.read_bytes()
    for calls, stage in (
            (1, lambda: embed_split(profile, split, Vectors(), progress=False)),
            (1, lambda: train_bridge(BridgeConfig(train_steps=6, batch_size=4), e.audio, e.text, e.text_clip, seed=0,
                                     progress=False, checkpoint_path=checkpoint, checkpoint_every=2)),
            (0, lambda: file.add([{**KEPT, "seed": 1}]))):
        with ledger.attempt("bad input", "disk full"):
            with monkeypatch.context() as patch, pytest.raises(OSError, match=REMEDY):
                patch.setattr(store.os, "fsync", full(calls))
                stage()
            assert not list(profile.results_dir.rglob("*.tmp")) and file.path.read_bytes() == before
            stage()
    assert load_embeddings(profile, "val").captions == ["A tone"] and checkpoint.is_file() and len(file.read()) == 2


def test_a_limit_on_file_size(tmp_path, ledger):
    """``ulimit -f``, as a cluster's job may have it."""
    code = ("import sys; from dl.store import atomic_write\n"
            "try: atomic_write(sys.argv[1], 'x' * 400_000)\nexcept OSError as error: print(error)")
    with ledger.attempt("bad input", "disk full"):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.csv")], capture_output=True, text=True,
                              check=True, cwd=REPO,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
        assert "x.csv cannot be written (File too large)" in done.stdout and REMEDY in done.stdout
        assert os.listdir(tmp_path) == []


def test_the_runner_on_a_full_disk(toy, monkeypatch, capsys, ledger):
    """Stage 01 is done, then its stamp cannot be written: one line, code 1; with space again the run goes on."""
    assert run_stages(toy) == 0
    (toy.root / "data/in.csv").write_text("b\n")
    toy.hashed.clear()
    metrics = (toy.results / "metrics.csv").read_bytes()
    ran(toy)
    with ledger.attempt("bad input", "disk full"):
        with monkeypatch.context() as patch:
            patch.setattr(store.os, "fsync", full(0))
            assert run_stages(toy) == 1
        error = capsys.readouterr().err
        assert error.startswith("run_all: ") and error.count("\n") == 1
        assert "No space left on device" in error and "set DL_RESULTS" in error
        assert (toy.results / "metrics.csv").read_bytes() == metrics
        assert run_stages(toy) == 0 and ran(toy) == "01 01 02"


# ------------------------------------------------------------------------------------ a folder that may not be written
def test_results_that_may_not_be_written(open_folder, monkeypatch, capsys, ledger, toy):
    monkeypatch.setenv("DL_RESULTS", str(open_folder))
    with ledger.attempt("bad input", "read-only"), nobody():
        if os.access(open_folder, os.W_OK, effective_ids=True):
            os.chmod(open_folder, 0o555)
        with pytest.raises(OSError, match=rf"m\.csv cannot be written \(Permission denied\): {REMEDY}"):
            atomic_write(open_folder / "smoke/m.csv", "x")
    os.chmod(open_folder, 0o755)
    run = type(toy)(get_profile("smoke", data_dir=toy.profile.data_dir), toy.stages, toy.root)
    blocked = open_folder / "smoke"
    blocked.write_text("a file in the folder's place")
    with ledger.attempt("bad input", "read-only"):
        assert run_stages(run) == 1
        error = capsys.readouterr().err
        assert error.startswith("run_all: ") and error.count("\n") == 1
        assert str(blocked) in error and "set DL_RESULTS to another folder" in error


def test_check_says_that_results_may_not_be_written(open_folder, monkeypatch, capsys, ledger):
    os.chmod(open_folder, 0o555)
    monkeypatch.setenv("DL_RESULTS", str(open_folder))
    monkeypatch.setattr(check, "CHECKS", [row for row in check.CHECKS if row[0] in ("results", "disk")])
    with ledger.attempt("bad input", "read-only"), nobody():
        assert check.check(get_profile("smoke")) == 1
        first, second = capsys.readouterr().out.splitlines()
        assert first.startswith(f"MISSING results: write access to {open_folder}") and "set DL_RESULTS" in first
        assert second.startswith("OK      disk")


# --------------------------------------------------------------------------------------------------- no Java, no home
def test_without_java_the_other_metrics_are_there(monkeypatch, ledger):
    def none():
        raise caption_metrics.JavaError(f"no Java that starts was found: {caption_metrics.REMEDY}")

    monkeypatch.setattr(caption_metrics, "find_java", none)
    with ledger.attempt("bad input", "no Java"):
        scores = score_captions(["a dog barks", "rain"], [["a dog is barking"], ["rain falls"]])
        assert scores.corpus["sbert_sim"] > 0 and set(scores.reasons) == set(METRICS) - {"sbert_sim"}
        assert all("put a Java 8 to 13 on PATH" in reason for reason in scores.reasons.values())


@pytest.mark.parametrize("body", ["exit 1", "echo 'this is no Java'", "kill -9 $$"])
def test_a_java_that_does_not_start_is_passed_over(tmp_path, monkeypatch, ledger, body):
    (tmp_path / "java").write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with ledger.attempt("bad input", "no Java"):
        assert caption_metrics.find_java().path != tmp_path / "java"


@pytest.mark.parametrize("arguments, words", [
    (["run", "--profile", "smoke", "--only", "00"], "run_all: there is no home folder, .*: set HOME to"),
    pytest.param(["caption", "--profile", "smoke", "x.wav"], "make it with ./run_all.sh", marks=pytest.mark.slow),
])
def test_without_a_home(tmp_path, ledger, arguments, words):
    """An unknown user without HOME, as containers have it."""
    code = ("import os, sys; os.environ.pop('HOME', None); os.environ.pop('XDG_CACHE_HOME', None)\n"
            f"os.path.expanduser = lambda path: path\nfrom dl.__main__ import main; sys.exit(main({arguments!r}))")
    with ledger.attempt("bad input", "no home"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO,
                              env=os.environ | {"DL_RESULTS": str(tmp_path / "results")})
        assert done.returncode in (1, 2) and re.search(words, done.stderr), done.stderr
        assert "Traceback" not in done.stderr


def test_the_language_model_without_a_home(monkeypatch, ledger):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(captioner.Path, "home", homeless)
    with ledger.attempt("bad input", "no home"), pytest.raises(ValueError, match="set XDG_CACHE_HOME to a folder"):
        captioner.cache_folder()


def test_a_bad_table_in_a_stage_ends_the_run_with_its_name(toy, capsys, ledger):
    """What the library says reaches the last lines of the run: the file and the remedy; stage 01 stays done."""
    bad = audiocaps(toy.root.parent / "clips", rows("1,a,0,Rain, and wind")) / "val.csv"
    write_notebook(toy.root / "notebooks/02_second.ipynb", SETUP, f"""import sys
sys.path.insert(0, {str(REPO)!r})
[sys.modules.pop(m) for m in list(sys.modules) if m.split('.')[0] == 'dl']
from pathlib import Path
from dl.data import read_captions
read_captions(Path({str(bad)!r}))""")
    with ledger.attempt("bad input", "table"):
        assert run_stages(toy) == 1
        error = capsys.readouterr().err
        assert f"{bad}: row 2 has 5 cells, the header 4; put a caption with commas in quotes" in error
        assert "goes on from here" in error and toy.stamp("01") and ran(toy) == "01"
