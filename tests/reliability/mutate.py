"""Mutated sound files through the reader: ``python mutate.py FOLDER FIRST LAST SEED``, a line a file, so that a crash shows which one.

Originals are recordings of data/mini as they are and in four other formats. Any outcome but finite samples or one clear line is
printed as BAD; a mutation that takes longer than 20 s ends the process by SIGALRM, one that asks for more than 4 GB fails.
"""
from __future__ import annotations

import random
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import soundfile
from ledger import peak_mb

from dl.config import REPO
from dl.data import AudioError, read_audio

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"), "ogg": ("OGG", "VORBIS")}
SECONDS_EACH, MEMORY = 20, 4 << 30


def originals() -> list[tuple[str, bytes]]:
    """(suffix, content) of eight recordings, each in five formats."""
    found = []
    for path in sorted((REPO / "data/mini/recordings").rglob("*.opus"))[::125][:8]:
        found.append(("opus", path.read_bytes()))
        samples, rate = soundfile.read(path)
        for suffix, (container, subtype) in FORMATS.items():
            other = Path(sys.argv[1]) / f"original.{suffix}"
            soundfile.write(other, samples[: 2 * rate], rate, format=container, subtype=subtype)
            found.append((suffix, other.read_bytes()))
            other.unlink()
    return found


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes; half of them in the first 200 bytes, where the headers are."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data)) if data else 0
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        kind = rng.choice(("flip", "random", "extreme", "cut", "remove", "repeat", "insert"))
        if kind == "flip":
            data[place: place + 1] = bytes([data[place] ^ 1 << rng.randrange(8)]) if data else b""
        elif kind == "random":
            data[place: place + length] = rng.randbytes(length)
        elif kind == "extreme":
            data[place: place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"))
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place: place + length]
        elif kind == "repeat":
            data[place: place] = data[place: place + length] * rng.choice((1, 2, 50))
        else:
            data[place: place] = rng.randbytes(length)
    return bytes(data)


def main(folder: Path, first: int, last: int, seed: int) -> None:
    kinds = originals()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(first, last):
        rng = random.Random(f"{seed} {number}")
        suffix, content = kinds[number % len(kinds)]
        path = folder / f"mutated-{number}.{suffix}"
        path.write_bytes(mutate(content, rng))
        print(number, suffix, end=" ", flush=True)
        signal.alarm(SECONDS_EACH)
        try:
            samples = read_audio(path, 30)
            good = samples.dtype == np.float32 and samples.ndim == 1 and np.isfinite(samples).all() and len(samples) <= 31 * 48_000
            print("HEARD" if good else "BAD samples", flush=True)
        except AudioError as error:
            print("REFUSED" if path.name in str(error) and "\n" not in str(error) and ";" in str(error) else f"BAD message {error!r}", flush=True)
        except Exception as error:  # noqa: BLE001, this is what is looked for
            print(f"BAD {type(error).__name__}: {error!r}", flush=True)
        signal.alarm(0)
        path.unlink()
    print("PEAK", round(peak_mb()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
