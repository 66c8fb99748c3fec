"""Table 2, verdicts on C3 and C4, the comparison, the page and the cards; cells and verdicts made again from raw files."""
from __future__ import annotations

import csv
import math
import statistics
import warnings
from functools import cache

import pandas as pd
import pytest

from dl import report
from dl.caption_metrics import METRICS
from dl.config import REPO, get_profile
from dl.report import (
    DISJOINT,
    VERDICT_RULES,
    comparison_rows,
    load_paper,
    t_half_width,
    write_claims,
    write_comparison,
    write_table2,
)
from dl.store import MetricsFile

MINI = REPO / "results/mini"
NO_SPICE = "the models are absent; run python -m something"
SCORES = {"raw": 1.0, "ridge": 1.28, "diffusion_link": 1.30, "text_ceiling": 3.0}


@pytest.fixture
def profile(tmp_path):
    return get_profile("mini", results_root=tmp_path)


def system_rows(experiment: str, system: str, value: float, decoding: str = "greedy", seeds: int = 3, half: float = 0.1, **more) -> list[dict]:
    """Every metric of one system: its seeds and their sum; SPICE and SPIDEr are not computed."""
    shared = {"experiment": experiment, "system": system, "split": "test", "decoding": decoding, "n_items": 600,
              "ids_sha256": "0" * 64, "noise_seed": 0, "space": "text", **more}
    rows = []
    for metric in METRICS:
        absent = metric in ("spice", "spider")
        row = {**shared, "metric": metric, "value": None if absent else value, "reason": NO_SPICE if absent else ""}
        rows += [{**row, "seed": seed, "value": None if absent else value + 0.01 * (seed - 1)} for seed in range(seeds)]
        ends = {} if absent else {"ci_low": value - half, "ci_high": value + half, "sd": 0.01 if seeds > 1 else None}
        rows.append({**row, "seed": "all", "noise_seed": "all", **ends})
    return rows


def paired_row(experiment: str, pair: str, value: float, low: float, high: float, metric: str = "cider_d", decoding: str = "greedy") -> dict:
    return {"experiment": f"{experiment}:paired", "system": pair, "split": "test", "space": "text", "decoding": decoding, "n_items": 600,
            "metric": metric, "seed": "all", "noise_seed": "all", "value": value, "ci_low": low, "ci_high": high}


def gains(experiment: str, gain: float, low: float, high: float, decoding: str = "greedy") -> list[dict]:
    return [paired_row(experiment, "diffusion_link-raw", gain, low, high, "cider_d_relative_gain", decoding),
            paired_row(experiment, "ridge-raw", 0.28, 0.2, 0.35, "cider_d_relative_gain", decoding),
            paired_row(experiment, "diffusion_link-raw", 0.3, 0.2, 0.4, decoding=decoding),
            paired_row(experiment, "diffusion_link-ridge", 0.02, -0.01, 0.05, decoding=decoding)]


@pytest.fixture
def table(profile):
    rows = [row for system, value in SCORES.items() for row in system_rows("zero_shot", system, value)]
    rows += [row for system in ("raw", "diffusion_link") for row in system_rows("supervised", system, SCORES[system])]
    rows += gains("zero_shot", 0.3, 0.2, 0.42) + gains("supervised", 0.05, -0.02, 0.12)
    rows += [{**row, "split": f"test:{part}"} for row in system_rows("zero_shot", "raw", 0.7) if row["seed"] == "all" and row["metric"] == "cider_d"
             for part in ("seen", "heldout_phrasing")]
    MetricsFile(profile).add(rows)
    return write_table2(profile)


def markdown(profile) -> str:
    return (profile.results_dir / "table2.md").read_text(encoding="utf-8")


def cells(text: str, panel: str, system: str) -> list[list[str]]:
    """The cells of a system's lines in one panel."""
    part = text.split(f"## {panel}")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith(f"| {system} |")]


def test_one_table_has_two_panels_with_all_rows(table, profile):
    expected = [*(("zero_shot", name) for name in SCORES), ("supervised", "raw"), ("supervised", "diffusion_link")]
    assert list(zip(table.experiment, table.system, strict=True)) == expected
    text = markdown(profile)
    assert text.index("## 2a. Zero-shot") < text.index("## 2b. Fully supervised") and "2a, strict" not in text
    stored = pd.read_csv(profile.results_dir / "table2.csv")
    assert list(stored.columns) == list(table.columns) and stored.cider_d.tolist() == pytest.approx(table.cider_d.tolist())
    assert {f"{metric}{end}" for metric in METRICS for end in ("", "_sd", "_ci_low", "_ci_high", "_t95", "_mark")} <= set(stored.columns)


