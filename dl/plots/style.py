"""Figures: one function each, in one style; :func:`save_figure` writes them with the numbers behind them.

Colours and markers belong to roles (Okabe-Ito, readable without colour): audio orange circles, text blue squares, bridged green
triangles. A figure function takes arrays or a DataFrame, computes nothing that a result rests on, and returns a Figure 3.3 or
6.9 inches wide (one column or the page), 8 pt. Sections follow the notebooks.
"""
from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dl.config import Profile
from dl.store import atomic_write

Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")                                # a Figure, or a Figure and the data behind it
COLUMN, PAGE = 3.3, 6.9                                   # inches wide
COLOURS = {"audio": "#E69F00", "text": "#0072B2", "bridged": "#009E73"}
MARKERS = {"audio": "o", "text": "s", "bridged": "^"}
MANY_POINTS = 100                                         # a larger cloud is drawn as an image inside PDF and SVG: small files
GREY = "#8C8C8C"                                          # chance, baselines, what belongs to no role
FORMATS = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],      # Verdana: for readers of the SVG without DejaVu
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 4, "figure.dpi": 110, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "diffusion-link",
}
DOTS_PER_INCH, PALETTE = 160, 256                         # of the PNG; curves, text and one colour map need no more colours


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


def set_style() -> None:
    """The house's style for all figures that a notebook draws from here on."""
    plt.rcParams.update(sns.axes_style("ticks") | STYLE)


def house_style(function: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """Decorator: run a figure function in the house's style."""
    @wraps(function)
    def styled(*args: Given.args, **kwargs: Given.kwargs) -> Drawn:
        with style():
            return function(*args, **kwargs)
    return styled


def save_figure(profile: Profile, figure: Figure, name: str, data: pd.DataFrame) -> Path:
    """Write ``results/<profile>/figures/<name>.{pdf,svg,png}`` and the data behind the figure as ``<name>.csv``.

    Every file is written whole or not at all; equal figures give equal bytes (no dates, fixed ids in the SVG). The files are small:
    text stays text in the SVG and coordinates keep hundredths of a point, the PNG has a palette.

    Args:
        name: file name without a suffix; begins with the notebook's number ("02_retrieval").
        data: the numbers that the figure shows; floats keep 5 significant digits.

    Returns:
        The path of the PNG (160 dots an inch).
    """
    return write_figure(profile.results_dir / "figures", figure, name, data)


def write_figure(folder: Path, figure: Figure, name: str, data: pd.DataFrame) -> Path:
    """:func:`save_figure` for a figure that belongs to no profile: the same four files in ``folder``."""
    for suffix, metadata in FORMATS.items():
        file = io.BytesIO()
        with style():
            figure.savefig(file, format=suffix, dpi=DOTS_PER_INCH, metadata=metadata)
        content = {"svg": small_svg, "png": small_png}.get(suffix, bytes)(file.getvalue())
        atomic_write(folder / f"{name}.{suffix}", content)
    atomic_write(folder / f"{name}.csv", data.to_csv(index=False, float_format="%.5g", lineterminator="\n"))
    return folder / f"{name}.png"


def small_png(png: bytes) -> bytes:
    """The same picture with a palette of its own, without dithering."""
    image: Image.Image = Image.open(io.BytesIO(png))
    opaque = image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255
    method = Image.Quantize.MEDIANCUT if opaque else Image.Quantize.FASTOCTREE           # only the latter knows transparency
    image = image.convert("RGB" if opaque else "RGBA").quantize(PALETTE, method, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "png", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return file.getvalue()


def small_svg(svg: bytes) -> bytes:
    """The same drawing with coordinates in hundredths of a point, no indentation, and a palette in every embedded picture.

    Words, scales and matrices keep their digits.
    """
    def shorter(found: re.Match) -> str:
        text = found[0]
        if text.startswith("data:"):
            head, data = text.split(",")
            return f"{head},{base64.b64encode(small_png(base64.b64decode(data))).decode()}"
        return f"{float(text):.2f}".rstrip("0").rstrip(".") if text[0] in "-0123456789" else text

    text = re.sub(r"data:image/png;base64,[^\"]+|>[^<]*<|(?:matrix|scale)\([^)]*\)|-?\d+\.\d{3,}", shorter, svg.decode())
    return re.sub(r"\n *", "\n", text).encode()


def panels(n: int, width: float = PAGE, height: float = 2.2, **kwargs: Any) -> tuple[Figure, list[Axes]]:
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
        x, y = np.asarray(xy).T
        axis.scatter(x, y, s=size, color=COLOURS[role], marker=MARKERS[role], label=role, linewidth=0, zorder=2,
                     rasterized=len(xy) > MANY_POINTS)
