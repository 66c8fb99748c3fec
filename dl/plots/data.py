"""Figures of notebooks 00-02 and A1: toys in the plane, recordings, scenes, what the encoder aligns."""
from __future__ import annotations

from typing import cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from scipy.signal import spectrogram

from dl.plots.style import COLOURS, COLUMN, GREY, PAGE, house_style, panels, scatter_roles


# --------------------------------------------------------------------------------------------------------- toys in the plane
@house_style
def plot_circles(stages: dict[str, dict[str, np.ndarray]], links: bool = True) -> Figure:
    """Toy points on or in the unit circle, a panel for each stage ("before training", "after training").

    Args:
        stages: panel title -> role -> (n, 2).
        links: join the i-th points of a panel's first two roles by a grey line (pairs).
    """
    figure, axes = panels(len(stages), width=COLUMN if len(stages) == 1 else PAGE, height=2.7)
    handles: dict[str, Artist] = {}
    for axis, (title, points) in zip(axes, stages.items(), strict=True):
        axis.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.6, linestyle=":"))
        roles = list(points)
        scatter_roles(axis, points, (roles[0], roles[1]) if links else None)
        axis.set(title=title, xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xlabel="coordinate 1", ylabel="coordinate 2")
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def points_frame(stages: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """The data behind :func:`plot_circles`: stage, role, pair, x, y."""
    rows = [(stage, role, pair, *map(float, xy)) for stage, points in stages.items() for role, cloud in points.items() for pair, xy in enumerate(cloud)]
    return pd.DataFrame(rows, columns=["stage", "role", "pair", "x", "y"])


# ------------------------------------------------------------------------------------------------------------- 01: hear the data
@house_style
def plot_recordings(recordings: pd.DataFrame) -> Figure:
    """How many recordings each category holds, stacked by split; column ``split`` and ``category`` of ``recordings.csv``."""
    figure, (axis,) = panels(1, width=COLUMN, height=2.4)
    order = recordings.category.value_counts().index
    frame = recordings.assign(category=pd.Categorical(recordings.category, order))
    sns.histplot(frame, y="category", hue="split", hue_order=["test", "val", "train"], multiple="stack", discrete=True, shrink=0.8,
                 palette=["#000000", GREY, "#D9D9D9"], alpha=1, linewidth=0, ax=axis)
    axis.set(xlabel="recordings", ylabel="")
    legend = axis.get_legend()
    assert legend is not None                         # histplot made one for the hue
    legend.set_title("")
    return figure


@house_style
def plot_scene(tracks: dict[str, np.ndarray], mix: np.ndarray, sampling_rate: int) -> Figure:
    """A scene: what each recording adds, the mix, and its spectrogram.

    Args:
        tracks: label -> (samples,), the recording at its place and level in the scene.
        mix: (samples,), the scene.
        sampling_rate: in Hz.
    """
    sounds = {**tracks, "the scene": mix}
    figure, axes = plt.subplots(len(sounds) + 1, 1, figsize=(PAGE, 0.75 * len(sounds) + 1.8), sharex=True, layout="constrained",
                                height_ratios=[1] * len(sounds) + [2.4])
    hop = max(1, len(mix) // 2000)
    times = np.arange(len(mix) // hop) * hop / sampling_rate
    for axis, (label, sound) in zip(axes, sounds.items(), strict=False):
        pieces = sound[: len(times) * hop].reshape(-1, hop)
        colour = COLOURS["audio"] if label == "the scene" else GREY
        axis.fill_between(times, pieces.min(1), pieces.max(1), color=colour, linewidth=0.4, rasterized=True)
        axis.set_ylim(-1, 1)
        axis.set_title(label, loc="left", pad=2)
    axes[len(sounds) // 2].set_ylabel("amplitude")
    frequencies, frames, power = spectrogram(mix, sampling_rate, nperseg=1024, noverlap=64)
    level = 10 * np.log10(power + 1e-20)
    image = axes[-1].pcolormesh(frames, frequencies / 1000, level - level.max(), cmap="magma", vmin=-70, vmax=0, rasterized=True)
    axes[-1].set(xlabel="time (s)", ylabel="frequency (kHz)", ylim=(0, 16))
    figure.colorbar(image, ax=axes[-1], label="level (dB, peak = 0)", pad=0.01)
    return figure


def envelope_frame(tracks: dict[str, np.ndarray], mix: np.ndarray, sampling_rate: int) -> pd.DataFrame:
    """The data behind :func:`plot_scene`: peak amplitude in every 10 ms of each recording and of the scene."""
    hop = sampling_rate // 100
    sounds = {**tracks, "the scene": mix}
    peaks = {label: np.abs(sound[: len(sound) // hop * hop].reshape(-1, hop)).max(1) for label, sound in sounds.items()}
    return pd.DataFrame({"time_s": np.arange(len(mix) // hop) / 100, **peaks})


@house_style
def plot_waveform(sound: np.ndarray, sampling_rate: int) -> Figure:
    """A sound's waveform: the smallest and the largest sample of every few milliseconds (notebook 11).

    Args:
        sound: (samples,), mono, in [-1, 1].
        sampling_rate: in Hz.
    """
    figure, (axis,) = panels(1, height=1.2)
    hop = max(1, len(sound) // 2000)
    times = np.arange(len(sound) // hop) * hop / sampling_rate
    pieces = np.asarray(sound)[: len(times) * hop].reshape(-1, hop)
    axis.fill_between(times, pieces.min(1), pieces.max(1), color=COLOURS["audio"], linewidth=0.4, rasterized=True)
    axis.set(xlabel="time (s)", ylabel="amplitude", xlim=(0, len(sound) / sampling_rate), ylim=(-1, 1))
    return figure


# --------------------------------------------------------------------------------------------------- 02: encode audio and text
@house_style
def plot_alignment(cosines: pd.DataFrame, recalls: pd.DataFrame) -> Figure:
    """Left: cosines of pairs and of strangers. Right: how often a clip's own caption is among the nearest K.

    Args:
        cosines: ``kind`` ("a clip and its caption", "a clip and another's caption"), ``cosine``.
        recalls: ``clips`` (name of the group), ``metric`` ("R@1", "R@10"), ``value``, ``chance`` (0..1).
    """
    figure, (left, right) = panels(2, height=2.4, width_ratios=[1, 1.25])
    kinds = list(cosines.kind.unique())
    sns.histplot(cosines, x="cosine", hue="kind", hue_order=kinds, palette=[COLOURS["audio"], GREY], stat="density", common_norm=False,
                 element="step", bins=40, linewidth=0.8, ax=left)
    left.set(xlabel="cosine", ylabel="density")
    sns.move_legend(left, "upper left", title="")
    left.set_ylim(top=left.get_ylim()[1] * 1.35)
    sns.barplot(recalls, y="clips", x="value", hue="metric", palette=["#D9D9D9", COLOURS["audio"]], saturation=1, ax=right)
    for bars in right.containers:
        right.bar_label(cast(BarContainer, bars), fmt="%.2f", fontsize=7, padding=2)
    for metric, line in zip(recalls.metric.unique(), ("--", ":"), strict=False):
        right.axvline(recalls.chance[recalls.metric == metric].iloc[0], color="black", linewidth=0.7, linestyle=line, label=f"{metric} by chance")
    right.set(xlabel="share of clips found", ylabel="", xlim=(0, 1))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
