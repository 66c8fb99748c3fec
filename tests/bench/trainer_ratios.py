"""Training the captioner: ``dl.captioner_train.train_captioner`` against transformers' ``Trainer`` on the same model, data and batches.

    python tests/bench/trainer_ratios.py ours|theirs        peak memory of a few steps, in a process of its own: bytes, on the last line
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import torch
from random_captioner import RandomCaptioner
from ratios import Pairs, Ratios, at_most, check_equal, torch_profile
from recorder import GIB
from torch import Tensor, nn

from dl.captioner import IGNORED, LLMCaptioner
from dl.captioner_train import BucketSampler, train_captioner
from dl.config import CaptionerConfig, get_profile

TIME_GOAL, MEMORY_GOAL = at_most(1), at_most(1)
SETTINGS = {"train_steps": 4, "batch_size": 16, "lr_schedule": "constant", "warmup_steps": 0, "lora_dropout": 0.0}      # no dropout: losses can be compared


@dataclass(frozen=True)
class Sizes:
    """How much is measured; ``llama`` holds fields of a random language model, empty for SmolLM2."""

    captions: int = 256
    rounds: int = 3
    llama: dict = field(default_factory=dict)
    memory_repeats: int = 2


TINY = Sizes(captions=64, rounds=2, memory_repeats=0, llama={
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 128})


def captioner_and_data(sizes: Sizes) -> tuple[LLMCaptioner, Tensor, list[str]]:
    """A fresh captioner, random vectors, and captions of the train scenes (words of the random tokenizer for a random model)."""
    width = 16 if sizes.llama else 256
    vectors = torch.randn(sizes.captions, width, generator=torch.Generator().manual_seed(0))
    if sizes.llama:
        config = CaptionerConfig(language_model="random tiny Llama", projector_width=24, lora_r=2, **SETTINGS)
        captions = [" ".join(f"word{(3 * row + place) % 200}" for place in range(4 + row % 5)) for row in range(sizes.captions)]
        return RandomCaptioner(width, config, sizes.llama, torch.device("cpu")).captioner, vectors, captions
    from dl.data import load_split

    captions = [captions[0] for captions in load_split(get_profile("mini", max_clips={"train": sizes.captions}), "train").captions]
    return LLMCaptioner(width, CaptionerConfig(**SETTINGS)), vectors, captions


# --------------------------------------------------------------------------------------------------------------- two ways
def ours(captioner: LLMCaptioner, vectors: Tensor, captions: list[str]) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step of ``train_captioner``."""
    marks, losses = [time.perf_counter()], []

    def after_step(_: int, loss: float) -> None:
        marks.append(time.perf_counter())
        losses.append(loss)

    train_captioner(captioner, vectors, captions, callback=after_step)
    return seconds(marks), losses


