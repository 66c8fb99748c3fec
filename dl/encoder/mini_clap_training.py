"""How mini-CLAP's heads were trained (notebook A2): fresh scenes, augmented; a frozen trunk computed once; InfoNCE. All [ours].

The trunk is frozen, so its frames are computed once for ``FRESH_SCENES`` scenes that share no mix with ``scenes.csv``; the heads
then train in minutes. Every recording is changed in pitch and timbre before it is mixed, so that no take is heard twice alike.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dl.data import SAMPLING_RATE, read_recording
from dl.encoder.mini_clap import GRID_S, MiniClap, info_nce, prepare
from dl.scenes import build_scenes, compose_captions, mix_scene

FRESH_SCENES = 20_000
FRESH_SEED = 1000               # scenes.csv is drawn with seed 0
CAPTIONS_PER_SCENE = 4
LARGEST_SHIFT = 0.25            # octaves up or down, by resampling
LARGEST_TILT = 0.6              # coefficient of the one-tap filter y_t = x_t + a x_(t-1)


@dataclass(frozen=True)
class HeadTraining:
    """How long and how hard the heads train; chosen on labels and takes that were kept out of train, since val holds known labels only."""

    epochs: int = 5
    batch_size: int = 128
    learning_rate: float = 1e-3         # peak of a one-cycle schedule
    weight_decay: float = 0.05
    frame_dropout: float = 0.1          # share of frames set to zero
    text_noise: float = 0.02            # s.d. added to every coordinate of MiniLM's vectors
    seed: int = 0


def augment(recording: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift pitch and speed by up to a quarter octave; half of the time tilt the spectrum. (samples,) -> (other samples,)."""
    shifted = soxr.resample(recording, SAMPLING_RATE, SAMPLING_RATE * 2 ** rng.uniform(-LARGEST_SHIFT, LARGEST_SHIFT), quality="QQ")
    shifted = shifted.astype(np.float32)
    if rng.random() < 0.5:
        tilted = shifted.copy()
        tilted[1:] += np.float32(rng.uniform(-LARGEST_TILT, LARGEST_TILT)) * shifted[:-1]
        shifted = tilted
    return shifted


def fresh_scenes(recordings: pd.DataFrame, labels: pd.DataFrame, n_scenes: int = FRESH_SCENES) -> tuple[pd.DataFrame, list[list[str]]]:
    """Scenes mixed from train recordings for the encoder alone, and four captions of each, none in a held-out phrasing."""
    scenes = build_scenes(recordings, "train", n_scenes, seed=FRESH_SEED)
    rng = np.random.default_rng(5)
    captions = [compose_captions(scene, labels, CAPTIONS_PER_SCENE, rng)[0] for _, scene in scenes.iterrows()]
    return scenes, [texts + texts[-1:] * (CAPTIONS_PER_SCENE - len(texts)) for texts in captions]


def trunk_frames(model: MiniClap, scenes: pd.DataFrame, files: dict[str, Path], augmented: bool, dtype: torch.dtype = torch.bfloat16,
                 progress: bool = True) -> list[Tensor]:
    """The frozen trunk's frames of every scene, (T, 512) float16 each; T grows with the scene.

    Args:
        files: recording id -> file.
        augmented: change every recording by :func:`augment`, seeded by the scene's place.
        dtype: of the convolutions; bfloat16 halves the time where the processor has it.
    """
    steps = np.ceil(scenes.seconds.astype(float) / GRID_S).astype(int).to_numpy()
    trunk = model.trunk.to(dtype=dtype, memory_format=torch.channels_last)
    frames: list[Tensor] = [torch.empty(0)] * len(scenes)
    with tqdm(total=len(scenes), desc="trunk", unit="scene", disable=not progress) as bar, torch.inference_mode():
        for length in np.unique(steps):
            places = np.flatnonzero(steps == length)
            for start in range(0, len(places), 16):
                batch = places[start: start + 16]
                waveforms = [prepare(_mix(scenes.iloc[place], files, int(place) if augmented else None), SAMPLING_RATE) for place in batch]
                log_mel = model.log_mel(torch.from_numpy(np.stack(waveforms)))
                for place, rows in zip(batch, trunk(log_mel.to(dtype)).half(), strict=True):
                    frames[place] = rows.clone()
                bar.update(len(batch))
    model.trunk.float()
    return frames


