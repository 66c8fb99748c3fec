"""The answer in six lines: what the verdicts are, what the bridge gains, why, and whether a simpler map gains as much.

Notebook 10, its HTML page and the README's headline are made from :func:`answer`. Every number comes from ``claims.csv``, ``table1.csv``,
``table2.csv``, ``search.csv`` and the paired rows of ``metrics.csv``, and so does every word that depends on one: intervals decide which
sentences stand there.
"""
from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from dl.config import BridgeConfig, Profile, get_profile
from dl.report.claims import C1_METRICS, CONTROLS, Part, lookup
from dl.report.comparison import figure_text, paper_text
from dl.report.paper import load_paper
from dl.store import METRIC_COLUMNS, SYSTEMS, search_paths

DIFFUSION = ("diffusion_bridge", "conditional_diffusion", "seed", "diffusion_link", "diffusion_link_ddim")
SIMPLER = tuple(name for name in SYSTEMS if name not in (*DIFFUSION, "raw", "text_ceiling", "text_floor", "text_to_audio"))   # maps without diffusion
NAMES = {"ridge": "ridge", "regression_mlp": "the regression MLP", "regression_mlp_topology": "the regression MLP with topology loss"}
WORDS = {"better": "above", "worse": "below", "alike": "not told apart from"}
GENERATIVE = "generative:"        # experiments that ask where a generative model pays
NEARLY_ALL = 0.95        # share of signal above which the noise at the start step hardly matters
VERDICTS = ("supported", "partly_supported", "not_supported", "not_tested")


