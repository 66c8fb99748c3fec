"""Figures of Table 1: every system's gap metrics with intervals, and the gap against what it was closed for."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dl.gap import TITLES
from dl.plots.style import COLOURS, COLUMN, GREY, PAGE, house_style, panels
from dl.store import SYSTEMS

SYSTEM_MARKERS = {"raw": "o", "text_floor": "s", "diffusion_link": "D", "diffusion_link_ddim": "d"}
BOUNDS = ("text_floor", "text_ceiling")


def system_colour(system: str) -> str:
    """Orange for the audio vector as it is, blue for text, green for the bridge, grey for every other system."""
    if system in BOUNDS:
        return COLOURS["text"]
    return COLOURS["audio"] if system == "raw" else COLOURS["bridged"] if system.startswith("diffusion_link") else GREY


def summary(frame: pd.DataFrame, metrics: list[str], split: str = "test", bounds: bool = True) -> pd.DataFrame:
    """One row a system and metric (mean over runs, its interval), in the order of Table 1, from rows of ``metrics.csv``."""
    rows = frame[(frame.experiment == "gap") & (frame.split == split) & (frame.seed == "all") & (frame.space == "text") & frame.metric.isin(metrics)]
    rows = rows if bounds else rows[~rows.system.isin(BOUNDS)]
    rows = rows[["system", "metric", "value", "ci_low", "ci_high"]].assign(**{c: rows[c].astype(float) for c in ("value", "ci_low", "ci_high")})
    return rows.sort_values(["metric", "system"], key=lambda column: column.map({name: i for i, name in enumerate([*metrics, *SYSTEMS])}))


@house_style
def plot_systems(frame: pd.DataFrame, metrics: list[str], split: str = "test") -> tuple[Figure, pd.DataFrame]:
    """Dot plot: a panel for each metric, a line for each system, bars are 95 % intervals.

    Args:
        frame: rows of ``metrics.csv``.
        metrics: which, in this order.
        split: which split's rows.

    Returns:
        The figure, and the data behind it.
    """
    data = summary(frame, metrics, split)
    systems = list(dict.fromkeys(data.system))
    figure, axes = panels(len(metrics), width=PAGE, height=0.5 + 0.24 * len(systems), sharey=True)
    for axis, metric in zip(axes, metrics, strict=True):
        for row in data[data.metric == metric].itertuples():
            y = len(systems) - systems.index(row.system)
            axis.plot([row.ci_low, row.ci_high], [y, y], color=system_colour(row.system), linewidth=1.5)
            axis.plot(row.value, y, marker=SYSTEM_MARKERS.get(row.system, "^"), color=system_colour(row.system), markersize=5)
        axis.set(xlabel=TITLES.get(metric, metric))
        axis.grid(axis="y", color="#EEEEEE", linewidth=0.6)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(systems), 0, -1), systems)
    return figure, data


@house_style
def plot_trade_off(frame: pd.DataFrame, x: str = "rmg", y: str = "recall_at_10", split: str = "test") -> tuple[Figure, pd.DataFrame]:
    """One metric against another, a numbered point with both 95 % intervals for each system; bounds left out.

    Returns:
        The figure, and the data behind it.
    """
    data = summary(frame, [x, y], split, bounds=False)
    wide = data.pivot(index="system", columns="metric").loc[list(dict.fromkeys(data.system))]
    figure, (axis,) = panels(1, width=1.7 * COLUMN, height=3.3)
    points, colours = wide["value"][[x, y]].to_numpy(), []
    for number, (system, row) in enumerate(wide.iterrows(), 1):
        px, py, colour = row["value", x], row["value", y], system_colour(system)
        bright = 0.25 if colour == GREY else 0.8
        axis.plot([row["ci_low", x], row["ci_high", x]], [py, py], color=colour, linewidth=0.7, alpha=bright)
        axis.plot([px, px], [row["ci_low", y], row["ci_high", y]], color=colour, linewidth=0.7, alpha=bright)
        colours.append("black" if colour == GREY else colour)
        axis.plot(px, py, "o", color=colours[-1], markersize=3, zorder=3)
        axis.plot([], [], linestyle="", marker=f"${number}$", markersize=7, markeredgewidth=0.2, label=system, color=colours[-1])
    axis.set(xlabel=TITLES.get(x, x) + " (smaller is nearer)", ylabel=TITLES.get(y, y))
    figure.legend(loc="outside right center")
    figure.canvas.draw()                                                                   # where the points are is known from here on
    places = axis.transData.transform(points) * 72 / figure.dpi
    for number, (point, offset, colour) in enumerate(zip(points, free_offsets(places), colours, strict=True), 1):
        axis.annotate(str(number), point, offset, textcoords="offset points", ha="center", va="center", fontsize=7, color=colour, zorder=4,
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": colour, "shrinkA": 3, "shrinkB": 1})
    return figure, data


def free_offsets(places: np.ndarray, room: float = 9.0) -> list[tuple[float, float]]:
    """Where to write beside each of n points so that no two writings come nearer than ``room``, nor one to a point: (n, 2) in points -> n offsets."""
    angles = np.linspace(0.4, 0.4 + 2 * np.pi, 16, endpoint=False)
    rings = [(radius * np.cos(angle), radius * np.sin(angle)) for radius in (8, 14, 20, 28, 36, 44) for angle in angles]
    taken: list[np.ndarray] = []
    offsets: list[tuple[float, float]] = []
    for place in places:
        def space(offset: tuple[float, float], place: np.ndarray = place) -> float:
            return min(np.linalg.norm(np.array([*taken, *places]) - place - offset, axis=1))
        best = next((offset for offset in rings if space(offset) >= room), None) or max(rings, key=space)
        taken.append(place + best)
        offsets.append(best)
    return offsets
