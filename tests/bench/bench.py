"""Our costs beside others' for the same job, in turn, in one process, on the same inputs: ratios with their goals.

    python tests/bench/bench.py --out results [--only SECTION ...] [--threads N] [--tiny]

writes ``bench.csv`` into the folder, each row the moment it is measured, and from its rows
``figures/bench_growth.{pdf,svg,png,csv}``. About a quarter of an hour on two quiet cores. With ``--only`` the rows of
other sections stay. Everything runs on the CPU but ``--only bridge_training_gpu``. ``--tiny`` takes the parts that
need no large model, in seconds; its numbers mean nothing.

A ratio is the median over pairs that were timed one after the other, with the 95 % interval of that median. Where two
ways must give the same answer, that is checked, and a comparison whose answers differ is not measured. A goal that is
not met comes with a profile: the shares of our operators' own time.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # before any import of huggingface_hub reads it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import soundfile
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from models import Unet1D, product_factors, random_captioner
from recorder import GIB, Pairs, Recorder, check_equal, in_turn, stopwatch, synchronize, torch_profile, versions
from torch import Tensor, nn

from dl.bridge import DiffusionLink
from dl.captioner import IGNORED, LLMCaptioner
from dl.captioner_train import BucketSampler, train_captioner
from dl.clap import ClapEncoder, LaionClapBackend, build_laion_clap, crop, decode
from dl.config import REPO, BridgeConfig, CaptionerConfig, get_profile
from dl.data import SAMPLING_RATE, Split, load_split, read_audio
from dl.gap import Reference, gap_metrics, median_bandwidth
from dl.peers import DiffusionBridge
from dl.plots import COLOURS, GREY, PAGE, panels, set_style, write_figure
from dl.train import train_bridge

COLUMNS = ("section", "name", "over", "size", "ours", "theirs", "unit", "ratio", "goal", "met", "ratio_low",
           "ratio_high", "ratio_min", "ratio_max", "repeats", "device", "threads", "versions", "status", "reason",
           "profile")
MINI, PAPER = get_profile("mini"), get_profile("paper")
LLAMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
         "vocab_size": 256, "max_position_embeddings": 128}


def unit_vectors(count: int, embed_dim: int, seed: int) -> Tensor:
    """(count, embed_dim) random directions."""
    return nn.functional.normalize(torch.randn(count, embed_dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def between(marks: list[float]) -> list[float]:
    """Seconds between marks that follow each other."""
    return [later - earlier for earlier, later in pairwise(marks)]


# -------------------------------------------------------------------------------------------------------------- bridge
def steps_and_products(config: BridgeConfig, embed_dim: int, steps: int, device: str = "cpu",
                       warmup: int = 2) -> Pairs:
    """Seconds of each training step and, right after it, of its matrix products alone."""
    audio, text = (unit_vectors(4 * config.batch_size, embed_dim, seed).to(device) for seed in (0, 1))
    factors, marks = product_factors(config, embed_dim, device), [time.perf_counter()]

    def after_step(*_: object) -> None:
        synchronize()
        marks.append(time.perf_counter())
        for left, right, out in factors:
            torch.mm(left, right, out=out)
        synchronize()
        marks.append(time.perf_counter())

    config = replace(config, train_steps=steps + warmup)
    train_bridge(config, audio, text, torch.arange(len(audio)), seed=0, progress=False, callback=after_step)
    times = between(marks)
    return list(zip(times[::2], times[1::2], strict=True))[warmup:]


def bridge_training(bench: Recorder, tiny: bool) -> None:
    """A training step against the matrix products of its forward and backward pass alone."""
    settings = [("mini: 256 pairs, D = 256", MINI.bridge, 256), ("paper: 512 pairs, D = 512", PAPER.bridge, 512)]
    for name, config, embed_dim in [("tiny", BridgeConfig(batch_size=16), 16)] if tiny else settings:
        bench.attempt("bridge_training", name, compare_step, bench, "bridge_training", name, config, embed_dim)


def bridge_training_gpu(bench: Recorder, tiny: bool) -> None:
    """The larger one on a GPU; noise and batches still come from the CPU, so that a seed gives one fit."""
    name, device = "paper: 512 pairs, D = 512", torch.cuda.get_device_name()
    compare_step(bench, GPU, name, PAPER.bridge, 512, "cuda", 240, 50, device=device)


def compare_step(bench: Recorder, section: str, name: str, config: BridgeConfig, embed_dim: int, where: str = "cpu",
                 steps: int = 12, warmup: int = 2, **cells: object) -> None:
    """One row of bridge_training."""
    bench.compare(section, name, steps_and_products(config, embed_dim, steps, where, warmup), "ours / theirs <= 1.5",
                  "a step of dl.train.fit against its matrix products alone (torch.mm, the same shapes); a step also "
                  "runs the elementwise layers, AdamW, clipping and EMA, and draws noise and batches",
                  lambda: torch_profile(lambda: steps_and_products(config, embed_dim, 4, where)), **cells)


def bridge_inference(bench: Recorder, tiny: bool) -> None:
    """One step of the bridge against five of Diffusion Bridge's sampler, with our network and with a 1-D U-Net."""
    count, embed_dim = (64, 32) if tiny else (1000, 512)
    audio, text = (unit_vectors(count, embed_dim, seed) for seed in (0, 1))
    link = DiffusionLink(embed_dim).eval()
    peer = DiffusionBridge(train_steps=1).fit(audio, text, torch.arange(count))
    link.network.load_state_dict(peer.network.state_dict())      # the same weights: only the sampler differs

    def one_step() -> Tensor:
        return link(audio, start_timestep=50, num_inference_steps=1, generator=torch.Generator().manual_seed(0))

    def compare(name: str, pairs: Pairs, goal: str, reason: str, few: int = count) -> None:
        bench.compare("bridge_inference", name, [(1000 / count * a, 1000 / few * b) for a, b in pairs], goal,
                      f"per 1,000 vectors; Diffusion Bridge's sampler (k* = 600), {reason}",
                      lambda: torch_profile(one_step))

    def own_network(name: str) -> None:
        noised = link.scheduler.add_noise(link.scale * audio, torch.zeros_like(audio), torch.tensor([50]))
        with torch.no_grad():
            expected = nn.functional.normalize(peer.network(noised, torch.tensor(50)), dim=-1)
        same = check_equal(link(audio, 50, 1, add_noise=False), expected, 1e-6, "one step and the network asked once")
        compare(name, in_turn(one_step, lambda: peer(audio), 9, seconds=30)[0], "theirs / ours >= 4",
                f"our network in both; {same}")

    def unet(name: str) -> None:
        with torch.device("meta"):
            network = Unet1D(embed_dim, 16, 8) if tiny else Unet1D()
        peer.network = network.to_empty(device="cpu").eval()
        for parameter in network.parameters():
            nn.init.uniform_(parameter, -0.02, 0.02)
        pairs, _, answer = in_turn(one_step, lambda: peer(audio[:2]), 3, warmup=0)
        if not torch.isfinite(answer).all():
            raise AssertionError("the U-Net's answer is not finite")
        sizes = [sum(p.numel() for p in model.parameters()) for model in (network, link.network)]
        compare(name, pairs, "theirs / ours >= 20", f"two vectors at a time, with a 1-D U-Net of {sizes[0]:,} "
                f"parameters, against {sizes[1]:,} of ours; both are untrained", few=2)

    for name, measure in (("one step, against five with our network", own_network),
                          ("one step, against five with a 1-D U-Net", unet)):
        bench.attempt("bridge_inference", name, measure, name)


