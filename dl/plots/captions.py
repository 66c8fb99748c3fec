"""Figures of notebooks 07 and 08: a decoder's training, caption scores by system, who gains and who loses from the bridge."""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from dl.gap import TITLES
from dl.plots.comparison import SYSTEM_MARKERS, system_colour
from dl.plots.gap import LINES
from dl.plots.style import COLOURS, COLUMN, GREY, PAGE, house_style, panels
from dl.store import SYSTEMS

MARKS = SYSTEM_MARKERS | {"text_ceiling": "s"}


@house_style
def plot_losses(histories: dict[str, pd.DataFrame]) -> tuple[Figure, pd.DataFrame]:
    """Loss curves of caption decoders: training left, val right.

    Args:
        histories: decoder's name -> ``step``, ``loss``, ``val_loss`` (NaN where it was not measured), nats a token.

    Returns:
        The figure, and the data behind it.
    """
    figure, axes = panels(2, height=2.1, sharey=True)
    for (name, history), (_, marker, line) in zip(histories.items(), LINES * len(histories), strict=False):
        colour = COLOURS["text"] if name.startswith("text") else system_colour(name)
        axes[0].plot(history.step, history.loss, color=colour, linestyle=line, label=name)
        seen = history.dropna(subset="val_loss")
        axes[1].plot(seen.step, seen.val_loss, color=colour, linestyle=line, marker=marker, label=name)
    axes[0].set(title="training", xlabel="step", ylabel="loss (nats a token)")
    axes[1].set(title="val", xlabel="step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="decoder trained on", loc="outside right upper")
    return figure, pd.concat([history.assign(decoder=name) for name, history in histories.items()], ignore_index=True)


@house_style
def plot_caption_scores(frame: pd.DataFrame, experiment: str, metrics: list[str], split: str = "test", decoding: str | None = None
                        ) -> tuple[Figure, pd.DataFrame]:
    """Dot plot of caption metrics: a panel for each metric, a line for each system and space, bars are 95 % intervals.

    Args:
        frame: rows of ``metrics.csv``.
        experiment: zero_shot or supervised.
        metrics: which, in this order; one without any value is left out.
        split: which split's rows.
        decoding: which decoding's rows; None takes all there are.

    Returns:
        The figure, and the data behind it.
    """
    data = frame[(frame.experiment == experiment) & (frame.split == split) & (frame.seed == "all") & frame.metric.isin(metrics)
                 & (True if decoding is None else frame.decoding == decoding)].dropna(subset="value")
    data = data[["system", "space", "decoding", "metric", "value", "ci_low", "ci_high"]]
    order = {name: i for i, name in enumerate(SYSTEMS)}
    lines = sorted(set(zip(data.system, data.space, strict=True)), key=lambda line: (order.get(line[0], len(order)), line[1] != "text"))
    shown = [metric for metric in metrics if metric in set(data.metric)]
    figure, axes = panels(max(1, len(shown)), width=PAGE, height=0.5 + 0.24 * max(2, len(lines)), sharey=True)
    for axis, metric in zip(axes, shown, strict=False):
        for row in data[data.metric == metric].itertuples():
            y = len(lines) - lines.index((row.system, row.space))
            axis.plot([row.ci_low, row.ci_high], [y, y], color=system_colour(row.system), linewidth=1.5)
            axis.plot(row.value, y, marker=MARKS.get(row.system, "^"), color=system_colour(row.system), markersize=5)
        axis.set(xlabel=TITLES.get(metric, metric), ylim=(0.4, len(lines) + 0.6))
        axis.grid(axis="y", color="#EEEEEE", linewidth=0.6)
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(lines), 0, -1), [system + ("" if space == "text" else f" ({space})") for system, space in lines])
    return figure, data


@house_style
def plot_gains(frame: pd.DataFrame) -> Figure:
    """Gain of each clip's caption against the gain of its vector, bridged minus raw; grey lines mark no change, black squares bin means.

    Args:
        frame: ``pair_cosine_gain`` and ``cider_d_gain``, a row a clip.
    """
    figure, (axis,) = panels(1, width=1.4 * COLUMN, height=2.7)
    axis.axhline(0, color=GREY, linewidth=0.7)
    axis.axvline(0, color=GREY, linewidth=0.7)
    axis.scatter(frame.pair_cosine_gain, frame.cider_d_gain, s=9, color=COLOURS["bridged"], marker="^", alpha=0.5, linewidth=0, label="a test clip",
                 rasterized=True)
    order = np.argsort(frame.pair_cosine_gain.to_numpy(), kind="stable")
    means = pd.DataFrame([frame.iloc[part][["pair_cosine_gain", "cider_d_gain"]].mean() for part in np.array_split(order, min(6, len(frame)))])
    axis.plot(means.pair_cosine_gain, means.cider_d_gain, color="black", marker="s", label="mean of a sixth of the clips")
    axis.set(xlabel="gain in pair cosine, bridged - raw", ylabel="gain in CIDEr-D, bridged - raw")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def label_gains(labels: Iterable[str], gains: Iterable[float], min_clips: int = 5) -> pd.DataFrame:
    """Mean gain over the clips of each label, with its 95 % t-interval over these clips (blank for one clip).

    Args:
        labels: of each clip, joined by semicolons as in ``scenes.csv``.
        gains: what each clip gained.
        min_clips: labels of fewer clips are left out.

    Returns:
        label, clips, gain, ci_low, ci_high; the largest gain first.
    """
    of_label: dict[str, list[float]] = {}
    for cell, gain in zip(labels, gains, strict=True):
        for label in dict.fromkeys(cell.split(";")):
            of_label.setdefault(label, []).append(float(gain))
    rows = []
    for label, values in of_label.items():
        n, mean = len(values), float(np.mean(values))
        half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else np.nan
        if n >= min_clips:
            rows.append({"label": label, "clips": n, "gain": mean, "ci_low": mean - half, "ci_high": mean + half})
    frame = pd.DataFrame(rows, columns=["label", "clips", "gain", "ci_low", "ci_high"])
    return frame.sort_values(["gain", "label"], ascending=[False, True], ignore_index=True)


@house_style
def plot_label_gains(frame: pd.DataFrame, n: int = 10) -> Figure:
    """The ``n`` labels that gain most and the ``n`` that lose most: mean gain in CIDEr-D, bars are 95 % intervals over the label's clips.

    Args:
        frame: as :func:`label_gains` gives it.
    """
    shown = frame if len(frame) <= 2 * n else pd.concat([frame.head(n), frame.tail(n)])
    places = np.arange(len(shown))[::-1]
    figure, (axis,) = panels(1, width=1.6 * COLUMN, height=0.6 + 0.16 * len(shown))
    axis.axvline(0, color=GREY, linewidth=0.7)
    for gain, low, high, y in zip(shown.gain, shown.ci_low, shown.ci_high, places, strict=True):
        colour = COLOURS["bridged"] if gain > 0 else COLOURS["audio"]
        axis.plot([low, high], [y, y], color=colour, linewidth=1.2)
        axis.plot(gain, y, marker="^" if gain > 0 else "o", color=colour)
    axis.set_yticks(places, [f"{label} ({clips})" for label, clips in zip(shown.label, shown.clips, strict=True)])
    axis.set(xlabel="mean gain in CIDEr-D, bridged - raw", ylim=(-0.7, len(shown) - 0.3))
    axis.tick_params(axis="y", length=0)
    return figure
