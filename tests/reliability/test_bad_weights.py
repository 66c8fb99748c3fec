"""Weights, caches and stamps that are damaged or of something else: refused or made anew, each with one line."""
from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_sounds import Vectors
from test_bad_tables import audiocaps, rows
from test_caption_files import caption, wav
from test_captioning import embeddings

from dl import clap
from dl.bridge import DiffusionLink
from dl.captioner import LLMCaptioner, load_language_model
from dl.clap import ClapEncoder, embed_split, load_embeddings
from dl.config import BridgeConfig, get_profile
from dl.data import load_split
from dl.experiments import Row, caption_rows
from dl.run import STAGES, Run

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TRACE = Path(tempfile.gettempdir(), "reliability-was-unpickled")
REMEDY = "make it (anew )?with|train it again|must be those they were trained|load it with the version|run notebook"


class Hostile:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return Path.touch, (TRACE,)


def with_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def with_config(**changes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def with_tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    return damage


def nan_in_the_first(tensors: dict) -> None:
    next(value for value in tensors.values() if value.ndim == 2)[0, 0] = float("nan")


# what was done to a folder of weights
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": with_bytes(lambda whole: whole[:5000]),
    "no bytes": with_bytes(lambda whole: b""),
    "a header of a terabyte": with_bytes(lambda whole: (2**40).to_bytes(8, "little") + b"{}"),
    "a flipped header": with_bytes(lambda whole: whole[:9] + bytes([whole[9] ^ 0x55]) + whole[10:]),
    "a pickle by another name": with_bytes(lambda whole: pickle.dumps(Hostile())),
    "a torch file by another name": lambda folder: torch.save({"a": torch.ones(2)}, folder / WEIGHTS),
    "a text": with_bytes(lambda whole: b"version https://git-lfs.github.com/spec/v1\n"),
    "a folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "a tensor less": with_tensors(lambda tensors: tensors.pop(min(tensors))),
    "a tensor more": with_tensors(lambda tensors: tensors.update(more=torch.ones(2))),
    "NaN": with_tensors(nan_in_the_first),
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "a config that is no JSON": lambda folder: (folder / CONFIG).write_text("{embed_dim: 256"),
    "a config that is a list": lambda folder: (folder / CONFIG).write_text("[1, 2]"),
    "an unknown key": with_config(depth=3),
    "a width in words": with_config(embed_dim="wide"),
    "another width": with_config(embed_dim=512),
}


@pytest.fixture
def trained(quick, tmp_path, monkeypatch) -> Path:
    """A copy of the trained checkpoints, which the command uses."""
    monkeypatch.setenv("DL_RESULTS", str(tmp_path / "results"))
    return shutil.copytree(quick, tmp_path / "results") / "smoke/checkpoints"


