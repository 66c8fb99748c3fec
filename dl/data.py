"""Clips, captions and sounds: AudioCaps' CSVs and folders, the scenes of ``data/mini``, and sound files of any kind.

A sound file's header is checked before memory is asked for. libsndfile reads a file that is cut off as a shorter
sound, without a word, so the end is compared with what the header announces.
"""
from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
import soxr
import torch

from dl.config import AUDIO_SUFFIXES, OTHER_SUFFIXES, SPLITS, Profile
from dl.store import content, sha256_file

SAMPLING_RATE = 48_000              # Hz, CLAP's input rate [paper~]
SILENCE = 1e-5                      # [ours] peak, -100 dBFS; below it a clip holds nothing to embed
SHORTEST_S = 0.05                   # [ours] less than this cannot be embedded
READ_S = 30                         # [ours] no more is read of an AudioCaps file: CLAP hears 10 s
FADE_S = 0.02                       # s, where a recording is cut at the end of its scene
MIXED = ["recordings", "offsets_s", "gains_db", "noise_dbfs", "seconds", "noise_seed"]      # the cells of a mix
MIX_RECIPE = 1                      # goes up when a row of scenes.csv gives another sound (tests/test_recipes.py)
MANIFEST_BYTES = 200_000_000        # sound files of a split up to this size count by their content
RATES = range(1_000, 768_001)       # Hz [ours]; a header beyond it, or with more channels, is damaged
MOST_CHANNELS = 64                  # [ours]
UNKNOWN_FRAMES = 1 << 40            # a header that does not know its length gives more than this
DECODER_DELAY = 529                 # samples ahead of an MP3 that libsndfile drops only where a frame says so
UNKNOWN_LENGTH = 0x7FFF0000         # bytes; a WAV from a pipe announces about this or more: "until the end"
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)   # libsndfile's log
FORMATS = "give a WAV, FLAC, Ogg, Opus or MP3 file"
AGAIN = "copy or download it again"

CAPTION_COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]   # AudioCaps' own
PUBLISHED: dict[str, dict] = {      # captions and clips a split; train has one caption a clip in v1, val and test five
    "v1": {"train": (49_838, 49_838), "val": (2_475, 495), "test": (4_875, 975)},      # 2019
    "v2": {"train": (91_256, None), "val": (2_475, 495), "test": (4_875, 975)},        # February 2025
}
GET = """train.csv, val.csv and test.csv from the repository cdjkim/audiocaps (folder dataset) into {folder}/
                 the clips: aac-datasets-download --root {folder} audiocaps --subsets train val test
                 or your own, named <youtube_id>_<start_time>.wav (.flac, .mp3, .opus, ...), into {folder}/audio/"""
SIZE = "about 43 GB as 32 kHz FLAC"
LICENCE = "captions: academic use only; the clips belong to those who uploaded them"
OVERLAP = ("LAION-CLAP's training data hold AudioCaps' training clips and AudioSet, from which all of AudioCaps is "
           "taken: the encoder knows the test clips better than it would know others")


class AudioError(ValueError):
    """A sound that cannot be used; the message names the file and the reason."""


class EndlessMp3(io.FileIO):
    """An MP3 file that claims a size beyond any sound, so that libsndfile reads until the real end."""

    at_end = False

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at_end = (offset, whence) == (0, 2)
        return super().seek(offset, whence)

    def tell(self) -> int:
        return 1 << 50 if self.at_end else super().tell()


def is_bare_mp3(path: str | Path) -> bool:
    """Whether the first frame of an MP3 does not say how many follow (Xing, Info or VBRI; [peer: LAME, Fraunhofer]).

    libsndfile then guesses from the file's size: too many with a cover picture, too few with a variable bit rate.
    """
    with open(path, "rb") as file:
        tag = file.read(10)
        is_tagged = tag[:3] == b"ID3" and len(tag) == 10
        file.seek(10 + (tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9]) if is_tagged else 0)
        first = file.read(64)
    is_mp3 = len(first) > 1 and first[0] == 0xFF and first[1] & 0xE6 == 0xE2       # MPEG layer III
    return is_mp3 and not any(word in first for word in (b"Xing", b"Info", b"VBRI"))


@contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open any file that soundfile understands; AudioError says what is wrong with it, also inside the block."""
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder; name the files in it" if os.path.isdir(path) else f"pipe or a device, not a file; {FORMATS}"
        raise AudioError(f"{path}: is a {kind}")
    name = Path(os.fsdecode(path))
    try:
        source = EndlessMp3(path) if is_bare_mp3(path) else os.fsencode(path)      # bytes: a name need not be UTF-8
        with soundfile.SoundFile(source) as file:
            if file.samplerate not in RATES or file.channels > MOST_CHANNELS:
                raise AudioError(f"{path}: its header says {file.samplerate} Hz and {file.channels} channels, "
                                 "which cannot be true; export it again")
            if file.frames >= UNKNOWN_FRAMES:                       # else soundfile would seek behind the last block
                file.seekable = lambda: False
            if isinstance(source, EndlessMp3):
                file.read(DECODER_DELAY)
            yield file
    except PermissionError:
        raise AudioError(f"{path}: may not be read (permission denied); change its mode or owner") from None
    except FileNotFoundError:
        reason = "is a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise AudioError(f"{path}: {reason}; {FORMATS}") from None
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, MemoryError) as error:
        if name.suffix.lower() in OTHER_SUFFIXES:
            raise AudioError(f"{path}: not a format that soundfile reads; "
                             f"convert it: ffmpeg -i {path} {name.with_suffix('.wav')}") from None
        reason = " ".join(str(error).split()).replace(repr(os.fsencode(path)), "it")[:120]
        raise AudioError(f"{path}: not readable as audio ({reason}); {FORMATS}") from None


def check_end(path: str | Path, file: soundfile.SoundFile, count: int) -> None:
    """AudioError if a file that ended after ``count`` frames announces over 0.1 s and 1 % more, or lacks its end."""
    expected = file.frames
    if found := ANNOUNCED.search(file.extra_info):
        announced, present = map(int, found.groups())
        if present < announced < UNKNOWN_LENGTH:
            expected = round(count * announced / max(present, 1))
    ends = f"{path}: is cut off after {count / file.samplerate:.1f} s"
    if 0 <= expected < UNKNOWN_FRAMES and expected - count > max(0.1 * file.samplerate, 0.01 * expected):
        raise AudioError(f"{ends} of {expected / file.samplerate:.1f} s; {AGAIN}")
    if file.format == "OGG":
        page = Path(os.fsdecode(path)).read_bytes()[-65_307:].rpartition(b"OggS")[2]        # no page is longer
        if len(page) < 2 or not page[1] & 4:                        # the last page's flag, after the version
            raise AudioError(f"{ends}, its last page is missing; {AGAIN}")


def read_audio(path: str | Path, seconds: float | None = None) -> np.ndarray:
    """Read any file soundfile understands, or its first ``seconds``, as mono float32 (samples,) at 48 kHz in [-1, 1].

    Channels are averaged; other rates are resampled by soxr (HQ). Memory follows what is in the file, not its header.

    Raises:
        AudioError: unreadable, cut off, empty, too short, silent or not finite; the message names the file.
    """
    with open_audio(path) as file:
        wanted = float("inf") if seconds is None else seconds * file.samplerate
        pieces, count = [np.empty(0, np.float32)], 0
        while count < wanted:
            piece = file.read(int(min(1 << 16, wanted - count)), dtype="float32", always_2d=True)
            if not len(piece):
                check_end(path, file, count)
                break
            pieces.append(piece.mean(axis=1))                       # (samples, channels) -> (samples,)
            count += len(piece)
        return check_waveform(np.concatenate(pieces), file.samplerate, str(path))


def check_waveform(waveform: np.ndarray, sampling_rate: int, name: str = "waveform") -> np.ndarray:
    """Return ``waveform`` (samples,) as float32 at 48 kHz, or say why it cannot be used.

    It is an array, tensor or list of floats in about [-1, 1], or of a file's integers, whose full scale becomes 1.

    Raises:
        AudioError: not one-dimensional, empty, shorter than 0.05 s, silent, or with NaN or infinite samples.
    """
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu()
        waveform = (waveform.float() if waveform.is_floating_point() else waveform).numpy()
    waveform = np.asarray(waveform)
    if waveform.dtype.kind in "iu":
        full = 2.0 ** (8 * waveform.dtype.itemsize - 1)
        waveform = (waveform - (full if waveform.dtype.kind == "u" else 0)) / full
    if waveform.dtype.kind != "f":
        raise AudioError(f"{name}: samples of type {waveform.dtype}; give floats in [-1, 1] or integers")
    waveform = waveform.astype(np.float32)
    if waveform.ndim != 1:
        raise AudioError(f"{name}: expected mono samples of shape (samples,), got {waveform.shape}; "
                         "average the channels")
    if len(waveform) < SHORTEST_S * sampling_rate:
        raise AudioError(f"{name}: {len(waveform)} samples at {sampling_rate} Hz are too short; "
                         f"give at least {SHORTEST_S} s")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; export the file again")
    if np.abs(waveform).max() < SILENCE:
        raise AudioError(f"{name}: silent (peak below -100 dBFS); choose another file")
    if sampling_rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, sampling_rate, SAMPLING_RATE)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a CSV in UTF-8, with or without a byte order mark, every cell a string; blank lines do not count.

    The csv module reads it: pandas takes an unquoted comma in the first caption for a column of row names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no CSV in UTF-8, a column is missing, or a row has more or fewer cells than the header.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it must hold the columns {','.join(columns)}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not in UTF-8 (byte {error.start}); save it as 'CSV UTF-8'") from None
    except csv.Error as error:
        raise ValueError(f"{path}: is not a CSV ({error}); put cells with quotes or line ends in quotes "
                         "and double the quotes inside") from None
    if absent := [column for column in columns if column not in header]:
        raise ValueError(f"{path}: column {', '.join(absent)} is missing; the columns are {','.join(columns)}")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}; "
                             "put a caption with commas in quotes")
    return pd.DataFrame(rows, columns=header, dtype=str)


def read_captions(path: Path) -> pd.DataFrame:
    """Read a CSV in AudioCaps' columns, every cell a string; errors are those of :func:`read_table`.

    ValueError names the row: no rows, an id twice, an empty id or caption.
    """
    frame = read_table(path, CAPTION_COLUMNS)
    if frame.empty:
        raise ValueError(f"{path}: holds no captions, only its header; give at least one row")
    if repeated := frame.audiocap_id[frame.audiocap_id.duplicated()].tolist():
        count = frame.audiocap_id.eq(repeated[0]).sum()
        raise ValueError(f"{path}: audiocap_id {repeated[0]} stands {count} times; ids are unique")
    for what, wrong in (("an empty caption", frame.caption.str.strip().eq("")),
                        ("no youtube_id or no start_time", frame.youtube_id.eq("") | frame.start_time.eq(""))):
        if wrong.any():
            raise ValueError(f"{path}: row {int(wrong.idxmax()) + 2} has {what}; fill it in or remove the row")
    return frame


def clip_ids_of(frame: pd.DataFrame) -> pd.Series:
    """``<youtube_id>_<start_time>`` of every row; a start in whole seconds where a table has made 30.0 of 30."""
    return frame.youtube_id + "_" + frame.start_time.str.replace(r"[.]0+$", "", regex=True)


def count_rows(path: Path) -> tuple[int, set[str]]:
    """The number of captions in a CSV, and the ids of its clips; errors are those of :func:`read_captions`."""
    frame = read_captions(path)
    return len(frame), set(clip_ids_of(frame))


def find_audiocaps(data_dir: Path) -> tuple[dict[str, Path], Path]:
    """The CSVs by split and the folder of the clips, as we or aac-datasets lay them out; else where they should be."""
    bases = [data_dir, data_dir / "AUDIOCAPS"]
    places = [base / below for base in bases for below in ("", "csv_files_v1", "csv_files_v2")]
    tables = {}
    for split in SPLITS:
        names = [place / f"{split}{end}.csv" for place in places for end in ("", "_v2")]
        tables[split] = next((path for path in names if path.is_file()), names[0])
    rates = [path for base in bases for path in base.glob("audio_*Hz")]
    rates.sort(key=lambda path: -int("0" + re.sub(r"\D", "", path.name)))                  # the highest first
    folders = [path for path in [*(base / "audio" for base in bases), *rates] if path.is_dir()]
    return tables, folders[0] if folders else data_dir / "audio"


def find_clips(folder: Path, clip_ids: Iterable[str]) -> tuple[dict[str, Path], str]:
    """The clips that are in a folder or below it, links followed, by the names that downloaders give them: id -> file.

    Where none is there, the second value says a name that was looked for and three that are there; else it is "".
    """
    files: dict[str, Path] = {}
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        below[:] = sorted(name for name in below if os.path.realpath(os.path.join(place, name)) not in seen)
        for path in (Path(place, name) for name in sorted(names)):
            if path.suffix.lower() in AUDIO_SUFFIXES:
                files[path.stem] = path
            elif path.suffix.lower() in OTHER_SUFFIXES:              # only where soundfile reads no other
                files.setdefault(path.stem, path)
    clip_ids, found = list(clip_ids), {}
    for clip_id in clip_ids:
        video, _, start = clip_id.rpartition("_")
        end = int(start) + 10 if start.isdecimal() else ""
        names = [clip_id, f"Y{clip_id}", f"{clip_id}_{end}", f"{clip_id}.0", f"{clip_id}.000",
                 f"{video}_{start}000", f"{video}_{start}000_{end}000"]
        if name := next((name for name in names if name in files), None):
            found[clip_id] = files[name]
    there = ", ".join(path.name for path in [*files.values()][:3]) or "no sound"
    told = f"looked for {clip_ids[0]}.wav (.flac, .mp3, .opus, ...), there is {there}" if clip_ids else ""
    return found, "" if found else told


def differences(data_dir: Path) -> tuple[str, list[str]]:
    """The version that has about as many training captions, and how each split differs from it, a line each."""
    counts = {split: count_rows(path) for split, path in find_audiocaps(data_dir)[0].items()}
    version = min(PUBLISHED, key=lambda name: abs(PUBLISHED[name]["train"][0] - counts["train"][0]))
    lines = []
    for split, (rows, clips) in counts.items():
        counted = zip(("captions", "clips"), (rows, len(clips)), PUBLISHED[version][split], strict=True)
        for what, found, wanted in counted:
            if wanted not in (None, found):
                lines.append(f"{split}.csv has {found:,} {what}, {version} has {wanted:,}")
    return version, lines


@dataclass(frozen=True)
class Split:
    """The clips of one split, in a fixed order.

    Attributes:
        name: train, val or test.
        clip_ids: n unique ids, ``<youtube_id>_<start_time>``.
        captions: n lists of captions (train one to five, val and test five).
        frame: n rows; for ``data/mini`` the scene's row of ``scenes.csv``, else ``youtube_id`` and ``start_time``.
        waveform: ``waveform(i)`` gives clip i as float32 (samples,), mono, 48 kHz; raises :class:`AudioError`.
        missing: ids in the CSV whose audio file is absent; the run goes on without them.
        files: the sound files behind the clips.
    """

    name: str
    clip_ids: list[str]
    captions: list[list[str]]
    frame: pd.DataFrame
    waveform: Callable[[int], np.ndarray]
    missing: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def manifest(self) -> str:
        """Hash of the sound files: of their content, or beyond 200 MB of their sizes and times."""
        readable = [path for path in sorted(set(self.files)) if path.is_file() and os.access(path, os.R_OK)]
        stats = [(path, path.stat()) for path in readable]
        small = sum(stat.st_size for _, stat in stats) <= MANIFEST_BYTES
        return content([f"{path.name} {sha256_file(path) if small else f'{stat.st_size} {stat.st_mtime_ns}'}"
                        for path, stat in stats])

    @property
    def clusters(self) -> list[tuple[str, ...]]:
        """The recordings each clip is made of: the units that the cluster bootstrap resamples."""
        column = "recordings" if "recordings" in self.frame else "youtube_id"
        return [tuple(str(cell).split(";")) for cell in self.frame[column]]


def ids_sha256(clip_ids: list[str]) -> str:
    """SHA-256 of the ids joined by newlines: two scores are comparable only where it is equal."""
    return hashlib.sha256("\n".join(clip_ids).encode()).hexdigest()


def load_split(profile: Profile, split: str) -> Split:
    """The clips of ``split`` ("train", "val" or "test"), at most ``profile.max_clips[split]`` of them.

    Errors are those of :func:`read_captions`; FileNotFoundError also where no sound of the split is on disk.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    tables, folder = find_audiocaps(profile.data_dir)
    rows = read_captions(tables[split])
    rows = rows.assign(clip_id=clip_ids_of(rows))
    captions = rows.groupby("clip_id", sort=False).caption.agg(list)
    if profile.max_clips:
        captions = captions[: profile.max_clips.get(split)]
    rows = rows.drop_duplicates("clip_id").set_index("clip_id").loc[captions.index]
    if (profile.data_dir / "scenes.csv").is_file():
        return _mini_split(profile.data_dir, split, rows, captions)
    on_disk, told = find_clips(folder, captions.index)
    if not on_disk:
        raise FileNotFoundError(f"{folder}: none of the {len(captions)} clips of split '{split}' is there: {told}; "
                                "name the files <youtube_id>_<start_time>")
    present, files = list(on_disk), tuple(on_disk.values())
    return Split(split, present, list(captions[present]), rows.loc[present].reset_index(drop=True),
                 lambda index: read_audio(files[index], READ_S),
                 tuple(clip_id for clip_id in captions.index if clip_id not in on_disk), files)


