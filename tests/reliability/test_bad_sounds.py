"""Sounds that cannot be used, and odd ones that can: each is named with a remedy or heard, those beside it are done.

Every file goes through ``python -m dl caption`` (one line, exit code 1) and the embedding of a folder (``skipped``).
"""
from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from ledger import nobody
from test_caption_files import caption, wav
from torch.nn.functional import normalize

from dl import caption_files
from dl.clap import embed_split
from dl.config import get_profile
from dl.data import CAPTION_COLUMNS, AudioError, load_split, open_audio

CUT = "copy or download it again"
EXPORT = "export"
GIVE = "give a WAV, FLAC, Ogg, Opus or MP3 file"
UNTRUE = "which cannot be true"
Make = Callable[[Path], object]


def noise(seconds: float, rate: int = 48_000, channels: int = 1) -> np.ndarray:
    """A tone with noise, (samples, channels)."""
    samples = round(seconds * rate)
    white = np.random.default_rng(0).standard_normal((samples, channels))
    return 0.3 * np.sin(np.arange(samples) / 20)[:, None] + 0.02 * white


def write(samples: np.ndarray, rate: int = 48_000, **options) -> Make:
    return lambda path: soundfile.write(path, samples, rate, **options)


def cut(share: float = 0.5, **options) -> Make:
    """A sound of 3 s whose file ends early."""
    def make(path: Path) -> None:
        soundfile.write(path, noise(3), 48_000, **options)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return make


def header(rate: int, channels: int = 1) -> Make:
    """A WAV whose header claims a rate and a number of channels."""
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, 2 * channels * rate & 0xFFFFFFFF, 2 * channels, 16)
    body = b"WAVEfmt " + form + b"data" + struct.pack("<I", 9600) + b"\0\1" * 4800
    return lambda path: path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def huge_flac(path: Path) -> None:
    """A FLAC of 1 s whose header claims 2^36 - 1 samples, 256 GB of them."""
    soundfile.write(path, noise(1), 48_000, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def spike(value: float) -> np.ndarray:
    return np.r_[noise(0.5), [[value]], noise(0.5)]


def junk_behind(path: Path) -> None:
    soundfile.write(path, noise(2), 48_000)
    path.write_bytes(path.read_bytes() + b"junk" * 9)


OPUS = {"format": "OGG", "subtype": "OPUS"}
# name of the file: how it is made, what the message says (None: it is heard)
SOUNDS: dict[str, tuple[Make, str | None]] = {
    "zero_bytes.wav": (Path.touch, GIVE),
    "zero_bytes.mp3": (Path.touch, GIVE),
    "one_byte.flac": (lambda path: path.write_bytes(b"f"), GIVE),
    "cut.wav": (cut(), CUT),
    "cut.flac": (cut(), GIVE),
    "cut.mp3": (cut(format="MP3", subtype="MPEG_LAYER_III"), CUT),
    "cut.opus": (cut(**OPUS), CUT),
    "cut.ogg": (cut(format="OGG", subtype="VORBIS"), CUT),
    "cut_in_header.wav": (cut(0.0001), GIVE),
    "cut_in_header.opus": (cut(0.02, **OPUS), GIVE),
    "nan.wav": (write(spike(np.nan), subtype="FLOAT"), EXPORT),
    "infinite.wav": (write(spike(-np.inf), subtype="FLOAT"), EXPORT),
    "silent.wav": (write(np.zeros(48_000)), "choose another file"),
    "nearly_silent.flac": (write(np.full(48_000, 1e-6), subtype="PCM_24"), "choose another file"),
    "no_samples.wav": (write(np.zeros(0)), "give at least 0.05 s"),
    "one_sample.wav": (write(np.array([0.5])), "give at least 0.05 s"),
    "letter.wav": (lambda path: path.write_text("Dear reader, this is not a sound."), GIVE),
    "picture.mp3": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500)), GIVE),
    "page.wav": (lambda path: path.write_text("<html><body>404 Not Found</body></html>"), GIVE),
    "broken_link.wav": (lambda path: path.symlink_to(path.parent / "nowhere.wav"), "a link that leads nowhere"),
    "link_to_itself.wav": (lambda path: path.symlink_to(path), GIVE),
    "folder.wav": (Path.mkdir, "name the files in it"),
    "pipe.wav": (os.mkfifo, "is a pipe or a device"),
    "too_many_hertz.wav": (header(2**31 - 1), UNTRUE),
    "one_hertz.wav": (header(1), UNTRUE),
    "too_many_channels.wav": (header(48_000, 1000), UNTRUE),
    "claims_256_gb.flac": (huge_flac, GIVE),
    "8_khz.wav": (write(noise(2, 8000), 8000), None),
    "192_khz.wav": (write(noise(2, 192_000), 192_000), None),
    "six_channels.wav": (write(noise(2, 44_100, 6), 44_100), None),
    "clipped.wav": (write(3 * noise(2), subtype="FLOAT"), None),
    "bytes_behind.wav": (junk_behind, None),
    **dict.fromkeys(["with space.wav", "Vögel 雨 🐦.wav", "line\nend.wav", "quote\"';$(x)`.wav", "-rf.wav"],
                    (write(noise(2)), None)),
    "one_hour.flac": (lambda path: soundfile.write(path, np.tile(noise(10, 8000), (360, 1)), 8000), None),
}
each_sound = pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "one_hour.flac" else name for name in SOUNDS])


