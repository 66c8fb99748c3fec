"""One HTML file that opens anywhere: Markdown pieces by nbconvert's renderer, figures inside, no script, nothing loaded from a network."""
from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

COLOURS = 64                # a figure keeps so many: a third of the bytes, and no visible change in a drawing
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 13px; margin: .8rem 0; }
th, td { border-bottom: 1px solid #e4e4e4; padding: .25rem .6rem; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } code { background: #f3f3f3; padding: 0 .2em; }
nav { font-size: 13px; } figure { margin: 1rem 0; } figcaption { font-size: 13px; color: #444; } img { max-width: 100%; }
"""


@dataclass(frozen=True)
class Figure:
    """A figure of ``results/<profile>/figures``: its file name without suffix, and what to see in it."""

    name: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One heading of the report: an id, a title, Markdown, figures after it."""

    key: str
    title: str
    markdown: str
    figures: tuple[Figure, ...] = ()


def small_png(path: Path, colours: int = COLOURS) -> bytes:
    """A PNG with at most ``colours`` colours and no metadata; equal files give equal bytes.

    Args:
        path: a PNG.
        colours: of the palette.

    Returns:
        the bytes of the small PNG.
    """
    from PIL import Image

    with Image.open(path) as image:
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.convert("RGBA").getchannel("A"))
    file = io.BytesIO()
    flat.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def render_markdown(text: str) -> str:
    """Markdown as HTML, tables included, without anchors; a tag in it stays text, and a link that would run something leads nowhere."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    renderer = IPythonRenderer(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(text)


def page(title: str, sections: list[Section], figures: Path) -> str:
    """The whole page.

    Args:
        title: its heading.
        sections: in order; the first is what a reader sees.
        figures: the folder of the PNGs; of an absent figure the name stands there, with the way to make it.

    Returns:
        HTML, complete in itself.
    """
    links = " · ".join(f'<a href="#{section.key}">{html.escape(section.title)}</a>' for section in sections[1:])
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for place, section in enumerate(sections):
        parts.append(f'<section id="{section.key}">\n<h2>{html.escape(section.title)}</h2>\n{render_markdown(section.markdown)}')
        parts += [_figure(figures, figure) for figure in section.figures]
        parts.append("</section>" + (f"\n<nav>{links}</nav>" if place == 0 else ""))
    body = "\n".join(parts)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n")


def _figure(folder: Path, figure: Figure) -> str:
    path = folder / f"{figure.name}.png"
    caption = html.escape(figure.caption)
    if not path.is_file():
        return f"<p>Figure {figure.name} is not there yet: ./run_all.sh --only {figure.name[:2]}. {caption}</p>"
    data = base64.b64encode(small_png(path)).decode()
    return f'<figure>\n<img alt="{caption}" src="data:image/png;base64,{data}">\n<figcaption>{caption}</figcaption>\n</figure>'
