"""Ours beside the paper's (``comparison.csv``, ``comparison.md``); "?" is what is unknown to us, and no value of the paper is guessed.

Figures that others report on AudioCaps stand in a table of their own. They are never put in one ranking with figures of ``data/mini``:
CIDEr weighs words by how rare they are in *its* references, and those of ``data/mini`` are composed, of other sounds, in other words.
"""
from __future__ import annotations

from pathlib import Path

import pandas as pd

from dl.config import Profile, get_profile
from dl.report.paper import CAPTION_FIGURES, NOT_REPORTED, UNKNOWN, load_paper
from dl.store import atomic_write, csv_text, markdown_table

COMPARISON_COLUMNS = (
    "part", "claim", "setting", "system", "metric", "ours", "ci_low", "ci_high", "n_seeds", "verdict", "paper", "paper_status",
    "comparable", "evidence",
)
OURS = "Diffusion-Link"                                                       # its name in paper.csv
TABLE1_SYSTEMS = ("raw", "diffusion_bridge", "conditional_diffusion", "seed", "diffusion_link", "diffusion_link_ddim")
TABLE1_METRICS = ("pair_cosine", "centroid_gap", "rmg", "recall_at_10")
TABLE2_METRICS = {"cider_d": "cider", "meteor": "meteor", "spice": "spice", "spider": "spider", "sbert_sim": None}     # ours: the paper's
SETTING_WORDS = {"gap": "gap", "zero_shot": "zero-shot", "training_free": "training-free", "supervised": "supervised"}
COMPARABLE = {
    "claim": "sign and rough size: other data, encoder and language model",
    "table": "no: other data, encoder and language model",
    "audiocaps": "yes: AudioCaps' test split; see the differences register for the rest",
}
WHY_APART = (
    "Others' figures on AudioCaps are not ranked with ours on `data/mini`: another test set, other references (composed here, written by people "
    "there), and CIDEr weighs a word by how rare it is in the references at hand. Two such scores share a name and not a scale."
)


def comparison_rows(results: Path, paper: pd.DataFrame | None = None) -> list[dict]:
    """Every row of ``comparison.csv``.

    Args:
        results: ``results/<profile>`` with claims.csv, table1.csv and table2.csv; of an absent table there are no rows.
        paper: ``load_paper()``.

    Returns:
        rows with the columns of ``COMPARISON_COLUMNS``; ``part`` is claims, table1, table2 or others. ``ours`` is blank where nothing
        was computed, ``paper`` is "?" where nothing is known.
    """
    paper = load_paper() if paper is None else paper
    on_audiocaps = get_profile(results.name).data_dir.name == "audiocaps"
    comparable = COMPARABLE["audiocaps"] if on_audiocaps else COMPARABLE["table"]
    rows = []
    for claim in _table(results, "claims"):
        found = paper[paper.claim == claim["id"]].iloc[0]
        system = _between(claim["evidence"], "system=") or ("diffusion_link-raw" if found.metric == "cider_relative_gain" else "diffusion_link")
        rows.append({
            "part": "claims", "claim": claim["id"], "setting": found.setting, "system": system,
            "metric": _between(claim["evidence"], "metric=") or found.metric, "ours": claim["ours"], "ci_low": claim["ci_low"],
            "ci_high": claim["ci_high"], "n_seeds": claim["n_seeds"], "verdict": claim["verdict"], "paper": paper_text(found),
            "paper_status": found.status, "evidence": claim["evidence"],
            "comparable": COMPARABLE["claim"] if found.metric == "cider_relative_gain" and not on_audiocaps else comparable,
        })
    for row in _table(results, "table1"):
        if row["system"] in TABLE1_SYSTEMS and row["space"] == "text":
            rows += [{"part": "table1", "setting": "gap", "system": row["system"], "metric": metric, **_figure(row, metric), "n_seeds": "",
                      "paper": UNKNOWN, "paper_status": UNKNOWN, "comparable": comparable, "evidence": f"table1.csv: system={row['system']}"}
                     for metric in TABLE1_METRICS]
    for row in _table(results, "table2"):
        if row["experiment"] in ("zero_shot", "supervised") and row["system"] in ("raw", "diffusion_link") and row["space"] == "text":
            for metric, theirs in TABLE2_METRICS.items():
                known = paper[(paper.system == OURS) & (paper.setting == row["experiment"]) & (paper.metric == theirs)]
                known = known if row["system"] == "diffusion_link" else known[:0]
                rows.append({
                    "part": "table2", "setting": row["experiment"], "system": row["system"], "metric": metric, **_figure(row, metric),
                    "n_seeds": row["n_seeds"], "paper": paper_text(known.iloc[0]) if len(known) else UNKNOWN,
                    "paper_status": known.status.iloc[0] if len(known) else UNKNOWN, "comparable": comparable,
                    "evidence": f"table2.csv: experiment={row['experiment']}, system={row['system']}, decoding={row['decoding']}"})
    others = paper[(paper.system != OURS) & paper.metric.isin(CAPTION_FIGURES)]
    rows += [{"part": "others", "setting": row.setting, "system": row.system + (f" ({row.note})" if row.note else ""), "metric": row.metric,
              "paper": paper_text(row), "paper_status": row.status, "comparable": comparable, "evidence": "results/paper.csv"}
             for row in others.itertuples(index=False)]
    return rows


