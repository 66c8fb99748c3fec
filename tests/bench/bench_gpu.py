"""Speed and memory of the paper profile's parts on one GPU, with random weights and data of the real shapes.

    python tests/bench/bench_gpu.py --out results [--budget-seconds 360] [--tiny]

writes ``bench_gpu.csv`` into the folder, each row the moment it is measured; nothing is downloaded. Random weights
cost what trained ones cost, but a random decoder never ends a caption: generation is timed at its longest. What
fails, or comes too late, stands in the file as "not measured" with the reason. ``--tiny`` runs the same code in
seconds on a CPU; its numbers mean nothing.

Rates count useful work: TFLOP/s of a matrix product (m, k) x (k, n) are 2 m k n / s, GB/s of a copy are bytes read
plus written. The captioner's step, for B captions of S positions of which M have a loss, N parameters in the layers
and H in the output matrix:

    forward   F = 2 B (S N + M H)     attention over S < 40 positions, LoRA and projector, 0.1 % each, are left out
    model         2 F                 gradients to activations cost as much; the frozen weights have none
    hardware      2 F + 2 B S N       gradient checkpointing computes the layers' forward pass once more

Utilisation is model (hardware) FLOP / s over the measured rate of the 8192^3 product. A decoding step reads at least
the 2 (N + H) bytes of the bfloat16 weights; steps x that / s, over the measured copy rate, is the share of bandwidth.
"""
from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # before any import of huggingface_hub reads it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from models import captioner_steps, matrix_sizes, product_factors, random_captioner
from recorder import GIB, Recorder, stopwatch, versions
from torch import nn

from dl.config import BridgeConfig, CaptionerConfig, get_profile
from dl.store import device_name

COLUMNS = ("section", "name", "value", "unit", "batch", "seq_len", "dtype", "repeats", "value_min", "value_max",
           "card", "torch", "transformers", "peft", "status", "reason")
PAPER = get_profile("paper")
BRIDGE = replace(PAPER.bridge, train_steps=350)
CAPTIONER = replace(PAPER.captioner, language_model="random Llama", revision=None, patience=0, train_steps=15)
CLIPS = {"train": 49_838, "val": 495, "test": 975}                   # AudioCaps 1.0
CAPTIONS = CLIPS["train"] + 5 * (CLIPS["val"] + CLIPS["test"])       # one a clip in train, five in val and test
DECODERS, CAPTION_ROWS = 3, 7      # of a default run: dl.experiments's zero_shot_rows and supervised_rows
CAPTION_TOKENS = 20                # of a caption with its eos
NEW_TOKENS = 30
LAYER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
HTSAT = {"spec_size": 64, "window_size": 2, "depths": [1, 1, 1, 1], "patch_embeds_hidden_size": 16,
         "num_attention_heads": [1, 1, 2, 2], "hidden_size": 128}


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the paper profile's."""

    matrix: int = 8192                           # rows and columns of the product that sets the ceiling
    copied: int = 2**29                          # float32 numbers
    repeats: int = 20
    pairs: int = CLIPS["train"]
    embed_dim: int = 512
    bridge: BridgeConfig = BRIDGE
    bridge_warmup: int = 50
    vectors: int = 1000                          # of a timed call of the bridge
    clap: dict = field(default_factory=dict)     # fields of ClapConfig's parts that are not the defaults
    clap_batches: tuple[int, ...] = (1, 16, 64, 128)
    seconds: float = 10                          # of a clip
    llama: dict = field(default_factory=dict)    # fields of LlamaConfig: its defaults are Llama-2-7B
    captioner: CaptionerConfig = CAPTIONER
    train_batches: tuple[int, ...] = (16, 64)
    clips: int = 64                              # captions generated in a batch
    new_tokens: int = NEW_TOKENS


TINY = Sizes(
    matrix=64, copied=2**14, repeats=2, pairs=96, embed_dim=16, vectors=8, clap_batches=(1, 16), seconds=0.5,
    bridge=replace(BRIDGE, train_steps=6, batch_size=16), bridge_warmup=2,
    clap={"text_config": LAYER, "audio_config": HTSAT},
    llama={**LAYER, "vocab_size": 256, "max_position_embeddings": 128},
    captioner=replace(CAPTIONER, train_steps=4, projector_width=24, lora_r=2),
    train_batches=(16,), clips=4, new_tokens=4)


