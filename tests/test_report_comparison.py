"""What the paper reports, as typed, and ours beside it."""
from __future__ import annotations

import re

import pytest

from dl.config import REPO, get_profile
from dl.report.claims import VERDICT_RULES
from dl.report.comparison import COMPARISON_COLUMNS, comparison_rows, figure_text, others_part, write_comparison
from dl.report.paper import PAPER_COLUMNS, PAPER_CSV, load_paper

MINI = REPO / "results/mini"
HEAD = ",".join(PAPER_COLUMNS)
GOOD = "LAMB,supervised,AudioCaps,cider,91.1,,percent,,digest of the paper,extra pretraining"


def test_the_paper_file_holds_what_the_rules_quote():
    paper = load_paper()
    assert sorted(paper.claim[paper.claim != ""]) == ["C1", "C2", "C3", "C4", "C5", "C6"]
    for rule in VERDICT_RULES:
        row = paper[paper.claim == rule.id].iloc[0]
        if rule.id in ("C3", "C4"):
            assert rule.paper_value == f"+{row.value} % relative" and row.bound == "up to"
        elif rule.id != "C5":
            assert row.value == "?"
    ours = paper[(paper.system == "Diffusion-Link") & (paper.claim == "")]
    assert len(ours) == 10 and set(ours.value) == {"?"} == set(ours.status)      # no table value of the paper is known
    recalled = set(paper.system[paper.status == "recalled"])
    assert recalled == {"DRCap", "WSAC", "Zhang et al. 2406.06295", "ZerAuCap", "EnCLAP-large"}


@pytest.mark.parametrize(("line", "message"), [
    (GOOD.replace("91.1", "0.911"), "line 3: 0.911 is no score x 100"),
    (GOOD.replace("91.1", "about 90"), "line 3: value 'about 90' is no number"),
    (GOOD.replace("91.1", "nan"), "line 3: value 'nan' is no number"),
    (GOOD.replace("91.1", "?"), "'?' has no unit"),
    (GOOD.replace("91.1,,percent", "?,,"), "does not go with status 'digest of the paper'"),
    (GOOD.replace("91.1", ""), "value is blank"),
    (GOOD.replace("digest of the paper", "sure"), "status 'sure' is not one of"),
    (GOOD.replace("digest of the paper", "?"), "needs a unit and a status"),
    (GOOD.replace("cider", "bleu"), "metric 'bleu' is not one of"),
    (GOOD.replace("supervised", "fully supervised"), "setting 'fully supervised'"),
    (GOOD + ",more", "11 cells, wanted 10"),
    (GOOD.replace("LAMB", "SLAM-AAC"), "stands on line 2 already"),
])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "paper.csv"
    path.write_text("\n".join([HEAD, GOOD.replace("LAMB", "SLAM-AAC"), line]) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_paper(path)
    assert str(error.value).startswith("paper.csv line 3: ")


def test_wrong_columns_are_named(tmp_path):
    path = tmp_path / "paper.csv"
    path.write_text("system,value\n")
    with pytest.raises(ValueError, match="line 1: columns are system,value, wanted system,setting"):
        load_paper(path)


# -------------------------------------------------------------------------------------------------------------- comparison
def test_ours_and_other_peoples_audiocaps_figures_share_no_row():
    rows = comparison_rows(MINI)
    others = [row for row in rows if row["part"] == "others"]
    assert len(others) == 55 and not any(row.get("ours") for row in others) and all(row["comparable"].startswith("no") for row in others)
    beside = {row["metric"] for row in rows if row.get("ours") and row["paper"] not in ("?", "-") and row["claim"] != "C5"}
    assert beside == {"cider_d_relative_gain"}
    assert all(set(row) <= set(COMPARISON_COLUMNS) for row in rows)
    assert "not ranked with ours" in others_part(rows)


def test_every_unknown_is_shown_as_unknown():
    rows = comparison_rows(MINI)
    typed = set(load_paper().value)
    assert all(row["paper"] == "?" for row in rows if row["part"] in ("table1", "table2"))
    for row in rows:
        number = re.sub(r"^up to |^\+| % relative$| blocks$", "", re.sub(r"^up to ", "", row["paper"]))
        assert number in typed, row
    assert {row["claim"] for row in rows if row["part"] == "claims"} == {f"C{k}" for k in range(1, 7)}


def test_ours_is_what_the_tables_say():
    import pandas as pd

    table = pd.read_csv(MINI / "table1.csv", dtype=str)
    for row in comparison_rows(MINI):
        if row["part"] == "table1":
            assert row["ours"] == table.loc[(table.system == row["system"]) & (table.space == "text"), row["metric"]].item()


def test_the_files_are_those_of_the_tables(results_root):
    """Without tables the comparison still has the others' figures; committed files are in step."""
    profile = get_profile("mini")
    profile.results_dir.mkdir(parents=True)
    assert {row["part"] for row in write_comparison(profile)} == {"others"}
    text = (profile.results_dir / "comparison.md").read_text()
    assert "| LAMB (extra pretraining) | supervised | 27.1 | 91.1 |" in text
    assert PAPER_CSV.is_file()


@pytest.mark.parametrize(("metric", "system", "ours", "low", "high", "shown"), [
    ("cider_d_relative_gain", "diffusion_link-raw", "0.3817", "0.107", "0.802", "+38.2 % [+10.7 %, +80.2 %]"),
    ("rmg", "diffusion_link-seed", "0.0002", "-0.0011", "0.0016", "+0.000 [-0.001, +0.002]"),
    ("rmg", "raw", "0.402258", "0.38751", "0.41753", "0.402 [0.388, 0.418]"),
    ("parameters", "diffusion_link", "2437888", "2437888", "2437888", "2,437,888"),
    ("spice", "raw", "", "", "", "n/c"),
])
def test_figures_are_shown_with_their_interval(metric, system, ours, low, high, shown):
    assert figure_text({"metric": metric, "system": system, "ours": ours, "ci_low": low, "ci_high": high}) == shown