class WithLabels(nn.Module):
    """The captioner as ``Trainer`` takes a model: padded ids, a mask and labels in, the language model's own loss out."""

    def __init__(self, captioner: LLMCaptioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, vectors: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """vectors (B, D), the others (B, M) -> the loss, ()."""
        context = self.captioner.context(vectors)                                                              # (B, C, d)
        tokens = self.captioner.language_model.get_input_embeddings()(input_ids)                               # (B, M, d)
        before = torch.ones(context.shape[:2], dtype=torch.long)                                               # (B, C)
        answer = self.captioner.language_model(
            inputs_embeds=torch.cat([context, tokens], dim=1), attention_mask=torch.cat([before, attention_mask], dim=1),
            labels=torch.cat([before * IGNORED, labels], dim=1), use_cache=False)
        return {"loss": answer.loss}


def theirs(captioner: LLMCaptioner, vectors: Tensor, captions: list[str]) -> tuple[list[float], list[float]]:
    """The same of ``Trainer``: AdamW (fused), the same learning rate and clipping, the batches that ``train_captioner`` would draw."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    config, ids = captioner.config, captioner.caption_ids(captions)
    sampler = BucketSampler([len(row) for row in ids], config.batch_size, seed=0)
    rows = [row for step in range(config.train_steps) for row in sampler[step].tolist()]
    data = [{"vectors": vectors[row], "ids": torch.tensor(ids[row])} for row in rows]
    marks, losses = [], []

    def collate(batch: list[dict]) -> dict[str, Tensor]:
        padded = [nn.utils.rnn.pad_sequence([row["ids"] for row in batch], batch_first=True, padding_value=value) for value in (0, IGNORED)]
        return {"vectors": torch.stack([row["vectors"] for row in batch]), "input_ids": padded[0], "labels": padded[1],
                "attention_mask": (padded[1] != IGNORED).long()}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_log(self, *_, logs: dict, **__):                # after every step, its loss being read
            if "loss" in logs:
                marks.append(time.perf_counter())
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=config.batch_size, max_steps=config.train_steps, learning_rate=config.learning_rate, lr_scheduler_type="constant",
            weight_decay=config.weight_decay, max_grad_norm=config.grad_clip, optim="adamw_torch_fused", train_sampling_strategy="sequential",
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False, use_cpu=True, seed=0)
        trainer = Trainer(WithLabels(captioner), arguments, data_collator=collate, train_dataset=data, callbacks=[Watch()])
        trainer.pop_callback(next(callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ == "PrinterCallback"))
        trainer.train()
    return seconds(marks), losses


def seconds(marks: list[float]) -> list[float]:
    """Between marks that follow each other."""
    return [later - earlier for earlier, later in pairwise(marks)]


# ------------------------------------------------------------------------------------------------------------- comparison
def captioner_training(bench: Ratios, sizes: Sizes) -> None:
    """Seconds of the same step in both ways, then the peak memory of a process that does nothing else."""
    def time_a_step() -> None:
        captioner, vectors, captions = captioner_and_data(sizes)
        start = {name: value.clone() for name, value in captioner.trainable_state().items()}
        pairs: Pairs = []
        same = ""
        for _ in range(sizes.rounds):
            found = []
            for way in (ours, theirs):
                captioner.load_trainable_state(start)
                found.append(way(captioner, vectors, captions))
            same = check_equal(torch.tensor(found[0][1]), torch.tensor(found[1][1]), 1e-3, f"losses of {len(found[0][1])} steps")
            pairs += list(zip(found[0][0], found[1][0], strict=True))[1:]            # the first step of each also sets things up
        bench.compare("captioner_training", "a step", pairs, TIME_GOAL, f"{captioner.config.language_model}, {captioner.config.batch_size} captions a batch, float32 "
                      f"masters, no dropout; {same}. Trainer's captions are tokenised beforehand, ours in the step",
                      profile=lambda: torch_profile(lambda: ours(captioner, vectors, captions), most=8))

    def memory() -> None:
        pairs = [(peak_of("ours") / GIB, peak_of("theirs") / GIB) for _ in range(sizes.memory_repeats)]
        bench.compare("captioner_training", "peak memory", pairs, MEMORY_GOAL, "of a fresh process that loads the model and takes 4 steps; Trainer's model computes "
                      "logits for every position, ours for the captions' own", unit="GiB")

    bench.attempt(time_a_step, "captioner_training", "a step")
    if sizes.memory_repeats:
        bench.attempt(memory, "captioner_training", "peak memory")


def peak_of(way: str) -> int:
    """Bytes that a process of its own held at most while it trained."""
    command = [sys.executable, str(Path(__file__).resolve()), way, str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return int(done.stdout.split()[-1])


def main(way: str, threads: str) -> None:
    """Train in one way and print the process's peak memory while it trained, in bytes."""
    torch.set_num_threads(int(threads))
    captioner, vectors, captions = captioner_and_data(Sizes())
    before = reset_peak()
    {"ours": ours, "theirs": theirs}[way](captioner, vectors, captions)
    print(before, peak())


def reset_peak() -> int:
    """Forget what loading took (Linux; elsewhere the peak counts it), and say what is held now."""
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most bytes held so far."""
    if os.path.exists("/proc/self/status"):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
