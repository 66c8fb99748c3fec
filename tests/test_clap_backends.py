"""The two LAION-CLAP doors, offline, on random weights: determinism, refusals, conversion, and that both agree."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dl.clap import (
    ROBERTA,
    TOKENIZER_VARIABLE,
    ClapEncoder,
    HubClapBackend,
    LaionClapBackend,
    build_laion_clap,
    convert_laion_checkpoint,
    digest,
    read_laion_checkpoint,
)
from dl.config import REPO
from dl.store import sha256_file

CAPTIONS = ["A dog barks", "Rain falls on a roof while a man speaks", "a bell", "Water runs from a tap", "Birds sing",
            "An engine idles, then a horn honks twice", "A crowd cheers", "Footsteps on gravel"]
TINY_TEXT = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32}
TINY_AUDIO = {"patch_embeds_hidden_size": 16, "hidden_size": 128, "depths": [1] * 4,
              "num_attention_heads": [1, 2, 4, 8]}


def waveforms(count: int = 8) -> list[np.ndarray]:
    """Noisy tones of 0.7 s to 10 s, each of another pitch."""
    rng, sounds = np.random.default_rng(0), []
    for number, length in enumerate(np.linspace(33_600, 480_000, count).astype(int)):
        wave = 0.3 * np.sin(2 * np.pi * 150 * 1.7**number * np.arange(length) / 48_000)
        sounds.append((wave + 0.05 * rng.standard_normal(length)).astype(np.float32))
    return sounds


def make_tokenizer(folder: Path, size: int) -> Path:
    """A byte-level BPE tokenizer like roberta-base's: special ids, 256 bytes, a few merges, filler up to ``size``."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizer

    merges = [("Ġ", "d"), ("o", "g"), ("Ġd", "og"), ("Ġ", "a"), ("e", "r")]
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    words += [f"filler{number}" for number in range(size - len(words) - 1)] + ["<mask>"]
    RobertaTokenizer(vocab={word: row for row, word in enumerate(words)}, merges=merges).save_pretrained(folder)
    return folder


def spread_out(model: torch.nn.Module, batch_norm: torch.nn.Module) -> None:
    """Random weights that give different sounds different vectors: the usual 0.02 would put all on one spot."""
    batch_norm.running_mean.fill_(-30)
    batch_norm.running_var.fill_(400)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "extractor" not in name and "embeddings" not in name:
            torch.nn.init.xavier_normal_(parameter)


def make_hub_folder(folder: Path, tokenizer: Path, text: dict, audio: dict, projection_dim: int,
                    state: dict | None = None) -> Path:
    """A ``ClapModel`` saved as the hub lays it out, random unless ``state`` is given."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, ClapProcessor, RobertaTokenizer

    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=projection_dim))
    if state is None:
        spread_out(model, model.audio_model.audio_encoder.batch_norm)
    else:
        wrong = model.load_state_dict(state, strict=False)
        assert not wrong.unexpected_keys
        assert not set(wrong.missing_keys) & {name for name, _ in model.named_parameters()}
    model.save_pretrained(folder)
    truncation = "fusion" if audio.get("enable_fusion") else "rand_trunc"
    extractor = ClapFeatureExtractor(frequency_min=50, truncation=truncation)
    ClapProcessor(extractor, RobertaTokenizer.from_pretrained(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    return make_hub_folder(folder / "clap", make_tokenizer(folder / "tokenizer", 300), TINY_TEXT, TINY_AUDIO, 24)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("roberta"), ROBERTA["vocab_size"])


@pytest.fixture(scope="module")
def laion_pt(tmp_path_factory) -> Iterator[Path]:
    """Random weights of laion-clap's HTSAT-tiny, stored as LAION does: a training state, "module.", position_ids."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = build_laion_clap("HTSAT-tiny", {"num_hidden_layers": 1}, None).model
    assert torch.equal(before, torch.get_rng_state()), "a run's random numbers do not depend on opening an encoder"
    spread_out(model, model.audio_branch.bn0)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    path = tmp_path_factory.mktemp("laion") / "630k-like.pt"
    torch.save({"epoch": np.float64(15), "name": "random", "state_dict": state}, path)
    yield path
    shutil.rmtree(path.parent)                                   # 0.5 GB


@pytest.fixture(scope="module")
def laion(laion_pt, roberta) -> LaionClapBackend:
    return LaionClapBackend.from_pretrained(laion_pt, "cpu", tokenizer=roberta)


@pytest.fixture(scope="module")
def hub(hub_folder) -> HubClapBackend:
    return HubClapBackend.from_pretrained(hub_folder, "cpu")


@pytest.fixture(params=["hub", "laion"])
def backend(request):
    return request.getfixturevalue(request.param)


