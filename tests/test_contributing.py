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
RECIPES = {title: re.findall(r"```(?:python|toml)\n# ([^\n]+)\n(.*?)```", text, re.DOTALL) for title, text in
           re.findall(r"\*\*(A peer method|An encoder)\.\*\*(.*?)(?=\n\*\*A|\Z)", SECTION, re.DOTALL)}
SET_UP = """
import numpy as np
import torch
from torch.nn.functional import normalize
from dl.config import get_profile
profile = get_profile("mini", bootstrap_samples=50, max_clips={"train": 24, "val": 24, "test": 24})
"""
CHECKS = {
    "A peer method": """
from dl.clap import Embeddings
from dl.data import load_split
from dl.experiments import score_table
from dl.report import write_table1
from dl.store import MetricsFile
split = load_split(profile, "test")
def embeddings(name, seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(48, 16, generator=generator)
    audio = text.view(24, 2, 16).mean(1) + torch.randn(24, 16, generator=generator) + 1
    of = torch.arange(24).repeat_interleave(2)
    return Embeddings(name, split.clip_ids[:24], normalize(audio, dim=1), normalize(text, dim=1), of, ["a"] * 48, [])
_, rows = score_table(profile, ["raw", "half_shift"], embeddings("train", 0), embeddings("test", 1), split)
MetricsFile(profile).add(rows)
table = write_table1(profile).set_index("system")
assert set(table.index) == {"raw", "half_shift"}
assert float(table.pair_cosine["half_shift"]) != float(table.pair_cosine["raw"])
assert table.parameters["half_shift"] == 32 and table.uses_pairs["half_shift"] == "no"
""",
    "An encoder": """
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


def follow(where: str, lines: str, root: Path) -> None:
    """"FILE" or "FILE, then ..." appends to a file or makes it; "FILE, above NAME" and "FILE, in NAME" insert."""
    name, _, place = where.partition(", ")
    path = root / name
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not place or place.startswith("then"):
        path.write_text((text.rstrip("\n") + "\n\n\n" if text else "") + lines, encoding="utf-8")
        return
    how, target = place.split(" ")
    line, = re.findall(rf"^{target}\b.*\n", text, re.MULTILINE)          # exactly one: no list stands in two places
    path.write_text(text.replace(line, f"{lines}\n\n{line}" if how == "above" else line + lines), encoding="utf-8")


@pytest.mark.parametrize("recipe", CHECKS)
def test_the_three_steps_are_enough(recipe, tmp_path):
    shutil.copytree(REPO / "dl", tmp_path / "dl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / "data").symlink_to(REPO / "data")
    settings = tmp_path / "my.toml"
    settings.write_text("[mini]\n")

    def python(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "DL_RESULTS": str(tmp_path / "results"),
                                    "DL_SETTINGS": str(settings)}
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
                              timeout=300, env=environment)

    assert python("-c", SET_UP + CHECKS[recipe]).returncode != 0, "the check must fail before the steps are done"
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
    steps = RECIPES[recipe]
    assert len(steps) == 3
    touched = {where.partition(",")[0] for where, _ in steps} - {settings.name}
    if recipe == "An encoder":
        settings.unlink()
    for where, lines in steps:
        follow(where, lines, tmp_path)
    done = python("-c", SET_UP + CHECKS[recipe])
    assert done.returncode == 0, done.stderr
    style = python("-m", "ruff", "check", "--no-cache", *touched)
    assert style.returncode == 0, style.stdout


def test_a_language_model_is_a_setting(tmp_path, monkeypatch):
    name, table = re.search(r"Write `(\w+) = \"\.\.\.\"` under\s+`\[([\w.]+)\]`", SECTION).groups()
    (tmp_path / "my.toml").write_text(f'[{table}]\n{name} = "somebody/some-llama"\n')
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "my.toml"))
    assert get_profile("mini").captioner.language_model == "somebody/some-llama"
