"""Speed and memory of the paper profile's parts on one GPU, with random weights and random data of the real shapes; then the mini profile's fits.

    python tests/bench/bench_gpu.py --out results [--budget-seconds 360] [--tiny]

writes ``bench_gpu.csv`` into the folder, each row the moment it is measured; nothing is downloaded. Random weights cost what trained ones
cost, but a random decoder never ends a caption: generation is timed at its longest. What fails, or comes too late, stands in the file as
"not measured" with the reason. ``--tiny`` runs the same code in seconds on a CPU; its numbers mean nothing.

Rates count useful work: TFLOP/s of a matrix product (m, k) x (k, n) are 2 m k n / s, GB/s of a copy are bytes read plus written. The
captioner's step, for B captions of S positions of which M have a loss, N parameters in the layers and H in the output matrix:

    forward   F = 2 B (S N + M H)            attention over S < 40 positions, and LoRA with the projector, add 0.1 % each: left out
    model         2 F                        the gradients to the activations cost as much; the frozen weights have none: 4 N a token
    hardware      2 F + 2 B S N              gradient checkpointing computes the layers' forward pass once more: 6 N a token

Utilisation is model (hardware) FLOP / s over the measured rate of the 8192^3 product. A decoding step reads at least the 2 (N + H) bytes of
the bfloat16 weights; steps x that / s, over the measured copy rate, is the share of the bandwidth (the cache's bytes are left out).
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                         # before any import of huggingface_hub reads it
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import pandas as pd
import torch
from random_captioner import RandomCaptioner
from recorder import Recorder, stopwatch

from dl.config import BridgeConfig, CaptionerConfig, Profile, get_profile

PAPER, MINI = get_profile("paper"), get_profile("mini")
BRIDGE = replace(PAPER.bridge, train_steps=350)
CAPTIONER = replace(PAPER.captioner, language_model="random Llama-2-7B", revision=None, patience=0, train_steps=15)
CLIPS = {"train": 49_838, "val": 495, "test": 975}                   # AudioCaps 1.0
CAPTIONS = CLIPS["train"] + 5 * (CLIPS["val"] + CLIPS["test"])       # one a clip in train, five in val and test
DECODERS, CAPTION_ROWS = 3, 7                                        # of a default run: dl.experiments's ZERO_SHOT and SUPERVISED
CAPTION_TOKENS = 20                                                  # of a caption with its eos
NEW_TOKENS = 30
MINI_PARTS = {"bridge_fit": 24, "decoder_fit": 24, "captions": 81}   # fits and lists of mini's --full: Table 1's, Table 2's and the disjoint setting's


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
    seconds: float = 10.0                        # of a clip
    llama: dict = field(default_factory=dict)    # fields of LlamaConfig: its defaults are Llama-2-7B
    captioner: CaptionerConfig = CAPTIONER
    train_batches: tuple[int, ...] = (16, 64)
    train_warmup: int = 3
    clips: int = 64                              # captions generated in a batch
    new_tokens: int = NEW_TOKENS
    mini: Profile = MINI                         # its fits, at their own sizes
    mini_clips: int = 600                        # of its test split


LAYER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
TINY = Sizes(
    matrix=64, copied=2**14, repeats=2, pairs=96, embed_dim=16, vectors=8,
    bridge=replace(BRIDGE, train_steps=6, batch_size=16), bridge_warmup=2,
    clap={"text_config": LAYER, "audio_config": {"spec_size": 64, "window_size": 2, "depths": [1, 1, 1, 1], "patch_embeds_hidden_size": 16,
                                                 "num_attention_heads": [1, 1, 2, 2], "hidden_size": 128}},
    clap_batches=(1, 16), seconds=0.5, llama={**LAYER, "vocab_size": 256, "max_position_embeddings": 128},
    captioner=replace(CAPTIONER, language_model="random tiny Llama", train_steps=4, projector_width=24, lora_r=2),
    train_batches=(16,), train_warmup=1, clips=4, new_tokens=4, mini=get_profile("smoke"), mini_clips=4)


# -------------------------------------------------------------------------------------------------------------- ceilings
def ceilings(bench: Recorder, sizes: Sizes) -> None:
    """What the card can do at all: bfloat16 matrix products, and a copy within its memory."""
    def product(name: str, rows: int, inner: int, columns: int, copies: int = 8) -> None:
        """Several right factors in turn, as the layers of a model: one alone might stay in the cache."""
        left = torch.randn(rows, inner, device=bench.device, dtype=torch.bfloat16)
        right = [torch.randn(inner, columns, device=bench.device, dtype=torch.bfloat16) for _ in range(copies)]
        out = torch.empty(rows, columns, device=bench.device, dtype=torch.bfloat16)
        times = stopwatch(lambda: [torch.mm(left, matrix, out=out) for matrix in right], bench.device, sizes.repeats)
        bench.record("ceilings", name, "TFLOP/s", [copies * 2e-12 * rows * inner * columns / t for t in times], f"({rows}, {inner}) x ({inner}, {columns})",
                     batch=rows, dtype="bfloat16")

    def copy() -> None:
        source = torch.randn(sizes.copied, device=bench.device)
        target = torch.empty_like(source)
        times = stopwatch(lambda: target.copy_(source), bench.device, sizes.repeats)
        bench.record("ceilings", "copy", "GB/s", [2e-9 * 4 * sizes.copied / t for t in times], "bytes read plus written, device to device")

    n = sizes.matrix
    bench.attempt(lambda: product("matmul_square", n, n, n, copies=1), "ceilings", "matmul_square", dtype="bfloat16")
    bench.attempt(copy, "ceilings", "copy")
    hidden, inner, vocabulary = (sizes.llama.get(key, default) for key, default in
                                 (("hidden_size", 4096), ("intermediate_size", 11008), ("vocab_size", 32000)))
    shapes = {"matmul_q_proj": (hidden, hidden), "matmul_up_proj": (hidden, inner), "matmul_down_proj": (inner, hidden), "matmul_lm_head": (hidden, vocabulary)}
    for batch in sizes.train_batches:
        for name, (k, n) in shapes.items():
            rows = batch * (CAPTION_TOKENS + 8)                      # the positions of a training step
            bench.attempt(lambda rows=rows, name=name, k=k, n=n: product(name, rows, k, n), "ceilings", name, batch=rows, dtype="bfloat16")


# ---------------------------------------------------------------------------------------------------------------- bridge
def bridge_train(bench: Recorder, sizes: Sizes) -> None:
    """``dl.train.train_bridge`` on random pairs, its matrix products alone, and calls of an untrained bridge."""
    from dl.bridge import DiffusionLink
    from dl.peers import DiffusionBridge
    from dl.train import train_bridge

    where = {"batch": sizes.bridge.batch_size, "dtype": "float32"}
    generator = torch.Generator().manual_seed(0)
    audio, text = (torch.nn.functional.normalize(torch.randn(sizes.pairs, sizes.embed_dim, generator=generator), dim=1).to(bench.device) for _ in range(2))
    pairs = torch.arange(sizes.pairs)

    def train() -> None:
        marks: list[float] = []
        train_bridge(sizes.bridge, audio, text, pairs, seed=0, progress=False, callback=lambda *_: marks.append(time.perf_counter()))
        times = intervals(marks, sizes.bridge_warmup)
        bench.record("bridge_train", "step_time", "s", times, "host clock: batches and noise are drawn on the CPU", **where)
        bench.record("bridge_train", "steps_per_s", "1/s", [1 / t for t in times], **where)
        steps = PAPER.bridge.train_steps
        bench.record("bridge_train", "fit_time", "s", [steps * t for t in times], f"{steps:,} steps x step_time", **where)
        bench.peak_memory("bridge_train", **where)

    def products() -> None:
        factors = [(torch.randn(m, k, device=bench.device), torch.randn(k, n, device=bench.device), torch.empty(m, n, device=bench.device))
                   for m, k, n in bridge_products(sizes.bridge, sizes.embed_dim)]
        times = stopwatch(lambda: [torch.mm(a, b, out=out) for a, b, out in factors], bench.device, sizes.repeats)
        bench.record("bridge_train", "products_time", "s", times, f"the {len(factors)} matrix products of a step and its gradient, nothing else", **where)
        bench.share("bridge_train", "products_share", times, bench.value("bridge_train", "step_time"), "products_time / step_time", **where)

    def call(name: str, bridge) -> None:
        times = stopwatch(lambda: bridge(audio[: sizes.vectors]), bench.device, sizes.repeats, host=True)
        bench.record("bridge_inference", name, "ms per 1,000 vectors", [1e6 * t / sizes.vectors for t in times], batch=sizes.vectors, dtype="float32")

    def link(name: str, steps: int) -> None:
        bridge, noise = DiffusionLink.from_config(sizes.bridge, sizes.embed_dim).to(bench.device), torch.Generator().manual_seed(0)
        call(name, lambda x: bridge(x, start_timestep=50, num_inference_steps=steps, generator=noise))

    def diffusion_bridge() -> None:
        call("diffusion_bridge_5_steps", DiffusionBridge(train_steps=2).fit(audio, text, pairs))

    bench.attempt(train, "bridge_train", "step_time", **where)
    bench.attempt(products, "bridge_train", "products_time", **where)
    for name, steps in (("one_step", 1), ("ddim_5_steps", 5)):
        bench.attempt(lambda name=name, steps=steps: link(name, steps), "bridge_inference", name, batch=sizes.vectors)
    bench.attempt(diffusion_bridge, "bridge_inference", "diffusion_bridge_5_steps", batch=sizes.vectors)


def bridge_products(config: BridgeConfig, embed_dim: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of one training step: R = 2 B rows (from audio, from text), W = width_factor D.

    Each Linear (k -> n): the output (R, k, n), the weight's gradient (k, R, n), and the input's (R, n, k) unless the input is data.
    L_topo, for both predictions: two Gram matrices (B, D, B), and the gradient of one of them, two products (B, B, D).
    """
    rows, batch, width = 2 * config.batch_size, config.batch_size, config.width_factor * embed_dim
    data = [(embed_dim, width), (2 * embed_dim, embed_dim)]
    block = [(width, width), (embed_dim, width), (width, width)]
    inside = [(embed_dim, embed_dim), *config.num_blocks * block, (width, embed_dim)]
    found = [shape for k, n in data + inside for shape in ((rows, k, n), (k, rows, n))] + [(rows, n, k) for k, n in inside]
    return found + 2 * [(batch, embed_dim, batch), (batch, embed_dim, batch), (batch, batch, embed_dim), (batch, batch, embed_dim)]


