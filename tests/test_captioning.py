"""What Table 2 runs: vectors beside the right captions, fits and captions made once, rows and files replaced."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_captioner import tiny_language_model
from torch.nn.functional import normalize

from dl import experiments as captioning
from dl.caption_metrics import candidates_column
from dl.captioner import LLMCaptioner
from dl.clap import Embeddings
from dl.config import BridgeConfig, CaptionerConfig, Profile, get_profile
from dl.data import Split
from dl.experiments import Row, caption_rows, decoder_fit, decoder_pairs, fit_system, score_and_record, select_clips
from dl.peers import REGISTRY, centre
from dl.store import MetricsFile

DIM = 8


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def profile(tmp_path, language_model) -> Profile:
    captioner = CaptionerConfig(language_model=str(language_model), train_steps=3, batch_size=4, warmup_steps=1,
                                validate_every=3, projector_width=16, learning_rate=0.05, max_new_tokens=5,
                                dtype="float32")
    bridge = BridgeConfig(train_steps=2, batch_size=8)
    return get_profile("smoke", results_root=tmp_path / "results", bridge=bridge, captioner=captioner)


def embeddings(split: str, n: int = 12) -> Embeddings:
    """n clips; clip i has 1 + i % 3 captions, and the vectors of its captions lie about its own."""
    generator = torch.Generator().manual_seed(len(split))
    clean = torch.randn(n, DIM, generator=generator)
    text_clip = torch.cat([torch.full((1 + i % 3,), i) for i in range(n)])
    text = normalize(clean[text_clip] + 0.3 * torch.randn(len(text_clip), DIM, generator=generator) + 0.5, dim=1)
    audio = normalize(clean + 0.3 * torch.randn(n, DIM, generator=generator) - 0.5, dim=1)
    captions = [f"{split} sound {clip} in the words of {k}" for k, clip in enumerate(text_clip.tolist())]
    return Embeddings(split, [f"{split}-{i}_0" for i in range(n)], audio, text, text_clip, captions, [])


@pytest.fixture
def splits() -> list[Embeddings]:
    return [embeddings(name) for name in ("train", "val", "test")]


def data(of: Embeddings, recordings: list[str] | None = None) -> Split:
    """The split that the embeddings were made from."""
    n = len(of.clip_ids)
    captions = [[c for c, clip in zip(of.captions, of.text_clip.tolist(), strict=True) if clip == i] for i in range(n)]
    frame = pd.DataFrame({"recordings": recordings or [f"rec_{i}" for i in range(n)]})
    return Split(of.split, of.clip_ids, captions, frame, lambda i: None)


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often a decoder was trained or read, a step of training was taken, captions were generated."""
    counts = {"loads": 0, "steps": 0, "generations": 0}

    def count(owner, name, key, active=lambda _: True):
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[key] += active(args[0])
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, counting)

    count(captioning, "train_captioner", "loads")
    count(LLMCaptioner, "forward", "steps", lambda captioner: captioner.training)
    count(LLMCaptioner, "generate", "generations")
    return counts


# --------------------------------------------------------------------------------------------------------------- pairs
def clip_of(caption: str) -> int:
    return int(caption.split()[2])


def test_clips_are_selected_with_their_captions():
    train = embeddings("train")
    kept = select_clips(train, [0, 2, 5, 11])
    assert [clip_of(caption) for caption in kept.captions] == [0, 2, 2, 2, 5, 5, 5, 11, 11, 11]
    assert kept.text_clip.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(kept.text, train.text[[train.captions.index(caption) for caption in kept.captions]])
    assert torch.equal(kept.audio, train.audio[[0, 2, 5, 11]]) and kept.clip_ids[3] == train.clip_ids[11]


@pytest.mark.parametrize("decoder", ["raw", "ridge", "diffusion_link"])
def test_a_sound_is_paired_with_each_of_its_captions(profile, decoder):
    train = embeddings("train")
    vectors, captions = decoder_pairs(profile, decoder, train, seed=1)
    mapped = fit_system(profile, decoder, train, 1 if REGISTRY[decoder].trained else 0)(train.audio, noise_seed=0)
    assert torch.equal(vectors, mapped[[clip_of(caption) for caption in captions]])


