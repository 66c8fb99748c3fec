"""Result files: atomic writing, rows and keys, Table 1, and the verdict rules on figures made up for the purpose."""
from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dl import report
from dl import store as results
from dl.bootstrap import make_draws, paired_difference, score_system
from dl.config import PROFILES, get_profile
from dl.gap import Reference, median_bandwidth
from dl.report import VERDICT_RULES, Part, combine, judge, verdict, write_claims
from dl.store import METRIC_COLUMNS, MetricsFile, RowFile, atomic_write, search_file, write_provenance


@pytest.fixture
def profile(tmp_path):
    return get_profile("mini", results_root=tmp_path)


def metric_row(**more) -> dict:
    return {"experiment": "gap", "system": "raw", "split": "test", "metric": "rmg", "value": 0.5, "n_items": 600, "seed": 0, "noise_seed": 0, **more}


# --------------------------------------------------------------------------------------------------------------------- files
def test_atomic_write_replaces_whole_files_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert atomic_write(path, "é\n") == path and path.read_bytes() == "é\n".encode()
    atomic_write(str(path), b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff" and os.listdir(path.parent) == ["b.txt"]


def test_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "x.csv", "old")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.csv"]


def test_atomic_write_keeps_the_users_file_mode(tmp_path):
    old = os.umask(0o022)
    try:
        assert (atomic_write(tmp_path / "x", "").stat().st_mode & 0o777) == 0o644
    finally:
        os.umask(old)


def test_rows_with_the_same_key_are_replaced_and_order_does_not_depend_on_calls(tmp_path):
    one, two = (RowFile(tmp_path / name, ("system", "seed", "value"), ("system", "seed")) for name in ("1.csv", "2.csv"))
    rows = [{"system": s, "seed": k, "value": 1.0} for s in ("diffusion_link", "raw", "zz") for k in (10, 9, "all")]
    one.add(rows)
    one.add([{"system": "raw", "seed": 9, "value": 2.5}])
    two.add([{"system": "raw", "seed": 9, "value": 2.5}])
    for row in reversed(rows):
        if (row["system"], row["seed"]) != ("raw", 9):
            two.add([row])
    assert one.path.read_bytes() == two.path.read_bytes()
    assert [(r["system"], r["seed"]) for r in one.read()] == [(s, k) for s in ("raw", "diffusion_link", "zz") for k in ("9", "10", "all")]
    assert one.remove(system="raw") == 3 and len(one.read()) == 6
    assert one.remove(system=["zz", "nothing"], seed=[9, "all"]) == 2 and len(one.read()) == 4
    with pytest.raises(ValueError, match="unknown columns"):
        one.add([{"sytem": "raw"}])