def intervals(marks: list[float], warmup: int) -> list[float]:
    """Seconds between marks that follow each other, the first ``warmup`` steps left out."""
    return [later - earlier for earlier, later in zip(marks[warmup - 1 :], marks[warmup:], strict=False)]


# --------------------------------------------------------------------------------------------------------------- encoder
def htsat_embed(bench: Recorder, sizes: Sizes) -> None:
    """transformers' ``ClapModel`` in its default configuration, HTSAT-tiny as in laion/clap-htsat-unfused, on log-mels (B, 1, frames, 64)."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    frames, tokens = int(100 * sizes.seconds) + 1, CAPTION_TOKENS
    found: dict = {}

    def model():
        if "model" not in found:
            torch.manual_seed(0)
            found["model"] = ClapModel(ClapConfig(**sizes.clap)).eval().to(bench.device)
        return found["model"]

    def audio(batch: int, dtype: str) -> None:
        where = {"batch": batch, "seq_len": frames, "dtype": dtype}
        inputs = {"input_features": torch.randn(batch, 1, frames, 64, device=bench.device),
                  "is_longer": torch.zeros(batch, 1, dtype=torch.bool, device=bench.device)}
        with torch.inference_mode(), torch.autocast(bench.device.type, torch.bfloat16, enabled=dtype != "float32"):
            times = stopwatch(lambda: model().get_audio_features(**inputs).pooler_output, bench.device, sizes.repeats)
        bench.record("htsat_embed", "clips_per_s", "clips/s", [batch / t for t in times], "on the device, log-mels in its memory", **where)
        bench.peak_memory("htsat_embed", **where)

    def text(batch: int) -> None:
        ids = torch.randint(5, 50_000, (batch, tokens), device=bench.device) % model().config.text_config.vocab_size
        with torch.inference_mode():
            times = stopwatch(lambda: model().get_text_features(ids, torch.ones_like(ids)).pooler_output, bench.device, sizes.repeats)
        bench.record("htsat_embed", "captions_per_s", "captions/s", [batch / t for t in times], batch=batch, seq_len=tokens, dtype="float32")

    def features(batch: int) -> None:
        extractor, sounds = ClapFeatureExtractor(), list(torch.randn(batch, int(48_000 * sizes.seconds)).numpy())
        settings = {"sampling_rate": 48_000, "truncation": "rand_trunc", "padding": "repeatpad", "return_tensors": "pt"}
        times = stopwatch(lambda: extractor(sounds, **settings), torch.device("cpu"), repeats=3, warmup=1)
        bench.record("htsat_embed", "features_per_s", "clips/s", [batch / t for t in times], "log-mels by transformers on the CPU, one process",
                     batch=batch, seq_len=frames, dtype="float32")

    for dtype in ("float32", "bfloat16 autocast"):
        for batch in sizes.clap_batches:
            bench.attempt(lambda batch=batch, dtype=dtype: audio(batch, dtype), "htsat_embed", "clips_per_s", batch=batch, seq_len=frames, dtype=dtype)
    bench.attempt(lambda: text(64), "htsat_embed", "captions_per_s", batch=64, seq_len=tokens, dtype="float32")
    bench.attempt(lambda: features(16), "htsat_embed", "features_per_s", batch=16, seq_len=frames, dtype="float32")


# -------------------------------------------------------------------------------------------------------------- captioner
def llama_train(bench: Recorder, sizes: Sizes, llama: RandomCaptioner) -> None:
    """Steps of ``dl.captioner_train.train_captioner``: LoRA and projector learn, captions of 20 tokens behind bos, prefix and prompt."""
    def step(batch: int, checkpointing: bool, suffix: str) -> None:
        marks, length = llama.train(batch, checkpointing, CAPTION_TOKENS)
        times = intervals(marks, sizes.train_warmup)
        where = {"batch": batch, "seq_len": length, "dtype": llama.dtype}
        layers, head = llama.parameters
        model_flop = 4 * batch * (length * layers + CAPTION_TOKENS * head)
        hardware_flop = model_flop + checkpointing * 2 * batch * length * layers
        ceiling = bench.value("ceilings", "matmul_square")
        bench.record("llama_train", f"step_time{suffix}", "s", times, **where)
        bench.record("llama_train", f"tokens_per_s{suffix}", "tokens/s", [batch * length / t for t in times], "all positions of a row", **where)
        bench.record("llama_train", f"model_tflops{suffix}", "TFLOP/s", [1e-12 * model_flop / t for t in times], "2 F / step_time", **where)
        bench.share("llama_train", f"model_utilisation{suffix}", [1e-12 * model_flop / t for t in times], ceiling, "2 F / step_time / matmul_square", **where)
        if checkpointing:
            bench.share("llama_train", f"hardware_utilisation{suffix}", [1e-12 * hardware_flop / t for t in times], ceiling,
                        "(2 F + 2 B S N) / step_time / matmul_square", **where)
        bench.peak_memory("llama_train", f"peak_memory{suffix}", **where)

    for batch in sizes.train_batches:
        for checkpointing, suffix in ((True, "_checkpointed"), (False, "")):
            bench.attempt(lambda b=batch, c=checkpointing, s=suffix: step(b, c, s), "llama_train", f"step_time{suffix}", batch=batch)


def llama_generate(bench: Recorder, sizes: Sizes, llama: RandomCaptioner) -> None:
    """``LLMCaptioner.generate`` with 4 beams and greedily; steps are counted as calls of the language model."""
    def generate(num_beams: int, suffix: str) -> None:
        captioner = llama.captioner.eval()
        embeddings = torch.randn(sizes.clips, sizes.embed_dim, generator=torch.Generator().manual_seed(0))
        calls: list[int] = []
        hook = captioner.language_model.get_base_model().register_forward_hook(lambda *_: calls.append(1))
        repeats = min(3, sizes.repeats)
        try:
            times = stopwatch(lambda: captioner.generate(embeddings, num_beams=num_beams, max_new_tokens=sizes.new_tokens, batch_size=sizes.clips),
                              bench.device, repeats, warmup=1, host=True)
        finally:
            hook.remove()
        steps = len(calls) / (repeats + 1)
        where = {"batch": sizes.clips, "seq_len": sizes.new_tokens, "dtype": llama.dtype}
        read = llama.captioner.language_model.dtype.itemsize * sum(llama.parameters)
        bench.record("llama_generate", f"clips_per_s{suffix}", "clips/s", [sizes.clips / t for t in times], f"{steps:.0f} steps, the prompt's among them", **where)
        bench.record("llama_generate", f"tokens_per_s{suffix}", "tokens/s", [sizes.clips * steps / t for t in times], "clips x steps / s", **where)
        bench.share("llama_generate", f"bandwidth_share{suffix}", [1e-9 * read * steps / t for t in times], bench.value("ceilings", "copy"),
                    f"{read / 1e9:.3g} GB of weights x steps / s / copy", **where)
        bench.peak_memory("llama_generate", f"peak_memory{suffix}", **where)

    for num_beams, suffix in ((4, "_beam_4"), (1, "_greedy")):
        bench.attempt(lambda n=num_beams, s=suffix: generate(n, s), "llama_generate", f"clips_per_s{suffix}", batch=sizes.clips, seq_len=sizes.new_tokens)


# --------------------------------------------------------------------------------------------------------------- estimate
def estimate(bench: Recorder) -> None:
    """Hours of a default run of the paper profile, stage by stage; ``reason`` is the formula. Decoding sounds and scoring are left out."""
    clips, seeds, steps = sum(CLIPS.values()), len(PAPER.seeds), PAPER.bridge.train_steps
    batch, fits, fit_steps = PAPER.captioner.batch_size, DECODERS * len(PAPER.caption_seeds), PAPER.captioner.train_steps
    encoder = {"batch": 16, "dtype": "float32"}                      # as dl embeds
    parts = {                                                        # name: (how much, formula, how much a second)
        "embed_features": (clips, f"{clips:,} clips / features_per_s", bench.value("htsat_embed", "features_per_s", **encoder)),
        "embed_audio": (clips, f"{clips:,} clips / clips_per_s (float32, batch 16)", bench.value("htsat_embed", "clips_per_s", **encoder)),
        "embed_text": (CAPTIONS, f"{CAPTIONS:,} captions / captions_per_s", bench.value("htsat_embed", "captions_per_s")),
        "bridge_training": (
            seeds * steps, f"{seeds} seeds x {steps:,} steps x step_time; the search on val is not in it", bench.value("bridge_train", "steps_per_s")),
        "captioner_training": (
            fits * fit_steps, f"{DECODERS} decoders x {len(PAPER.caption_seeds)} seed x {fit_steps:,} steps x step_time_checkpointed (batch {batch}); at most",
            inverse(bench.value("llama_train", "step_time_checkpointed", batch=batch))),
        "generation": (
            CAPTION_ROWS * CLIPS["test"], f"{CAPTION_ROWS} rows x {CLIPS['test']} clips / clips_per_s_beam_4 ({NEW_TOKENS} tokens a caption)",
            bench.value("llama_generate", "clips_per_s_beam_4")),
    }
    for name, (amount, formula, rate) in parts.items():
        if rate is None:
            bench.not_measured("estimate", name, f"a part was not measured: {formula}", unit="h")
        else:
            bench.record("estimate", name, "h", amount / rate / 3600, formula)
    hours = [bench.value("estimate", name) for name in parts]
    if None in hours:
        bench.not_measured("estimate", "total", "a part was not measured", unit="h")
    else:
        bench.record("estimate", "total", "h", sum(hours), "sum of the rows above")


# ------------------------------------------------------------------------------------------------------------ mini profile
def mini_full(bench: Recorder, sizes: Sizes) -> None:
    """What ``--full`` of profile mini makes on a GPU, three seeds: one fit of each kind and one list of captions, times ``MINI_PARTS``.

    The captions are those of data/mini, the language model is the real one, the vectors are random; scoring, which needs no GPU, is left out.
    """
    from dl.captioner import LLMCaptioner
    from dl.captioner_train import train_captioner
    from dl.train import train_bridge

    config, made = sizes.mini, []
    captions = pd.read_csv(config.data_dir / "train.csv").caption.tolist()[: sizes.pairs]
    text = torch.nn.functional.normalize(torch.randn(len(captions), 256, generator=torch.Generator().manual_seed(0)), dim=1)

    def timed(name: str, call: Callable[[], object], reason: str) -> None:
        bench.record("mini_full", name, "s", stopwatch(call, bench.device, 1, warmup=0, host=True), reason, dtype="float32")

    def fit_bridge() -> None:
        x = text.to(bench.device)
        timed("bridge_fit", lambda: train_bridge(config.bridge, x, x, torch.arange(len(x)), seed=0, progress=False),
              f"{config.bridge.train_steps} steps of {config.bridge.batch_size}")

    def fit_decoder() -> None:
        captioner = LLMCaptioner(256, config.captioner).to(bench.device)
        timed("decoder_fit", lambda: train_captioner(captioner, text, captions, seed=0), f"{config.captioner.train_steps} steps of {config.captioner.batch_size}")
        made.append(captioner.eval())

    def generate() -> None:
        captioner, = made
        timed("captions", lambda: captioner.generate(text[: sizes.mini_clips], num_beams=4, max_new_tokens=config.captioner.max_new_tokens, batch_size=300),
              f"{sizes.mini_clips} clips, beam 4")

    for name, measure in (("bridge_fit", fit_bridge), ("decoder_fit", fit_decoder), ("captions", generate)):
        bench.attempt(measure, "mini_full", name)
    seconds, formula = [bench.value("mini_full", name) for name in MINI_PARTS], " + ".join(f"{count} x {name}" for name, count in MINI_PARTS.items())
    if None in seconds:
        bench.not_measured("mini_full", "total", f"a part was not measured: {formula}", unit="h")
    else:
        bench.record("mini_full", "total", "h", sum(count * value for count, value in zip(MINI_PARTS.values(), seconds, strict=True)) / 3600, formula)


def inverse(seconds: float | None) -> float | None:
    """Per second."""
    return None if seconds is None else 1 / seconds


# -------------------------------------------------------------------------------------------------------------------- main
def main(arguments: list[str] | None = None) -> int:
    """Measure everything; the exit code is 0 also where rows are not measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of bench_gpu.csv")
    parser.add_argument("--budget-seconds", type=float, default=360, help="what has not begun by then is not measured (default: 360)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test on a CPU")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench, sizes = Recorder(options.out / "bench_gpu.csv", options.budget_seconds, device), TINY if options.tiny else Sizes()
    if device.type != "cuda" and not options.tiny:
        parser.error("no GPU is visible to torch: these sizes need one (--tiny runs on a CPU)")
    if options.tiny:
        torch.set_num_threads(1)
    llama = RandomCaptioner(sizes.embed_dim, sizes.captioner, sizes.llama, device)
    sections = {"ceilings": ceilings, "bridge_train": bridge_train, "htsat_embed": htsat_embed,
                "llama_train": lambda *parts: llama_train(*parts, llama), "llama_generate": lambda *parts: llama_generate(*parts, llama), "mini_full": mini_full}
    for name, section in sections.items():
        try:
            section(bench, sizes)
        except Exception as error:                                   # noqa: BLE001  the next section may still be measured
            bench.not_measured(name, "section", f"{type(error).__name__}: {error}")
    estimate(bench)
    print(f"wrote {len(bench.rows)} rows, {sum(row['status'] != 'ok' for row in bench.rows)} of them not measured")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