# ----------------------------------------------------------------------------------------------------------- embedding
@pytest.mark.parametrize("tower", ["embed_audio", "embed_text"])
def test_rows_are_unit_norm_repeatable_and_independent_of_the_batch(backend, tower) -> None:
    inputs, embed = waveforms() if tower == "embed_audio" else CAPTIONS, getattr(backend, tower)
    together = embed(inputs)
    assert together.shape == (8, backend.embed_dim) and together.dtype == torch.float32 and not together.requires_grad
    assert torch.allclose(together.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.equal(together, embed(inputs))
    error = (together - torch.cat([embed([item]) for item in inputs])).norm(dim=1).max()
    apart = torch.cdist(together, together) + 9 * torch.eye(8)
    assert error < 1e-4 and apart.min() > 100 * error            # a batch changes rows by far less than they differ


def test_the_front_finds_the_right_door_and_crops(hub_folder, hub, laion_pt, laion, roberta, monkeypatch) -> None:
    monkeypatch.setenv(TOKENIZER_VARIABLE, str(roberta))
    for path, wanted, dim in ((hub_folder, hub, 24), (laion_pt, laion, 512)):
        encoder = ClapEncoder.from_pretrained(path, "cpu")
        assert isinstance(encoder.backend, type(wanted)) and encoder.weights_sha256 == wanted.weights_sha256
        assert encoder.embed_dim == dim
        long = np.concatenate([waveforms()[-1], np.full(480, 0.5, np.float32)])              # 10.01 s
        assert torch.equal(encoder.embed_audio([long], 48_000), wanted.embed_audio([long[:480_000]]))


def test_a_fused_model_embeds_without_chance(tmp_path) -> None:
    fused = {**TINY_AUDIO, "enable_fusion": True, "fusion_type": "aff_2d"}
    tokenizer = make_tokenizer(tmp_path / "tokenizer", 300)
    backend = HubClapBackend.from_pretrained(make_hub_folder(tmp_path / "fused", tokenizer, TINY_TEXT, fused, 24))
    sounds = waveforms(4)
    assert all(torch.equal(backend.embed_audio(sounds), backend.embed_audio(sounds)) for _ in range(3))


def test_half_precision_files_run_in_float32(hub, hub_folder, tmp_path) -> None:
    from transformers import ClapModel

    folder = shutil.copytree(hub_folder, tmp_path / "half")
    ClapModel.from_pretrained(hub_folder).half().save_pretrained(folder)
    assert load_file(folder / "model.safetensors")["text_projection.linear1.weight"].dtype == torch.float16
    rows = HubClapBackend.from_pretrained(folder).embed_audio(waveforms(2))
    assert rows.dtype == torch.float32 and torch.allclose(rows, hub.embed_audio(waveforms(2)), atol=5e-3)


NAMES = {"text_branch": "text_model", "audio_branch": "audio_model.audio_encoder",
         "attn.relative": "attention.self.relative", "attn.proj": "attention.output.dense",
         "attn.qkv": "attention.self.qkv", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
         "norm1": "layernorm_before", "norm2": "layernorm_after", "bn0": "batch_norm",
         "_projection.0": "_projection.linear1", "_projection.2": "_projection.linear2"}


def rename_for_transformers(state: dict) -> dict:
    """laion-clap's names to ClapModel's, after transformers' own script for LAION's checkpoints."""
    renamed = {}
    for name, value in state.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "qkv" in name:
            parts = (name.replace("qkv", part) for part in ("query", "key", "value"))
            renamed.update(zip(parts, value.chunk(3), strict=True))
        elif not any(part in name for part in ("extractor", "tscam", "head", "_transform", "attn_mask")):
            renamed[name] = value
    return renamed


def test_both_doors_agree_on_the_same_weights(laion, laion_pt, roberta, tmp_path) -> None:
    state = rename_for_transformers(read_laion_checkpoint(laion_pt))
    text = ROBERTA | {"num_hidden_layers": 1}
    folder = make_hub_folder(tmp_path / "hub", roberta, text, {"hidden_size": 768}, 512, state)
    hub = HubClapBackend.from_pretrained(folder)
    for tower, inputs, most in (("embed_text", CAPTIONS, 1e-5), ("embed_audio", waveforms(), 1e-3)):
        ours, theirs = getattr(laion, tower)(inputs), getattr(hub, tower)(inputs)
        assert (ours - theirs).norm(dim=1).max() < most
        assert (torch.cdist(ours, ours) + 9 * torch.eye(8)).min() > 30 * most           # different clips lie far apart
    shutil.rmtree(folder)                                        # 0.3 GB


# ------------------------------------------------------------------------------------------------------------ refusals
def test_a_five_token_vocabulary_is_refused(hub_folder, laion, laion_pt, tmp_path, monkeypatch) -> None:
    from transformers import RobertaTokenizer

    assert len(RobertaTokenizer()) == 5                           # what transformers falls back to
    folder = shutil.copytree(hub_folder, tmp_path / "clap")
    RobertaTokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has 5 tokens, the text tower 300: copy the whole folder"):
        HubClapBackend.from_pretrained(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(TOKENIZER_VARIABLE, str(folder))
    with pytest.raises(ValueError, match=rf"has 5 tokens, the text tower 50265: set {TOKENIZER_VARIABLE}"):
        LaionClapBackend.from_pretrained(laion_pt)


def test_a_pickle_is_not_loaded_without_consent(tmp_path, capsys) -> None:
    class Touch:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "code_ran",)

    path, out = tmp_path / "evil.pt", tmp_path / "out.pt"
    torch.save({"state_dict": {"module.weight": torch.ones(2)}, "epoch": Touch()}, path)
    sha256 = sha256_file(path)
    for consent in ({}, {"allow_pickle": True}, {"sha256": sha256}):
        with pytest.raises(ValueError, match=f"(?s)can run code.*{sha256}"):
            convert_laion_checkpoint(path, out, **consent)
    with pytest.raises(ValueError, match="not 0000"):
        convert_laion_checkpoint(path, out, allow_pickle=True, sha256="0000")
    assert not (tmp_path / "code_ran").exists() and not out.exists()
    assert sha256 in capsys.readouterr().out                      # printed, so that it can be compared and named
    convert_laion_checkpoint(path, out, allow_pickle=True, sha256=sha256)
    assert (tmp_path / "code_ran").is_dir() and set(read_laion_checkpoint(out)) == {"weight"}


def test_other_files_are_refused_in_one_line(laion_pt, roberta, tmp_path) -> None:
    state = read_laion_checkpoint(laion_pt)
    fused = {**state, "audio_branch.patch_embed.mel_conv2d.weight": torch.ones(1)}
    for content, message in (({"weight": torch.ones(2)}, "no LAION-CLAP"),
                             (fused, "do not fit HTSAT-tiny .* an unfused file")):
        torch.save(content, tmp_path / "some.pt")
        with pytest.raises(ValueError, match=message) as caught:
            LaionClapBackend.from_pretrained(tmp_path / "some.pt", tokenizer=roberta)
        assert "\n" not in str(caught.value)
    (tmp_path / "some.pt").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"some\.pt is not a torch checkpoint"):
        LaionClapBackend.from_pretrained(tmp_path / "some.pt")
    with pytest.raises(FileNotFoundError, match="absent.pt is missing"):
        LaionClapBackend.from_pretrained(tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["laion/no-such-clap", "/no/such/folder", "not a name!"])
