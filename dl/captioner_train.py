"""The captioner's training loop: AdamW on projector and LoRA, in one process or in several.

``accelerate launch --config_file configs/ddp.yaml -m dl fit --profile paper``: several processes share each batch, and
with ``configs/fsdp.yaml`` the language model's weights too. The captions' order follows from seed and epoch, the
dropout from seed, step and process: a resumed run equals an undisturbed one bit for bit (same machine and threads).
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from dl.captioner import LLMCaptioner, check_embeddings, like, memory_advice, whole
from dl.config import CaptionerConfig, number_format
from dl.store import atomic_write, content, csv_text, key, load_checkpoint, save_checkpoint
from dl.train import seeded, under

CHECKPOINT_EVERY = 50     # steps between two checkpoints
HISTORY_ROWS = 50         # rows of a history, each the mean over the steps since the row before
TRAINING_ADVICE = ("in [paper.captioner] of your DL_SETTINGS file halve batch_size and double "
                   "gradient_accumulation_steps, which keeps the number of captions in a step; set "
                   'gradient_checkpointing = true, or dtype = "4bit"; or share the weights between GPUs: '
                   "configs/fsdp.yaml")
BUCKETS = 50              # batches that are sorted by caption length together
HISTORY_COLUMNS = ("step", "loss", "val_loss", "val_score", "lr")
DECODING_FIELDS = ("num_beams", "max_new_tokens", "dtype")     # do not decide a fit (what dtype stands for here does)
DECODER_RECIPE = 1        # goes up when the same settings and seed give other weights (tests/test_recipes.py)


# --------------------------------------------------------------------------------------------------------------- parts
def learning_rate(config: CaptionerConfig, step: int) -> float:
    """The learning rate of ``step`` (from 0): a linear warm-up, then constant, or half a cosine towards 0."""
    if config.lr_schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown lr_schedule {config.lr_schedule!r}: choose constant or cosine")
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / (config.train_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class BucketSampler:
    """Batches of captions of about equal length (``lengths``, in tokens), in an order drawn anew for every epoch.

    Shuffled rows are sorted by length in pools of 50 batches, and the batches are shuffled. Rows that fill no batch at
    the end of an epoch are left out; with fewer rows than a batch, all rows are the batch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.seed = torch.tensor(lengths), seed
        self.batch_size = min(batch_size, len(lengths))
        self.batches_per_epoch = len(lengths) // self.batch_size
        self._epoch: tuple[int, list[Tensor]] = (-1, [])

    def __getitem__(self, index: int) -> Tensor:
        """Rows of batch ``index`` of an endless row of epochs, (batch_size,) int64."""
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
            order = torch.randperm(len(self.lengths), generator=generator)[: self.batches_per_epoch * self.batch_size]
            pools = order.split(BUCKETS * self.batch_size)
            in_order = torch.cat([pool[torch.argsort(self.lengths[pool], stable=True)] for pool in pools])
            batches = in_order.split(self.batch_size)
            self._epoch = epoch, [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return self._epoch[1][place]


def derived_seed(*parts: object) -> int:
    """A seed in [0, 2^48) for the purpose that ``parts`` name; different parts give unrelated ones."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])


@torch.no_grad()
def caption_loss(captioner: LLMCaptioner, embeddings: Tensor, captions: list[str], batch_size: int = 32,
                 accelerator: Accelerator | None = None) -> float:
    """The mean cross-entropy per token of many captions (with eos) without dropout; each process takes a part."""
    lengths = [len(ids) for ids in captioner.caption_ids(captions)]
    rows = sorted(range(len(captions)), key=lengths.__getitem__)
    parts = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    was_training = captioner.training
    captioner.eval()
    total = torch.zeros((), dtype=torch.float64)
    for first in range(0, len(parts), world):     # every process takes as many parts: FSDP gathers weights in each
        part = parts[min(first + rank, len(parts) - 1)]
        loss = captioner(embeddings[part], [captions[i] for i in part], reduction="sum").cpu()
        total += loss if first + rank < len(parts) else 0
    captioner.train(was_training)
    return _sum(total, accelerator) / sum(lengths)


def _sum(value: Tensor, accelerator: Accelerator | None) -> float:
    """The sum of a number, (), over all processes."""
    if accelerator is None:
        return value.item()
    return accelerator.reduce(value.float().to(accelerator.device), "sum").item()


# ---------------------------------------------------------------------------------------------------------------- loop
def train_captioner(
    captioner: LLMCaptioner, embeddings: Tensor, captions: list[str], *, seed: int = 0,
    checkpoint_path: str | Path | None = None, val: tuple[Tensor, list[str]] | None = None,
    validate: Callable[[LLMCaptioner], float] | None = None, accelerator: Accelerator | None = None,
    progress: bool = False, checkpoint_every: int = CHECKPOINT_EVERY,
    callback: Callable[[int, float], None] | None = None,
) -> pd.DataFrame:
    """Train projector and LoRA in place, from their present weights, for ``captioner.config.train_steps`` steps.

    With ``config.patience`` > 0 the training ends after that many validations without a better one and keeps the best
    weights, else the last ones. A finished fit at ``checkpoint_path`` is loaded, an interrupted one goes on. The loss
    of a step is the mean over the tokens of its captions, however many processes and batches share them.

    Args:
        captioner: moved to the accelerator's device; afterwards in eval mode.
        embeddings, captions: (N, D) float, finite, and N texts, none empty.
        seed: of the order of the captions and of the dropout.
        checkpoint_path: a safetensors file; the history goes beside it as CSV. None keeps nothing.
        val: embeddings and captions whose loss is taken every ``config.validate_every`` steps and at the end.
        validate: captioner -> a score, greater is better, taken at the same steps in the main process; it then decides
            in place of the loss on val.
        accelerator: None makes one, which under ``accelerate launch`` joins its processes.
        checkpoint_every: steps between two checkpoints.
        callback: called with the number of steps done and the loss, after every step.

    Returns the history: step, loss (mean since the row before), val_loss, val_score (NaN where not taken), lr.
    Raises ValueError (wrong embeddings or captions, patience with nothing to watch, an unknown choice) and
    FloatingPointError (the loss is NaN or infinite).
    """
    config, accelerator = captioner.config, accelerator or Accelerator(cpu=not torch.accelerator.is_available())
    embeddings = check_embeddings(embeddings, captioner.embed_dim)
    if not len(embeddings) == len(captions) > 0:
        raise ValueError(
            f"{len(embeddings)} embeddings for {len(captions)} captions: give one for each, and at least one")
    if config.patience and val is None and validate is None:
        raise ValueError("patience needs something to watch: give val or validate, or set patience to 0")
    lengths = [len(ids) for ids in captioner.caption_ids(captions)]
    sampler = BucketSampler(lengths, config.batch_size, seed)
    rank, world = accelerator.process_index, accelerator.num_processes
    if sampler.batch_size < world:
        raise ValueError(f"a batch of {sampler.batch_size} cannot be shared by {world} processes: raise batch_size")
    accumulation = config.gradient_accumulation_steps

    training = {name: value for name, value in asdict(config).items() if name not in DECODING_FIELDS}
    watched = [validate is not None, content(val[0], list(val[1])) if val else ""] if config.patience else []
    weights = captioner.trainable_state()
    run = key("decoder", DECODER_RECIPE, settings=training, seed=seed, data=content(embeddings, list(captions)),
              initial_weights=content(*(weights[name] for name in sorted(weights))),
              language_model=[captioner.revision, number_format(config.dtype)], stopping=watched)

    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    model, optimizer = accelerator.prepare(captioner, optimizer)
    learning = [parameter for parameter in captioner.parameters() if parameter.requires_grad]   # FSDP replaces them
    accelerator.gradient_accumulation_steps = accumulation
    state: dict[str, Any] = {
        "step": 0, "history": [], "total": 0.0, "since": 0, "best": -math.inf, "worse": 0, "finished": False}
    best: dict[str, Tensor] = {}
    if checkpoint_path is not None and (found := load_checkpoint(checkpoint_path, run)):
        tensors, state = found
        captioner.load_trainable_state(under(tensors, "weights."))
        best = under(tensors, "best.")
        if not state["finished"]:
            _load_optimizer(optimizer, under(tensors, "optimizer."))
    if len(set(accelerator.gather(torch.tensor([state["step"]], device=accelerator.device)).tolist())) > 1:
        raise ValueError(f"the processes do not all see {checkpoint_path}: put the results folder (DL_RESULTS) on a "
                         "disk that all machines share")

    captioner.train()
    every = max(1, config.train_steps // HISTORY_ROWS)
    shown = progress and accelerator.is_main_process
    bar = tqdm(total=config.train_steps, initial=state["step"], disable=not shown, desc="training", unit="step")
    with bar, seeded(seed, captioner.device):
        while not state["finished"]:
            # 1. the gradient of the mean loss over the tokens of this step's captions, in one or more batches
            step = state["step"]
            torch.manual_seed(derived_seed(seed, "dropout", step, rank))
            batches = [sampler[step * accumulation + i] for i in range(accumulation)]
            tokens = sum(lengths[row] for batch in batches for row in batch.tolist())
            total = torch.zeros((), device=captioner.device)
            for i, batch in enumerate(batches):
                rows = batch[rank::world]
                later = accelerator.no_sync(model) if i < accumulation - 1 else nullcontext()
                with later, memory_advice(f"step {step + 1}, {len(rows)} captions", TRAINING_ADVICE):
                    loss = model(embeddings[rows], [captions[row] for row in rows.tolist()], reduction="sum") / tokens
                    accelerator.backward(loss * world * accumulation)   # undoes its means over processes and batches
                total += loss.detach()

            # 2. one step of AdamW on the clipped gradient
            if config.grad_clip:
                accelerator.clip_grad_norm_(learning, config.grad_clip)
            rate = learning_rate(config, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            value = _sum(total, accelerator)
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"training diverged at step {step + 1}: lower learning_rate, now {config.learning_rate}")
            state["step"] = done = step + 1
            state["total"], state["since"] = state["total"] + value, state["since"] + 1
            bar.set_postfix(loss=f"{value:.2f}", refresh=False)
            bar.update()

            # 3. validation, and whether to go on
            last = done == config.train_steps
            val_loss = val_score = math.nan
            validated = (val is not None or validate is not None) and (last or done % config.validate_every == 0)
            if validated:
                if val is not None:
                    val_loss = caption_loss(captioner, *val, accelerator=accelerator)
                if validate is not None:      # what it draws does not reach the training, which seeds every step
                    captioner.eval()
                    val_score = _sum(torch.tensor(float(validate(captioner) if rank == 0 else 0)), accelerator)
                    captioner.train()
                score = -val_loss if validate is None else val_score
                if config.patience:
                    improved = score > state["best"]
                    state["worse"] = 0 if improved else state["worse"] + 1
                    if improved:
                        state["best"] = score
                        best = {name: value.clone() for name, value in captioner.trainable_state().items()}
            state["finished"] = last or bool(config.patience and state["worse"] >= config.patience)
            if state["finished"] and best:
                captioner.load_trainable_state(best)

            # 4. what is written down
            if state["finished"] or validated or done % every == 0:
                row = (done, state["total"] / state["since"], val_loss, val_score, rate)
                state["history"].append(dict(zip(HISTORY_COLUMNS, row, strict=True)))
                state["total"], state["since"] = 0.0, 0
            if checkpoint_path is not None and (state["finished"] or done % checkpoint_every == 0):
                _save(Path(checkpoint_path), captioner, optimizer, best, state, run, accelerator.is_main_process)
            if callback is not None:
                callback(done, value)

    captioner.eval()
    return pd.DataFrame(state["history"], columns=HISTORY_COLUMNS)


def _save(path: Path, captioner: LLMCaptioner, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], state: dict,
          run: dict[str, str], write: bool) -> None:
    """Write a checkpoint (a finished one: weights only) and the history; all gather, the one with ``write`` writes."""
    tensors = {f"weights.{name}": value for name, value in captioner.trainable_state().items()}
    if not state["finished"]:
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= {f"optimizer.{i}.{name}": whole(value)
                    for i, slot in optimizer.state_dict()["state"].items() for name, value in slot.items()}
    if write:
        atomic_write(path.with_suffix(".csv"), csv_text(state["history"], HISTORY_COLUMNS))
        save_checkpoint(path, tensors, state, run)


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give AdamW back its moments and step counts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        i, key = name.split(".")
        slots.setdefault(int(i), {})[key] = like(value, parameters[int(i)]) if value.ndim else value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
