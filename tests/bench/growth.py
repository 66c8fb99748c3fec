"""How each cost grows with the number of clips, with D, and with the sampler's steps: points of a log-log figure."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from bridge_ratios import steps_and_products, unit_vectors
from caption_ratios import Sizes as CaptionSizes
from caption_ratios import captioner_and_vectors
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from ratios import Ratios, seconds_of

from dl.bridge import DiffusionLink
from dl.clap import ClapEncoder
from dl.config import BridgeConfig, get_profile
from dl.data import load_split
from dl.gap import Reference, gap_metrics, median_bandwidth
from dl.plots import COLOURS, GREY, PAGE, panels, set_style


@dataclass(frozen=True)
class Sizes:
    """The sizes that each cost is measured at."""

    sounds: tuple[int, ...] = (4, 16, 64)
    captions: tuple[int, ...] = (2, 8, 32)
    vectors: tuple[int, ...] = (250, 1000, 4000, 16000)
    scored: tuple[int, ...] = (250, 500, 1000, 2000)
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    steps: tuple[int, ...] = (1, 2, 5, 10, 20)
    repeats: int = 3
    with_models: bool = True                             # the encoder and the language model, which take seconds to load


TINY = Sizes(vectors=(64, 128, 256), scored=(64, 128), widths=(16, 32, 64), steps=(1, 2, 4), with_models=False)


def growth(bench: Ratios, sizes: Sizes) -> None:
    """Median seconds at each size; one size after the other, so that a cost's curve is of one moment."""
    def curve(name: str, over: str, at: tuple[int, ...], seconds_at: Callable[[int], list[float]]) -> None:
        def measure() -> None:
            for size in at:
                bench.cost("growth", name, over, size, seconds_at(size))

        bench.attempt(measure, "growth", name, over=over)

    def repeated(run: Callable[[], object]) -> list[float]:
        run()
        return [seconds_of(run) for _ in range(sizes.repeats)]

    def call(embed_dim: int, count: int, steps: int = 1) -> list[float]:
        link, vectors = DiffusionLink(embed_dim).eval(), unit_vectors(count, embed_dim, 0)
        return repeated(lambda: link(vectors, 50, steps, generator=torch.Generator().manual_seed(0)))

    def gap(count: int) -> list[float]:
        text = unit_vectors(count, 256, 1).numpy()
        audio = torch.nn.functional.normalize(torch.from_numpy(text) + 0.5 * unit_vectors(count, 256, 2), dim=1).numpy()
        reference = Reference(text, text, np.arange(count), median_bandwidth(text))
        return repeated(lambda: gap_metrics(audio, reference))

    def training_step(embed_dim: int) -> list[float]:
        return [step for step, _ in steps_and_products(BridgeConfig(batch_size=256), embed_dim, sizes.repeats, torch.device("cpu"))]

    curve("bridge, one step, D = 256", "clips", sizes.vectors, lambda count: call(256, count))
    curve("gap metrics, D = 256", "clips", sizes.scored, gap)
    curve("bridge, one step, 1,000 vectors", "D", sizes.widths, lambda width: call(width, 1000))
    curve("bridge, training step, 256 pairs", "D", sizes.widths, training_step)
    curve("bridge, 1,000 vectors, D = 256", "steps", sizes.steps, lambda steps: call(256, 1000, steps))
    if sizes.with_models:
        split, encoder = load_split(get_profile("mini"), "test"), ClapEncoder.from_pretrained("mini", "cpu")
        sounds = [split.waveform(place) for place in range(max(sizes.sounds))]
        captioner, vectors = captioner_and_vectors(CaptionSizes(clips=max(sizes.captions)))
        curve("embedding, mini-CLAP", "clips", sizes.sounds, lambda count: repeated(lambda: encoder.embed_audio(sounds[:count])))
        curve("captions, greedy, one batch", "clips", sizes.captions, lambda count: repeated(lambda: captioner.generate(vectors[:count])))


AXES = {"clips": "clips", "D": "embedding dimension D", "steps": "sampler steps n"}
LINES = ((COLOURS["bridged"], "^"), (GREY, "D"), (COLOURS["audio"], "o"), (COLOURS["text"], "s"))    # of a panel's curves, in their order


def growth_exponent(size: pd.Series, seconds: pd.Series) -> float:
    """b of seconds = a size^b, least squares on the logarithms."""
    return float(np.polyfit(np.log(size.astype(float)), np.log(seconds.astype(float)), 1)[0])


def growth_data(table: pd.DataFrame) -> pd.DataFrame | None:
    """The measured points of section growth of ``bench.csv``: over, name, size, seconds, exponent of the curve; None where there are none."""
    rows = table[(table.section == "growth") & (table.status == "ok")]
    if rows.empty:
        return None
    data = pd.DataFrame({"over": rows.over, "name": rows.name, "size": pd.to_numeric(rows["size"]), "seconds": pd.to_numeric(rows.ours)})
    exponent = {name: growth_exponent(curve["size"], curve.seconds) if len(curve) > 1 else np.nan for name, curve in data.groupby("name")}
    return data.assign(exponent=data.name.map(exponent)).reset_index(drop=True)


def plot_growth(data: pd.DataFrame) -> Figure:
    """Seconds over clips, D and steps on logarithmic axes, a panel each; the legend gives each curve's exponent b.

    Args:
        data: from :func:`growth_data`.
    """
    set_style()
    figure, axes = panels(3, width=PAGE, height=3.4, sharey=True)
    for axis, (over, label) in zip(axes, AXES.items(), strict=True):
        drawn = data[data.over == over]
        for (name, curve), (colour, marker) in zip(drawn.groupby("name", sort=False), LINES, strict=False):
            axis.plot(curve["size"], curve.seconds, color=colour, marker=marker, label=f"{name}\nb = {curve.exponent.iloc[0]:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds" if axis is axes[0] else "")
        if over != "clips":
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_xticks(sorted(set(drawn["size"]))[::2])
            axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0, handlelength=1.2)
    return figure
