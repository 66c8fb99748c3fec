"""Does the generative view pay? The rules of notebook A3, and the verdicts that ``metrics.csv`` gives by them.

The rules were written before any of these systems was scored on test; that of few_pairs_captions when the RMG of its rows was known, before their
captions were. One sampler a part is named on val, so that the best of many rows on test cannot win.
"""
from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

DIFFUSION = ("diffusion_link_ddim", "conditional_diffusion")
TRIVIAL = ("nearest_audio", "ridge_norm", "projection_entropy")
RULES = {
    "mbr": "On val the diffusion sampler with the highest CIDEr-D of its consensus captions is named. On test it *pays* if its CIDEr-D minus that "
           "of ridge and minus that of regression_mlp both have paired 95 % intervals above 0. It pays *because of diffusion* if the same holds "
           "against the consensus captions of ridge + noise and of five mappings without diffusion.",
    "spread": "For each diffusion sampler: the spread is *calibrated* if the 95 % interval of its Spearman correlation with the error lies above "
              "0. It *pays* if that correlation also beats those of all three figures that need no samples, by paired intervals above 0.",
    "few_pairs": "For each number of pairs: text-only pre-training *pays* if the RMG of the pre-trained bridge minus that of the bridge from "
                 "scratch, of ridge and of regression_mlp on the same pairs all have paired 95 % intervals below 0. The same for ridge followed "
                 "by the text-only network.",
    "few_pairs_captions": "At the smallest number of pairs: the bridge, pre-trained or from scratch, *pays* in words if its zero-shot CIDEr-D minus that "
                          "of ridge and minus that of regression_mlp on the same pairs both have paired 95 % intervals above 0. (Written when the RMG "
                          "of these rows on test was known, before any of their captions was.)",
    "distribution": "For each diffusion family the setting named on val *pays* if its Frechet distance minus the lowest one that a control "
                    "reaches at no less pair cosine has a 95 % interval below 0 against every control.",
}


@dataclass(frozen=True)
class Verdict:
    """A rule applied to one candidate.

    Attributes:
        part: key of ``RULES``.
        candidate: what was judged.
        pays: whether it beats every control that the rule names (of ``mbr`` those that show the cause, too).
        word: pays because of diffusion, pays, calibrated, or does not pay.
        evidence: one line for every comparison: name, value, interval.
    """

    part: str
    candidate: str
    pays: bool
    word: str
    evidence: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The verdict as a line of Markdown."""
        return f"**{self.part}** · {self.candidate}: **{self.word}** ({'; '.join(self.evidence)})"


def verdicts(frame: pd.DataFrame) -> list[Verdict]:
    """Every verdict that the rows allow; a part without rows gives none.

    Args:
        frame: ``MetricsFile.frame()``.
    """
    frame = frame[frame.experiment.str.startswith("generative:")]
    return [verdict for judge in (_mbr, _spread, _few_pairs, _few_pairs_captions, _distribution) for verdict in judge(frame)]


def named_on_val(frame: pd.DataFrame) -> str | None:
    """The diffusion family whose best consensus row on val has the highest CIDEr-D (sbert_sim where there is no CIDEr-D)."""
    rows = frame[(frame.experiment == "generative:mbr") & (frame.split == "val")].copy()
    rows["family"] = rows.system.str.split("@").str[0]
    rows = rows[rows.family.isin(DIFFUSION) & rows.value.notna()]
    for metric in ("cider_d", "sbert_sim"):
        if len(of_metric := rows[rows.metric == metric]):
            return of_metric.loc[of_metric.value.idxmax()].family
    return None


def _compare(frame: pd.DataFrame, part: str, pairs: list[str], metric: str, higher: bool) -> tuple[list[bool], list[str]]:
    """For each paired row whether its interval lies on the better side, and the row in words; an absent row counts as not better."""
    better, words = [], []
    for name in pairs:
        found = frame[(frame.experiment == f"generative:{part}:paired") & (frame.system == name) & (frame.metric == metric)]
        row = found.iloc[0] if len(found) else None
        if row is None or pd.isna(row.value) or pd.isna(row.ci_low):
            better.append(False)
            words.append(f"{name}: no interval")
            continue
        better.append(bool(row.ci_low > 0 if higher else row.ci_high < 0))
        words.append(f"{name} {row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]")
    return better, words


def _mbr(frame: pd.DataFrame) -> list[Verdict]:
    if (family := named_on_val(frame)) is None:
        return []
    prize, words = _compare(frame, "mbr", [f"{family}_mbr-{name}" for name in ("ridge", "regression_mlp")], "cider_d", True)
    cause, more = _compare(frame, "mbr", [f"{family}_mbr-{name}_mbr" for name in ("ridge_noise", "mappings")], "cider_d", True)
    word = "does not pay" if not all(prize) else "pays because of diffusion" if all(cause) else "pays, but not shown to be because of diffusion"
    return [Verdict("mbr", f"consensus of {family}", all(prize) and all(cause), word, (*words, *more))]


def _spread(frame: pd.DataFrame) -> list[Verdict]:
    found = []
    for family in DIFFUSION:
        metric = f"spearman:{family}"
        rows = frame[(frame.experiment == "generative:spread") & (frame.system == "sample_spread") & (frame.metric == metric)]
        if rows.empty:
            continue
        row = rows.iloc[0]
        better, words = _compare(frame, "spread", [f"sample_spread-{name}" for name in TRIVIAL], metric, True)
        calibrated = bool(row.ci_low > 0)
        word = "pays" if calibrated and all(better) else "calibrated, but a figure without samples does as well" if calibrated else "not calibrated"
        own = f"Spearman {row.value:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        found.append(Verdict("spread", f"spread of {family}", calibrated and all(better), word, (own, *words)))
    return found


def _few_pairs(frame: pd.DataFrame) -> list[Verdict]:
    rows, found = frame[frame.experiment == "generative:few_pairs"], []
    for name in ("pretrained", "ridge_text_prior"):
        for share in sorted({label.split("@")[1] for label in rows.system if label.startswith(f"{name}@")}, key=float):
            pairs = [f"{name}@{share}-{other}@{share}" for other in ("scratch", "ridge", "regression_mlp")]
            better, words = _compare(frame, "few_pairs", pairs, "rmg", False)
            word = "pays" if all(better) else "does not pay"
            found.append(Verdict("few_pairs", f"{name}, {float(share):.0%} of the pairs", all(better), word, tuple(words)))
    return found


def _few_pairs_captions(frame: pd.DataFrame) -> list[Verdict]:
    rows, found = frame[frame.experiment == "generative:few_pairs_captions"], []
    for label in sorted({label for label in rows.system if label.startswith(("pretrained@", "scratch@"))}):
        name, share = label.split("@")
        pairs = [f"{label}-{other}@{share}" for other in ("ridge", "regression_mlp")]
        better, words = _compare(frame, "few_pairs_captions", pairs, "cider_d", True)
        found.append(Verdict("few_pairs_captions", f"{name}, {float(share):.0%} of the pairs", all(better), "pays" if all(better) else "does not pay", tuple(words)))
    return found


def _distribution(frame: pd.DataFrame) -> list[Verdict]:
    rows, found = frame[frame.experiment == "generative:distribution:paired"], []
    for family in DIFFUSION:
        pairs = sorted(label for label in rows.system if label.startswith(f"{family}@"))
        if pairs:
            better, words = _compare(frame, "distribution", pairs, "frechet_at_pair_cosine", False)
            found.append(Verdict("distribution", pairs[0].rsplit("-", 1)[0], all(better), "pays" if all(better) else "does not pay", tuple(words)))
    return found
