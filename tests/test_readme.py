"""The README says what the files under results/mini say, and names every deviation that the code marks."""
from __future__ import annotations

import re
import runpy
import warnings

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from dl.config import REPO, get_profile
from dl.report.cards import CARDS
from dl.report.claims import VERDICT_RULES, judge
from dl.report.readme import BLOCKS, render
from dl.report.summaries import STORY, gap_table

MINI = REPO / "results/mini"


def python_block(text: str, after: str) -> str:
    """The first Python block below a heading."""
    return re.search(r"```python\n(.*?)```", text.split(f"{after}\n", 1)[1], re.DOTALL)[1]


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
    from dl.store import MetricsFile

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


def test_the_readme_tells_the_story_and_the_tables_hold_every_row():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `(\w+)` \|", gap_table(MINI, STORY), re.MULTILINE))
    every = set(re.findall(r"^\| `(\w+)` \|", gap_table(MINI), re.MULTILINE))
    assert shown == set(STORY) & every < every
    assert all(name in (MINI / "table1.md").read_text(encoding="utf-8") for name in every)
    assert all((REPO / path).exists() for path in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text))


def test_own_embeddings_in_ten_lines(tmp_path, monkeypatch):
    block = python_block((REPO / "README.md").read_text(encoding="utf-8"), "### Your own embeddings")
    assert len([line for line in block.splitlines() if line]) <= 10
    generator = torch.Generator().manual_seed(0)
    text_clip = torch.arange(40).repeat_interleave(2)
    audio = torch.randn(40, 8, generator=generator)
    monkeypatch.chdir(tmp_path)
    save_file({"audio": audio, "text": audio[text_clip] + 1, "text_clip": text_clip}, "pairs.safetensors")
    assert "train_steps=600" in block
    (tmp_path / "block.py").write_text(block.replace("train_steps=600", "train_steps=4"))
    names = runpy.run_path("block.py")
    assert names["bridged"].shape == (40, 8)
    assert torch.allclose(names["bridged"].norm(dim=1), torch.ones(40), atol=1e-5)


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_in_step_and_in_the_hubs_format(name):
    text = (MINI / "checkpoints" / name / "README.md").read_text(encoding="utf-8")
    assert CARDS[name](MINI) == text, "the card is out of step: run python -m dl readme"
    from huggingface_hub import ModelCard

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = ModelCard(text).data
    front = yaml.safe_load(text.split("---\n")[1])
    assert {"license", "library_name", "tags", "datasets", "model-index"} <= set(front)
    assert data.license == "mit" and {result.metric_type for result in data.eval_results} & {"rmg", "cider_d"}
    assert (name == "captioner") == ("base_model" in front)
    for section in ("## Use", "## Training", "## Measured", "## Limits", "## Licence", "## Put it on the hub"):
        assert section in text


@pytest.mark.parametrize(("name", "answer"), [("bridge", "bridged_emb"), ("captioner", "captions")])
def test_the_use_that_a_card_shows_works(name, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    (tmp_path / "use.py").write_text(python_block((MINI / "checkpoints" / name / "README.md").read_text(encoding="utf-8"), "## Use"))
    names = runpy.run_path(str(tmp_path / "use.py"))
    assert len(names[answer]) == 1
    assert isinstance(names[answer][0], str) if name == "captioner" else names[answer].shape == (1, 256)


def test_a_card_of_other_figures_would_be_seen(tmp_path):
    for file in ("table1.csv", "table2.csv", "metrics.csv", "checkpoints/bridge/config.json"):
        (tmp_path / "mini" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mini" / file).write_bytes((MINI / file).read_bytes())
    table = pd.read_csv(MINI / "table1.csv", dtype=str, keep_default_na=False)
    table.loc[table.system == "diffusion_link", "rmg"] = "0.123"
    table.to_csv(tmp_path / "mini/table1.csv", index=False)
    assert "0.123" in CARDS["bridge"](tmp_path / "mini") != CARDS["bridge"](MINI)
