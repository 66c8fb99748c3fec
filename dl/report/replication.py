"""The replication report, section by section: notebook 10 shows these pieces, and ``report.html`` is made of the same ones.

Each function turns files of ``results/<profile>`` into Markdown; no number is typed. What a file does not hold yet is named with the
command that makes it.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from dl.config import SPLITS, Profile
from dl.data import OVERLAP, differences
from dl.report.answer import GENERATIVE, SIMPLER, WORDS, Evidence, answer, difference_text, gain_text, generative_line
from dl.report.claims import C1_METRICS, VERDICT_RULES
from dl.report.comparison import claims_part, comparison_rows, others_part, tables_part
from dl.report.deviations import deviations_table
from dl.report.html import Figure, Section, page
from dl.report.summaries import captions_table, claims_table, encoder_table, gap_table
from dl.store import SYSTEMS, atomic_write, markdown_table

LIBRARIES = ("python", "torch", "transformers", "scikit-learn", "numpy")


def absent(what: str, stage: str, more: str = "") -> str:
    """The line in place of a piece that cannot be made yet."""
    return f"{what}: not computed yet; `./run_all.sh --only {stage}{more}` does it.\n"


def claims_section(results: Path) -> str:
    """Each claim with its rule, its figures and the row that decided it."""
    e = Evidence(results)
    if not e.claims:
        return absent("Verdicts", "06 07 08")
    parts = [("The rules were committed before any system was scored on test. Supported: the 95 % interval lies on the claimed side; partly: only the "
             "mean does. Of several parts the worst decides.\n")]
    for rule in VERDICT_RULES:
        claim = e.claims[rule.id]
        notes = "".join(f"* {_plain(note)}\n" for note in claim["note"].split("; ") if note)
        seeds = "" if claim["n_seeds"] in ("", "0") else f" Training seeds: {claim['n_seeds']}."
        evidence = f"Evidence: `{claim['evidence']}`.{seeds}" if claim["evidence"] else "Evidence: none."
        parts.append(f"**{rule.id}, {claim['verdict'].replace('_', ' ')}:** {rule.claim}. *Rule:* {rule.rule}\n\n{notes}\n{evidence}\n")
    return "\n".join(parts)


def simpler_section(results: Path) -> str:
    """Every map without diffusion beside diffusion_link: gap metrics and CIDEr-D, by paired intervals where there are any."""
    e = Evidence(results)
    parts: list[str] = []
    told: dict[tuple[str, str], list[str]] = {}
    for title, experiment, metrics in (("Gap", "gap", tuple(C1_METRICS)), ("Zero-shot captions", "zero_shot", ("cider_d",)),
                                       ("Supervised captions", "supervised", ("cider_d",))):
        lines = []
        for system in SIMPLER:
            for metric in metrics:
                if found := e.difference(experiment, metric, system):
                    told.setdefault((experiment, found["outcome"]), []).append(f"{system} ({metric})")
                    lines.append([f"`{system}`", metric, difference_text(found), f"{WORDS[found['outcome']]} {system}"])
        if lines:
            parts.append(f"**{title}.** `diffusion_link` minus a map without diffusion, paired, 95 % interval:\n\n"
                         + markdown_table(["map", "metric", "difference", "diffusion_link is"], lines, left=2))
    rows = e.captions("zero_shot")
    if "raw" in rows and "diffusion_link" in rows:
        raw, ours = (float(rows[name]["cider_d"]) for name in ("raw", "diffusion_link"))
        if ours > raw:
            shares = [f"`{name}` {(float(rows[name]['cider_d']) - raw) / (ours - raw):.0%} (gain {gain_text(rows[name])})"
                      for name in SIMPLER if name in rows and rows[name]["cider_d_relative_gain"]]
            if shares:
                parts.append(f"Of the {ours - raw:.3f} CIDEr-D that `diffusion_link` adds to raw, zero-shot, a simpler map adds: "
                             f"{', '.join(shares)}.\n")
    if not parts:
        return absent("Paired differences from simpler maps", "06 07")
    if not any(experiment == "supervised" for experiment, _ in told):
        parts.append("No simpler map was captioned in the supervised setting: `./run_all.sh --full --only 08` adds ridge.\n")
    parts.append("\"Not told apart\" means that the interval holds 0. It is no proof that two systems are equal.\n")
    return "\n".join(parts)


def generative_section(results: Path) -> str:
    """Where diffusion helps: the verdicts on the rows ``generative:*``, by rules that were written before; each says what was known then."""
    e = Evidence(results)
    if not e.frame.experiment.str.startswith(GENERATIVE).any():
        return absent("Several samples and a vote among their captions, spread that predicts error, few pairs, distribution metrics", "A3")
    from dl.report.generative import RULES, verdicts

    found = verdicts(e.frame)
    rules = "".join(f"* *{name}:* {rule}\n" for name, rule in RULES.items() if any(verdict.part == name for verdict in found))
    return f"{generative_line(e)}\n\n" + "".join(f"* {verdict.sentence}\n" for verdict in found) + f"\nThe rules:\n\n{rules}"


def ablations_section(results: Path) -> str:
    """One line for each ablation: the range of RMG and of R@10, and the variants that are told apart from the base."""
    table = Evidence(results).table("ablations")
    if table.empty:
        return absent("Ablations", "09", " --full")
    numbers = ("mean", "difference", "difference_ci_low", "difference_ci_high")
    table = table.assign(**{name: pd.to_numeric(table[name].replace("", None)) for name in numbers if name in table}).dropna(subset=["mean"])
    lines = []
    for name, group in table.groupby("name", sort=False):
        cells = []
        for metric in ("rmg", "recall_at_10"):
            part = group[group.metric == metric].sort_values("mean", kind="stable")
            cells.append("" if part.empty else " to ".join(f"{row['mean']:.3f} (`{row['variant']}`)" for _, row in part.iloc[[0, -1]].iterrows()))
        part = group[group.metric == "rmg"]
        apart = part[(part.difference_ci_low > 0) | (part.difference_ci_high < 0)] if "difference" in part else part[:0]
        cells.append(", ".join(f"`{row.variant}` {row.difference:+.3f}" for row in apart.itertuples()) or ("none" if "difference" in part else "?"))
        lines.append([name.replace("_", " "), str(group.variant.nunique()), *cells])
    head = ["what varies", "variants", "RMG, lowest to highest", "R@10, lowest to highest", "RMG told apart from the base's"]
    steps = ", ".join(dict.fromkeys(value for value in table.train_steps if value not in ("", "0")))
    return (markdown_table(head, lines, left=5) + f"\nTrained fits take {steps} steps. All metrics with intervals, and a sentence for each ablation: "
            "`ablations.md`; figures: `figures/09_*`.\n")


def comparison_section(results: Path) -> str:
    """Ours beside the paper's."""
    rows = comparison_rows(results)
    return f"\"?\" is unknown to us: only the paper's abstract and summaries of it were read.\n\n{claims_part(rows)}\n{tables_part(rows)}"


