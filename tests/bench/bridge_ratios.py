"""The bridge: its training step against the same matrix products bare, its one step against Diffusion Bridge's sampler."""
from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import pandas as pd
import torch
from bench_gpu import bridge_products
from ratios import Pairs, Ratios, at_most, check_equal, faster, in_turn, seconds_of, torch_profile
from recorder import synchronize
from torch import Tensor, nn
from unet1d import Unet1D

from dl.bridge import DiffusionLink
from dl.config import REPO, BridgeConfig, get_profile
from dl.peers import DiffusionBridge
from dl.train import train_bridge

STEP_GOAL, UNET_GOAL, SAMPLER_GOAL = at_most(1.5), faster(20), faster(4)
STEP = "a step of dl.train.fit against the matrix products of its forward and backward pass alone (torch.mm, the same shapes)"
ALSO = {"cpu": "beside the products a step runs the elementwise layers forward and backward (LayerNorm, SiLU, dropout, L1), AdamW, clipping and EMA over "
               "all weights, and draws noise and batches",
        "cuda": "noise, levels and batches are drawn on the CPU, so that a seed gives the same fit on every device, and copied; every step waits for its "
                "four losses; the elementwise layers, AdamW, clipping and EMA are launched one by one"}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    settings: tuple[tuple[str, BridgeConfig, int], ...] = (("mini: 256 pairs, D = 256", get_profile("mini").bridge, 256),
                                                           ("paper: 512 pairs, D = 512", get_profile("paper").bridge, 512))
    steps: int = 12
    vectors: int = 1000
    embed_dim: int = 512
    unet: tuple[tuple[str, object], ...] = ()            # arguments of Unet1D that are not the published ones
    unet_vectors: int = 2
    repeats: int = 9


TINY = Sizes(settings=(("tiny", BridgeConfig(batch_size=16), 16),), steps=6, vectors=64, embed_dim=32, unet=(("dim", 16), ("init_dim", 8)), repeats=3)


def unit_vectors(count: int, embed_dim: int, seed: int) -> Tensor:
    """(count, embed_dim) random directions."""
    return nn.functional.normalize(torch.randn(count, embed_dim, generator=torch.Generator().manual_seed(seed)), dim=1)


# ---------------------------------------------------------------------------------------------------------------- training
def steps_and_products(config: BridgeConfig, embed_dim: int, steps: int, device: torch.device, warmup: int = 2) -> Pairs:
    """Seconds of each training step and, right after it, of its matrix products alone."""
    audio, text = (unit_vectors(4 * config.batch_size, embed_dim, seed).to(device) for seed in (0, 1))
    factors = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device), torch.empty(m, n, device=device))
               for m, k, n in bridge_products(config, embed_dim)]
    pairs: Pairs = []
    began = time.perf_counter()

    def after_step(*_: object) -> None:
        nonlocal began
        synchronize(device)
        middle = time.perf_counter()
        for left, right, out in factors:
            torch.mm(left, right, out=out)
        synchronize(device)
        end = time.perf_counter()
        pairs.append((middle - began, end - middle))
        began = time.perf_counter()

    train_bridge(replace(config, train_steps=steps + warmup), audio, text, torch.arange(len(audio)), seed=0, progress=False, callback=after_step)
    return pairs[warmup:]


def bridge_training(bench: Ratios, sizes: Sizes) -> None:
    """On the CPU; a GPU's row is copied from bench_gpu.csv, or measured by --only bridge_training_gpu."""
    for name, config, embed_dim in sizes.settings:
        def measure(name: str = name, config: BridgeConfig = config, embed_dim: int = embed_dim) -> None:
            cpu = torch.device("cpu")
            pairs = steps_and_products(config, embed_dim, sizes.steps, cpu)
            bench.compare("bridge_training", name, pairs, STEP_GOAL, f"{STEP}; {ALSO['cpu']}",
                          profile=lambda: torch_profile(lambda: steps_and_products(config, embed_dim, 4, cpu), most=10))

        bench.attempt(measure, "bridge_training", name)


