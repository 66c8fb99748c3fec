"""The captioner's training loop: what it learns, exact resume, early stopping, several processes."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_captioner import CAPTIONS, D, loss_by_hand, one_line, tiny_config, tiny_language_model

from dl import captioner as language_model
from dl.captioner import LLMCaptioner
from dl.captioner_train import BucketSampler, caption_loss, learning_rate, train_captioner
from dl.config import REPO, CaptionerConfig, number_format, resolve_dtype

FOUR = ["A dog", "Rain", "A bell", "Birds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pairs() -> tuple[torch.Tensor, list[str]]:
    """22 vectors and captions of many lengths."""
    words = ("now", "and again", "far away", "twice", "in a room")
    captions = [f"{caption} {word}" for caption in CAPTIONS[:4] for word in words] + FOUR[:2]
    return F.normalize(torch.randn(22, D, generator=torch.Generator().manual_seed(0)), dim=-1), captions


def train(folder: Path, pairs, checkpoint: Path | None = None, seed: int = 0, interrupt: int = 0,
          config: dict | None = None, **options):
    """A new captioner, its history (or None) and steps; ``interrupt`` stops after that many, as Ctrl-C would."""
    steps = []

    def callback(step: int, loss: float) -> None:
        steps.append(step)
        if step == interrupt:
            raise KeyboardInterrupt

    values = {"train_steps": 12, "learning_rate": 3e-3, **(config or {})}
    captioner = LLMCaptioner(D, tiny_config(folder, **values), seed=seed)
    try:
        history = train_captioner(captioner, *pairs, seed=seed, checkpoint_path=checkpoint, callback=callback,
                                  **options)
    except KeyboardInterrupt:
        history = None
    return captioner, history, steps


def weights(captioner: LLMCaptioner) -> torch.Tensor:
    """Everything that learns in one vector."""
    return torch.cat([value.flatten() for value in captioner.trainable_state().values()])


# ------------------------------------------------------------------------------------------------------------ learning
def test_four_captions_are_learnt_and_said_again(folder):
    embeddings = torch.eye(D)[:4]
    values = {"train_steps": 250, "learning_rate": 1e-2, "lora_dropout": 0.0}
    captioner, history, _ = train(folder, (embeddings, FOUR), config=values)
    assert captioner.generate(embeddings) == FOUR
    assert captioner.generate(embeddings.flip(0), num_beams=2) == FOUR[::-1]
    assert history.loss.iloc[-1] < 0.6 and history.loss.iloc[0] > 3
    assert history.step.iloc[-1] == 250 and len(history) == 50 and not captioner.training


def test_accumulated_batches_equal_one_large_batch(folder, pairs):
    eight = (pairs[0][:8], pairs[1][:8])
    values = {"lora_dropout": 0.0, "train_steps": 3}
    large, large_history, _ = train(folder, eight, config={**values, "batch_size": 8})
    halves = {**values, "batch_size": 4, "gradient_accumulation_steps": 2}
    small, small_history, _ = train(folder, eight, config=halves)
    pd.testing.assert_frame_equal(large_history, small_history, rtol=1e-5)
    torch.testing.assert_close(weights(large), weights(small), rtol=1e-3, atol=1e-4)


def test_validation_loss_is_the_mean_over_all_tokens(folder, pairs):
    captioner, history, _ = train(folder, pairs, val=(pairs[0][:7], pairs[1][:7]), config={"validate_every": 5})
    assert history.step[history.val_loss.notna()].tolist() == [5, 10, 12] and history.val_score.isna().all()
    by_hand = [loss_by_hand(captioner, *pair) for pair in zip(pairs[0][:7], pairs[1][:7], strict=True)]
    mean = sum(loss for loss, _ in by_hand) / sum(count for _, count in by_hand)
    assert history.val_loss.iloc[-1] == pytest.approx(mean, rel=1e-5)
    assert caption_loss(captioner, pairs[0][:7], pairs[1][:7], batch_size=2) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("patience", [0, 2])
def test_early_stopping_keeps_the_best_weights(folder, pairs, patience):
    scores, seen = iter([1.0, 3.0, 2.0, 3.0, 9.0, 9.0]), []

    def validate(captioner: LLMCaptioner) -> float:
        assert not captioner.training
        torch.rand(3)  # draws that must not reach the training
        seen.append(weights(captioner).clone())
        return next(scores)

    values = {"validate_every": 2, "patience": patience}
    captioner, history, steps = train(folder, pairs, validate=validate, config=values)
    plain, _, _ = train(folder, pairs)
    assert len(steps) == (8 if patience else 12)
    assert torch.equal(weights(captioner), seen[1] if patience else weights(plain))
    assert history.val_score.dropna().tolist() == [1.0, 3.0, 2.0, 3.0, 9.0, 9.0][: 4 if patience else 6]
    assert torch.equal(seen[-1], weights(plain)) or patience


# ------------------------------------------------------------------------------------------------------ same and again
def content(path: Path) -> tuple[dict, bytes]:
    """A checkpoint's header, whose order is safetensors' own affair, and the bytes of its tensors."""
    file = path.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:start]), file[start:]


def test_same_seed_same_bytes(folder, pairs, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))  # the global generator does not matter
        state = torch.get_rng_state()
        captioner, _, _ = train(folder, pairs, tmp_path / f"{name}.safetensors", seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        captioner.save_pretrained(tmp_path / name)
    a, b, c = (content(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b and a[1] != c[1]
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("options", [{}, {"validate_every": 2, "patience": 5}])
def test_resumed_run_equals_an_undisturbed_one(folder, pairs, tmp_path, options):
    def validate(captioner: LLMCaptioner) -> float:
        return -weights(captioner).abs().sum().item()               # weights grow: the first validation is the best

    more = {"checkpoint_every": 3, "config": options, "val": (pairs[0][:4], pairs[1][:4]),
            "validate": validate if options else None}
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    first, first_history, _ = train(folder, pairs, whole, **more)
    assert train(folder, pairs, broken, interrupt=7, **more)[2] == [1, 2, 3, 4, 5, 6, 7]
    halfway = load_file(broken)
    assert any(name.startswith("optimizer.") for name in halfway)
    assert train(folder, pairs, broken, interrupt=8, **more)[2] == [7, 8]          # from the checkpoint of step 6
    second, second_history, steps = train(folder, pairs, broken, **more)
    assert steps == [7, 8, 9, 10, 11, 12]
    assert content(broken) == content(whole)
    assert broken.with_suffix(".csv").read_bytes() == whole.with_suffix(".csv").read_bytes()
    assert torch.equal(weights(first), weights(second))
    pd.testing.assert_frame_equal(first_history, second_history)
    if options:
        assert first_history.val_score.dropna().idxmax() == first_history.val_score.first_valid_index()


def test_finished_fit_is_loaded_and_another_is_not(folder, pairs, tmp_path, capsys):
    path = tmp_path / "fit.safetensors"
    first, history, steps = train(folder, pairs, path)
    assert len(steps) == 12 and list(pd.read_csv(path.with_suffix(".csv")).columns) == list(history.columns)
    assert set(load_file(path)) == {f"weights.{name}" for name in first.trainable_state()}
    again, same, none = train(folder, pairs, path, config={"num_beams": 4})       # beams do not decide a fit
    assert none == [] and torch.equal(weights(first), weights(again)) and not again.training
    pd.testing.assert_frame_equal(history, same)
    for change in ({"config": {"learning_rate": 1e-3}}, {"seed": 1}):
        capsys.readouterr()
        assert len(train(folder, pairs, path, **change)[2]) == 12
        assert "from another run" in capsys.readouterr().err
        train(folder, pairs, path)
    other = (pairs[0], ["Something else", *pairs[1][1:]])
    assert len(train(folder, other, path)[2]) == 12


# --------------------------------------------------------------------------------------------------------------- parts
def test_batches_hold_every_row_once_an_epoch_and_little_padding():
    lengths = torch.randint(3, 40, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler, same, other = (BucketSampler(lengths, 16, seed) for seed in (0, 0, 1))
    first, second = (torch.stack([sampler[epoch * 32 + i] for i in range(32)]) for epoch in (0, 1))
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(512))
    assert not torch.equal(first, second) and torch.equal(same[40], second[8]) and not torch.equal(other[0], first[0])
    rows = torch.tensor(lengths)[first]
    assert (rows.amax(1) * 16).sum() < 1.1 * rows.sum()                            # 1.8 without the sorting
    assert not torch.equal(rows.amax(1), rows.amax(1).sort().values)
    assert sorted(BucketSampler([5, 6, 7], 16, 0)[2].tolist()) == [0, 1, 2]
    assert BucketSampler([5] * 39, 16, 0).batches_per_epoch == 2


def test_learning_rate_warms_up_and_falls():
    config = CaptionerConfig(learning_rate=1.0, warmup_steps=4, train_steps=12)
    assert [learning_rate(config, step) for step in (0, 3, 4, 8)] == pytest.approx([0.25, 1.0, 1.0, 0.5])
    assert learning_rate(replace(config, lr_schedule="constant"), 11) == 1.0


def test_what_cannot_be_trained_is_refused_in_one_line(folder, pairs):
    holed = pairs[0].clone()
    holed[0, 0] = float("inf")
    for wrong, options, words in (
        ((holed, pairs[1]), {}, "NaN or infinity"), ((pairs[0][:, :-1], pairs[1]), {}, "wide"),
        ((pairs[0], pairs[1][:-1]), {}, "22 embeddings for 21"), ((pairs[0][:0], []), {}, "at least one"),
        ((pairs[0], ["", *pairs[1][1:]]), {}, "caption 0 is empty"),
        (pairs, {"config": {"patience": 2}}, "give val or validate"),
        (pairs, {"config": {"lr_schedule": "linear"}}, "constant or cosine"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            train(folder, wrong, **options)
        one_line(error)
    with pytest.raises(FloatingPointError, match="lower learning_rate") as error:
        train(folder, pairs, config={"learning_rate": 1e30, "grad_clip": 0.0})
    one_line(error)


# ----------------------------------------------------------------------------------------------------------- processes
SCRIPT = """
import os
import sys
from contextlib import nullcontext
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from safetensors.torch import load_file, save_file
from dl.captioner import LLMCaptioner
from dl.captioner_train import train_captioner
from dl.config import CaptionerConfig

