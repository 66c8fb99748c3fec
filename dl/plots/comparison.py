"""Figures of Table 1: every system's gap metrics with intervals, and the gap against what it was closed for."""
from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from dl.metrics import TITLES
from dl.plots.style import COLOURS, COLUMN, GREY, PAGE, house_style, panels
from dl.results import SYSTEMS

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
    for number, (system, row) in enumerate(wide.iterrows(), 1):
        px, py, colour = row["value", x], row["value", y], system_colour(system)
        bright = 0.25 if colour == GREY else 0.8
        axis.plot([row["ci_low", x], row["ci_high", x]], [py, py], color=colour, linewidth=0.7, alpha=bright)
        axis.plot([px, px], [row["ci_low", y], row["ci_high", y]], color=colour, linewidth=0.7, alpha=bright)
        axis.plot(px, py, "o", color="white", markersize=8, zorder=3)
        axis.plot(px, py, linestyle="", marker=f"${number}$", markersize=7, markeredgewidth=0.2, label=system, zorder=4,
                  color="black" if colour == GREY else colour)
    axis.set(xlabel=TITLES.get(x, x) + " (smaller is nearer)", ylabel=TITLES.get(y, y))
    figure.legend(loc="outside right center")
    return figure, data
