"""What the shell, the cluster or the container sets, and how the commands end: what is not ours decides nothing, or one line names it."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_caption_files import wav
from test_environment import clone, run_all, stub, tools  # noqa: F401
from test_pipeline import ran, toy  # noqa: F401

from dl import caption_files as files
from dl import experiments
from dl.__main__ import dashed, main
from dl.config import REPO, get_profile
from dl.run import run_stages

NO_INSTALL = 'case "$*" in *"-m venv"*) echo "VENV BEGUN"; exit 1 ;; {more} *) {otherwise} ;; esac'


def python(code: str, *arguments: object, cwd: Path = REPO, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(REPO), **environment})


# ------------------------------------------------------------------------------------------------------------- the shell
@pytest.mark.parametrize(("command", "words", "code"), [
    (["./run_all.sh", "--help"], "usage: ./run_all.sh", 0), (["./run_all.sh", "-h"], "usage: ./run_all.sh", 0),
    (["./run_all.sh", "--list"], "00  check_setup", 0), (["./run_all.sh", "--nonsense"], "unrecognized arguments: --nonsense", 2),
    (["./run_all.sh", "chekc"], "unrecognized arguments: chekc", 2), (["./run_all.sh", "check"], "MISSING environment", 1),
    (["sh", "run_all.sh", "--list"], "00  check_setup", 0), (["dash", "run_all.sh", "--list"], "00  check_setup", 0),
    (["bash", "clone/run_all.sh", "--list"], "00  check_setup", 0),
], ids=lambda value: value if isinstance(value, str) else None)
def test_run_all_answers_before_an_install_however_it_is_called(clone, tools, ledger, command, words, code):  # noqa: F811
    """On a Python without a single package; CDPATH names a folder with another ``clone`` in it."""
    if not shutil.which(command[0]) and "/" not in command[0]:
        pytest.skip(f"no {command[0]} here")
    stub(tools, "python3.11", NO_INSTALL.format(more='*"check --pins-only"*) exit 1 ;;', otherwise=f'exec "{sys.executable}" -S "$@"'))
    (clone.parent / "other/clone").mkdir(parents=True)
    clone.rename(clone.parent / "clone")
    root, home = clone.parent / "clone", clone.parent
    (tools / command[0]).exists() or "/" in command[0] or (tools / command[0]).symlink_to(shutil.which(command[0]))
    with ledger.attempt("bad input", "surroundings"):
        done = subprocess.run(command, cwd=home if "clone/run_all.sh" in command else root, capture_output=True, text=True, check=False, timeout=120,
                              env={"PATH": str(tools), "HOME": str(home), "CDPATH": f"{home / 'other'}:."})
        assert "VENV BEGUN" not in done.stdout and words in done.stdout + done.stderr and done.returncode == code, done.stdout + done.stderr


@pytest.mark.parametrize(("left", "again"), [("$$", True), ("1", True), ("$PPID", True), ("4194304", True), ("junk", True), ("", True), ("OTHER", False)])
def test_a_number_left_by_a_killed_install(clone, tools, ledger, left, again):  # noqa: F811
    """Its own number, as in a container that starts anew, another program's, none: left over. Another run_all.sh's: it is waited for."""
    stub(tools, "python3.11", NO_INSTALL.format(more='*"check --pins-only"*) exit 1 ;;', otherwise="exit 0"))
    (clone / ".venv").mkdir()
    other = subprocess.Popen(["bash", "-c", "sleep 60; true", "run_all.sh"])
    with ledger.attempt("bad input", "surroundings"):
        done = subprocess.run(["bash", "-c", f"echo {left.replace('OTHER', str(other.pid))} >.venv/.installing; exec ./run_all.sh"], cwd=clone,
                              capture_output=True, text=True, check=False, timeout=60, env={"PATH": str(tools), "HOME": str(clone)})
        other.kill()
        assert ("VENV BEGUN" in done.stdout) == again and ("another run_all.sh" in done.stderr) == (not again), done.stdout + done.stderr


@pytest.mark.parametrize("how", ["PIP_USER", "PIP_TARGET", "pip.conf"])
def test_pip_settings_of_the_user_do_not_reach_the_install(clone, tools, tmp_path, ledger, how):  # noqa: F811
    """The install's own command, with a pip that may reach no index: it may fail for that alone."""
    line = f'exec env PIP_NO_INDEX=1 "{sys.executable}" "$@"'
    stub(tools, "python3.11", 'case "$*" in *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;'
                              f' *"check --pins-only"*) exit 1 ;; *"pip install"*) {line} ;; *hashlib*) echo x ;; *) exit 0 ;; esac')
    (tools / "cp").symlink_to(shutil.which("cp"))
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n")
    setting = {"PIP_USER": {"PIP_USER": "1"}, "PIP_TARGET": {"PIP_TARGET": str(tmp_path / "target"), "PIP_USER": "1"},
               "pip.conf": {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}}[how]
    (clone / "requirements.lock").write_text("torch==0.0.0\n")
    with ledger.attempt("bad input", "surroundings"):
        done = run_all(clone, path=str(tools), **setting)
        log = (clone / ".venv/install.log").read_text()
        assert done.returncode == 1 and "--user" not in log and "torch==0.0.0" in log, log


