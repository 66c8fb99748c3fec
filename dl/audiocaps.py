"""AudioCaps on disk: which folders its CSVs and clips lie in, which version it is, and how it differs from the official counts.

Two layouts are found by themselves: the official CSVs beside a folder ``audio`` (files ``<youtube_id>_<start_time>.wav|flac|mp3|opus|ogg``,
in it or below it), and what aac-datasets makes, ``AUDIOCAPS/`` with its CSVs and ``audio_32000Hz/<split>/``. ``dl.data`` reads the clips;
this module needs nothing but Python, so that ``python -m dl check`` runs before the install.
"""
from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from dl.config import SPLITS

CAPTION_COLUMNS = ["audiocap_id", "youtube_id", "start_time", "caption"]   # AudioCaps' own
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".oga", ".aiff", ".aif", ".au", ".caf", ".w64")
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
        """The captions of a split."""
        return self.csv_dir / f"{split}.csv"

    def files(self) -> dict[str, Path]:
        """Every clip on disk: ``<youtube_id>_<start_time>`` -> file."""
        return {path.stem: path for path in sorted(self.audio_dir.rglob("*")) if path.suffix.lower() in AUDIO_SUFFIXES}


def find_audiocaps(data_dir: Path) -> AudioCapsFolder:
    """The layout below ``data_dir``; with none there, the paths where the simple one is expected."""
    bases = [data_dir, data_dir / "AUDIOCAPS"]
    places = [place for base in bases for place in (base, base / "csv_files_v1", base / "csv_files_v2")]
    csv_dir = next((place for place in places if any((place / f"{split}.csv").is_file() for split in SPLITS)), data_dir)
    rates = [path for base in bases for path in base.glob("audio_*Hz") if path.is_dir()]
    rates.sort(key=lambda path: -int("0" + re.sub(r"\D", "", path.name)))                  # of several rates the highest
    audio_dirs = [base / "audio" for base in bases if (base / "audio").is_dir()] + rates
    return AudioCapsFolder(csv_dir, audio_dirs[0] if audio_dirs else data_dir / "audio")


def count_rows(path: Path) -> tuple[int, set[str]]:
    """The rows of a CSV in AudioCaps' columns, and the ids of its clips.

    Raises:
        ValueError: a column is missing.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if absent := [column for column in CAPTION_COLUMNS if column not in (reader.fieldnames or [])]:
            raise ValueError(f"{path}: column {', '.join(absent)} is missing; AudioCaps' columns are {','.join(CAPTION_COLUMNS)}")
        ids = [f"{row['youtube_id']}_{row['start_time']}" for row in reader]
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
