"""Sound files, opened with distrust: what a header says is checked before memory is asked for, and a file that is cut off says so.

libsndfile reads a truncated WAV, MP3 or Ogg file without a word, as a shorter sound. Here its end is compared with what it announces.
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

RATES = range(1_000, 768_001)                 # Hz [ours]; a header beyond it is damaged, and resampling it would fill the memory
MOST_CHANNELS = 64                            # [ours] the same
UNKNOWN_LENGTH = 0x7FFF0000                   # bytes; a WAV written into a pipe announces about this or more, and means "until the end"
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)    # libsndfile's log of a header
FORMATS = "give a WAV, FLAC, Ogg, Opus or MP3 file"
UNKNOWN_FRAMES = 1 << 62            # a header that does not know its length says 2^63 - 1


class AudioError(ValueError):
    """A sound that cannot be used; the message names the file and the reason."""


@contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open any file that soundfile understands; an error inside the block counts as the file's.

    Raises:
        AudioError: absent, a folder, not to be read, not audio, a header that cannot be true; the message names the file.
    """
    if os.path.isdir(path):
        raise AudioError(f"{path}: is a folder; name the files in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise AudioError(f"{path}: is a pipe or a device, not a file; {FORMATS}")
    try:
        with open(path, "rb"):                                                     # says "permission denied" where soundfile says "system error"
            pass
        with soundfile.SoundFile(with_length(path) or os.fsencode(path)) as file:   # bytes: a name need not be UTF-8
            if file.frames >= UNKNOWN_FRAMES:                                       # soundfile's seek after each block would fail at the last one
                file.seekable = lambda: False
            if file.samplerate not in RATES or file.channels > MOST_CHANNELS:
                raise AudioError(f"{path}: its header says {file.samplerate} Hz and {file.channels} channels, which cannot be true; export it again")
            yield file
    except PermissionError:
        raise AudioError(f"{path}: may not be read (permission denied); change its mode or owner") from None
    except FileNotFoundError:
        reason = "is a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise AudioError(f"{path}: {reason}; {FORMATS}") from None
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split()).replace(repr(os.fsencode(path)), "it")[:120]
        if Path(os.fsdecode(path)).suffix.lower() in OTHER_SUFFIXES:
            raise AudioError(f"{path}: not a format that soundfile reads; convert it: ffmpeg -i {path} {Path(os.fsdecode(path)).with_suffix('.wav')}") from None
        raise AudioError(f"{path}: not readable as audio ({reason}); {FORMATS}") from None


def read_mono(path: str | Path, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """The samples of a file, channels averaged, at most its first ``seconds``.

    Read piece by piece: memory follows what is in the file, never what its header says.

    Returns:
        (float32 (samples,), sampling rate in Hz).

    Raises:
        AudioError: see :func:`open_audio`; also a file that ends before it should.
    """
    with open_audio(path) as file:
        wanted = float("inf") if seconds is None else seconds * file.samplerate
        pieces, count = [], 0
        while count < wanted and len(piece := file.read(int(min(1 << 16, wanted - count)), dtype="float32", always_2d=True)):
            pieces.append(piece.mean(axis=1))                                       # (samples, channels) -> (samples,)
            count += len(piece)
        if count < wanted:
            check_end(path, file, count)
        return np.concatenate([np.empty(0, np.float32), *pieces]), file.samplerate


def check_end(path: str | Path, file: soundfile.SoundFile, count: int) -> None:
    """Compare where a file ended, after ``count`` frames, with what it announces.

    Raises:
        AudioError: more than 0.1 s and 1 % are missing, or the last page of an Ogg stream is not there.
    """
    expected = file.frames
    if found := ANNOUNCED.search(file.extra_info):
        announced, present = map(int, found.groups())
        if present < announced < UNKNOWN_LENGTH:
            expected = round(count * announced / max(present, 1))
    if 0 <= expected < UNKNOWN_FRAMES and expected - count > max(0.1 * file.samplerate, 0.01 * expected):
        raise AudioError(f"{path}: is cut off after {count / file.samplerate:.1f} s of {expected / file.samplerate:.1f} s; copy or download it again")
    if file.format == "OGG" and not _has_last_page(path):
        raise AudioError(f"{path}: is cut off after {count / file.samplerate:.1f} s, its last page is missing; copy or download it again")


def with_length(path: str | Path) -> io.BytesIO | None:
    """An MP3 whose first frame does not say how many follow, with such a frame (Xing, [peer: LAME]) put before it; None for other files.

    Without it libsndfile guesses the number from the file's size: a cover picture makes it too large, a variable bit rate too small,
    and it stops reading there.
    """
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] != b"ID3" and not (len(head) > 3 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2):
            return None
        data = head + file.read()
    place = 10 + (data[6] << 21 | data[7] << 14 | data[8] << 7 | data[9]) if head[:3] == b"ID3" else 0
    first, frames = place, 0
    while length := mp3_frame(data[place:place + 4]):
        if not frames and any(word in data[place:place + length] for word in (b"Xing", b"Info", b"VBRI")):
            return None
        place, frames = place + length, frames + 1
    if frames < 2:
        return None
    header = bytearray(mp3_frame(data[first:first + 4]))
    header[:4] = data[first:first + 4]
    header[1] |= 1                                                                  # no checksum
    side = 4 + ((17, 32), (9, 17))[header[1] & 8 == 0][header[3] >> 6 != 3]         # side information: mono or stereo, of MPEG 1 or 2
    header[side:side + 12] = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return io.BytesIO(bytes(header) + data[first:place])


