"""``python -m dl caption``: captions of the user's own sound files; ``python -m dl demo``: the same as a local page.

A file of any length is read in windows of 10 s, what the encoder hears at once [paper~]: an hour of sound takes no
more memory than a minute. A file that cannot be used is named with the reason; the others are done all the same.
"""
from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from dl.bridge import DiffusionLink
from dl.captioner import LLMCaptioner
from dl.clap import ClapEncoder, load_embeddings
from dl.config import Profile
from dl.data import (
    SAMPLING_RATE,
    SHORTEST_S,
    SILENCE,
    AudioError,
    Split,
    check_end,
    check_waveform,
    load_split,
    open_audio,
    read_audio,
)
from dl.gap import nearest_captions
from dl.plots import COLOURS, DOTS_PER_INCH, audio_player, plot_place, plot_waveform

WINDOW_S = 10                 # s, what the encoder hears [paper~]
TAIL_S = 1.0                  # s, a shorter rest after a full window has no caption of its own [ours]
BATCH = 32                    # windows that go through encoder, bridge and captioner at once

Window = tuple[float, float, np.ndarray | None]
Captions = Callable[[list[np.ndarray]], list[str]]            # waveforms (n,) float32 at 48 kHz -> a text each
Page = Callable[[np.ndarray, str, str], str]                  # the same, a title and a note -> HTML


class MissingWeights(FileNotFoundError):
    """A model that ``caption`` needs is not there; the message says which command makes it."""


def read_windows(path: str | Path) -> Iterator[Window]:
    """Windows of 10 s of a file, mono (channels averaged), float32, 48 kHz: (start in s, end in s, samples (n,)).

    The samples of a silent window (peak below -100 dBFS) are None. A rest shorter than 1 s after a full window is left
    out; a file shorter than 1 s is one window.

    Raises AudioError, which says what to do: it cannot be used, or, after some windows, its end is damaged.
    """
    path, heard, place, count = Path(path), False, 0, 0
    with open_audio(path) as file:
        rate = file.samplerate
        while True:
            samples = file.read(WINDOW_S * rate, dtype="float32", always_2d=True)    # (samples, channels)
            start, seconds, count = place * WINDOW_S, len(samples) / rate, count + len(samples)
            if seconds < (TAIL_S if place else SHORTEST_S):
                check_end(path, file, count)
                if not place:
                    raise AudioError(f"{path}: {len(samples)} samples at {rate} Hz are too short; "
                                     f"give at least {SHORTEST_S} s")
                break
            waveform, place = samples.mean(axis=1), place + 1
            silent = np.abs(waveform).max() < SILENCE                # False for NaN, which check_waveform names
            heard |= not silent
            yield start, start + seconds, None if silent else check_waveform(waveform, rate, str(path))
    if not heard:
        raise AudioError(f"{path}: silent (peak below -100 dBFS); choose another file")


def load_models(profile: Profile, bridge: bool = True) -> tuple[ClapEncoder, DiffusionLink | None, LLMCaptioner]:
    """The profile's encoder, bridge (None where it is not wanted) and captioner, from ``results_dir/checkpoints``.

    Raises MissingWeights (a checkpoint is absent, holds NaN, or was made for another encoder) and what a model itself
    says in one line: ValueError, OSError, ModuleNotFoundError.
    """
    checkpoints, make = profile.results_dir / "checkpoints", f"./run_all.sh --profile {profile.name} --only"
    kinds = {"captioner": (LLMCaptioner, "07")} | ({"bridge": (DiffusionLink, "05")} if bridge else {})
    for name, (_, stage) in kinds.items():
        if not (checkpoints / name / "config.json").is_file():
            raise MissingWeights(f"the {name} of profile {profile.name} is missing ({checkpoints / name}): "
                                 f"make it with {make} {stage}")
    models: dict[str, Any] = {name: kind.from_pretrained(checkpoints / name) for name, (kind, _) in kinds.items()}
    encoder = ClapEncoder.from_pretrained(profile.encoder)
    for name, model in models.items():
        anew = f"make it anew with {make} {kinds[name][1]} --force"
        if not all(torch.isfinite(value).all() for value in model.parameters()):
            raise MissingWeights(f"the {name} in {checkpoints / name} has weights that are NaN or infinite: {anew}")
        if model.embed_dim != encoder.embed_dim:
            raise MissingWeights(f"the {name} of profile {profile.name} takes vectors of {model.embed_dim} numbers, "
                                 f"the encoder {profile.encoder} gives {encoder.embed_dim}: {anew}")
    captioner = models["captioner"].to("cuda" if torch.cuda.is_available() else "cpu")
    return encoder, models.get("bridge"), captioner