@dataclass(frozen=True)
class Evidence:
    """The files of ``results/<profile>`` that the report reads; each is read when first asked for, an absent one is empty.

    Args:
        folder: ``results/<profile>``.
    """

    folder: Path

    @cached_property
    def profile(self) -> Profile:
        """The profile whose folder this is."""
        return get_profile(self.folder.name, results_root=self.folder.parent)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """``metrics.csv``: value and interval ends as float64, the rest as text."""
        path = self.folder / "metrics.csv"
        frame = pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=list(METRIC_COLUMNS), dtype=str)
        return frame.assign(**{column: pd.to_numeric(frame[column].replace("", None)) for column in ("value", "ci_low", "ci_high")})

    @cached_property
    def paper(self) -> pd.DataFrame:
        """``results/paper.csv``."""
        return load_paper()

    def table(self, name: str) -> pd.DataFrame:
        """``<name>.csv`` as text, blank where a cell is empty."""
        path = self.folder / f"{name}.csv"
        return pd.read_csv(path, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame()

    def chosen(self, system: str) -> dict:
        """What the search on val chose for a system (``dl.store.search_paths``)."""
        for path in dict.fromkeys([self.folder / "search.csv", *search_paths(self.profile)]):
            if path.is_file():
                search = pd.read_csv(path, dtype=str)
                best = search.params[(search.system == system) & (search.chosen == "1")]
                if len(best):
                    return json.loads(best.iloc[0])
        return {}

    @cached_property
    def claims(self) -> dict[str, dict[str, str]]:
        """Rows of ``claims.csv`` by id."""
        return {row["id"]: row for row in self.table("claims").to_dict("records")}

    def captions(self, setting: str) -> dict[str, dict[str, str]]:
        """Main rows of Table 2 of one setting, by system; the first decoding where there are two."""
        table = self.table("table2")
        rows = [] if table.empty else table[(table.experiment == setting) & (table.space == "text")].to_dict("records")
        return {row["system"]: row for row in reversed(rows)}

    def difference(self, experiment: str, metric: str, other: str) -> dict | None:
        """The paired difference of diffusion_link and another system on test, or None; ``outcome`` is better, worse or alike.

        Alike means that the 95 % interval holds 0: the two are not told apart, which is less than to say that they are equal.
        """
        side = C1_METRICS.get(metric, "lower" if metric in ("frechet_distance", "mmd2") else "higher")
        found = lookup(self.frame, Part(experiment, metric, side, other))
        if found is None or pd.isna(found["ci_low"]):
            return None
        apart = not found["ci_low"] <= 0 <= found["ci_high"]
        return found | {"outcome": "alike" if not apart else "better" if (found["value"] > 0) == (side == "higher") else "worse"}


def answer(results: Path) -> str:
    """The answer as a Markdown list; the README's headline."""
    e = Evidence(results)
    lines = [verdict_line(e), conclusion(e), captions_line(e, "zero_shot"), captions_line(e, "supervised"), gap_line(e), why_line(e),
             generative_line(e)]
    if results.name == "smoke":
        lines.insert(0, "**Profile smoke: 40 scenes and a few training steps. These figures mean nothing.**")
    return "\n".join(f"* {line}" for line in lines if line) + "\n"


def verdict_line(e: Evidence) -> str:
    """How many of the claims got which verdict, with their ids."""
    if not e.claims:
        return "**Verdicts:** none yet; run notebooks 06, 07 and 08."
    ids: dict[str, list[str]] = {}
    for claim in e.claims.values():
        ids.setdefault(claim["verdict"], []).append(claim["id"])
    counts = Counter({verdict: len(found) for verdict, found in ids.items()})
    shown = ", ".join(f"{counts[verdict]} {verdict.replace('_', ' ')} ({', '.join(ids[verdict])})" for verdict in VERDICTS if verdict in ids)
    return f"**The paper's {len(e.claims)} claims, on `data/{e.profile.data_dir.name}`:** {shown}."


def captions_line(e: Evidence, setting: str) -> str:
    """The gain over the raw vector, ours and the paper's, and ridge's."""
    rows, name = e.captions(setting), setting.replace("_", "-").capitalize()
    ours = rows.get("diffusion_link", {})
    if not ours.get("cider_d_relative_gain"):
        return f"**{name} captions:** not computed; run notebook {'07' if setting == 'zero_shot' else '08'}."
    known = e.paper[(e.paper.setting == setting) & (e.paper.metric == "cider_relative_gain")].iloc[0]
    one = "1 training seed: the interval knows nothing of the spread between seeds"
    seeds = one if ours["n_seeds"] == "1" else f"{ours['n_seeds']} training seeds"
    line = (f"**{name} captions:** `diffusion_link` changes CIDEr-D by {gain_text(ours)} over the raw audio vector ({seeds}); "
            f"the paper, on AudioCaps: {paper_text(known)}. ")
    difference = e.difference(setting, "cider_d", "ridge")
    if difference is None or "ridge" not in rows:
        return line + "Ridge, a linear map, was not run in this setting."
    return line + (f"Ridge, a linear map, changes it by {gain_text(rows['ridge'])}; `diffusion_link` minus ridge is "
                   f"{difference_text(difference)} CIDEr-D: {WORDS[difference['outcome']]} ridge.")


def gap_line(e: Evidence) -> str:
    """Pair cosine and retrieval, raw, bridged and by the controls, and which control is told apart on the three gap metrics of claim C1."""
    table = e.table("table1")
    if table.empty:
        return "**Gap:** not computed; run notebook 06."
    rows = table[table.space == "text"].set_index("system")
    shown = [name for name in ("raw", "diffusion_link", *CONTROLS, "text_floor") if name in rows.index]
    pair = ", ".join(f"`{name}` {float(rows.pair_cosine[name]):.3f}" if rows.pair_cosine[name] else f"`{name}` n/c" for name in shown)
    line = f"**Gap:** pair cosine {pair}. "
    for control in CONTROLS:
        differences = {metric: e.difference("gap", metric, control) for metric in C1_METRICS}
        if any(differences.values()):
            alike = [metric.replace("_", " ") for metric, found in differences.items() if found and found["outcome"] == "alike"]
            named = f" ({', '.join(alike)})" if alike else ""
            line += f"From {NAMES[control]} it is not told apart on {len(alike)} of {len(C1_METRICS)} gap metrics{named}. "
    return line.strip()


def why_line(e: Evidence) -> str:
    """What val chose for one-step Diffusion-Link and what that makes of it, and what the outputs lost: effective rank and retrieval."""
    table, params = e.table("table1"), e.chosen("diffusion_link")
    if table.empty or not params:
        return ""
    k, signal = params["start_timestep"], signal_share(e.profile.bridge, params["start_timestep"])
    off = "topology weight 0 (no topology loss) and " if params.get("topology_weight") == 0 else ""
    line = f"**Why:** val chose {off}start step k\\* = {k}, where {signal:.2%} of the variance is still signal, and one step. ".replace("%", " %")
    if signal > NEARLY_ALL:
        line += "A network trained on pairs then answers with the median caption vector for the sound, which is what regression learns. "
    rank = table[table.space == "text"].set_index("system").effective_rank
    shown = [f"`{name}` {float(rank[name]):.1f}" for name in ("raw", "diffusion_link", "ridge", "regression_mlp") if rank.get(name)]
    recall = lookup(e.frame, Part("gap", "recall_at_10", "higher", "raw"))
    narrower = rank.get("raw") and rank.get("diffusion_link") and float(rank["diffusion_link"]) < float(rank["raw"])
    line += f"The bridged vectors are {'' if narrower else 'not '}narrower than the sounds': effective rank {', '.join(shown)}."
    return line + ("" if recall is None else f" R@10 changes by {difference_text(recall)} from raw's.")


def signal_share(config: BridgeConfig, timestep: int) -> float:
    """abar at a start step: the share of the variance that is signal."""
    from dl.scheduler import DDIMScheduler

    return float(DDIMScheduler(config.num_train_timesteps, config.beta_start, config.beta_end, config.beta_schedule).alphas_cumprod[timestep])


def generative_line(e: Evidence) -> str:
    """Of the regimes in which a generative model may pay, those in which it did; blank before they were tried (notebook A3)."""
    if not e.frame.experiment.str.startswith(GENERATIVE).any():
        return ""
    from dl.report.generative import verdicts

    found = verdicts(e.frame)
    paid = [f"{verdict.candidate} ({verdict.part.replace('_', ' ')})" for verdict in found if verdict.pays]
    regimes = len({verdict.part for verdict in found})
    return (f"**Where diffusion helps:** of {len(found)} candidates in {regimes} regime{'s' if regimes != 1 else ''}, {len(paid)} beat every control "
            f"named in their rule{': ' + ', '.join(paid) if paid else ''}.")


def conclusion(e: Evidence) -> str:
    """What follows: the first sentence from the verdict on C3, the second from the paired intervals against the controls."""
    verdict = e.claims.get("C3", {}).get("verdict", "not_tested")
    if verdict == "not_tested":
        return ""
    first = {"supported": "A bridge makes better zero-shot captions than the raw vector.",
             "partly_supported": "A bridge's zero-shot captions score higher than the raw vector's, but the interval holds no gain too.",
             "not_supported": "A bridge's zero-shot captions are not better than the raw vector's here."}[verdict]
    outcomes: dict[str, list[str]] = {}
    for control in CONTROLS:
        if found := e.difference("zero_shot", "cider_d", control):
            outcomes.setdefault(found["outcome"], []).append(NAMES[control])
    parts = []
    if "alike" in outcomes:
        parts.append("That it has to be a diffusion model is not shown: in zero-shot CIDEr-D it is not told apart from "
                     f"{' or '.join(', '.join(outcomes['alike']).rsplit(', ', 1))}.")
    if "better" in outcomes:
        parts.append(f"Its captions score above those of {' and '.join(outcomes['better'])}.")
    if "worse" in outcomes:
        parts.append(f"Those of {' and '.join(outcomes['worse'])} score above its own.")
    if not parts:
        parts.append("No simpler map was captioned beside it.")
    elif not e.difference("zero_shot", "cider_d", "regression_mlp"):
        parts.append("The regression MLP, our network without noise, was not captioned beside it.")
    return " ".join(["**In short:**", first, *parts])


def gain_text(row: dict[str, str]) -> str:
    """A row's relative gain in CIDEr-D with its interval: "+38.2 % [+10.7 %, +80.2 %]"."""
    gain = "cider_d_relative_gain"
    return figure_text({"metric": gain, "system": row["system"], "ours": row[gain], **{end: row[f"{gain}_{end}"] for end in ("ci_low", "ci_high")}})


def difference_text(found: dict) -> str:
    """A paired difference with its interval: "+0.018 [-0.023, +0.059]"."""
    return f"{found['value']:+.3f} [{found['ci_low']:+.3f}, {found['ci_high']:+.3f}]"