def mp3_frame(head: bytes) -> int:
    """The bytes of the MPEG layer III frame that ``head`` (4 bytes) begins; 0 where none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2 or head[1] & 0x18 == 0x08 or head[2] >> 4 in (0, 15) or head[2] & 12 == 12:
        return 0
    mpeg1 = head[1] & 0x18 == 0x18
    rates = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320) if mpeg1 else (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    hertz = (44_100, 48_000, 32_000)[head[2] >> 2 & 3] >> {0x18: 0, 0x10: 1, 0x00: 2}[head[1] & 0x18]
    return (144_000 if mpeg1 else 72_000) * rates[(head[2] >> 4) - 1] // hertz + (head[2] >> 1 & 1)


def _has_last_page(path: str | Path) -> bool:
    """Whether the last page of an Ogg file ends its stream: bit 4 of the byte after ``OggS`` and the version. A page has at most 65,307 bytes."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 65_307))
        tail = file.read()
    place = tail.rfind(b"OggS")
    return place >= 0 and len(tail) > place + 5 and bool(tail[place + 5] & 4)




# ----------------------------------------------------------------------------------------------------
# AudioCaps on disk: which folders its CSVs and clips lie in, which version it is, and how it differs from the official counts.


CAPTION_COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]   # AudioCaps' own
ROWS = {                                                    # captions a split, official
    "v1": {"train": 49_838, "val": 2_475, "test": 4_875},   # 2019; one caption a clip in train, five in val and test
    "v2": {"train": 91_256, "val": 2_475, "test": 4_875},   # February 2025
}
CLIPS = {"v1": {"train": 49_838, "val": 495, "test": 975}, "v2": {"val": 495, "test": 975}}
GET = ("train.csv, val.csv and test.csv from the repository cdjkim/audiocaps (folder dataset) into {folder}/\n"
       "                 the clips, cut from YouTube, by aac-datasets: aac-datasets-download --root {folder} audiocaps --subsets train val test\n"
       "                 or your own copy of them, named <youtube_id>_<start_time>.wav (.flac, .mp3, .opus, ...), into {folder}/audio/")
SIZE = "about 43 GB as 32 kHz FLAC"
LICENCE = "captions: academic use only; the clips belong to those who uploaded them"
OVERLAP = ("LAION-CLAP's training data hold AudioCaps' training clips and AudioSet, from which all of AudioCaps is taken: "
           "the encoder knows the test clips better than it would know others")