def bridged(link: DiffusionLink, audio_emb: torch.Tensor) -> torch.Tensor:
    """(B, D) -> (B, D); noise from seed 0 at every call: a file has the same captions whatever stands beside it."""
    return link(audio_emb, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Inside, nothing reaches stdout, which is for captions, and no warning is shown."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_captions(profile: Profile, bridge: bool = True) -> Captions:
    """:func:`load_models` as one function of waveforms (samples,), float32 at 48 kHz."""
    encoder, link, captioner = load_models(profile, bridge)

    def captions(waveforms: list[np.ndarray]) -> list[str]:
        vectors = encoder.embed_audio(waveforms)                                     # (B, D)
        return captioner.generate(vectors if link is None else bridged(link, vectors))

    return captions


def caption_file(path: str | Path, captions: Captions) -> Iterator[dict]:
    """Caption one file: a dict a window with ``file``, ``start_s``, ``end_s`` and ``caption``.

    The caption is None, with a ``note``, where the window is silent. Raises what :func:`read_windows` raises.
    """
    waiting: list[Window] = []

    def done() -> Iterator[dict]:
        sounds = [waveform for _, _, waveform in waiting if waveform is not None]
        texts = iter(captions(sounds) if sounds else [])
        for start, end, waveform in waiting:
            text = {"caption": None, "note": "silent"} if waveform is None else {"caption": next(texts)}
            yield {"file": str(path), "start_s": round(start, 3), "end_s": round(end, 3), **text}
        waiting.clear()

    try:
        for window in read_windows(path):
            waiting.append(window)
            if len(waiting) == BATCH:
                yield from done()
    except AudioError:
        if any(waveform is not None for _, _, waveform in waiting):     # what came before the damage is captioned
            yield from done()
        raise
    yield from done()


def caption_files(paths: Iterable[str | Path], profile: Profile, bridge: bool = True, as_json: bool = False) -> int:
    """What ``python -m dl caption`` does: a line a window on stdout, a line a failed file on stderr.

    With ``as_json`` one whole JSON list on stdout, however it ends: an entry a window, and ``{"file", "error"}`` for a
    file that failed. Returns the exit code: 0, or 1 if a file failed or the weights are missing.
    """
    entries: list[dict] = []
    try:
        try:
            with silence():
                captions = load_captions(profile, bridge)
        except Exception as error:  # noqa: BLE001 - absent, damaged, no memory, no disk: each says what to do
            entries += [{"file": str(path), "error": str(error)} for path in paths]
            print(f"caption: {printable(one_line(error))}", file=sys.stderr)
            return 1
        for path in paths:
            try:
                for entry in caption_file(path, captions):
                    entries.append(entry)
                    if not as_json:
                        text = printable(entry["caption"]) if entry["caption"] is not None else f"({entry['note']})"
                        times = f"{clock(entry['start_s'])}-{clock(entry['end_s'])}"
                        print(f"{printable(str(path))}  {times}  {text}", flush=True)
            except BrokenPipeError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, the other files are done
                reason = one_line(error).removeprefix(f"{Path(path)}: ")
                entries.append({"file": str(path), "error": reason})
                print(f"caption: {printable(f'{Path(path)}: {reason}')}", file=sys.stderr, flush=True)
    finally:
        if as_json:
            print(json.dumps(entries, indent=1))
    return int(any("error" in entry for entry in entries))


def one_line(error: Exception) -> str:
    """What an error says, in one line; of one that is not meant for users its kind too."""
    words = str(error) if isinstance(error, ValueError | OSError | ImportError) else f"{type(error).__name__}: {error}"
    return words if "\n" not in words else " ".join(words.split())


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:05``; tenths where there are some: ``0:10.5``."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    text = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{minutes // 60}:{minutes % 60:02d}:{text}" if minutes >= 60 else f"{minutes}:{text}"


def printable(text: str) -> str:
    """Text for a terminal: control characters, line ends and undecodable bytes are shown as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------------------------------------------ python -m dl demo
HOST, PORT = "127.0.0.1", 7860
LARGEST_MB = 50               # of a file [ours]; a minute of a stereo WAV at 44.1 kHz has 10 MB
NEAREST, SCENES = 5, 6        # captions in the table; test scenes to choose from, evenly spaced
ABOUT = f"""# Caption your own sound

Any WAV, FLAC, Ogg, Opus or MP3 file of at most {LARGEST_MB} MB. The first {WINDOW_S} s are heard;
`python -m dl caption` takes files of any length. The file stays on this machine and is not kept."""
CSS = f"""
footer {{ display: none !important }} .gradio-container {{ max-width: 62rem !important; margin: auto }}
.dl-captions {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem }}
.dl-captions div {{ border-left: 4px solid {COLOURS["audio"]}; padding: .2rem 1rem }}
.dl-captions .dl-bridged {{ border-color: {COLOURS["bridged"]} }}
.dl-captions p {{ font-size: 1.15rem; margin: .3rem 0 0 }} .dl-answer h3 {{ font-size: 1rem; margin: 1.4rem 0 .4rem }}
.dl-answer table {{ border-collapse: collapse; width: 100% }}
.dl-answer :is(table, tr, th, td) {{ border: 0 }} .dl-answer tr:first-child {{ opacity: .75 }}
.dl-answer :is(th, td) {{ text-align: left; font-weight: normal; padding: .25rem 1.5rem .25rem 0 }}
.dl-answer td {{ border-bottom: 1px solid #8884 }}
.dl-answer img {{ width: 100%; background: white; border-radius: 4px }} .dl-answer audio {{ width: 100% }}
.dl-note {{ opacity: .75; font-size: .9rem }} .dl-error {{ color: #B3261E }} .dark .dl-error {{ color: #F2B8B5 }}
"""


def text(words: str) -> str:
    """Words as HTML that stays words: escaped for HTML, for Gradio's templates (``${}``, ``{{}}``), for terminals."""
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
    """The page's function, with the profile's models and, where there are some, the cached vectors of train.

    Raises what :func:`load_models` raises.
    """
    encoder, link, captioner = load_models(profile)
    assert link is not None                                                          # it was asked for
    try:
        train, absent = load_embeddings(profile, "train"), ""
    except FileNotFoundError as error:
        train, absent = None, f"Nearest captions and the map are left out: {error}"

    def nearest(raw: torch.Tensor, across: torch.Tensor) -> str:
        if train is None:
            return f'<p class="dl-note">{text(absent)}</p>'
        found = nearest_captions(np.concatenate([raw, across]), train.text, train.captions, NEAREST)
        cells = [(text(a), f"{x:.2f}", text(b), f"{y:.2f}") for (a, x), (b, y) in zip(*found, strict=True)]
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in cells)
        head = "<tr><th>of the raw vector</th><th>cosine</th><th>of the bridged vector</th><th>cosine</th></tr>"
        figure, _ = plot_place(train.audio.numpy(), train.text.numpy(), raw.numpy(), across.numpy())
        place = image(figure, "the clip before and after the bridge, among sounds and captions of train")
        return (f"<h3>Nearest captions of train</h3><table>{head}{rows}</table>"
                f"<h3>Its place in the map of train</h3>{place}")

    def page(waveform: np.ndarray, title: str, note: str) -> str:
        raw = encoder.embed_audio([waveform])                                        # (1, D)
        across = bridged(link, raw)                                                  # (1, D)
        without, with_it = captioner.generate(raw)[0], captioner.generate(across)[0]
        cosine = float((raw * across).sum())
        player = audio_player(waveform, SAMPLING_RATE).data.replace('preload="none" ', "")   # its length shows at once
        wave = image(plot_waveform(waveform, SAMPLING_RATE), "waveform")
        return (f'<div class="dl-answer"><h3>{text(title)}</h3>{player}{wave}'
                f'<div class="dl-captions"><div>without the bridge<p>{text(without)}</p></div>'
                f'<div class="dl-bridged">with the bridge<p>{text(with_it)}</p></div></div><p class="dl-note">'
                f'Cosine of the raw and the bridged vector: {cosine:.2f}. {text(note)}</p>'
                f'{nearest(raw, across)}</div>')

    return page


def answer_file(page: Page, path: str | Path) -> str:
    """What the page shows for a file: its answer, or one line if it cannot be used."""
    try:
        waveform = read_audio(path, WINDOW_S)
        return page(waveform, f"{Path(path).name}, {clock(len(waveform) / SAMPLING_RATE)}", "")
    except ValueError as error:  # AudioError, or vectors that a model refuses
        return error_line(f"{Path(path).name}: {str(error).removeprefix(f'{path}: ')}")


def answer_scene(page: Page, split: Split, place: int) -> str:
    """What the page shows for clip ``place`` of a split, with its first reference caption."""
    try:
        return page(split.waveform(place), split.clip_ids[place],
                    f"A caption that belongs to it: {split.captions[place][0]}")
    except ValueError as error:
        return error_line(str(error))


def serve(profile: Profile, port: int = PORT) -> int:
    """Show the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Returns the exit code: 0, or 1 with one line on stderr where Gradio, a model or the port is not to be had.
    """
    with tempfile.TemporaryDirectory(prefix="dl-demo-") as folder:                   # what Gradio writes goes with it
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_TEMP_DIR": folder}
        try:
            import gradio

            print("demo: loading the models", file=sys.stderr, flush=True)
            with silence():
                page = load_page(profile)
        except (MissingWeights, ModuleNotFoundError, ValueError, OSError) as error:  # each says what to do
            remedy = ': pip install -e ".[demo]"' if getattr(error, "name", None) == "gradio" else ""
            print(f"demo: {printable(str(error))}{remedy}", file=sys.stderr)
            return 1
        plt.switch_backend("agg")  # figures are drawn in a thread of the server
        blocks = form(gradio, page, profile, Path(folder).resolve())
        theme = gradio.themes.Default(font=["system-ui", "DejaVu Sans", "sans-serif"],
                                      font_mono=["ui-monospace", "monospace"])
        try:
            blocks.launch(server_name=HOST, server_port=port, share=False, inbrowser=False, quiet=True,
                          prevent_thread_lock=True, ssr_mode=False, max_file_size=LARGEST_MB * 2**20, footer_links=[],
                          enable_monitoring=False, pwa=False, mcp_server=False, theme=theme, css=CSS)
        except (OSError, OverflowError):
            print(f"demo: port {port} of {HOST} is in use or is none: give another by --port N", file=sys.stderr)
            return 1
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as by Ctrl-C, and the folder goes
        print(f"{blocks.local_url}  (Ctrl-C ends it)", flush=True)
        blocks.block_thread()
    return 0


def form(gradio: Any, page: Page, profile: Profile, folder: Path) -> Any:
    """The form as ``gradio.Blocks``: a file or a scene goes in, HTML comes out; an upload is removed once answered."""
    def upload(path: str) -> tuple[str, None]:
        try:
            return answer_file(page, path), None  # None: the field is free for the next file
        finally:
            if Path(path).resolve().is_relative_to(folder):
                Path(path).unlink(missing_ok=True)

    split = None
    once = {"concurrency_id": "models", "concurrency_limit": 1, "api_visibility": "private"}
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
