"""data/mini: what is in it, what never crosses its splits, and that scenes come out the same; files that cannot be used."""
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
    check_waveform,
    ids_sha256,
    load_split,
    mix_scene,
    read_audio,
    read_captions,
    read_recording,
    recording_files,
    source_stem,
)

DATA = REPO / "data/mini"
CORPUS = SimpleNamespace(**runpy.run_path(str(DATA / "build_corpus.py")))        # leaves no __pycache__ among the data
ALLOWED_LICENCES = {"CC0-1.0", "CC-BY-3.0", "CC-BY-SA-3.0", "CC-BY-SA-4.0", "LAL-1.2", "MIT", "LicenseRef-public-domain"}


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
def captions() -> dict[str, pd.DataFrame]:
    return {split: read_captions(DATA / f"{split}.csv") for split in SPLITS}


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    return {split: load_split(get_profile("mini"), split) for split in SPLITS}


# ------------------------------------------------------------------------------------------------------------- the corpus
def test_columns_and_counts(scenes, captions, splits):
    for split, n_scenes in CORPUS.SCENE_COUNTS.items():
        assert captions[split].columns.tolist() == CAPTION_COLUMNS
        assert (scenes.split == split).sum() == n_scenes == len(splits[split]) == captions[split].youtube_id.nunique()
    assert CORPUS.SCENE_COUNTS == {"train": 6000, "val": 500, "test": 600}
    assert scenes.youtube_id.is_unique
    every_id = pd.concat(captions.values()).audiocap_id
    assert every_id.is_unique and every_id.str.fullmatch(r"\d+").all()


def test_captions_per_clip(splits):
    for split in ("val", "test"):
        assert {len(texts) for texts in splits[split].captions} == {5}
    assert {len(texts) for texts in splits["train"].captions} == {1, 2, 3, 4, 5}
    for split in splits.values():
        assert all(len(set(texts)) == len(texts) for texts in split.captions), "an annotator repeats another"


def test_recordings_never_cross_splits(recordings, scenes):
    home = dict(zip(recordings.clip_id, recordings.split, strict=True))
    for split, cell in zip(scenes.split, scenes.recordings, strict=True):
        assert {home[clip_id] for clip_id in cell.split(";")} == {split}
    assert recordings.clip_id.is_unique and recordings.file.is_unique and recordings.sha256.is_unique


def test_every_recording_file_is_the_one_of_the_csv(recordings):
    wrong = [row.file for row in recordings.itertuples() if hashlib.sha256((DATA / "recordings" / row.file).read_bytes()).hexdigest() != row.sha256]
    assert wrong == []
    on_disk = {path.relative_to(DATA / "recordings").as_posix() for path in (DATA / "recordings").rglob("*.opus")}
    assert on_disk == set(recordings.file)


def test_licences_allow_passing_on_and_are_written_down(recordings):
    parts = {part for licence in recordings.licence for part in licence.split(" AND ")}
    assert parts <= ALLOWED_LICENCES
    text = (DATA / "recordings/LICENCES.md").read_text(encoding="utf-8")
    for licence, count in recordings.licence.value_counts().items():
        assert f"| {licence} | {count} |" in text
    for package, count in recordings.source_package.value_counts().items():
        assert re.search(rf"^\| {re.escape(package)} \|.*\| {count} \|$", text, re.MULTILINE), package
    assert recordings.attribution.str.strip().ne("").all()


def test_soundfont_renderings_are_counted(recordings):
    assert len(recordings) == 996
    assert recordings.source_path.str.contains(".sf2!", regex=False).sum() == 206


def test_label_sets_of_scenes(scenes):
    sets = scenes.labels.map(lambda cell: frozenset(cell.split(";")))
    assert (sets.map(len) == scenes.labels.map(lambda cell: len(cell.split(";")))).all(), "a scene holds a label twice"
    for split in ("val", "test"):
        assert sets[scenes.split == split].is_unique


def test_labels_are_those_of_the_recordings(recordings, scenes, labels):
    label = dict(zip(recordings.clip_id, recordings.label, strict=True))
    assert [";".join(label[clip_id] for clip_id in cell.split(";")) for cell in scenes.recordings] == scenes.labels.tolist()
    assert set(labels.label) == set(recordings.label)