def test_line_ends_stay_as_they_are(tmp_path, ledger):
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    with ledger.attempt("bad input", "surroundings"):
        (tmp_path / "x").mkdir()
        subprocess.run(["git", "init", "-q"], cwd=tmp_path / "x", check=True)
        for name in (".gitattributes", "run_all.sh", "data/mini/train.csv", "requirements.lock"):
            shutil.copy(REPO / name, tmp_path / "x")
        (tmp_path / "x/s.opus").write_bytes(b"a\nb\r\n")
        who = ["-c", "user.name=x", "-c", "user.email=x", "-c", "core.autocrlf=true"]
        for step in (["add", "."], ["commit", "-qm", "x"], ["clone", "-q", ".", "../windows"]):
            subprocess.run(["git", *who, *step], cwd=tmp_path / "x", check=True, capture_output=True)
        for path in filter(Path.is_file, (tmp_path / "windows").iterdir()):
            assert path.read_bytes() == (tmp_path / "x" / path.name).read_bytes(), path.name


# ------------------------------------------------------------------------------------------------- the disk and the machine
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_another_run(toy, monkeypatch, capsys, ledger, number):  # noqa: F811
    def no_locks(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with ledger.attempt("bad input", "surroundings"):
        assert run_stages(toy) == 0 and ran(toy) == "01 02"
        out = capsys.readouterr().out
        assert out.count("no file locks on this disk") == 1 and "start no second run of profile smoke" in out


def test_without_semaphores_all_is_done_in_this_process(monkeypatch, ledger):
    def no_shm():
        raise OSError(errno.ENOENT, "No such file or directory")
    monkeypatch.setattr(experiments.multiprocessing, "Lock", no_shm)
    with ledger.attempt("bad input", "surroundings"):
        assert experiments.side_by_side(pow, [(2, 3), (2, 4), (2, 5)], processes=2) == [8, 16, 32]
        assert experiments.side_by_side(os.getpid, [()] * 3, processes=2) == [os.getpid()] * 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_no_more_processes_than_cpus_that_may_be_used(ledger):
    code = ("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nfrom dl.experiments import side_by_side\n"
            "print(set(side_by_side(os.getpid, [()] * 8)) == {os.getpid()})")
    with ledger.attempt("bad input", "surroundings"):
        assert python(code).stdout.strip() == "True"


def test_an_installed_copy_says_how_to_install(tmp_path, ledger):
    shutil.copytree(REPO / "dl", tmp_path / "dl", ignore=shutil.ignore_patterns("__pycache__"))
    with ledger.attempt("bad input", "surroundings"):
        for arguments in (["check"], ["caption", "x.wav"], ["run", "--list"]):
            done = subprocess.run([sys.executable, "-m", "dl", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
                                  env=os.environ | {"PYTHONPATH": str(tmp_path)})
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and "install it from there with pip install -e ." in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["dl"], "nothing is written beside it"


def test_a_kernel_of_the_same_name_elsewhere_is_not_taken(toy, tmp_path, monkeypatch, ledger):  # noqa: F811
    (tmp_path / "j/kernels/python3").mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "j/kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "j"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    with ledger.attempt("bad input", "surroundings"):
        assert run_stages(toy, only=["A1"]) == 0 and ran(toy) == "A1"


# --------------------------------------------------------------------------------------------------- how the commands end
@pytest.mark.parametrize(("given", "taken"), [
    (["-0nq_360.wav", "a.wav"], ["./-0nq_360.wav", "a.wav"]), (["-hX_30.WAV"], ["./-hX_30.WAV"]), (["--PJ_30.opus"], ["./--PJ_30.opus"]),
    (["--json", "-h", "--help", "--no-bridge", "--profile", "mini"],) * 2, (["--jsn", "-x"],) * 2, (["--", "-a.wav"],) * 2,
])
def test_names_that_begin_with_a_dash_are_files(given, taken, ledger):
    with ledger.attempt("bad input", "surroundings"):
        assert dashed(given) == taken


@pytest.fixture
def words(monkeypatch) -> None:
    """Captions without models."""
    monkeypatch.setattr(files, "load_captions", lambda *_: lambda waveforms: ["a dog barks"] * len(waveforms))


def test_a_folder_of_names_with_dashes(words, tmp_path, monkeypatch, capsys, ledger):
    monkeypatch.chdir(tmp_path)
    names = ["-0nqfRcnAYE_360.wav", "-hXyzAbc123_30.wav", "--PJHxphWEs_30.wav", "--json.wav", "good_0.wav"]
    for name in names:
        wav(tmp_path / name, 1)
    with ledger.attempt("bad input", "surroundings"):
        assert main(["caption", "--profile", "smoke", *names]) == 0
        assert [Path(line.split("  ")[0]).name for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize("command", [["run", "--list"], ["run", "--dry-run"], ["check"]], ids=lambda command: command[-1])
def test_a_closed_pipe_ends_quietly(command, results_root, ledger):
    with ledger.attempt("bad input", "surroundings"):
        run = subprocess.Popen([sys.executable, "-u", "-m", "dl", *command, "--profile", "smoke"], cwd=REPO, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
        run.stdout.close()
        error = run.stderr.read()
        assert run.wait(120) == 141 and error == ""


def test_caption_ends_quietly_when_the_pipe_is_closed(words, tmp_path, monkeypatch, ledger):
    path = wav(tmp_path / "long.wav", 60, 8000)
    reader, writer = os.pipe()
    os.close(reader)
    with ledger.attempt("bad input", "surroundings"), open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["caption", "--profile", "smoke", str(path)]) == 141


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 2 GiB"), RuntimeError("CUDA out of memory.\nTried to allocate 2.00 GiB"), KeyError("x"),
                                   OSError(errno.EIO, "Input/output error"), ZeroDivisionError("division by zero")], ids=lambda error: type(error).__name__)
def test_whatever_one_file_raises_the_others_are_done_and_the_json_is_whole(tmp_path, monkeypatch, capsys, ledger, error):
    calls: list[int] = []

    def captions(waveforms):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return ["a dog barks"] * len(waveforms)
    monkeypatch.setattr(files, "load_captions", lambda *_: captions)
    paths = [wav(tmp_path / f"{name}.wav", 1) for name in "abc"]
    with ledger.attempt("bad input", "surroundings"):
        assert files.caption_files(paths, get_profile("smoke"), as_json=True) == 1
        out, err = capsys.readouterr()
        assert ["error" in entry for entry in json.loads(out)] == [False, True, False] and err.count("\n") == 1 and str(paths[1]) in err


@pytest.mark.parametrize("error", [FileNotFoundError("no weights"), MemoryError("2 GiB"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_the_json_is_whole_when_the_models_cannot_be_had(tmp_path, monkeypatch, capsys, ledger, error):
    def none(*_):
        raise error
    monkeypatch.setattr(files, "load_captions", none)
    with ledger.attempt("bad input", "surroundings"):
        try:
            assert files.caption_files(["a.wav", "b.wav"], get_profile("smoke"), as_json=True) == 1
            assert [entry["file"] for entry in json.loads(capsys.readouterr().out)] == ["a.wav", "b.wav"]
        except KeyboardInterrupt:
            assert json.loads(capsys.readouterr().out) == []
