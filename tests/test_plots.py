"""Figures are saved whole and equal from call to call; players are small; the thread clip is the dog."""
from __future__ import annotations

import base64
import io
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
import soundfile

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dl.config import get_profile
from dl.data import Split, load_split
from dl.plots import (
    COLOURS,
    MARKERS,
    PAGE,
    audio_player,
    envelope_frame,
    plot_alignment,
    plot_circles,
    plot_layouts,
    plot_recordings,
    plot_scene,
    points_frame,
    save_figure,
    thread_clip,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def circles() -> dict[str, dict[str, np.ndarray]]:
    points = np.random.default_rng(0).uniform(-1, 1, (3, 5, 2))
    return {"before": {"audio": points[0], "text": points[1]}, "after": {"bridged": points[2], "text": points[1]}}


def test_save_figure_writes_four_files_and_the_same_bytes_again(results_root):
    profile = get_profile("smoke")
    contents = []
    for _ in range(2):
        path = save_figure(profile, plot_circles(circles()), "00_test", points_frame(circles()))
        assert path == results_root / "smoke/figures/00_test.png"
        contents.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert set(contents[0]) == {f"00_test.{suffix}" for suffix in ("pdf", "svg", "png", "csv")}
    assert contents[0] == contents[1]
    assert b"<dc:date>" not in contents[0]["00_test.svg"] and b"CreationDate" not in contents[0]["00_test.pdf"]
    frame = pd.read_csv(path.with_suffix(".csv"))
    assert len(frame) == 20 and set(frame.role) == {"audio", "text", "bridged"}


def test_style_is_the_house_s_and_leaves_the_caller_s_alone():
    before = dict(matplotlib.rcParams)
    figure = plot_circles(circles())
    assert dict(matplotlib.rcParams) == before
    assert figure.get_figwidth() == PAGE and figure.axes[0].xaxis.label.get_fontsize() == 8
    assert COLOURS == {"audio": "#E69F00", "text": "#0072B2", "bridged": "#009E73"} and len(set(MARKERS.values())) == 3


def test_every_figure_of_the_first_notebooks_draws(results_root):
    profile = get_profile("smoke")
    split = load_split(profile, "train")
    mix = split.waveform(0)
    recordings = pd.read_csv(profile.data_dir / "recordings/recordings.csv", dtype=str)
    cosines = pd.DataFrame({"kind": ["own", "other"] * 20, "cosine": np.linspace(-1, 1, 40)})
    recalls = pd.DataFrame([("all", "R@1", 0.2, 0.01), ("all", "R@10", 0.6, 0.1)], columns=["clips", "metric", "value", "chance"])
    seconds = dict(zip(recordings.clip_id, recordings.seconds.astype(float), strict=True))
    figures = [plot_recordings(recordings), plot_scene({"a": mix / 2}, mix, 48_000), plot_alignment(cosines, recalls),
               plot_layouts(split.frame.drop_duplicates("layout"), seconds)]
    for number, figure in enumerate(figures):
        assert save_figure(profile, figure, f"test_{number}", cosines).stat().st_size > 5000
    bars = [patch.get_width() for container in figures[2].axes[1].containers for patch in container]
    assert bars == [0.2, 0.6]


def test_envelope_frame_holds_the_peak_of_every_10_ms():
    mix = np.zeros(48_000, np.float32)
    mix[24_100] = -0.5
    frame = envelope_frame({"a": mix / 2}, mix, 48_000)
    assert len(frame) == 100 and frame["the scene"].idxmax() == 50 and frame["the scene"].max() == 0.5 and frame["a"].max() == 0.25


def test_audio_player_is_opus_below_24_kbit_a_second():
    seconds = 5
    noise = np.random.default_rng(0).normal(0, 0.2, seconds * 48_000).astype(np.float32)
    text = audio_player(noise, 48_000, "rain <3").data
    opus = base64.b64decode(re.search(r'src="data:audio/ogg;base64,([^"]+)"', text).group(1))
    assert len(opus) * 8 / seconds < 24_000
    decoded, rate = soundfile.read(io.BytesIO(opus))
    assert soundfile.info(io.BytesIO(opus)).subtype == "OPUS" and len(decoded) / rate == pytest.approx(seconds, abs=0.05)
    assert np.std(decoded) > 0.05 and "rain &lt;3" in text


def test_thread_clip_is_the_first_dog_that_barks_alone():
    for name in ("smoke", "mini"):
        split = load_split(get_profile(name), "train")
        assert thread_clip(split) == "mini-train-00015_0"
        assert split.frame.labels[split.clip_ids.index(thread_clip(split))] == "a dog barks"
    with pytest.raises(ValueError, match="no clip of split 'test' is a barking dog: ask for split 'train'"):
        thread_clip(load_split(get_profile("smoke"), "test"))
    captions = [["Rain falls"], ["A man speaks while a dog is barking", "Speech"], ["A dog barks"]]
    audiocaps = Split("train", ["a_0", "b_0", "c_0"], captions, pd.DataFrame({"youtube_id": list("abc")}), lambda index: np.ones(9))
    assert thread_clip(audiocaps) == "b_0"
