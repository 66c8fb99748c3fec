"""Memory is bounded: flat over a CSV of any length, the same for an hour of sound as for a minute, below 8 GB in every stage."""
from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import psutil
import pytest
import soundfile
from test_bad_sounds import noise

from dl.caption_files import read_windows
from dl.config import REPO
from dl.data import READ_S, read_audio

VECTORS = 2 * 256 * 4 / 1e6          # MB a clip: its vector and that of its caption


@pytest.mark.parametrize("clips", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_csv_is_streamed(tmp_path, ledger, clips):
    """During the pass over the sounds memory stays where it was at a tenth of it; the vectors of all clips come together at the end alone."""
    done = subprocess.run([sys.executable, REPO / "tests/reliability/million.py", tmp_path, str(clips)], capture_output=True, text=True, check=False,
                          cwd=REPO, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert len(report["during"]) >= 5
    ledger.measure(f"growth over the pass, {clips:,} clips", max(report["during"][1:]) - report["during"][1], 50, "MB")
    ledger.measure(f"table in memory, {clips:,} clips", (report["table"] - report["before"]) * 1000 / clips, 2.5, "kB a clip")
    ledger.measure(f"peak when the vectors come together, {clips:,} clips", (report["peak"] - report["table"]) / (clips * VECTORS), 6, "times the vectors")


def test_an_hour_takes_no_more_than_a_minute(tmp_path, ledger):
    """Both readers: the windows of a long file one by one; of an AudioCaps file no more than its first 30 s."""
    path = tmp_path / "hour.flac"
    soundfile.write(path, np.tile((20_000 * noise(10, 8000)).astype(np.int16), (360, 1)), 8000)
    before = psutil.Process().memory_info().rss
    seconds, peak = 0.0, 0
    for start, end, _ in read_windows(path):
        seconds, peak = seconds + end - start, max(peak, psutil.Process().memory_info().rss - before)
    assert seconds == 3600
    ledger.measure("an hour, window by window", peak / 1e6, 60, "MB")
    assert len(read_audio(path, READ_S)) == READ_S * 48_000


def test_every_stage_stays_below_8_gb(ledger):
    """``timing.csv`` holds the peak memory of each stage; the default run promises 8 GB."""
    with open(REPO / "results/mini/timing.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {f"{number:02d}" for number in range(12)} <= {row["stage"] for row in rows}
    for row in rows:
        ledger.measure(f"peak memory of stage {row['stage']}, profile mini", float(row["peak_memory_mb"]) / 1000, 8, "GB")
