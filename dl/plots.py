"""What the notebooks' figures share: colours, style, files, the sound player, and two figures of the local page.

Colours and markers belong to roles (Okabe-Ito, readable without colour): audio orange circles, text blue squares,
bridged green triangles. Figures are 3.3 or 6.9 inches wide (one column or the page), 8 pt.
"""
from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import soundfile
import soxr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dl.config import Profile
from dl.data import Split
from dl.store import atomic_write

if TYPE_CHECKING:
    from IPython.display import HTML

COLUMN, PAGE = 3.3, 6.9                                   # inches wide
COLOURS = {"audio": "#E69F00", "text": "#0072B2", "bridged": "#009E73"}
MARKERS = {"audio": "o", "text": "s", "bridged": "^"}
MANY_POINTS = 100                                         # a larger cloud is an image inside PDF and SVG: small files
GREY = "#8C8C8C"                                          # chance, baselines, what belongs to no role
FORMATS = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}, "svg": {"Date": None, "Creator": None},
           "png": {"Software": None}}
STYLE = sns.axes_style("ticks") | {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.0,
    "lines.markersize": 4, "figure.dpi": 110, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "diffusion-link",
}
DOTS_PER_INCH, PALETTE = 160, 256                         # of the PNG; curves, text and one colour map need no more
PLAYER_RATE = 24_000                                      # Hz
OPUS_LEVEL = 0.95                                         # libsndfile's compression level: about 21 kbit/s


def set_style() -> None:
    """The house's style for all figures from here on."""
    plt.rcParams.update(STYLE)


@contextmanager
def style() -> Iterator[None]:
    """The house's style inside a ``with``, or of a decorated function; the caller's settings come back after it."""
    with plt.rc_context(STYLE):
        yield


def save_figure(profile: Profile, figure: Figure, name: str, data: pd.DataFrame) -> Path:
    """Write ``results/<profile>/figures/<name>.{pdf,svg,png}`` and the data behind the figure as ``<name>.csv``.

    Every file is written whole or not at all; equal figures give equal bytes (no dates, fixed ids in the SVG). The SVG
    keeps text as text and coordinates in hundredths of a point; the PNG (160 dots an inch) has a palette.

    Args:
        name: file name without a suffix; begins with the notebook's number ("02_retrieval").
        data: the numbers that the figure shows; floats keep 5 significant digits.

    Returns:
        The path of the PNG.
    """
    return write_figure(profile.results_dir / "figures", figure, name, data)


def write_figure(folder: Path, figure: Figure, name: str, data: pd.DataFrame) -> Path:
    """:func:`save_figure` for a figure that belongs to no profile: the same four files in ``folder``."""
    for suffix, metadata in FORMATS.items():
        file = io.BytesIO()
        with style():
            figure.savefig(file, format=suffix, dpi=DOTS_PER_INCH, metadata=metadata)
        content = {"svg": _small_svg, "png": _small_png}.get(suffix, bytes)(file.getvalue())
        atomic_write(folder / f"{name}.{suffix}", content)
    atomic_write(folder / f"{name}.csv", data.to_csv(index=False, float_format="%.5g", lineterminator="\n"))
    return folder / f"{name}.png"


def _small_png(png: bytes) -> bytes:
    """The same picture with a palette of its own, without dithering."""
    image: Image.Image = Image.open(io.BytesIO(png))
    opaque = image.mode == "RGB" or image.getchannel("A").getextrema()[0] == 255
    method = Image.Quantize.MEDIANCUT if opaque else Image.Quantize.FASTOCTREE     # only the latter knows transparency
    image = image.convert("RGB" if opaque else "RGBA").quantize(PALETTE, method, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "png", optimize=True, dpi=(DOTS_PER_INCH, DOTS_PER_INCH))
    return file.getvalue()


