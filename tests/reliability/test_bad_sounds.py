"""Sounds that cannot be used, and odd ones that can: each is named with a remedy or heard, and the sounds beside it are done.

Every file goes through both doors: ``python -m dl caption`` (one clear line, exit code 1) and the embedding of an AudioCaps folder
(named in ``skipped``).
"""
from __future__ import annotations

import os
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

from dl import caption_files as files
from dl.clap import embed_split
from dl.config import get_profile
from dl.data import CAPTION_COLUMNS, AudioError, load_split, open_audio

CUT = "copy or download it again"
EXPORT = "export"
GIVE = "give a WAV, FLAC, Ogg, Opus or MP3 file"


def noise(seconds: float, rate: int = 48_000, channels: int = 1) -> np.ndarray:
    """A tone with noise, (samples, channels)."""
    samples = round(seconds * rate)
    return 0.3 * np.sin(np.arange(samples) / 20)[:, None] + 0.02 * np.random.default_rng(0).standard_normal((samples, channels))


def cut(path: Path, share: float = 0.5, **options) -> Path:
    """A sound of 3 s whose file ends early."""
    soundfile.write(path, noise(3), 48_000, **options)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def write(samples: np.ndarray, rate: int = 48_000, **options) -> Callable[[Path], object]:
    return lambda path: soundfile.write(path, samples, rate, **options)


def header(path: Path, rate: int, channels: int = 1, frames: int = 4800) -> None:
    """A WAV whose header claims a rate and a number of channels."""
    data = b"\0\1" * frames
    path.write_bytes(b"RIFF" + (36 + len(data)).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little") + (1).to_bytes(2, "little")
                     + channels.to_bytes(2, "little") + rate.to_bytes(4, "little") + (2 * channels * rate & 0xFFFFFFFF).to_bytes(4, "little")
                     + (2 * channels & 0xFFFF).to_bytes(2, "little") + (16).to_bytes(2, "little") + b"data" + len(data).to_bytes(4, "little") + data)


def huge_flac(path: Path) -> None:
    """A FLAC of 1 s whose header claims 2^36 - 1 samples, 256 GB of them."""
    soundfile.write(path, noise(1), 48_000, format="FLAC")
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F
    content[22:26] = b"\xff\xff\xff\xff"
    path.write_bytes(content)


def spike(value: float) -> np.ndarray:
    samples = noise(1)
    samples[24_000] = value
    return samples


# name of the file: how it is made, what the message says (None: it is heard)
SOUNDS: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "zero_bytes.wav": (Path.touch, GIVE),
    "zero_bytes.mp3": (Path.touch, GIVE),
    "one_byte.flac": (lambda path: path.write_bytes(b"f"), GIVE),
    "cut.wav": (cut, CUT),
    "cut.flac": (cut, GIVE),
    "cut.mp3": (lambda path: cut(path, format="MP3", subtype="MPEG_LAYER_III"), CUT),
    "cut.opus": (lambda path: cut(path, format="OGG", subtype="OPUS"), CUT),
    "cut.ogg": (lambda path: cut(path, format="OGG", subtype="VORBIS"), CUT),
    "cut_in_header.wav": (lambda path: cut(path, 0.0001), GIVE),
    "cut_in_header.opus": (lambda path: cut(path, 0.02, format="OGG", subtype="OPUS"), GIVE),
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
    "too_many_hertz.wav": (lambda path: header(path, 2**31 - 1), "which cannot be true"),
    "one_hertz.wav": (lambda path: header(path, 1), "which cannot be true"),
    "too_many_channels.wav": (lambda path: header(path, 48_000, 1000), "which cannot be true"),
    "claims_256_gb.flac": (huge_flac, GIVE),
    "8_khz.wav": (write(noise(2, 8000), 8000), None),
    "192_khz.wav": (write(noise(2, 192_000), 192_000), None),
    "six_channels.wav": (write(noise(2, 44_100, 6), 44_100), None),
    "clipped.wav": (write(3 * noise(2), subtype="FLOAT"), None),
    "bytes_behind.wav": (lambda path: (soundfile.write(path, noise(2), 48_000), path.write_bytes(path.read_bytes() + b"junk" * 9)), None),
    "with space.wav": (write(noise(2)), None),
    "Vögel 雨 🐦.wav": (write(noise(2)), None),
    "line\nend.wav": (write(noise(2)), None),
    "quote\"';$(x)`.wav": (write(noise(2)), None),
    "-rf.wav": (write(noise(2)), None),
}
ONE_HOUR = {"one_hour.flac": (write(np.tile(noise(10, 8000), (360, 1)), 8000), None)}


