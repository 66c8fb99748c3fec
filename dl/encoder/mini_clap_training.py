"""How mini-CLAP was trained (notebook A2): fresh scenes, every recording changed before it is mixed; YAMNet fine-tuned; InfoNCE. All [ours].

The log-mel spectrograms of ``FRESH_SCENES`` scenes that share no mix with ``scenes.csv`` are computed once; then trunk and heads learn from them.
How long and how hard was chosen on :func:`held_out` scenes: labels and takes cut out of train, since val holds known labels only.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import soxr
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor, nn
from tqdm import tqdm

from dl.data import SAMPLING_RATE, read_recording
from dl.encoder.mini_clap import LOG_OFFSET, N_MELS, LogMel, MiniClap, info_nce, prepare
from dl.scenes import build_scenes, compose_captions, mix_scene

FRESH_SCENES = 24_000
FRESH_SEED = 1000               # scenes.csv is drawn with seed 0
CAPTIONS_PER_SCENE = 4
LARGEST_SHIFT = 0.25            # octaves up or down, by resampling
LARGEST_TILT = 0.6              # coefficient of the one-tap filter y_t = x_t + a x_(t-1)
SILENT = float(np.log(LOG_OFFSET))   # log-mel of silence


@dataclass(frozen=True)
class EncoderTraining:
    """How long and how hard mini-CLAP trains."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 1e-3         # of the heads: peak of a one-cycle schedule
    trunk_learning_rate: float = 1e-4   # the same for the trunk; 0 freezes it. Its batch norms keep AudioSet's statistics in any case
    weight_decay: float = 0.2
    dropout: float = 0.1                # in the audio head
    frame_dropout: float = 0.1          # share of the trunk's frames set to zero
    largest_mask: int = 8               # mel bands; a run of up to so many is silenced, drawn for each clip
    text_noise: float = 0.02            # s.d. added to every coordinate of MiniLM's vectors
    seed: int = 0


CANDIDATES = ({}, *({"weight_decay": 0.05} | changes for changes in (     # of EncoderTraining, tried on held-out labels and takes
    {}, {"trunk_learning_rate": 0.0}, {"trunk_learning_rate": 3e-5}, {"trunk_learning_rate": 3e-4}, {"epochs": 3}, {"epochs": 12},
    {"trunk_learning_rate": 3e-4, "epochs": 3}, {"trunk_learning_rate": 3e-4, "epochs": 12, "largest_mask": 16}, {"batch_size": 256},
    {"dropout": 0.3, "frame_dropout": 0.2}, {"text_noise": 0.05}, {"largest_mask": 16},
)))


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


def held_out(recordings: pd.DataFrame, share: float = 0.2, seed: int = 42) -> pd.DataFrame:
    """The train recordings dealt anew, to choose settings on: a share of the labels, and of the others a share of the takes, become split "test".

    Takes are dealt within a label that has at least four; val and test recordings are left out.
    """
    rng = np.random.default_rng(seed)
    train = recordings[recordings.split == "train"].copy()
    names = sorted(train.label.unique())
    held = set(rng.choice(names, int(share * len(names)), replace=False))
    split = pd.Series(np.where(train.label.isin(held), "test", "train"), index=train.index)
    for _, takes in train[~train.label.isin(held)].groupby("label"):
        if len(takes) >= 4:
            split[rng.choice(takes.index, max(1, int(share * len(takes))), replace=False)] = "test"
    return train.assign(split=split)


def scene_log_mels(scenes: pd.DataFrame, files: dict[str, Path], augmented: bool, workers: int = 2, progress: bool = True) -> list[Tensor]:
    """The log-mel spectrogram of every scene, (frames, 64) float16 each; frames grow with the scene.

    Args:
        files: recording id -> file.
        augmented: change every recording by :func:`augment`, seeded by the scene's place.
        workers: processes.
    """
    starts = tqdm(range(0, len(scenes), 64), desc="log-mel", unit="64 scenes", disable=not progress)
    parts = Parallel(n_jobs=workers)(delayed(_log_mels)(scenes.iloc[start: start + 64], start, files, augmented) for start in starts)
    return [torch.from_numpy(rows) for part in parts for rows in part]


def _log_mels(scenes: pd.DataFrame, start: int, files: dict[str, Path], augmented: bool) -> list[np.ndarray]:
    torch.set_num_threads(1)
    log_mel, rows = LogMel(), []
    for place, (_, scene) in enumerate(scenes.iterrows(), start):
        waveform = prepare(_mix(scene, files, place if augmented else None), SAMPLING_RATE)
        rows.append(log_mel(torch.from_numpy(waveform)[None])[0].half().numpy())
    return rows


