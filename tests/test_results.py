"""Result files: atomic writing, rows and keys, Table 1, and the verdict rules on figures made up for the purpose."""
from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dl import report, store
from dl.config import PROFILES, get_profile
from dl.report import VERDICT_RULES, combine, judge, verdict, write_claims
from dl.store import METRIC_COLUMNS, MetricsFile, RowFile, atomic_write, write_provenance

NAN = float("nan")


@pytest.fixture
def profile(tmp_path):
    return get_profile("mini", results_root=tmp_path)


def metric_row(**more) -> dict:
    return {"experiment": "gap", "system": "raw", "split": "test", "metric": "rmg", "value": 0.5, "n_items": 600,
            "seed": 0, "noise_seed": 0, **more}


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------------- files
def test_atomic_write_replaces_whole_files_and_makes_folders(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.txt"
    mask = os.umask(0o022)
    try:
        assert atomic_write(path, "é\n") == path and path.read_bytes() == "é\n".encode()
        assert path.stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)
    atomic_write(str(path), b"\x00\xff")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["b.txt"]


def test_rows_with_the_same_key_are_replaced_and_order_does_not_depend_on_calls(tmp_path):
    one, two = (RowFile(tmp_path / name, ("system", "seed", "value"), ("system", "seed")) for name in "12")
    rows = [{"system": s, "seed": k, "value": 1.0} for s in ("diffusion_link", "raw", "zz") for k in (10, 9, "all")]
    one.add(rows)
    one.add([{"system": "raw", "seed": 9, "value": 2.5}])
    two.add([{"system": "raw", "seed": 9, "value": 2.5}])
    for row in reversed(rows):
        if (row["system"], row["seed"]) != ("raw", 9):
            two.add([row])
    assert one.path.read_bytes() == two.path.read_bytes()
    order = [(s, k) for s in ("raw", "diffusion_link", "zz") for k in ("9", "10", "all")]
    assert [(row["system"], row["seed"]) for row in one.read()] == order
    assert one.remove(system="raw") == 3 and len(one.read()) == 6
    assert one.remove(system=["zz", "nothing"], seed=[9, "all"]) == 2 and len(one.read()) == 4
    with pytest.raises(ValueError, match="unknown columns"):
        one.add([{"sytem": "raw"}])


def test_metrics_file_has_the_house_columns_and_fills_in_where_figures_come_from(profile):
    file = MetricsFile(profile)
    file.add([metric_row(), metric_row(system="ridge", ids_sha256="ab", wall_s=1.5)])
    row = read(profile.results_dir / "metrics.csv")[0]
    promised = [
        "run_id", "experiment", "system", "dataset", "split", "n_items", "ids_sha256", "seed", "noise_seed", "space",
        "decoding", "metric", "value", "ci_low", "ci_high", "status", "reason", "config_sha256", "git_sha", "versions",
        "device", "wall_s"]
    assert list(row)[:22] == promised == list(METRIC_COLUMNS[:22])
    assert (row["status"], row["space"], row["dataset"], row["value"]) == ("ok", "text", "mini", "0.5")
    assert row["run_id"].startswith("mini-") and len(row["config_sha256"]) == 16 and "torch" in row["versions"]
    file.add([metric_row(value=0.25)])
    frame = file.frame()
    assert frame.value.tolist() == [0.25, 0.5] and frame.ci_low.isna().all() and frame.seed.tolist() == ["0", "0"]
    with pytest.raises(ValueError, match="say why"):
        file.add([metric_row(value=NAN)])
    file.add([metric_row(value=NAN, reason="too few items")])
    row = file.read()[0]
    assert (row["value"], row["status"], row["reason"]) == ("", "not_computed", "too few items")


def test_config_hash_follows_settings_not_folders(profile, tmp_path):
    moved = get_profile("mini", results_root=tmp_path / "elsewhere", data_dir=Path("/other/mini"))
    hashed = store.config_sha256
    assert hashed(profile) == hashed(moved) != hashed(PROFILES["paper"])
    assert hashed(get_profile("mini", bootstrap_samples=999)) != hashed(profile)


def test_provenance_hashes_inputs(profile, tmp_path):
    path = atomic_write(tmp_path / "data/a.csv", "1")
    record = json.loads(write_provenance(profile, {"data": path.parent, "weights": path}).read_text())
    assert record["inputs"]["weights"]["sha256"] == store.sha256_file(path)
    assert (record["versions"]["numpy"], record["profile"]) == (np.__version__, "mini")
    assert "/" not in record["config"]["data_dir"]
    atomic_write(path, "2")
    again = json.loads(write_provenance(profile, {"data": path.parent}).read_text())
    assert again["inputs"]["data"]["sha256"] != record["inputs"]["data"]["sha256"]
    with pytest.raises(FileNotFoundError, match="python -m dl check"):
        write_provenance(profile, {"data": tmp_path / "absent"})


