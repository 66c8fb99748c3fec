"""What the shell, the cluster or the container sets decides nothing, or one line names it; how the commands end."""
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
from test_pipeline import ran

from dl import caption_files, experiments
from dl.__main__ import dashed, main
from dl.config import REPO, get_profile
from dl.run import run_stages

NO_INSTALL = 'case "$*" in *"-m venv"*) echo "VENV BEGUN"; exit 1 ;; *"--pins-only"*) exit 1 ;; *) {} ;; esac'
PIP = """case "$*" in *"-m venv"*) for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
*"--pins-only"*) exit 1 ;; *hashlib*) echo x ;;
*"pip install"*) echo "elsewhere: $PIP_TARGET$PIP_PREFIX$PIP_ROOT."; exec env PIP_NO_INDEX=1 "{}" "$@" ;; *) exit 0 ;;
esac"""
pytestmark = pytest.mark.attempt("bad input", "surroundings")


def quiet(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


def name(value: object) -> str | None:
    return type(value).__name__ if isinstance(value, BaseException) else value if isinstance(value, str) else None


# ---------------------------------------------------------------------------------------------------------- the shell
@pytest.mark.parametrize(("command", "words", "code"), [
    ("./run_all.sh --help", "usage: ./run_all.sh", 0), ("./run_all.sh -h", "usage: ./run_all.sh", 0),
    ("./run_all.sh --list", "00  check_setup", 0), ("./run_all.sh --nonsense", "unrecognized arguments: --nonse", 2),
    ("./run_all.sh chekc", "unrecognized arguments: chekc", 2), ("./run_all.sh check", "MISSING environment", 1),
    ("sh run_all.sh --list", "00  check_setup", 0), ("dash run_all.sh --list", "00  check_setup", 0),
    ("bash clone/run_all.sh --list", "00  check_setup", 0),
], ids=name)
def test_run_all_answers_before_an_install_however_it_is_called(clone, command, words, code):
    """On a Python without a single package; CDPATH names a folder with another ``clone`` in it."""
    program = command.split()[0]
    if not shutil.which(program) and "/" not in program:
        pytest.skip(f"no {program} here")
    clone.tool("python3.11", NO_INSTALL.format(f'exec "{sys.executable}" -S "$@"'))
    home = clone.root.parent
    (home / "other/clone").mkdir(parents=True)
    root = clone.root.rename(home / "clone")
    if "/" not in program and not (clone.tools / program).exists():
        (clone.tools / program).symlink_to(shutil.which(program))
    done = quiet(command.split(), cwd=home if "clone/" in command else root,
                 env={"PATH": str(clone.tools), "HOME": str(home), "CDPATH": f"{home / 'other'}:."})
    said = done.stdout + done.stderr
    assert "VENV BEGUN" not in said and words in said and done.returncode == code, said


@pytest.mark.parametrize("left", ["$$", "1", "$PPID", "4194304", "junk", "", "OTHER"])
def test_a_number_left_by_a_killed_install(clone, left):
    """Its own number, as in a container that starts anew, another program's, none: left over. Another run's: no."""
    clone.tool("python3.11", NO_INSTALL.format("exit 0"))
    (clone.root / ".venv").mkdir()
    other = subprocess.Popen(["bash", "-c", "sleep 60; true", "run_all.sh"])
    start = f"echo {left.replace('OTHER', str(other.pid))} >.venv/.installing; exec ./run_all.sh"
    done = quiet(["bash", "-c", start], cwd=clone.root, env={"PATH": str(clone.tools), "HOME": str(clone.root)})
    other.kill()
    said = done.stdout + done.stderr
    assert ("VENV BEGUN" in said) == (left != "OTHER") and ("another run_all.sh" in said) == (left == "OTHER"), said


def test_an_environment_behind_a_link_is_not_emptied(clone, tmp_path):
    clone.fake_python()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/kept").write_text("")
    (clone.root / ".venv").symlink_to(tmp_path / "own")
    done = clone.run_all("test")
    assert done.returncode == 1 and ".venv is a link" in done.stderr and (tmp_path / "own/kept").is_file()


@pytest.mark.parametrize("setting", [
    {"PIP_USER": "1"}, {"PIP_TARGET": "target", "PIP_USER": "1"}, {"PIP_PREFIX": "prefix"}, {"PIP_ROOT": "root"},
    {"PIP_CONFIG_FILE": "pip.conf"},
], ids=lambda setting: next(iter(setting)))
def test_pip_settings_of_the_user_do_not_reach_the_install(clone, tmp_path, setting):
    """The install's own command, with a pip that may reach no index: it may fail for that alone."""
    clone.tool("python3.11", PIP.format(sys.executable))
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n")
    (clone.root / "requirements.lock").write_text("torch==0.0.0\n")
    paths = {name: value if value == "1" else str(tmp_path / value) for name, value in setting.items()}
    done = quiet([clone.root / "run_all.sh"], env={"PATH": str(clone.tools), "HOME": str(clone.root), **paths})
    log = (clone.root / ".venv/install.log").read_text()
    assert done.returncode == 1 and "--user" not in log and "torch==0.0.0" in log, log
    assert "elsewhere: .\n" in log, log


def test_line_ends_stay_as_they_are(tmp_path):
    if not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    (tmp_path / "x").mkdir()
    for path in (".gitattributes", "run_all.sh", "data/mini/train.csv", "requirements.lock"):
        shutil.copy(REPO / path, tmp_path / "x")
    (tmp_path / "x/s.opus").write_bytes(b"a\nb\r\n")
    who = ["-c", "user.name=x", "-c", "user.email=x", "-c", "core.autocrlf=true"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["clone", "-q", ".", "../windows"]):
        subprocess.run(["git", *who, *step], cwd=tmp_path / "x", check=True, capture_output=True)
    for path in filter(Path.is_file, (tmp_path / "windows").iterdir()):
        assert path.read_bytes() == (tmp_path / "x" / path.name).read_bytes(), path.name


# ----------------------------------------------------------------------------------------------- the disk, the machine
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_not_another_run(toy, monkeypatch, capsys, number):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert run_stages(toy) == 0 and ran(toy) == "01 02"
    out = capsys.readouterr().out
    assert out.count("no file locks on this disk") == 1 and "start no second run of profile smoke" in out


def test_without_semaphores_all_is_done_in_this_process(monkeypatch):
    def no_shm():
        raise OSError(errno.ENOENT, "No such file or directory")
    monkeypatch.setattr(experiments.multiprocessing, "Lock", no_shm)
    assert experiments.side_by_side(pow, [(2, 3), (2, 4), (2, 5)], processes=2) == [8, 16, 32]
    assert experiments.side_by_side(os.getpid, [()] * 3, processes=2) == [os.getpid()] * 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_no_more_processes_than_cpus_that_may_be_used():
    code = ("import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from dl.experiments import side_by_side\n"
            "print(set(side_by_side(os.getpid, [()] * 8)) == {os.getpid()})")
    assert quiet([sys.executable, "-c", code], cwd=REPO).stdout.strip() == "True"


def test_an_installed_copy_says_how_to_install(tmp_path):
    shutil.copytree(REPO / "dl", tmp_path / "dl", ignore=shutil.ignore_patterns("__pycache__"))
    for arguments in ("check", "caption x.wav", "run --list"):
        done = quiet([sys.executable, "-m", "dl", *arguments.split()], cwd=tmp_path,
                     env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert "install it from there with pip install -e ." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dl"], "nothing is written beside it"


def test_a_kernel_of_the_same_name_elsewhere_is_not_taken(toy, tmp_path, monkeypatch):
    (tmp_path / "j/kernels/python3").mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "Python 3", "language": "python"}
    (tmp_path / "j/kernels/python3/kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "j"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert run_stages(toy, only=["A1"]) == 0 and ran(toy) == "A1"


def test_ranks_that_another_job_left_in_the_shell_are_not_ours(toy, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    done = subprocess.run([sys.executable, "-c", "from dl.run import start; print(start().num_processes)"], cwd=REPO,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr
    assert run_stages(toy, only=["A1"]) == 0 and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(os.environ)


# ----------------------------------------------------------------------------------------------- how the commands end
@pytest.mark.parametrize(("given", "taken"), [
    ("-0nq_360.wav a.wav", "./-0nq_360.wav a.wav"), ("-hX_30.WAV", "./-hX_30.WAV"), ("--PJ_30.opus", "./--PJ_30.opus"),
    ("--json -h --help --no-bridge --profile mini",) * 2, ("--jsn -x",) * 2, ("-- -a.wav",) * 2,
])
def test_names_that_begin_with_a_dash_are_files(given, taken):
    assert dashed(given.split()) == taken.split()


@pytest.fixture
def said(monkeypatch) -> list:
    """Captions without models; an exception put into the list is raised at its turn."""
    turns: list[BaseException | None] = []

    def captions(waveforms: list) -> list[str]:
        if turns and (error := turns.pop(0)):
            raise error
        return ["a dog barks"] * len(waveforms)
    monkeypatch.setattr(caption_files, "load_captions", lambda *_: captions)
    return turns


def test_a_folder_of_names_with_dashes(said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["-0nqfRcnAYE_360.wav", "-hXyzAbc123_30.wav", "--PJHxphWEs_30.wav", "--json.wav", "good_0.wav"]
    for path in names:
        wav(tmp_path / path, 1)
    assert main(["caption", "--profile", "smoke", *names]) == 0
    assert [Path(line.split("  ")[0]).name for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize("command", ["run --list", "run --dry-run", "check"])
def test_a_closed_pipe_ends_quietly(command, results_root):
    run = subprocess.Popen([sys.executable, "-u", "-m", "dl", *command.split(), "--profile", "smoke"], cwd=REPO,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait(120) == 141


def test_caption_ends_quietly_when_the_pipe_is_closed(said, tmp_path, monkeypatch):
    path = wav(tmp_path / "long.wav", 60, 8000)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["caption", "--profile", "smoke", str(path)]) == 141


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 2 GiB"), RuntimeError("CUDA out of memory.\nTried to allocate"), KeyError("x"),
    OSError(errno.EIO, "Input/output error"), ZeroDivisionError("division by zero")], ids=name)
def test_whatever_one_file_raises_the_others_are_done_and_the_json_is_whole(said, tmp_path, capsys, error):
    said[:] = [None, error]
    paths = [wav(tmp_path / f"{path}.wav", 1) for path in "abc"]
    assert caption_files.caption_files(paths, get_profile("smoke"), as_json=True) == 1
    out, err = capsys.readouterr()
    assert ["error" in entry for entry in json.loads(out)] == [False, True, False]
    assert err.count("\n") == 1 and str(paths[1]) in err


@pytest.mark.parametrize("error", [FileNotFoundError("no weights"), MemoryError("2 GiB"), KeyboardInterrupt()],
                         ids=name)
def test_the_json_is_whole_when_the_models_cannot_be_had(monkeypatch, capsys, error):
    def none(*_):
        raise error
    monkeypatch.setattr(caption_files, "load_captions", none)
    try:
        assert caption_files.caption_files(["a.wav", "b.wav"], get_profile("smoke"), as_json=True) == 1
        assert [entry["file"] for entry in json.loads(capsys.readouterr().out)] == ["a.wav", "b.wav"]
    except KeyboardInterrupt:
        assert json.loads(capsys.readouterr().out) == []
