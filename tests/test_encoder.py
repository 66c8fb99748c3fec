"""The encoder: unit norm, one vector for one input, a cache that resumes, clips that are skipped by name."""
from __future__ import annotations

import threading
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dl import clap
from dl.clap import CROP_SAMPLES, ClapEncoder, crop, embed_split, load_embeddings
from dl.config import get_profile
from dl.data import AudioError, load_split
from dl.gap import retrieval
from dl.mini_clap import AudioTrunk, MiniClap, info_nce, prepare

CAPTIONS = ["A dog barks", "First a door creaks, then someone takes a step on gravel, and afterwards glass breaks",
            "Rain", "A bell", "A dog barks"]


@pytest.fixture(scope="module")
def encoder() -> ClapEncoder:
    return ClapEncoder.from_pretrained("mini", device="cpu")


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    split = load_split(get_profile("smoke"), "train")
    return [split.waveform(place) for place in range(8)]


@pytest.fixture
def profile(results_root):
    """Ten clips a split."""
    return get_profile("smoke", max_clips={"train": 10, "val": 10, "test": 10})


# ------------------------------------------------------------------------------------------------------------- vectors
def test_rows_have_unit_norm_and_the_same_input_gives_the_same_bits(encoder, sounds):
    audio, text = encoder.embed_audio(sounds, 48_000), encoder.embed_text(CAPTIONS)
    assert encoder.embed_dim == 256 and audio.shape == (8, 256) and text.shape == (5, 256)
    for rows in (audio, text):
        assert rows.dtype == torch.float32 and rows.device.type == "cpu" and not rows.requires_grad
        assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)), atol=1e-5)
    assert encoder.embed_audio([]).shape == (0, 256) and encoder.embed_text([]).shape == (0, 256)
    assert torch.equal(encoder.embed_audio(sounds), audio) and torch.equal(encoder.embed_text(CAPTIONS), text)
    again = ClapEncoder.from_pretrained("mini", device="cpu")
    assert torch.equal(encoder.embed_audio(sounds[:2]), again.embed_audio(sounds[:2]))
    assert torch.equal(text[0], text[4]) and not torch.equal(text[0], text[1])


def test_a_batch_changes_no_row(encoder, sounds):
    together = encoder.embed_audio(sounds, batch_size=8)
    assert torch.allclose(together, encoder.embed_audio(sounds, batch_size=1), atol=1e-5)
    turned = encoder.embed_audio(sounds[::-1], batch_size=3)
    assert torch.allclose(together.flip(0), turned, atol=1e-5), "rows keep their order"
    alone = torch.cat([encoder.embed_text([text]) for text in CAPTIONS])
    assert torch.allclose(encoder.embed_text(CAPTIONS), alone, atol=1e-5)


def test_batches_side_by_side_give_the_rows_of_one_after_another(encoder, sounds, monkeypatch):
    """Several batches run at a time, each on its share of the cores; a batch that fails fails the call."""
    monkeypatch.setattr(encoder.backend, "concurrent", False)
    expected = encoder.embed_audio(sounds, batch_size=3), encoder.embed_text(CAPTIONS, batch_size=2)
    cores, threads, embed = torch.get_num_threads(), {}, encoder.backend.embed_audio

    def watched(batch):
        threads[threading.get_ident()] = torch.get_num_threads()
        return embed(batch)

    monkeypatch.setattr(encoder.backend, "concurrent", True)
    monkeypatch.setattr(encoder.backend, "embed_audio", watched)
    torch.set_num_threads(2)
    try:
        found = encoder.embed_audio(sounds, batch_size=3), encoder.embed_text(CAPTIONS, batch_size=2)
        monkeypatch.setattr(encoder.backend, "embed_audio", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encoder.embed_audio(sounds, batch_size=3)
        assert torch.get_num_threads() == 2, "as it was before"
    finally:
        torch.set_num_threads(cores)
    for one_by_one, together in zip(expected, found, strict=True):
        assert torch.allclose(one_by_one, together, atol=1e-5)
    assert threading.get_ident() not in threads and set(threads.values()) == {1}


def test_captions_of_as_many_tokens_share_a_batch(encoder, monkeypatch):
    batches, embed = [], encoder.backend.embed_text
    monkeypatch.setattr(encoder.backend, "embed_text", lambda batch: (batches.append(batch), embed(batch))[1])
    monkeypatch.setattr(encoder.backend, "concurrent", False)
    captions = ["Thunderstorm", "Xylophone chimes", "A cat", "It is on", "An owl"]          # one token may be long
    encoder.embed_text(captions, batch_size=2)
    counts = [*chain(*map(encoder.backend.token_counts, batches))]
    assert counts == sorted(counts) and sorted(chain(*batches)) == sorted(captions)
    assert [*chain(*batches)] != sorted(captions, key=lambda text: (len(text), text)), "letters give another order"


def test_a_clip_of_10_01_s_is_cut_to_its_first_10_s(encoder):
    long = np.random.default_rng(0).normal(0, 0.05, CROP_SAMPLES + 480).astype(np.float32)
    long[CROP_SAMPLES:] = 0.9
    vector = encoder.embed_audio([long])
    assert torch.equal(vector, encoder.embed_audio([long[:CROP_SAMPLES]]))
    assert not torch.allclose(vector, encoder.embed_audio([long[480:]]), atol=1e-6), "the first 10 s, not the last"
    assert crop(long[:99]).shape == (99,)


def test_another_sampling_rate_is_resampled(encoder):
    slow, fast = ((0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)).astype(np.float32)
                  for rate in (16_000, 48_000))
    reference = encoder.embed_audio([fast], 48_000)[0]
    right, wrong = ((encoder.embed_audio([slow], rate)[0] @ reference).item() for rate in (16_000, 48_000))
    assert right > 0.95 and wrong < right - 0.05, "16 kHz samples taken as 48 kHz are another tone"


