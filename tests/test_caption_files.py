"""``python -m dl caption``: any rate, length and channels; a file that fails is named and the others are done."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_captioner import tiny_language_model
from torch.nn.functional import normalize

from dl import caption_files as files
from dl.__main__ import main
from dl.bridge import DiffusionLink
from dl.caption_files import clock, printable, read_windows
from dl.captioner import LLMCaptioner
from dl.config import REPO, BridgeConfig, CaptionerConfig
from dl.data import AudioError, read_audio

DIM = 256                # mini-CLAP's


def wav(path: Path, seconds: float, rate: int = 16_000, channels: int = 1,
        silent: tuple[float, float] = (0, 0), subtype: str = "PCM_16") -> Path:
    """A tone with some noise, other for every file name; silent between two times."""
    time = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(len(path.name))
    sound = 0.3 * np.sin(2 * np.pi * 440 * time)[:, None] + 0.05 * rng.standard_normal((len(time), channels))
    sound[(time >= silent[0]) & (time < silent[1])] = 0
    soundfile.write(path, sound, rate, subtype=subtype)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A results folder with a bridge and a captioner, both untrained and tiny."""
    root = tmp_path_factory.mktemp("results")
    config = CaptionerConfig(language_model=str(tiny_language_model(tmp_path_factory.mktemp("llama"))),
                             projector_width=16, max_new_tokens=6, dtype="float32")
    folder = root / "smoke/checkpoints"
    LLMCaptioner(DIM, config).save_pretrained(folder / "captioner")
    torch.manual_seed(0)
    DiffusionLink.from_config(BridgeConfig(num_blocks=1), DIM).save_pretrained(folder / "bridge")
    return root