folder, out, *captions = sys.argv[1:]
rank = os.environ["RANK"]
torch.cuda.is_available = torch.accelerator.is_available = lambda: False          # on the CPU wherever the test runs
embeddings = load_file(f"{out}/data.safetensors")["embeddings"]
config = CaptionerConfig(
    language_model=folder, projector_width=24, prompt="Hear:", dtype="float32", batch_size=5,
    gradient_accumulation_steps=2, lora_dropout=0.0, train_steps=6, learning_rate=3e-3, warmup_steps=0,
    validate_every=3, patience=9)
captioner = LLMCaptioner(embeddings.shape[1], config)

def validate(captioner):
    assert rank == "0"
    return 1.0 + float(captioner.projector[0].weight.sum())

class Sharding(Accelerator):
    # accelerate shards on GPUs only: here its prepare is torch's fully_shard, as with configs/fsdp.yaml

    def prepare(self, captioner, optimizer):
        for layer in captioner.language_model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(captioner)
        assert isinstance(captioner.projector[0].weight, DTensor)
        optimizer.param_groups[0]["params"] = [value for value in captioner.parameters() if value.requires_grad]
        return captioner, optimizer

    def no_sync(self, model):
        return nullcontext()

def interrupt(step, loss):
    if step == 4:
        raise KeyboardInterrupt

