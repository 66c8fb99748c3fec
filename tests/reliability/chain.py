"""A whole run in small that is killed again and again: ``python chain.py FOLDER ROUNDS SEED`` prints a JSON report.

The stages are the library's own, on 36 scenes of data/mini, with a random projection for CLAP and a tiny language
model. Every start is a fork, so that it costs no import. A round sends SIGKILL once in every stage: at a random
moment, in the middle of a write (half the file is then there), or before the file gets its name.
"""
from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from test_captioning import tiny_language_model
from torch.nn.functional import normalize

from dl import caption_metrics, captioner_train, clap, store, train
from dl.clap import embed_split, load_embeddings
from dl.config import SPLITS, BridgeConfig, CaptionerConfig, Profile, get_profile
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
        parts = np.stack([[np.abs(part).mean() for part in np.array_split(wave, 64)] for wave in waveforms])
        return self._project(torch.from_numpy(parts).float() - 0.05)

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return self._project(torch.tensor([[float(text.lower().count(chr(97 + i % 26))) + len(text) % (i + 2)
                                            for i in range(64)] for text in texts]))

    def _project(self, rows: torch.Tensor) -> torch.Tensor:
        return normalize(rows @ torch.randn(64, DIM, generator=torch.Generator().manual_seed(0)), dim=1)


def embeddings(profile: Profile) -> list:
    return [load_embeddings(profile, split) for split in ("train", "val", "test")]


def embedding(profile: Profile) -> None:
    for split in SPLITS:
        embed_split(profile, load_split(profile, split), Projection(), progress=False)


def bridge_training(profile: Profile) -> None:
    train, val, _ = embeddings(profile)
    for seed in profile.seeds:
        fit_system(profile, "diffusion_link", train, seed, val=val)


def captioner_training(profile: Profile) -> None:
    train, val, _ = embeddings(profile)
    for seed in profile.seeds:
        decoder_fit(profile, "text", seed, train, val).load()


def captions(profile: Profile) -> dict:
    return {seed: caption_rows(profile, ROWS, seed, *embeddings(profile)) for seed in profile.seeds}


def metrics(profile: Profile) -> None:
    train, _, test = embeddings(profile)
    split, file = load_split(profile, "test"), MetricsFile(profile)
    _, rows = score_table(profile, SYSTEMS, train, test, split)
    file.remove(experiment="gap")
    file.add(rows)
    score_and_record(profile, "zero_shot", captions(profile), test, split)


def tables(profile: Profile) -> None:
    write_table1(profile)
    write_table2(profile)
    write_claims(profile)


STAGES: dict[str, Callable[[Profile], object]] = {
    "embedding": embedding, "bridge training": bridge_training, "captioner training": captioner_training,
    "captions": captions, "metrics": metrics, "tables": tables,
}
MADE = {"embedding": "cache/embeddings/*.safetensors", "bridge training": "cache/fits/*.safetensors",
        "captioner training": "cache/captioners/*.safetensors", "captions": "cache/captions/*.json"}


def settings(folder: Path, language_model: Path) -> Profile:
    captioner = CaptionerConfig(language_model=str(language_model), train_steps=16, batch_size=4, warmup_steps=1,
                                validate_every=8, projector_width=16, learning_rate=0.02, max_new_tokens=5,
                                dtype="float32")
    return get_profile("smoke", results_root=folder, max_clips=dict.fromkeys(SPLITS, 12), bootstrap_samples=50,
                       bridge=BridgeConfig(train_steps=60, batch_size=8), captioner=captioner)


def quicken() -> None:
    """Small shards, many checkpoints, no Java: more moments at which something can go wrong, in less time."""
    clap.SHARD_SIZE = 3
    for function, every in ((train.fit, 5), (train.train_bridge, 5), (captioner_train.train_captioner, 2)):
        function.__kwdefaults__["checkpoint_every"] = every

    def no_java() -> None:
        raise caption_metrics.JavaError("no Java")
    caption_metrics.find_java = no_java
    store.git_sha = lambda: "0" * 40


Kill = tuple[str, str, int, float]          # stage, way, which write, seconds in the stage or share of the file