# ------------------------------------------------------------------------------------------------------------- encoder
def random_laion_clap() -> nn.Module:
    """laion-clap's HTSAT-tiny with random weights that tell sounds apart (the usual 0.02 would not)."""
    torch.manual_seed(0)
    clap = build_laion_clap("HTSAT-tiny", {"num_hidden_layers": 1}, None)      # no text is embedded
    for name, parameter in clap.model.named_parameters():
        if parameter.ndim == 2 and "extractor" not in name and "embeddings" not in name:
            nn.init.xavier_normal_(parameter)
    clap.model.audio_branch.bn0.running_mean.fill_(-30)
    clap.model.audio_branch.bn0.running_var.fill_(400)
    return clap.eval()


def embedding(bench: Recorder, tiny: bool) -> None:
    """Sound files to vectors: against laion-clap's own way on the same weights, and against decoding alone."""
    names = "32 files, against laion-clap", "8 files, against decoding alone"

    def measure(folder: str) -> None:
        split, clap = load_split(MINI, "test"), random_laion_clap()
        encoder = ClapEncoder(LaionClapBackend(clap, "random"))
        files = [f"{folder}/{place:03d}.wav" for place in range(32)]
        for place, file in enumerate(files):
            soundfile.write(file, crop(split.waveform(place)), SAMPLING_RATE, subtype="PCM_16")

        def decoded(files: list[str]) -> list[np.ndarray]:
            made = Split("test", files, [[""]] * len(files), pd.DataFrame(index=range(len(files))),
                         lambda place: read_audio(files[place]))
            return [sound for _, sound in decode(made, range(len(files)))]

        def few() -> Tensor:
            return encoder.embed_audio(decoded(files[:8]))

        pairs, rows, wanted = in_turn(lambda: encoder.embed_audio(decoded(files)),
                                      lambda: clap.get_audio_embedding_from_filelist(files), 5, warmup=0)
        same = check_equal(rows, wanted, 1e-4, "rows")
        if not float(torch.cdist(rows, rows).add(torch.eye(len(rows))).min()) > 1e-2:
            raise AssertionError("the random weights do not tell the sounds apart")
        bench.compare("embedding", names[0], pairs, "theirs / ours >= 2",
                      f"get_audio_embedding_from_filelist on the same random HTSAT-tiny; {same}. It decodes one file "
                      "after the other and keeps what a gradient would need. Most of both is the tower itself",
                      lambda: torch_profile(few))
        bench.compare("embedding", names[1], in_turn(few, lambda: decoded(files[:8]), 5)[0], "ours / theirs >= 2",
                      "decoding and encoding against decoding: at 2 and above the encoder is the longer part")

    with tempfile.TemporaryDirectory() as folder:
        bench.attempt("embedding", names[0], measure, folder)


