"""Figures of notebooks 03-05: the gap, the noise schedule, training, start steps, the way across."""
from __future__ import annotations

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from dl.gap import TITLES
from dl.plots.style import COLOURS, GREY, MARKERS, PAGE, house_style, panels, scatter_roles

# --------------------------------------------------------------------------------- 03-05: the gap, the bridge, the way across
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
        if arrows and title in arrows:
            start, end = arrows[title]
            axis.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color="#404040", width=0.003, headwidth=5, zorder=3)
        for role, xy in points.items() if title not in without_centroids else ():
            x, y = np.mean(xy, 0)
            axis.scatter(x, y, s=70, color=COLOURS[role], marker=MARKERS[role], edgecolor="black", linewidth=0.9, zorder=4)
        repeated = axis is not axes[0] and len(set(axis_names.values())) == 1
        axis.set(title=title, xlabel=axis_names[title][0], ylabel="" if repeated else axis_names[title][1])
        axis.set_aspect("equal", adjustable="datalim")
    roles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(roles.values(), roles, loc="outside lower center", ncols=len(roles), markerscale=1.5)
    return figure


def gap_plane(vectors: dict[str, np.ndarray], mean_audio: np.ndarray, mean_text: np.ndarray) -> dict[str, np.ndarray]:
    """Coordinates in the plane in which the gap lies: along mean_t - mean_a, and along what captions differ in most at a right angle to it.

    With g = mean_t - mean_a: coordinate 1 is (x - mean_a) . g / |g|^2, the share of the gap that x has crossed (0 at the mean sound,
    1 at the mean caption); coordinate 2 is (x - mean_a) . v with v the first principal component of the text vectors after g is
    taken out of them, in units of the vectors. A PCA of captions need not show the gap at all, this plane cannot hide it. [ours: claim C2]

    Args:
        vectors: role -> (n, D); "text" must be among them.
        mean_audio, mean_text: (D,) means of the two modalities, of train.

    Returns:
        role -> (n, 2) float64.

    Example:
        >>> gap_plane({"audio": a, "bridged": b, "text": t}, train.audio.mean(0).numpy(), train.text.mean(0).numpy())["audio"].mean(0)
    """
    start = np.asarray(mean_audio, dtype=np.float64)
    gap = np.asarray(mean_text, dtype=np.float64) - start
    text = np.asarray(vectors["text"], dtype=np.float64)
    text = text - text.mean(0)
    across = np.linalg.svd(text - np.outer(text @ gap, gap) / (gap @ gap), full_matrices=False)[2][0]
    across = across * np.sign(across[np.abs(across).argmax()])                          # the sign of a component is arbitrary
    return {role: np.stack([(x - start) @ gap / (gap @ gap), (x - start) @ across], 1) for role, x in vectors.items()}