def write_comparison(profile: Profile) -> list[dict]:
    """Write ``results/<profile>/comparison.csv`` and ``.md``; return the rows."""
    rows = comparison_rows(profile.results_dir)
    atomic_write(profile.results_dir / "comparison.csv", csv_text(rows, COMPARISON_COLUMNS))
    sections = [(f"# Ours beside the paper's, profile {profile.name}\n\n"
                "\"?\" is unknown to us: only the paper's abstract and summaries of it were read.\n"), "## The claims\n", claims_part(rows),
                "## Tables\n", tables_part(rows), "## What others report on AudioCaps\n", others_part(rows)]
    atomic_write(profile.results_dir / "comparison.md", "\n".join(sections))
    return rows


def claims_part(rows: list[dict]) -> str:
    """Markdown: the paper's value of each claim and the figure that decided ours."""
    return markdown_table(["claim", "setting", "the paper", "status", "ours, 95 % interval", "verdict", "comparable"], [
        [row["claim"], SETTING_WORDS[row["setting"]], row["paper"], row["paper_status"],
         f"{row['metric']} of {row['system']}: {figure_text(row)}" if row["ours"] else "not computed", row["verdict"].replace("_", " "),
         row["comparable"]]
        for row in rows if row["part"] == "claims"], left=7)


def tables_part(rows: list[dict]) -> str:
    """Markdown: our rows of Table 1 and Table 2 with the paper's value of each cell."""
    parts = []
    for part, name, metrics in (("table1", "Table 1", TABLE1_METRICS), ("table2", "Table 2", TABLE2_METRICS)):
        cells = {(row["setting"], row["system"], row["metric"]): row for row in rows if row["part"] == part}
        lines = []
        for setting, system in dict.fromkeys(key[:2] for key in cells):
            found = [cells[setting, system, metric] for metric in metrics]
            lines.append([SETTING_WORDS[setting], f"`{system}`", "ours", *(figure_text(row) for row in found)])
            lines.append(["", "", "the paper", *(row["paper"] for row in found)])
        if lines:
            parts.append(markdown_table([name, "", "", *metrics], lines, left=3))
    return "\n".join(parts)


def others_part(rows: list[dict]) -> str:
    """Markdown: what others report on AudioCaps, in the order of ``paper.csv``, and why ours is not among it."""
    found = [row for row in rows if row["part"] == "others"]
    cells = {(row["setting"], row["system"], row["metric"]): row for row in found}
    lines = [[system, SETTING_WORDS[setting], *(cells[setting, system, metric]["paper"] for metric in CAPTION_FIGURES),
              next(row["paper_status"] for row in found if (row["setting"], row["system"]) == (setting, system))]
             for setting, system in dict.fromkeys(key[:2] for key in cells)]
    names = [name.upper().replace("CIDER", "CIDEr").replace("SPIDER", "SPIDEr") for name in CAPTION_FIGURES]
    table = markdown_table(["system", "setting", *names, "status"], lines, left=2)
    apart = "Ours on AudioCaps stand in the tables above." if found and found[0]["comparable"].startswith("yes") else WHY_APART
    return (f"{apart}\n\n{table}\nScores x 100, as printed. \"{NOT_REPORTED}\": not in what we read; \"recalled\": not checked against the source. "
            "The order is no ranking.\n")


def paper_text(row: pd.Series) -> str:
    """A value of ``paper.csv`` as it is shown: "up to +52.5 % relative", "91.1", "?", "-"."""
    if row.value in (UNKNOWN, NOT_REPORTED):
        return row.value
    shown = {"relative percent": f"+{row.value} % relative", "blocks": f"{row.value} blocks"}.get(row.unit, row.value)
    return f"{row.bound} {shown}".strip()


def figure_text(row: dict) -> str:
    """Our value with its interval: "+38.2 % [+10.7 %, +80.2 %]", "0.436 [0.385, 0.482]"; "n/c" without one."""
    if not row["ours"]:
        return "n/c"
    form = "{:+.1%}" if row["metric"].endswith("_relative_gain") else "{:+.3f}" if "-" in row["system"] else "{:.3f}"
    form = "{:,.0f}" if abs(float(row["ours"])) >= 1000 else form
    value, *ends = (form.format(float(row[key])).replace("%", " %") for key in ("ours", "ci_low", "ci_high") if row[key])
    return value + (f" [{ends[0]}, {ends[1]}]" if len(ends) == 2 and ends[0] != ends[1] else "")


def _figure(row: dict[str, str], metric: str) -> dict[str, str]:
    return {"ours": row.get(metric, ""), "ci_low": row.get(f"{metric}_ci_low", ""), "ci_high": row.get(f"{metric}_ci_high", "")}


def _between(text: str, start: str) -> str:
    """What follows ``start`` up to the next comma; "" if it is not there."""
    return text.partition(start)[2].partition(",")[0]


def _table(results: Path, name: str) -> list[dict[str, str]]:
    path = results / f"{name}.csv"
    return pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.is_file() else []