def test_metrics_file_has_the_house_columns_and_fills_in_where_figures_come_from(profile):
    file = MetricsFile(profile)
    file.add([metric_row(), metric_row(system="ridge", ids_sha256="ab", wall_s=1.5)])
    with open(profile.results_dir / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    promised = ["run_id", "experiment", "system", "dataset", "split", "n_items", "ids_sha256", "seed", "noise_seed", "space", "decoding", "metric",
                "value", "ci_low", "ci_high", "status", "reason", "config_sha256", "git_sha", "versions", "device", "wall_s"]
    assert list(rows[0])[:22] == promised == list(METRIC_COLUMNS[:22])
    assert rows[0]["status"] == "ok" and rows[0]["space"] == "text" and rows[0]["dataset"] == "mini" and rows[0]["value"] == "0.5"
    assert rows[0]["run_id"].startswith("mini-") and len(rows[0]["config_sha256"]) == 16 and "torch" in rows[0]["versions"]
    file.add([metric_row(value=0.25)])
    frame = file.frame()
    assert frame.value.tolist() == [0.25, 0.5] and np.isnan(frame.ci_low).all() and frame.seed.tolist() == ["0", "0"]


def test_a_figure_that_is_missing_needs_a_reason(profile):
    file = MetricsFile(profile)
    with pytest.raises(ValueError, match="say why"):
        file.add([metric_row(value=float("nan"))])
    file.add([metric_row(value=float("nan"), reason="too few items")])
    row = file.read()[0]
    assert (row["value"], row["status"], row["reason"]) == ("", "not_computed", "too few items")


def test_config_hash_follows_settings_not_folders(profile, tmp_path):
    moved = get_profile("mini", results_root=tmp_path / "elsewhere", data_dir=Path("/other/mini"))
    assert results.config_sha256(profile) == results.config_sha256(moved) != results.config_sha256(PROFILES["paper"])
    assert results.config_sha256(get_profile("mini", bootstrap_samples=999)) != results.config_sha256(profile)


def test_provenance_hashes_inputs(profile, tmp_path):
    folder = tmp_path / "data"
    atomic_write(folder / "a.csv", "1")
    record = json.loads(write_provenance(profile, {"data": folder, "weights": folder / "a.csv"}).read_text())
    assert record["inputs"]["weights"]["sha256"] == results.sha256_file(folder / "a.csv")
    atomic_write(folder / "a.csv", "2")
    again = json.loads(write_provenance(profile, {"data": folder}).read_text())
    assert again["inputs"]["data"]["sha256"] != record["inputs"]["data"]["sha256"]
    assert record["versions"]["numpy"] == np.__version__ and record["profile"] == "mini" and "/" not in record["config"]["data_dir"]
    with pytest.raises(FileNotFoundError, match="python -m dl check"):
        write_provenance(profile, {"data": tmp_path / "absent"})


def test_search_file_keeps_every_trial(profile):
    file = search_file(profile)
    trials = [{"system": "ridge", "trial": i, "params": json.dumps({"alpha": a}), "split": "val", "seed": 0, "metric": "rmg", "value": a}
              for i, a in enumerate((0.1, 1.0, 10.0))]
    file.add(trials)
    assert [json.loads(row["params"])["alpha"] for row in file.read()] == [0.1, 1.0, 10.0]


# -------------------------------------------------------------------------------------------------------------------- tables
def summary(system: str, metric: str, value: float, low: float = float("nan"), high: float = float("nan"), **more) -> dict:
    return metric_row(system=system, metric=metric, value=value, sd=0.01, ci_low=low, ci_high=high, seed="all", noise_seed="all", **more)


def test_table1_lays_out_what_metrics_csv_holds(profile):
    file = MetricsFile(profile)
    file.add([metric_row(system="ridge"), metric_row(system="raw"), metric_row(system="raw", seed=1)])
    file.add([
        summary("raw", "rmg", 0.5, 0.45, 0.55), summary("ridge", "rmg", 0.30, 0.28, 0.32), summary("mean_shift", "rmg", 0.31, 0.29, 0.33),
        summary("procrustes", "rmg", 0.305, 0.28, 0.33), summary("text_floor", "rmg", 0.1, 0.09, 0.11),
        summary("c3", "rmg", 0.2, 0.1, 0.3, space="centred"), summary("c3", "rmg", 0.4, 0.35, 0.45),
        summary("procrustes-ridge", "rmg", 0.005, 0.001, 0.009, experiment="gap:paired"),
        summary("ridge", "recall_at_10", 0.51, 0.47, 0.55), summary("ridge", "effective_rank", 40.0), summary("ridge", "parameters", 66048.0),
        summary("raw", "recall_at_10", float("nan"), reason="a neighbour or rank metric needs at least 20 items"),
    ])
    table = report.write_table1(profile)
    assert table.system.tolist() == ["raw", "mean_shift", "c3", "c3", "procrustes", "ridge", "text_floor"]
    assert table.space.tolist()[2:4] == ["text", "centred"]
    marks = dict(zip(zip(table.system, table.space), table.rmg_mark.fillna("")))
    assert marks["ridge", "text"] == "best", "bounds and centred rows are not ranked"
    assert marks["mean_shift", "text"] == "tie", "no paired interval: its own holds the best mean"
    assert marks["procrustes", "text"] == "", "the paired interval decides where there is one"
    row = table[table.system == "ridge"].iloc[0]
    assert (row.uses_pairs, row.uses_memory, row.trained, row.parameters, row.n_items, row.n_runs) == ("yes", "no", "no", 66048, "600", 1)
    assert table[table.system == "raw"].n_runs.item() == 2
    text = (profile.results_dir / "table1.md").read_text()
    assert "**0.300** ± 0.010 [0.280, 0.320]" in text and "*0.310*" in text and "n/c" in text and "c3 (centred space)" in text
    panels = [part for part in text.split("## ") if "| rmg" in part or "| mmd2" in part or "| linear_cka" in part or "| gap_length" in part]
    assert len(panels) == 4 and all("recall_at_10" in part and "effective_rank" in part for part in panels), "beside every gap figure"
    with open(profile.results_dir / "table1.csv", newline="") as stream:
        written = {(row["system"], row["space"]): row for row in csv.DictReader(stream)}
    assert written["ridge", "text"]["rmg"] == "0.3" and written["ridge", "text"]["rmg_ci_low"] == "0.28" and written["raw", "text"]["recall_at_10"] == ""


def test_table1_without_figures_says_what_to_run(profile):
    with pytest.raises(ValueError, match="--only 05"):
        report.write_table1(profile)


# ------------------------------------------------------------------------------------------------------------------- verdicts
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
    (float("nan"), 0.1, 0.2, "lower", 0, "not_tested"),
])
def test_verdict(mean, low, high, side, threshold, expected):
    assert verdict(mean, low, high, side, threshold) == expected


