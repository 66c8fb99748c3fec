"""Figures of the gap: notebooks 03, 05 and 11."""
from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dl.gap import TITLES
from dl.plots.style import COLOURS, GREY, MARKERS, house_style, panels, scatter_roles

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