@pytest.mark.parametrize(("waveform", "reason"), [
    (np.zeros(0), "too short"), (np.zeros(48_000), "silent"), (np.full(48_000, np.nan), "NaN"),
    (np.ones((2, 48_000)), "mono"),
])
def test_embed_audio_names_the_waveform_it_cannot_use(encoder, sounds, waveform, reason):
    with pytest.raises(AudioError, match=f"waveform 1: .*{reason}"):
        encoder.embed_audio([sounds[0], waveform], 48_000)


def test_missing_weights_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setitem(clap.ENCODERS, "mini", (clap.ENCODERS["mini"][0], tmp_path))
    with pytest.raises(FileNotFoundError, match=r"restore it with git, or train it: \./run_all\.sh --only A2"):
        ClapEncoder.from_pretrained("mini")


# --------------------------------------------------------------------------------------------------------------- cache
def test_embed_split_keeps_clips_and_captions_in_step(encoder, profile):
    split = load_split(profile, "train")
    e = embed_split(profile, split, encoder, progress=False)
    assert e.clip_ids == split.clip_ids and e.skipped == []
    assert e.captions == [text for texts in split.captions for text in texts]
    clips = [place for place, texts in enumerate(split.captions) for _ in texts]
    assert e.text_clip.tolist() == clips and e.text_clip.dtype == torch.int64
    assert torch.equal(e.first_text, e.text[[clips.index(place) for place in range(len(split))]])
    for place in (0, 4, 9):
        assert torch.allclose(e.audio[place], encoder.embed_audio([split.waveform(place)])[0], atol=1e-5)
    assert torch.allclose(e.text[:3], encoder.embed_text(e.captions[:3]), atol=1e-5)
    with safe_open(profile.cache_dir / "embeddings/train.safetensors", "pt") as file:
        assert list(file.metadata()) == ["about"], "stages hash this file: several entries have no fixed order"


