"""A whole run in small, from sounds to verdicts, that is killed again and again: ``python chain.py FOLDER ROUNDS SEED``.

The stages are the library's own, on 36 scenes of data/mini, an encoder that is a random projection, and a language model of two
random layers. One process imports everything, then forks a child for every start, so that a start costs no import. A round kills
the child once in every stage, each time by SIGKILL: at a random moment of the stage, in the middle of writing a file (of which half
is then on the disk), or before the file gets its name. The next child goes on; the last one of a round ends. Prints a JSON report.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from test_captioning import tiny_language_model
from torch.nn.functional import normalize

from dl import caption_metrics as captions
from dl import captioner_train as captioner_training
from dl import clap
from dl import store as results
from dl import train as training
from dl.caption_metrics import JavaError
from dl.clap import embed_split, load_embeddings
from dl.config import BridgeConfig, CaptionerConfig, Profile, get_profile
from dl.data import load_split
from dl.experiments import Row, caption_rows, decoder_fit, fit_system, score_and_record, score_table
from dl.report import write_claims, write_table1, write_table2
from dl.store import MetricsFile

SYSTEMS = ["raw", "mean_shift", "ridge", "diffusion_link"]
ROWS = [Row("raw"), Row("diffusion_link")]
WAYS = ("at a random moment", "in the middle of a write", "before a file gets its name")
DIM = 16


class Projection:
    """Stands for CLAP: the loudness of 64 parts of the sound, projected at random; of a caption, its letters."""

    embed_dim, weights_sha256, dtype = DIM, "projection", torch.float32

    def embed_audio(self, waveforms: list[np.ndarray]) -> torch.Tensor:
        parts = np.stack([np.array([np.abs(part).mean() for part in np.array_split(waveform, 64)]) for waveform in waveforms])
        return self._project(torch.from_numpy(parts).float() - 0.05)

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return self._project(torch.tensor([[float(text.lower().count(chr(97 + i % 26))) + len(text) % (i + 2) for i in range(64)] for text in texts]))

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(rows @ torch.randn(64, DIM, generator=torch.Generator().manual_seed(0)), dim=1)


def embeddings(profile: Profile) -> list:
    return [load_embeddings(profile, split) for split in ("train", "val", "test")]


def embedding(profile: Profile) -> None:
    for split in ("train", "val", "test"):
        embed_split(profile, load_split(profile, split), Projection(), progress=False)


def bridge_training(profile: Profile) -> None:
    train, val, _ = embeddings(profile)
    for seed in profile.seeds:
        fit_system(profile, "diffusion_link", train, seed, val=val)


def captioner_training_(profile: Profile) -> None:
    train, val, _ = embeddings(profile)
    for seed in profile.seeds:
        decoder_fit(profile, "text", seed, train, val).load()


def generation(profile: Profile) -> None:
    for seed in profile.seeds:
        caption_rows(profile, ROWS, seed, *embeddings(profile))


def metrics(profile: Profile) -> None:
    train, val, test = embeddings(profile)
    split, file = load_split(profile, "test"), MetricsFile(profile)
    _, rows = score_table(profile, SYSTEMS, train, test, split)
    file.remove(experiment="gap")
    file.add(rows)
    said = {seed: caption_rows(profile, ROWS, seed, train, val, test) for seed in profile.seeds}
    score_and_record(profile, "zero_shot", said, test, split)


def tables(profile: Profile) -> None:
    write_table1(profile)
    write_table2(profile)
    write_claims(profile)


STAGES: dict[str, Callable[[Profile], None]] = {
    "embedding": embedding, "bridge training": bridge_training, "captioner training": captioner_training_, "captions": generation,
    "metrics": metrics, "tables": tables,
}


def settings(folder: Path, language_model: Path) -> Profile:
    captioner = CaptionerConfig(language_model=str(language_model), train_steps=16, batch_size=4, warmup_steps=1, validate_every=8,
                                projector_width=16, learning_rate=0.02, max_new_tokens=5, dtype="float32")
    return get_profile("smoke", results_root=folder, max_clips={"train": 12, "val": 12, "test": 12}, bootstrap_samples=50,
                       bridge=BridgeConfig(train_steps=60, batch_size=8), captioner=captioner)


def quicken() -> None:
    """Small shards, many checkpoints, no Java: more moments at which something can go wrong, in less time."""
    clap.SHARD_SIZE = 3
    for function, every in ((training.fit, 5), (training.train_bridge, 5), (captioner_training.train_captioner, 2)):
        function.__kwdefaults__["checkpoint_every"] = every

    def no_java() -> None:
        raise JavaError("no Java")
    captions.find_java = no_java
    results.git_sha = MetricsFile.__init__.__globals__["git_sha"] = lambda: "0" * 40


@dataclass
class Trace:
    """What one start did: when each stage began (s), how many files each wrote, how it ended, what it said against."""

    began: dict[str, float] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    ended: float = 0.0
    code: int = 0
    stage: str = ""


def child(profile: Profile, pipe: int, stop: tuple[str, str, int, float] | None) -> None:
    """Run all stages, telling of each stage and each write; at the write that ``stop`` names, wait there to be killed."""
    torch.set_num_threads(1)
    stage, count = "", 0
    fsync, replace = os.fsync, os.replace

    def tell(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    def wait(kind: str) -> bool:
        return stop is not None and stop[:3] == (stage, kind, count)

    def watched_fsync(number: int) -> None:
        nonlocal count
        count += 1
        tell(f"write {stage}")
        if wait(WAYS[1]):
            os.ftruncate(number, int(os.fstat(number).st_size * stop[3]))
            tell("kill me")
            time.sleep(600)
        fsync(number)

    def watched_replace(source: Path, target: Path) -> None:
        if wait(WAYS[2]):
            tell("kill me")
            time.sleep(600)
        replace(source, target)

    results.os = type("Os", (), {**vars(os), "fsync": staticmethod(watched_fsync), "replace": staticmethod(watched_replace)})
    for stage, run in STAGES.items():
        count = 0
        tell(f"begin {stage}")
        run(profile)
        if stop is not None and stop[:2] == (stage, WAYS[0]):                   # quicker than when it was timed: the end is the moment
            tell("kill me")
            time.sleep(600)


def start(profile: Profile, kill: tuple[str, str, int, float] | None = None) -> Trace:
    """Fork a child that runs the chain, and kill it where ``kill`` says: (stage, way, which write, share of the stage's time or of the file)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(reader)
        code = 1
        try:
            child(profile, writer, kill)
            code = 0
        except BaseException as error:  # noqa: BLE001, a child must never come back
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    trace, deadline, buffer = Trace(), None, b""
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], 300 if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:                                                       # the random moment has come
                assert deadline is not None, "a stage hung for 300 s"
                break
            piece = os.read(reader, 4096)
            if not piece:
                break
            buffer += piece
            *lines, buffer = buffer.split(b"\n")
            for line in map(bytes.decode, lines):
                if line.startswith("begin "):
                    trace.stage = line[6:]
                    trace.began[trace.stage] = time.monotonic()
                    if kill and kill[:2] == (trace.stage, WAYS[0]):
                        deadline = time.monotonic() + kill[3]
                elif line.startswith("write "):
                    trace.writes[line[6:]] = trace.writes.get(line[6:], 0) + 1
            if lines and lines[-1] == b"kill me":
                break
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        trace.code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reader)
    trace.ended = time.monotonic()
    return trace


