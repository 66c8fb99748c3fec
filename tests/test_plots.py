"""Figures are saved whole and equal from call to call; players are small; the thread clip is the dog."""
from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
import soundfile
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dl.config import get_profile
from dl.data import Split, load_split
from dl.plots import (
    PAGE,
    audio_player,
    gap_plane,
    panels,
    plot_place,
    plot_waveform,
    save_figure,
    scatter_roles,
    style,
    thread_clip,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


POINTS = {"audio": np.random.default_rng(0).uniform(-1, 1, (5, 2)), "text": np.zeros((5, 2))}


def drawn() -> plt.Figure:
    with style():
        figure, (axis,) = panels(1)
        scatter_roles(axis, POINTS, ("audio", "text"))
        axis.set_xlabel("coordinate 1")
    return figure


def test_save_figure_writes_four_files_and_the_same_bytes_again(results_root):
    profile = get_profile("smoke")
    contents = []
    for _ in range(2):
        path = save_figure(profile, drawn(), "00_test", pd.DataFrame(POINTS["audio"], columns=["x", "y"]))
        assert path == results_root / "smoke/figures/00_test.png"
        contents.append({file.name: file.read_bytes() for file in path.parent.iterdir()})
    assert set(contents[0]) == {f"00_test.{suffix}" for suffix in ("pdf", "svg", "png", "csv")}
    assert contents[0] == contents[1]
    assert b"<dc:date>" not in contents[0]["00_test.svg"] and b"CreationDate" not in contents[0]["00_test.pdf"]
    frame = pd.read_csv(path.with_suffix(".csv"))
    assert np.allclose(frame, POINTS["audio"], rtol=1e-4)


def test_files_are_small_and_look_the_same(results_root):
    x = np.linspace(0, 1, 500)
    figure, axis = plt.subplots()
    axis.scatter(x, np.sin(9 * x), c=x, cmap="viridis", rasterized=True)
    axis.plot(x, np.cos(9 * x), label="cosine 0.123456")
    axis.legend()
    path = save_figure(get_profile("smoke"), figure, "00_test", pd.DataFrame({"x": x / 3}))
    plain = io.BytesIO()
    figure.savefig(plain, format="png", dpi=160)
    saved, wanted = (np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in (path, plain))
    assert path.stat().st_size < 0.6 * plain.tell() and Image.open(path).mode == "P"
    off = np.abs(saved - wanted)
    assert saved.shape == wanted.shape and off.mean() < 0.5 and (off.max(2) > 32).mean() < 1e-3
    svg = path.with_suffix(".svg").read_text()
    root = ElementTree.fromstring(svg)
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "cosine 0.123456" in texts                       # text stays text, and keeps its digits
    assert not re.search(r" [xy]=.-?\d+\.\d{3}", svg) and not re.search(r"[ML] -?\d+\.\d{3}", svg)
    inside = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r'base64,([^"]+)"', svg)]
    assert len(inside) == 1 and inside[0].mode == "P" and inside[0].info["transparency"]
    assert path.with_suffix(".csv").read_text().splitlines()[3] == "0.001336"


def test_style_is_the_house_s_and_leaves_the_caller_s_alone():
    before = dict(matplotlib.rcParams)
    figure = drawn()
    assert dict(matplotlib.rcParams) == before
    assert figure.get_figwidth() == PAGE and figure.axes[0].xaxis.label.get_fontsize() == 8


def test_audio_player_is_opus_below_24_kbit_a_second():
    seconds = 5
    noise = np.random.default_rng(0).normal(0, 0.2, seconds * 48_000).astype(np.float32)
    text = audio_player(noise, 48_000, "rain <3").data
    opus = base64.b64decode(re.search(r'src="data:audio/ogg;base64,([^"]+)"', text).group(1))
    assert len(opus) * 8 / seconds < 24_000
    decoded, rate = soundfile.read(io.BytesIO(opus))
    assert soundfile.info(io.BytesIO(opus)).subtype == "OPUS"
    assert len(decoded) / rate == pytest.approx(seconds, abs=0.05)
    assert np.std(decoded) > 0.05 and "rain &lt;3" in text


