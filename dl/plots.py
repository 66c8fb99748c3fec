"""Figures: one function each, in one style; :func:`save_figure` writes them with the numbers behind them.

Colours and markers belong to roles (Okabe-Ito, readable without colour): audio orange circles, text blue squares, bridged green
triangles. A figure function takes arrays or a DataFrame, computes nothing that a result rests on, and returns a Figure 3.3 or
6.9 inches wide (one column or the page), 8 pt. Sections follow the notebooks.
"""
from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.signal import spectrogram

from dl.config import Profile
from dl.results import atomic_write

COLUMN, PAGE = 3.3, 6.9                                   # inches wide
COLOURS = {"audio": "#E69F00", "text": "#0072B2", "bridged": "#009E73"}
MARKERS = {"audio": "o", "text": "s", "bridged": "^"}
GREY = "#8C8C8C"                                          # chance, baselines, what belongs to no role
FORMATS = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "font.family": "DejaVu Sans", "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 4, "figure.dpi": 110, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "pdf.fonttype": 42, "svg.hashsalt": "diffusion-link",
}


# ------------------------------------------------------------------------------------------------------------ style and files
@contextmanager
def style() -> Iterator[None]:
    """The house's style inside a ``with``; the caller's settings come back after it (those of the notebook's backend are left alone)."""
    ours = sns.axes_style("ticks") | STYLE
    before = {key: plt.rcParams[key] for key in ours}
    plt.rcParams.update(ours)
    try:
        yield
    finally:
        plt.rcParams.update(before)


def house_style(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: run a figure function in the house's style."""
    @wraps(function)
    def styled(*args, **kwargs) -> Figure:
        with style():
            return function(*args, **kwargs)
    return styled


def save_figure(profile: Profile, figure: Figure, name: str, data: pd.DataFrame) -> Path:
    """Write ``results/<profile>/figures/<name>.{pdf,svg,png}`` and the data behind the figure as ``<name>.csv``.

    Every file is written whole or not at all; equal figures give equal bytes (no dates, fixed ids in the SVG).

    Args:
        name: file name without a suffix; begins with the notebook's number ("02_retrieval").
        data: the numbers that the figure shows; floats keep 6 significant digits.

    Returns:
        The path of the PNG (200 dots an inch).
    """
    folder = profile.results_dir / "figures"
    for suffix, metadata in FORMATS.items():
        file = io.BytesIO()
        with style():
            figure.savefig(file, format=suffix, dpi=200, metadata=metadata)
        atomic_write(folder / f"{name}.{suffix}", file.getvalue())
    atomic_write(folder / f"{name}.csv", data.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return folder / f"{name}.png"


def panels(n: int, width: float = PAGE, height: float = 2.2, **kwargs) -> tuple[Figure, list[Axes]]:
    """A Figure of ``n`` axes side by side, ``width`` x ``height`` inches, laid out so that no text is cut."""
    figure, axes = plt.subplots(1, n, figsize=(width, height), layout="constrained", squeeze=False, **kwargs)
    return figure, list(axes[0])


def scatter_roles(axis: Axes, points: dict[str, np.ndarray], links: tuple[str, str] | None = None, size: float = 16) -> None:
    """Draw 2-D points in the colour and marker of their role.

    Args:
        points: role ("audio", "text", "bridged") -> (n, 2).
        links: two roles whose i-th points are joined by a grey line (pairs), or None.
    """
    if links:
        for start, end in zip(points[links[0]], points[links[1]], strict=True):
            axis.plot(*np.stack([start, end], 1), color=GREY, linewidth=0.6, zorder=1)
    for role, xy in points.items():
        axis.scatter(*np.asarray(xy).T, s=size, color=COLOURS[role], marker=MARKERS[role], label=role, linewidth=0, zorder=2)


# --------------------------------------------------------------------------------------------------------- toys in the plane
@house_style
def plot_circles(stages: dict[str, dict[str, np.ndarray]], links: bool = True) -> Figure:
    """Toy points on or in the unit circle, a panel for each stage ("before training", "after training").

    Args:
        stages: panel title -> role -> (n, 2).
        links: join the i-th points of a panel's first two roles by a grey line (pairs).
    """
    figure, axes = panels(len(stages), width=COLUMN if len(stages) == 1 else PAGE, height=2.7)
    handles = {}
    for axis, (title, points) in zip(axes, stages.items(), strict=True):
        axis.add_patch(plt.Circle((0, 0), 1, fill=False, color=GREY, linewidth=0.6, linestyle=":"))
        scatter_roles(axis, points, tuple(points)[:2] if links else None)
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
    axis.get_legend().set_title("")
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
    for container in right.containers:
        right.bar_label(container, fmt="%.2f", fontsize=7, padding=2)
    for metric, line in zip(recalls.metric.unique(), ("--", ":"), strict=False):
        right.axvline(recalls.chance[recalls.metric == metric].iloc[0], color="black", linewidth=0.7, linestyle=line, label=f"{metric} by chance")
    right.set(xlabel="share of clips found", ylabel="", xlim=(0, 1))
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


# --------------------------------------------------------------------------------- 03-05: the gap, the bridge, the way across
METRIC_NAMES = {"pair_cosine": "pair cosine", "cosine_margin": "cosine margin", "centroid_gap": "centroid gap", "rmg": "RMG",
                "recall_at_10": "R@10", "effective_rank": "effective rank"}
LINES = (("#000000", "o", "-"), ("#CC79A7", "s", "--"), ("#56B4E9", "^", "-."), ("#D55E00", "D", ":"))   # for what has no role


@house_style
def plot_planes(planes: dict[str, dict[str, np.ndarray]], axis_names: dict[str, tuple[str, str]], size: float = 7,
                arrows: dict[str, tuple[np.ndarray, np.ndarray]] | None = None, without_centroids: tuple[str, ...] = ()) -> Figure:
    """Points seen in planes, a panel each, with the centroid of every role as a large marker.

    Args:
        planes: panel title -> role -> (n, 2).
        axis_names: panel title -> names of the two axes.
        size: of the points, in points squared.
        arrows: panel title -> starts and ends, (m, 2) each, of the arrows in that panel; None draws none.
        without_centroids: titles of panels in which a mean has no meaning (t-SNE).
    """
    figure, axes = panels(len(planes), height=2.7 if len(planes) < 4 else 2.1)
    for axis, (title, points) in zip(axes, planes.items(), strict=True):
        scatter_roles(axis, points, size=size)
        if title in (arrows or {}):
            start, end = arrows[title]
            axis.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color="#404040", width=0.003, headwidth=5, zorder=3)
        for role, xy in points.items() if title not in without_centroids else ():
            axis.scatter(*np.mean(xy, 0), s=70, color=COLOURS[role], marker=MARKERS[role], edgecolor="black", linewidth=0.9, zorder=4)
        repeated = axis is not axes[0] and len(set(axis_names.values())) == 1
        axis.set(title=title, xlabel=axis_names[title][0], ylabel="" if repeated else axis_names[title][1])
        axis.set_aspect("equal", adjustable="datalim")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=1.5)
    return figure


