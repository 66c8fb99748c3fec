"""``python -m dl caption``: captions of the user's own sound files, window by window.

encoder -> bridge -> captioner, nothing else. A file of any length is read in windows of 10 s, what the encoder hears at once
[paper~], so that an hour of sound takes no more memory than a minute. A file that cannot be used is named with the reason and
what to do; the others are done all the same.
"""
from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dl.audio import AudioError, check_end, open_audio
from dl.bridge.network import DiffusionLink
from dl.captioner.captioner import LLMCaptioner
from dl.config import Profile
from dl.data import SHORTEST_S, SILENCE, check_waveform
from dl.encoder.clap import ClapEncoder

WINDOW_S = 10                 # s, what the encoder hears [paper~]
TAIL_S = 1.0                  # s, a shorter rest after a full window has no caption of its own [ours]
BATCH = 32                    # windows that go through encoder, bridge and captioner at once

Window = tuple[float, float, np.ndarray | None]
Captions = Callable[[list[np.ndarray]], list[str]]


class MissingWeights(FileNotFoundError):
    """A model that ``caption`` needs is not there; the message says which command makes it."""


def read_windows(path: str | Path) -> Iterator[Window]:
    """Read a file in windows of 10 s: mono (channels averaged), float32, 48 kHz.

    A rest shorter than 1 s after a full window is left out; a file shorter than 1 s is one window.

    Args:
        path: any file that soundfile reads, at any sampling rate, with any number of channels.

    Yields:
        (start in s, end in s, samples (n,)), or None in place of the samples where the window is silent (peak below -100 dBFS).

    Raises:
        AudioError: not there, not audio, empty, shorter than 0.05 s, silent from end to end, or with NaN or infinite samples.
            It may come after some windows (a damaged end); the message names the file and says what to do.
    """
    path, heard, place, count = Path(path), False, 0, 0
    with open_audio(path) as file:
        rate = file.samplerate
        while True:
            samples = file.read(WINDOW_S * rate, dtype="float32", always_2d=True)    # (samples, channels)
            start, seconds, count = place * WINDOW_S, len(samples) / rate, count + len(samples)
            if seconds < (TAIL_S if place else SHORTEST_S):
                check_end(path, file, count)
                if not place:
                    raise AudioError(f"{path}: {len(samples)} samples at {rate} Hz are too short; give at least {SHORTEST_S} s")
                break
            waveform, place = samples.mean(axis=1), place + 1
            silent = np.abs(waveform).max() < SILENCE                                # False for NaN, which check_waveform names
            heard |= not silent
            yield start, start + seconds, None if silent else check_waveform(waveform, rate, str(path))
    if not heard:
        raise AudioError(f"{path}: silent (peak below -100 dBFS); choose another file")


def load_models(profile: Profile, bridge: bool = True) -> tuple[ClapEncoder, DiffusionLink | None, LLMCaptioner]:
    """Load the profile's encoder, bridge (None where it is not wanted) and captioner.

    Args:
        profile: its ``results_dir/checkpoints`` holds ``bridge`` and ``captioner``.

    Raises:
        MissingWeights: a checkpoint is absent, or was made for another encoder.
    """
    folder = profile.results_dir / "checkpoints"
    stages = {"captioner": "07"} | ({"bridge": "05"} if bridge else {})
    for name, stage in stages.items():
        if not (folder / name / "config.json").is_file():
            raise MissingWeights(f"the {name} of profile {profile.name} is missing ({folder / name}): "
                                 f"make it with ./run_all.sh --profile {profile.name} --only {stage}")
    remedies = {name: f"./run_all.sh --profile {profile.name} --only {stage} --force" for name, stage in stages.items()}
    captioner = opened(LLMCaptioner, folder / "captioner", remedies).to("cuda" if torch.cuda.is_available() else "cpu")
    link = opened(DiffusionLink, folder / "bridge", remedies) if bridge else None
    encoder = ClapEncoder.from_pretrained(profile.encoder)
    widths = {name: model.embed_dim for name, model in (("captioner", captioner), ("bridge", link)) if model is not None}
    for name, width in widths.items():
        if width != encoder.embed_dim:
            raise MissingWeights(f"the {name} of profile {profile.name} takes vectors of {width} numbers, the encoder {profile.encoder} gives "
                                 f"{encoder.embed_dim}: make it anew with {remedies[name]}")
    return encoder, link, captioner