def bridge_training_gpu(bench: Ratios, sizes: Sizes) -> None:
    """On this machine's GPU; without one, the two numbers of results/bench_gpu.csv, which were measured one after the other."""
    name, config, embed_dim = sizes.settings[-1]

    def measure() -> None:
        cuda = torch.device("cuda")
        pairs = steps_and_products(config, embed_dim, 20 * sizes.steps, cuda, warmup=50)
        bench.compare("bridge_training_gpu", name, pairs, STEP_GOAL, f"{STEP}; {ALSO['cuda']}", device=torch.cuda.get_device_name(),
                      profile=lambda: torch_profile(lambda: steps_and_products(config, embed_dim, 50, cuda), most=10))

    def copy() -> None:
        rows = 2 * config.batch_size
        drawing = statistics.median(seconds_of(lambda: torch.randn(rows, embed_dim, generator=torch.Generator().manual_seed(0))) for _ in range(20))
        table = pd.read_csv(REPO / "results/bench_gpu.csv").set_index(["section", "name"]).loc["bridge_train"]
        step, products = table.loc["step_time"], table.loc["products_time"]
        pairs = [(float(step[column]), float(products[column])) for column in ("value", "value_min", "value_max")]
        bench.compare("bridge_training_gpu", name, pairs, STEP_GOAL, f"{STEP}; copied from bench_gpu.csv, where both were timed one after the other (medians, "
                      f"least, greatest); {ALSO['cuda']}", device=step["card"], versions=f"torch {step['torch']}",
                      profile=lambda: f"no GPU at hand to profile; drawing the noise of a step takes {1000 * drawing:.1f} ms on this CPU")

    bench.attempt(measure if torch.cuda.is_available() else copy, "bridge_training_gpu", name)


# --------------------------------------------------------------------------------------------------------------- inference
def bridge_inference(bench: Ratios, sizes: Sizes) -> None:
    """One step of the bridge against five of Diffusion Bridge's sampler, with its U-Net and with our network in its place."""
    audio, text = (unit_vectors(sizes.vectors, sizes.embed_dim, seed) for seed in (0, 1))
    link = DiffusionLink(sizes.embed_dim).eval()
    peer = DiffusionBridge(train_steps=1).fit(audio, text, torch.arange(len(audio)))
    per_1000 = 1000 / sizes.vectors

    def one_step() -> Tensor:
        return link(audio, start_timestep=50, num_inference_steps=1, generator=torch.Generator().manual_seed(0))

    def own_network() -> None:
        link.network.load_state_dict(peer.network.state_dict())          # the same weights: only the sampler differs
        noised = link.scheduler.add_noise(link.scale * audio, torch.zeros_like(audio), torch.tensor([50]))
        with torch.no_grad():
            expected = nn.functional.normalize(peer.network(noised, torch.tensor(50)), dim=-1)
        same = check_equal(link(audio, 50, 1, add_noise=False), expected, 1e-6, "one step and the network asked once")
        pairs = [(per_1000 * ours, per_1000 * theirs) for ours, theirs in in_turn(one_step, lambda: peer(audio), sizes.repeats, seconds=30)[0]]
        bench.compare("bridge_inference", "one step, against five with our network", pairs, SAMPLER_GOAL, "per 1,000 vectors; Diffusion Bridge's sampler "
                      f"(k* = 600, renormalised before each call), our network in both; {same}", profile=lambda: torch_profile(one_step))

    def unet() -> None:
        with torch.device("meta"):
            network = Unet1D(sizes.embed_dim, **dict(sizes.unet))
        network = network.to_empty(device="cpu").eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.uniform_(-0.02, 0.02)
        own, peer.network, few = peer.network, network, audio[: sizes.unet_vectors]
        try:
            pairs, _, answer = in_turn(one_step, lambda: peer(few), 3, warmup=0)
            assert answer.shape == few.shape and torch.isfinite(answer).all()
            pairs = [(per_1000 * ours, theirs * 1000 / len(few)) for ours, theirs in pairs]
        finally:
            peer.network = own
        bench.compare("bridge_inference", "one step, against five with a 1-D U-Net", pairs, UNET_GOAL, f"per 1,000 vectors, the U-Net's from {len(few)} at a time; "
                      f"{peer_sizes(network)} against {sum(p.numel() for p in link.network.parameters()):,} of ours; its outputs need not agree: both are untrained")

    for name, measure in (("one step, against five with our network", own_network), ("one step, against five with a 1-D U-Net", unet)):
        bench.attempt(measure, "bridge_inference", name)


def peer_sizes(network: Unet1D) -> str:
    """What the U-Net is."""
    return f"Diffusion Bridge's sampler with a 1-D U-Net of base width {network.dim}, {sum(p.numel() for p in network.parameters()):,} parameters,"
