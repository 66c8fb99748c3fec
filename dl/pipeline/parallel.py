"""The two long jobs of profile paper in several processes: ``python -m dl embed`` and ``python -m dl fit``, alone or under accelerate.

    accelerate launch --config_file configs/ddp.yaml -m dl embed --profile paper
    accelerate launch --config_file configs/ddp.yaml -m dl fit --profile paper --decoder text --seed 0

Both leave their result in the profile's cache, where the notebooks find it: ``./run_all.sh --profile paper`` then repeats neither.
On a machine without a GPU, or with ``torchrun --standalone --nproc-per-node 2 -m dl embed``, the processes meet through gloo.
"""
from __future__ import annotations

import time
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from dl.captioning import decoder_fit
from dl.config import SPLITS, Profile
from dl.data import load_split
from dl.encoder.clap import ClapEncoder, embed_split, load_embeddings

PATIENCE = timedelta(hours=12)     # how long a process waits for the one that opens the encoder, fits a bridge or embeds the captions


def start(cpu: bool | None = None) -> Accelerator:
    """This process among its kind; alone, where nothing was launched.

    Args:
        cpu: None takes a GPU where there is one.
    """
    import torch

    return Accelerator(cpu=not torch.accelerator.is_available() if cpu is None else cpu, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def embed(profile: Profile) -> int:
    """Embed all splits, each process its part of the clips; a killed call goes on where it was. Returns the exit code."""
    accelerator = start()
    with accelerator.main_process_first():                            # the first converts a .pt
        encoder = ClapEncoder.from_pretrained(profile.encoder, device=str(accelerator.device))
    for name in SPLITS:
        split, began = load_split(profile, name), time.perf_counter()
        embeddings = embed_split(profile, split, encoder, progress=accelerator.is_main_process, accelerator=accelerator)
        seconds = time.perf_counter() - began
        accelerator.print(f"{name}: {len(embeddings.clip_ids):,} clips embedded, {len(embeddings.skipped)} unusable, {len(split.missing)} not on disk; "
                          f"{seconds:.1f} s, {len(split) / seconds:.1f} clips/s in {accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0


def fit(profile: Profile, decoder: str, seed: int) -> int:
    """Train one decoder of Table 2 into the cache, the processes sharing its batches.

    Args:
        decoder: "text" (zero-shot, notebook 07), "raw" or "diffusion_link" (supervised, notebook 08), or another of ``dl.captioning``.
        seed: the training seed.

    Returns:
        the exit code.
    """
    accelerator = start()
    train, val = load_embeddings(profile, "train"), load_embeddings(profile, "val")
    with accelerator.main_process_first():                            # the first fits the mapping, the others read it
        planned = decoder_fit(profile, decoder, seed, train, val)
    began = time.perf_counter()
    history = planned.load(progress=True, accelerator=accelerator).history
    accelerator.print(f"{planned.path.name}: {int(history.step.iloc[-1])} steps, loss {history.loss.iloc[-1]:.3f}, {time.perf_counter() - began:.0f} s "
                      f"in {accelerator.num_processes} process(es) on {accelerator.device.type}")
    return 0
