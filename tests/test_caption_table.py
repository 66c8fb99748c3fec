"""Table 2 and the verdicts on C3 and C4, from figures made up for the purpose."""
from __future__ import annotations

import re

import pandas as pd
import pytest

from dl.config import get_profile
from dl.caption_metrics import METRICS
from dl.report.caption_table import DISJOINT, paper_gain, t_half_width, write_table2
from dl.report.claims import write_claims
from dl.store import MetricsFile

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
        interval = {} if absent else {"ci_low": value - half, "ci_high": value + half, "sd": 0.01 if seeds > 1 else None}
        rows.append({**row, "seed": "all", "noise_seed": "all", **interval})
    return rows


def paired_row(
    experiment: str, pair: str, value: float | None, low: float | None, high: float | None, metric: str = "cider_d", decoding: str = "greedy"
) -> dict:
    return {"experiment": f"{experiment}:paired", "system": pair, "split": "test", "space": "text", "decoding": decoding, "n_items": 600,
            "metric": metric, "seed": "all", "noise_seed": "all", "value": value, "ci_low": low, "ci_high": high,
            "reason": "" if value is not None else "raw scores 0"}


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


def test_every_row_names_its_decoding_and_n(table, profile):
    for system in SCORES:
        assert all(line[1:3] == ["greedy", "600"] for line in cells(markdown(profile), "2a. Zero-shot", system))
    assert set(table.decoding) == {"greedy"} and set(table.n_items) == {"600"} and set(table.n_seeds) == {3}


def test_markdown_tables_are_whole(table, profile):
    blocks = re.findall(r"(?:^\|.*\n)+", markdown(profile), flags=re.MULTILINE)
    assert len(blocks) >= 7
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


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
    assert cells(text, "2a. Zero-shot", "diffusion_link")[2][4:] == ["+30.0 % [+20.0, +42.0]", "up to +52.5 %", "+0.020 [-0.010, +0.050]"]
    assert cells(text, "2b. Fully supervised", "diffusion_link")[2][4:6] == ["+5.0 % [-2.0, +12.0]", "up to +7.5 %"]
    assert cells(text, "2a. Zero-shot", "ridge")[2][4:6] == ["+28.0 % [+20.0, +35.0]", "?"]
    assert cells(text, "2a. Zero-shot", "raw")[2][4:6] == ["", ""]
    assert {paper_gain("zero_shot", name) for name in ("ridge", "text_ceiling", "diffusion_bridge")} == {"?"}
    assert paper_gain(DISJOINT, "diffusion_link") == "?"
    assert table.set_index(["experiment", "system"]).cider_d_relative_gain["zero_shot", "diffusion_link"] == pytest.approx(0.3)


def test_the_sentence_similarity_bears_its_models_name(table, profile):
    assert "sbert_sim (all-MiniLM-L6-v2) ↑" in markdown(profile) and "fense" not in markdown(profile).lower()


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


def test_nothing_scored_names_the_notebooks(profile):
    with pytest.raises(ValueError, match="run notebooks 07 and 08"):
        write_table2(profile)


# -------------------------------------------------------------------------------------------------------------------- C3, C4
def verdicts(profile, rows: list[dict]) -> dict[str, dict]:
    MetricsFile(profile).add(rows)
    return {row["id"]: row for row in write_claims(profile)}


def test_c3_and_c4_are_judged_by_the_gains_interval(table, profile):
    rows = {row["id"]: row for row in write_claims(profile)}
    assert rows["C3"]["verdict"] == "supported" and rows["C3"]["ours"] == pytest.approx(0.3) and rows["C3"]["n_seeds"] == 3
    assert rows["C4"]["verdict"] == "partly_supported" and rows["C4"]["paper_value"] == "+7.5 % relative"
    assert rows["C3"]["decided_by"] == "cider_d_relative_gain of diffusion_link-raw +30.0 % [+20.0 %, +42.0 %]"
    assert "system=diffusion_link-raw, metric=cider_d_relative_gain" in rows["C3"]["evidence"] and rows["C3"]["evidence"].endswith("decoding=greedy")
    lost = verdicts(profile, gains("supervised", -0.05, -0.1, 0.02))["C4"]
    assert lost["verdict"] == "not_supported"


def test_a_control_that_does_as_well_is_named(table, profile):
    assert "ridge equals diffusion_link on cider_d" in {row["id"]: row for row in write_claims(profile)}["C3"]["note"]
    beaten = verdicts(profile, [paired_row("zero_shot", "diffusion_link-ridge", -0.2, -0.3, -0.1)])["C3"]
    assert "ridge beats diffusion_link on cider_d" in beaten["note"] and beaten["verdict"] == "supported"
    ours = verdicts(profile, [paired_row("zero_shot", "diffusion_link-ridge", 0.2, 0.1, 0.3)])["C3"]
    assert "ridge" not in ours["note"]


def test_beam_search_comes_before_greedy(table, profile):
    row = verdicts(profile, gains("zero_shot", 0.1, 0.05, 0.2, "beam 4") + system_rows("zero_shot", "diffusion_link", 1.2, "beam 4", seeds=1))["C3"]
    assert row["ours"] == pytest.approx(0.1) and row["evidence"].endswith("decoding=beam 4") and row["n_seeds"] == 1


def test_a_gain_without_a_size_is_not_tested(profile):
    row = verdicts(profile, [paired_row("zero_shot", "diffusion_link-raw", None, None, None, "cider_d_relative_gain")])["C3"]
    assert row["verdict"] == "not_tested" and "not computed" in row["note"]