def test_seen_and_shares_source(recordings, scenes):
    train = recordings[recordings.split == "train"]
    known, stems = set(train.label), set(map(source_stem, train.source_package, train.source_path))
    stem = dict(zip(recordings.clip_id, map(source_stem, recordings.source_package, recordings.source_path), strict=True))
    for row in scenes.itertuples():
        assert row.seen == str(int(set(row.labels.split(";")) <= known)), row.youtube_id
        shares = "" if row.split == "train" else str(int(any(stem[clip_id] in stems for clip_id in row.recordings.split(";"))))
        assert row.shares_source == shares, row.youtube_id
    counts = scenes[scenes.split == "test"].groupby(["seen", "shares_source"]).size()
    assert (counts > 50).all() and len(counts) == 4, "every group of test is large enough to be reported"


def test_source_stem():
    assert source_stem("game", "a/hen_01.ogg") == source_stem("game", "a/hen_12.ogg")
    assert source_stem("game", "a/hen_01.ogg") != source_stem("other", "a/hen_01.ogg")
    assert source_stem("font", "x.sf2!bank=0,program=56,note=45") == source_stem("font", "x.sf2!bank=0,program=56,note=60")
    assert source_stem("font", "x.sf2!bank=0,program=56,note=45") != source_stem("font", "x.sf2!bank=0,program=57,note=45")


# ----------------------------------------------------------------------------------------------------------- held-out phrasings
def connectives() -> list[str]:
    """The words between the events of the held-out templates."""
    pieces = (piece for templates in CORPUS.HELDOUT_TEMPLATES.values() for text in templates for piece in re.split(r"\{\w\}", text))
    return sorted({piece for piece in pieces if piece.strip(" ,")}, key=len)


@pytest.fixture(scope="module")
def heldout_marks(labels):
    """A function: held-out paraphrases and connectives in a caption; words that stand inside a label's own text are no connective."""
    paraphrases, pieces = labels.paraphrase_2.str.lower().tolist(), connectives()
    shadows = [phrase for form in ("clause", "progressive", "nominal", "paraphrase_1") for phrase in labels[form].str.lower() if " against " in phrase]

    def marks(caption: str) -> list[str]:
        text = caption.lower()
        found = [phrase for phrase in paraphrases if phrase in text]
        for phrase in shadows:
            text = text.replace(phrase, "")
        return found + [piece for piece in pieces if piece in text]

    return marks


def test_heldout_phrasings_never_in_train(captions, labels, heldout_marks):
    text = "\n".join(captions["train"].caption).lower()
    assert [phrase for phrase in labels.paraphrase_2.str.lower() if phrase in text] == []
    present = [piece for piece in connectives() if piece in text]
    assert set(present) <= {" against "}, "only a label speaks of something against something"
    assert [caption for caption in captions["train"].caption if " against " in caption.lower() and heldout_marks(caption)] == []


def test_heldout_captions_are_the_marked_ones(splits, heldout_marks):
    for split in ("val", "test"):
        for texts, cell in zip(splits[split].captions, splits[split].frame.heldout_captions, strict=True):
            marked = [int(place) for place in cell.split(";")]
            assert len(marked) == 1
            assert [number for number, text in enumerate(texts, 1) if heldout_marks(text)] == marked, texts
    assert set(splits["train"].frame.heldout_captions) == {""}


# -------------------------------------------------------------------------------------------------------------------- scenes
# split, place, samples, root mean square, peak; the last scene is cut at its end
MIXED = [
    ("train", 11, 111_936, 0.065940, 0.76290),
    ("train", 22, 61_440, 0.062046, 0.55147),
    ("test", 1, 407_088, 0.146551, 0.71849),
    ("val", 0, 480_000, 0.042476, 0.57709),
]


@pytest.mark.parametrize(("split", "place", "samples", "rms", "peak"), MIXED)
def test_mix_scene_is_what_it_was(splits, split, place, samples, rms, peak):
    waveform = splits[split].waveform(place)
    assert waveform.dtype == np.float32 and waveform.shape == (samples,)
    assert np.sqrt(np.mean(waveform.astype(np.float64) ** 2)) == pytest.approx(rms, rel=1e-3)
    assert np.abs(waveform).max() == pytest.approx(peak, rel=5e-3)
    assert np.array_equal(waveform, splits[split].waveform(place))


def scene(**cells: str) -> pd.Series:
    return pd.Series({"recordings": "x", "offsets_s": "0", "gains_db": "0", "noise_dbfs": "-200", "seconds": "1", "noise_seed": "0", **cells})