@house_style
def plot_place(audio: np.ndarray, text: np.ndarray, raw: np.ndarray, bridged: np.ndarray, points: int = 1500) -> tuple[Figure, pd.DataFrame]:
    """Where single clips lie in the map of train, :func:`gap_plane`, before and after the bridge (notebook 11).

    Args:
        audio, text: (n, D), (m, D) vectors of train, of which about ``points`` each are drawn; their means span the gap.
        raw, bridged: (c, D) vectors of the clips; an arrow leads from the one to the other, numbered from 1.

    Returns:
        The figure, and the data behind it: role, x, y.
    """
    cloud = {role: np.asarray(x)[:: max(1, len(x) // points)] for role, x in (("audio", audio), ("text", text))}
    plane = gap_plane({**cloud, "raw": np.asarray(raw), "bridged": np.asarray(bridged)}, np.mean(np.asarray(audio), 0), np.mean(np.asarray(text), 0))
    figure, (axis,) = panels(1, height=2.9)
    for role in cloud:
        axis.scatter(plane[role][:, 0], plane[role][:, 1], s=4, color=COLOURS[role], marker=MARKERS[role], alpha=0.35, linewidth=0, label=f"{role} of train", rasterized=True)
    start, end = plane["raw"], plane["bridged"]
    axis.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color="#303030", width=0.0025, headwidth=5, zorder=3)
    for name, role in (("raw", "audio"), ("bridged", "bridged")):
        axis.scatter(plane[name][:, 0], plane[name][:, 1], s=60, color=COLOURS[role], marker=MARKERS[role], edgecolor="black", linewidth=0.9, zorder=4,
                     label=f"your clip, {name}")
    for number, place in enumerate(start, 1):
        axis.annotate(str(number), place, (-9, 5), textcoords="offset points", zorder=5)
    for position in (0, 1):
        axis.axvline(position, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    axis.set(xlabel="share of the gap crossed (0: mean sound, 1: mean caption, of train)", ylabel="first component of captions\nat a right angle")
    legend = figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    plt.setp(legend.legend_handles[:2], sizes=[20], alpha=1)
    return figure, pd.DataFrame([(role, *xy) for role, rows in plane.items() for xy in rows], columns=["role", "x", "y"])


def planes_frame(planes: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """The data behind :func:`plot_crossing`: a row for each role and clip, two columns for each plane, named by its title."""
    roles = next(iter(planes.values()))
    frame = pd.DataFrame([(role, clip) for role, xy in roles.items() for clip in range(len(xy))], columns=["role", "clip"])
    for title, points in planes.items():
        frame[[f"{title}: x", f"{title}: y"]] = np.concatenate([points[role] for role in roles]).round(4)
    return frame


@house_style
def plot_crossing(plane: dict[str, np.ndarray], planes: dict[str, dict[str, np.ndarray]], axis_names: dict[str, tuple[str, str]],
                  arrows: np.ndarray | None = None, without_centroids: tuple[str, ...] = ()) -> Figure:
    """Who lies where along the gap: large, :func:`gap_plane` with marginal densities and centroids; beside it two other planes.

    Args:
        plane: role -> (n, 2), from :func:`gap_plane`.
        planes: two panels: title -> role -> (n, 2).
        axis_names: panel title -> names of the two axes.
        arrows: rows of the clips whose way from "audio" to "bridged" is drawn in the large panel; None draws none.
        without_centroids: titles of panels in which a mean has no meaning (t-SNE).
    """
    figure = plt.figure(figsize=(PAGE, 3.9), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[1.75, 1])
    inner = grid[0].subgridspec(2, 2, height_ratios=[1, 4.2], width_ratios=[4.6, 1], hspace=0.02, wspace=0.02)
    side = grid[1].subgridspec(2, 1)
    main = figure.add_subplot(inner[1, 0])
    above, beside = figure.add_subplot(inner[0, 0], sharex=main), figure.add_subplot(inner[1, 1], sharey=main)
    on_top = [role for role in ("audio", "text", "bridged") if role in plane]             # the bridge's answers last: nothing hides them
    scatter_roles(main, {role: plane[role] for role in on_top}, size=6)
    main.set(xlim=main.get_xlim(), ylim=main.get_ylim(), xlabel="share of the gap crossed (0: mean sound, 1: mean caption, of train)",
             ylabel="first component of captions at a right angle")
    if arrows is not None:
        start, end = plane["audio"][arrows], plane["bridged"][arrows]
        main.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color="#303030", width=0.0025, headwidth=5, zorder=3)
    for role, xy in plane.items():
        for axis, values, name in ((above, xy[:, 0], "x"), (beside, xy[:, 1], "y")):
            sns.kdeplot(**{name: values}, ax=axis, color=COLOURS[role], fill=True, alpha=0.2, linewidth=1.0, gridsize=80, warn_singular=False)
        above.axvline(xy[:, 0].mean(), color=COLOURS[role], linewidth=1.0)
    for position in (0, 1):
        main.axvline(position, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    for axis in (above, beside):
        axis.axis("off")
    above.set_title("along the gap, from the mean sound to the mean caption")
    others = [figure.add_subplot(side[row]) for row in range(2)]
    for axis, (title, points) in zip(others, planes.items(), strict=True):
        scatter_roles(axis, {role: points[role] for role in on_top}, size=4 if title in without_centroids else 2.5)
        across, up = axis_names[title]
        axis.set(title=title, xlabel=across, ylabel=up.replace(" (", "\n("), xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
    for axis, points in ((main, plane), *zip(others, planes.values(), strict=True)):      # each centroid is smaller than the one before: it hides none
        for role, size in zip(on_top, (150, 60, 22), strict=False) if axis.get_title() not in without_centroids else ():
            x, y = np.mean(points[role], 0)
            axis.scatter(x, y, s=size, color=COLOURS[role], marker=MARKERS[role], edgecolor="black", linewidth=0.9, zorder=4)
    handles = dict(zip(*main.get_legend_handles_labels()[::-1], strict=True))
    figure.legend([handles[role] for role in plane], list(plane), loc="outside lower center", ncols=len(plane), markerscale=1.5)
    return figure


@house_style
def plot_trajectory(frame: pd.DataFrame, caption: str) -> Figure:
    """One clip on its way through the reverse process, from top to bottom: cosines, and the nearest caption at each stop, in words.

    Args:
        frame: a row a stop: ``level`` (its name), ``own_cosine`` (with the clip's own caption), ``nearest_cosine``, ``nearest`` (that caption).
        caption: the clip's own, above the figure; where it is the nearest, it stands in bold.
    """
    figure, axis = plt.subplots(figsize=(PAGE, 0.21 * len(frame) + 1.0), layout="constrained")
    rows = np.arange(len(frame))
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 7, "annotation_clip": False}
    axis.plot(frame.nearest_cosine, rows, color=COLOURS["text"], marker=MARKERS["text"], linestyle="--", label="cosine with the nearest caption")
    axis.plot(frame.own_cosine, rows, color=COLOURS["bridged"], marker=MARKERS["bridged"], label="cosine with its own caption")
    for row, stop in zip(rows, frame.itertuples(), strict=True):
        weight = "bold" if stop.nearest == caption else "normal"
        axis.annotate(textwrap.shorten(stop.nearest, 66, placeholder=" …"), (1.02, row), fontweight=weight, **place)
    axis.annotate("nearest caption of train", (1.02, -1), color="#404040", **place)
    axis.set(xlabel="cosine", ylabel="noise level", yticks=rows, yticklabels=frame.level, ylim=(len(frame) - 0.5, -0.6))
    axis.grid(axis="y", color="#E5E5E5", linewidth=0.5)
    figure.suptitle(f"its own caption: “{caption}”", fontsize=8)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
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
        axis.set(xlabel=TITLES[metric], yticks=rows, yticklabels=frame["map"], ylim=(-0.6, len(frame) - 0.4))
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
            axis.plot(rows.timestep, rows.value, color=colour, linestyle=line, marker=marker, markevery=len(rows) // 10, label=curve)
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
    metrics = [column for column in frame if column in TITLES]
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, 3.7), layout="constrained")
    for axis, metric in zip(axes.flat, metrics, strict=False):
        for (colour, marker, line), (steps, rows) in zip(LINES, frame.groupby("num_inference_steps"), strict=False):
            axis.plot(rows.start_timestep, rows[metric], color=colour, marker=marker, linestyle=line, label=f"n = {steps}")
        axis.axhline(raw[metric].iloc[0], color=COLOURS["audio"], linewidth=0.9, linestyle=":", label="raw audio")
        if chosen is not None:
            axis.axvline(chosen, color=GREY, linewidth=0.8, zorder=0, label="in use")
        axis.set(ylabel=TITLES[metric])
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
        axis.scatter(text[:, 0], text[:, 1], s=6, color=COLOURS["text"], marker=MARKERS["text"], alpha=0.35, linewidth=0, label="text", rasterized=True)
        axis.plot(path[:, :, 0], path[:, :, 1], color=GREY, linewidth=0.7, marker="." if len(path) <= 12 else None, markersize=3, zorder=2,
                  rasterized=True)
        for role, xy, label in (("audio", path[0], "noised audio"), ("bridged", path[-1], "answer")):
            axis.scatter(xy[:, 0], xy[:, 1], s=16, color=COLOURS[role], marker=MARKERS[role], linewidth=0, zorder=3, label=label)
        axis.set(title=title, xlabel="coordinate 1", ylabel="coordinate 2" if axis is axes[0] else "")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@house_style
def plot_start_step_clouds(clouds: dict[int, dict[str, np.ndarray]], clip: dict[int, np.ndarray], nearest: dict[int, list[tuple[float, str]]],
                           recall: dict[int, float], name: str, only: int | None = None) -> Figure:
    """Where answers land in the gap's plane, by start step, with one clip among them and the captions nearest to it in words.

    Args:
        clouds: k* -> role -> (n, 2), from :func:`gap_plane`; every panel spans all of them, so that nothing but the points moves.
        clip: k* -> (2,), the answer to the clip that is followed, drawn as a star.
        nearest: k* -> its nearest captions, (cosine, caption), the nearest first.
        recall: k* -> R@10 of the cloud, for the panel's title: what the plane does not show.
        name: of the clip.
        only: draw this k* alone, large, with the words beside it (what a slider shows); None draws small multiples, words below.
    """
    shown = list(clouds) if only is None else [only]
    if only is None:
        rows, lines = -(-len(shown) // 3), max(map(len, nearest.values()))
        figure, axes = plt.subplots(rows, 3, figsize=(PAGE, rows * (1.9 + 0.13 * lines) + 0.5), layout="constrained", sharex=True, sharey=True)
        axes = list(axes.flat)
    else:
        figure, axes = panels(2, height=2.9)
        axes[1].axis("off")
    everything = np.concatenate([np.concatenate(list(points.values())) for points in clouds.values()] + [np.stack(list(clip.values()))])
    low, high = everything.min(0), everything.max(0)
    margin = 0.05 * (high - low)
    for axis, k in zip(axes, shown, strict=False):
        scatter_roles(axis, clouds[k], size=4 if only is None else 8)
        axis.scatter(*clip[k], s=90, marker="*", color="white", edgecolor="black", linewidth=0.9, zorder=5, label=name)
        for position in (0, 1):
            axis.axvline(position, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
        axis.set(title=f"k* = {k}, R@10 {recall[k]:.2f}", xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        words = [f"{cosine:.2f}  {textwrap.shorten(caption, 38 if only is None else 52, placeholder=' …')}" for cosine, caption in nearest[k]]
        if only is None:
            axis.set_xlabel("\n".join(words), fontsize=6, loc="left")
            axis.tick_params(labelbottom=True)
        else:
            axes[1].text(0, 0.9, "\n".join(["cosine, and nearest caption of train:", "", *words]), va="top", linespacing=1.6)
    for axis in axes[len(shown):]:
        axis.axis("off")
    for axis in axes[:len(shown):3]:
        axis.set_ylabel("first component of captions\nat a right angle to the gap", fontsize=7)
    below = f"\nbelow each panel: the captions of train nearest to the answer for {name}, with their cosines"
    figure.supxlabel("share of the gap crossed (0: mean sound, 1: mean caption, of train)" + (below if only is None else ""), fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(clouds[shown[0]]) + 1, markerscale=1.2)
    return figure