class GpuRecorder(Recorder):
    """Rows of bench_gpu.csv."""

    def record(self, section: str, name: str, unit: str, values: float | list[float], reason: str = "",
               **cells: object) -> None:
        """The median of ``values``, one for each repeat, with their least and greatest; or one derived number."""
        values = values if isinstance(values, list) else [values]
        self.add(section, name, value=statistics.median(values), unit=unit, repeats=len(values), value_min=min(values),
                 value_max=max(values), reason=reason, **cells)

    def attempt(self, *given, **cells) -> None:
        """As the base class, with a fresh count of the GPU's memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        super().attempt(*given, **cells)

    def peak_memory(self, section: str, suffix: str = "", **cells: object) -> None:
        """GiB that tensors held at most since the measurement began; nothing without a GPU."""
        if torch.cuda.is_available():
            self.record(section, f"peak_memory{suffix}", "GiB", torch.cuda.max_memory_allocated() / GIB, **cells)


def ceilings(bench: GpuRecorder, sizes: Sizes, device: torch.device) -> None:
    """What the card can do at all: a bfloat16 matrix product, and a copy within its memory."""
    def product() -> None:
        n = sizes.matrix
        left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        times = stopwatch(lambda: left @ right, sizes.repeats, calls=10)
        bench.record("ceilings", "matmul_square", "TFLOP/s", [2e-12 * n**3 / t for t in times],
                     f"({n}, {n}) x ({n}, {n})", batch=n, dtype="bfloat16")

    def copy() -> None:
        source = torch.randn(sizes.copied, device=device)
        target = torch.empty_like(source)
        times = stopwatch(lambda: target.copy_(source), sizes.repeats, calls=10)
        bench.record("ceilings", "copy", "GB/s", [2e-9 * 4 * sizes.copied / t for t in times],
                     "bytes read plus written, device to device")

    bench.attempt("ceilings", "matmul_square", product)
    bench.attempt("ceilings", "copy", copy)


def bridge(bench: GpuRecorder, sizes: Sizes, device: torch.device) -> None:
    """``train_bridge`` on random pairs, its matrix products alone, and calls of an untrained bridge."""
    from dl.bridge import DiffusionLink
    from dl.peers import DiffusionBridge
    from dl.train import train_bridge

    config, where = sizes.bridge, {"batch": sizes.bridge.batch_size, "dtype": "float32"}
    audio, text = (nn.functional.normalize(torch.randn(sizes.pairs, sizes.embed_dim), dim=1).to(device)
                   for _ in range(2))
    pairs = torch.arange(sizes.pairs)

    def train() -> None:
        marks: list[float] = []
        train_bridge(config, audio, text, pairs, seed=0, progress=False,
                     callback=lambda *_: marks.append(time.perf_counter()))
        marks = marks[sizes.bridge_warmup - 1 :]
        times = [later - earlier for earlier, later in pairwise(marks)]
        bench.record("bridge_train", "step_time", "s", times, "batches and noise are drawn on the CPU", **where)
        bench.peak_memory("bridge_train", **where)

    def products() -> None:
        factors = product_factors(config, sizes.embed_dim, device)
        times = stopwatch(lambda: [torch.mm(a, b, out=out) for a, b, out in factors], sizes.repeats, calls=10)
        bench.record("bridge_train", "products_time", "s", times,
                     f"the {len(factors)} matrix products of a step and its gradient, nothing else", **where)
        step = bench.value("bridge_train", "step_time")
        bench.record("bridge_train", "products_share", "share", [t / step for t in times],
                     "products_time / step_time", **where)

    def call(name: str) -> None:
        link, noise = DiffusionLink.from_config(config, sizes.embed_dim).to(device), torch.Generator().manual_seed(0)
        run = {"one_step": lambda x: link(x, 50, 1, generator=noise),
               "ddim_5_steps": lambda x: link(x, 50, 5, generator=noise),
               "diffusion_bridge_5_steps": DiffusionBridge(train_steps=2).fit(audio, text, pairs)}[name]
        times = stopwatch(lambda: run(audio[: sizes.vectors]), sizes.repeats, warmup=3)
        bench.record("bridge_inference", name, "ms per 1,000 vectors", [1e6 * t / sizes.vectors for t in times],
                     batch=sizes.vectors, dtype="float32")

    bench.attempt("bridge_train", "step_time", train, **where)
    bench.attempt("bridge_train", "products_time", products, **where)
    for name in ("one_step", "ddim_5_steps", "diffusion_bridge_5_steps"):
        bench.attempt("bridge_inference", name, call, name, batch=sizes.vectors)


def htsat_embed(bench: GpuRecorder, sizes: Sizes, device: torch.device) -> None:
    """transformers' ``ClapModel`` in its default configuration, HTSAT-tiny as in laion/clap-htsat-unfused."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    frames, length = int(100 * sizes.seconds) + 1, int(48_000 * sizes.seconds)
    model = cache(lambda: ClapModel(ClapConfig(**sizes.clap)).eval().to(device))

    def audio(where: dict) -> None:
        batch = where["batch"]
        inputs = {"input_features": torch.randn(batch, 1, frames, 64, device=device),
                  "is_longer": torch.zeros(batch, 1, dtype=torch.bool, device=device)}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=where["dtype"] != "float32"):
            times = stopwatch(lambda: model().get_audio_features(**inputs), sizes.repeats, warmup=3)
        bench.record("htsat_embed", "clips_per_s", "clips/s", [batch / t for t in times],
                     "on the device, log-mels in its memory", **where)
        bench.peak_memory("htsat_embed", **where)

    def text(where: dict) -> None:
        batch = where["batch"]
        words = model().config.text_config.vocab_size
        ids = torch.randint(5, 50_000, (batch, CAPTION_TOKENS), device=device) % words
        with torch.inference_mode():
            times = stopwatch(lambda: model().get_text_features(ids, torch.ones_like(ids)), sizes.repeats, warmup=3)
        bench.record("htsat_embed", "captions_per_s", "captions/s", [batch / t for t in times], **where)

    def features(where: dict) -> None:
        batch = where["batch"]
        extractor, sounds = ClapFeatureExtractor(), list(torch.randn(batch, length).numpy())
        times = stopwatch(lambda: extractor(sounds, sampling_rate=48_000, truncation="rand_trunc", padding="repeatpad",
                                            return_tensors="pt"), repeats=3)
        bench.record("htsat_embed", "features_per_s", "clips/s", [batch / t for t in times],
                     "log-mels by transformers on the CPU, one process", **where)

    parts = [("clips_per_s", audio, batch, frames, dtype)
             for dtype in ("float32", "bfloat16 autocast") for batch in sizes.clap_batches]
    parts += [("captions_per_s", text, 64, CAPTION_TOKENS, "float32"),
              ("features_per_s", features, 16, frames, "float32")]
    for name, measure, batch, seq_len, dtype in parts:
        where = {"batch": batch, "seq_len": seq_len, "dtype": dtype}
        bench.attempt("htsat_embed", name, measure, where, **where)


