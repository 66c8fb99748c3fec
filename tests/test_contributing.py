"""The README's section "Contributing", followed step by step on a copy of the package."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dl.config import REPO, get_profile

SECTION = re.search(r"\n## Contributing\n(.*?)\n## ", (REPO / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
RECIPES = {title: re.findall(r"```(?:python|toml)\n# ([^\n]+)\n(.*?)```", text, re.DOTALL)
           for title, text in re.findall(r"\*\*(A peer method|An encoder)\.\*\*(.*?)(?=\n\*\*A|\Z)", SECTION, re.DOTALL)}

CHECKS = {
    "A peer method": """
from dl.experiments import score_table
from dl.report import write_table1
from dl.store import MetricsFile
scores, rows = score_table(profile, ["raw", "half_shift"], train, test, split)
file = MetricsFile(profile)
file.add(rows)
table = write_table1(profile).set_index("system")
assert set(table.index) == {"raw", "half_shift"}
assert float(table.pair_cosine["half_shift"]) != float(table.pair_cosine["raw"])
assert table.parameters["half_shift"] == 2 * train.audio.shape[1] and table.uses_pairs["half_shift"] == "no"
""",
    "An encoder": """
import numpy as np
import torch
from dl.clap import ClapEncoder
from dl import check
assert profile.encoder == "spectrum" and "SpectrumBackend" in check.encoder(profile)
encoder = ClapEncoder.from_pretrained(profile.encoder)
sound = np.random.default_rng(0).standard_normal((2, 48_000)).astype(np.float32) / 8
audio, text = encoder.embed_audio(sound, 48_000), encoder.embed_text(["a dog barks", "rain falls"])
assert audio.shape == text.shape == (2, encoder.embed_dim) and encoder.weights_sha256
assert all(torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5) for rows in (audio, text))
""",
}
SET_UP = """
import torch
from torch.nn.functional import normalize
from dl.config import get_profile
from dl.data import load_split
from dl.clap import Embeddings
profile = get_profile("mini", bootstrap_samples=50, max_clips={"train": 24, "val": 24, "test": 24})
split = load_split(profile, "test")
def embeddings(name, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(48, 16, generator=generator)
    audio = text.view(24, 2, 16).mean(1) + torch.randn(24, 16, generator=generator) + 1
    return Embeddings(name, split.clip_ids[:24], normalize(audio, dim=1), normalize(text, dim=1), torch.arange(24).repeat_interleave(2), ["a"] * 48, [])
train, test = embeddings("train", 0), embeddings("test", 1)
"""


def follow(steps: list[tuple[str, str]], root: Path) -> None:
    """Do what the blocks say: "FILE" appends to it or makes it, "FILE, above NAME" and "FILE, in NAME" put the lines there."""
    for where, lines in steps:
        name, _, place = where.partition(", ")
        path = root / name
        if not place or place.startswith("then"):
            before = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n\n" if path.is_file() else ""
            path.write_text(before + lines, encoding="utf-8")
            continue
        how, target = place.split(" ")
        text = path.read_text(encoding="utf-8")
        line, = re.findall(rf"^{target}\b.*\n", text, re.MULTILINE)          # exactly one: no list stands in two places
        path.write_text(text.replace(line, f"{lines}\n\n{line}" if how == "above" else line + lines), encoding="utf-8")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(REPO / "dl", root / "dl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", root / "pyproject.toml")
    (root / "data").symlink_to(REPO / "data")
    return root


def python(root: Path, code: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", SET_UP + code], cwd=root, capture_output=True, text=True, check=False, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(root), "DL_RESULTS": str(root / "results"), **more})


def test_every_recipe_has_three_steps():
    assert set(RECIPES) == set(CHECKS)
    for title, steps in RECIPES.items():
        assert len(steps) == 3, title


@pytest.mark.parametrize("recipe", CHECKS)
def test_the_three_steps_are_enough(recipe, copy):
    settings = {"DL_SETTINGS": str(copy / "my.toml")} if recipe == "An encoder" else {}
    (copy / "my.toml").write_text("[mini]\n") if settings else None
    assert python(copy, CHECKS[recipe], **settings).returncode != 0, "the check must fail before the steps are done"
    (copy / "my.toml").unlink(missing_ok=True)
    shutil.rmtree(copy / "results", ignore_errors=True)
    follow(RECIPES[recipe], copy)
    done = python(copy, CHECKS[recipe], **settings)
    assert done.returncode == 0, done.stderr
    touched = {where.partition(",")[0] for where, _ in RECIPES[recipe]} - {"my.toml"}
    style = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", *touched], cwd=copy, capture_output=True, text=True,
                           check=False)
    assert style.returncode == 0, style.stdout


def test_a_language_model_is_a_setting(tmp_path, monkeypatch):
    name, table = re.search(r"Write `(\w+) = \"\.\.\.\"` under\s+`\[([\w.]+)\]`", SECTION).groups()
    (tmp_path / "my.toml").write_text(f'[{table}]\n{name} = "somebody/some-llama"\n')
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "my.toml"))
    assert get_profile("mini").captioner.language_model == "somebody/some-llama"