def _mini_split(data_dir: Path, split: str, rows: pd.DataFrame, captions: pd.Series) -> Split:
    table, restore = data_dir / "scenes.csv", "git checkout -- data/mini"
    scenes = read_table(table, ["youtube_id", *MIXED]).drop_duplicates("youtube_id").set_index("youtube_id")
    if absent := [scene for scene in rows.youtube_id if scene not in scenes.index]:
        raise ValueError(f"{table}: scene {absent[0]} of {split}.csv is not in it; both ship together: {restore}")
    frame = scenes.loc[rows.youtube_id].reset_index()
    files = recording_files(data_dir)

    def waveform(index: int) -> np.ndarray:
        try:
            return mix_scene(frame.iloc[index], lambda clip_id: read_recording(files[clip_id]))
        except AudioError:
            raise
        except (KeyError, ValueError) as error:
            raise AudioError(f"{captions.index[index]}: its row of scenes.csv cannot be mixed ({error}); "
                             f"{restore}") from None

    used = sorted({clip_id for cell in frame.recordings for clip_id in cell.split(";")} & files.keys())
    return Split(split, list(captions.index), list(captions), frame, waveform,
                 files=tuple(files[clip_id] for clip_id in used if files[clip_id].is_file()))


def recording_files(data_dir: Path) -> dict[str, Path]:
    """The Ogg Opus files of ``recordings.csv`` by id; ValueError for one that would lie outside the folder."""
    path = data_dir / "recordings" / "recordings.csv"
    frame = read_table(path, ["clip_id", "file"])
    if outside := [file for file in frame.file if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise ValueError(f"{path}: file {outside[0]!r} leads out of {path.parent}; recordings lie in it")
    return {clip_id: path.parent / file for clip_id, file in zip(frame.clip_id, frame.file, strict=True)}


@lru_cache(maxsize=1024)
def _read_once(path: Path, changed: int) -> np.ndarray:
    return read_audio(path)


def read_recording(path: Path) -> np.ndarray:
    """:func:`read_audio`, remembered: 996 recordings take 440 MB, and each is mixed into many scenes."""
    return _read_once(path, path.stat().st_mtime_ns if path.is_file() else 0)


def mix_scene(scene: pd.Series, read_recording: Callable[[str], np.ndarray]) -> np.ndarray:
    """Mix one row of ``scenes.csv``: one to three recordings in at most 10 s; data/mini/build_corpus.py drew them.

    ``scene`` has the columns ``MIXED``, the first three with several cells joined by ";"; ``read_recording`` gives a
    recording by id as float32 (samples,), mono, 48 kHz. The result is float32 (seconds * 48,000,), peak at most 1:
    sum_i 10^(gain_i / 20) r_i(t - offset_i) + noise, scaled down if it would clip.

    Raises:
        ValueError: a cell that is no number, lists of different lengths, a recording that would start outside.
    """
    samples = round(float(scene.seconds) * SAMPLING_RATE)
    noise = np.random.default_rng(int(scene.noise_seed)).standard_normal(samples, dtype=np.float32)
    mix = noise * np.float32(10 ** (float(scene.noise_dbfs) / 20))
    cells = (scene[column].split(";") for column in MIXED[:3])
    for clip_id, offset, gain in zip(*cells, strict=True):
        start = round(float(offset) * SAMPLING_RATE)
        if not 0 <= start <= samples:
            raise ValueError(f"{clip_id} would start at {offset} s, outside the scene")
        sound = read_recording(clip_id)
        if len(sound) > samples - start:
            sound = sound[: samples - start].copy()
            fade = min(len(sound), round(FADE_S * SAMPLING_RATE))
            sound[len(sound) - fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
        mix[start: start + len(sound)] += sound * np.float32(10 ** (float(gain) / 20))
    return mix / max(1.0, float(np.abs(mix).max()))


def source_stem(source_package: str, source_path: str) -> str:
    """What takes of one source share: package and path without their numbers (of a SoundFont without the note)."""
    is_soundfont = ".sf2!" in source_path
    return f"{source_package}:" + re.sub(r"(?<=note=)\d+" if is_soundfont else r"\d+", "#", source_path)