def test_best_and_ties_are_marked_by_interval(table, profile):
    marks = table[table.experiment == "zero_shot"].set_index("system").cider_d_mark
    assert marks["diffusion_link"] == "best" and marks["ridge"] == "tie" and pd.isna(marks["raw"]) and pd.isna(marks["text_ceiling"])
    first = {system: cells(markdown(profile), "2a. Zero-shot", system)[0][4] for system in SCORES}
    assert first["diffusion_link"].startswith("**1.300** ± 0.010 [1.200, 1.400]")
    assert first["ridge"].startswith("*1.280*") and first["raw"].startswith("1.000")


def test_what_was_not_computed_has_its_reason_below(table, profile):
    text = markdown(profile)
    row = cells(text, "2a. Zero-shot", "raw")[0]
    assert row[5] == row[6] == "n/c"
    footnote = text.split("## Not computed")[1]
    assert f"- spice (2a, 2b): {NO_SPICE}" in footnote and f"- spider (2a, 2b): {NO_SPICE}" in footnote and footnote.count("\n- ") == 2
    assert table.spice.isna().all()


def test_gains_stand_beside_the_papers_and_nothing_is_invented(table, profile):
    text = markdown(profile)
    assert cells(text, "2a. Zero-shot", "diffusion_link")[2][4:] == ["+30.0 % [+20.0 %, +42.0 %]", "up to +52.5 %", "+0.020 [-0.010, +0.050]"]
    assert cells(text, "2b. Fully supervised", "diffusion_link")[2][4:6] == ["+5.0 % [-2.0 %, +12.0 %]", "up to +7.5 %"]
    assert cells(text, "2a. Zero-shot", "ridge")[2][4:6] == ["+28.0 % [+20.0 %, +35.0 %]", "?"]
    assert cells(text, "2a. Zero-shot", "raw")[2][4:6] == ["", ""]
    assert report.PAPER_GAINS == {"zero_shot": "up to +52.5 %", "supervised": "up to +7.5 %"}
    assert table.set_index(["experiment", "system"]).cider_d_relative_gain["zero_shot", "diffusion_link"] == pytest.approx(0.3)


def test_parts_of_the_split_stand_apart(table, profile):
    assert "| system | decoding | n | labels seen in train | held-out phrasing |" in markdown(profile)
    assert cells(markdown(profile), "2a. Zero-shot", "raw")[3][3:] == ["0.700 [0.600, 0.800]"] * 2
    assert cells(markdown(profile), "2a. Zero-shot", "ridge")[3][3:] == ["", ""]


def test_decodings_do_not_compete(table, profile):
    for system in ("raw", "diffusion_link"):
        MetricsFile(profile).add(system_rows("zero_shot", system, SCORES[system] + 0.5, "beam 4", seeds=1))
    new = write_table2(profile).set_index(["experiment", "system", "decoding"])
    assert new.cider_d_mark["zero_shot", "diffusion_link", "greedy"] == new.cider_d_mark["zero_shot", "diffusion_link", "beam 4"] == "best"
    assert new.n_seeds["zero_shot", "raw", "beam 4"] == 1 and pd.isna(new.cider_d_t95["zero_shot", "raw", "beam 4"])


def test_strict_rows_and_rows_in_another_space_have_their_place(table, profile):
    MetricsFile(profile).add(system_rows(DISJOINT, "diffusion_link", 1.1) + system_rows("zero_shot", "diffusion_bridge", 9.0, space="centred"))
    new = write_table2(profile)
    text = markdown(profile)
    assert text.index("2a. Zero-shot") < text.index("2a, strict") < text.index("2b. Fully")
    assert cells(text, "2a, strict", "diffusion_link") and cells(text, "2a. Zero-shot", "diffusion_bridge (centred space)")
    assert new[new.space == "centred"].cider_d_mark.isna().all(), "another space is not ranked among the others, as in Table 1"


def test_t_intervals():
    assert t_half_width(1.0, 3) == pytest.approx(4.302653 / 3**0.5, abs=1e-5)
    assert t_half_width(1.0, 1) is None and t_half_width(float("nan"), 3) is None


