"""Clips and captions: AudioCaps' CSV columns, audio files of any kind, and the scenes of ``data/mini``.

A split is five lists side by side: an id, the captions and the recordings of every clip, and where its sound comes from.
Both data sets end in the same :class:`Split`; nothing after this module knows which one it reads.
"""
from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import soxr

from dl.audio import AudioError, read_mono
from dl.audiocaps import CAPTION_COLUMNS, find_audiocaps
from dl.config import SPLITS, Profile

SAMPLING_RATE = 48_000                                     # Hz, CLAP's input rate [paper~]
SCENE_COLUMNS = ["youtube_id", "recordings", "offsets_s", "gains_db", "noise_dbfs", "seconds", "noise_seed"]     # what a mix needs
SILENCE = 1e-5                                             # [ours] peak, -100 dBFS; below it a clip holds nothing to embed
SHORTEST_S = 0.05                                          # [ours] less than this cannot be embedded
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
    """

    name: str
    clip_ids: list[str]
    captions: list[list[str]]
    frame: pd.DataFrame
    waveform: Callable[[int], np.ndarray]
    missing: tuple[str, ...] = ()

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
    waveform = np.asarray(waveform, dtype=np.float32)
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
    rows = rows.assign(clip_id=rows.youtube_id + "_" + rows.start_time)
    captions = rows.groupby("clip_id", sort=False).caption.agg(list)
    if profile.max_clips:
        captions = captions[: profile.max_clips[split]]
    build = _mini_split if (profile.data_dir / "scenes.csv").is_file() else _audiocaps_split
    return build(profile.data_dir, split, rows.drop_duplicates("clip_id").set_index("clip_id").loc[captions.index], captions)


def _mini_split(data_dir: Path, split: str, rows: pd.DataFrame, captions: pd.Series) -> Split:
    from dl.scenes import mix_scene

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

    return Split(split, list(captions.index), list(captions), frame, waveform)


def _audiocaps_split(data_dir: Path, split: str, rows: pd.DataFrame, captions: pd.Series) -> Split:
    folder = find_audiocaps(data_dir)
    on_disk = folder.files()
    present = [clip_id for clip_id in captions.index if clip_id in on_disk]
    missing = tuple(clip_id for clip_id in captions.index if clip_id not in on_disk)
    if not present:
        raise FileNotFoundError(f"{folder.audio_dir}: none of the {len(captions)} clips of split '{split}' is there; "
                                "files are named <youtube_id>_<start_time>.wav, .flac, .mp3, .opus, ...")
    return Split(split, present, list(captions[present]), rows.loc[present].reset_index(drop=True),
                 lambda index: read_audio(on_disk[present[index]], READ_S), missing)


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


@lru_cache(maxsize=1024)
def read_recording(path: Path) -> np.ndarray:
    """:func:`read_audio`, remembered: the 996 recordings take 440 MB decoded and each is mixed into many scenes."""
    return read_audio(path)
