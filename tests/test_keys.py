"""What names a cached result: data, settings and recipe numbers give another name, the text of the code does not."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import soundfile
import torch

from dl import clap
from dl.clap import ClapEncoder, Embeddings, embed_split, load_embeddings, vectors_key
from dl.config import REPO, BridgeConfig, Profile, get_profile
from dl.data import load_split
from dl.experiments import fit_system, mapping_key
from dl.store import content, key, load_checkpoint, save_checkpoint

NAMING = """
import torch
from dl.clap import Embeddings
from dl.config import get_profile
from dl.experiments import mapping_key
rows = torch.eye(4)
made = Embeddings("train", list("abcd"), rows, rows, torch.arange(4), list("abcd"), [])
print(mapping_key(get_profile("smoke"), "diffusion_link", made, 0).digest)
"""


@pytest.fixture
def small(tmp_path, results_root) -> Profile:
    """Four scenes a split, with recordings of their own that a test may change."""
    folder = tmp_path / "mini"
    shutil.copytree(REPO / "data/mini", folder, ignore=shutil.ignore_patterns("mini_clap"))
    return get_profile("smoke", data_dir=folder, max_clips={"train": 4, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def encoder() -> ClapEncoder:
    return ClapEncoder.from_pretrained("mini", device="cpu")


def pairs(seed: int) -> Embeddings:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
    rows, names = torch.nn.functional.normalize(rows, dim=1), [f"caption {i}" for i in range(12)]
    return Embeddings("train", names, rows, rows.flip(1), torch.arange(12), names, [])


def test_a_key_shows_its_parts_and_its_digest_follows_them():
    data = key("vectors", 1, crop="first")
    made = key("fit", 2, settings={"b": (1, 2), "a": 1.5}, data=data)
    assert made == {"kind": "fit", "recipe": 2, "settings": {"b": [1, 2], "a": 1.5}, "data": data.digest}
    assert len(made.digest) == 16 and made.digest == key("fit", 2, data=data, settings={"a": 1.5, "b": [1, 2]}).digest
    settings = made["settings"]
    others = [key("fit", 3, settings=settings, data=data), key("fit", 2, settings={}, data=data),
              key("fit", 2, settings=settings, data="x")]
    assert len({made.digest, *(other.digest for other in others)}) == 4
    with pytest.raises(TypeError):
        key("fit", 1, data=torch.ones(2))


def test_content_sees_every_value_shape_and_text():
    rows = torch.arange(6.0)
    arrays = [[rows], [rows.view(2, 3)], [rows.double()], [rows + 1e-6], [rows, ["a"]], [rows, ["a", "b"]],
              [rows, ["ab"]]]
    assert len({content(*those) for those in arrays}) == 7 and content(rows.clone()) == content(rows)


def test_a_checkpoint_of_other_parts_names_them(tmp_path, capsys):
    path = tmp_path / "fit.safetensors"
    save_checkpoint(path, {"w": torch.ones(2)}, {"step": 1}, key("fit", 1, seed=0, data="x"))
    assert load_checkpoint(path, key("fit", 1, seed=0, data="x"))
    assert load_checkpoint(path, key("fit", 2, seed=0, data="y")) is None
    assert "(its data, recipe differ)" in capsys.readouterr().err


def test_other_sounds_captions_or_recipes_give_other_vectors_and_fits(small, encoder, monkeypatch):
    def named() -> str:
        return vectors_key(load_split(small, "train"), encoder).digest

    def embed() -> Embeddings:
        embed_split(small, load_split(small, "train"), encoder, progress=False)
        return load_embeddings(small, "train")

    first, file, before = embed(), small.cache_dir / "embeddings/train.safetensors", named()
    written = file.stat().st_mtime_ns
    assert torch.equal(embed().audio, first.audio) and file.stat().st_mtime_ns == written and named() == before
    table = small.data_dir / "train.csv"
    text = table.read_text()
    header, caption, *others = text.splitlines(keepends=True)
    table.write_text("".join([header, caption.rstrip() + " again\n", *others]))
    assert named() != before
    table.write_text(text)
    assert named() == before
    recording = load_split(small, "train").files[0]
    sound, rate = soundfile.read(recording)
    soundfile.write(recording, sound[::-1], rate, format="OGG", subtype="OPUS")       # another sound by the same name
    changed = embed()
    assert not torch.equal(changed.audio, first.audio) and changed.key != first.key and named() != before
    names = [mapping_key(small, "diffusion_link", e, 0).digest for e in (first, changed)]
    assert names[0] != names[1]
    monkeypatch.setattr(clap, "MIX_RECIPE", 2)
    assert vectors_key(load_split(small, "train"), encoder)["mixing"] == 2


def test_other_data_under_the_same_settings_have_a_fit_of_their_own(tmp_path):
    profile = get_profile("smoke", results_root=tmp_path, bridge=BridgeConfig(train_steps=2, batch_size=4))
    one = fit_system(profile, "diffusion_link", pairs(0))
    for data, fits in ((pairs(1), 2), (pairs(0), 2), (replace(pairs(0), audio=pairs(0).audio.flip(0)), 3)):
        again = fit_system(profile, "diffusion_link", data)
        assert len(list((profile.cache_dir / "fits").iterdir())) == fits
        same = torch.equal(data.audio, pairs(0).audio)
        assert torch.equal(again(pairs(0).audio), one(pairs(0).audio)) == same


@pytest.mark.parametrize("change, same", [("# a comment\nHint = int | None\n", True), ("BRIDGE_RECIPE = 7\n", False)])
def test_only_a_recipe_of_the_code_decides(tmp_path, change, same):
    shutil.copytree(REPO / "dl", tmp_path / "dl")
    shutil.copy(REPO / "pyproject.toml", tmp_path)          # dl wants its repository around it

    def name() -> str:
        return subprocess.run([sys.executable, "-c", NAMING], cwd=tmp_path, capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONPATH": str(tmp_path)}).stdout

    before, module = name(), tmp_path / "dl/train.py"
    module.write_text(module.read_text() + change)
    assert (name() == before) == same
