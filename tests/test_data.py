"""data/mini: what is in it, what never crosses its splits, that scenes come out the same; tables and sound files."""
from __future__ import annotations

import hashlib
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import soundfile

from dl.config import REPO, SPLITS, get_profile
from dl.data import (
    CAPTION_COLUMNS,
    SAMPLING_RATE,
    AudioError,
    Split,
    load_split,
    mix_scene,
    read_audio,
    read_captions,
    read_recording,
    recording_files,
    source_stem,
)

DATA = REPO / "data/mini"
CORPUS = SimpleNamespace(**runpy.run_path(str(DATA / "build_corpus.py")))        # leaves no __pycache__ in the data
ALLOWED_LICENCES = {"CC0-1.0", "CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "LAL-1.2", "MIT",
                    "LicenseRef-public-domain"}


def read(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / name, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def recordings() -> pd.DataFrame:
    return read("recordings/recordings.csv")


@pytest.fixture(scope="module")
def labels() -> pd.DataFrame:
    return read("recordings/labels.csv")


@pytest.fixture(scope="module")
def scenes() -> pd.DataFrame:
    return read("scenes.csv")


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {split: load_split(get_profile("mini"), split) for split in SPLITS}


# ---------------------------------------------------------------------------------------------------------- the corpus
def test_counts_of_scenes_and_captions(scenes, splits):
    assert CORPUS.SCENE_COUNTS == {"train": 6000, "val": 500, "test": 600} and scenes.youtube_id.is_unique
    for name, split in splits.items():
        assert (scenes.split == name).sum() == CORPUS.SCENE_COUNTS[name] == len(split)
        assert {len(texts) for texts in split.captions} == ({1, 2, 3, 4, 5} if name == "train" else {5})
        assert all(len(set(texts)) == len(texts) for texts in split.captions), "an annotator repeats another"
    every_id = pd.concat(read(f"{split}.csv") for split in SPLITS).audiocap_id
    assert every_id.is_unique and every_id.str.fullmatch(r"\d+").all()


def test_recordings_never_cross_splits_and_a_scene_has_its_recordings_labels(recordings, scenes, labels):
    home = dict(zip(recordings.clip_id, zip(recordings.split, recordings.label, strict=True), strict=True))
    for row in scenes.itertuples():
        own = [home[clip_id] for clip_id in row.recordings.split(";")]
        assert {split for split, _ in own} == {row.split} and [label for _, label in own] == row.labels.split(";")
        assert len(own) == len(set(own)), "a scene holds a label twice"
    sets = scenes.labels.map(lambda cell: frozenset(cell.split(";")))
    assert all(sets[scenes.split == split].is_unique for split in ("val", "test"))
    assert set(labels.label) == set(recordings.label)


def test_every_recording_file_is_the_one_of_the_csv(recordings):
    files = {path.relative_to(DATA / "recordings").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
             for path in (DATA / "recordings").rglob("*.opus")}
    assert files == dict(zip(recordings.file, recordings.sha256, strict=True)) and len(files) == 996
    assert recordings.clip_id.is_unique and recordings.sha256.is_unique


def test_licences_allow_passing_on_and_are_written_down(recordings):
    assert {part for licence in recordings.licence for part in licence.split(" AND ")} <= ALLOWED_LICENCES
    text = (DATA / "recordings/LICENCES.md").read_text(encoding="utf-8")
    for licence, count in recordings.licence.value_counts().items():
        assert f"| {licence} | {count} |" in text
    for package, count in recordings.source_package.value_counts().items():
        assert re.search(rf"^\| {re.escape(package)} \|.*\| {count} \|$", text, re.MULTILINE), package
    assert recordings.attribution.str.strip().ne("").all()


def test_seen_and_shares_source(recordings, scenes):
    train = recordings[recordings.split == "train"]
    known, stems = set(train.label), set(map(source_stem, train.source_package, train.source_path))
    stem_of = map(source_stem, recordings.source_package, recordings.source_path)
    shared = {clip_id for clip_id, stem in zip(recordings.clip_id, stem_of, strict=True) if stem in stems}
    for row in scenes.itertuples():
        assert row.seen == str(int(set(row.labels.split(";")) <= known)), row.youtube_id
        shares = "" if row.split == "train" else str(int(bool(shared & set(row.recordings.split(";")))))
        assert row.shares_source == shares, row.youtube_id
    counts = scenes[scenes.split == "test"].groupby(["seen", "shares_source"]).size()
    assert (counts > 50).all() and len(counts) == 4, "every group of test is large enough to be reported"


def connectives() -> list[str]:
    """The words between the events of the held-out templates."""
    texts = [text for templates in CORPUS.HELDOUT_TEMPLATES.values() for text in templates]
    return sorted({piece for text in texts for piece in re.split(r"\{\w\}", text) if piece.strip(" ,")}, key=len)


@pytest.fixture(scope="module")
def heldout_marks(labels):
    """Held-out paraphrases and connectives in a caption; words inside a label's own text are no connective."""
    paraphrases, pieces = labels.paraphrase_2.str.lower().tolist(), connectives()
    forms = pd.concat([labels[form] for form in ("clause", "progressive", "nominal", "paraphrase_1")]).str.lower()
    shadows = [phrase for phrase in forms if " against " in phrase]

    def marks(caption: str) -> list[str]:
        text = caption.lower()
        found = [phrase for phrase in paraphrases if phrase in text]
        for phrase in shadows:
            text = text.replace(phrase, "")
        return found + [piece for piece in pieces if piece in text]

    return marks


def test_heldout_phrasings_never_in_train(labels, heldout_marks):
    captions = read("train.csv").caption
    text = "\n".join(captions).lower()
    assert [phrase for phrase in labels.paraphrase_2.str.lower() if phrase in text] == []
    present = {piece for piece in connectives() if piece in text}
    assert present <= {" against "}, "only a label speaks of something against something"
    assert [caption for caption in captions if " against " in caption.lower() and heldout_marks(caption)] == []


def test_heldout_captions_are_the_marked_ones(splits, heldout_marks):
    for split in ("val", "test"):
        for texts, cell in zip(splits[split].captions, splits[split].frame.heldout_captions, strict=True):
            marked = [str(number) for number, text in enumerate(texts, 1) if heldout_marks(text)]
            assert marked == [cell], texts
    assert set(splits["train"].frame.heldout_captions) == {""}


def test_write_corpus_reproduces_the_shipped_bytes(tmp_path):
    (tmp_path / "recordings").mkdir()
    for name in ("recordings.csv", "labels.csv"):
        shutil.copy(DATA / "recordings" / name, tmp_path / "recordings" / name)
    CORPUS.write_corpus(tmp_path)
    for name in ("scenes.csv", "train.csv", "val.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


# -------------------------------------------------------------------------------------------------------------- scenes
@pytest.mark.parametrize(("split", "place", "samples", "rms", "peak"), [
    ("train", 11, 111_936, 0.065940, 0.76290), ("train", 22, 61_440, 0.062046, 0.55147),
    ("test", 1, 407_088, 0.146551, 0.71849), ("val", 0, 480_000, 0.042476, 0.57709),      # the last is cut at its end
])
def test_mix_scene_is_what_it_was(splits, split, place, samples, rms, peak):
    waveform = splits[split].waveform(place)
    assert waveform.dtype == np.float32 and waveform.shape == (samples,)
    assert np.sqrt(np.mean(waveform.astype(np.float64) ** 2)) == pytest.approx(rms, rel=1e-3)
    assert np.abs(waveform).max() == pytest.approx(peak, rel=5e-3)
    assert np.array_equal(waveform, splits[split].waveform(place))


def mix(sound: np.ndarray, **cells: str) -> np.ndarray:
    scene = {"recordings": "x", "offsets_s": "0", "gains_db": "0", "noise_dbfs": "-200", "seconds": "1",
             "noise_seed": "0", **cells}
    return mix_scene(pd.Series(scene), lambda clip_id: sound)


def test_mix_scene_adds_at_offset_and_gain():
    ones = np.full(SAMPLING_RATE // 10, 0.25, np.float32)
    mixed = mix(ones, recordings="x;y", offsets_s="0.2;0.25", gains_db="0;-6.0206")
    found = [mixed[round(seconds * SAMPLING_RATE)] for seconds in (0.1, 0.22, 0.27, 0.32, 0.4)]
    assert len(mixed) == SAMPLING_RATE and found == pytest.approx([0, 0.25, 0.375, 0.125, 0], abs=1e-4)


def test_mix_scene_scales_down_what_would_clip_and_fades_a_cut():
    long = np.full(2 * SAMPLING_RATE, 0.9, np.float32)
    mixed = mix(long, recordings="x;y", offsets_s="0;0", gains_db="0;0")
    assert np.abs(mixed).max() == pytest.approx(1) and mixed[0] == pytest.approx(1)
    assert abs(mixed[-1]) < 1e-6 and mixed[-480] == pytest.approx(0.5, abs=0.01), "20 ms of linear fade"
    assert (long == np.float32(0.9)).all(), "the recording itself is left alone"


def test_mix_scene_noise_has_its_level_and_its_seed():
    first, again, other = (mix(np.zeros(100, np.float32), noise_dbfs="-40", noise_seed=seed) for seed in "112")
    assert 20 * np.log10(first.std()) == pytest.approx(-40, abs=0.1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ------------------------------------------------------------------------------------------------- captions and splits

def test_read_captions_takes_a_byte_order_mark_and_keeps_strings(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\ufeffaudiocap_id,youtube_id,start_time,caption\n007,--NA,030,null\n", encoding="utf-8")
    assert read_captions(path).iloc[0].tolist() == ["007", "--NA", "030", "null"]


def test_load_split_of_smoke_is_the_beginning_of_mini(splits):
    smoke = get_profile("smoke")
    for name, count in smoke.max_clips.items():
        split = load_split(smoke, name)
        assert len(split) == count
        assert split.clip_ids == splits[name].clip_ids[:count] and split.captions == splits[name].captions[:count]
        assert split.clusters == [tuple(cell.split(";")) for cell in split.frame.recordings]
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train, val, test"):
        load_split(smoke, "dev")


def test_load_split_of_audiocaps_goes_on_with_what_is_there(tmp_path):
    rows = [("1", "abc", "30", "A dog barks"), ("2", "abc", "30", "A dog is barking"),
            ("3", "-x_y", "0", "Rain falls"), ("4", "gone", "7", "Wind blows")]
    pd.DataFrame(rows, columns=CAPTION_COLUMNS).to_csv(tmp_path / "test.csv", index=False)
    (tmp_path / "audio/sub").mkdir(parents=True)
    for name in ("abc_30.wav", "sub/-x_y_0.flac"):
        soundfile.write(tmp_path / "audio" / name, 0.1 * np.sin(np.arange(16_000) / 10), 16_000)
    profile = get_profile("paper", data_dir=tmp_path)
    split = load_split(profile, "test")
    assert split.clip_ids == ["abc_30", "-x_y_0"] and split.missing == ("gone_7",)
    assert split.captions == [["A dog barks", "A dog is barking"], ["Rain falls"]]
    assert split.clusters == [("abc",), ("-x_y",)]
    assert split.waveform(1).shape == (SAMPLING_RATE,), "16 kHz comes out at 48 kHz"
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(FileNotFoundError, match="none of the 3 clips of split 'test' is there: looked for"):
        load_split(profile, "test")


# --------------------------------------------------------------------------------------------------------- sound files
def test_read_audio_gives_mono_float32_at_48_khz(tmp_path):
    soundfile.write(tmp_path / "s.wav", np.stack([np.full(22_050, 0.5), np.full(22_050, -0.1)], 1), 44_100)
    waveform = read_audio(tmp_path / "s.wav")
    assert waveform.dtype == np.float32 and waveform.shape == (24_000,)
    assert waveform[12_000] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(("content", "reason"), [
    (None, "no such file"), (b"", "not readable as audio"), (b"this is no sound", "not readable as audio"),
    (np.r_[np.full(9000, 0.1), np.nan], "holds NaN or infinite"), (np.zeros(48_000), "silent"),
    (np.array([0.5]), "1 samples at 48000 Hz are too short"), (np.zeros(0), "0 samples at 48000 Hz are too short"),
])
def test_read_audio_names_the_file_and_the_reason(tmp_path, content, reason):
    path = Path(tmp_path / "a.wav")
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        soundfile.write(path, content, 48_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=f"^{path}: {reason}.*$"):
        read_audio(path)


def test_recordings_decode_to_what_the_csv_says(recordings):
    files = recording_files(DATA)
    for row in recordings.iloc[::100].itertuples():
        waveform = read_recording(files[row.clip_id])
        assert len(waveform) / SAMPLING_RATE == pytest.approx(float(row.seconds), abs=0.002)
        assert 0.5 < np.abs(waveform).max() < 1, "the peak was set to 0.708 before Opus"
