"""The replication report: marks and register agree, words follow from intervals, the page stands alone."""
from __future__ import annotations

import shutil
import sys
from html.parser import HTMLParser
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dl.config import REPO, get_profile
from dl.report import answer as ans
from dl.report import deviations
from dl.report.deviations import DEVIATIONS, deviations_table, marks
from dl.report.html import Figure, Section, page, small_png
from dl.report.replication import SECTIONS, section, write_report
from dl.store import METRIC_COLUMNS, csv_text

MINI = REPO / "results/mini"


# -------------------------------------------------------------------------------------------------------------- deviations
def test_marks_and_register_match_both_ways():
    assert set(marks()) == {entry.id for entry in DEVIATIONS} and len(DEVIATIONS) == len({entry.id for entry in DEVIATIONS})
    assert marks()["network"][0].startswith("dl/bridge.py:")
    assert all(getattr(entry, text) for entry in DEVIATIONS for text in ("here", "paper", "why"))


@pytest.mark.parametrize("change", ["a new mark", "a lost mark"])
def test_a_mark_without_an_entry_is_seen(tmp_path, monkeypatch, change):
    (tmp_path / "dl").mkdir()
    lines = [f"x = 1    # DEVIATION({entry.id}): why" for entry in DEVIATIONS]
    (tmp_path / "dl/module.py").write_text("\n".join(lines))
    assert deviations_table(True, tmp_path).count("`dl/module.py`") == len(DEVIATIONS)
    (tmp_path / "dl/module.py").write_text("\n".join(lines[1:] if change == "a lost mark" else [*lines, "# DEVIATION(unheard-of): why"]))
    with pytest.raises(ValueError, match="unheard-of" if change == "a new mark" else DEVIATIONS[0].id):
        deviations_table(True, tmp_path)


def test_the_readme_takes_its_differences_from_the_register(monkeypatch):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert deviations_table().strip() in text
    monkeypatch.setattr(deviations, "DEVIATIONS", (*DEVIATIONS[:-1], deviations.Deviation("language-model", "another", "?", "?")))
    assert deviations_table().strip() not in text


# ---------------------------------------------------------------------------------------------------------------- the words
def results_with(folder, c3: str, **differences: tuple[float, float, float]):
    """A results folder of which only the zero-shot differences from controls and the verdict on C3 are known."""
    folder.mkdir(parents=True)
    shared = {"experiment": "zero_shot:paired", "split": "test", "seed": "all", "noise_seed": "all", "space": "text", "decoding": "greedy"}
    rows = [{**shared, "system": f"diffusion_link-{other}", "metric": "cider_d", "value": value, "ci_low": low, "ci_high": high}
            for other, (value, low, high) in differences.items()]
    (folder / "metrics.csv").write_text(csv_text(rows, METRIC_COLUMNS))
    (folder / "claims.csv").write_text(f"id,verdict,note\nC3,{c3},\n")
    return folder


@pytest.mark.parametrize(("c3", "differences", "wanted", "unwanted"), [
    ("supported", {"ridge": (.02, -.02, .06)}, "zero-shot CIDEr-D it is not told apart from ridge. The regression MLP, our network", "score above"),
    ("supported", {"ridge": (.05, .01, .09)}, "score above those of ridge", "not shown"),
    ("supported", {"ridge": (-.05, -.09, -.01)}, "Those of ridge score above its own", "not shown"),
    ("supported", {"ridge": (.05, .01, .09), "regression_mlp": (.01, -.01, .03)}, "not told apart from the regression MLP.", "apart from ridge"),
    ("partly_supported", {}, "but the interval holds no gain too. No simpler map was captioned", "better zero-shot"),
    ("not_supported", {}, "not better than the raw vector's here", "makes better"),
])
def test_the_conclusion_follows_from_the_intervals(tmp_path, c3, differences, wanted, unwanted):
    text = ans.conclusion(ans.Evidence(results_with(tmp_path / "mini", c3, **differences)))
    assert wanted in text and unwanted not in text


def test_nothing_is_concluded_from_nothing(tmp_path):
    (tmp_path / "mini").mkdir()
    text = ans.answer(tmp_path / "mini")
    assert "none yet" in text and text.count("not computed") == 3 and "In short" not in text


def test_a_lower_gap_counts_as_better(tmp_path):
    folder = results_with(tmp_path / "mini", "supported")
    row = {"experiment": "gap:paired", "system": "diffusion_link-ridge", "split": "test", "seed": "all", "space": "text", "metric": "rmg",
           "value": -.01, "ci_low": -.02, "ci_high": -.005}
    (folder / "metrics.csv").write_text(csv_text([row, row | {"metric": "pair_cosine"}], METRIC_COLUMNS))
    e = ans.Evidence(folder)
    assert e.difference("gap", "rmg", "ridge")["outcome"] == "better" and e.difference("gap", "pair_cosine", "ridge")["outcome"] == "worse"
    assert e.difference("gap", "rmg", "seed") is None