def test_mix_scene_adds_at_offset_and_gain():
    ones = np.full(SAMPLING_RATE // 10, 0.25, np.float32)
    mix = mix_scene(scene(recordings="x;y", offsets_s="0.2;0.25", gains_db="0;-6.0206"), lambda clip_id: ones)
    assert [round(float(mix[round(s * SAMPLING_RATE)]), 4) for s in (0.1, 0.22, 0.27, 0.32, 0.4)] == [0, 0.25, 0.375, 0.125, 0]
    assert len(mix) == SAMPLING_RATE


def test_mix_scene_scales_down_what_would_clip_and_fades_a_cut():
    long = np.full(2 * SAMPLING_RATE, 0.9, np.float32)
    mix = mix_scene(scene(recordings="x;y", offsets_s="0;0", gains_db="0;0"), lambda clip_id: long)
    assert np.abs(mix).max() == pytest.approx(1) and mix[0] == pytest.approx(1)
    assert abs(mix[-1]) < 1e-6 and mix[-480] == pytest.approx(0.5, abs=0.01), "20 ms of linear fade"
    assert np.array_equal(long, np.full(2 * SAMPLING_RATE, 0.9, np.float32)), "the recording itself is left alone"


def test_mix_scene_noise_has_its_level_and_its_seed():
    first, again, other = (mix_scene(scene(noise_dbfs="-40", noise_seed=seed), lambda clip_id: np.zeros(100, np.float32)) for seed in ("1", "1", "2"))
    assert 20 * np.log10(first.std()) == pytest.approx(-40, abs=0.1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_write_corpus_reproduces_the_shipped_bytes(tmp_path):
    (tmp_path / "recordings").mkdir()
    for name in ("recordings.csv", "labels.csv"):
        shutil.copy(DATA / "recordings" / name, tmp_path / "recordings" / name)
    CORPUS.write_corpus(tmp_path)
    for name in ("scenes.csv", "train.csv", "val.csv", "test.csv"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_build_scenes_says_when_label_sets_run_out(recordings):
    few = recordings[recordings.split == "val"].drop_duplicates("label").head(2)
    assert len(CORPUS.build_scenes(pd.concat([recordings[recordings.split == "train"], few]), "val", 3)) == 3      # a, b and a + b
    with pytest.raises(ValueError, match="only 3 of 4 scenes of split 'val'"):
        CORPUS.build_scenes(pd.concat([recordings[recordings.split == "train"], few]), "val", 4)


# -------------------------------------------------------------------------------------------------------------- captions and splits
@pytest.mark.parametrize(("text", "message"), [
    ("audiocap_id,youtube_id,caption\n1,a,A dog barks\n", "column start_time is missing"),
    ("audiocap_id,youtube_id,start_time,caption\n1,a,0,A dog barks\n1,b,0,A cat meows\n", "audiocap_id 1 stands 2 times"),
    ("audiocap_id,youtube_id,start_time,caption\n1,a,0,A dog barks\n2,b,0, \n", "row 3 has an empty caption"),
])
def test_read_captions_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(path)
    assert str(path) in str(caught.value)


def test_read_captions_takes_a_byte_order_mark_and_keeps_strings(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("\ufeffaudiocap_id,youtube_id,start_time,caption\n007,--NA,030,null\n", encoding="utf-8")
    assert read_captions(path).iloc[0].tolist() == ["007", "--NA", "030", "null"]
    with pytest.raises(FileNotFoundError, match="val.csv is missing: it must hold the columns audiocap_id"):
        read_captions(tmp_path / "val.csv")


def test_load_split_of_smoke_is_the_beginning_of_mini(splits):
    smoke = get_profile("smoke")
    for name, n_clips in smoke.max_clips.items():
        split = load_split(smoke, name)
        assert len(split) == n_clips
        assert split.clip_ids == splits[name].clip_ids[:n_clips] and split.captions == splits[name].captions[:n_clips]
        assert split.clusters == [tuple(cell.split(";")) for cell in split.frame.recordings]
    with pytest.raises(ValueError, match="unknown split 'dev': choose one of train, val, test"):
        load_split(smoke, "dev")


def test_ids_sha256_sees_order_and_membership():
    assert ids_sha256(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()
    assert len({ids_sha256(ids) for ids in (["a", "b"], ["b", "a"], ["a"], ["ab"])}) == 4


def audiocaps(folder: Path) -> Path:
    """A folder in AudioCaps' layout: three clips, one of them absent; 007 keeps its leading zero."""
    rows = [("1", "abc", "30", "A dog barks"), ("2", "abc", "30", "A dog is barking"), ("3", "-x_y", "0", "Rain falls"), ("4", "gone", "7", "Wind blows")]
    pd.DataFrame(rows, columns=CAPTION_COLUMNS).to_csv(folder / "test.csv", index=False)
    (folder / "audio/sub").mkdir(parents=True)
    tone = 0.1 * np.sin(np.arange(16_000) / 10)
    soundfile.write(folder / "audio/abc_30.wav", tone, 16_000)
    soundfile.write(folder / "audio/sub/-x_y_0.flac", tone, 16_000)
    return folder


def test_load_split_of_audiocaps_goes_on_with_what_is_there(tmp_path):
    profile = get_profile("paper", data_dir=audiocaps(tmp_path))
    split = load_split(profile, "test")
    assert split.clip_ids == ["abc_30", "-x_y_0"] and split.missing == ("gone_7",)
    assert split.captions == [["A dog barks", "A dog is barking"], ["Rain falls"]]
    assert split.clusters == [("abc",), ("-x_y",)]
    assert split.waveform(1).shape == (SAMPLING_RATE,), "16 kHz comes out at 48 kHz"
    shutil.rmtree(tmp_path / "audio")
    with pytest.raises(FileNotFoundError, match="none of the 3 clips of split 'test' is there: looked for"):
        load_split(profile, "test")


# -------------------------------------------------------------------------------------------------------------------- audio files
def test_read_audio_gives_mono_float32_at_48_khz(tmp_path):
    stereo = np.stack([np.full(22_050, 0.5), np.full(22_050, -0.1)], 1)
    soundfile.write(tmp_path / "s.wav", stereo, 44_100)
    waveform = read_audio(tmp_path / "s.wav")
    assert waveform.dtype == np.float32 and waveform.shape == (24_000,)
    assert waveform[12_000] == pytest.approx(0.2, abs=1e-3)


def unusable(folder: Path) -> dict[str, tuple[Path, str]]:
    """Kind of file -> (path, what the message must say)."""
    cases = {
        "absent": (folder / "absent.wav", "no such file"),
        "empty": (folder / "empty.wav", "not readable as audio"),
        "text": (folder / "text.wav", "not readable as audio"),
        "nan": (folder / "nan.wav", "NaN or infinite"),
        "silent": (folder / "silent.wav", "silent"),
        "one sample": (folder / "one.wav", "1 samples at 48000 Hz are too short"),
        "no samples": (folder / "none.wav", "0 samples at 48000 Hz are too short"),
    }
    cases["empty"][0].write_bytes(b"")
    cases["text"][0].write_text("this is no sound")
    soundfile.write(cases["nan"][0], np.r_[np.full(9000, 0.1), np.nan], 48_000, subtype="FLOAT")
    soundfile.write(cases["silent"][0], np.zeros(48_000), 48_000)
    soundfile.write(cases["one sample"][0], np.array([0.5]), 48_000)
    soundfile.write(cases["no samples"][0], np.zeros(0), 48_000)
    return cases


@pytest.mark.parametrize("kind", ["absent", "empty", "text", "nan", "silent", "one sample", "no samples"])
def test_read_audio_names_the_file_and_the_reason(tmp_path, kind):
    path, reason = unusable(tmp_path)[kind]
    with pytest.raises(AudioError, match=reason) as caught:
        read_audio(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_check_waveform_refuses_two_channels():
    with pytest.raises(AudioError, match=r"clip 3: expected mono samples of shape \(samples,\), got \(2, 9000\)"):
        check_waveform(np.ones((2, 9000)), 48_000, "clip 3")


def test_recordings_decode_to_what_the_csv_says(recordings):
    files = recording_files(DATA)
    for row in recordings.iloc[::100].itertuples():
        waveform = read_recording(files[row.clip_id])
        assert len(waveform) / SAMPLING_RATE == pytest.approx(float(row.seconds), abs=0.002)
        assert 0.5 < np.abs(waveform).max() < 1, "the peak was set to 0.708 before Opus"
