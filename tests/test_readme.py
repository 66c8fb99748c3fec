"""The README says what the files under results/mini say, and names every deviation that the code marks."""
from __future__ import annotations

import re

import pandas as pd
import pytest

from dl.config import REPO, get_profile
from dl.report.claims import VERDICT_RULES, judge
from dl.report.readme import BLOCKS, render

MINI = REPO / "results/mini"


def test_readme_is_in_step_with_the_results():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert render(text, MINI) == text, "README.md is out of step: run python -m dl readme"


@pytest.mark.parametrize("block", BLOCKS)
def test_a_changed_figure_would_be_seen(block):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {block}:start[^>]*-->\n(.*?)<!-- {block}:end -->", text, re.DOTALL)
    changed = text[: found.start(1)] + found[1].replace("0", "1") + text[found.end(1):]
    assert changed != text and render(changed, MINI) == text


def test_a_missing_marker_is_refused():
    with pytest.raises(ValueError, match="lacks the markers"):
        render("no markers here", MINI)


def test_every_deviation_in_code_is_in_the_readme_and_the_other_way_round():
    marked = {name for path in (REPO / "dl").rglob("*.py") for name in re.findall(r"DEVIATION\(([\w-]+)\)", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `([\w-]+)` \|", (REPO / "README.md").read_text(encoding="utf-8").split("## Differences from the paper")[1], re.MULTILINE))
    assert marked and marked == listed


@pytest.mark.parametrize(("system", "metric"), [("raw", "pair_cosine"), ("diffusion_link", "centroid_gap"), ("ridge", "recall_at_10")])
def test_table1_repeats_the_means_of_the_single_runs(system, metric):
    table = pd.read_csv(MINI / "table1.csv")
    rows = pd.read_csv(MINI / "metrics.csv", dtype={"seed": str, "noise_seed": str})
    runs = rows[(rows.experiment == "gap") & (rows.split == "test") & (rows.system == system) & (rows.metric == metric)
                & (rows.space == "text") & (rows.seed != "all")]
    assert len(runs) == (15 if system == "diffusion_link" else 1)
    cell = table.loc[(table.system == system) & (table.space == "text"), metric].item()
    assert cell == pytest.approx(runs.value.mean(), abs=1e-9)


@pytest.mark.parametrize("claim", ["C1", "C2", "C5"])
def test_verdicts_follow_from_the_metrics(claim):
    from dl.results import MetricsFile

    rule = next(rule for rule in VERDICT_RULES if rule.id == claim)
    judged = judge(rule, MetricsFile(get_profile("mini", results_root=REPO / "results")).frame(), "mini")
    written = pd.read_csv(MINI / "claims.csv", dtype=str).set_index("id")
    assert judged["verdict"] == written.verdict[claim] != "not_tested"


def test_search_gave_every_tuned_system_the_same_budget():
    search = pd.read_csv(MINI / "search.csv")
    from dl.experiments import FITS, INFERENCE
    from dl.peers import REGISTRY

    for system in (*FITS, "diffusion_link_ddim"):
        trials = search[search.system == system]
        assert trials.trial.nunique() == len(FITS.get(system, [{}])) * len(INFERENCE.get(system, [{}])) >= 8
        best = trials[trials.metric == "rmg"]
        assert best.loc[best.chosen == 1, "value"].item() == best.value.min()
    trained = search[search.train_steps > 0]
    assert trained.train_steps.nunique() == 1 and set(trained.system) == {name for name in (*FITS, "diffusion_link_ddim") if REGISTRY[name].trained} and set(search.split) == {"val"}
