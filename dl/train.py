"""Training: a moving average of the weights, a sampler of pairs, and one resumable loop.

``fit`` is the loop; it knows a network and a function that gives a step's losses, nothing of audio or text.
``train_bridge`` gives it the bridge's losses, ``dl.peers`` those of the trained peers.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dl.bridge import INFERENCE_FIELDS, DiffusionLink, bridge_losses, unit_rows
from dl.config import BridgeConfig
from dl.store import content, key, load_checkpoint, save_checkpoint

CHECKPOINT_EVERY = 200  # steps between two checkpoints of a fit
HISTORY_ROWS = 50  # rows of a training history, each the mean over the steps since the row before
BRIDGE_RECIPE = 1  # goes up when the same settings and seed give other weights (tests/test_recipes.py)

LossFn = Callable[[nn.Module, torch.Generator], dict[str, Tensor]]
Callback = Callable[[int, dict[str, float]], None]


class EMA:
    """Exponential moving average of a network's parameters: e <- e + (1 - d) (p - e).

    d = min(decay, (1 + step) / (10 + step)) [ours]: early on the average forgets the initial weights faster.
    ``network`` is a copy in eval mode that holds the averages; decay 0 follows the trained network exactly.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take one step towards the network's present parameters; ``step`` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1.0 - decay)


class PairSampler:
    """Draws clips uniformly, with replacement, and for each one of its captions at random.

    ``text_clip`` (m,) int64 holds the row of ``audio`` that each caption belongs to; audio has ``num_clips`` rows.
    Raises ValueError for a row out of range, or a clip without a caption.
    """

    def __init__(self, text_clip: Tensor, num_clips: int) -> None:
        if len(text_clip) == 0 or int(text_clip.min()) < 0 or int(text_clip.max()) >= num_clips:
            raise ValueError(f"text_clip must hold rows of audio, 0 to {num_clips - 1}, one for each caption")
        self.order = torch.argsort(text_clip.cpu(), stable=True)  # captions, those of one clip side by side
        self.counts = torch.bincount(text_clip.cpu(), minlength=num_clips)
        if int(self.counts.min()) == 0:
            raise ValueError(f"clip {int(self.counts.argmin())} has no caption: leave it out of audio")
        self.first = self.counts.cumsum(0) - self.counts

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows of ``audio`` and the rows of ``text`` paired with them, both (batch_size,) int64 on the CPU."""
        clips = torch.randint(len(self.counts), (batch_size,), generator=generator)
        which = (torch.rand(batch_size, generator=generator, dtype=torch.float64) * self.counts[clips]).long()
        return clips, self.order[self.first[clips] + which]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators start from ``seed``; on leaving, they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def learning_rate(config: BridgeConfig, step: int) -> float:
    """The learning rate of ``step`` (from 0): constant, or half a cosine from config.learning_rate towards 0."""
    if config.lr_schedule == "constant":
        return config.learning_rate
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.train_steps))
    raise ValueError(f"unknown lr_schedule {config.lr_schedule!r}: choose constant or cosine")


def fit(
    network: nn.Module, loss_fn: LossFn, config: BridgeConfig, *, seed: int,
    identity: dict[str, object] | None = None, checkpoint_path: str | Path | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY, validate: Callable[[nn.Module], float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999), progress: bool = True, callback: Callback | None = None,
) -> pd.DataFrame:
    """Train ``network`` in place with AdamW; at the end it holds the EMA weights and is in eval mode.

    One generator gives the batches, the noise, and a seed for the dropout of each step. A run resumed from
    ``checkpoint_path`` equals an undisturbed one bit for bit (same machine, same threads), torch's global generators
    are left as they were, and a second call returns a finished fit at once.

    Args:
        loss_fn: (network, generator) -> the losses of one batch, () float each; "loss" is minimised.
        config: learning_rate, weight_decay, lr_schedule, train_steps, grad_clip (0: off), ema_decay.
        identity: what else decides the result (data, recipe), as parts of ``dl.store.key``.
        checkpoint_path: a safetensors file, written every ``checkpoint_every`` steps; None keeps nothing.
        validate: (network with the EMA weights) -> pair cosine on val, asked at each row of the history.
        callback: called as callback(steps done, losses of the step) after every step.

    Returns:
        The history: step, the mean of each loss since the row before, val_pair_cosine (NaN without ``validate``).

    Raises:
        FloatingPointError: a loss is NaN or infinite.
        ValueError: an unknown choice in ``config``.
    """
    device = next(network.parameters()).device
    # DEVIATION(training-recipe): SEED's learning rate and weight decay; batch, schedule, clipping and EMA are ours.
    ema = EMA(network, config.ema_decay)
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay,
                                  fused=True)
    generator = torch.Generator().manual_seed(seed)
    done, history, totals, since = 0, [], {}, 0

    training = {name: value for name, value in asdict(config).items() if name not in INFERENCE_FIELDS}
    shapes = [[name, list(parameter.shape)] for name, parameter in network.named_parameters()]
    run = key("fit", BRIDGE_RECIPE, settings=training, betas=betas, seed=seed, network=shapes, **(identity or {}))
    if checkpoint_path is not None and (found := load_checkpoint(checkpoint_path, run)):
        tensors, state = found
        done, history, totals, since = state["step"], state["history"], state["totals"], state["since"]
        ema.network.load_state_dict(under(tensors, "ema."))
        if done < config.train_steps:
            network.load_state_dict(under(tensors, "network."))
            moments = {i: under(tensors, f"optimizer.{i}.") for i in range(len(shapes))}
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": moments, "param_groups": groups})
            generator.set_state(tensors["generator"])

    network.train()
    every = max(1, config.train_steps // HISTORY_ROWS)
    bar = tqdm(range(done, config.train_steps), desc="training", initial=done, total=config.train_steps,
               disable=not progress)
    with seeded(seed, device):
        for step in bar:
            # 1. a seed for this step's dropout, then the losses of one batch
            dropout_seed = int(torch.randint(2**31, (), generator=generator))
            torch.default_generator.manual_seed(dropout_seed)       # torch.manual_seed walks every backend
            if device.type == "cuda":
                torch.cuda.manual_seed(dropout_seed)
            step_losses = loss_fn(network, generator)

            # 2. one step of AdamW on the clipped gradient
            optimizer.zero_grad()
            step_losses["loss"].backward()
            if config.grad_clip:
                nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.step()

            # 3. the average of the weights
            ema.update(network, step)
            done = step + 1

            # 4. what is written down
            values = {name: value.item() for name, value in step_losses.items()}
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"training diverged at step {done}: "
                                         f"lower learning_rate, now {config.learning_rate}")
            totals = {name: totals.get(name, 0.0) + value for name, value in values.items()}
            since += 1
            if done % every == 0 or done == config.train_steps:
                means = {name: total / since for name, total in totals.items()}
                means["val_pair_cosine"] = validate(ema.network) if validate else math.nan
                history.append({"step": done, **means})
                totals, since = {}, 0
            if checkpoint_path is not None and (done % checkpoint_every == 0 or done == config.train_steps):
                tensors = {f"ema.{name}": value for name, value in ema.network.state_dict().items()}
                if done < config.train_steps:
                    tensors |= {f"network.{name}": value for name, value in network.state_dict().items()}
                    for i, moments in optimizer.state_dict()["state"].items():
                        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
                    tensors["generator"] = generator.get_state()
                state = {"step": done, "history": history, "totals": totals, "since": since}
                save_checkpoint(checkpoint_path, tensors, state, run)
            if callback is not None:
                callback(done, values)

    network.load_state_dict(ema.network.state_dict())
    network.eval()
    return pd.DataFrame(history)


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, copied, without it."""
    return {name.removeprefix(prefix): value.clone() for name, value in tensors.items() if name.startswith(prefix)}


