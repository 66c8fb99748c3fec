"""Inputs as tools, downloaders and people leave them: whole files, odd names, one thing where a list is wanted."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from dl.caption_files import read_windows
from dl.clap import ClapEncoder
from dl.config import get_profile
from dl.data import AudioError, check_waveform, is_bare_mp3, load_split, read_audio

HEAD = "audiocap_id,youtube_id,start_time,caption\n"


def tone(seconds: float, rate: int = 48_000) -> np.ndarray:
    t = np.arange(round(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * 440 * t) + 0.02 * np.random.default_rng(0).standard_normal(len(t))


# --------------------------------------------------------------------------------------------------------- sound files
def unknown_flac(path: Path) -> None:
    """As a pipe leaves it: the number of samples and their checksum are 0, which means unknown."""
    soundfile.write(path, tone(12), 48_000, format="FLAC")
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:42] = bytes(20)
    path.write_bytes(data)


def bare_mp3(path: Path, bitrate_mode: str = "VARIABLE", cover: int = 0, rate: int = 44_100) -> None:
    """Without the frame that says how many follow, and with a cover picture before the sound."""
    soundfile.write(path, tone(12, rate), rate, format="MP3", bitrate_mode=bitrate_mode)
    data = path.read_bytes()
    if b"Xing" in data[:64] or b"Info" in data[:64]:
        data = data[data.index(data[:2], 64):]
    head = b"APIC" + (cover + 14).to_bytes(4, "big") + b"\0\0\0image/jpeg\0\3\0"
    picture = head + bytes(range(1, 251)) * (cover // 250)
    size = bytes(len(picture) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes((b"ID3\3\0\0" + size + picture if cover else b"") + data)


@pytest.mark.parametrize(("make", "options"), [
    (unknown_flac, {}), (bare_mp3, {}), (bare_mp3, {"bitrate_mode": "CONSTANT"}), (bare_mp3, {"cover": 400_000}),
    (bare_mp3, {"bitrate_mode": "CONSTANT", "cover": 400_000}),
    (bare_mp3, {"rate": 22_050}), (bare_mp3, {"rate": 8_000}),
])
def test_a_whole_file_is_heard_whole(tmp_path, make, options):
    make(tmp_path / "sound", **options)
    assert len(read_audio(tmp_path / "sound")) / 48_000 == pytest.approx(12, abs=0.15)
    assert max(end for _, end, _ in read_windows(tmp_path / "sound")) == pytest.approx(12, abs=0.15)


def test_an_mp3_that_knows_its_length_is_left_alone(tmp_path):
    soundfile.write(tmp_path / "a.mp3", tone(2), 48_000)
    assert not is_bare_mp3(tmp_path / "a.mp3")
    (tmp_path / "b.mp3").write_bytes(b"ID3\3\0\0\0\0\0\5abcde" + b"no sound")
    with pytest.raises(AudioError, match="not readable as audio"):
        read_audio(tmp_path / "b.mp3")


def test_a_film_says_how_to_convert_it(tmp_path):
    (tmp_path / "a.m4a").write_bytes(bytes(99))
    with pytest.raises(AudioError, match=r"a format that soundfile reads; convert it: ffmpeg -i .*a\.m4a .*a\.wav"):
        read_audio(tmp_path / "a.m4a")


# ----------------------------------------------------------------------------------------------- AudioCaps' file names
@pytest.mark.parametrize(("name", "start", "there"), [
    ("abc_30.wav", "30", True), ("Yabc_30.wav", "30", True), ("abc_30_40.wav", "30", True),
    ("abc_30.000.wav", "30", True), ("abc_30000.wav", "30", True), ("abc_30.flac", "30.0", True),
    ("deep/er/abc_30.ogg", "30", True), ("abc_30.m4a", "30", True),
    ("103549.wav", "30", False), ("abc.wav", "30", False), ("abc_31.wav", "30", False),
])
def test_a_clip_is_found_or_the_message_shows_what_is_there(tmp_path, name, start, there):
    path = tmp_path / "audio" / name
    path.parent.mkdir(parents=True)
    soundfile.write(tmp_path / "t.wav", tone(1), 48_000)
    (tmp_path / "t.wav").rename(path)
    (tmp_path / "val.csv").write_text(HEAD + f"103549,abc,{start},A tone\n")
    profile = get_profile("paper", data_dir=tmp_path)
    if there:
        assert load_split(profile, "val").clip_ids == ["abc_30"]
    else:
        with pytest.raises(FileNotFoundError, match=rf"looked for abc_30\.wav .* there is {path.name}"):
            load_split(profile, "val")


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "disk").mkdir()
    soundfile.write(tmp_path / "disk/abc_30.wav", tone(1), 48_000)
    (tmp_path / "data/audio").mkdir(parents=True)
    (tmp_path / "data/audio/val").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(tmp_path / "disk")
    (tmp_path / "data/val_v2.csv").write_text(HEAD + "1,abc,30,A tone\n")
    assert load_split(get_profile("paper", data_dir=tmp_path / "data"), "val").clip_ids == ["abc_30"]


# --------------------------------------------------------------------------------------------------- what callers pass
class Toy:
    embed_dim, weights_sha256 = 8, "toy"

    def embed_audio(self, waveforms: list) -> torch.Tensor:
        return F.normalize(torch.tensor([[float(np.abs(w).max())] + [1.0] * 7 for w in waveforms]), dim=1)

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        return F.normalize(torch.ones(len(captions), 8), dim=1)


SOUNDS = {
    "one array": lambda wave: wave, "one tensor": torch.tensor, "batch": lambda wave: wave[None],
    "tensor with a graph": lambda wave: torch.tensor(wave).requires_grad_(),
    "half": lambda wave: wave[None].astype(np.float16), "bfloat16": lambda wave: torch.tensor(wave[None]).bfloat16(),
    "int16": lambda wave: [(wave * 32767).astype(np.int16)], "lists": lambda wave: [wave.tolist()],
    "int32": lambda wave: [(wave * (2**31 - 1)).astype(np.int32)], "tuple": lambda wave: (wave,),
    "uint8": lambda wave: [(wave * 127 + 128).astype(np.uint8)],
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_waveform_of_any_type_is_the_same_sound(kind):
    wave = tone(1).astype(np.float32)
    encoder = ClapEncoder(Toy())
    assert torch.allclose(encoder.embed_audio(SOUNDS[kind](wave)), encoder.embed_audio([wave]), atol=2e-2)


@pytest.mark.parametrize(("method", "given", "words"), [
    ("embed_text", ["a", 3], "list of captions"), ("embed_audio", [0.1, 0.2], "list of waveforms"),
    ("embed_audio", [np.zeros(9600, bool)], "samples of type bool"),
])
def test_what_is_no_sound_or_caption_is_refused(method, given, words):
    with pytest.raises(ValueError, match=words):
        getattr(ClapEncoder(Toy()), method)(given)


def test_one_caption_is_one_row_and_integers_are_scaled_by_their_range():
    assert ClapEncoder(Toy()).embed_text("A dog barks").shape == (1, 8)
    assert np.abs(check_waveform(np.array([-32768, 16384] * 9600, np.int16), 48_000)).max() == 1


# ------------------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(("content", "words"), [
    (b"\xef\xbb\xbf[smoke]\nseeds = [3]\n", ""), (b"[smoke.max_clips]\ntrain = 10\n", ""),
    (b"[smoke]\nseeds = []\n", "seeds is empty"), (b'[smoke]\nmax_clips = "all"\n', "max_clips"),
    (b"[smoke.max_clips]\ntrain = 0\n", "max_clips"),
])
def test_settings_are_taken_as_meant_or_refused(tmp_path, monkeypatch, content, words):
    (tmp_path / "my.toml").write_bytes(content)
    monkeypatch.setenv("DL_SETTINGS", str(tmp_path / "my.toml"))
    if words:
        with pytest.raises(ValueError, match=words):
            get_profile("smoke")
    else:
        profile = get_profile("smoke")
        assert profile.seeds == (3,) or profile.max_clips == {"train": 10}


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DL_RESULTS", "~/out")
    assert get_profile("smoke").results_root == tmp_path / "out"