def test_verdict_refuses_an_unknown_side():
    with pytest.raises(ValueError, match="higher"):
        verdict(1.0, 0.0, 2.0, "greater")


def test_combine_takes_the_worst():
    assert combine(["supported"] * 3) == "supported" and combine([]) == "not_tested"
    assert combine(["supported", "partly_supported"]) == "partly_supported"
    assert combine(["partly_supported", "not_supported"]) == "not_supported"
    assert combine(["supported", "not_tested"]) == "not_tested"


def paired(baseline: str, metric: str, value: float, half_width: float, **more) -> dict:
    return summary(f"diffusion_link-{baseline}", metric, value, value - half_width, value + half_width, experiment="gap:paired", **more)


def c1_rows(peer: str, sign: float = 1.0, half_width: float = 0.01) -> list[dict]:
    return [paired(peer, "pair_cosine", 0.03 * sign, half_width), paired(peer, "centroid_gap", -0.05 * sign, half_width),
            paired(peer, "rmg", -0.02 * sign, half_width)]


def judged(profile, rows: list[dict], claim: str) -> dict:
    MetricsFile(profile).add(rows)
    return {row["id"]: row for row in write_claims(profile)}[claim]


def test_rules_cover_the_six_claims():
    assert [rule.id for rule in VERDICT_RULES] == ["C1", "C2", "C3", "C4", "C5", "C6"] and report.TUNING_METRIC == "rmg"
    assert report.comparisons("gap") == ["raw", "ridge", "regression_mlp", "regression_mlp_topology", "diffusion_bridge", "conditional_diffusion", "seed"]
    assert report.comparisons("zero_shot") == report.comparisons("supervised") == ["raw"]


def test_no_figures_no_verdicts(profile):
    rows = write_claims(profile)
    assert {row["verdict"] for row in rows} == {"not_tested"}
    with open(profile.results_dir / "claims.csv", newline="") as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames[:9] == ["id", "claim", "paper_value", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "evidence"]
        assert [row["ours"] for row in reader] == [""] * 6
    assert "profile paper only" in rows[5]["note"] and "not run: diffusion_bridge, conditional_diffusion, seed" in rows[0]["note"]


def test_c1_supported_against_every_peer_that_was_run(profile):
    runs = [metric_row(system="diffusion_link", seed=s, noise_seed=k) for s in (0, 1, 2) for k in (0, 1)]
    row = judged(profile, runs + c1_rows("seed") + c1_rows("diffusion_bridge"), "C1")
    assert row["verdict"] == "supported" and row["n_seeds"] == 3 and "not run: conditional_diffusion" in row["note"]
    assert (row["ours"], row["ci_low"], row["ci_high"]) == pytest.approx((-0.02, -0.03, -0.01)), "the narrowest comparison decides"
    assert "experiment=gap:paired" in row["evidence"] and "metric=rmg" in row["evidence"]


def test_c1_partly_and_not_supported(profile):
    assert judged(profile, c1_rows("seed") + c1_rows("diffusion_bridge", half_width=0.04), "C1")["verdict"] == "partly_supported"
    row = judged(profile, [paired("seed", "rmg", 0.001, 0.01)], "C1")
    assert row["verdict"] == "not_supported" and row["ours"] == pytest.approx(0.001)


def test_c1_names_controls_that_equal_or_beat_the_bridge(profile):
    controls = [paired("ridge", "pair_cosine", 0.001, 0.01), paired("ridge", "rmg", 0.05, 0.01), paired("ridge", "centroid_gap", -0.05, 0.01),
                paired("regression_mlp", "rmg", -0.05, 0.01)]
    row = judged(profile, c1_rows("seed") + controls, "C1")
    assert row["verdict"] == "supported" and "ridge is not told apart from diffusion_link on pair_cosine; ridge beats diffusion_link on rmg" in row["note"]
    assert "regression_mlp" not in row["note"] and "centroid_gap;" not in row["note"].split("ridge beats")[1]