# ------------------------------------------------------------------------------------------------------------- tables
def summary(system: str, metric: str, value: float, low: float = NAN, high: float = NAN, **more) -> dict:
    return metric_row(system=system, metric=metric, value=value, sd=0.01, ci_low=low, ci_high=high, seed="all",
                      noise_seed="all", **more)


def test_table1_marks_the_best_and_what_is_not_told_apart(profile):
    with pytest.raises(ValueError, match="--only 05"):
        report.write_table1(profile)
    MetricsFile(profile).add([
        metric_row(system="raw"), metric_row(system="raw", seed=1), summary("raw", "rmg", 0.5, 0.45, 0.55),
        summary("ridge", "rmg", 0.30, 0.28, 0.32), summary("mean_shift", "rmg", 0.31, 0.29, 0.33),
        summary("procrustes", "rmg", 0.305, 0.28, 0.33), summary("text_floor", "rmg", 0.1, 0.09, 0.11),
        summary("c3", "rmg", 0.2, 0.1, 0.3, space="centred"), summary("c3", "rmg", 0.4, 0.35, 0.45),
        summary("procrustes-ridge", "rmg", 0.005, 0.001, 0.009, experiment="gap:paired"),
        summary("raw", "recall_at_10", NAN, reason="a neighbour or rank metric needs at least 20 items"),
    ])
    table = report.write_table1(profile).set_index(["system", "space"])
    assert list(table.index) == [("raw", "text"), ("mean_shift", "text"), ("c3", "text"), ("c3", "centred"),
                                 ("procrustes", "text"), ("ridge", "text"), ("text_floor", "text")]
    marks = table.rmg_mark.fillna("")
    assert marks["ridge", "text"] == "best", "bounds and centred rows are not ranked"
    assert marks["mean_shift", "text"] == "tie", "no paired interval: its own holds the best mean"
    assert marks["procrustes", "text"] == "", "the paired interval decides where there is one"
    assert table.n_runs["raw", "text"] == 2 and np.isnan(table.recall_at_10["raw", "text"])
    text = (profile.results_dir / "table1.md").read_text()
    assert "**0.300** ± 0.010 [0.280, 0.320]" in text and "*0.310*" in text
    assert "n/c" in text and "c3 (centred space)" in text


# ----------------------------------------------------------------------------------------------------------- verdicts
@pytest.mark.parametrize(("mean", "low", "high", "side", "threshold", "expected"), [
    (0.2, 0.1, 0.3, "higher", 0, "supported"),
    (0.2, -0.1, 0.5, "higher", 0, "partly_supported"),
    (0.2, 0.0, 0.5, "higher", 0, "partly_supported"),             # an interval that touches 0 does not lie on the side
    (-0.2, -0.5, 0.1, "higher", 0, "not_supported"),
    (0.0, 0.0, 0.0, "higher", 0, "not_supported"),
    (-0.2, -0.3, -0.1, "lower", 0, "supported"),
    (-0.2, -0.3, 0.1, "lower", 0, "partly_supported"),
    (0.2, 0.1, 0.3, "lower", 0, "not_supported"),
    (0.97, 0.96, 0.98, "higher", 0.95, "supported"),
    (0.96, 0.94, 0.98, "higher", 0.95, "partly_supported"),
    (-0.02, -0.05, 0.01, "not_lower", 0, "supported"),
    (-0.02, -0.05, -0.01, "not_lower", 0, "not_supported"),
    (0.2, None, None, "higher", 0, "partly_supported"),           # without an interval never more than partly
    (None, None, None, "higher", 0, "not_tested"),
    (NAN, 0.1, 0.2, "lower", 0, "not_tested"),
])
def test_verdict(mean, low, high, side, threshold, expected):
    assert verdict(mean, low, high, side, threshold) == expected


def test_combine_takes_the_worst():
    assert combine(["supported"] * 3) == "supported" and combine([]) == "not_tested"
    assert combine(["supported", "partly_supported"]) == "partly_supported"
    assert combine(["partly_supported", "not_supported"]) == "not_supported"
    assert combine(["supported", "not_tested"]) == "not_tested"


def paired(baseline: str, metric: str, value: float, half: float = 0.01) -> dict:
    return summary(f"diffusion_link-{baseline}", metric, value, value - half, value + half, experiment="gap:paired")


def c1_rows(peer: str, sign: float = 1.0, half: float = 0.01) -> list[dict]:
    values = {"pair_cosine": 0.03, "centroid_gap": -0.05, "rmg": -0.02}
    return [paired(peer, metric, sign * value, half) for metric, value in values.items()]


def gain(value: float, low: float, high: float, decoding: str) -> dict:
    return summary("diffusion_link-raw", "cider_d_relative_gain", value, low, high, experiment="zero_shot:paired",
                   decoding=decoding)