class Vectors:
    """Stands for an encoder: a vector depends on the samples, or on the caption's length, alone."""

    embed_dim, weights_sha256, dtype = 8, "toy", torch.float32

    def embed_audio(self, waveforms) -> torch.Tensor:
        assert all(0 < len(waveform) <= 480_000 and np.abs(waveform).max() > 0 for waveform in waveforms)
        return self.rows(int(np.abs(waveform).sum()) for waveform in waveforms)

    def embed_text(self, captions) -> torch.Tensor:
        return self.rows(map(len, captions))

    def rows(self, seeds) -> torch.Tensor:
        return normalize(torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]), dim=1)


@pytest.fixture
def models(monkeypatch) -> None:
    """Models that say how much they heard, in place of the real ones, which take seconds to load."""
    monkeypatch.setattr(files, "load_captions", lambda *_: lambda waveforms: [f"{len(waveform)} samples" for waveform in waveforms])


def shown(name: str) -> str:
    """A file name as ``printable`` shows it."""
    return name.replace("\n", r"\n")


@pytest.mark.parametrize("name", [*SOUNDS, pytest.param("one_hour.flac", marks=pytest.mark.slow)])
def test_caption_names_it_and_does_the_others(models, tmp_path, capsys, ledger, name):
    make, words = (SOUNDS | ONE_HOUR)[name]
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
            assert (code, lines) == (0, []) and shown(str(path)) in done
        else:
            assert code == 1 and len(lines) == 1 and shown(name) in lines[0] and words in lines[0]


def folder_of(tmp_path: Path, name: str, make: Callable[[Path], object]) -> Path:
    """An AudioCaps folder of two good clips and, between them, the odd one."""
    (tmp_path / "audio").mkdir()
    stem, _, suffix = name.rpartition(".")
    make(tmp_path / f"audio/{stem}_0.{suffix}")
    for good in ("before", "after"):
        soundfile.write(tmp_path / f"audio/{good}_0.wav", noise(1), 48_000)
    rows = [(str(row), clip, "0", f"A tone {clip}") for row, clip in enumerate(["before", stem, "after"])]
    pd.DataFrame(rows, columns=CAPTION_COLUMNS).to_csv(tmp_path / "val.csv", index=False)
    return tmp_path


@pytest.mark.parametrize("name", [*SOUNDS, pytest.param("one_hour.flac", marks=pytest.mark.slow)])
def test_the_embedding_names_it_and_goes_on(results_root, tmp_path, ledger, name):
    make, words = (SOUNDS | ONE_HOUR)[name]
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
    late = np.r_[np.zeros(48_000 * 11), noise(1)[:, 0]]
    profile = get_profile("paper", data_dir=folder_of(tmp_path, "late.wav", write(late)))
    with ledger.attempt("bad input", "sound to embed"):
        e = embed_split(profile, load_split(profile, "val"), Vectors(), progress=False)
        assert e.clip_ids == ["before_0", "after_0"] and len(e.skipped) == 1 and "late_0: silent" in e.skipped[0]


def test_a_sound_that_may_not_be_read(open_folder, ledger):
    path, good = wav(open_folder / "secret.wav", 2), wav(open_folder / "good.wav", 2)
    path.chmod(0)
    with ledger.attempt("bad input", "sound to caption"):
        with nobody(), pytest.raises(AudioError, match=r"secret\.wav: may not be read \(permission denied\); change its mode or owner"), open_audio(path):
            pass
        with nobody(), open_audio(good) as file:
            assert file.frames == 32_000
