"""The figure of ``tests/bench/bench.py``: how each cost grows."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from dl.plots.style import COLOURS, GREY, PAGE, house_style, panels

AXES = {"clips": "clips", "D": "embedding dimension D", "steps": "sampler steps n"}
LINES = ((COLOURS["bridged"], "^"), (COLOURS["text"], "s"), (COLOURS["audio"], "o"), (GREY, "D"))
BRIDGE = "bridge"


def growth_exponent(size: pd.Series, seconds: pd.Series) -> float:
    """b of seconds = a size^b, least squares on the logarithms."""
    return float(np.polyfit(np.log(size.astype(float)), np.log(seconds.astype(float)), 1)[0])


@house_style
def plot_growth(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Seconds over clips, D and steps on logarithmic axes, a panel each; the legend gives each curve's exponent.

    Args:
        table: rows of ``bench.csv``; those of section growth that were measured are drawn.

    Returns:
        The figure, and the data behind it: over, name, size, seconds, exponent.
    """
    rows = table[(table.section == "growth") & (table.status == "ok")]
    data = pd.DataFrame({"over": rows.over, "name": rows.name, "size": pd.to_numeric(rows["size"]), "seconds": pd.to_numeric(rows.ours)})
    curves = data.groupby(["over", "name"], sort=False)
    data["exponent"] = curves["size"].transform(lambda size: growth_exponent(size, data.seconds[size.index]) if len(size) > 1 else np.nan)
    figure, axes = panels(3, width=PAGE, height=2.9)
    for axis, (over, label) in zip(axes, AXES.items(), strict=True):
        for (name, curve), (colour, marker) in zip(data[data.over == over].groupby("name", sort=False), LINES, strict=False):
            axis.plot(curve["size"], curve.seconds, color=colour, marker=marker, label=f"{name}: {curve.exponent.iloc[0]:.2f}")
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds" if axis is axes[0] else "")
        ticks = sorted(set(data["size"][data.over == over])) if over != "clips" else [1, 10, 100, 1000, 10_000]
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), title="exponent")
    return figure, data.reset_index(drop=True)