def limits_section(results: Path) -> str:
    """What the data and the encoder cannot tell, counted from the data's own tables."""
    e = Evidence(results)
    folder = e.profile.data_dir
    if not (folder / "recordings/recordings.csv").is_file():
        return "".join(f"* {line}\n" for line in _audiocaps_limits(results, folder))
    recordings = pd.read_csv(folder / "recordings/recordings.csv", dtype=str)
    scenes = pd.read_csv(folder / "scenes.csv", dtype=str)
    test = scenes[scenes.split == "test"]
    rendered = recordings.source_package.str.contains("soundfont").sum()
    used = len({name for names in test.recordings for name in names.split(";")})
    lines = [
        (f"**Small.** {len(recordings)} recordings, {recordings.label.nunique()} labels, {(scenes.split == 'train').sum():,} scenes in train and "
        f"{len(test)} in test, and these are mixed from {used} recordings: intervals resample recordings, so they are wide."),
        f"**Not all of it is recorded.** {rendered} of the {len(recordings)} are SoundFont renderings, single notes and effects.",
        "**Labels come from file names.** Nobody checked them by ear.",
        "**References are composed** from the labels by rules, so they are more regular than people's, and a caption model may learn the rules.",
        (f"**Train and test are related.** {(test.shares_source == '1').sum()} of the {len(test)} test scenes hold a take from a source that train "
        f"knows; {(test.seen == '0').sum()} hold a label that train does not."),
        (f"**The language model is small** (`{e.profile.captioner.language_model}`) and reads one vector; systems on AudioCaps mostly use "
        "far larger ones."),
        "**The encoder is weak, and was trained on the train recordings,** on which the bridge learns too. How well it hears the test scenes:",
    ]
    return "".join(f"* {line}\n" for line in lines) + ("\n" + encoder_table(results) if (results / "mini_clap.csv").is_file() else "")