# -------------------------------------------------------------------------------------------------------------------- C3, C4
def test_c3_and_c4_are_judged_by_the_gains_interval(table, profile):
    rows = {row["id"]: row for row in write_claims(profile)}
    assert rows["C3"]["verdict"] == "supported" and rows["C3"]["ours"] == pytest.approx(0.3) and rows["C3"]["n_seeds"] == 3
    assert rows["C4"]["verdict"] == "partly_supported" and rows["C4"]["paper_value"] == "+7.5 % relative"
    assert rows["C3"]["decided_by"] == "cider_d_relative_gain of diffusion_link-raw +30.0 % [+20.0 %, +42.0 %]"
    assert "system=diffusion_link-raw, metric=cider_d_relative_gain" in rows["C3"]["evidence"] and rows["C3"]["evidence"].endswith("decoding=greedy")
    assert "ridge is not told apart from diffusion_link on cider_d" in rows["C3"]["note"]
    MetricsFile(profile).add(gains("supervised", -0.05, -0.1, 0.02))
    assert write_claims(profile)[3]["verdict"] == "not_supported"


# --------------------------------------------------------------------------------------------------------------- comparison
def test_the_paper_file_holds_what_the_rules_quote_and_only_marked_figures():
    paper = load_paper()
    assert sorted(paper.claim[paper.claim != ""]) == ["C1", "C2", "C3", "C4", "C5", "C6"]
    assert not paper.duplicated(["system", "setting", "metric"]).any()
    quoted = paper.set_index("claim").value
    assert {rule.id: rule.paper_value for rule in VERDICT_RULES if rule.id in ("C3", "C4")} == {
        claim: f"+{quoted[claim]} % relative" for claim in ("C3", "C4")}
    assert set(quoted[["C1", "C2", "C6"]]) == {"?"}
    for row in paper.itertuples():
        known = row.value not in ("?", "-")
        assert known == bool(row.unit) and (row.status != "?" if known else row.status in ("?", "abstract") or row.value == "-"), row
        assert not known or row.unit != "percent" or 1 < float(row.value) < 200, f"{row}: papers print scores x 100"
    ours = paper[(paper.system == "Diffusion-Link") & (paper.claim == "")]
    assert len(ours) == 10 and set(ours.value) == {"?"} == set(ours.status)      # no table value of the paper is known


def test_ours_and_other_peoples_audiocaps_figures_share_no_row():
    rows = comparison_rows(MINI)
    others = [row for row in rows if row["part"] == "others"]
    assert len(others) == 55 and not any(row.get("ours") for row in others) and all(row["comparable"].startswith("no") for row in others)
    beside = {row["metric"] for row in rows if row.get("ours") and row["paper"] not in ("?", "-") and row["claim"] != "C5"}
    assert beside == {"cider_d_relative_gain"} and all(set(row) <= set(report.COMPARISON_COLUMNS) for row in rows)
    assert all(row["paper"] == "?" for row in rows if row["part"] in ("table1", "table2"))
    table = pd.read_csv(MINI / "table1.csv", dtype=str).query("space == 'text'").set_index("system")
    assert all(row["ours"] == table[row["metric"]][row["system"]] for row in rows if row["part"] == "table1")


def test_without_tables_the_others_are_there(profile):
    profile.results_dir.mkdir(parents=True)
    assert {row["part"] for row in write_comparison(profile)} == {"others"}
    assert "| LAMB (extra pretraining) | supervised | 27.1 | 91.1 |" in (profile.results_dir / "comparison.md").read_text()


@pytest.mark.parametrize(("metric", "system", "ours", "low", "high", "shown"), [
    ("cider_d_relative_gain", "diffusion_link-raw", "0.3817", "0.107", "0.802", "+38.2 % [+10.7 %, +80.2 %]"),
    ("rmg", "diffusion_link-seed", "0.0002", "-0.0011", "0.0016", "+0.000 [-0.001, +0.002]"),
    ("rmg", "raw", "0.402258", "0.38751", "0.41753", "0.402 [0.388, 0.418]"),
    ("parameters", "diffusion_link", "2437888", "2437888", "2437888", "2,437,888"),
    ("spice", "raw", "", "", "", "n/c"),
])
def test_figures_are_shown_with_their_interval(metric, system, ours, low, high, shown):
    assert report._ours({"metric": metric, "system": system, "ours": ours, "ci_low": low, "ci_high": high}) == shown
    assert report.interval(math.nan, 0.1, 0.2) == "n/c" and report.interval(0.5) == "0.500"


# ------------------------------------------------------------------------------------------------------- the page, the cards
def test_the_page_is_the_notebook_without_its_code(profile):
    text = report.write_report(profile, REPO / "notebooks/10_replication_report.ipynb").read_text(encoding="utf-8")
    assert "<table" in text and "The replication report" in text and "from dl.report import" not in text and "<script" not in text


