"""Figures of notebook A3: consensus against single answers, spread against error, few pairs, Frechet distance against pair cosine."""
from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dl.gap import TITLES
from dl.plots.style import COLOURS, COLUMN, GREY, PAGE, house_style, panels

CONTROL_MARKERS = {"ridge": "s", "regression_mlp": "D", "mappings": "v", "ridge_noise": "s", "regression_mlp_noise": "D", "ridge_residual": "v"}
LINES = {    # row of few_pairs: colour, marker, line
    "pretrained": (COLOURS["bridged"], "^", "-"), "scratch": (COLOURS["bridged"], "o", ":"), "ridge_text_prior": (COLOURS["text"], "v", "-"),
    "ridge": (GREY, "s", "-"), "regression_mlp": (GREY, "D", ":"),
}


def is_diffusion(name: str) -> bool:
    """Whether a row's samples come from a diffusion model."""
    return name.startswith(("diffusion_link", "conditional_diffusion"))


def knob(name: str) -> float:
    """The number that a row of the distribution varies: sigma of ``ridge_noise@s0.3``, k* of ``diffusion_link_ddim@k25n10``, else n.

    Example:
        >>> knob("diffusion_link_ddim@k25n10"), knob("conditional_diffusion@k999n5"), knob("ridge_noise@s0.3")
        (25.0, 5.0, 0.3)
    """
    family, setting = name.split("@")
    if setting.startswith("s"):
        return float(setting[1:])
    start, steps = setting[1:].split("n")
    return float(steps if family == "conditional_diffusion" else start)


def rows_of(frame: pd.DataFrame, experiment: str, split: str = "test") -> pd.DataFrame:
    """system, metric, value, ci_low, ci_high of one experiment's sums over runs."""
    rows = frame[(frame.experiment == f"generative:{experiment}") & (frame.split == split)]
    return rows[["system", "metric", "value", "ci_low", "ci_high"]].reset_index(drop=True)


@house_style
def plot_consensus(frame: pd.DataFrame, metric: str = "cider_d") -> tuple[Figure, pd.DataFrame]:
    """Every answer minus ridge and minus the regression MLP, with paired 95 % intervals; diffusion green, controls grey.

    Returns:
        The figure, and the data behind it.
    """
    data = rows_of(frame, "mbr:paired")
    data = data[data.metric == metric]
    baselines = ("ridge", "regression_mlp")
    answers = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in data.system if name.rsplit("-", 1)[0].endswith(("_mbr", "_mean"))))
    figure, axes = panels(2, width=PAGE, height=0.7 + 0.24 * len(answers), sharey=True, sharex=True)
    for axis, baseline in zip(axes, baselines, strict=True):
        for y, answer in enumerate(reversed(answers)):
            for row in data[data.system == f"{answer}-{baseline}"].itertuples():
                colour = COLOURS["bridged"] if is_diffusion(answer) else GREY
                axis.plot([row.ci_low, row.ci_high], [y, y], color=colour, linewidth=1.5)
                axis.plot(row.value, y, "^" if is_diffusion(answer) else "s", color=colour)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set(xlabel=f"{metric} minus that of {baseline}")
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(answers)), [name.replace("_mbr", ", consensus").replace("_mean", ", mean of samples") for name in reversed(answers)])
    return figure, data