@house_style
def plot_maps(frame: pd.DataFrame) -> Figure:
    """Some maps of the audio vectors, scored: a row each, a panel for each metric; a value that is absent is left out.

    Args:
        frame: ``map`` (its name), then one column for each metric.
    """
    metrics = [column for column in frame if column != "map"]
    figure, axes = panels(len(metrics), height=0.28 * len(frame) + 0.7, sharey=True)
    rows = np.arange(len(frame))[::-1]
    for axis, metric in zip(axes, metrics, strict=True):
        axis.hlines(rows, 0, frame[metric], color=GREY, linewidth=0.8)
        axis.plot(frame[metric], rows, "o", color="black", clip_on=False)
        axis.set(xlabel=METRIC_NAMES[metric], yticks=rows, yticklabels=frame["map"], ylim=(-0.6, len(frame) - 0.4))
        axis.set_xlim(0, 1.15 * max(frame[metric].max(), 0.01))
        axis.tick_params(axis="y", length=0)
    return figure


@house_style
def plot_schedule(frame: pd.DataFrame) -> Figure:
    """Left: abar of several schedules. Right: how large signal and noise are in one coordinate, with and without the scale.

    Args:
        frame: ``timestep``, ``panel`` ("schedule" or "scale"), ``curve`` (its name), ``value``.
    """
    figure, axes = panels(2, height=2.9)
    for axis, panel, name in zip(axes, ("schedule", "scale"), ("signal's share of variance", "std. of a coordinate"), strict=True):
        chosen = frame[frame.panel == panel]
        for (colour, marker, line), (curve, rows) in zip(LINES, chosen.groupby("curve", sort=False), strict=False):
            axis.plot(rows.timestep, rows.value, color=colour, linestyle=line, marker=marker, markevery=100, label=curve)
        axis.set(xlabel="noise level k", ylabel=name, ylim=(0, 1.05))
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return figure