def llama(bench: GpuRecorder, sizes: Sizes, device: torch.device) -> None:
    """Steps of ``train_captioner`` on captions of 20 tokens, then ``LLMCaptioner.generate``, on a random Llama."""
    captioner = cache(lambda: random_captioner(sizes.embed_dim, sizes.captioner, sizes.llama, device))

    def step(batch: int, checkpointing: bool, suffix: str) -> None:
        times, length = captioner_steps(captioner(), batch, checkpointing, CAPTION_TOKENS)
        times = times[2:] or times
        model = captioner().language_model
        where = {"batch": batch, "seq_len": length, "dtype": str(model.dtype).removeprefix("torch.")}
        layers, head = matrix_sizes(model.config)
        flop = 4 * batch * (length * layers + CAPTION_TOKENS * head)
        bench.record("llama_train", f"step_time{suffix}", "s", times, **where)
        bench.peak_memory("llama_train", suffix, **where)
        shares = [1e-12 * flop / t / bench.value("ceilings", "matmul_square") for t in times]
        bench.record("llama_train", f"model_utilisation{suffix}", "share", shares,
                     "2 F / step_time / matmul_square", **where)
        if checkpointing:
            more = 1 + 2 * batch * length * layers / flop
            bench.record("llama_train", f"hardware_utilisation{suffix}", "share", [more * share for share in shares],
                         "(2 F + 2 B S N) / step_time / matmul_square", **where)

    def generate(num_beams: int, suffix: str) -> None:
        model, calls = captioner().eval().language_model, []
        embeddings, repeats = torch.randn(sizes.clips, sizes.embed_dim), min(3, sizes.repeats)
        hook = model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
        try:
            times = stopwatch(lambda: captioner().generate(embeddings, num_beams=num_beams, batch_size=sizes.clips,
                                                           max_new_tokens=sizes.new_tokens), repeats)
        finally:
            hook.remove()
        steps = len(calls) / (repeats + 1)
        where = {"batch": sizes.clips, "seq_len": sizes.new_tokens, "dtype": str(model.dtype).removeprefix("torch.")}
        read = 1e-9 * model.dtype.itemsize * sum(matrix_sizes(model.config))
        bench.record("llama_generate", f"clips_per_s{suffix}", "clips/s", [sizes.clips / t for t in times],
                     f"{steps:.0f} steps, the prompt's among them", **where)
        bench.peak_memory("llama_generate", suffix, **where)
        shares = [read * steps / t / bench.value("ceilings", "copy") for t in times]
        bench.record("llama_generate", f"bandwidth_share{suffix}", "share", shares,
                     f"{read:.3g} GB of weights x steps / s / copy", **where)

    for batch in sizes.train_batches:
        for checkpointing, suffix in ((True, "_checkpointed"), (False, "")):
            bench.attempt("llama_train", f"step_time{suffix}", step, batch, checkpointing, suffix, batch=batch)
    for num_beams, suffix in ((4, "_beam_4"), (1, "_greedy")):
        bench.attempt("llama_generate", f"clips_per_s{suffix}", generate, num_beams, suffix, batch=sizes.clips)


