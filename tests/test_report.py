"""Table 2, verdicts on C3 and C4, the comparison, page and cards; cells and verdicts made again from raw files."""
from __future__ import annotations

import csv
import math
import statistics
import warnings

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
NOTEBOOK = REPO / "notebooks/10_replication_report.ipynb"


@pytest.fixture
def profile(tmp_path):
    return get_profile("mini", results_root=tmp_path)


def system_rows(experiment: str, system: str, value: float, seeds: int = 3, **more) -> list[dict]:
    """Every metric of one system: its seeds and their sum; SPICE and SPIDEr are not computed."""
    shared = {"experiment": experiment, "system": system, "split": "test", "decoding": "greedy", "n_items": 600,
              "ids_sha256": "0" * 64, "noise_seed": 0, "space": "text", **more}
    rows = []
    for metric in METRICS:
        absent = metric in ("spice", "spider")
        row = {**shared, "metric": metric, "value": None if absent else value, "reason": NO_SPICE if absent else ""}
        rows += [{**row, "seed": seed, "value": None if absent else value + 0.01 * (seed - 1)}
                 for seed in range(seeds)]
        ends = {"ci_low": value - 0.1, "ci_high": value + 0.1, "sd": 0.01 if seeds > 1 else None}
        rows.append({**row, "seed": "all", "noise_seed": "all", **({} if absent else ends)})
    return rows


def gains(experiment: str, gain: float, low: float, high: float) -> list[dict]:
    """The paired rows of one experiment: relative gains over raw, and the bridge's difference to raw and to ridge."""
    shared = {"experiment": f"{experiment}:paired", "split": "test", "space": "text", "decoding": "greedy",
              "n_items": 600, "seed": "all", "noise_seed": "all"}
    found = [("diffusion_link-raw", "cider_d_relative_gain", gain, low, high),
             ("ridge-raw", "cider_d_relative_gain", 0.28, 0.2, 0.35),
             ("diffusion_link-raw", "cider_d", 0.3, 0.2, 0.4), ("diffusion_link-ridge", "cider_d", 0.02, -0.01, 0.05)]
    return [{**shared, **dict(zip(("system", "metric", "value", "ci_low", "ci_high"), values, strict=True))}
            for values in found]


@pytest.fixture
def table(profile):
    rows = [row for system, value in SCORES.items() for row in system_rows("zero_shot", system, value)]
    rows += [row for system in ("raw", "diffusion_link") for row in system_rows("supervised", system, SCORES[system])]
    rows += gains("zero_shot", 0.3, 0.2, 0.42) + gains("supervised", 0.05, -0.02, 0.12)
    rows += [{**row, "split": f"test:{part}"} for row in system_rows("zero_shot", "raw", 0.7)
             if row["seed"] == "all" and row["metric"] == "cider_d" for part in ("seen", "heldout_phrasing")]
    MetricsFile(profile).add(rows)
    return write_table2(profile)


def markdown(profile) -> str:
    return (profile.results_dir / "table2.md").read_text(encoding="utf-8")


