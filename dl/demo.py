"""``python -m dl demo``: notebook 11 as a page. Drop a file, see and hear it, read its captions with and without the bridge.

The page is served to this machine alone (127.0.0.1), loads nothing from a network and keeps no file. Gradio, an optional extra,
holds the form and the server (:func:`serve`); what is shown is HTML made here, every word of it escaped.
"""
from __future__ import annotations

import base64
import contextlib
import html
import io
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from dl.captioner.files import WINDOW_S, MissingWeights, bridged, clock, load_models, printable
from dl.config import Profile
from dl.data import SAMPLING_RATE, Split, load_split, read_audio
from dl.encoder.clap import load_embeddings
from dl.metrics.neighbours import nearest_captions
from dl.plots import audio_player, plot_place, plot_waveform
from dl.plots.style import COLOURS, DOTS_PER_INCH

HOST, PORT = "127.0.0.1", 7860
LARGEST_MB = 50               # of a file [ours]; a minute of a stereo WAV at 44.1 kHz has 10 MB
NEAREST, SCENES = 5, 6        # captions in the table; test scenes to choose from, evenly spaced: nobody picked them
ABOUT = f"""# Caption your own sound

Any WAV, FLAC, Ogg, Opus or MP3 file of at most {LARGEST_MB} MB. The first {WINDOW_S} s are heard; `python -m dl caption` takes files of any
length. The file stays on this machine and is not kept."""
CSS = f"""
footer {{ display: none !important }} .gradio-container {{ max-width: 62rem !important; margin: auto }}
.dl-captions {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin: 1rem 0 }}
.dl-captions div {{ border-left: 4px solid {COLOURS["audio"]}; padding: .2rem 1rem }} .dl-captions .dl-bridged {{ border-color: {COLOURS["bridged"]} }}
.dl-captions p {{ font-size: 1.15rem; margin: .3rem 0 0 }} .dl-answer h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem }}
.dl-answer :is(table, tr, th, td) {{ border: 0 }} .dl-answer table {{ border-collapse: collapse; width: 100% }} .dl-answer tr:first-child {{ opacity: .75 }}
.dl-answer :is(th, td) {{ text-align: left; font-weight: normal; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #8884 }}
.dl-answer img {{ width: 100%; background: white; border-radius: 4px }} .dl-answer audio {{ width: 100% }}
.dl-note {{ opacity: .75; font-size: .9rem }} .dl-error {{ color: #B3261E }} .dark .dl-error {{ color: #F2B8B5 }}
"""

class Page(Protocol):
    """Samples (n,) float32 at 48 kHz, a title, a note -> what the page shows, as HTML."""

    def __call__(self, waveform: np.ndarray, title: str, note: str = "") -> str: ...


def text(words: str) -> str:
    """Words as HTML that stays words: escaped for HTML, for Gradio's templates (``${}``, ``{{}}``) and for control characters."""
    return html.escape(printable(words)).translate({ord(c): f"&#{ord(c)};" for c in "${}`"})


def error_line(words: str) -> str:
    """One line that says what is wrong and what to do."""
    return f'<p class="dl-error" role="alert">{text(" ".join(words.split()))}</p>'


