"""Sound in a notebook: small players, and the one clip that runs through all notebooks."""
from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from dl.data import Split

if TYPE_CHECKING:
    from IPython.display import HTML

PLAYER_RATE = 24_000          # Hz
OPUS_LEVEL = 0.95             # libsndfile's compression level: about 21 kbit/s, 3.5 kB a second in the notebook
THREAD_LABEL = "a dog barks"  # what the thread clip sounds like


def audio_player(waveform: np.ndarray, sampling_rate: int, title: str = "") -> HTML:
    """A player for a notebook: the sound goes into it as Ogg Opus at 24 kHz, below 24 kbit/s (a WAV player would be megabytes).

    Args:
        waveform: float32 (samples,), mono, in [-1, 1].
        sampling_rate: in Hz.
        title: a line above the player, plain text.

    Returns:
        ``IPython.display.HTML``; the last expression of a cell, or an argument of ``display``, shows it.

    Example:
        >>> audio_player(split.waveform(0), 48_000, "a dog barks")
    """
    from IPython.display import HTML

    sound = soxr.resample(np.asarray(waveform, dtype=np.float32), sampling_rate, PLAYER_RATE)
    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), PLAYER_RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
    source = "data:audio/ogg;base64," + base64.b64encode(file.getvalue()).decode()
    line = f"<div>{html.escape(title)}</div>" if title else ""
    return HTML(f'{line}<audio controls preload="none" style="height: 2em" src="{source}"></audio>')


def thread_clip(split: Split) -> str:
    """The id of the clip that every notebook looks at: the first dog that barks alone, ``mini-train-00015_0`` in train.

    In ``data/mini`` the first scene whose only label is "a dog barks"; in AudioCaps, which has no labels, the first clip
    whose first caption speaks of a dog that barks. It serves to see and to hear, never to score.

    Raises:
        ValueError: the split has no such clip.
    """
    if "labels" in split.frame:
        barks = split.frame.labels.eq(THREAD_LABEL).tolist()
    else:
        barks = ["dog" in captions[0].lower() and "bark" in captions[0].lower() for captions in split.captions]
    if True not in barks:
        raise ValueError(f"no clip of split '{split.name}' is a barking dog: ask for split 'train'")
    return split.clip_ids[barks.index(True)]