@pytest.mark.parametrize("name", report.CARDS)
def test_a_card_is_in_step_and_in_the_hubs_format(name, profile):
    from huggingface_hub import ModelCard

    for file in ("table1.csv", "table2.csv", f"checkpoints/{name}/config.json"):
        (profile.results_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (profile.results_dir / file).write_bytes((MINI / file).read_bytes())
    card, = report.write_cards(profile)
    text = card.read_text(encoding="utf-8")
    assert text == (MINI / "checkpoints" / name / "README.md").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ModelCard(text).data
    assert data.license == "mit" and [result.metric_type for result in data.eval_results] == report.CARDS[name][2]
    assert (name == "captioner") == (data.base_model is not None) and "{{" not in text and "nan" not in text


# ------------------------------------------------------------------------------------------- made again from the raw files
@cache
def committed(name: str) -> list[dict[str, str]]:
    with open(MINI / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs(experiment: str, system: str, metric: str) -> list[float]:
    """The single runs' values on test: one a training seed and noise seed."""
    wanted = {"experiment": experiment, "system": system, "metric": metric, "split": "test", "space": "text"}
    return [float(row["value"]) for row in committed("metrics") if row["seed"] != "all" and all(row[key] == value for key, value in wanted.items())]


def whole(experiment: str, system: str, metric: str) -> tuple[float, float, float]:
    """Value and interval of the one row that sums the runs up."""
    wanted = {"experiment": experiment, "system": system, "metric": metric, "split": "test", "space": "text", "seed": "all"}
    found = [row for row in committed("metrics") if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return tuple(float(found[0][key]) for key in ("value", "ci_low", "ci_high"))


def one_cell(table: str, **where: str) -> dict[str, str]:
    (found,) = [row for row in committed(table) if all(row[key] == value for key, value in where.items())]
    return found


def committed_verdict(claim: str) -> str:
    return one_cell("claims", id=claim)["verdict"]


@pytest.mark.parametrize(("system", "metric", "count"), [
    ("diffusion_link", "pair_cosine", 15), ("diffusion_bridge", "rmg", 3), ("regression_mlp", "recall_at_10", 3)])
def test_a_cell_of_table1_is_the_mean_of_its_runs(system, metric, count):
    values, row = runs("gap", system, metric), one_cell("table1", system=system, space="text")
    assert len(values) == count
    assert float(row[metric]) == pytest.approx(statistics.fmean(values), abs=1e-8)
    assert float(row[f"{metric}_sd"]) == pytest.approx(statistics.stdev(values), abs=1e-8)
    assert float(row[f"{metric}_ci_low"]) < float(row[metric]) < float(row[f"{metric}_ci_high"])


def test_the_verdict_on_c1_follows_from_nine_intervals():
    """Pair cosine higher, centroid gap and RMG lower than each other diffusion method's: the worst of nine decides."""
    grades = []
    for peer in ("diffusion_bridge", "conditional_diffusion", "seed"):
        for metric, sign in (("pair_cosine", 1), ("centroid_gap", -1), ("rmg", -1)):
            mean = statistics.fmean(runs("gap", "diffusion_link", metric)) - statistics.fmean(runs("gap", peer, metric))
            value, low, high = whole("gap:paired", f"diffusion_link-{peer}", metric)
            assert value == pytest.approx(mean, abs=1e-8)
            grades.append(2 if min(sign * low, sign * high) > 0 else 1 if sign * mean > 0 else 0)
    assert committed_verdict("C1") == ("not_supported", "partly_supported", "supported")[min(grades)]


def test_the_verdict_on_c3_follows_from_the_gain_in_cider():
    bridged, raw = (statistics.fmean(runs("zero_shot", system, "cider_d")) for system in ("diffusion_link", "raw"))
    value, low, high = whole("zero_shot:paired", "diffusion_link-raw", "cider_d_relative_gain")
    assert value == pytest.approx(bridged / raw - 1, abs=1e-6) and low < value < high
    assert committed_verdict("C3") == ("supported" if low > 0 else "partly_supported" if bridged > raw else "not_supported")
    assert float(one_cell("table2", experiment="zero_shot", system="diffusion_link", space="text")["cider_d_relative_gain"]) == pytest.approx(value)


def test_a_cider_d_of_table2_follows_from_the_captions():
    """The committed captions of raw against data/mini/test.csv by pycocoevalcap, seed by seed."""
    from pycocoevalcap.cider.cider import Cider

    from dl.caption_metrics import find_java, ptb_tokenize

    said = committed("captions/zero_shot_beam4")
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
    assert float(one_cell("table2", experiment="zero_shot", system="raw", space="text")["cider_d"]) == pytest.approx(statistics.fmean(scores), abs=1e-6)
