"""The table of ablations of notebook 09 is laid out from rows; a variant without any is the base by another name."""
from __future__ import annotations

import pandas as pd
import pytest

from dl import report
from dl.config import get_profile
from dl.report import ABLATION_METRICS, ABLATIONS, ablation_rows, write_ablations
from dl.store import MetricsFile


def recorded(experiment: str, system: str, value: float, **more: object) -> list[dict]:
    shared = {"experiment": experiment, "system": system, "split": "test", "n_items": 30, "seed": "all",
              "noise_seed": "all"}
    return [{**shared, "metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, **more}
            for metric in ABLATION_METRICS]


@pytest.fixture
def profile(tmp_path):
    profile = get_profile("smoke", results_root=tmp_path)
    MetricsFile(profile).add([
        *recorded("ablation:base", "base", 0.5, sd=0.01),
        *recorded("ablation:ema", "ema_off", 0.7, sd=0.02), *recorded("ablation:ema:paired", "ema_off-base", 0.2),
        *recorded("ablation:loss", "l1", 0.5, sd=0.01), *recorded("ablation:loss:paired", "l1-base", 0.0),
        *recorded("ablation:loss", "l2", 0.4), *recorded("ablation:loss:paired", "l2-base", -0.05),
        *recorded("ablation:loss:paired", "l1-l2", 0.1)])
    return profile


def test_labels_are_unique_and_every_ablation_asks_something():
    for question, labels in ABLATIONS.values():
        assert len(set(labels.split())) == len(labels.split()) >= 2 and "?" in question and "-" not in labels


def test_a_variant_without_rows_is_the_base_and_another_ablation_gets_the_base_in_front(profile):
    table = pd.DataFrame(ablation_rows(MetricsFile(profile).frame(), 2, 8)).set_index(["name", "variant", "metric"])
    rmg = table.xs("rmg", level="metric")
    assert list(rmg.index) == [("loss", "base"), ("loss", "l1"), ("loss", "l2"), ("loss", "l1-l2"), ("ema", "ema_on"),
                               ("ema", "ema_off")]
    assert rmg.is_base.tolist() == [1, 0, 0, 0, 1, 0] and rmg["mean"].dropna().tolist() == [0.5, 0.5, 0.4, 0.5, 0.7]
    assert rmg.difference.dropna().tolist() == [0.0, -0.05, 0.1, 0.2]
    assert rmg.n_seeds.dropna().tolist() == [2, 2, 1, 2, 2]


def test_bold_is_a_difference_beyond_its_interval(profile):
    table = write_ablations(profile)
    text = (profile.results_dir / "ablations.md").read_text(encoding="utf-8")
    assert "| `ema_off` | **0.700 ± 0.020** [0.600, 0.800]" in text and "| `l2` | 0.400 [0.300, 0.500]" in text
    assert "`ema_on` (base)" in text and "## pairs" not in text and "Paired differences" in text
    assert len(table) == len(pd.read_csv(profile.results_dir / "ablations.csv"))


def test_without_rows_of_its_own_a_profile_shows_the_committed_ones(tmp_path, monkeypatch):
    profile = get_profile("smoke", results_root=tmp_path)
    assert write_ablations(profile).name.nunique() == len(ABLATIONS)
    monkeypatch.setattr(report, "REPO", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--only 09 --full"):
        write_ablations(profile)