# ------------------------------------------------------------------------------------------------------------ captions
def captioner_and_vectors(clips: int, tiny: bool) -> tuple[LLMCaptioner, Tensor]:
    """The shipped captioner and the audio vectors of test scenes; or a random small one and random vectors."""
    if tiny:
        config = CaptionerConfig(language_model="random Llama", projector_width=24, lora_r=2, max_new_tokens=8)
        return random_captioner(16, config, LLAMA, "cpu"), unit_vectors(clips, 16, 0)
    split = load_split(MINI, "test")
    vectors = ClapEncoder.from_pretrained("mini", "cpu").embed_audio([split.waveform(place) for place in range(clips)])
    return LLMCaptioner.from_pretrained(REPO / "results/mini/checkpoints/captioner"), vectors


def captioning(bench: Recorder, tiny: bool) -> None:
    """Greedy captions of the same vectors, in one batch against one by one."""
    def measure() -> None:
        captioner, vectors = captioner_and_vectors(16, tiny)
        pairs, found, wanted = in_turn(
            lambda: captioner.generate(vectors),
            lambda: [captioner.generate(vector[None])[0] for vector in vectors], 5, warmup=0)
        same = sum(ours == theirs for ours, theirs in zip(found, wanted, strict=True))
        if same < 0.9 * len(vectors):      # rounding may turn a tie of two words
            raise AssertionError(f"only {same} of {len(vectors)} captions agree")
        bench.compare("captioning", name, [(ours / len(vectors), theirs / len(vectors)) for ours, theirs in pairs],
                      "theirs / ours >= 4", f"seconds a clip, {captioner.config.language_model}, greedy; {same} of "
                      f"{len(vectors)} captions are the same; a batch goes on until its longest caption ends",
                      lambda: torch_profile(lambda: captioner.generate(vectors)))

    name = "16 clips in a batch, against one by one"
    bench.attempt("captioning", name, measure)


