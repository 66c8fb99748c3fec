"""Mutated sound files through the reader: ``python mutate.py FOLDER FIRST LAST SEED``, a line a file.

Originals are recordings of data/mini, as they are and in four other formats. Any outcome but finite samples or one
clear line is printed as BAD. A mutation that takes 20 s ends the process by SIGALRM, one that asks for 4 GB fails.
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

FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"),
           "ogg": ("OGG", "VORBIS")}
EXTREMES = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0")


def originals(folder: Path) -> list[tuple[str, bytes]]:
    """(suffix, content) of eight recordings, each in five formats."""
    found = []
    for path in sorted((REPO / "data/mini/recordings").rglob("*.opus"))[::125][:8]:
        found.append(("opus", path.read_bytes()))
        samples, rate = soundfile.read(path)
        for suffix, (container, subtype) in FORMATS.items():
            other = folder / f"original.{suffix}"
            soundfile.write(other, samples[: 2 * rate], rate, format=container, subtype=subtype)
            found.append((suffix, other.read_bytes()))
    return found


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to four changes; half of them in the first 200 bytes, where the headers are."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(min(len(content), 200) if rng.random() < 0.5 else len(content)) if content else 0
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        before, after = content[:place], content[place:]
        content = before + rng.choice((
            bytes(byte ^ 1 << rng.randrange(8) for byte in after[:1]) + after[1:],
            rng.randbytes(length) + after[length:],
            rng.choice(EXTREMES) + after[4:],
            b"",
            after[length:],
            after[:length] * rng.choice((1, 2, 50)) + after,
            rng.randbytes(length) + after,
        ))
    return content


def main(folder: Path, first: int, last: int, seed: int) -> None:
    kinds = originals(folder)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    for number in range(first, last):
        suffix, content = kinds[number % len(kinds)]
        path = folder / f"mutated-{number}.{suffix}"
        path.write_bytes(mutate(content, random.Random(f"{seed} {number}")))
        print(number, suffix, end=" ", flush=True)
        signal.alarm(20)
        try:
            samples = read_audio(path, 30)
            good = samples.dtype == np.float32 and samples.ndim == 1 and len(samples) <= 31 * 48_000
            print("HEARD" if good and np.isfinite(samples).all() else "BAD samples", flush=True)
        except AudioError as error:
            clear = path.name in str(error) and "\n" not in str(error) and ";" in str(error)
            print("REFUSED" if clear else f"BAD message {error!r}", flush=True)
        except Exception as error:  # noqa: BLE001, this is what is looked for
            print(f"BAD {type(error).__name__}: {error!r}", flush=True)
        signal.alarm(0)
        path.unlink()
    print("PEAK", round(peak_mb()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