def cells(text: str, panel: str, system: str) -> list[list[str]]:
    """The cells of a system's lines in one panel."""
    part = text.split(f"## {panel}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith(f"| {system} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ------------------------------------------------------------------------------------------------------------ table 2
def test_best_and_ties_are_marked_by_interval(table, profile):
    marks = table[table.experiment == "zero_shot"].set_index("system").cider_d_mark
    assert marks["diffusion_link"] == "best" and marks["ridge"] == "tie"
    assert pd.isna(marks["raw"]) and pd.isna(marks["text_ceiling"])
    first = {system: cells(markdown(profile), "2a. Zero-shot", system)[0][4] for system in SCORES}
    assert first["diffusion_link"].startswith("**1.300** ± 0.010 [1.200, 1.400]")
    assert first["ridge"].startswith("*1.280*") and first["raw"].startswith("1.000")


def test_what_was_not_computed_has_its_reason_below(table, profile):
    text = markdown(profile)
    row = cells(text, "2a. Zero-shot", "raw")[0]
    assert row[5] == row[6] == "n/c" and table.spice.isna().all()
    footnote = text.split("## Not computed")[1]
    assert footnote.count("\n- ") == 2
    assert f"- spice (2a, 2b): {NO_SPICE}" in footnote and f"- spider (2a, 2b): {NO_SPICE}" in footnote


@pytest.mark.parametrize(("panel", "system", "shown"), [
    ("2a. Zero-shot", "diffusion_link",
     ["+30.0 % [+20.0 %, +42.0 %]", "up to +52.5 %", "+0.020 [-0.010, +0.050]"]),
    ("2b. Fully supervised", "diffusion_link", ["+5.0 % [-2.0 %, +12.0 %]", "up to +7.5 %"]),
    ("2a. Zero-shot", "ridge", ["+28.0 % [+20.0 %, +35.0 %]", "?"]),
    ("2a. Zero-shot", "raw", ["", ""]),
])
def test_gains_stand_beside_the_papers_and_nothing_is_invented(table, profile, panel, system, shown):
    assert cells(markdown(profile), panel, system)[2][4:4 + len(shown)] == shown


def test_parts_of_the_split_stand_apart(table, profile):
    assert "| system | decoding | n | labels seen in train | held-out phrasing |" in markdown(profile)
    assert cells(markdown(profile), "2a. Zero-shot", "raw")[3][3:] == ["0.700 [0.600, 0.800]"] * 2
    assert cells(markdown(profile), "2a. Zero-shot", "ridge")[3][3:] == ["", ""]


def test_decodings_spaces_and_disjoint_mappings_do_not_compete(table, profile):
    rows = system_rows(DISJOINT, "diffusion_link", 1.1)
    rows += system_rows("zero_shot", "diffusion_bridge", 9.0, space="centred")
    for system in ("raw", "diffusion_link"):
        rows += system_rows("zero_shot", system, SCORES[system] + 0.5, seeds=1, decoding="beam 4")
    MetricsFile(profile).add(rows)
    new = write_table2(profile).set_index(["experiment", "system", "decoding"]).sort_index()
    assert new.cider_d_mark["zero_shot", "diffusion_link"].to_dict() == {"greedy": "best", "beam 4": "best"}
    assert new.n_seeds["zero_shot", "raw", "beam 4"] == 1 and pd.isna(new.cider_d_t95["zero_shot", "raw", "beam 4"])
    assert new[new.space == "centred"].cider_d_mark.isna().all()
    text = markdown(profile)
    assert text.index("2a. Zero-shot") < text.index("2a, strict") < text.index("2b. Fully")
    assert cells(text, "2a, strict", "diffusion_link")
    assert cells(text, "2a. Zero-shot", "diffusion_bridge (centred space)")


def test_t_intervals():
    assert t_half_width(1.0, 3) == pytest.approx(4.302653 / 3**0.5, abs=1e-5)
    assert t_half_width(1.0, 1) is None and t_half_width(float("nan"), 3) is None


def test_c3_and_c4_are_judged_by_the_gains_interval(table, profile):
    c3, c4 = write_claims(profile)[2:4]
    assert (c3["verdict"], c3["ours"], c3["n_seeds"]) == ("supported", pytest.approx(0.3), 3)
    assert (c4["verdict"], c4["paper_value"]) == ("partly_supported", "+7.5 % relative")
    assert c3["decided_by"] == "cider_d_relative_gain of diffusion_link-raw +30.0 % [+20.0 %, +42.0 %]"
    assert "system=diffusion_link-raw, metric=cider_d_relative_gain" in c3["evidence"]
    assert c3["evidence"].endswith("decoding=greedy")
    assert "ridge is not told apart from diffusion_link on cider_d" in c3["note"]
    MetricsFile(profile).add(gains("supervised", -0.05, -0.1, 0.02))
    assert write_claims(profile)[3]["verdict"] == "not_supported"


# --------------------------------------------------------------------------------------------------------- comparison
def test_the_paper_file_holds_what_the_rules_quote_and_only_marked_figures():
    paper = load_paper()
    assert not paper.duplicated(["system", "setting", "metric"]).any()
    quoted = paper[paper.claim != ""].set_index("claim").value
    assert sorted(quoted.index) == ["C1", "C2", "C3", "C4", "C5", "C6"] and set(quoted[["C1", "C2", "C6"]]) == {"?"}
    assert [rule.paper_value for rule in VERDICT_RULES[2:4]] == [f"+{quoted[c]} % relative" for c in ("C3", "C4")]
    for row in paper.itertuples():
        known = row.value not in ("?", "-")
        assert known == bool(row.unit) and (not known or row.status != "?"), row
        assert known or row.value == "-" or row.status in ("?", "abstract"), row
        assert not known or row.unit != "percent" or 1 < float(row.value) < 200, f"{row}: papers print scores x 100"
    ours = paper[(paper.system == "Diffusion-Link") & (paper.claim == "")]
    assert len(ours) == 10 and set(ours.value) == {"?"} == set(ours.status)      # no table value of the paper is known


def test_ours_and_other_peoples_audiocaps_figures_share_no_row():
    rows = comparison_rows(MINI)
    others = [row for row in rows if row["part"] == "others"]
    assert len(others) == 55 and not any(row.get("ours") for row in others)
    assert all(row["comparable"].startswith("no") for row in others)
    beside = [row for row in rows if row.get("ours") and row["paper"] not in ("?", "-") and row["claim"] != "C5"]
    assert {row["metric"] for row in beside} == {"cider_d_relative_gain"}
    assert all(row["paper"] == "?" for row in rows if row["part"] in ("table1", "table2"))


def test_without_tables_the_others_are_there(profile):
    profile.results_dir.mkdir(parents=True)
    assert {row["part"] for row in write_comparison(profile)} == {"others"}
    text = (profile.results_dir / "comparison.md").read_text()
    assert "| LAMB (extra pretraining) | supervised | 27.1 | 91.1 |" in text


def test_figures_are_shown_with_their_interval():
    assert report.interval(math.nan, 0.1, 0.2) == "n/c" and report.interval(0.5) == "0.500"
    assert report.interval(0.402258, 0.38751, 0.41753) == "0.402 [0.388, 0.418]"
    assert report.interval(0.3817, 0.107, 0.802, form="+.1%") == "+38.2 % [+10.7 %, +80.2 %]"


# -------------------------------------------------------------------------------------------------- page and the cards
def test_the_page_is_the_notebook_without_its_code(profile):
    text = report.write_report(profile, NOTEBOOK).read_text(encoding="utf-8")
    assert "<table" in text and "The replication report" in text
    assert "from dl.report import" not in text and "<script" not in text


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


# --------------------------------------------------------------------------------------- made again from the raw files
def committed(name: str, **where: str) -> list[dict[str, str]]:
    with open(MINI / f"{name}.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if all(row[key] == value for key, value in where.items())]


def runs(experiment: str, system: str, metric: str, one: bool = False) -> list[dict[str, str]]:
    """The rows on test: one a training seed and noise seed, or the ``one`` that sums them up."""
    rows = committed("metrics", experiment=experiment, system=system, metric=metric, split="test", space="text")
    return [row for row in rows if (row["seed"] == "all") == one]


def values(experiment: str, system: str, metric: str) -> list[float]:
    return [float(row["value"]) for row in runs(experiment, system, metric)]


def whole(experiment: str, system: str, metric: str) -> list[float]:
    """Value and interval of the row that sums the runs up."""
    row, = runs(experiment, system, metric, one=True)
    return [float(row[key]) for key in ("value", "ci_low", "ci_high")]


@pytest.mark.parametrize(("system", "metric", "count"), [
    ("diffusion_link", "pair_cosine", 15), ("diffusion_bridge", "rmg", 3), ("regression_mlp", "recall_at_10", 3)])
def test_a_cell_of_table1_is_the_mean_of_its_runs(system, metric, count):
    found, (row,) = values("gap", system, metric), committed("table1", system=system, space="text")
    assert len(found) == count
    assert float(row[metric]) == pytest.approx(statistics.fmean(found), abs=1e-8)
    assert float(row[f"{metric}_sd"]) == pytest.approx(statistics.stdev(found), abs=1e-8)


def test_the_verdict_on_c1_follows_from_nine_intervals():
    """Pair cosine higher, centroid gap and RMG lower than each other diffusion method's: the worst of nine decides."""
    grades = []
    for peer in ("diffusion_bridge", "conditional_diffusion", "seed"):
        for metric, sign in (("pair_cosine", 1), ("centroid_gap", -1), ("rmg", -1)):
            ours, theirs = (statistics.fmean(values("gap", name, metric)) for name in ("diffusion_link", peer))
            value, low, high = whole("gap:paired", f"diffusion_link-{peer}", metric)
            assert value == pytest.approx(ours - theirs, abs=1e-8)
            grades.append(2 if min(sign * low, sign * high) > 0 else 1 if sign * value > 0 else 0)
    verdict = ("not_supported", "partly_supported", "supported")[min(grades)]
    assert committed("claims", id="C1")[0]["verdict"] == verdict


def test_the_verdict_on_c3_follows_from_the_gain_in_cider():
    bridged, raw = (statistics.fmean(values("zero_shot", name, "cider_d")) for name in ("diffusion_link", "raw"))
    value, low, _ = whole("zero_shot:paired", "diffusion_link-raw", "cider_d_relative_gain")
    assert value == pytest.approx(bridged / raw - 1, abs=1e-6)
    verdict = "supported" if low > 0 else "partly_supported" if bridged > raw else "not_supported"
    assert committed("claims", id="C3")[0]["verdict"] == verdict


def test_a_cider_d_of_table2_follows_from_the_captions():
    """The committed captions of raw against data/mini/test.csv by pycocoevalcap, seed by seed."""
    from pycocoevalcap.cider.cider import Cider

    from dl.caption_metrics import find_java, ptb_tokenize

    said = committed("captions/zero_shot_beam4")
    columns = sorted(name for name in said[0] if name.startswith("raw_seed_"))
    candidates = [[row[name].removeprefix("'") for row in said] for name in columns]
    scenes = pd.read_csv(REPO / "data/mini/test.csv", dtype=str)
    references = scenes.groupby(scenes.youtube_id + "_" + scenes.start_time).caption.agg(list)
    every = sorted({*scenes.caption, *(caption for given in candidates for caption in given)})
    tokens = dict(zip(every, ptb_tokenize(find_java(), every), strict=True))
    wanted = {place: [tokens[text] for text in references[row["clip_id"]]] for place, row in enumerate(said)}
    scores = [Cider().compute_score(wanted, {place: [tokens[text]] for place, text in enumerate(given)})[0]
              for given in candidates]
    assert scores == pytest.approx(values("zero_shot", "raw", "cider_d"), abs=1e-6)
    row, = committed("table2", experiment="zero_shot", system="raw", space="text")
    assert float(row["cider_d"]) == pytest.approx(statistics.fmean(scores), abs=1e-6)