def judged(profile, rows: list[dict], claim: str) -> dict:
    MetricsFile(profile).add(rows)
    return {row["id"]: row for row in write_claims(profile)}[claim]


def test_rules_cover_the_six_claims():
    assert [rule.id for rule in VERDICT_RULES] == ["C1", "C2", "C3", "C4", "C5", "C6"]
    assert report.TUNING_METRIC == "rmg"
    assert report.comparisons("gap") == ["raw", "ridge", "regression_mlp", "regression_mlp_topology",
                                         "diffusion_bridge", "conditional_diffusion", "seed"]
    assert report.comparisons("zero_shot") == report.comparisons("supervised") == ["raw"]


def test_no_figures_no_verdicts(profile):
    rows = write_claims(profile)
    assert {row["verdict"] for row in rows} == {"not_tested"}
    written = read(profile.results_dir / "claims.csv")
    columns = ["id", "claim", "paper_value", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence"]
    assert list(written[0])[:9] == columns and [row["ours"] for row in written] == [""] * 6
    assert "not run: diffusion_bridge, conditional_diffusion, seed" in rows[0]["note"]
    assert "profile paper only" in rows[5]["note"]


def test_c1_supported_against_every_peer_that_was_run(profile):
    runs = [metric_row(system="diffusion_link", seed=s, noise_seed=k) for s in (0, 1, 2) for k in (0, 1)]
    controls = [paired("ridge", "pair_cosine", 0.001), paired("ridge", "rmg", 0.05),
                paired("ridge", "centroid_gap", -0.05), paired("regression_mlp", "rmg", -0.05)]
    row = judged(profile, runs + c1_rows("seed") + c1_rows("diffusion_bridge") + controls, "C1")
    assert row["verdict"] == "supported" and row["n_seeds"] == 3 and "not run: conditional_diffusion" in row["note"]
    narrowest = row["ours"], row["ci_low"], row["ci_high"]
    assert narrowest == pytest.approx((-0.02, -0.03, -0.01)), "the narrowest comparison decides"
    assert "experiment=gap:paired" in row["evidence"] and "metric=rmg" in row["evidence"]
    equal_or_better = "ridge is not told apart from diffusion_link on pair_cosine; ridge beats diffusion_link on rmg"
    assert equal_or_better in row["note"] and "regression_mlp" not in row["note"]
    assert "centroid_gap;" not in row["note"].split("ridge beats")[1]


@pytest.mark.parametrize(("claim", "steps"), [          # what is recorded, one after the other, and the verdict then
    ("C1", [(c1_rows("seed") + c1_rows("diffusion_bridge", half=0.04), "partly_supported"),
            ([paired("seed", "rmg", 0.001)], "not_supported")]),
    ("C1", [([{**row, "split": "val"} for row in c1_rows("seed", -1)], "not_tested"),
            ([{**row, "space": "centred"} for row in c1_rows("seed", -1)], "not_tested")]),
    ("C2", [([paired("raw", "centroid_gap", -0.1, 0.02)], "not_tested"),
            ([summary("diffusion_link", "share_toward_text", 0.99, 0.98, 1.0)], "supported"),
            ([summary("diffusion_link", "share_toward_text", 0.80, 0.7, 0.9)], "not_supported")]),
    ("C3", [([gain(0.3, 0.1, 0.5, "greedy")], "supported"),
            ([gain(0.2, -0.1, 0.5, "beam4")], "partly_supported")]),         # beam is read before greedy
    ("C4", [([gain(0.3, 0.1, 0.5, "greedy")], "not_tested")]),
    ("C5", [([paired("raw", "rmg", -0.05), paired("raw", "centroid_gap", -0.1),
              paired("raw", "recall_at_10", -0.01, 0.02)], "not_tested"),     # the parameter count is missing
            ([summary("diffusion_link", "parameters", 9_725_440)], "supported"),
            ([paired("raw", "recall_at_10", -0.05, 0.02)], "not_supported"),
            ([paired("raw", "recall_at_10", -0.01, 0.02)], "supported"),
            ([summary("diffusion_link", "parameters", 12e6)], "not_supported")]),
])
def test_a_claim_follows_what_is_recorded(profile, claim, steps):
    for rows, expected in steps:
        assert judged(profile, rows, claim)["verdict"] == expected


def test_c6_is_judged_in_the_paper_profile_only(profile):
    file, rule = MetricsFile(profile), VERDICT_RULES[5]
    file.add([summary("diffusion_link", "cider_d", 0.95, 0.93, 0.97, experiment=name)
              for name in ("zero_shot", "supervised")])
    assert judge(rule, file.frame(), "mini")["verdict"] == "not_tested"
    assert judge(rule, file.frame(), "paper")["verdict"] == "supported" and rule.parts[0].threshold == 0.705