@dataclass(frozen=True)
class AudioCapsFolder:
    """Where things lie.

    Attributes:
        csv_dir: holds train.csv, val.csv and test.csv, as far as they are there.
        audio_dir: the clips are in it or in folders below it.
    """

    csv_dir: Path
    audio_dir: Path

    def csv(self, split: str) -> Path:
        """The captions of a split: ``train.csv``, or aac-datasets' ``train_v2.csv``."""
        path = self.csv_dir / f"{split}.csv"
        second = self.csv_dir / f"{split}_v2.csv"
        return second if second.is_file() and not path.is_file() else path

    def files(self) -> dict[str, Path]:
        """Every sound on disk, name without suffix -> file; links are followed, and what soundfile reads comes before what it does not."""
        found: dict[str, Path] = {}
        seen: set[str] = set()
        for folder, below, names in os.walk(self.audio_dir, followlinks=True):
            seen.add(os.path.realpath(folder))
            below[:] = sorted(name for name in below if os.path.realpath(os.path.join(folder, name)) not in seen)
            for path in (Path(folder, name) for name in sorted(names)):
                if path.suffix.lower() in AUDIO_SUFFIXES or (path.suffix.lower() in OTHER_SUFFIXES and path.stem not in found):
                    found[path.stem] = path
        return found

    def find(self, clip_ids: Iterable[str]) -> tuple[dict[str, Path], str]:
        """The clips that are on disk, by the names that downloaders give them.

        Returns:
            (clip id -> file; where none is there, one name that was looked for and up to three that are there, else "").
        """
        files, clip_ids = self.files(), list(clip_ids)
        found = {}
        for clip_id in clip_ids:
            video, _, start = clip_id.rpartition("_")
            names = [clip_id, f"Y{clip_id}"]
            if start.isdigit():
                names += [f"{clip_id}_{int(start) + 10}", f"{clip_id}.0", f"{clip_id}.000", f"{video}_{start}000", f"{video}_{start}000_{int(start) + 10}000"]
            if path := next((files[name] for name in names if name in files), None):
                found[clip_id] = path
        there = ", ".join(path.name for path in [*files.values()][:3]) or "no sound"
        return found, "" if found or not clip_ids else f"looked for {clip_ids[0]}.wav (.flac, .mp3, .opus, ...), there is {there}"


def find_audiocaps(data_dir: Path) -> AudioCapsFolder:
    """The layout below ``data_dir``; with none there, the paths where the simple one is expected."""
    bases = [data_dir, data_dir / "AUDIOCAPS"]
    places = [place for base in bases for place in (base, base / "csv_files_v1", base / "csv_files_v2")]
    csv_dir = next((place for place in places if any((place / f"{split}{end}.csv").is_file() for split in SPLITS for end in ("", "_v2"))), data_dir)
    rates = [path for base in bases for path in base.glob("audio_*Hz") if path.is_dir()]
    rates.sort(key=lambda path: -int("0" + re.sub(r"\D", "", path.name)))                  # of several rates the highest
    audio_dirs = [base / "audio" for base in bases if (base / "audio").is_dir()] + rates
    return AudioCapsFolder(csv_dir, audio_dirs[0] if audio_dirs else data_dir / "audio")


def make_clip_id(youtube_id: str, start_time: str) -> str:
    """``<youtube_id>_<start_time>``, the start in whole seconds where a table has made 30.0 of 30."""
    return f"{youtube_id}_{re.sub(r'[.]0+$', '', str(start_time))}"