def _mix(scene: pd.Series, files: dict[str, Path], augment_seed: int | None) -> np.ndarray:
    if augment_seed is None:
        return mix_scene(scene, lambda clip_id: read_recording(files[clip_id]))
    rng = np.random.default_rng([7, augment_seed])
    return mix_scene(scene, lambda clip_id: augment(read_recording(files[clip_id]), rng))


def pad(log_mels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips of different lengths in one tensor: (B, longest, 64) float32, and how many rows of the trunk each fills, (B,)."""
    lengths = torch.tensor([-(-len(rows) // 32) for rows in log_mels])
    return nn.utils.rnn.pad_sequence(log_mels, batch_first=True, padding_value=SILENT).float(), lengths


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


def mask_bands(log_mel: Tensor, largest: int) -> Tensor:
    """Silence a run of up to ``largest`` mel bands in every clip, (B, frames, 64) -> the same shape [peer: SpecAugment]."""
    width = torch.randint(largest + 1, (len(log_mel), 1))
    first = (torch.rand(len(log_mel), 1) * (N_MELS - width + 1)).long()
    band = torch.arange(N_MELS)
    masked = (band >= first) & (band < first + width)                                      # (B, 64)
    return log_mel.masked_fill(masked[:, None, :].to(log_mel.device), SILENT)


def embed_log_mels(model: MiniClap, log_mels: list[Tensor], batch_size: int = 64) -> Tensor:
    """(n, D) unit norm on the CPU, the model in eval mode."""
    device, rows = model.log_temperature.device, []
    with torch.inference_mode():
        for start in range(0, len(log_mels), batch_size):
            clips, lengths = pad(log_mels[start: start + batch_size])
            rows.append(F.normalize(model.audio_head(model.trunk(clips.to(device)), lengths.to(device)), dim=1).cpu())
    return torch.cat(rows)


def train_mini_clap(model: MiniClap, log_mels: list[Tensor], sentences: Tensor, caption_rows: Tensor, config: EncoderTraining,
                    validate: Callable[[MiniClap], dict[str, float]] | None = None, progress: bool = True) -> pd.DataFrame:
    """Train the trunk, both heads and the temperature in place; at the end the model is in eval mode, after the last epoch.

    Args:
        model: on the device to train on.
        log_mels: n clips, (frames, 64) float16.
        sentences: (m, 384) float32 MiniLM vectors of all different captions.
        caption_rows: (n, 4) int64, the rows of ``sentences`` of a clip's captions.
        validate: gives {"recall_at_10": ..., ...} after every epoch; it only watches.

    Returns:
        One row an epoch: loss, temperature and what ``validate`` gave.
    """
    torch.manual_seed(config.seed)
    device = model.log_temperature.device
    trunk = list(model.trunk.parameters()) if config.trunk_learning_rate else []
    model.trunk.requires_grad_(bool(trunk))
    heads = [*model.audio_head.parameters(), *model.text_head.parameters(), model.log_temperature]
    groups: list[dict[str, Any]] = [{"params": heads, "lr": config.learning_rate}] + [{"params": trunk, "lr": config.trunk_learning_rate}] * bool(trunk)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    lengths = np.array([len(rows) for rows in log_mels])
    epochs = [batches(lengths, config.batch_size, config.seed * 1000 + epoch) for epoch in range(config.epochs)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], sum(map(len, epochs)), pct_start=0.1)
    history = []
    for epoch, plan in enumerate(tqdm(epochs, desc="mini-CLAP", unit="epoch", disable=not progress)):
        model.train()
        model.trunk.eval()
        total = 0.0
        for places in plan:
            clips, length = pad([log_mels[place] for place in places])
            frames = model.trunk(mask_bands(clips.to(device), config.largest_mask))        # (B, T, 1024)
            frames = frames.masked_fill((torch.rand(frames.shape[:2]) < config.frame_dropout)[..., None].to(device), 0.0)
            which = torch.randint(caption_rows.shape[1], (len(places),))
            sentence = sentences[caption_rows[torch.from_numpy(places), which]].float()
            sentence = sentence + config.text_noise * torch.randn_like(sentence)
            audio_emb = F.normalize(model.audio_head(frames, length.to(device)), dim=1)
            text_emb = F.normalize(model.text_head(sentence.to(device)), dim=1)
            loss = info_nce(audio_emb, text_emb, model.log_temperature)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*heads, *trunk], 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        model.eval()
        history.append({"epoch": epoch + 1, "loss": total / len(plan), "temperature": float((-model.log_temperature.detach()).exp())}
                       | (validate(model) if validate else {}))
    return pd.DataFrame(history)
