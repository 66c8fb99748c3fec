"""The README's table of ratios: copied from results/bench.csv, honest about what it does not hold."""
from __future__ import annotations

from dl.report.bench import SECTIONS, bench_table
from dl.store import csv_text

COLUMNS = ("section", "name", "over", "size", "ours", "theirs", "unit", "ratio", "goal", "met", "ratio_low", "ratio_high", "threads", "versions", "status",
           "reason", "profile")
ABOUT = {"unit": "s", "threads": 2, "versions": "torch 2.0", "status": "ok"}
STEP = {"section": "captioner_training", "name": "a step", "ours": 0.5, "theirs": 0.4567, "ratio": 1.0948, "goal": "ours / theirs <= 1", "met": "no",
        "ratio_low": 1.05, "ratio_high": 1.2, "reason": "the same losses", "profile": "addmm 60%"}
UNET = {"section": "bridge_inference", "name": "a U-Net", "ours": 0.25, "theirs": 3000, "ratio": 12000, "goal": "theirs / ours >= 20", "met": "yes",
        "ratio_low": 11000.4, "ratio_high": 13000, "reason": "untrained"}


def text_of(tmp_path, *rows: dict) -> str:
    """The block for a bench.csv of these rows."""
    (tmp_path / "bench.csv").write_text(csv_text([{**ABOUT, **row} for row in rows], COLUMNS))
    return bench_table(tmp_path / "mini")


def test_without_a_file_it_says_so(tmp_path):
    assert bench_table(tmp_path / "mini") == "Nothing has been measured yet.\n"


def test_every_number_is_copied_and_a_goal_that_is_missed_has_its_reason_and_profile(tmp_path):
    text = text_of(tmp_path, UNET, STEP)
    assert "2 threads for both (torch 2.0)" in text
    assert f"| {SECTIONS['bridge_inference']} | a U-Net | 0.25 s | 3,000 s | 12,000 [11,000, 13,000] | theirs / ours >= 20 | yes |" in text
    assert f"| {SECTIONS['captioner_training']} | a step | 0.5 s | 0.457 s | 1.09 [1.05, 1.2] | ours / theirs <= 1 | no |" in text
    assert "a step:** the same losses. Where our time goes: addmm 60%." in text and "untrained" not in text


def test_what_was_not_measured_stands_in_the_table_with_its_reason(tmp_path):
    text = text_of(tmp_path, UNET, {"section": "embedding", "name": "32 files", "status": "not measured", "reason": "laion-clap is missing"})
    assert f"| {SECTIONS['embedding']} | 32 files |  |  | not measured |  | laion-clap is missing |" in text and "not beyond the noise" not in text


def test_growth_becomes_exponents(tmp_path):
    points = [{"section": "growth", "name": "gap metrics", "over": "clips", "size": size, "ours": 1e-6 * size**2} for size in (100, 200, 400)]
    text = text_of(tmp_path, UNET, *points, {"section": "growth", "name": "lost", "over": "D", "status": "not measured", "reason": "out of time"})
    assert "Over clips: gap metrics 2.00." in text and "lost" not in text