more = {"checkpoint_path": f"{out}/two.safetensors", "val": (embeddings[:5], captions[:5])}
sharded = sys.argv[0].endswith("sharded.py")
if sharded:                               # weights and moments are gathered, written, read and cut into shards again
    try:
        train_captioner(captioner, embeddings, captions, accelerator=Sharding(cpu=True), checkpoint_every=4,
                        callback=interrupt, **more)
    except KeyboardInterrupt:
        torch.distributed.barrier()              # the file is there
        captioner = LLMCaptioner(embeddings.shape[1], config)
history = train_captioner(captioner, embeddings, captions, validate=None if sharded else validate,
                          accelerator=Sharding(cpu=True) if sharded else None, **more)
assert torch.distributed.get_world_size() == 2 and torch.distributed.get_backend() == "gloo"
save_file(captioner.trainable_state(), f"{out}/process{rank}.safetensors")
history.to_csv(f"{out}/process{rank}.csv", index=False)
"""


@pytest.mark.parametrize("sharing", ["batches", pytest.param("sharded", marks=pytest.mark.slow)])
def test_two_processes_train_like_one(folder, pairs, tmp_path, sharing):
    """Both share the batches (DDP), or the weights too (FSDP2), and go on from a gathered checkpoint."""
    (tmp_path / f"{sharing}.py").write_text(SCRIPT)
    save_file({"embeddings": pairs[0]}, tmp_path / "data.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    # --multi_gpu makes accelerate start torchrun; --cpu would start one process only
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
              str(tmp_path / f"{sharing}.py"), str(folder), str(tmp_path), *pairs[1]]
    result = subprocess.run(launch, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    config = {"batch_size": 5, "gradient_accumulation_steps": 2, "lora_dropout": 0.0, "train_steps": 6,
              "validate_every": 3, "patience": 9}
    validate = None if sharing == "sharded" else lambda captioner: 1.0 + captioner.projector[0].weight.sum().item()
    one, history, _ = train(folder, pairs, config=config, val=(pairs[0][:5], pairs[1][:5]), validate=validate)
    expected = one.trainable_state()
    for process in (0, 1):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"process{process}.csv"), history, rtol=1e-4)
        for name, value in load_file(tmp_path / f"process{process}.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=1e-4)
    assert (tmp_path / "process0.safetensors").read_bytes() == (tmp_path / "process1.safetensors").read_bytes()
    assert (tmp_path / "two.csv").is_file() and history.loss.iloc[-1] < history.loss.iloc[0]
    if sharing == "sharded":
        stored, of_one = (load_file(tmp_path / f"{name}.safetensors") for name in ("two", "process0"))
        assert all(torch.equal(stored[f"weights.{name}"], value) for name, value in of_one.items())


# -------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_ends_in_advice(folder, pairs, monkeypatch, error):
    def lacking(*_, **__):
        raise error

    monkeypatch.setattr(LLMCaptioner, "forward", lacking)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory ran out \(step 1, 4 captions\): .*halve batch_size"):
        train(folder, pairs)
    captioner = LLMCaptioner(D, tiny_config(folder))
    monkeypatch.setattr(captioner.language_model, "generate", lacking)
    with pytest.raises(torch.OutOfMemoryError, match=r"22 embeddings at a time, 1 beams\): give generate a smaller"):
        captioner.generate(pairs[0])
    monkeypatch.setattr(LLMCaptioner, "forward", lambda *_, **__: 1 @ torch.ones(1))  # another error stays what it is
    with pytest.raises(TypeError):
        train(folder, pairs)


def test_four_bits_need_their_library_and_a_gpu(folder, monkeypatch):
    assert number_format("4bit") == "4bit" != number_format("bfloat16") and resolve_dtype("4bit") == torch.bfloat16
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes, or set dtype"):
        LLMCaptioner(D, tiny_config(folder, dtype="4bit"))
    monkeypatch.setattr(language_model.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a GPU, and torch sees none"):
        LLMCaptioner(D, tiny_config(folder, dtype="4bit"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    settings = language_model.four_bit_settings(torch.bfloat16)
    assert settings["device_map"] == {"": 3} and settings["quantization_config"].load_in_4bit


def test_accelerate_takes_the_config_files():
    """Each is one of accelerate's own forms, and every key of it is known."""
    from accelerate.commands.config.config_args import load_config_from_file

    ddp, fsdp = (load_config_from_file(str(REPO / "configs" / name)) for name in ("ddp.yaml", "fsdp.yaml"))
    assert (ddp.distributed_type, fsdp.distributed_type) == ("MULTI_GPU", "FSDP")
    settings = fsdp.fsdp_config
    assert (settings["fsdp_version"], settings["fsdp_transformer_layer_cls_to_wrap"]) == (2, "LlamaDecoderLayer")
