"""Figures of notebook 09: each ablation as a dot plot, start steps and numbers of pairs as curves, all with 95 % intervals.

Data are rows of ``ablations.csv`` (``dl.studies.ablations.write_ablations``). A filled marker differs from the base beyond the interval of its
paired difference, a hollow one does not; the base is a diamond, its interval a band through all variants.
"""
from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dl.gap import ARROWS, DIRECTION, TITLES
from dl.plots.gap import LINES
from dl.plots.style import COLOURS, PAGE, house_style, panels
from dl.studies.ablation_table import METRICS, beyond

PAIR_LINES = {"diffusion_link": (COLOURS["bridged"], "^", "-"), "regression_mlp": ("#000000", "o", "--"), "ridge": ("#CC79A7", "s", ":")}


def metric_title(metric: str) -> str:
    """``RMG ↓``: the metric's short name and its better side, if it has one."""
    return TITLES[metric] + ARROWS.get(DIRECTION.get(metric, ""), "")


def variants(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that hold a variant's own figures (differences between two variants left out)."""
    return rows[rows["mean"].notna()]


def legend_handles() -> list[Line2D]:
    """What the markers mean."""
    mark: dict[str, Any] = {"marker": "o", "linestyle": "", "color": "black", "markersize": 4}
    return [Line2D([], [], **mark | {"marker": "D", "color": COLOURS["bridged"]}, label="base"),
            Line2D([], [], **mark, label="differs from the base beyond its interval"),
            Line2D([], [], **mark, markerfacecolor="white", label="does not")]


def draw_dots(axis: Axes, rows: pd.DataFrame, metric: str, places: dict[str, float]) -> None:
    """One ablation in one panel: a dot and an interval for each variant, at its height, and the base's interval as a band."""
    own = rows[rows.metric == metric].assign(y=lambda frame: frame.variant.map(places))
    base = own[own.is_base == 1].iloc[0]
    low, high = own.y.min() - 0.45, own.y.max() + 0.45
    green = COLOURS["bridged"]
    axis.fill_betweenx([low, high], base.ci_low, base.ci_high, color=green, alpha=0.13, linewidth=0)
    axis.plot([base["mean"]] * 2, [low, high], color=green, linewidth=0.6)
    axis.hlines(own.y, own.ci_low, own.ci_high, color=np.where(own.is_base == 1, green, "black"), linewidth=1.0)
    sure = np.array([beyond(row) for row in own.to_dict("records")])
    other = own.is_base == 0
    kinds = ((~other, "D", green, green), (other & sure, "o", "black", "black"), (other & ~sure, "o", "black", "white"))
    for mask, marker, edge, face in kinds:
        axis.plot(own["mean"][mask], own.y[mask], linestyle="", marker=marker, color=edge, markerfacecolor=face, markersize=4, markeredgewidth=0.8)


@house_style
def ablation_figure(name: str, rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """One ablation: a panel for each metric, a line for each variant.

    Args:
        name: of the ablation.
        rows: ``ablations.csv``.

    Returns:
        The figure, and the data behind it.
    """
    return _stacked(rows, [name])


@house_style
def all_ablations_figure(rows: pd.DataFrame, names: list[str]) -> tuple[Figure, pd.DataFrame]:
    """Several ablations below each other, a column for each metric.

    Returns:
        The figure, and the data behind it.
    """
    return _stacked(rows, names)


def _stacked(rows: pd.DataFrame, names: list[str]) -> tuple[Figure, pd.DataFrame]:
    data = variants(rows[rows.name.isin(names)])
    figure, axes = panels(len(METRICS), height=0.8 + 0.16 * (len(data) / len(METRICS) + len(names) * (len(names) > 1)), sharey=True)
    ticks: dict[float, str] = {}
    y = 0.0
    for name in names:
        if len(names) > 1:
            y -= 1
            axes[0].text(-0.03, y, name, transform=axes[0].get_yaxis_transform(), ha="right", va="center", fontsize=7, fontweight="bold")
        own = data[data.name == name]
        order = list(dict.fromkeys(own.variant))
        places = {variant: y - 1 - i for i, variant in enumerate(order)}
        y -= len(order)
        ticks |= {place: variant for variant, place in places.items()}
        for axis, metric in zip(axes, METRICS, strict=True):
            draw_dots(axis, own, metric, places)
    for axis, metric in zip(axes, METRICS, strict=True):
        axis.set(xlabel=metric_title(metric), ylim=(y - 0.6, -0.4))
        axis.tick_params(axis="y", length=0)
        axis.locator_params(axis="x", nbins=3)
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    figure.legend(handles=legend_handles(), loc="outside lower center", ncols=3)
    return figure, data


def _errors(own: pd.DataFrame) -> np.ndarray:
    """(2, n) lengths of the error bars; an interval that leaves its mean out has a bar on one side only."""
    return np.maximum([own["mean"] - own.ci_low, own.ci_high - own["mean"]], 0)


def _grid(height: float = 3.5) -> tuple[Figure, list[Axes], Axes]:
    """Five panels, and a sixth for the legend."""
    figure, axes = plt.subplots(2, 3, figsize=(PAGE, height), layout="constrained", sharex=True)
    axes.flat[-1].axis("off")
    axes[0, 2].tick_params(labelbottom=True)
    return figure, list(axes.flat[:-1]), axes.flat[-1]


@house_style
def start_step_figure(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The start step k* and the number of DDIM steps n: a panel for each metric, a line for each n, bars are 95 % intervals.

    Args:
        rows: ``ablations.csv``, whose ablation start_step has variants ``k300_n10``.

    Returns:
        The figure, and the data behind it.
    """
    data = variants(rows[rows.name == "start_step"])
    named = data.variant.str.extract(r"k(?P<k>\d+)_n(?P<n>\d+)").astype(int)
    data = data.assign(start_timestep=named.k, num_inference_steps=named.n)
    figure, axes, corner = _grid()
    for axis, metric in zip(axes, METRICS, strict=True):
        of_metric = data[data.metric == metric]
        for shift, (colour, marker, line), (n, own) in zip((-6, -2, 2, 6), LINES, of_metric.groupby("num_inference_steps"), strict=False):
            axis.errorbar(own.start_timestep + shift, own["mean"], _errors(own), color=colour, marker=marker,
                          linestyle=line, elinewidth=0.6, label=f"n = {n}")
        base = of_metric[of_metric.is_base == 1].iloc[0]
        axis.axhline(base["mean"], color=COLOURS["bridged"], linewidth=0.8, zorder=0, label="base")
        axis.set(ylabel=metric_title(metric))
    figure.supxlabel("start step k*", fontsize=8)
    corner.legend(*axes[0].get_legend_handles_labels(), loc="center left")
    return figure, data


@house_style
def pairs_figure(rows: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """The share of the training clips (logarithmic) against each metric, a line for each system, bars are 95 % intervals.

    Args:
        rows: ``ablations.csv``, whose ablation pairs has variants ``ridge_10pct``.

    Returns:
        The figure, and the data behind it.
    """
    data = variants(rows[rows.name == "pairs"])
    named = data.variant.str.extract(r"(?P<system>.+)_(?P<share>\d+)pct")
    data = data.assign(system=named.system, percent=named.share.astype(int))
    figure, axes, corner = _grid()
    for axis, metric in zip(axes, METRICS, strict=True):
        for factor, (system, (colour, marker, line)) in zip((0.94, 1.0, 1.06), PAIR_LINES.items(), strict=True):
            own = data[(data.metric == metric) & (data.system == system)]
            axis.errorbar(own.percent * factor, own["mean"], _errors(own), color=colour, marker=marker,
                          linestyle=line, elinewidth=0.6, label=system)
        axis.set_xscale("log")
        axis.set(ylabel=metric_title(metric))
        ticks = np.sort(data.percent.unique())
        axis.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axis.minorticks_off()
    figure.supxlabel("training clips used, %", fontsize=8)
    corner.legend(*axes[0].get_legend_handles_labels(), loc="center left")
    return figure, data