def metrics(bench: Recorder, tiny: bool) -> None:
    """``dl.caption_metrics.score_captions`` against ``aac_metrics.evaluate``, both without SPICE."""
    from aac_metrics import evaluate
    from aac_metrics.functional import sbert_sim
    from sentence_transformers import SentenceTransformer

    from dl import caption_metrics as ours
    from dl.mini_clap import minilm_folder

    references = [captions for split in ("test", "val") for captions in load_split(MINI, split).captions]
    references = (references * -(-1000 // len(references)))[:1000]
    candidates = [" ".join(word for place, word in enumerate(captions[0].split()) if place % 4 != 3)
                  for captions in references]
    shape = "1,000 captions with 5 references each"

    def lexical(name: str) -> None:
        names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider_d")
        with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
                ours, sbert_sim=mock.Mock(return_value={"": torch.zeros(len(candidates)).numpy()}),
                spice=mock.Mock(side_effect=ours.JavaError("left out"))):
            jars = Path(folder) / "aac-metrics"
            jars.mkdir()      # pycocoevalcap's jars: nothing is downloaded
            (jars / "stanford_nlp").symlink_to(ours.jar("tokenizer", "stanford-corenlp-3.4.1.jar").parent)
            (jars / "meteor").symlink_to(ours.jar("meteor", "meteor-1.5.jar").parent)
            settings = {"cache_path": folder, "tmp_path": folder, "java_path": str(ours.find_java().path)}
            pairs, found, wanted = in_turn(
                lambda: ours.score_captions(candidates, references).corpus,
                lambda: evaluate(candidates, references, metrics=names, **settings)[0], 3, warmup=0)
        found, wanted = (torch.tensor([float(scores[name]) for name in names]) for scores in (found, wanted))
        bench.compare("metrics", name, pairs, "ours / theirs <= 1",
                      f"{shape}; {check_equal(found, wanted, 1e-6, 'scores')}. Both start the same METEOR, whose Java "
                      "loads its paraphrase table and answers caption by caption; ours counts n-grams meanwhile")

    def sentences(name: str) -> None:
        model = SentenceTransformer(str(minilm_folder()), device="cpu")

        def score() -> float:
            return float(ours.sbert_sim({"": (candidates, references)})[""].mean())

        pairs, found, wanted = in_turn(score, lambda: sbert_sim(
            candidates, references, return_all_scores=False, sbert_model=model, device="cpu"), 3)
        bench.compare("metrics", name, pairs, "ours / theirs <= 1",
                      f"{shape}; {check_equal(found, wanted, 1e-6, 'score')}. The same model in both; ours embeds "
                      "equal captions once, equal lengths side by side", lambda: torch_profile(score))

    for name, measure in (("BLEU, METEOR, ROUGE-L, CIDEr-D", lexical), ("sbert_sim (all-MiniLM-L6-v2)", sentences)):
        bench.attempt("metrics", name, measure, name)


# --------------------------------------------------------------------------------------------- training the captioner
TRAINING = {"train_steps": 4, "batch_size": 16, "lr_schedule": "constant", "warmup_steps": 0, "lora_dropout": 0.0}


def captioner_and_captions(tiny: bool) -> tuple[LLMCaptioner, Tensor, list[str]]:
    """A fresh captioner without dropout, so that losses can be compared, random vectors, and captions."""
    if tiny:
        config = CaptionerConfig(language_model="random Llama", projector_width=24, lora_r=2, **TRAINING)
        captions = [" ".join(f"word{(3 * row + place) % 200}" for place in range(4 + row % 5)) for row in range(64)]
        return random_captioner(16, config, LLAMA, "cpu"), unit_vectors(64, 16, 0), captions
    split = load_split(get_profile("mini", max_clips={"train": 256}), "train")
    captions = [captions[0] for captions in split.captions]
    return LLMCaptioner(256, CaptionerConfig(**TRAINING)), unit_vectors(len(captions), 256, 0), captions


def ours(captioner: LLMCaptioner, vectors: Tensor, captions: list[str]) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step of ``train_captioner``."""
    marks, losses = [time.perf_counter()], []

    def after_step(_: int, loss: float) -> None:
        marks.append(time.perf_counter())
        losses.append(loss)

    train_captioner(captioner, vectors, captions, callback=after_step)
    return between(marks), losses


class WithLabels(nn.Module):
    """The captioner as ``Trainer`` takes a model: padded ids, mask and labels in, the language model's loss out."""

    def __init__(self, captioner: LLMCaptioner) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, vectors: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """vectors (B, D), the others (B, M) -> the loss, ()."""
        context, model = self.captioner.context(vectors), self.captioner.language_model      # (B, C, d)
        before = torch.ones(context.shape[:2], dtype=torch.long)
        answer = model(inputs_embeds=torch.cat([context, model.get_input_embeddings()(input_ids)], dim=1),
                       attention_mask=torch.cat([before, attention_mask], dim=1),
                       labels=torch.cat([before * IGNORED, labels], dim=1), use_cache=False)
        return {"loss": answer.loss}


def theirs(captioner: LLMCaptioner, vectors: Tensor, captions: list[str]) -> tuple[list[float], list[float]]:
    """The same of transformers' ``Trainer``, on the batches that ``train_captioner`` would draw."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    config, ids = captioner.config, captioner.caption_ids(captions)
    sampler = BucketSampler([len(row) for row in ids], config.batch_size, seed=0)
    rows = [row for step in range(config.train_steps) for row in sampler[step].tolist()]
    marks, losses = [], []

    def collate(rows: list[int]) -> dict[str, Tensor]:
        given = [torch.tensor(ids[row]) for row in rows]
        padded, labels = (nn.utils.rnn.pad_sequence(given, True, value) for value in (0, IGNORED))
        return {"vectors": vectors[rows], "input_ids": padded, "labels": labels,
                "attention_mask": (labels != IGNORED).long()}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.append(time.perf_counter())

        def on_log(self, *_, logs: dict, **__):      # after every step, its loss being read
            if "loss" in logs:
                marks.append(time.perf_counter())
                losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=config.batch_size, max_steps=config.train_steps,
            learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=config.weight_decay,
            max_grad_norm=config.grad_clip, optim="adamw_torch_fused", train_sampling_strategy="sequential",
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            use_cpu=True)
        trainer = Trainer(WithLabels(captioner), arguments, collate, rows, callbacks=[Watch()])
        trainer.pop_callback(PrinterCallback)
        trainer.train()
    return between(marks), losses


def captioner_training(bench: Recorder, tiny: bool) -> None:
    """The same step in both ways, then the peak memory of a process that does nothing else."""
    def a_step() -> None:
        captioner, vectors, captions = captioner_and_captions(tiny)
        start, pairs = {name: value.clone() for name, value in captioner.trainable_state().items()}, []
        for _ in range(3):
            found = []
            for way in (ours, theirs):
                captioner.load_trainable_state(start)
                found.append(way(captioner, vectors, captions))
            (times, losses), (their_times, their_losses) = found
            same = check_equal(torch.tensor(losses), torch.tensor(their_losses), 1e-3, "losses of 4 steps")
            pairs += list(zip(times, their_times, strict=True))[1:]      # the first step of each also sets things up
        bench.compare("captioner_training", "a step", pairs, "ours / theirs <= 1",
                      f"{captioner.config.language_model}, 16 captions a batch, float32 masters, no dropout; {same}. "
                      "Trainer's captions are tokenised beforehand, ours in the step",
                      lambda: torch_profile(lambda: ours(captioner, vectors, captions)))

    def memory() -> None:
        pairs = [(peak_memory("ours"), peak_memory("theirs")) for _ in range(2)]
        bench.compare("captioner_training", "peak memory", pairs, "ours / theirs <= 1", "of a fresh process that "
                      "takes 4 steps; Trainer computes logits for every position, ours for captions'", unit="GiB")

    bench.attempt("captioner_training", "a step", a_step)
    if not tiny:
        bench.attempt("captioner_training", "peak memory", memory)


def peak_memory(way: str) -> float:
    """GiB that a process of its own held at most while it trained (Linux)."""
    code = (f"import bench, pathlib, torch; torch.set_num_threads({torch.get_num_threads()}); "
            "given = bench.captioner_and_captions(False); pathlib.Path('/proc/self/clear_refs').write_text('5'); "
            f"bench.{way}(*given); print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])")
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=folder)
    return int(done.stdout.split()[-1]) * 1024 / GIB


# -------------------------------------------------------------------------------------------------------------- growth
def growth(bench: Recorder, tiny: bool) -> None:
    """Median seconds of each cost at several sizes: clips, D, the sampler's steps."""
    def curve(name: str, over: str, sizes: tuple[int, ...], run_at: Callable[[int], Callable[[], object]]) -> None:
        def measure() -> None:
            for size in sizes[:2] if tiny else sizes:
                seconds = float(np.median(stopwatch(run_at(size), 3)))
                bench.add("growth", name, over=over, size=size, ours=seconds, unit="s", repeats=3)

        bench.attempt("growth", name, measure, over=over)

    def call(embed_dim: int, count: int, steps: int = 1) -> Callable[[], Tensor]:
        link, vectors = DiffusionLink(embed_dim).eval(), unit_vectors(count, embed_dim, 0)
        return lambda: link(vectors, 50, steps, generator=torch.Generator().manual_seed(0))

    def gap(count: int) -> Callable[[], dict]:
        text = unit_vectors(count, 256, 1)
        audio = nn.functional.normalize(text + 0.5 * unit_vectors(count, 256, 2), dim=1).numpy()
        reference = Reference(text.numpy(), text.numpy(), np.arange(count), median_bandwidth(text.numpy()))
        return lambda: gap_metrics(audio, reference)

    def training(embed_dim: int) -> Callable[[], object]:
        return lambda: steps_and_products(BridgeConfig(batch_size=256), embed_dim, 3)

    counts, widths = (250, 1000, 4000, 16000), (64, 128, 256, 512, 1024)
    curve("bridge, one step, D = 256", "clips", counts, lambda count: call(256, count))
    curve("gap metrics, D = 256", "clips", (250, 500, 1000, 2000), gap)
    curve("bridge, one step, 1,000 vectors", "D", widths, lambda width: call(width, 1000))
    curve("bridge, training step, 256 pairs", "D", widths, training)
    curve("bridge, 1,000 vectors, D = 256", "steps", (1, 2, 5, 10, 20), lambda steps: call(256, 1000, steps))
    if not tiny:
        split, encoder = load_split(MINI, "test"), ClapEncoder.from_pretrained("mini", "cpu")
        sounds = [split.waveform(place) for place in range(64)]
        captioner, vectors = captioner_and_vectors(32, tiny)
        curve("embedding, mini-CLAP", "clips", (4, 16, 64), lambda count: lambda: encoder.embed_audio(sounds[:count]))
        curve("captions, greedy, one batch", "clips", (2, 8, 32),
              lambda count: lambda: captioner.generate(vectors[:count]))


def growth_data(table: pd.DataFrame) -> pd.DataFrame:
    """The measured points of section growth: over, name, size, seconds, and b of seconds = a size^b, least squares."""
    rows = table[(table.section == "growth") & (table.status == "ok")]
    data = rows[["over", "name", "size", "ours"]].rename(columns={"ours": "seconds"})
    data = data.astype({"size": int, "seconds": float})
    slope = {name: np.polyfit(*np.log(curve[["size", "seconds"]].T.to_numpy()), 1)[0]
             for name, curve in data.groupby("name")}
    return data.assign(exponent=data.name.map(slope)).reset_index(drop=True)


def plot_growth(data: pd.DataFrame) -> Figure:
    """Seconds over clips, D and steps on logarithmic axes, a panel each; the legend gives each curve's exponent b."""
    set_style()
    figure, axes = panels(3, width=PAGE, height=3.4, sharey=True)
    lines = ((COLOURS["bridged"], "^"), (GREY, "D"), (COLOURS["audio"], "o"), (COLOURS["text"], "s"))
    labels = {"clips": "clips", "D": "embedding dimension D", "steps": "sampler steps n"}
    for axis, (over, label) in zip(axes, labels.items(), strict=True):
        drawn = data[data.over == over]
        for (name, curve), (colour, marker) in zip(drawn.groupby("name", sort=False), lines, strict=False):
            axis.plot(curve["size"], curve.seconds, color=colour, marker=marker,
                      label=f"{name}\nb = {curve.exponent.iloc[0]:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds" if axis is axes[0] else "")
        if over != "clips":
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks(sorted(set(drawn["size"]))[::2])
            axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, handlelength=1.2)
    return figure


