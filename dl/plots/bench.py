"""The figure of ``tests/bench/bench.py``: how each cost grows."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from dl.plots.style import COLOURS, GREY, PAGE, house_style, panels

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


@house_style
def plot_growth(data: pd.DataFrame) -> Figure:
    """Seconds over clips, D and steps on logarithmic axes, a panel each; the legend gives each curve's exponent b.

    Args:
        data: from :func:`growth_data`.
    """
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