def _small_svg(svg: bytes) -> bytes:
    """Coordinates in hundredths of a point, no indentation, a palette in each picture; words and matrices stay."""
    def shorter(found: re.Match) -> str:
        text = found[0]
        if text.startswith("data:"):
            head, data = text.split(",")
            return f"{head},{base64.b64encode(_small_png(base64.b64decode(data))).decode()}"
        return f"{float(text):.2f}".rstrip("0").rstrip(".") if text[0] in "-0123456789" else text

    words = r"data:image/png;base64,[^\"]+|>[^<]*<|(?:matrix|scale)\([^)]*\)|-?\d+\.\d{3,}"
    return re.sub(r"\n *", "\n", re.sub(words, shorter, svg.decode())).encode()


def panels(n: int, width: float = PAGE, height: float = 2.2, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A Figure of ``n`` axes side by side, ``width`` x ``height`` inches, laid out so that no text is cut."""
    figure, axes = plt.subplots(1, n, figsize=(width, height), layout="constrained", squeeze=False, **kwargs)
    return figure, list(axes[0])


def scatter_roles(axis: Axes, points: dict[str, np.ndarray], links: tuple[str, str] | None = None,
                  size: float = 16) -> None:
    """Draw 2-D points, role ("audio", "text", "bridged") -> (n, 2), in the colour and marker of their role.

    ``links`` names two roles whose i-th points are joined by a grey line (pairs).
    """
    if links:
        for start, end in zip(points[links[0]], points[links[1]], strict=True):
            axis.plot(*np.stack([start, end], 1), color=GREY, linewidth=0.6, zorder=1)
    for role, xy in points.items():
        x, y = np.asarray(xy).T
        axis.scatter(x, y, s=size, color=COLOURS[role], marker=MARKERS[role], label=role, linewidth=0, zorder=2,
                     rasterized=len(xy) > MANY_POINTS)


def audio_player(waveform: np.ndarray, sampling_rate: int, title: str = "") -> HTML:
    """A player (``IPython.display.HTML``) with the sound inside it, as Ogg Opus at 24 kHz below 24 kbit/s.

    Args:
        waveform: float32 (samples,), mono, in [-1, 1].
        sampling_rate: in Hz.
        title: a line above the player, plain text.
    """
    from IPython.display import HTML

    sound = soxr.resample(np.asarray(waveform, dtype=np.float32), sampling_rate, PLAYER_RATE)
    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), PLAYER_RATE, format="OGG", subtype="OPUS",
                    compression_level=OPUS_LEVEL)
    source = "data:audio/ogg;base64," + base64.b64encode(file.getvalue()).decode()
    line = f"<div>{html.escape(title)}</div>" if title else ""
    return HTML(f'{line}<audio controls preload="none" style="height: 2em" src="{source}"></audio>')


def thread_clip(split: Split) -> str:
    """The id of the clip that every notebook looks at, never to score: the first dog that barks alone.

    In ``data/mini`` the first scene whose only label is "a dog barks" (``mini-train-00015_0``); in AudioCaps, which
    has no labels, the first clip whose first caption speaks of a dog that barks.

    Raises:
        ValueError: the split has no such clip.
    """
    if "labels" in split.frame:
        barks = split.frame.labels.eq("a dog barks").tolist()
    else:
        barks = ["dog" in captions[0].lower() and "bark" in captions[0].lower() for captions in split.captions]
    if True not in barks:
        raise ValueError(f"no clip of split '{split.name}' is a barking dog: ask for split 'train'")
    return split.clip_ids[barks.index(True)]


@style()
def plot_waveform(sound: np.ndarray, sampling_rate: int) -> Figure:
    """A mono sound (samples,) in [-1, 1]: the smallest and the largest sample of every few milliseconds."""
    figure, (axis,) = panels(1, height=1.2)
    hop = max(1, len(sound) // 2000)
    times = np.arange(len(sound) // hop) * hop / sampling_rate
    pieces = np.asarray(sound)[: len(times) * hop].reshape(-1, hop)
    axis.fill_between(times, pieces.min(1), pieces.max(1), color=COLOURS["audio"], linewidth=0.4, rasterized=True)
    axis.set(xlabel="time (s)", ylabel="amplitude", xlim=(0, len(sound) / sampling_rate), ylim=(-1, 1))
    return figure


def gap_plane(vectors: dict[str, np.ndarray], mean_audio: np.ndarray, mean_text: np.ndarray) -> dict[str, np.ndarray]:
    """Coordinates in a plane that contains the gap, which a PCA of captions need not show. [ours: claim C2]

    With g = mean_t - mean_a: coordinate 1 is (x - mean_a) . g / |g|^2, the share of the gap that x has crossed (0 at
    the mean sound, 1 at the mean caption). Coordinate 2 is (x - mean_a) . v with v the first principal component of
    the text vectors after g is taken out of them, in units of the vectors.

    Args:
        vectors: role -> (n, D); "text" must be among them.
        mean_audio, mean_text: (D,) means of the two modalities, of train.

    Returns:
        role -> (n, 2) float64.
    """
    start = np.asarray(mean_audio, dtype=np.float64)
    gap = np.asarray(mean_text, dtype=np.float64) - start
    text = np.asarray(vectors["text"], dtype=np.float64)
    text = text - text.mean(0)
    across = np.linalg.svd(text - np.outer(text @ gap, gap) / (gap @ gap), full_matrices=False)[2][0]
    across = across * np.sign(across[np.abs(across).argmax()])            # the sign of a component is arbitrary
    return {role: np.stack([(x - start) @ gap / (gap @ gap), (x - start) @ across], 1) for role, x in vectors.items()}


@style()
def plot_place(audio: np.ndarray, text: np.ndarray, raw: np.ndarray, bridged: np.ndarray,
               points: int = 1500) -> tuple[Figure, pd.DataFrame]:
    """Where single clips lie on the map of train, :func:`gap_plane`, before and after the bridge.

    Args:
        audio, text: (n, D), (m, D) vectors of train; about ``points`` of each are drawn, and their means span the gap.
        raw, bridged: (c, D) vectors of the clips; a numbered arrow leads from the one to the other.

    Returns:
        The figure, and the data behind it: role, x, y.
    """
    cloud = {role: np.asarray(x)[:: max(1, len(x) // points)] for role, x in (("audio", audio), ("text", text))}
    means = np.mean(np.asarray(audio), 0), np.mean(np.asarray(text), 0)
    plane = gap_plane({**cloud, "raw": np.asarray(raw), "bridged": np.asarray(bridged)}, *means)
    figure, (axis,) = panels(1, height=2.9)
    for role in cloud:
        x, y = plane[role].T
        axis.scatter(x, y, s=4, color=COLOURS[role], marker=MARKERS[role], alpha=0.35, linewidth=0,
                     label=f"{role} of train", rasterized=True)
    start, end = plane["raw"], plane["bridged"]
    axis.quiver(*start.T, *(end - start).T, angles="xy", scale_units="xy", scale=1, color="#303030", width=0.0025,
                headwidth=5, zorder=3)
    for name, role in (("raw", "audio"), ("bridged", "bridged")):
        x, y = plane[name].T
        axis.scatter(x, y, s=60, color=COLOURS[role], marker=MARKERS[role], edgecolor="black",
                     linewidth=0.9, zorder=4, label=f"your clip, {name}")
    for number, place in enumerate(start, 1):
        axis.annotate(str(number), place, (-9, 5), textcoords="offset points", zorder=5)
    for position in (0, 1):
        axis.axvline(position, color=GREY, linewidth=0.7, linestyle=":", zorder=0)
    axis.set(xlabel="share of the gap crossed (0: mean sound, 1: mean caption, of train)",
             ylabel="first component of captions\nat a right angle")
    legend = figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    plt.setp(legend.legend_handles[:2], sizes=[20], alpha=1)
    points_drawn = [(role, *xy) for role, rows in plane.items() for xy in rows]
    return figure, pd.DataFrame(points_drawn, columns=["role", "x", "y"])
