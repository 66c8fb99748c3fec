"""The README's GPU tables: copied from results/bench_gpu.csv, and honest about what it does not hold."""
from __future__ import annotations

from dl.report.gpu import HOURS, PARTS, gpu_table
from dl.report.readme import memory_line
from dl.store import csv_text

COLUMNS = ("section", "name", "value", "unit", "batch", "seq_len", "dtype", "card", "torch", "transformers", "peft", "status", "reason")
ABOUT = {"card": "Card 9000", "torch": "2.0", "transformers": "5.0", "peft": "0.1", "status": "ok"}


def write(tmp_path, *rows: dict):
    """A folder results/mini beside a bench_gpu.csv of these rows."""
    (tmp_path / "mini").mkdir(exist_ok=True)
    (tmp_path / "bench_gpu.csv").write_text(csv_text([{**ABOUT, **row} for row in rows], COLUMNS))
    return tmp_path / "mini"


def cells(text: str, part: str) -> list[str]:
    """The cells of the one row that starts with ``part``."""
    line, = [line for line in text.splitlines() if line.startswith(f"| {part} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_without_a_file_everything_is_not_measured(tmp_path):
    text = gpu_table(tmp_path / "mini")
    assert text.startswith("No GPU has been measured")
    for part in PARTS:
        assert set(cells(text, part.label)) <= {"not measured", ""} and cells(text, part.label)[0] == "not measured"
    for part in HOURS.values():
        assert cells(text, part) == ["", "not measured"]


def test_measured_rows_are_copied(tmp_path):
    text = gpu_table(write(
        tmp_path, {"section": "ceilings", "name": "matmul_square", "value": 700.4, "unit": "TFLOP/s"},
        {"section": "llama_train", "name": "step_time", "value": 9.0, "batch": 64}, {"section": "llama_train", "name": "step_time", "value": 0.25, "batch": 16},
        {"section": "llama_train", "name": "model_utilisation", "value": 0.314, "batch": 16},
        {"section": "llama_train", "name": "peak_memory", "value": 21.04, "batch": 16},
        {"section": "estimate", "name": "captioner_training", "value": 12.34, "reason": "3 decoders x 20,000 steps"},
        {"section": "estimate", "name": "embed_text", "value": 0.05, "reason": "all captions"}))
    assert "One Card 9000 (torch 2.0, transformers 5.0, peft 0.1): bfloat16 matrix product 700 TFLOP/s, copy within its memory not measured." in text
    assert cells(text, "captioner, a step of 16 captions") == ["0.250 s", "31% of the matrix product", "21.0"]
    assert cells(text, "captioner, a step of 64 captions")[0] == "9.000 s"
    assert cells(text, HOURS["captioner_training"]) == ["3 decoders x 20,000 steps", "12.3 h"]
    assert cells(text, HOURS["embed_text"]) == ["all captions", "3.0 min"]
    assert cells(text, HOURS["total"]) == ["", "not measured"]


def test_a_row_that_failed_is_not_measured(tmp_path):
    text = gpu_table(write(tmp_path, {"section": "llama_train", "name": "step_time", "batch": 16, "status": "not measured", "reason": "out of memory"}))
    assert cells(text, "captioner, a step of 16 captions")[0] == "not measured"


def test_the_memory_of_a_captioner_is_that_of_its_batch(tmp_path):
    rows = [{"section": "llama_train", "name": "peak_memory_checkpointed", "value": value, "batch": batch} for batch, value in ((64, 9.94), (16, 3.14))]
    text = memory_line(write(tmp_path, *rows))
    assert "3.1 GiB" in text and "9.9" not in text
    assert "sequences at not measured" in text