def _mix(scene: pd.Series, files: dict[str, Path], augment_seed: int | None) -> np.ndarray:
    if augment_seed is None:
        return mix_scene(scene, lambda clip_id: read_recording(files[clip_id]))
    rng = np.random.default_rng([7, augment_seed])
    return mix_scene(scene, lambda clip_id: augment(read_recording(files[clip_id]), rng))


def pad(frames: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips of different lengths in one tensor: (B, longest, 512) float32 and their lengths (B,)."""
    lengths = torch.tensor([len(rows) for rows in frames])
    return nn.utils.rnn.pad_sequence(frames, batch_first=True).float(), lengths


def batches(lengths: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
    """A permutation in batches, each of clips of similar length, in random order; the last, smaller batch is left out."""
    rng = np.random.default_rng(seed)
    order, found = rng.permutation(len(lengths)), []
    for start in range(0, len(order), 8 * batch_size):
        chunk = order[start: start + 8 * batch_size]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        found += [chunk[at: at + batch_size] for at in range(0, len(chunk) - batch_size + 1, batch_size)]
    rng.shuffle(found)
    return found


def train_heads(model: MiniClap, frames: list[Tensor], sentences: Tensor, caption_rows: Tensor, config: HeadTraining,
                validate: Callable[[MiniClap], dict[str, float]] | None = None, progress: bool = True) -> pd.DataFrame:
    """Train both heads and the temperature in place; at the end the model holds the epoch that was best on val (R@10).

    Args:
        frames: n clips, (T_i, 512) float16.
        sentences: (m, 384) MiniLM vectors of all different captions.
        caption_rows: (n, 4) int64, the rows of ``sentences`` of a clip's captions.
        validate: gives {"recall_at_10": ..., ...} after every epoch.

    Returns:
        One row an epoch: loss, temperature and what ``validate`` gave.
    """
    torch.manual_seed(config.seed)
    parameters = [*model.audio_head.parameters(), *model.text_head.parameters(), model.log_temperature]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    lengths = np.array([len(rows) for rows in frames])
    epochs = [batches(lengths, config.batch_size, config.seed * 1000 + epoch) for epoch in range(config.epochs)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, sum(map(len, epochs)), pct_start=0.1)
    history, best, best_weights = [], -1.0, None
    for epoch, plan in enumerate(tqdm(epochs, desc="heads", unit="epoch", disable=not progress)):
        model.train()
        total = 0.0
        for places in plan:
            clip, length = pad([frames[place] for place in places])
            clip = clip.masked_fill(torch.rand(clip.shape[:2])[..., None] < config.frame_dropout, 0.0)
            which = torch.randint(caption_rows.shape[1], (len(places),))
            sentence = sentences[caption_rows[torch.from_numpy(places), which]].float()
            sentence = sentence + config.text_noise * torch.randn_like(sentence)
            audio_emb = F.normalize(model.audio_head(clip, length), dim=1)
            text_emb = F.normalize(model.text_head(sentence), dim=1)
            loss = info_nce(audio_emb, text_emb, model.log_temperature)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        model.eval()
        row = {"epoch": epoch + 1, "loss": total / len(plan), "temperature": float((-model.log_temperature.detach()).exp())}
        if validate:
            row |= validate(model)
            if row["recall_at_10"] > best:
                best, best_weights = row["recall_at_10"], {name: value.clone() for name, value in model.state_dict().items()}
        history.append(row)
    if best_weights is not None:
        model.load_state_dict(best_weights)
    return pd.DataFrame(history)