def test_c2_needs_the_fall_and_the_collective_move(profile):
    assert judged(profile, [paired("raw", "centroid_gap", -0.1, 0.02)], "C2")["verdict"] == "not_tested"
    assert judged(profile, [summary("diffusion_link", "share_toward_text", 0.99, 0.98, 1.0)], "C2")["verdict"] == "supported"
    assert judged(profile, [summary("diffusion_link", "share_toward_text", 0.80, 0.7, 0.9)], "C2")["verdict"] == "not_supported"


def test_c3_and_c4_read_the_relative_gain(profile):
    gain = {"value": 0.3, "low": 0.1, "high": 0.5}
    row = judged(profile, [summary("diffusion_link-raw", "cider_d_relative_gain", **gain, experiment="zero_shot:paired", decoding="greedy")], "C3")
    assert row["verdict"] == "supported" and row["paper_value"] == "+52.5 % relative"
    beam = summary("diffusion_link-raw", "cider_d_relative_gain", 0.2, -0.1, 0.5, experiment="zero_shot:paired", decoding="beam4")
    assert judged(profile, [beam], "C3")["verdict"] == "partly_supported", "beam is read before greedy"
    assert judged(profile, [], "C4")["verdict"] == "not_tested"


def test_c5_small_lower_and_no_worse_at_retrieval(profile):
    rows = [paired("raw", "rmg", -0.05, 0.01), paired("raw", "centroid_gap", -0.1, 0.01), paired("raw", "recall_at_10", -0.01, 0.02)]
    assert judged(profile, rows, "C5")["verdict"] == "not_tested", "the parameter count is missing"
    assert judged(profile, [summary("diffusion_link", "parameters", 9_725_440)], "C5")["verdict"] == "supported"
    assert judged(profile, [paired("raw", "recall_at_10", -0.05, 0.02)], "C5")["verdict"] == "not_supported"
    MetricsFile(profile).add(rows)
    assert judged(profile, [summary("diffusion_link", "parameters", 12e6)], "C5")["verdict"] == "not_supported"


def test_other_splits_and_spaces_do_not_decide(profile):
    wrong = [{**row, "split": "val"} for row in c1_rows("seed", -1)] + [{**row, "space": "centred"} for row in c1_rows("seed", -1)]
    assert judged(profile, wrong, "C1")["verdict"] == "not_tested"


def test_c6_is_judged_in_the_paper_profile_only(profile):
    scores = [summary("diffusion_link", "cider_d", 0.95, 0.93, 0.97, experiment=name) for name in ("zero_shot", "supervised")]
    MetricsFile(profile).add(scores)
    frame, rule = MetricsFile(profile).frame(), VERDICT_RULES[5]
    assert judge(rule, frame, "mini")["verdict"] == "not_tested" and judge(rule, frame, "paper")["verdict"] == "supported"
    assert rule.parts[0] == Part("zero_shot", "cider_d", "higher", threshold=0.705)


def test_from_vectors_to_claims(profile):
    """The whole way: vectors -> scores and paired differences -> metrics.csv -> Table 1 and verdicts."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((60, 8)) + 1
    vectors = {"raw": text - 2, "seed": text - 1, "diffusion_link": text - 0.5}
    text, vectors = (text / np.linalg.norm(text, axis=1, keepdims=True), {k: v / np.linalg.norm(v, axis=1, keepdims=True) for k, v in vectors.items()})
    reference = Reference(text, np.repeat(text, 5, axis=0), np.repeat(np.arange(60), 5), median_bandwidth(text), raw_audio=vectors["raw"])
    draws = make_draws([(str(i // 2),) for i in range(60)], 100)
    scores = {name: score_system(name, [(0, 0, x)], reference, draws, heavy_samples=0) for name, x in vectors.items()}
    rows = [row for one in scores.values() for row in one.rows(experiment="gap", split="test")]
    rows += [row for name in ("raw", "seed") for row in paired_difference(scores["diffusion_link"], scores[name], experiment="gap:paired", split="test")]
    file = MetricsFile(profile)
    file.add(rows + [summary("diffusion_link", "parameters", 2.4e6)])
    before = file.path.read_bytes()
    file.add(rows)
    assert file.path.read_bytes() == before, "recording twice changes nothing"
    table = report.write_table1(profile)
    assert table.system.tolist() == ["raw", "seed", "diffusion_link"] and table.rmg_mark.tolist()[2] == "best"
    found = {row["id"]: row["verdict"] for row in write_claims(profile)}
    assert found["C1"] == "supported" and found["C3"] == found["C6"] == "not_tested" and found["C5"] == "supported"