def test_thread_clip_is_the_first_dog_that_barks_alone():
    for name in ("smoke", "mini"):
        split = load_split(get_profile(name), "train")
        assert thread_clip(split) == "mini-train-00015_0"
        assert split.frame.labels[split.clip_ids.index(thread_clip(split))] == "a dog barks"
    with pytest.raises(ValueError, match="no clip of split 'test' is a barking dog: ask for split 'train'"):
        thread_clip(load_split(get_profile("smoke"), "test"))
    captions = [["Rain falls"], ["A man speaks while a dog is barking", "Speech"], ["A dog barks"]]
    frame = pd.DataFrame({"youtube_id": list("abc")})
    audiocaps = Split("train", ["a_0", "b_0", "c_0"], captions, frame, lambda index: np.ones(9))
    assert thread_clip(audiocaps) == "b_0"


def clouds(n: int = 40, dim: int = 12) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Sounds, captions, and answers where captions lie; the gap is orthogonal to what captions differ in."""
    rng = np.random.default_rng(0)
    text = rng.normal(0, [3, 2] + [0.1] * (dim - 2), (n, dim))
    gap = np.eye(dim)[-1]
    audio, bridged = (text + rng.normal(0, 0.1, text.shape) for _ in range(2))
    return {"audio": audio - 2 * gap, "bridged": bridged, "text": text}, 2 * gap


def test_gap_plane_shows_the_gap_that_a_pca_of_captions_hides():
    points, gap = clouds()
    plane = gap_plane(points, points["text"].mean(0) - gap, points["text"].mean(0))
    assert plane["text"].mean(0) == pytest.approx([1, 0], abs=1e-9)
    crossed = [plane[role][:, 0].mean() for role in ("audio", "bridged")]
    assert crossed == pytest.approx([0, 1], abs=0.05)
    widest = np.linalg.svd(points["text"] - points["text"].mean(0))[1][0]
    assert plane["text"][:, 1].std() == pytest.approx(widest / 40**0.5, rel=1e-2)
    mirrored = gap_plane(points | {"text": points["text"][::-1]}, points["text"].mean(0) - gap, points["text"].mean(0))
    assert np.allclose(mirrored["audio"], plane["audio"])             # the order of the clips turns no axis round


def test_plot_waveform_spans_the_sound_and_its_peaks():
    sound = np.zeros(48_000, np.float32)
    sound[24_000], sound[36_000] = 0.5, -0.25
    axis = plot_waveform(sound, 48_000).axes[0]
    low, high = axis.collections[0].get_paths()[0].get_extents().get_points()
    assert axis.get_xlim() == (0, 1) and axis.get_ylim() == (-1, 1) and (low[1], high[1]) == (-0.25, 0.5)


def test_plot_place_draws_each_clip_from_raw_to_bridged_on_the_map_of_train():
    points, _ = clouds()
    mean = points["text"].mean(0)
    raw, bridged = points["audio"][:2], points["bridged"][:2]
    figure, data = plot_place(points["audio"], points["text"], raw, bridged, points=20)
    arrows = next(part for part in figure.axes[0].collections if isinstance(part, matplotlib.quiver.Quiver))
    by_role = {role: rows[["x", "y"]].to_numpy() for role, rows in data.groupby("role")}
    assert {role: len(xy) for role, xy in by_role.items()} == {"audio": 20, "text": 20, "raw": 2, "bridged": 2}
    assert np.allclose(arrows.XY, by_role["raw"])
    assert np.allclose(np.stack([arrows.U, arrows.V], 1), by_role["bridged"] - by_role["raw"])
    wanted = gap_plane({"text": points["text"][::2], "raw": raw}, points["audio"].mean(0), mean)["raw"]
    assert np.allclose(by_role["raw"], wanted) and by_role["raw"][:, 0] == pytest.approx(0, abs=0.2)
    assert by_role["bridged"][:, 0] == pytest.approx(1, abs=0.2)