def train_bridge(
    config: BridgeConfig, audio: Tensor, text: Tensor, text_clip: Tensor, *, seed: int,
    checkpoint_path: str | Path | None = None, val: tuple[Tensor, Tensor] | None = None,
    progress: bool = True, callback: Callback | None = None, checkpoint_every: int = CHECKPOINT_EVERY,
) -> tuple[DiffusionLink, pd.DataFrame]:
    """Train a bridge on cached embeddings; every step draws clips uniformly and one caption of each at random.

    The opposite direction, text to audio, is the same call with the roles swapped:
    ``train_bridge(config, text, audio[text_clip], torch.arange(len(text)), seed=0)``.

    Args:
        audio: (n, D) float, one row a clip; its device is where the training runs.
        text: (m, D) float, one row a caption.
        text_clip: (m,) int64, the row of ``audio`` that a caption belongs to.
        val: paired rows, (v, D) each, whose pair cosine goes into the history (EMA weights, config's k* and n, one
            fixed draw of noise). It does not change the fit; a fit that is read back keeps its first history.
        checkpoint_path, checkpoint_every, progress, callback: see ``fit``.

    Returns:
        (bridge with the EMA weights in eval mode, history as in ``fit``).

    Raises:
        ValueError: shapes that do not fit, NaN, a clip without a caption, an unknown choice in ``config``.
    """
    audio = unit_rows(audio, None, "audio")
    text = unit_rows(text, audio.shape[1], "text")
    if len(text_clip) != len(text):
        raise ValueError(f"text_clip has {len(text_clip)} entries for {len(text)} captions: give one for each")
    sampler = PairSampler(text_clip, len(audio))
    with seeded(seed, audio.device):
        link = DiffusionLink.from_config(config, audio.shape[1]).to(audio.device)
    x_audio, x_text = link.scale * audio, link.scale * text

    def loss_fn(network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        clips, captions = sampler.draw(config.batch_size, generator)
        return bridge_losses(network, link.scheduler, x_audio[clips], x_text[captions], config, generator)

    validate = None
    if val is not None:
        probe, val_text = copy.deepcopy(link), unit_rows(val[1], audio.shape[1], "val text")

        def validate(network: nn.Module) -> float:
            probe.network = network
            bridged_emb = probe(val[0], generator=torch.Generator().manual_seed(0))
            return float((bridged_emb * val_text).sum(-1).mean())

    identity: dict[str, object] = {"system": "bridge", "data": content(audio, text, text_clip)}
    history = fit(link.network, loss_fn, config, seed=seed, identity=identity, checkpoint_path=checkpoint_path,
                  checkpoint_every=checkpoint_every, validate=validate, progress=progress, callback=callback)
    return link.eval(), history
