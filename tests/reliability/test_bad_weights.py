"""Weights, caches and stamps that are damaged or belong to something else: refused or made anew, each with one line, never used."""
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
from test_caption_files import DIM, caption, checkpoints, quick, wav  # noqa: F401
from test_captioning import data, embeddings, language_model, profile  # noqa: F401

from dl import clap
from dl.bridge import DiffusionLink
from dl.captioner import LLMCaptioner
from dl.clap import ClapEncoder, embed_split, load_embeddings
from dl.config import BridgeConfig, get_profile
from dl.data import load_split
from dl.experiments import Row, caption_rows
from dl.run import STAGES, Run

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Hostile:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return Path.touch, (Path(tempfile.gettempdir(), "reliability-was-unpickled"),)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)


def with_config(**changes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        values = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(json.dumps(values))
    return change


def with_tensors(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)
    return write


def nan_in_the_first(tensors: dict) -> None:
    name = next(name for name, value in tensors.items() if value.ndim == 2)
    tensors[name][0, 0] = float("nan")


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")


REMEDY = "make it (anew )?with|train it again|must be those they were trained with|load it with the version that wrote it|run notebook"

# what was done to a folder of weights
DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:5000]),
    "no bytes": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "a header of a terabyte": huge_header,
    "a flipped header": lambda folder: flip(folder / WEIGHTS, 9),
    "a pickle by another name": lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps(Hostile())),
    "a torch file by another name": lambda folder: torch.save({"a": torch.ones(2)}, folder / WEIGHTS),
    "a text": lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
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


@pytest.mark.parametrize("which", ["bridge", "captioner"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_refused_in_one_line(quick, tmp_path, monkeypatch, capsys, ledger, which, kind):  # noqa: F811
    root = tmp_path / "results"
    shutil.copytree(quick, root)
    monkeypatch.setenv("DL_RESULTS", str(root))
    DAMAGE[kind](root / "smoke/checkpoints" / which)
    with ledger.attempt("bad input", "weights"):
        assert caption(wav(tmp_path / "a.wav", 2)) == 1
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("caption: ")]
        assert out == "" and len(lines) == 1 and "Traceback" not in err
        assert which in lines[0] and re.search(REMEDY, lines[0]), lines[0]
        assert not Path(tempfile.gettempdir(), "reliability-was-unpickled").exists()


@pytest.mark.parametrize("kind", ["truncated", "a pickle by another name", "a tensor less", "a width in words", "an unknown key", "a config that is no JSON"])
@pytest.mark.parametrize("which", ["bridge", "captioner"])
def test_the_library_says_it_too(checkpoints, tmp_path, ledger, which, kind):  # noqa: F811
    """``from_pretrained`` in a program of one's own: the exception names the folder, whatever a library under it said."""
    folder = shutil.copytree(checkpoints / "smoke/checkpoints" / which, tmp_path / which)
    DAMAGE[kind](folder)
    with ledger.attempt("bad input", "weights"), pytest.raises((ValueError, FileNotFoundError), match=REMEDY) as refused:
        {"bridge": DiffusionLink, "captioner": LLMCaptioner}[which].from_pretrained(folder)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_another_width(tmp_path, monkeypatch, quick, capsys, ledger):  # noqa: F811
    """A whole bridge, but for another encoder."""
    root = tmp_path / "results"
    shutil.copytree(quick, root)
    monkeypatch.setenv("DL_RESULTS", str(root))
    DiffusionLink.from_config(BridgeConfig(num_blocks=1), 64).save_pretrained(root / "smoke/checkpoints/bridge")
    with ledger.attempt("bad input", "weights"):
        assert caption(wav(tmp_path / "a.wav", 2)) == 1
        assert "the bridge of profile smoke takes vectors of 64 numbers, the encoder mini gives 256: make it anew with" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["truncated", "no bytes", "a pickle by another name"])