def image(figure: Figure, alt: str) -> str:
    """A figure inside the page; it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    plt.close(figure)
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def load_page(profile: Profile) -> Page:
    """Load the profile's models, and the cached vectors of train where there are some.

    Returns:
        a function: samples (n,) float32 at 48 kHz, a title, a note -> what the page shows, as HTML.

    Raises:
        MissingWeights: see :func:`dl.captioner.files.load_models`.
    """
    encoder, link, captioner = load_models(profile)
    assert link is not None                                                          # it was asked for
    try:
        train, absent = load_embeddings(profile, "train"), ""
    except FileNotFoundError as error:
        train, absent = None, f"Nearest captions and the map are left out: {error}"

    def page(waveform: np.ndarray, title: str, note: str = "") -> str:
        raw = encoder.embed_audio([waveform])                                        # (1, D)
        across = bridged(link, raw)                                                  # (1, D)
        without, with_it = captioner.generate(raw)[0], captioner.generate(across)[0]
        parts = [
            audio_player(waveform, SAMPLING_RATE).data.replace('preload="none" ', ""),       # its length is shown at once
            image(plot_waveform(waveform, SAMPLING_RATE), "waveform"),
            f'<div class="dl-captions"><div>without the bridge<p>{text(without)}</p></div>',
            f'<div class="dl-bridged">with the bridge<p>{text(with_it)}</p></div></div>',
            f'<p class="dl-note">Cosine of the raw and the bridged vector: {float((raw * across).sum()):.2f}. {text(note)}</p>',
        ]
        if train is None:
            parts.append(f'<p class="dl-note">{text(absent)}</p>')
        else:
            pairs = zip(*nearest_captions(np.concatenate([raw, across]), train.text, train.captions, NEAREST), strict=True)
            rows = "".join(f"<tr><td>{text(a)}</td><td>{x:.2f}</td><td>{text(b)}</td><td>{y:.2f}</td></tr>" for (a, x), (b, y) in pairs)
            head = "<tr><th>of the raw vector</th><th>cosine</th><th>of the bridged vector</th><th>cosine</th></tr>"
            figure, _ = plot_place(train.audio.numpy(), train.text.numpy(), raw.numpy(), across.numpy())
            place = image(figure, "the clip before and after the bridge, among sounds and captions of train")
            parts += [f"<h3>Nearest captions of train</h3><table>{head}{rows}</table>", f"<h3>Its place in the map of train</h3>{place}"]
        return f'<div class="dl-answer"><h3>{text(title)}</h3>{"".join(parts)}</div>'

    return page


def answer_file(page: Page, path: str | Path) -> str:
    """What the page shows for a file: its answer, or one line if it cannot be used."""
    try:
        waveform = read_audio(path, WINDOW_S)
        return page(waveform, f"{Path(path).name}, {clock(len(waveform) / SAMPLING_RATE)}")
    except ValueError as error:                                                      # AudioError, or vectors that a model refuses
        return error_line(f"{Path(path).name}: {str(error).removeprefix(f'{path}: ')}")


def answer_scene(page: Page, split: Split, place: int) -> str:
    """What the page shows for clip ``place`` of a split, with its first reference caption."""
    try:
        return page(split.waveform(place), split.clip_ids[place], f"A caption that belongs to it: {split.captions[place][0]}")
    except ValueError as error:
        return error_line(str(error))


def serve(profile: Profile, port: int = PORT) -> int:
    """Show the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Returns:
        Exit code: 0, or 1 with one line on stderr where Gradio, a model or the port is not to be had.
    """
    with tempfile.TemporaryDirectory(prefix="dl-demo-") as folder:                   # what Gradio writes goes with it
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        try:
            import gradio

            print("demo: loading the models", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                page = load_page(profile)
        except (MissingWeights, ModuleNotFoundError, ValueError, OSError) as error:  # absent, or damaged: each says what to do
            remedy = ': pip install -e ".[demo]"' if getattr(error, "name", None) == "gradio" else ""
            print(f"demo: {printable(str(error))}{remedy}", file=sys.stderr)
            return 1
        plt.switch_backend("agg")                                                    # figures are drawn in a thread of the server
        blocks = form(gradio, page, profile, Path(folder).resolve())
        theme = gradio.themes.Default(font=["system-ui", "DejaVu Sans", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        try:
            blocks.launch(server_name=HOST, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
                          max_file_size=LARGEST_MB * 2**20, footer_links=[], enable_monitoring=False, pwa=False, mcp_server=False, theme=theme, css=CSS)
        except (OSError, OverflowError):
            print(f"demo: port {port} of {HOST} is in use or is none: give another by --port N", file=sys.stderr)
            return 1
        signal.signal(signal.SIGTERM, signal.default_int_handler)                    # it ends as by Ctrl-C, and the folder goes
        print(f"{blocks.local_url}  (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return 0


def form(gradio: Any, page: Page, profile: Profile, folder: Path) -> Any:
    """The page's form as ``gradio.Blocks``: a file or a scene goes in, HTML comes out; an upload (in ``folder``) is removed once it is answered."""
    def upload(path: str) -> tuple[str, None]:
        try:
            return answer_file(page, path), None                                     # None: the field is free for the next file
        finally:
            if Path(path).resolve().is_relative_to(folder):
                Path(path).unlink(missing_ok=True)

    split, once = None, {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
    with gradio.Blocks(title="Diffusion-Link", analytics_enabled=False) as blocks:
        gradio.Markdown(ABOUT)
        with gradio.Row():
            file = gradio.File(label="A sound", height=140)
            with contextlib.suppress(FileNotFoundError, ValueError):                 # no data: files alone
                split = load_split(profile, "test")
                places = range(0, len(split), -(-len(split) // SCENES))
                scene = gradio.Radio([(split.clip_ids[place], place) for place in places], label="or a scene of test")
        shown = gradio.HTML(js_on_load=None)
        file.upload(upload, file, [shown, file], **once)
        if split is not None:
            scene.input(lambda place: answer_scene(page, split, place), scene, shown, **once)
    return blocks