def finished(folder: Path, before: str) -> dict[str, int]:
    """The files that the stages before one have made, with the time of their last change: none may be made again."""
    patterns = {"embedding": "cache/embeddings/*.safetensors", "bridge training": "cache/fits/*.safetensors",
                "captioner training": "cache/captioners/*.safetensors", "captions": "cache/captions/*.json"}
    stages = list(STAGES)[: list(STAGES).index(before)]
    return {str(path): path.stat().st_mtime_ns for stage in stages if stage in patterns for path in (folder / "smoke").glob(patterns[stage])}


def main(folder: Path, rounds: int, seed: int) -> dict:
    """An undisturbed run in ``folder/undisturbed``, then the rounds in ``folder/round-N``; returns the report."""
    quicken()
    language_model = tiny_language_model(folder / "llama")
    whole = start(settings(folder / "undisturbed", language_model))
    assert whole.code == 0, "the undisturbed run failed"
    times = [*whole.began.values(), whole.ended]
    duration = {stage: times[i + 1] - times[i] for i, stage in enumerate(STAGES)}
    rng = random.Random(seed)
    report: dict = {"kills": [], "seconds": duration, "writes": whole.writes}
    for number in range(rounds):
        root = folder / f"round-{number}"
        profile, kept = settings(root, language_model), {}
        for place, stage in enumerate(STAGES):
            way = WAYS[(place + number) % 3]
            share = rng.random()
            trace = start(profile, (stage, way, rng.randint(1, max(1, whole.writes[stage] // 2)), share * duration[stage] if way == WAYS[0] else share))
            report["kills"].append({"round": number, "stage": stage, "way": way, "in": trace.stage, "code": trace.code,
                                    "left": len(list(root.rglob("*.tmp")))})
            kept |= finished(root, trace.stage or stage)
        last = start(profile)
        again = [path for path, changed in kept.items() if not Path(path).is_file() or Path(path).stat().st_mtime_ns != changed]
        report.setdefault("rounds", []).append({"code": last.code, "made again": again, "left": [str(path) for path in root.rglob("*.tmp")]})
    shutil.rmtree(language_model)
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
