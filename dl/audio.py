"""Sound files, opened with distrust: what a header says is checked before memory is asked for, and a file that is cut off says so.

libsndfile reads a truncated WAV, MP3 or Ogg file without a word, as a shorter sound. Here its end is compared with what it announces.
"""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

RATES = range(1_000, 768_001)                 # Hz [ours]; a header beyond it is damaged, and resampling it would fill the memory
MOST_CHANNELS = 64                            # [ours] the same
UNKNOWN_LENGTH = 0x7FFF0000                   # bytes; a WAV written into a pipe announces about this or more, and means "until the end"
ANNOUNCED = re.compile(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)    # libsndfile's log of a header
FORMATS = "give a WAV, FLAC, Ogg, Opus or MP3 file"


class AudioError(ValueError):
    """A sound that cannot be used; the message names the file and the reason."""


@contextmanager
def open_audio(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """Open any file that soundfile understands; an error inside the block counts as the file's.

    Raises:
        AudioError: absent, a folder, not to be read, not audio, a header that cannot be true; the message names the file.
    """
    if os.path.isdir(path):
        raise AudioError(f"{path}: is a folder; name the files in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise AudioError(f"{path}: is a pipe or a device, not a file; {FORMATS}")
    try:
        with open(path, "rb"):                                                     # says "permission denied" where soundfile says "system error"
            pass
        with soundfile.SoundFile(os.fsencode(path)) as file:                        # bytes: a name need not be UTF-8
            if file.samplerate not in RATES or file.channels > MOST_CHANNELS:
                raise AudioError(f"{path}: its header says {file.samplerate} Hz and {file.channels} channels, which cannot be true; export it again")
            yield file
    except PermissionError:
        raise AudioError(f"{path}: may not be read (permission denied); change its mode or owner") from None
    except FileNotFoundError:
        reason = "is a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise AudioError(f"{path}: {reason}; {FORMATS}") from None
    except (soundfile.LibsndfileError, OSError, RuntimeError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split()).replace(repr(os.fsencode(path)), "it")[:120]
        raise AudioError(f"{path}: not readable as audio ({reason}); {FORMATS}") from None


def read_mono(path: str | Path, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """The samples of a file, channels averaged, at most its first ``seconds``.

    Read piece by piece: memory follows what is in the file, never what its header says.

    Returns:
        (float32 (samples,), sampling rate in Hz).

    Raises:
        AudioError: see :func:`open_audio`; also a file that ends before it should.
    """
    with open_audio(path) as file:
        wanted = float("inf") if seconds is None else seconds * file.samplerate
        pieces, count = [], 0
        while count < wanted and len(piece := file.read(int(min(1 << 16, wanted - count)), dtype="float32", always_2d=True)):
            pieces.append(piece.mean(axis=1))                                       # (samples, channels) -> (samples,)
            count += len(piece)
        if count < wanted:
            check_end(path, file, count)
        return np.concatenate([np.empty(0, np.float32), *pieces]), file.samplerate


def check_end(path: str | Path, file: soundfile.SoundFile, count: int) -> None:
    """Compare where a file ended, after ``count`` frames, with what it announces.

    Raises:
        AudioError: more than 0.1 s and 1 % are missing, or the last page of an Ogg stream is not there.
    """
    expected = file.frames
    if found := ANNOUNCED.search(file.extra_info):
        announced, present = map(int, found.groups())
        if present < announced < UNKNOWN_LENGTH:
            expected = round(count * announced / max(present, 1))
    if 0 <= expected < 1 << 62 and expected - count > max(0.1 * file.samplerate, 0.01 * expected):
        raise AudioError(f"{path}: is cut off after {count / file.samplerate:.1f} s of {expected / file.samplerate:.1f} s; copy or download it again")
    if file.format == "OGG" and not _has_last_page(path):
        raise AudioError(f"{path}: is cut off after {count / file.samplerate:.1f} s, its last page is missing; copy or download it again")


def _has_last_page(path: str | Path) -> bool:
    """Whether the last page of an Ogg file ends its stream: bit 4 of the byte after ``OggS`` and the version. A page has at most 65,307 bytes."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - 65_307))
        tail = file.read()
    place = tail.rfind(b"OggS")
    return place >= 0 and len(tail) > place + 5 and bool(tail[place + 5] & 4)