@house_style
def plot_spread(frame: pd.DataFrame, clips: pd.DataFrame, groups: int = 6) -> tuple[Figure, pd.DataFrame]:
    """Left: mean error of equal groups of clips, by spread. Right: each predictor's Spearman correlation with the error.

    Args:
        frame: rows of ``metrics.csv``.
        clips: system, spread, error of each clip (``dl.studies.generative.run_spread``).

    Returns:
        The figure, and the data behind it.
    """
    figure, (left, right) = panels(2, width=PAGE, height=2.4)
    parts, systems = [], list(dict.fromkeys(clips.system))
    for system, marker in zip(systems, ("^", "o"), strict=False):
        of_system = clips[clips.system == system]
        group = pd.qcut(of_system.spread.rank(method="first"), groups, labels=False)
        means = of_system.groupby(group)[["spread", "error"]].mean()
        left.plot(means.spread, means.error, marker=marker, color=COLOURS["bridged"], linestyle="-" if marker == "^" else ":", label=system)
        parts.append(means.assign(system=system, metric="error of a group"))
    left.set(xscale="log", xlabel="spread of the samples, mean of a group", ylabel="1 - cos(mean of samples, text)")
    left.legend()
    data = rows_of(frame, "spread")
    predictors = list(dict.fromkeys(data.system))
    for shift, system, marker in zip((0.12, -0.12), systems, ("^", "o"), strict=False):
        for row in data[data.metric == f"spearman:{system}"].itertuples():
            y, colour = len(predictors) - predictors.index(row.system) + shift, COLOURS["bridged"] if row.system == "sample_spread" else GREY
            right.plot([row.ci_low, row.ci_high], [y, y], color=colour)
            right.plot(row.value, y, marker, color=colour)
    right.axvline(0, color="black", linewidth=0.6)
    right.set_yticks(range(len(predictors), 0, -1), [name.replace("_", " ") for name in predictors])
    right.set(xlabel="Spearman correlation with the error")
    return figure, pd.concat([*parts, data], ignore_index=True)


@house_style
def plot_few_pairs(frame: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """RMG, pair cosine and R@10 against the share of the pairs, with 95 % intervals; dashed lines need no pair at all.

    Returns:
        The figure, and the data behind it.
    """
    data = rows_of(frame, "few_pairs")
    data[["system", "share"]] = data.system.str.split("@", expand=True)
    data["share"] = data.share.astype(float)
    figure, axes = panels(3, width=PAGE, height=2.6)
    for axis, metric in zip(axes, ("rmg", "pair_cosine", "recall_at_10"), strict=True):
        for place, (system, (colour, marker, line)) in enumerate(LINES.items()):
            rows = data[(data.system == system) & (data.metric == metric)].sort_values("share")
            x = 100 * rows.share * 1.06 ** (place - 2)                              # side by side, so that intervals can be told apart
            bars = np.maximum([rows.value - rows.ci_low, rows.ci_high - rows.value], 0)
            axis.errorbar(x, rows.value, bars, color=colour, marker=marker, linestyle=line, elinewidth=0.6, label=system)
        for style, system in (("--", "diffusion_bridge"), ("-.", "projection")):
            for row in data[(data.system == system) & (data.metric == metric)].itertuples():
                axis.axhline(row.value, color="black", linewidth=0.6, linestyle=style, label=f"{system}, no pairs")
        shares = sorted(100 * share for share in data.share.unique() if share > 0)
        axis.set(xscale="log", xlabel="share of the pairs (%)", ylabel=TITLES[metric])
        axis.set_xticks(shares, [f"{share:g}" for share in shares])
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, data


@house_style
def plot_pareto(frame: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Frechet distance against pair cosine along each family's knob; above a control's line the control is better.

    Returns:
        The figure, and the data behind it.
    """
    data = rows_of(frame, "distribution")
    wide = data.pivot_table(index="system", columns="metric", values="value", sort=False)
    wide["family"], wide["knob"] = [name.split("@")[0] for name in wide.index], [knob(name) for name in wide.index]
    figure, (axis,) = panels(1, width=1.7 * COLUMN, height=3.0)
    for family, rows in wide.groupby("family", sort=False):
        rows, colour = rows.sort_values("knob"), COLOURS["bridged"] if is_diffusion(family) else GREY
        marker = CONTROL_MARKERS.get(family, "^" if family.startswith("diffusion_link") else "o")
        line = ":" if family == "conditional_diffusion" else "-"
        axis.plot(rows.pair_cosine, rows.frechet_distance, marker=marker, color=colour, label=family, linestyle=line)
        for name in (rows.index[0], rows.index[-1]):
            if is_diffusion(family):
                text = f"{'k*' if family.startswith('diffusion_link') else 'n'} {knob(name):g}"
                axis.annotate(text, rows.loc[name, ["pair_cosine", "frechet_distance"]],
                              xytext=(3, 3), textcoords="offset points", fontsize=6)
    axis.set(xlabel="pair cosine (right is better)", ylabel="Fréchet distance (low is better)")
    axis.legend()
    return figure, data
