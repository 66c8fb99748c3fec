"""Memory is bounded: flat over a CSV of any length and an hour of sound, below 8 GB in every stage."""
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
    """From a tenth of the pass over the sounds on memory stays; the vectors of all clips come together at the end."""
    million = [sys.executable, REPO / "tests/reliability/million.py", tmp_path, str(clips)]
    done = subprocess.run(million, capture_output=True, text=True, check=False, cwd=REPO, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    during, table = report["during"], report["table"]
    assert len(during) >= 5
    for part, value, bound, unit in (
            ("growth over the pass", max(during[1:]) - during[1], 50, "MB"),
            ("table in memory", (table - report["before"]) * 1000 / clips, 2.5, "kB a clip"),
            ("peak when the vectors come together", (report["peak"] - table) / (clips * VECTORS), 6,
             "times the vectors")):
        ledger.measure(f"{part}, {clips:,} clips", value, bound, unit)


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
        peaks = {row["stage"]: float(row["peak_memory_mb"]) / 1000 for row in csv.DictReader(file)}
    assert {f"{number:02d}" for number in range(12)} <= set(peaks)
    for stage, peak in peaks.items():
        ledger.measure(f"peak memory of stage {stage}, profile mini", peak, 8, "GB")