def test_decoders_on_text_alone(profile):
    train = embeddings("train")
    vectors, captions = decoder_pairs(profile, "text", train, 0)
    assert captions == train.captions and torch.equal(vectors, train.text)
    noised, again, other = (decoder_pairs(profile, "text_noised", train, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(noised, again) and not torch.equal(noised, other)
    expected = 1 / (1 + DIM * 0.016) ** 0.5                           # cosine of t and t + N(0, v I), about
    assert float((noised * train.text).sum(1).mean()) == pytest.approx(expected, abs=0.03)
    c3 = fit_system(profile, "c3", train)
    centred, _ = decoder_pairs(profile, "text_centred", train, 0)
    cosine = (centred * centre(train.text, c3.text_mean)).sum(1).mean()
    assert float(cosine) == pytest.approx(expected, abs=0.03)
    bridged, _ = decoder_pairs(profile, "text_bridged", train, 1)
    assert torch.equal(bridged, fit_system(profile, "diffusion_bridge", train, 1).map_text(train.text))
    for vectors in (noised, centred, bridged):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    with pytest.raises(ValueError, match="unknown decoder 'sound'"):
        decoder_fit(profile, "sound", 0, train, train)


def test_the_ceiling_is_the_first_references_vector(profile):
    train, test = embeddings("train"), embeddings("test")
    expected = test.text[[0, 1, 3, 6, 7, 9, 12, 13, 15, 18, 19, 21]]
    assert torch.equal(captioning.system_vectors(profile, Row("text_ceiling"), train, test, 0), expected)


def test_disjoint_halves_share_no_recording():
    train = embeddings("train", 40)
    split = data(train, [f"rec_{i % 10};rec_{i * 7 % 10}" for i in range(40)])
    members = dict(zip(split.clip_ids, map(set, split.clusters), strict=True))
    halves = captioning.disjoint_halves(train, split)
    used = [set().union(*(members[clip_id] for clip_id in part.clip_ids)) for part in halves]
    assert used[0] and used[1] and not used[0] & used[1]
    left = [members[clip_id] for clip_id in train.clip_ids if not any(clip_id in part.clip_ids for part in halves)]
    assert left and not any(recordings <= half for recordings in left for half in used)


def test_rows_of_a_full_run_are_closed_forms_tuned_systems_and_own_decoders(profile, monkeypatch):
    default = ["raw", "ridge", "diffusion_bridge", "diffusion_link", "text_ceiling"]
    assert [row.system for row in captioning.zero_shot_rows(profile)] == default
    tuned = ("diffusion_link", "seed")
    monkeypatch.setattr(captioning, "chosen", lambda _, system: {"alpha": 1} if system in tuned else {})
    rows = captioning.zero_shot_rows(profile, full=True)
    common = {row.system for row in rows if row.decoder == "text"}
    assert {"raw", "mean_shift", "c3", "projection", "procrustes", "ridge", *tuned, "text_ceiling"} <= common
    assert not {"capdec", "text_to_audio", "regression_mlp", "conditional_diffusion"} & common
    assert {row.decoder for row in rows} == set(captioning.TEXT_DECODERS) and len(set(rows)) == len(rows)
    assert {row.decoder for row in captioning.zero_shot_rows(profile, full=True, own_decoders=False)} == {"text"}
    assert [row.decoder for row in captioning.supervised_rows(full=True)] == ["raw", "diffusion_link", "ridge"]


# ------------------------------------------------------------------------------------------------------ made only once
def same_weights(one: LLMCaptioner, other: LLMCaptioner) -> bool:
    theirs = other.trainable_state()
    return all(torch.equal(value, theirs[name]) for name, value in one.trainable_state().items())


def test_a_finished_fit_is_read_and_not_repeated(profile, splits, counted):
    fit = decoder_fit(profile, "text", 0, *splits[:2])
    first = fit.load()
    assert counted["steps"] == 3 and fit.path.is_file()
    assert fit.load() is first, "a second 7B model would not fit beside one that is in use"
    captioning.IN_USE.clear()
    again = fit.load()
    assert counted == {"loads": 2, "steps": 3, "generations": 0} and same_weights(first, again)
    assert again.history.step.tolist() == first.history.step.tolist() and again.history.val_loss.notna().any()


def test_the_name_of_a_fit_says_what_determines_it(profile, splits):
    train, val, _ = splits
    config = profile.captioner
    fit = decoder_fit(profile, "text", 0, train, val)
    decoded_otherwise = replace(profile, captioner=replace(config, num_beams=4, max_new_tokens=9))
    assert decoder_fit(decoded_otherwise, "text", 0, train, val).path == fit.path
    others = [decoder_fit(profile, "text", 1, train, val), decoder_fit(profile, "raw", 0, train, val),
              decoder_fit(profile, "text", 0, embeddings("train", 11), val),
              decoder_fit(replace(profile, captioner=replace(config, prefix_length=2)), "text", 0, train, val)]
    assert len({other.path for other in [fit, *others]}) == 5
    part, captions = decoder_fit(profile, "raw", 0, train, val).val_pairs
    assert torch.allclose(part, val.audio) and [clip_of(caption) for caption in captions] == list(range(12))
    assert captions[2] == val.captions[3], "the first caption of the clip"


def test_captions_that_are_there_are_not_generated_again(profile, splits, counted):
    rows = [Row("raw"), Row("ridge"), Row("ridge", "ridge"), Row("text_ceiling")]
    first = caption_rows(profile, rows, 0, *splits)
    assert list(first) == rows and {len(texts) for texts in first.values()} == {12}
    assert counted == {"loads": 2, "steps": 6, "generations": 4}
    assert caption_rows(profile, rows, 0, *splits) == first
    assert counted == {"loads": 2, "steps": 6, "generations": 4}
    next((profile.cache_dir / "captions").glob("text-ridge-*.json")).unlink()
    assert caption_rows(profile, rows, 0, *splits) == first
    assert counted == {"loads": 3, "steps": 6, "generations": 5}
    assert len(set(first[Row("raw")])) > 1, "the captions do not depend on the vectors"


def test_another_seed_decoding_or_vector_is_another_entry(profile, splits, counted):
    train, val, test = splits
    caption_rows(profile, [Row("raw")], 0, train, val, test)
    caption_rows(profile, [Row("raw")], 0, train, val, test, num_beams=2)
    caption_rows(profile, [Row("raw")], 1, train, val, test)
    caption_rows(profile, [Row("raw")], 0, train, val, replace(test, audio=test.audio.flip(0)))
    names = sorted(path.name.split("-")[4] for path in (profile.cache_dir / "captions").iterdir())
    assert counted["generations"] == 4 and names == ["beam2", "greedy", "greedy", "greedy"]


def test_the_strict_rows_leave_the_fits_on_all_of_train_alone(profile, splits, counted):
    train, (_, val, test) = embeddings("train", 40), splits
    fit_system(profile, "diffusion_link", train)
    before = {path: path.read_bytes() for path in (profile.cache_dir / "fits").iterdir()}
    found = captioning.disjoint_rows(profile, 0, train, data(train, [f"rec_{i // 2}" for i in range(40)]), val, test)
    assert [row.system for row in found] == ["raw", "ridge", "diffusion_link"] and counted["loads"] == 1
    after = {path: path.read_bytes() for path in (profile.cache_dir / "fits").iterdir()}
    assert before.items() <= after.items() and len(after) > len(before)
    stored = json.loads(next((profile.cache_dir / "captions").glob("text-diffusion_link-*.json")).read_text())
    assert stored == found[Row("diffusion_link")]


#  scores and files
def test_a_setting_replaces_its_rows_and_files_and_no_others(profile, monkeypatch):
    from dl import caption_metrics

    def absent():                            # without Java sbert_sim alone is computed, which is quick
        raise caption_metrics.JavaError("no Java")
    monkeypatch.setattr(caption_metrics, "find_java", absent)
    test, folder = embeddings("test"), profile.results_dir / "captions"
    split = data(test)
    rows = [Row("raw"), Row("diffusion_link"), Row("c3", "text_centred", "centred")]

    def said(row: Row, seed: int) -> list[str]:
        return [f"{row.system} says {i} {seed}" for i in range(12)]

    score_and_record(profile, "supervised", {0: {Row("raw", "raw"): said(rows[0], 0)}}, test, split)
    score_and_record(profile, "zero_shot:disjoint", {0: {Row("raw"): said(rows[0], 0)}}, test, split)
    captions = {seed: {row: said(row, seed) for row in rows} for seed in (0, 1)}
    results = score_and_record(profile, "zero_shot", captions, test, split, num_beams=4)
    files = ["supervised.csv", "zero_shot-disjoint.csv", "zero_shot_beam4.csv"]
    assert sorted(path.name for path in folder.iterdir()) == files
    written = pd.read_csv(folder / "zero_shot_beam4.csv")
    assert list(written.clip_id) == test.clip_ids
    assert list(written.caption_1) == [texts[0] for texts in split.captions]
    columns = {candidates_column(row.system, row.space, seed): said(row, seed) for row in rows for seed in (0, 1)}
    assert written[list(columns)].to_dict("list") == columns
    assert set(results.clips) == {("raw", "text"), ("diffusion_link", "text"), ("c3", "centred")}
    full = MetricsFile(profile).frame()
    mine = full[(full.experiment == "zero_shot") & (full.metric == "sbert_sim") & (full.split == "test")]
    assert sorted(zip(mine.system, mine.space, mine.seed, strict=True)) == sorted(
        (row.system, row.space, seed) for row in rows for seed in ("0", "1", "all"))
    assert set(mine.decoding) == {"beam 4"} and mine.value.notna().all()
    assert set(full.status[full.metric == "cider_d"]) == {"not_computed"}

    score_and_record(profile, "zero_shot", {0: {Row("raw"): said(rows[0], 5)}}, test, split, num_beams=4)
    last = MetricsFile(profile).frame().query("experiment == 'zero_shot' and decoding == 'beam 4'")
    assert set(last.seed[last.system == "raw"]) == {"0", "all"}, "its own rows are replaced"
    assert set(last.system) == {"raw", "diffusion_link", "c3"}, "those of other systems stay"


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU rows follow each other")
def test_captions_made_side_by_side_are_those_of_one_process(profile, splits, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    rows = (Row("raw"), Row("ridge"), Row("raw", "raw"))
    alone = captioning.caption_seeds(replace(profile, processes=1), rows, (0, 1), *splits)
    assert counted["generations"] == 6
    other = replace(profile, processes=2, results_root=tmp_path / "other")
    assert captioning.caption_seeds(other, rows, (0, 1), *splits) == alone and counted["generations"] == 6
    assert set(alone) == {0, 1} and set(alone[1]) == set(rows)