@dataclass
class Trace:
    """What one start did: when each stage began (s), how many files each wrote, when and how it ended."""

    began: dict[str, float] = field(default_factory=dict)
    writes: Counter = field(default_factory=Counter)
    ended: float = 0.0
    code: int = 0
    stage: str = ""


def child(profile: Profile, pipe: int, kill: Kill | None) -> None:
    """Run all stages, tell of each stage and each write, and wait to be killed where ``kill`` says."""
    torch.set_num_threads(1)
    stage, count = "", 0
    fsync, replace = os.fsync, os.replace

    def tell(text: str) -> None:
        os.write(pipe, f"{text}\n".encode())

    def wait() -> None:
        tell("kill")
        time.sleep(600)

    def watched_fsync(number: int) -> None:
        nonlocal count
        count += 1
        tell(f"write {stage}")
        if kill and kill[:3] == (stage, WAYS[1], count):
            os.ftruncate(number, int(os.fstat(number).st_size * kill[3]))
            wait()
        fsync(number)

    def watched_replace(source: Path, target: Path) -> None:
        if kill and kill[:3] == (stage, WAYS[2], count):
            wait()
        replace(source, target)

    watched = {"fsync": staticmethod(watched_fsync), "replace": staticmethod(watched_replace)}
    store.os = type("Os", (), {**vars(os), **watched})
    for stage, run in STAGES.items():
        count = 0
        tell(f"begin {stage}")
        run(profile)
        if kill and kill[:2] == (stage, WAYS[0]):           # quicker than when it was timed: the end is the moment
            wait()


def start(profile: Profile, kill: Kill | None = None) -> Trace:
    """Fork a child that runs the chain, and kill it where ``kill`` says."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        code = 1
        try:
            child(profile, writer, kill)
            code = 0
        except BaseException as error:  # noqa: BLE001, a child must never come back
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(writer)
    trace, timer = Trace(), None
    with open(reader, encoding="utf-8") as told:
        for line in told:
            what, _, stage = line.strip().partition(" ")
            if what == "begin":
                trace.stage, trace.began[stage] = stage, time.monotonic()
                if kill and kill[:2] == (stage, WAYS[0]):
                    timer = threading.Timer(kill[3], os.killpg, (pid, signal.SIGKILL))
                    timer.start()
            elif what == "write":
                trace.writes[stage] += 1
            else:
                os.killpg(pid, signal.SIGKILL)
    if timer:
        timer.cancel()
        timer.join()
    trace.code, trace.ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), time.monotonic()
    return trace


def finished(folder: Path, before: str) -> dict[Path, int]:
    """The files that the stages before one have made, with the time of their last change: none may be made again."""
    stages = list(STAGES)[: list(STAGES).index(before)]
    return {path: path.stat().st_mtime_ns
            for stage in stages for path in (folder / "smoke").glob(MADE.get(stage, "nothing"))}


def main(folder: Path, rounds: int, seed: int) -> dict:
    """An undisturbed run in ``folder/undisturbed``, then the rounds in ``folder/round-N``; returns the report."""
    quicken()
    language_model = tiny_language_model(folder / "llama")
    whole = start(settings(folder / "undisturbed", language_model))
    assert whole.code == 0, "the undisturbed run failed"
    times = [*whole.began.values(), whole.ended]
    duration = {stage: times[i + 1] - times[i] for i, stage in enumerate(STAGES)}
    rng = random.Random(seed)
    report: dict = {"kills": [], "rounds": []}
    for number in range(rounds):
        root = folder / f"round-{number}"
        profile, kept = settings(root, language_model), {}
        for place, stage in enumerate(STAGES):
            way, share = WAYS[(place + number) % 3], rng.random()
            write = rng.randint(1, max(1, whole.writes[stage] // 2))
            trace = start(profile, (stage, way, write, share * duration[stage] if way == WAYS[0] else share))
            report["kills"].append({"round": number, "stage": stage, "way": way, "in": trace.stage,
                                    "code": trace.code, "left": len(list(root.rglob("*.tmp")))})
            kept |= finished(root, trace.stage or stage)
        code = start(profile).code
        again = [str(path) for path, time in kept.items() if not path.is_file() or path.stat().st_mtime_ns != time]
        report["rounds"].append({"code": code, "made again": again, "left": list(map(str, root.rglob("*.tmp")))})
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