def test_mini_claps_own_weights(tmp_path, monkeypatch, ledger, kind):
    folder = shutil.copytree(clap.MINI_FOLDER, tmp_path / "mini_clap")
    DAMAGE[kind](folder)
    monkeypatch.setitem(clap.ENCODERS, "mini", (clap.ENCODERS["mini"][0], folder))
    with ledger.attempt("bad input", "weights"), pytest.raises(ValueError, match=r"model\.safetensors is damaged \(.*\): git checkout -- data/mini"):
        ClapEncoder.from_pretrained("mini", device="cpu")


@pytest.mark.parametrize("name", ["laion/clap-htsat-unfused", "nobody/nothing", "/nowhere/at/all"])
def test_an_encoder_without_a_network(ledger, name):
    """The tests run with the hub switched off, as on a machine without a network."""
    with ledger.attempt("bad input", "no network"), pytest.raises(FileNotFoundError, match="give a folder made by save_pretrained, or, .* hf download"):
        ClapEncoder.from_pretrained(name, device="cpu")


def test_a_language_model_without_a_network(ledger):
    from dl.captioner import load_language_model

    with ledger.attempt("bad input", "no network"), pytest.raises(ValueError, match="neither a folder of one nor on the hub .*: check the name"):
        load_language_model("nobody/nothing")


# --------------------------------------------------------------------------------------------------------------------- caches
def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("file", ["final", "shard"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "no bytes", "a text"])
def test_damaged_embeddings_are_made_anew(results_root, tmp_path, monkeypatch, capsys, ledger, file, damage):
    """The cache and the shards of a killed run alike; what came out before comes out again, with one line on stderr."""
    folder = audiocaps(tmp_path / "data", rows("1,a,0,A tone"))
    settings = get_profile("paper", data_dir=folder)
    split = load_split(settings, "val")
    if file == "shard":                                        # a run that was killed before it put the shards together
        with monkeypatch.context() as patch:
            patch.setattr(Vectors, "embed_text", killed)
            with pytest.raises(KeyboardInterrupt):
                embed_split(settings, split, Vectors(), progress=False)
        path, = settings.cache_dir.rglob("00000000.safetensors")
    else:
        embed_split(settings, split, Vectors(), progress=False)
        path = settings.cache_dir / "embeddings/val.safetensors"
    whole = path.read_bytes()
    with ledger.attempt("bad input", "cache"):
        path.write_bytes({"flipped": whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], "truncated": whole[:-3], "no bytes": b"", "a text": b"x" * 99}[damage])
        again = embed_split(settings, split, Vectors(), progress=False)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and path.name in err and "damaged" in err and "is made anew" in err
        assert torch.equal(again.audio, Vectors().embed_audio([split.waveform(0)])) and again.captions == ["A tone"]
        assert load_embeddings(settings, "val").clip_ids == ["a_0"]


@pytest.mark.parametrize("content", ["", "[", "{}", '["one"]', "[1, 2, 3]", "\x00"])
def test_damaged_captions_are_generated_anew(profile, capsys, ledger, content):  # noqa: F811
    train, val, test = (embeddings(name) for name in ("train", "val", "test"))
    first = caption_rows(profile, [Row("raw")], 0, train, val, test)
    path, = (profile.cache_dir / "captions").iterdir()
    path.write_text(content)
    capsys.readouterr()
    with ledger.attempt("bad input", "cache"):
        assert caption_rows(profile, [Row("raw")], 0, train, val, test) == first
        assert "are damaged (" in capsys.readouterr().err and json.loads(path.read_text()) == first[Row("raw")]
    assert data(test).clip_ids == test.clip_ids


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"parts": {}}', "null", "\x00"])
def test_a_damaged_stamp_means_that_the_stage_runs(results_root, ledger, content):
    run = Run(get_profile("smoke"))
    path = run.stamp_file("00")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with ledger.attempt("bad input", "cache"):
        assert run.stamp("00") == {} and run.reason(STAGES[0]) == "it has not run yet"