# ---------------------------------------------------------------------------------------------------------------- main
GPU = "bridge_training_gpu"
PARTS: dict[str, Callable[[Recorder, bool], None]] = {
    part.__name__: part for part in (bridge_training, bridge_training_gpu, bridge_inference, embedding, captioning,
                                     captioner_training, metrics, growth)}
NOT_TINY = ("embedding", "metrics")      # laion-clap and Java take longer to start than a test may


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, draw; 0 however many rows could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets bench.csv and figures/")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="SECTION", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, help="of torch, for ours and theirs alike; by default what torch takes")
    parser.add_argument("--budget-seconds", type=float, default=3600, help="what would start later is not measured")
    parser.add_argument("--tiny", action="store_true", help=f"small sizes, without {' and '.join(NOT_TINY)}")
    given = parser.parse_args(arguments)
    sections = given.only or [name for name in PARTS if name != GPU and not (given.tiny and name in NOT_TINY)]
    if GPU not in sections:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""      # before torch looks for one
    if given.threads:
        torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    installed = versions("torch", "transformers", "peft", "laion-clap", "aac-metrics")
    about = {"device": "cpu", "threads": torch.get_num_threads(),
             "versions": "; ".join(f"{name} {number}" for name, number in installed.items())}
    bench = Recorder(given.out / "bench.csv", COLUMNS, about, given.budget_seconds, list(PARTS), sections)
    for name in sections:
        bench.attempt(name, "set-up", PARTS[name], bench, given.tiny)
    if "growth" in sections:
        data = growth_data(pd.read_csv(bench.path, dtype=str, keep_default_na=False))
        write_figure(given.out / "figures", plot_growth(data), "bench_growth", data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