def count_rows(path: Path) -> tuple[int, set[str]]:
    """The rows of a CSV in AudioCaps' columns, and the ids of its clips.

    Raises:
        ValueError: a column is missing.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if absent := [column for column in CAPTION_COLUMNS if column not in (reader.fieldnames or [])]:
            raise ValueError(f"{path}: column {', '.join(absent)} is missing; AudioCaps' columns are {','.join(CAPTION_COLUMNS)}")
        ids = [make_clip_id(row["youtube_id"], row["start_time"]) for row in reader]
    return len(ids), set(ids)


def version(train_rows: int) -> str:
    """``v1`` or ``v2``, whichever has about as many training captions; their val and test are of one size."""
    return min(ROWS, key=lambda name: abs(ROWS[name]["train"] - train_rows))


def differences(data_dir: Path) -> tuple[str, list[str]]:
    """The version, and how each split differs from the official one, a line each; none where all is as published.

    Raises:
        FileNotFoundError: a CSV is missing.
        ValueError: see :func:`count_rows`.
    """
    folder = find_audiocaps(data_dir)
    counts = {split: count_rows(folder.csv(split)) for split in SPLITS}
    name, lines = version(counts["train"][0]), []
    for split, (rows, clips) in counts.items():
        if rows != ROWS[name][split]:
            lines.append(f"{split}.csv has {rows:,} captions, {name} has {ROWS[name][split]:,}")
        if len(clips) != (wanted := CLIPS[name].get(split, len(clips))):
            lines.append(f"{split}.csv has {len(clips):,} clips, {name} has {wanted:,}")
    return name, lines




# ----------------------------------------------------------------------------------------------------
# Clips and captions: AudioCaps' CSV columns, audio files of any kind, and the scenes of ``data/mini``.


SAMPLING_RATE = 48_000                                     # Hz, CLAP's input rate [paper~]
SCENE_COLUMNS = ["youtube_id", "recordings", "offsets_s", "gains_db", "noise_dbfs", "seconds", "noise_seed"]     # what a mix needs
SILENCE = 1e-5                                             # [ours] peak, -100 dBFS; below it a clip holds nothing to embed
SHORTEST_S = 0.05                                          # [ours] less than this cannot be embedded
MANIFEST_BYTES = 200_000_000                               # sound files of a split up to this size count by their content
READ_S = 30                                                # [ours] of an AudioCaps file no more is read: CLAP hears 10 s, and an hour would fill the memory


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

    @property
    def manifest(self) -> str:
        """Hash of the sound files: of their content, or, where they hold more than 200 MB together, of their sizes and times.

        A repaired file under the same name changes it.
        """
        readable = [path for path in sorted(set(self.files)) if path.is_file() and os.access(path, os.R_OK)]   # no pipe, no dead link
        stats = [(path, path.stat()) for path in readable]
        small = sum(stat.st_size for _, stat in stats) <= MANIFEST_BYTES
        return content([f"{path.name} {sha256_file(path) if small else f'{stat.st_size} {stat.st_mtime_ns}'}" for path, stat in stats])

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def clusters(self) -> list[tuple[str, ...]]:
        """The recordings each clip is made of: the units that the cluster bootstrap resamples."""
        column = "recordings" if "recordings" in self.frame else "youtube_id"
        return [tuple(str(cell).split(";")) for cell in self.frame[column]]


def ids_sha256(clip_ids: list[str]) -> str:
    """SHA-256 of the ids joined by newlines: two scores are comparable only where it is equal."""
    return hashlib.sha256("\n".join(clip_ids).encode()).hexdigest()


def read_audio(path: str | Path, seconds: float | None = None) -> np.ndarray:
    """Read any file soundfile understands as mono float32 (samples,) at 48 kHz, in about [-1, 1].

    Channels are averaged; other rates are resampled by soxr (HQ).

    Args:
        seconds: read at most so much of its beginning; None reads it all.

    Raises:
        AudioError: unreadable, cut off, empty, too short, silent or not finite; the message names the file.
    """
    samples, rate = read_mono(path, seconds)
    return check_waveform(samples, rate, str(path))


def check_waveform(waveform: np.ndarray, sampling_rate: int, name: str = "waveform") -> np.ndarray:
    """Return ``waveform`` (samples,) as float32 at 48 kHz, or say why it cannot be used.

    Raises:
        AudioError: not one-dimensional, empty, shorter than 0.05 s, silent, or with NaN or infinite samples.
    """
    if isinstance(waveform, torch.Tensor):
        waveform = waveform.detach().cpu().float().numpy() if waveform.is_floating_point() else waveform.cpu().numpy()
    waveform = np.asarray(waveform)
    if waveform.dtype.kind in "iu":                                                 # a file's integers: full scale is 1
        full = 2.0 ** (8 * waveform.dtype.itemsize - 1)
        waveform = (waveform - (full if waveform.dtype.kind == "u" else 0)) / full
    if waveform.dtype.kind != "f":
        raise AudioError(f"{name}: samples of type {waveform.dtype}; give floats in [-1, 1] or integers")
    waveform = waveform.astype(np.float32)
    if waveform.ndim != 1:
        raise AudioError(f"{name}: expected mono samples of shape (samples,), got {waveform.shape}; average the channels")
    if len(waveform) < SHORTEST_S * sampling_rate:
        raise AudioError(f"{name}: {len(waveform)} samples at {sampling_rate} Hz are too short; give at least {SHORTEST_S} s")
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: holds NaN or infinite samples; export the file again")
    if np.abs(waveform).max() < SILENCE:
        raise AudioError(f"{name}: silent (peak below -100 dBFS); choose another file")
    if sampling_rate != SAMPLING_RATE:
        waveform = soxr.resample(waveform, sampling_rate, SAMPLING_RATE)
    return np.ascontiguousarray(waveform, dtype=np.float32)


def read_captions(path: Path) -> pd.DataFrame:
    """Read a CSV in AudioCaps' columns, every cell a string.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see :func:`read_table`; an id repeats, or an id or a caption is empty; the message names the file and the row.
    """
    frame = read_table(path, CAPTION_COLUMNS)
    if frame.empty:
        raise ValueError(f"{path}: holds no captions, only its header; give at least one row")
    if repeated := frame.audiocap_id[frame.audiocap_id.duplicated()].tolist():
        raise ValueError(f"{path}: audiocap_id {repeated[0]} stands {frame.audiocap_id.eq(repeated[0]).sum()} times; ids are unique")
    if (empty := frame.caption.str.strip().eq("")).any():
        raise ValueError(f"{path}: row {int(empty.idxmax()) + 2} has an empty caption; fill it in or remove the row")
    if (nameless := frame.youtube_id.eq("") | frame.start_time.eq("")).any():
        raise ValueError(f"{path}: row {int(nameless.idxmax()) + 2} has no youtube_id or no start_time; fill it in or remove the row")
    return frame


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a CSV in UTF-8, with or without a byte order mark, every cell a string; blank lines do not count.

    Read by the csv module in its strict mode: pandas takes an unquoted comma in the first caption for a column of row names.

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
        raise ValueError(f"{path}: is not a CSV ({error}); put cells with quotes or line ends in quotes and double the quotes inside") from None
    if absent := [column for column in columns if column not in header]:
        raise ValueError(f"{path}: column {', '.join(absent)} is missing; the columns are {','.join(columns)}")
    if wrong := [number for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        raise ValueError(f"{path}: row {wrong[0]} has {len(rows[wrong[0] - 2])} cells, the header {len(header)}; put a caption with commas in quotes")
    return pd.DataFrame(rows, columns=header, dtype=str)


def load_split(profile: Profile, split: str) -> Split:
    """Return the clips of ``split`` ("train", "val" or "test"), at most ``profile.max_clips[split]`` of them.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_captions`; also when no audio file of the split is on disk.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    rows = read_captions(find_audiocaps(profile.data_dir).csv(split))
    rows = rows.assign(clip_id=list(map(make_clip_id, rows.youtube_id, rows.start_time)))
    captions = rows.groupby("clip_id", sort=False).caption.agg(list)
    if profile.max_clips:
        captions = captions[: profile.max_clips.get(split)]
    build = _mini_split if (profile.data_dir / "scenes.csv").is_file() else _audiocaps_split
    return build(profile.data_dir, split, rows.drop_duplicates("clip_id").set_index("clip_id").loc[captions.index], captions)


def _mini_split(data_dir: Path, split: str, rows: pd.DataFrame, captions: pd.Series) -> Split:
    scenes = read_table(data_dir / "scenes.csv", SCENE_COLUMNS).drop_duplicates("youtube_id").set_index("youtube_id")
    if absent := [scene for scene in rows.youtube_id if scene not in scenes.index]:
        raise ValueError(f"{data_dir / 'scenes.csv'}: scene {absent[0]} of {split}.csv is not in it; both ship together: git checkout -- data/mini")
    frame = scenes.loc[rows.youtube_id].reset_index()
    files = recording_files(data_dir)

    def waveform(index: int) -> np.ndarray:
        try:
            return mix_scene(frame.iloc[index], lambda clip_id: read_recording(files[clip_id]))
        except AudioError:
            raise
        except (KeyError, ValueError) as error:
            raise AudioError(f"{captions.index[index]}: its row of scenes.csv cannot be mixed ({error}); git checkout -- data/mini") from None

    used = sorted({clip_id for cell in frame.recordings for clip_id in cell.split(";")} & files.keys())
    return Split(split, list(captions.index), list(captions), frame, waveform, files=tuple(files[clip_id] for clip_id in used if files[clip_id].is_file()))


def _audiocaps_split(data_dir: Path, split: str, rows: pd.DataFrame, captions: pd.Series) -> Split:
    folder = find_audiocaps(data_dir)
    on_disk, told = folder.find(captions.index)
    present = [clip_id for clip_id in captions.index if clip_id in on_disk]
    missing = tuple(clip_id for clip_id in captions.index if clip_id not in on_disk)
    if not present:
        raise FileNotFoundError(f"{folder.audio_dir}: none of the {len(captions)} clips of split '{split}' is there: {told}; "
                                "name the files <youtube_id>_<start_time>")
    return Split(split, present, list(captions[present]), rows.loc[present].reset_index(drop=True),
                 lambda index: read_audio(on_disk[present[index]], READ_S), missing,
                 tuple(on_disk[clip_id] for clip_id in present))


def recording_files(data_dir: Path) -> dict[str, Path]:
    """Map the ids of ``recordings.csv`` to their Ogg Opus files.

    Raises:
        FileNotFoundError, ValueError: see :func:`read_table`; also a file that would lie outside the folder.
    """
    path = data_dir / "recordings" / "recordings.csv"
    frame = read_table(path, ["clip_id", "file"])
    if outside := [file for file in frame.file if Path(file).is_absolute() or ".." in Path(file).parts]:
        raise ValueError(f"{path}: file {outside[0]!r} leads out of {path.parent}; recordings lie in it")
    return {clip_id: path.parent / file for clip_id, file in zip(frame.clip_id, frame.file, strict=True)}


def read_recording(path: Path) -> np.ndarray:
    """:func:`read_audio`, remembered: the 996 recordings take 440 MB decoded and each is mixed into many scenes."""
    return _remembered(path, path.stat().st_mtime_ns if path.is_file() else 0)


@lru_cache(maxsize=1024)
def _remembered(path: Path, changed: int) -> np.ndarray:
    return read_audio(path)




# ----------------------------------------------------------------------------------------------------
# Scenes of ``data/mini``: one to three real recordings mixed into at most 10 s. data/mini/build_corpus.py drew them and wrote their captions.


FADE_S = 0.02                                       # s, where a recording is cut at the end of its scene
MIX_RECIPE = 1                                      # goes up when a row of scenes.csv gives another sound (tests/test_recipes.py)


def mix_scene(scene: pd.Series, read_recording: Callable[[str], np.ndarray]) -> np.ndarray:
    """Mix one row of ``scenes.csv``.

    Args:
        scene: ``recordings``, ``offsets_s``, ``gains_db`` (each joined by ";"), ``noise_dbfs``, ``seconds``, ``noise_seed``.
        read_recording: gives a recording by id as float32 (samples,), mono, 48 kHz.

    Returns:
        float32 (seconds * 48,000,), peak at most 1: sum_i 10^(gain_i / 20) r_i(t - offset_i) + noise, scaled down if it would clip.

    Raises:
        ValueError: a cell that is no number, lists of different lengths, a recording that would start outside the scene.
    """
    samples = round(float(scene.seconds) * SAMPLING_RATE)
    noise = np.random.default_rng(int(scene.noise_seed)).standard_normal(samples, dtype=np.float32)
    mix = noise * np.float32(10 ** (float(scene.noise_dbfs) / 20))
    for clip_id, offset, gain in zip(scene.recordings.split(";"), scene.offsets_s.split(";"), scene.gains_db.split(";"), strict=True):
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
    """What takes of one source share: the package and path with every number struck out (for a SoundFont only the note)."""
    is_soundfont = ".sf2!" in source_path
    return f"{source_package}:" + re.sub(r"(?<=note=)\d+" if is_soundfont else r"\d+", "#", source_path)