def estimate(bench: GpuRecorder) -> None:
    """Hours of a default run of the paper profile, by parts. Decoding sounds and scoring are left out."""
    clips, seeds, steps = sum(CLIPS.values()), len(PAPER.seeds), PAPER.bridge.train_steps
    config, caption_seeds = PAPER.captioner, len(PAPER.caption_seeds)
    step = {"batch": config.batch_size}
    encoder = {"batch": 16, "dtype": "float32"}      # as dl embeds
    captions = CAPTION_ROWS * CLIPS["test"]
    parts = {      # name: how many, formula, where the rate or the time of one stands
        "embed_features": (clips, "clips / features_per_s", ("htsat_embed", "features_per_s", encoder)),
        "embed_audio": (clips, "clips / clips_per_s (float32, batch 16)", ("htsat_embed", "clips_per_s", encoder)),
        "embed_text": (CAPTIONS, "captions / captions_per_s", ("htsat_embed", "captions_per_s", {})),
        "bridge_training": (seeds * steps, f"steps ({seeds} seeds, without the search on val) x step_time",
                            ("bridge_train", "step_time", {})),
        "captioner_training": (DECODERS * caption_seeds * config.train_steps,
                               f"steps ({DECODERS} decoders, at most) x step_time_checkpointed",
                               ("llama_train", "step_time_checkpointed", step)),
        "generation": (captions, f"captions ({CAPTION_ROWS} rows, {NEW_TOKENS} tokens each) / clips_per_s_beam_4",
                       ("llama_generate", "clips_per_s_beam_4", {})),
    }

    def part(name: str) -> None:
        amount, formula, (section, measured, where) = parts[name]
        value = bench.value(section, measured, **where)
        seconds = amount * value if measured.startswith("step_time") else amount / value
        bench.record("estimate", name, "h", seconds / 3600, f"{amount:,} {formula}")

    for name in parts:
        bench.attempt("estimate", name, part, name, unit="h")
    bench.attempt("estimate", "total", lambda: bench.record("estimate", "total", "h", sum(
        bench.value("estimate", name) for name in parts), "sum of the rows above"), unit="h")


SECTIONS = {"ceilings": ceilings, "bridge_train": bridge, "htsat_embed": htsat_embed, "llama_train": llama}


def main(arguments: list[str] | None = None) -> int:
    """Measure everything; the exit code is 0 also where rows are not measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of bench_gpu.csv")
    parser.add_argument("--budget-seconds", type=float, default=360, help="what has not begun by then is not measured")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not options.tiny:
        parser.error("no GPU is visible to torch: these sizes need one (--tiny runs on a CPU)")
    about = {"card": device_name() if device.type == "cuda" else "cpu", **versions("torch", "transformers", "peft")}
    bench = GpuRecorder(options.out / "bench_gpu.csv", COLUMNS, about, options.budget_seconds)
    for name, section in SECTIONS.items():
        bench.attempt(name, "section", section, bench, TINY if options.tiny else Sizes(), device)
    bench.end = math.inf      # arithmetic alone
    estimate(bench)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
