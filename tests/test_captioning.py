"""What Table 2 runs: vectors beside the right captions, fits and captions made once, rows and files replaced and not piled up."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dl import experiments as captioning
from dl.caption_metrics import candidates_column
from dl.captioner import LLMCaptioner
from dl.clap import Embeddings
from dl.config import BridgeConfig, CaptionerConfig, Profile, get_profile
from dl.data import Split
from dl.experiments import (
    Row,
    caption_pairs,
    caption_rows,
    decoder_fit,
    decoder_pairs,
    disjoint_halves,
    fit_captioner,
    fit_system,
    score_and_record,
    system_vectors,
)
from dl.peers import REGISTRY, centre
from dl.store import MetricsFile

DIM = 8


def tiny_language_model(folder: Path) -> Path:
    """A random Llama of two layers with a tokenizer of single bytes; the bytes of a caption are its tokens."""
    alphabet = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=alphabet[0], eos_token=alphabet[1], pad_token=alphabet[1]).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                 initializer_range=0.5, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def profile(tmp_path, language_model) -> Profile:
    captioner = CaptionerConfig(language_model=str(language_model), train_steps=3, batch_size=4, warmup_steps=1, validate_every=3, projector_width=16,
                                learning_rate=0.05, max_new_tokens=5, dtype="float32")
    return get_profile("smoke", results_root=tmp_path / "results", bridge=BridgeConfig(train_steps=2, batch_size=8), captioner=captioner)


def embeddings(split: str, n: int = 12) -> Embeddings:
    """n clips; clip i has 1 + i % 3 captions, and the vectors of its captions lie about its own."""
    generator = torch.Generator().manual_seed(len(split))
    clean = torch.randn(n, DIM, generator=generator)
    text_clip = torch.cat([torch.full((1 + i % 3,), i) for i in range(n)])
    text = normalize(clean[text_clip] + 0.3 * torch.randn(len(text_clip), DIM, generator=generator) + 0.5, dim=1)
    audio = normalize(clean + 0.3 * torch.randn(n, DIM, generator=generator) - 0.5, dim=1)
    captions = [f"{split} sound {clip} in the words of {k}" for k, clip in enumerate(text_clip.tolist())]
    return Embeddings(split, [f"{split}-{i}_0" for i in range(n)], audio, text, text_clip, captions, [])


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


# ------------------------------------------------------------------------------------------------------------------ pairs
def test_a_row_of_text_belongs_to_its_caption():
    train = embeddings("train")
    vectors, captions = caption_pairs(train, data(train))
    assert len(vectors) == len(captions) == 24
    for row, caption in enumerate(captions):
        assert f"sound {int(train.text_clip[row])} in the words of {row}" in caption
        assert torch.equal(vectors[row], train.text[row])


def test_captions_of_another_data_set_are_refused():
    train = embeddings("train")
    split = data(train)
    split.captions[3][0] = "somebody edited this"
    with pytest.raises(ValueError, match=r"train\.csv: run notebook 02 again"):
        caption_pairs(train, split)


def test_clips_that_were_skipped_do_not_count():
    train = embeddings("train")
    kept = captioning.select_clips(train, [0, 2, 5, 11])
    vectors, captions = caption_pairs(kept, data(train))
    assert [int(caption.split()[2]) for caption in captions] == [0, 2, 2, 2, 5, 5, 5, 11, 11, 11]
    assert kept.text_clip.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(vectors, train.text[[train.captions.index(caption) for caption in captions]])


@pytest.mark.parametrize("decoder", ["raw", "ridge", "diffusion_link"])
def test_a_sound_is_paired_with_each_of_its_captions(profile, decoder):
    train = embeddings("train")
    vectors, captions = decoder_pairs(profile, decoder, train, seed=1)
    mapped = fit_system(profile, decoder, train, 1 if REGISTRY[decoder].trained else 0)(train.audio, noise_seed=0)
    for row, caption in enumerate(captions):
        assert torch.equal(vectors[row], mapped[int(caption.split()[2])])


def test_decoders_on_text_alone(profile):
    train = embeddings("train")
    noised, captions = decoder_pairs(profile, "text_noised", train, 0)
    assert captions == train.captions and torch.equal(noised, decoder_pairs(profile, "text_noised", train, 0)[0])
    assert not torch.equal(noised, decoder_pairs(profile, "text_noised", train, 1)[0])
    expected = 1 / (1 + DIM * 0.016) ** 0.5                           # cosine of t and t + N(0, v I), about
    assert float((noised * train.text).sum(1).mean()) == pytest.approx(expected, abs=0.03)
    c3 = fit_system(profile, "c3", train)
    centred, _ = decoder_pairs(profile, "text_centred", train, 0)
    assert float((centred * centre(train.text, c3.text_mean)).sum(1).mean()) == pytest.approx(expected, abs=0.03)
    bridged, _ = decoder_pairs(profile, "text_bridged", train, 1)
    assert torch.equal(bridged, fit_system(profile, "diffusion_bridge", train, 1).map_text(train.text))
    for vectors in (noised, centred, bridged):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)
    with pytest.raises(ValueError, match="unknown decoder 'sound'"):
        decoder_pairs(profile, "sound", train, 0)


def test_the_ceiling_is_the_first_references_vector(profile):
    train, test = embeddings("train"), embeddings("test")
    assert torch.equal(system_vectors(profile, Row("text_ceiling"), train, test, 0), test.text[[0, 1, 3, 6, 7, 9, 12, 13, 15, 18, 19, 21]])


def test_disjoint_halves_share_no_recording():
    train = embeddings("train", 40)
    split = data(train, [f"rec_{i % 10};rec_{i * 7 % 10}" for i in range(40)])
    first, second = disjoint_halves(train, split)
    used = [{name for clip_id in part.clip_ids for name in split.clusters[split.clip_ids.index(clip_id)]} for part in (first, second)]
    assert used[0] and used[1] and not used[0] & used[1]
    left = [set(split.clusters[train.clip_ids.index(clip_id)]) for clip_id in train.clip_ids if clip_id not in [*first.clip_ids, *second.clip_ids]]
    assert left and not any(members <= half for members in left for half in used)
    assert all(caption.split()[2] == part.clip_ids[clip].split("-")[1].split("_")[0]
               for part in (first, second) for caption, clip in zip(part.captions, part.text_clip.tolist(), strict=True))


def test_rows_of_a_full_run_are_closed_forms_tuned_systems_and_own_decoders(profile, monkeypatch):
    assert [row.system for row in captioning.zero_shot_rows(profile)] == ["raw", "ridge", "diffusion_bridge", "diffusion_link", "text_ceiling"]
    monkeypatch.setattr(captioning, "chosen", lambda _, system: {"alpha": 1} if system in ("diffusion_link", "seed") else {})
    rows = captioning.zero_shot_rows(profile, full=True)
    common = [row.system for row in rows if row.decoder == "text"]
    assert {"raw", "mean_shift", "c3", "projection", "procrustes", "ridge", "diffusion_link", "seed", "text_ceiling"} <= set(common)
    assert not {"capdec", "text_to_audio", "regression_mlp", "conditional_diffusion"} & set(common)
    assert {row.decoder for row in rows} == set(captioning.TEXT_DECODERS) and len(set(rows)) == len(rows)
    assert {row.decoder for row in captioning.zero_shot_rows(profile, full=True, own_decoders=False)} == {"text"}
    assert [row.decoder for row in captioning.supervised_rows(full=True)] == ["raw", "diffusion_link", "ridge"]


# ---------------------------------------------------------------------------------------------------------- made only once
def test_a_finished_fit_is_read_and_not_repeated(profile, counted):
    train, val = embeddings("train"), embeddings("val")
    first = fit_captioner(profile, "text", 0, train, val)
    assert counted["steps"] == 3 and len(list((profile.cache_dir / "captioners").glob("text-0-*.safetensors"))) == 1
    assert fit_captioner(profile, "text", 0, train, val) is first, "a second 7B model would not fit beside one that is in use"
    captioning.IN_USE.clear()
    again = fit_captioner(profile, "text", 0, train, val)
    assert counted == {"loads": 2, "steps": 3, "generations": 0}
    for name, value in first.trainable_state().items():
        assert torch.equal(value, again.trainable_state()[name])
    assert again.history.step.tolist() == first.history.step.tolist() and again.history.val_loss.notna().any()


def test_a_killed_fit_goes_on_where_it_was(profile, counted, monkeypatch):
    train, val = embeddings("train"), embeddings("val")
    original, whole = captioning.train_captioner, fit_captioner(profile, "text", 0, train, val)
    for path in (profile.cache_dir / "captioners").glob("*"):
        path.unlink()
    captioning.IN_USE.clear()                                              # as in a new process
    counted["steps"] = 0

    def killed(step, loss):
        if step == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(captioning, "train_captioner", lambda *args, **kwargs: original(*args, **kwargs, checkpoint_every=1, callback=killed))
    with pytest.raises(KeyboardInterrupt):
        fit_captioner(profile, "text", 0, train, val)
    monkeypatch.setattr(captioning, "train_captioner", original)
    resumed = fit_captioner(profile, "text", 0, train, val)
    assert counted["steps"] == 3
    for name, value in whole.trainable_state().items():
        assert torch.equal(value, resumed.trainable_state()[name])


def test_the_name_of_a_fit_says_what_determines_it(profile):
    train, val = embeddings("train"), embeddings("val")
    config = profile.captioner
    same = [decoder_fit(replace(profile, captioner=replace(config, num_beams=4, max_new_tokens=9)), "text", 0, train, val)]
    fit = decoder_fit(profile, "text", 0, train, val)
    others = [decoder_fit(profile, "text", 1, train, val), decoder_fit(profile, "raw", 0, train, val),
              decoder_fit(profile, "text", 0, embeddings("train", 11), val),
              decoder_fit(replace(profile, captioner=replace(config, prefix_length=2)), "text", 0, train, val)]
    assert {other.key.digest for other in same} == {fit.key.digest}
    assert len({other.path for other in [fit, *others]}) == 5
    part, captions = decoder_fit(profile, "raw", 0, train, val).val_pairs
    assert torch.allclose(part, val.audio) and [int(caption.split()[2]) for caption in captions] == list(range(12))


def test_captions_that_are_there_are_not_generated_again(profile, counted):
    train, val, test = embeddings("train"), embeddings("val"), embeddings("test")
    rows = [Row("raw"), Row("ridge"), Row("ridge", "ridge"), Row("text_ceiling")]
    first = caption_rows(profile, rows, 0, train, val, test)
    assert list(first) == rows and {len(texts) for texts in first.values()} == {12}
    assert counted == {"loads": 2, "steps": 6, "generations": 4}
    assert caption_rows(profile, rows, 0, train, val, test) == first
    assert counted == {"loads": 2, "steps": 6, "generations": 4}
    lost = next((profile.cache_dir / "captions").glob("text-ridge-*.json"))
    lost.unlink()
    assert caption_rows(profile, rows, 0, train, val, test) == first
    assert counted == {"loads": 3, "steps": 6, "generations": 5}
    assert len(set(first[Row("raw")])) > 1, "the captions do not depend on the vectors"


def test_another_seed_decoding_or_vector_is_another_entry(profile, counted):
    train, val, test = embeddings("train"), embeddings("val"), embeddings("test")
    rows = [Row("raw")]
    caption_rows(profile, rows, 0, train, val, test)
    caption_rows(profile, rows, 0, train, val, test, num_beams=2)
    caption_rows(profile, rows, 1, train, val, test)
    caption_rows(profile, rows, 0, train, val, replace(test, audio=test.audio.flip(0)))
    assert counted["generations"] == 4
    assert sorted(path.name.split("-")[4] for path in (profile.cache_dir / "captions").iterdir()) == ["beam2", "greedy", "greedy", "greedy"]


def test_the_strict_rows_leave_the_fits_on_all_of_train_alone(profile, counted):
    train, val, test = embeddings("train", 40), embeddings("val"), embeddings("test")
    fit_system(profile, "diffusion_link", train)
    before = {path: path.read_bytes() for path in (profile.cache_dir / "fits").iterdir()}
    split = data(train, [f"rec_{i // 2}" for i in range(40)])
    found = captioning.disjoint_rows(profile, 0, train, split, val, test)
    assert [row.system for row in found] == ["raw", "ridge", "diffusion_link"] and counted["loads"] == 1
    assert before.items() <= {path: path.read_bytes() for path in (profile.cache_dir / "fits").iterdir()}.items()
    stored = json.loads(next((profile.cache_dir / "captions").glob("text-diffusion_link-*.json")).read_text())
    assert stored == found[Row("diffusion_link")]


# -------------------------------------------------------------------------------------------------------- scores and files
@pytest.fixture
def no_java(monkeypatch):
    """A machine without Java: sbert_sim alone is computed, the rest is n/c; quick, and the rows are the same."""
    from dl import caption_metrics as captions
    from dl import caption_metrics as java

    def absent():
        raise java.JavaError("no Java")
    monkeypatch.setattr(captions, "find_java", absent)


def test_a_setting_replaces_its_rows_and_files_and_no_others(profile, no_java):
    test = embeddings("test")
    split = data(test)
    rows = [Row("raw"), Row("diffusion_link"), Row("c3", "text_centred", "centred")]
    texts = {row: [f"{row.system} says {i}" for i in range(12)] for row in rows}
    folder = profile.results_dir / "captions"
    score_and_record(profile, "supervised", {0: {Row("raw", "raw"): texts[rows[0]]}}, test, split)
    score_and_record(profile, "zero_shot:disjoint", {0: {Row("raw"): texts[rows[0]]}}, test, split)
    results = score_and_record(profile, "zero_shot", {seed: {row: [f"{t} {seed}" for t in texts[row]] for row in rows} for seed in (0, 1)}, test, split)
    assert sorted(path.name for path in folder.iterdir()) == [
        "supervised.csv", "zero_shot-disjoint.csv", "zero_shot.csv"]
    written = pd.read_csv(folder / "zero_shot.csv")
    assert list(written.clip_id) == test.clip_ids and list(written.caption_1) == [texts[0] for texts in split.captions]
    said = {candidates_column(row.system, row.space, seed): [f"{row.system} says {i} {seed}" for i in range(12)] for row in rows for seed in (0, 1)}
    assert written[list(said)].to_dict("list") == said
    assert set(results.clips) == {("raw", "text"), ("diffusion_link", "text"), ("c3", "centred")}
    frame = MetricsFile(profile).frame()
    mine = frame[(frame.experiment == "zero_shot") & (frame.metric == "sbert_sim") & (frame.split == "test")]
    assert sorted(zip(mine.system, mine.space, mine.seed, strict=True)) == sorted(
        (row.system, row.space, seed) for row in rows for seed in ("0", "1", "all"))
    assert set(mine.decoding) == {"greedy"} and mine.value.notna().all()
    assert set(frame.status[frame.metric == "cider_d"]) == {"not_computed"}

    (folder / "zero_shot_ridge.csv").write_text("a file of the older layout")
    score_and_record(profile, "zero_shot", {0: {Row("raw"): texts[rows[0]]}}, test, split, num_beams=4)
    assert sorted(path.name for path in folder.iterdir()) == ["supervised.csv", "zero_shot-disjoint.csv", "zero_shot_beam4.csv"]
    frame = MetricsFile(profile).frame()
    assert set(frame.decoding[frame.experiment == "zero_shot"]) == {"beam 4"} and set(frame.system[frame.experiment == "zero_shot"]) == {"raw"}
    assert not (frame.experiment == "zero_shot:paired").any()
    assert {"supervised", "zero_shot:disjoint"} <= set(frame.experiment)


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU rows follow each other")
def test_captions_made_side_by_side_are_those_of_one_process(profile, tmp_path, counted, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    rows, splits = (Row("raw"), Row("ridge"), Row("raw", "raw")), [embeddings(name) for name in ("train", "val", "test")]
    alone = captioning.caption_seeds(profile, rows, (0, 1), *splits)
    assert counted["generations"] == 6
    together = captioning.caption_seeds(replace(profile, processes=2, results_root=tmp_path / "other"), rows, (0, 1), *splits)
    assert counted["generations"] == 6 and together == alone and set(alone) == {0, 1} and set(alone[1]) == set(rows)
