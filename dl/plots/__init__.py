"""Figures, a slider over them, sound players: one function a figure; ``style`` is what they share."""
from dl.plots.data import (
    envelope_frame,
    plot_alignment,
    plot_circles,
    plot_recordings,
    plot_scene,
    plot_waveform,
    points_frame,
)
from dl.plots.gap import (
    gap_plane,
    plot_maps,
    plot_place,
    plot_planes,
)
from dl.plots.listen import audio_player, thread_clip
from dl.plots.slider import figure_slider, live_front_end
from dl.plots.style import COLOURS, COLUMN, GREY, MARKERS, PAGE, house_style, panels, save_figure, scatter_roles, set_style

__all__ = [
    "COLOURS", "COLUMN", "GREY", "MARKERS", "PAGE", "audio_player", "envelope_frame", "figure_slider", "gap_plane", "house_style",
    "live_front_end", "panels", "plot_alignment", "plot_circles",
    "plot_maps", "plot_place", "plot_planes", "plot_recordings", "plot_scene",
    "plot_waveform", "points_frame", "save_figure", "scatter_roles", "set_style", "thread_clip",
]
