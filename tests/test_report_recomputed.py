"""Cells of Table 1 and 2 and verdicts, made again from raw files without the functions that made them."""
from __future__ import annotations

import csv
import statistics
from functools import cache

import numpy as np
import pytest

from dl.config import REPO

MINI = REPO / "results/mini"
EMBEDDINGS = MINI / "cache/embeddings/test.safetensors"


@cache
def rows(name: str) -> list[dict[str, str]]:
    with open(MINI / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs(experiment: str, system: str, metric: str) -> list[float]:
    """The single runs' values on test: one a training seed and noise seed."""
    wanted = {"experiment": experiment, "system": system, "metric": metric, "split": "test", "space": "text"}
    return [float(row["value"]) for row in rows("metrics") if row["seed"] != "all" and all(row[key] == value for key, value in wanted.items())]


def interval(experiment: str, system: str, metric: str) -> tuple[float, float, float]:
    """Value and interval of the one row that sums the runs up."""
    wanted = {"experiment": experiment, "system": system, "metric": metric, "split": "test", "space": "text", "seed": "all"}
    found = [row for row in rows("metrics") if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return tuple(float(found[0][key]) for key in ("value", "ci_low", "ci_high"))


def cell(table: str, **where: str) -> dict[str, str]:
    (found,) = [row for row in rows(table) if all(row[key] == value for key, value in where.items())]
    return found


def verdict(claim: str) -> str:
    return cell("claims", id=claim)["verdict"]


# ------------------------------------------------------------------------------------------------------------------ table1
@pytest.mark.parametrize(("system", "metric", "count"), [
    ("diffusion_link", "pair_cosine", 15), ("diffusion_bridge", "rmg", 3), ("regression_mlp", "recall_at_10", 3)])
def test_a_cell_of_table1_is_the_mean_of_its_runs(system, metric, count):
    values, row = runs("gap", system, metric), cell("table1", system=system, space="text")
    assert len(values) == count
    assert float(row[metric]) == pytest.approx(statistics.fmean(values), abs=1e-8)
    assert float(row[f"{metric}_sd"]) == pytest.approx(statistics.stdev(values), abs=1e-8)
    assert float(row[f"{metric}_ci_low"]) < float(row[metric]) < float(row[f"{metric}_ci_high"])


@pytest.mark.skipif(not EMBEDDINGS.is_file(), reason="the vectors are in no clone: a run of notebook 02 makes them")
def test_raws_cells_of_table1_follow_from_the_vectors():
    from safetensors.numpy import load_file

    vectors = load_file(EMBEDDINGS)
    audio, clip = vectors["audio"].astype(float), vectors["text_clip"]
    text = vectors["text"].astype(float)[[int(np.argmax(clip == i)) for i in range(len(audio))]]
    n, row = len(audio), cell("table1", system="raw", space="text")
    apart = lambda x, y: (1 - x @ y.T) / 2
    within = [apart(x, x)[~np.eye(n, dtype=bool)].mean() for x in (audio, text)]
    across = np.diag(apart(audio, text)).mean()
    assert float(row["pair_cosine"]) == pytest.approx((audio * text).sum(1).mean(), abs=1e-5)
    assert float(row["centroid_gap"]) == pytest.approx(np.linalg.norm(audio.mean(0) - text.mean(0)), abs=1e-5)
    assert float(row["rmg"]) == pytest.approx(across / (across + sum(within) / 2), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- verdicts
def test_the_verdict_on_c1_follows_from_nine_intervals():
    """Pair cosine higher, centroid gap and RMG lower than each other diffusion method's: the worst of nine decides."""
    grades = []
    for peer in ("diffusion_bridge", "conditional_diffusion", "seed"):
        for metric, sign in (("pair_cosine", 1), ("centroid_gap", -1), ("rmg", -1)):
            mean = statistics.fmean(runs("gap", "diffusion_link", metric)) - statistics.fmean(runs("gap", peer, metric))
            value, low, high = interval("gap:paired", f"diffusion_link-{peer}", metric)
            assert value == pytest.approx(mean, abs=1e-8)
            grades.append(2 if min(sign * low, sign * high) > 0 else 1 if sign * mean > 0 else 0)
    assert verdict("C1") == ("not_supported", "partly_supported", "supported")[min(grades)]


def test_the_verdict_on_c3_follows_from_the_gain_in_cider():
    bridged, raw = (statistics.fmean(runs("zero_shot", system, "cider_d")) for system in ("diffusion_link", "raw"))
    value, low, high = interval("zero_shot:paired", "diffusion_link-raw", "cider_d_relative_gain")
    assert value == pytest.approx(bridged / raw - 1, abs=1e-6) and low < value < high
    assert verdict("C3") == ("supported" if low > 0 else "partly_supported" if bridged > raw else "not_supported")
    assert float(cell("table2", experiment="zero_shot", system="diffusion_link", space="text")["cider_d_relative_gain"]) == pytest.approx(value)


# ---------------------------------------------------------------------------------------------------------------- captions
def test_a_cider_d_of_table2_follows_from_the_captions():
    """The committed captions of raw against data/mini/test.csv by pycocoevalcap, seed by seed."""
    from pycocoevalcap.cider.cider import Cider

    from dl.caption_metrics import find_java, ptb_tokenize

    said = rows("captions/zero_shot_beam4")
    clip_ids, columns = [row["clip_id"] for row in said], sorted(name for name in said[0] if name.startswith("raw_seed_"))
    candidates = [[row[name].removeprefix("'") for row in said] for name in columns]
    references: dict[str, list[str]] = {}
    with open(REPO / "data/mini/test.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            references.setdefault(f"{row['youtube_id']}_{row['start_time']}", []).append(row["caption"])
    every = sorted({caption for given in candidates for caption in given} | {caption for found in references.values() for caption in found})
    tokens = dict(zip(every, ptb_tokenize(find_java(), every), strict=True))
    wanted = {place: [tokens[caption] for caption in references[clip_id]] for place, clip_id in enumerate(clip_ids)}
    scores = [Cider().compute_score(wanted, {place: [tokens[caption]] for place, caption in enumerate(given)})[0] for given in candidates]
    assert scores == pytest.approx(runs("zero_shot", "raw", "cider_d"), abs=1e-6)
    assert float(cell("table2", experiment="zero_shot", system="raw", space="text")["cider_d"]) == pytest.approx(statistics.fmean(scores), abs=1e-6)