def test_the_answer_repeats_the_tables():
    text = ans.answer(MINI)
    claims = pd.read_csv(MINI / "claims.csv", dtype=str)
    for verdict, count in claims.verdict.value_counts().items():
        assert f"{count} {verdict.replace('_', ' ')} (" in text
    table = pd.read_csv(MINI / "table2.csv").query("space == 'text' and system == 'diffusion_link'").set_index("experiment")
    for setting in ("zero_shot", "supervised"):
        assert f"CIDEr-D by {table.cider_d_relative_gain[setting]:+.1%}".replace("%", " %") in text
    assert "up to +52.5 % relative" in text and "up to +7.5 % relative" in text


def test_the_share_of_signal_at_a_start_step():
    known = {25: 0.9965, 50: 0.9908, 100: 0.9712, 500: 0.3313, 800: 0.0203}         # abar of the sqrt-linear schedule, four decimals
    assert {k: round(ans.signal_share(get_profile("mini").bridge, k), 4) for k in known} == known


def test_generative_verdicts_reach_the_answer(tmp_path, monkeypatch):
    """The rules of notebook A3 are tested with it; here, that its verdicts are repeated and counted."""
    rules = ModuleType("dl.report.generative")
    rules.RULES = {"mbr": "the rule", "spread": "not asked"}
    rules.verdicts = lambda frame: [SimpleNamespace(part="mbr", candidate="consensus of x", pays=True, sentence="**mbr** x pays"),
                                    SimpleNamespace(part="mbr", candidate="consensus of y", pays=False, sentence="**mbr** y does not pay")]
    monkeypatch.setitem(sys.modules, "dl.report.generative", rules)
    folder = results_with(tmp_path / "mini", "supported")
    assert "./run_all.sh --only A3" in section(folder, "generative").markdown and "Where diffusion helps" not in ans.answer(folder)
    (folder / "metrics.csv").write_text(csv_text([{"experiment": "generative:mbr", "system": "x", "metric": "cider_d", "value": 1}], METRIC_COLUMNS))
    text = section(folder, "generative").markdown
    assert "* **mbr** y does not pay" in text and "the rule" in text and "not asked" not in text
    assert "of 2 candidates in 1 regime, 1 beat every control named in their rule: consensus of x (mbr)" in ans.answer(folder)


def test_ablations_are_summed_up(tmp_path):
    folder = results_with(tmp_path / "mini", "supported")
    head = "name,variant,is_base,metric,mean,sd,ci_low,ci_high,difference,difference_ci_low,difference_ci_high,n_seeds,train_steps\n"
    lines = ["loss,l1,1,rmg,.37,,.36,.38,,,,3,600", "loss,l2,0,rmg,.35,,.34,.36,-.02,-.03,-.01,3,600",
             "blocks,b1,0,rmg,.38,,.37,.39,.01,-.01,.02,3,600",
             "blocks,b2,1,rmg,.37,,.36,.38,,,,3,600", "blocks,b1-b2,0,rmg,,,,,.01,-.01,.02,,"]
    (folder / "ablations.csv").write_text(head + "\n".join(lines) + "\n")
    text = section(folder, "ablations").markdown
    assert "| loss | 2 | 0.350 (`l2`) to 0.370 (`l1`) |  | `l2` -0.020 |" in text
    assert "| blocks | 2 | 0.370 (`b2`) to 0.380 (`b1`) |  | none |" in text and "take 600 steps" in text


# ----------------------------------------------------------------------------------------------------------------- the page
class Tags(HTMLParser):
    """Start tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_stands_alone_and_is_the_same_twice(tmp_path):
    mini = get_profile("mini", results_root=tmp_path)
    shutil.copytree(MINI, mini.results_dir, ignore=shutil.ignore_patterns("cache", "captions", "checkpoints", "*.svg", "*.pdf"))
    first = write_report(mini).read_bytes()
    assert write_report(mini).read_bytes() == first and 50_000 < len(first) < 1_000_000
    text = first.decode()
    tags = Tags(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe"} and "@import" not in text and "url(" not in text
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) >= 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert [attributes["id"] for tag, attributes in tags if tag == "section"] == list(SECTIONS)
    assert text.index("The paper&#x27;s" if "The paper&#x27;s" in text else "The paper's") < text.index("<nav>")      # the answer is the first screen
    assert "<pre>" not in text and "<table>" in text


def test_an_absent_figure_is_named_with_its_command(tmp_path):
    second = Section("b", "Two", "| x |\n|:--|\n| **y** |\n", (Figure("06_table1", "dots & bars"),))
    text = page("A title", [Section("a", "One", "text"), second], tmp_path)
    assert "./run_all.sh --only 06" in text and "dots &amp; bars" in text and "<strong>y</strong>" in text


def test_a_small_png_is_the_same_picture(tmp_path):
    drawn = np.full((60, 200, 4), 255, np.uint8)
    drawn[20:40, 50:150] = (0, 114, 178, 255)
    drawn[:5] = 0                                                      # transparent becomes white
    Image.fromarray(drawn).save(tmp_path / "a.png")
    data = small_png(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(data)
    again = np.asarray(Image.open(tmp_path / "b.png").convert("RGB")).astype(int)
    assert abs(again[30, 100] - (0, 114, 178)).max() <= 4 and (again[0] == 255).all() and data == small_png(tmp_path / "a.png")


def test_every_section_says_something_with_and_without_results(tmp_path):
    (tmp_path / "smoke").mkdir()
    for key in SECTIONS:
        assert section(MINI, key).markdown.strip(), key
        assert section(tmp_path / "smoke", key).markdown.strip(), key