class Encoder:
    """Stands for mini-CLAP, which takes a second a window: the vector depends on the samples alone."""

    embed_dim = DIM

    @classmethod
    def from_pretrained(cls, name: str) -> Encoder:
        assert name == "mini"
        return cls()

    def embed_audio(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        assert all(wave.dtype == np.float32 and 0.05 * 48_000 <= len(wave) <= 480_000 for wave in waveforms)
        seeds = [torch.Generator().manual_seed(int(np.abs(wave).sum())) for wave in waveforms]
        return normalize(torch.stack([torch.randn(DIM, generator=seed) for seed in seeds]), dim=1)


@pytest.fixture
def quick(checkpoints, monkeypatch) -> Path:
    monkeypatch.setenv("DL_RESULTS", str(checkpoints))
    monkeypatch.setattr(files, "ClapEncoder", Encoder)
    return checkpoints


def caption(*arguments: object) -> int:
    return main(["caption", "--profile", "smoke", *map(str, arguments)])


# ------------------------------------------------------------------------------------------------------------- windows
@pytest.mark.parametrize("seconds, expected", [
    (0.3, [(0, 0.3)]), (10, [(0, 10)]), (10.9, [(0, 10)]), (11, [(0, 10), (10, 11)]),
    (25.5, [(0, 10), (10, 20), (20, 25.5)]),
])
def test_windows_of_ten_seconds_and_what_is_left(tmp_path, seconds, expected):
    windows = list(read_windows(wav(tmp_path / "a.wav", seconds, 8000)))
    assert [(start, round(end, 6)) for start, end, _ in windows] == expected
    lengths = [(end - start) * 48_000 for start, end in expected]
    assert [len(samples) for _, _, samples in windows] == pytest.approx(lengths, abs=2)


@pytest.mark.parametrize("rate, channels", [(11_025, 2), (44_100, 6), (48_000, 1), (96_000, 3)])
def test_any_rate_and_number_of_channels(tmp_path, rate, channels):
    path = wav(tmp_path / "a.wav", 12.25, rate, channels)
    (_, _, first), (_, end, second) = read_windows(path)
    whole = read_audio(path)
    assert end == pytest.approx(12.25, abs=1e-3) and len(first) == 480_000 and first.dtype == np.float32
    assert np.allclose(first[1000:-1000], whole[1000:479_000], atol=1e-3)          # apart from the resampler's edges
    assert np.allclose(second[1000:-1000], whole[481_000: 480_000 + len(second) - 1000], atol=1e-3)


def test_a_silent_window_is_marked_and_a_silent_file_refused(tmp_path):
    windows = list(read_windows(wav(tmp_path / "a.wav", 30, silent=(10, 20))))
    assert [samples is None for _, _, samples in windows] == [False, True, False]
    with pytest.raises(AudioError, match=r"b\.wav: silent .*; choose another file"):
        list(read_windows(wav(tmp_path / "b.wav", 15, silent=(0, 15))))


# --------------------------------------------------------------------------------------------------------- the command
def test_files_that_fail_are_named_and_the_others_done(quick, tmp_path, capsys):
    good, long = wav(tmp_path / "good.wav", 3, 22_050, 2), wav(tmp_path / "longer one.wav", 21, 44_100)
    letter = tmp_path / "letter.wav"
    letter.write_text("Dear reader")
    assert caption(good, tmp_path / "gone.wav", letter, long) == 1
    out, err = capsys.readouterr()
    assert [line.split("  ")[:2] for line in out.splitlines()] == [
        [str(good), "0:00-0:03"], [str(long), "0:00-0:10"], [str(long), "0:10-0:20"], [str(long), "0:20-0:21"]]
    lines = [line for line in err.splitlines() if line.startswith("caption: ")]
    assert len(lines) == 2 and "gone.wav: no such file; give" in lines[0]
    assert "letter.wav: not readable as audio" in lines[1]
    assert caption(good) == 0
    again, err = capsys.readouterr()
    assert again == out.splitlines(keepends=True)[0], "a file's captions depend on what stands beside it"


def test_json_is_one_list(quick, tmp_path, capsys):
    good = wav(tmp_path / "good.wav", 30, silent=(10, 20))
    assert caption("--json", tmp_path / "gone.wav", good) == 1
    entries = json.loads(capsys.readouterr().out)
    assert entries[0]["file"] == str(tmp_path / "gone.wav") and entries[0]["error"].startswith("no such file; give")
    assert [(e["file"], e["start_s"], e["end_s"]) for e in entries[1:]] == [
        (str(good), start, start + 10) for start in (0, 10, 20)]
    assert (entries[2]["caption"], entries[2]["note"]) == (None, "silent")
    assert all(isinstance(e["caption"], str) for e in (entries[1], entries[3]))
    assert caption(good) == 0
    assert "0:10-0:20  (silent)" in capsys.readouterr().out


def test_the_bridge_can_be_left_out(quick, tmp_path, capsys, monkeypatch):
    path = wav(tmp_path / "a.wav", 100)
    outputs = []
    for arguments in ([path], ["--no-bridge", path]):
        assert caption(*arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert len(outputs[0].splitlines()) == 10 and outputs[0] != outputs[1]

    def never(*_):
        raise AssertionError("the bridge was loaded")
    monkeypatch.setattr(files.DiffusionLink, "from_pretrained", never)
    assert caption("--no-bridge", path) == 0


def test_many_windows_go_through_in_batches(quick, tmp_path, capsys, monkeypatch):
    path = wav(tmp_path / "a.wav", 75, 8000)
    assert caption(path) == 0
    at_once = capsys.readouterr().out
    monkeypatch.setattr(files, "BATCH", 3)
    sizes = []
    embed = Encoder.embed_audio
    monkeypatch.setattr(Encoder, "embed_audio", lambda self, waves: sizes.append(len(waves)) or embed(self, waves))
    assert caption("--no-bridge", path) == 0
    assert sizes == [3, 3, 2] and len(at_once.splitlines()) == 8


def test_what_came_before_a_damaged_end_keeps_its_captions(quick, tmp_path, capsys):
    samples = np.full(16_000 * 22, 0.1)
    samples[16_000 * 15] = np.inf
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert caption(tmp_path / "a.wav") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "0:00-0:10" in out and "NaN or infinite" in err


def test_names_with_control_characters_do_no_harm(quick, tmp_path, capsys):
    name = "a\nb\x1b[31mc\udcff.wav"
    wav(tmp_path / "plain.wav", 1).rename(tmp_path / name)
    assert caption(tmp_path / name, tmp_path / "gone\x07.wav") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and r"a\nb\x1b[31mc\udcff.wav" in out
    assert r"gone\x07.wav: no such file" in err and not {"\x1b", "\x07"} & set(out + err)
    assert caption("--json", tmp_path / name) == 0
    assert json.loads(capsys.readouterr().out)[0]["file"] == str(tmp_path / name)


@pytest.mark.parametrize("name, stage", [("captioner", "07"), ("bridge", "05")])
def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, monkeypatch, capsys, checkpoints, name, stage):
    monkeypatch.setenv("DL_RESULTS", str(tmp_path))
    folder = tmp_path / "smoke/checkpoints"
    folder.mkdir(parents=True)
    other = {"captioner": "bridge", "bridge": "captioner"}[name]
    (folder / other).symlink_to(checkpoints / "smoke/checkpoints" / other)
    assert caption("whatever.wav") == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"caption: the {name} of profile smoke is missing")
    assert f"./run_all.sh --profile smoke --only {stage}" in err


def test_checkpoints_of_another_encoder_are_refused(quick, monkeypatch, capsys):
    monkeypatch.setattr(Encoder, "embed_dim", 512)
    assert caption("whatever.wav") == 1
    assert "takes vectors of 256 numbers, the encoder mini gives 512: make it anew" in capsys.readouterr().err


def test_the_command_with_the_real_encoder(checkpoints, tmp_path):
    path = wav(tmp_path / "a.wav", 10.5, 32_000, 2)
    words = ["-m", "dl", "caption", "--profile", "smoke", "--json", str(path), str(tmp_path / "gone.wav")]
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, cwd=REPO,
                          env=os.environ | {"DL_RESULTS": str(checkpoints)})
    fields = [sorted(entry) for entry in json.loads(done.stdout)]
    assert done.returncode == 1 and fields == [["caption", "end_s", "file", "start_s"], ["error", "file"]]
    assert done.stderr.splitlines()[-1].endswith("no such file; give a WAV, FLAC, Ogg, Opus or MP3 file")


def test_clock_and_printable():
    times = [clock(seconds) for seconds in (0, 7, 10.54, 599.96, 3725)]
    assert times == ["0:00", "0:07", "0:10.5", "10:00", "1:02:05"]
    assert printable("Vögel, 雨") == "Vögel, 雨" and printable("a\tb\u202e") == r"a\tb\u202e"