def _audiocaps_limits(results: Path, folder: Path) -> list[str]:
    """What AudioCaps and LAION-CLAP cannot tell: their overlap, clips that were not there, differences from the published counts."""
    lines = [f"**Not unseen.** {OVERLAP}."]
    if (results / "unusable_clips.csv").is_file():
        lost = pd.read_csv(results / "unusable_clips.csv").groupby("split").size()
        lines.append("**Not complete.** " + ", ".join(f"{lost[split]:,} clips of {split}" for split in SPLITS if split in lost)
                     + " were not on disk or could not be read (`unusable_clips.csv`); scores of other copies of AudioCaps rest on other clips.")
    try:
        version, differing = differences(folder)
    except (FileNotFoundError, ValueError):                              # the report may be written where the data are not
        return lines
    return [*lines, f"**AudioCaps {version}.** " + (f"Not as published: {'; '.join(differing)}." if differing else "Counts as published.")]


def missing_section(results: Path) -> str:
    """What is not computed: claims, metrics with their reasons, systems without a row in a table."""
    e = Evidence(results)
    lines = [f"**{claim['id']}:** {claim['note']}." for claim in e.claims.values() if claim["verdict"] == "not_tested"]
    lacking = e.frame[(e.frame.status == "not_computed") & ~e.frame.experiment.str.startswith("ablation")]
    for (metric, reason), rows in lacking.groupby(["metric", "reason"], sort=False):
        settings = ", ".join(dict.fromkeys(name.removesuffix(":paired").replace("_", "-") for name in rows.experiment))
        lines.append(f"**{metric}** ({settings}): {reason}.")
    for name, stage, pool in (("table1", "06", [s for s in SYSTEMS if s not in ("capdec", "text_ceiling")]),
                              ("table2", "07", [s for s in SYSTEMS if s not in ("text_floor", "text_to_audio")])):
        table = e.table(name)
        shown = set() if table.empty else set(table.system if name == "table1" else table.system[table.experiment == "zero_shot"])
        if without := [f"`{system}`" for system in pool if system not in shown]:
            lines.append(f"**Without a row in {name}{'' if name == 'table1' else ', zero-shot'}:** {', '.join(without)}; "
                         f"`./run_all.sh --full --only {stage}` runs every one that its notebook lists.")
    if e.profile.data_dir.name != "audiocaps":
        lines.append("**AudioCaps, LAION-CLAP, a 7B language model:** not here, so nothing in this report was measured with them; "
                     "`./run_all.sh check --profile paper` says what to put where.")
    lines.append("**FENSE:** its two models are not among the pinned packages; sentence similarity (`sbert_sim`) stands in no place of it.")
    return "".join(f"* {line}\n" for line in lines)