class Vectors:
    """Stands for an encoder: a vector depends on the samples, or on the caption's length, alone."""

    embed_dim, weights_sha256, dtype = 8, "toy", torch.float32

    def embed_audio(self, waveforms) -> torch.Tensor:
        assert all(0 < len(waveform) <= 480_000 and np.abs(waveform).max() > 0 for waveform in waveforms)
        return self.rows(int(np.abs(waveform).sum()) for waveform in waveforms)

    def embed_text(self, captions) -> torch.Tensor:
        return self.rows(map(len, captions))

    def rows(self, seeds) -> torch.Tensor:
        drawn = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return normalize(torch.stack(drawn), dim=1)


@each_sound
def test_caption_names_it_and_does_the_others(tmp_path, monkeypatch, capsys, ledger, name):
    monkeypatch.setattr(caption_files, "load_captions", lambda *_: lambda waveforms: ["a sound"] * len(waveforms))
    make, words = SOUNDS[name]
    path, before, after = tmp_path / name, wav(tmp_path / "before.wav", 2), wav(tmp_path / "after.wav", 2)
    make(path)
    with ledger.attempt("bad input", "sound to caption"):
        code = caption(before, path, after)
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("caption: ")]
        done = [line.split("  ")[0] for line in out.splitlines()]
        assert str(before) in done and str(after) in done, "the others were not done"
        assert "Traceback" not in err
        if words is None:
            assert (code, lines) == (0, []) and str(path).replace("\n", r"\n") in done
        else:
            assert code == 1 and len(lines) == 1 and name in lines[0] and words in lines[0]


def folder_of(tmp_path: Path, name: str, make: Make) -> Path:
    """An AudioCaps folder of two good clips and, between them, the odd one."""
    (tmp_path / "audio").mkdir()
    stem, _, suffix = name.rpartition(".")
    make(tmp_path / f"audio/{stem}_0.{suffix}")
    for good in ("before", "after"):
        soundfile.write(tmp_path / f"audio/{good}_0.wav", noise(1), 48_000)
    rows = [(str(row), clip, "0", f"A tone {clip}") for row, clip in enumerate(["before", stem, "after"])]
    pd.DataFrame(rows, columns=CAPTION_COLUMNS).to_csv(tmp_path / "val.csv", index=False)
    return tmp_path


@each_sound
def test_the_embedding_names_it_and_goes_on(results_root, tmp_path, ledger, name):
    make, words = SOUNDS[name]
    profile = get_profile("paper", data_dir=folder_of(tmp_path, name, make))
    with ledger.attempt("bad input", "sound to embed"):
        split = load_split(profile, "val")
        e = embed_split(profile, split, Vectors(), progress=False)
        told = [*e.skipped, *split.missing]
        assert [clip for clip in e.clip_ids if clip in ("before_0", "after_0")] == ["before_0", "after_0"]
        assert torch.isfinite(e.audio).all() and len(e.audio) == len(e.clip_ids)
        if words is None:
            assert told == [] and len(e.clip_ids) == 3
        else:
            assert len(e.clip_ids) == 2 and len(told) == 1 and name.rpartition(".")[0] in told[0]
            assert words in told[0] or split.missing


def test_a_sound_that_begins_with_ten_silent_seconds(results_root, tmp_path, ledger):
    """CLAP hears 10 s: what is silent there cannot be embedded, whatever comes later."""
    late = np.r_[np.zeros((48_000 * 11, 1)), noise(1)]
    profile = get_profile("paper", data_dir=folder_of(tmp_path, "late.wav", write(late)))
    with ledger.attempt("bad input", "sound to embed"):
        e = embed_split(profile, load_split(profile, "val"), Vectors(), progress=False)
        assert e.clip_ids == ["before_0", "after_0"] and len(e.skipped) == 1 and "late_0: silent" in e.skipped[0]


def test_a_sound_that_may_not_be_read(open_folder, ledger):
    path, good = wav(open_folder / "secret.wav", 2), wav(open_folder / "good.wav", 2)
    path.chmod(0)
    with ledger.attempt("bad input", "sound to caption"), nobody():
        with pytest.raises(AudioError, match=r"secret\.wav: may not be read \(permission denied\); change its mode"):
            open_audio(path).__enter__()
        with open_audio(good) as file:
            assert file.frames == 32_000