def bridged(link: DiffusionLink, audio_emb: torch.Tensor) -> torch.Tensor:
    """(B, D) -> (B, D) through the bridge, whose noise starts from seed 0 at every call: a file has the same captions whatever stands beside it."""
    return link(audio_emb, generator=torch.Generator().manual_seed(0))


def load_captions(profile: Profile, bridge: bool = True) -> Captions:
    """Load the profile's encoder, bridge and captioner.

    Args:
        profile: its ``results_dir/checkpoints`` holds ``bridge`` and ``captioner``.
        bridge: False feeds the raw audio vectors to the captioner.

    Returns:
        a function: list of waveforms (samples,) float32 at 48 kHz -> list of captions.

    Raises:
        MissingWeights: see :func:`load_models`.
    """
    encoder, link, captioner = load_models(profile, bridge)

    def captions(waveforms: list[np.ndarray]) -> list[str]:
        vectors = encoder.embed_audio(waveforms)                                     # (B, D)
        return captioner.generate(vectors if link is None else bridged(link, vectors))

    return captions


def opened(kind: Any, folder: Path, remedies: dict[str, str]) -> torch.nn.Module:
    """``kind.from_pretrained(folder)``, whose weights must be numbers.

    Raises:
        MissingWeights: the weights hold NaN; the folder's remedy makes them anew.
        ValueError, OSError, ModuleNotFoundError: what the model itself says in one line.
    """
    model = kind.from_pretrained(folder)
    if not all(torch.isfinite(value).all() for value in model.parameters()):
        raise MissingWeights(f"the {folder.name} in {folder} has weights that are NaN or infinite: make it anew with {remedies[folder.name]}")
    return model


def caption_file(path: str | Path, captions: Captions) -> Iterator[dict]:
    """Caption one file.

    Yields:
        a dict a window: ``file``, ``start_s``, ``end_s`` and ``caption``, which is None with a ``note`` where the window is silent.

    Raises:
        AudioError: see :func:`read_windows`.
    """
    waiting: list[Window] = []

    def done() -> Iterator[dict]:
        sounds = [waveform for _, _, waveform in waiting if waveform is not None]
        texts = iter(captions(sounds) if sounds else [])
        for start, end, waveform in waiting:
            text = {"caption": None, "note": "silent"} if waveform is None else {"caption": next(texts)}
            yield {"file": str(path), "start_s": round(start, 3), "end_s": round(end, 3), **text}
        waiting.clear()

    try:
        for window in read_windows(path):
            waiting.append(window)
            if len(waiting) == BATCH:
                yield from done()
    except AudioError:
        if any(waveform is not None for _, _, waveform in waiting):                  # what came before the damage has its captions
            yield from done()
        raise
    yield from done()


def caption_files(paths: Iterable[str | Path], profile: Profile, bridge: bool = True, as_json: bool = False) -> int:
    """What ``python -m dl caption`` does: a line a window on stdout, a line a failed file on stderr.

    With ``as_json`` one JSON list on stdout: an entry a window, and ``{"file", "error"}`` for a file that failed.

    Returns:
        Exit code: 0, or 1 if a file failed or the weights are missing.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():      # stdout is for captions, stderr for files
            warnings.simplefilter("ignore")
            captions = load_captions(profile, bridge)
    except (MissingWeights, ModuleNotFoundError, ValueError, OSError) as error:     # absent, or damaged: each says what to do
        print(f"caption: {printable(str(error))}", file=sys.stderr)
        return 1
    entries, failed = [], 0
    for path in paths:
        try:
            for entry in caption_file(path, captions):
                entries.append(entry)
                if not as_json:
                    text = printable(entry["caption"]) if entry["caption"] is not None else f"({entry['note']})"
                    print(f"{printable(str(path))}  {clock(entry['start_s'])}-{clock(entry['end_s'])}  {text}", flush=True)
        except ValueError as error:                                                 # AudioError, or vectors that a model refuses
            failed = 1
            reason = str(error).removeprefix(f"{Path(path)}: ")
            entries.append({"file": str(path), "error": reason})
            print(f"caption: {printable(f'{Path(path)}: {reason}')}", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps(entries, indent=1))
    return failed


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:05``; tenths where there are some: ``0:10.5``."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{minutes // 60}:{minutes % 60:02d}:{text}" if minutes >= 60 else f"{minutes}:{text}"


def printable(text: str) -> str:
    """Text for a terminal: control characters, line ends and undecodable bytes of a file name are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