def machine_section(results: Path) -> str:
    """Time and memory of each stage, the machine, versions, commits and the hashes of the data."""
    e = Evidence(results)
    parts = []
    timing = e.table("timing")
    if not timing.empty:
        timing = timing[timing.stage != "10"]       # this report's own time is known after it only
        rows = [[row.stage, row.device, f"{float(row.wall_s):.0f}", f"{float(row.peak_memory_mb):.0f}"] for row in timing.itertuples()]
        parts.append(markdown_table(["stage", "device", "seconds", "peak memory (MB)"], rows, left=2)
                     + f"\nTogether {pd.to_numeric(timing.wall_s).sum() / 60:.0f} minutes. "
                     "A stage that found fits or captions in the cache is quicker than one from nothing.\n")
    path = results / "provenance.json"
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        machine, versions = record["machine"], record["versions"]
        parts.append(f"Machine: {machine['cpu_count']} CPU cores, {machine['system']} {machine['architecture']}, device {record['device']}. "
                     + ", ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions) + ".\n")
        hashes = [[f"`{name}`", str(entry["n_files"]), f"`{entry['sha256'][:16]}`"] for name, entry in sorted(record["inputs"].items())]
        parts.append(markdown_table(["input", "files", "sha256, first digits"], hashes, left=1))
    commits = sorted(set(e.frame.git_sha) - {""})
    if commits:
        parts.append(f"Commits that made the rows of `metrics.csv`: {', '.join(f'`{commit}`' for commit in commits)}.\n")
    return "\n".join(parts) or absent("Times", "00")


def _tables(make: Callable[[Path], str], name: str, stage: str) -> Callable[[Path], str]:
    def section(results: Path) -> str:
        return make(results) + f"\nAll metrics: `{name}.md`.\n" if (results / f"{name}.csv").is_file() else absent(name, stage)
    return section


def _answer_section(results: Path) -> str:
    return answer(results) + ("\n" + claims_table(results) if (results / "claims.csv").is_file() else "")


def _plain(note: str) -> str:
    """A note of ``claims.csv`` in words; what it calls equal is a difference whose interval holds 0."""
    return note.replace("_supported", " supported").replace("_tested", " tested").replace(" equals ", " is not told apart from ")


SECTIONS: dict[str, tuple[str, Callable[[Path], str], tuple[Figure, ...]]] = {
    "answer": ("The answer", _answer_section, ()),
    "claims": ("The claims, their rules and the evidence", claims_section, (
        Figure("05_migration", "C2: raw, bridged and text vectors of the test clips; arrows lead from raw to bridged."),)),
    "table1": ("Table 1: the gap", _tables(gap_table, "table1", "06"), (
        Figure("06_table1", "Gap metrics of every system on test, mean and 95 % interval."),
        Figure("06_gap_against_retrieval", "Relative modality gap against R@10: the upper left corner is where one wants to be."))),
    "table2": ("Table 2: captions", _tables(captions_table, "table2", "07 08"), (
        Figure("07_table2_zero_shot", "Zero-shot caption scores, mean and 95 % interval."),
        Figure("08_table2_supervised", "Supervised caption scores, mean and 95 % interval."))),
    "simpler": ("Would a simpler method have done?", simpler_section, ()),
    "generative": ("Where does diffusion help?", generative_section, ()),
    "ablations": ("Ablations", ablations_section, ()),
    "comparison": ("Ours beside the paper's", comparison_section, ()),
    "others": ("What others report on AudioCaps", lambda results: others_part(comparison_rows(results)), ()),
    "deviations": ("Differences from the paper", lambda results: deviations_table(full=True), ()),
    "limits": ("What these data cannot tell", limits_section, ()),
    "missing": ("What is not computed, and why", missing_section, ()),
    "machine": ("Hardware and time", machine_section, ()),
}


def section(results: Path, key: str) -> Section:
    """One section of the report.

    Raises:
        KeyError: unknown key; ``SECTIONS`` lists them.
    """
    title, make, figures = SECTIONS[key]
    return Section(key, title, make(results), figures)


def write_report(profile: Profile) -> Path:
    """Write ``results/<profile>/report.html`` from every section; equal results give equal bytes.

    Returns:
        its path.
    """
    results = profile.results_dir
    title = f"Diffusion-Link, replicated: do the paper's claims hold? (profile {profile.name})"
    return atomic_write(results / "report.html", page(title, [section(results, key) for key in SECTIONS], results / "figures"))