def test_an_unknown_hub_name_says_what_to_do(name, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download") as caught:
        HubClapBackend.from_pretrained(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_hub_folder_must_be_a_whole_clap(hub_folder, tmp_path) -> None:
    lacking = shutil.copytree(hub_folder, tmp_path / "lacking")
    state = load_file(lacking / "model.safetensors")
    del state["audio_projection.linear2.weight"]
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights of a ClapModel are missing, audio_projection.linear2.weight"):
        HubClapBackend.from_pretrained(lacking)
    (lacking / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no whole ClapModel at"):
        HubClapBackend.from_pretrained(lacking)


# ---------------------------------------------------------------------------------------------------- keys and imports
def test_the_cache_key_follows_weights_and_tokenizer(hub, hub_folder, tmp_path) -> None:
    assert HubClapBackend.from_pretrained(hub_folder).weights_sha256 == hub.weights_sha256
    hub.embed_text(CAPTIONS)                                      # its padding leaves no trace
    assert HubClapBackend(hub.model, hub.processor, "cpu").weights_sha256 == hub.weights_sha256
    other = shutil.copytree(hub_folder, tmp_path / "other")
    rules = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert "filler7" in rules
    (other / "tokenizer.json").write_text(rules.replace("filler7", "spoiler7"), encoding="utf-8")
    assert HubClapBackend.from_pretrained(other).weights_sha256 != hub.weights_sha256
    state = {"a": torch.zeros(2), "b": torch.tensor(1)}
    assert digest(state) != digest({**state, "b": torch.tensor(2)})


SCOPED = """
import sys, dl.clap
assert not {"transformers", "laion_clap"} & set(sys.modules), "imported with dl"
path, sys.argv = list(sys.path), ["program", "--unknown", "flag"]
import torch; state = torch.get_rng_state()
dl.clap.import_laion_clap()
from transformers import AutoTokenizer, RobertaModel, RobertaTokenizer
from transformers.utils import is_torchvision_available
from importlib.util import find_spec
assert sys.path == path and torch.equal(torch.get_rng_state(), state)
assert is_torchvision_available() == (find_spec("torchvision") is not None)
assert "from_pretrained" not in vars(RobertaTokenizer)
print("scoped")
"""


def test_imports_stay_scoped() -> None:
    """Nothing heavy comes with dl; laion_clap changes neither torchvision, the hub's classes, sys.path nor chance."""
    done = subprocess.run([sys.executable, "-c", SCOPED], check=False, cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "scoped", done.stderr[-2000:]