def test_embed_split_resumes_after_a_kill(encoder, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(clap, "SHARD_SIZE", 4)                                       # three shards of 4, 4 and 2 clips
    split = load_split(profile, "train")
    undisturbed = embed_split(replace(profile, results_root=tmp_path / "undisturbed"), split, encoder, progress=False)
    embed_shard, calls = clap._embed_shard, []

    def dies_at_the_third(shard, split, places, encoder, name):
        calls.append(places.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        embed_shard(shard, split, places, encoder, name)

    monkeypatch.setattr(clap, "_embed_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed_split(profile, split, encoder, progress=False)
    with pytest.raises(FileNotFoundError, match=r"split 'train' are missing: run notebook 02, or \./run_all\.sh"):
        load_embeddings(profile, "train")
    final = embed_split(profile, split, encoder, progress=False)
    assert calls == [0, 4, 8, 8], "the two finished shards were not embedded again"
    assert torch.equal(final.audio, undisturbed.audio) and torch.equal(final.text, undisturbed.text)
    assert [path.name for path in (profile.cache_dir / "embeddings").iterdir()] == ["train.safetensors"]


def test_a_shard_that_is_damaged_before_the_merge_is_named_and_no_clip_is_lost(encoder, profile, monkeypatch):
    monkeypatch.setattr(clap, "SHARD_SIZE", 4)
    split, write, written = load_split(profile, "train"), clap.save_checkpoint, []

    def damaging(path, *parts):
        write(path, *parts)
        written.append(path)
        if len(written) == 3:                                                        # the last of the three shards
            written[0].write_bytes(b"no tensors")

    monkeypatch.setattr(clap, "save_checkpoint", damaging)
    with pytest.raises(OSError, match=r"00000000\.safetensors cannot be read any more: run the same command again"):
        embed_split(profile, split, encoder, progress=False)
    monkeypatch.setattr(clap, "save_checkpoint", write)
    assert embed_split(profile, split, encoder, progress=False).clip_ids == split.clip_ids


def test_embed_split_reads_what_is_there_and_notices_a_change(encoder, profile, monkeypatch):
    split = load_split(profile, "val")
    first = embed_split(profile, split, encoder, progress=False)
    touched, embed_shard = [], clap._embed_shard
    monkeypatch.setattr(clap, "_embed_shard", lambda *parts: (touched.append(1), embed_shard(*parts)))
    assert torch.equal(embed_split(profile, split, encoder, progress=False).audio, first.audio) and touched == []
    other = replace(split, captions=[["A dog barks"], *split.captions[1:]])
    changed = embed_split(profile, other, encoder, progress=False)
    assert touched == [1] and changed.captions == ["A dog barks", *first.captions[5:]]
    other = replace(split, clip_ids=[f"x{clip_id}" for clip_id in split.clip_ids])
    assert embed_split(profile, other, encoder, progress=False).clip_ids == other.clip_ids


def test_a_clip_that_cannot_be_used_is_named_and_skipped(encoder, profile):
    split = load_split(profile, "test")

    def waveform(place: int) -> np.ndarray:
        if place == 2:
            raise AudioError("clip_2.wav: not readable as audio")
        return np.zeros(48_000, np.float32) if place == 5 else split.waveform(place)

    e = embed_split(profile, replace(split, waveform=waveform), encoder, progress=False)
    kept = [place for place in range(10) if place not in (2, 5)]
    assert e.clip_ids == [split.clip_ids[place] for place in kept] and e.audio.shape == (8, 256)
    assert e.skipped[0].startswith("clip_2.wav: not readable") and len(e.skipped) == 2
    assert e.skipped[1].startswith(f"{split.clip_ids[5]}: silent")
    assert e.captions == [text for place in kept for text in split.captions[place]]
    assert torch.equal(torch.bincount(e.text_clip), torch.full((8,), 5))
    for row, place in enumerate(kept):
        assert torch.allclose(e.audio[row], encoder.embed_audio([split.waveform(place)])[0], atol=1e-5)
    silent = replace(load_split(profile, "val"), waveform=lambda place: np.zeros(48_000, np.float32))
    with pytest.raises(AudioError, match=r"none of the 10 clips of split 'val' could be used: mini-val-00000"):
        embed_split(profile, silent, encoder, progress=False)


# ------------------------------------------------------------------------------------------------- what it has learned
def test_folded_batch_norms_change_no_frame():
    """Statistics far from those of a new layer, and even and odd sizes, which TensorFlow pads differently."""
    torch.manual_seed(0)
    trunk = AudioTrunk().eval()
    for layer in trunk.layers:
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
    clips = [torch.randn(2, frames, 64) for frames in (96, 131)]
    with torch.no_grad():
        before = [trunk(clip) for clip in clips]
        trunk.fold_batch_norms()
        after = [trunk(clip) for clip in clips]
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in trunk.layers)
    assert [frames.shape for frames in after] == [(2, 3, 1024), (2, 5, 1024)]
    for rows, expected in zip(after, before, strict=True):
        assert expected.std() > 0.01
        assert torch.allclose(rows, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_shipped_encoder_is_the_trained_network_small_and_in_half_precision(encoder, sounds):
    path = clap.MINI_FOLDER / "model.safetensors"
    assert path.stat().st_size < 15e6
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    with torch.no_grad():
        waveform = torch.from_numpy(prepare(sounds[0], 48_000))[None]
        expected = MiniClap.from_pretrained(clap.MINI_FOLDER).eval().embed_audio(waveform)
    close = 1e-5 if encoder.dtype == torch.float32 else 2e-2
    assert torch.allclose(encoder.embed_audio(sounds[:1], 48_000), expected, atol=close)


def test_info_nce_against_a_worked_example():
    audio, text = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    rows = np.array([[0.6, 0.0], [0.8, 1.0]]) * 2
    expected = np.mean([np.log(np.exp(rows).sum(axis)) - rows.diagonal() for axis in (0, 1)])
    assert info_nce(audio, text, torch.tensor(np.log(2.0))).item() == pytest.approx(expected, rel=1e-5)
    most = info_nce(audio, text, torch.tensor(np.log(100.0))).item()
    assert info_nce(audio, text, torch.tensor(50.0)).item() == pytest.approx(most), "capped at 100"


def test_sounds_find_their_captions(encoder, results_root):
    profile = get_profile("smoke")
    test = embed_split(profile, load_split(profile, "test"), encoder, progress=False)
    found = retrieval(test.audio, test.text, test.text_clip)["recall_at_10"][0]
    assert found > 0.6, "guessing among 200 captions finds 0.23"
    own, other = ((test.audio * test.first_text.roll(turn, dims=0)).sum(1).mean() for turn in (0, 1))
    assert own > other + 0.1