@house_style
def plot_training(history: pd.DataFrame) -> Figure:
    """The parts of the loss and the pair cosine on val against the training step; a line for each training seed.

    Args:
        history: of all seeds: ``seed``, ``step``, ``loss_cross``, ``loss_self``, ``loss_topology``, ``val_pair_cosine``.
    """
    names = {"loss_cross": "cross-sample loss", "loss_self": "self loss", "loss_topology": "topology loss", "val_pair_cosine": "pair cosine on val"}
    figure, axes = panels(4, height=2.0)
    for axis, (column, name) in zip(axes, names.items(), strict=True):
        for (colour, marker, line), (seed, rows) in zip(LINES, history.groupby("seed"), strict=False):
            rows = rows.dropna(subset=column)
            axis.plot(rows.step, rows[column], color=colour, linestyle=line, marker=marker, markevery=max(1, len(rows) // 5), label=f"training seed {seed}")
        axis.set(xlabel="training step", ylabel=name, xlim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@house_style
def plot_start_steps(frame: pd.DataFrame, raw: pd.DataFrame, chosen: int | None = None) -> Figure:
    """The gap on val, with retrieval and effective rank, against the start step; a line for each number of steps.

    Args:
        frame: ``start_timestep``, ``num_inference_steps``, one column for each metric (mean over noise seeds).
        raw: one row, the same metrics of the raw audio vectors (dotted line).
        chosen: the start step in use, marked by a vertical line.
    """
    metrics = [column for column in frame if column in METRIC_NAMES]
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 3.7), layout="constrained")
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for (colour, marker, line), (steps, rows) in zip(LINES, frame.groupby("num_inference_steps"), strict=False):
            axis.plot(rows.start_timestep, rows[metric], color=colour, marker=marker, linestyle=line, label=f"n = {steps}")
        axis.axhline(raw[metric].iloc[0], color=COLOURS["audio"], linewidth=0.9, linestyle=":", label="raw audio")
        if chosen is not None:
            axis.axvline(chosen, color=GREY, linewidth=0.8, zorder=0, label="in use")
        axis.set(ylabel=METRIC_NAMES[metric])
    figure.supxlabel("start step k*", fontsize=8)
    for axis in axes.flat[len(metrics):]:
        axis.axis("off")
    axes.flat[-1].legend(*axes[0, 0].get_legend_handles_labels(), loc="center left")
    return figure


@house_style
def plot_paths(paths: dict[str, np.ndarray], text: np.ndarray) -> Figure:
    """Samples on their way from the noised audio point to the answer, in the plane of a toy; a panel for each way of sampling.

    Args:
        paths: panel title -> (n + 1, m, 2), the trajectory of m samples.
        text: (t, 2) the toy's text points, on the same scale.
    """
    figure, axes = panels(len(paths), height=2.7, sharex=True, sharey=True)
    for axis, (title, path) in zip(axes, paths.items(), strict=True):
        axis.scatter(*text.T, s=6, color=COLOURS["text"], marker=MARKERS["text"], alpha=0.35, linewidth=0, label="text")
        axis.plot(path[:, :, 0], path[:, :, 1], color=GREY, linewidth=0.7, marker="." if len(path) <= 12 else None, markersize=3, zorder=2)
        for role, xy, label in (("audio", path[0], "noised audio"), ("bridged", path[-1], "answer")):
            axis.scatter(*xy.T, s=16, color=COLOURS[role], marker=MARKERS[role], linewidth=0, zorder=3, label=label)
        axis.set(title=title, xlabel="coordinate 1", ylabel="coordinate 2" if axis is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# --------------------------------------------------------------------------------------------------- A1: build the mini corpus
@house_style
def plot_layouts(scenes: pd.DataFrame, seconds: dict[str, float]) -> Figure:
    """One scene of every layout as a score: a bar for each recording, from its start to its end, thinner where it is quieter.

    Args:
        scenes: rows of ``scenes.csv``.
        seconds: recording id -> its length in s.
    """
    figure, axes = plt.subplots(len(scenes), 1, figsize=(PAGE, 0.75 * len(scenes) + 0.4), sharex=True, layout="constrained", squeeze=False)
    for axis, (_, scene) in zip(axes[:, 0], scenes.iterrows(), strict=True):
        bars = score_frame(scene, seconds)
        for row, bar in bars.iterrows():
            axis.barh(row, bar.end_s - bar.start_s, left=bar.start_s, height=0.85 * 10 ** (bar.gain_db / 20), color=COLOURS["audio"])
            axis.text(bar.start_s + 0.05, row, bar.label, va="center", fontsize=7)
        axis.axvline(float(scene.seconds), color="black", linewidth=0.8)
        axis.set(yticks=[], ylim=(len(bars) - 0.4, -0.6), xlim=(0, 10))
        axis.set_title(scene.layout, loc="left", pad=2)
    axes[-1, 0].set_xlabel("time (s); the black line is the end of the scene")
    return figure


def score_frame(scene: pd.Series, seconds: dict[str, float]) -> pd.DataFrame:
    """A scene's recordings with label, start and end (s, at most the scene's) and gain (dB)."""
    cells = zip(scene.recordings.split(";"), scene.labels.split(";"), scene.offsets_s.split(";"), scene.gains_db.split(";"), strict=True)
    rows = [(clip_id, label, float(start), min(float(start) + seconds[clip_id], float(scene.seconds)), float(gain)) for clip_id, label, start, gain in cells]
    return pd.DataFrame(rows, columns=["recording", "label", "start_s", "end_s", "gain_db"])