@pytest.mark.parametrize("which", ["bridge", "captioner"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_refused_in_one_line(trained, tmp_path, capsys, ledger, which, kind):
    DAMAGE[kind](trained / which)
    with ledger.attempt("bad input", "weights"):
        assert caption(wav(tmp_path / "a.wav", 2)) == 1
        out, err = capsys.readouterr()
        line, = (line for line in err.splitlines() if line.startswith("caption: "))
        assert out == "" and "Traceback" not in err and which in line and re.search(REMEDY, line), line
        assert not TRACE.exists()


@pytest.mark.parametrize("kind", ["truncated", "a pickle by another name", "a tensor less", "a width in words",
                                  "an unknown key", "a config that is no JSON"])
@pytest.mark.parametrize("which, load", [("bridge", DiffusionLink.from_pretrained),
                                         ("captioner", LLMCaptioner.from_pretrained)])
def test_the_library_says_it_too(trained, ledger, which, load, kind):
    DAMAGE[kind](trained / which)
    with ledger.attempt("bad input", "weights"), pytest.raises((ValueError, OSError), match=REMEDY) as refused:
        load(trained / which)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_another_width(trained, tmp_path, capsys, ledger):
    """A whole bridge, but for another encoder."""
    DiffusionLink.from_config(BridgeConfig(num_blocks=1), 64).save_pretrained(trained / "bridge")
    with ledger.attempt("bad input", "weights"):
        assert caption(wav(tmp_path / "a.wav", 2)) == 1
        assert ("the bridge of profile smoke takes vectors of 64 numbers, the encoder mini gives 256: make it anew"
                in capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["truncated", "no bytes", "a pickle by another name"])
def test_mini_claps_own_weights(tmp_path, monkeypatch, ledger, kind):
    folder = shutil.copytree(clap.MINI_FOLDER, tmp_path / "mini_clap")
    DAMAGE[kind](folder)
    monkeypatch.setitem(clap.ENCODERS, "mini", (clap.ENCODERS["mini"][0], folder))
    damaged = r"model\.safetensors is damaged \(.*\): git checkout -- data/mini"
    with ledger.attempt("bad input", "weights"), pytest.raises(ValueError, match=damaged):
        ClapEncoder.from_pretrained("mini", device="cpu")


@pytest.mark.parametrize("name", ["laion/clap-htsat-unfused", "nobody/nothing", "/nowhere/at/all"])
def test_an_encoder_without_a_network(ledger, name):
    """The tests run with the hub switched off, as on a machine without a network."""
    remedy = "give a folder made by save_pretrained, or, .* hf download"
    with ledger.attempt("bad input", "no network"), pytest.raises(FileNotFoundError, match=remedy):
        ClapEncoder.from_pretrained(name, device="cpu")


def test_a_language_model_without_a_network(ledger):
    remedy = "neither a folder of one nor on the hub .*: check the name"
    with ledger.attempt("bad input", "no network"), pytest.raises(ValueError, match=remedy):
        load_language_model("nobody/nothing")


# ------------------------------------------------------------------------------------------------------------- caches
def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["final", "shard"])
@pytest.mark.parametrize("damage", [lambda whole: whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:],
                                    lambda whole: whole[:-3], lambda whole: b"", lambda whole: b"x" * 99],
                         ids=["flipped", "truncated", "no bytes", "a text"])
def test_damaged_embeddings_are_made_anew(results_root, tmp_path, monkeypatch, capsys, ledger, file, damage):
    """The cache and the shards of a killed run alike: what came out before comes out again, with one line."""
    settings = get_profile("paper", data_dir=audiocaps(tmp_path / "data", rows("1,a,0,A tone")))
    split = load_split(settings, "val")
    if file == "shard":                                  # a run that was killed before it put the shards together
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Vectors, "embed_text", killed)
            embed_split(settings, split, Vectors(), progress=False)
        path, = settings.cache_dir.rglob("00000000.safetensors")
    else:
        embed_split(settings, split, Vectors(), progress=False)
        path = settings.cache_dir / "embeddings/val.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with ledger.attempt("bad input", "cache"):
        again = embed_split(settings, split, Vectors(), progress=False)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and path.name in err and "damaged" in err and "is made anew" in err
        assert torch.equal(again.audio, Vectors().embed_audio([split.waveform(0)])) and again.captions == ["A tone"]
        assert load_embeddings(settings, "val").clip_ids == ["a_0"]


@pytest.mark.parametrize("content", ["", "[", "{}", '["one"]', "[1, 2, 3]", "\x00"])
def test_damaged_captions_are_generated_anew(profile, capsys, ledger, content):
    splits = [embeddings(name) for name in ("train", "val", "test")]
    first = caption_rows(profile, [Row("raw")], 0, *splits)
    path, = (profile.cache_dir / "captions").iterdir()
    path.write_text(content)
    capsys.readouterr()
    with ledger.attempt("bad input", "cache"):
        assert caption_rows(profile, [Row("raw")], 0, *splits) == first
        assert "are damaged (" in capsys.readouterr().err and json.loads(path.read_text()) == first[Row("raw")]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"parts": {}}', "null", "\x00"])
def test_a_damaged_stamp_means_that_the_stage_runs(results_root, ledger, content):
    run = Run(get_profile("smoke"))
    path = run.stamp_file("00")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with ledger.attempt("bad input", "cache"):
        assert run.stamp("00") == {} and run.reason(STAGES[0]) == "it has not run yet"
