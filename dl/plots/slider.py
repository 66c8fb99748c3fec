"""A slider that turns over figures, where somebody sits at the notebook."""
from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

if TYPE_CHECKING:
    import ipywidgets

WITHOUT = "No slider here: it needs ipywidgets (pip install ipywidgets==8.1.9) and a notebook open in JupyterLab. The figure above shows the same steps."


def live_front_end() -> bool:
    """Whether a person can move a slider: Jupyter's server names the notebook of its kernels' sessions, Colab and VS Code leave traces of their own.

    Papermill, nbval and nbconvert start kernels without a server: False.
    """
    if "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules:
        return True
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and "__vsc_ipynb_file__" in shell.user_ns


def figure_slider(draw: Callable[[int], Figure], values: Sequence[int], label: str) -> ipywidgets.VBox | None:
    """A slider over ``values`` with the figure of each; the figures are drawn once, so moving it computes nothing.

    Without a live front end, or without ipywidgets, one line is printed and nothing is drawn: a static figure should stand above it.
    So an executed copy of a notebook never carries the state of a widget.

    Args:
        draw: value -> the figure to show.
        values: at least one, in the slider's order.
        label: what the slider moves, in front of it.

    Returns:
        An ``ipywidgets.VBox`` for ``display``, or None.

    Example:
        >>> figure_slider(draw_one, [0, 200, 400], "start step k*")
    """
    try:
        import ipywidgets
    except ImportError:
        print(WITHOUT)
        return None
    if not live_front_end():
        print(WITHOUT)
        return None
    pictures = {}
    for value in values:
        figure, file = draw(value), io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        pictures[value] = file.getvalue()
    picture = ipywidgets.Image(value=pictures[values[0]], format="png")
    slider = ipywidgets.SelectionSlider(options=list(values), description=label, style={"description_width": "initial"})
    slider.observe(lambda change: setattr(picture, "value", pictures[change["new"]]), names="value")
    return ipywidgets.VBox([slider, picture])
