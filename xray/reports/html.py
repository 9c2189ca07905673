"""Self-contained HTML pages: style, pictures, cards and galleries."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xray.files import write_in_place


@dataclass
class Picture:
    """Section of a page with one picture, [H, W, 3] uint8, and a caption."""

    title: str
    caption: str
    pixels: np.ndarray

    def html(self) -> str:
        """Return the section as HTML."""
        title = html.escape(self.title)
        return (
            f'<h2>{title}</h2><figure><img alt="{title}" src="{_png(self.pixels)}">'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )


@dataclass
class Card:
    """Small picture with lines of text below it."""

    pixels: Any  # tensor or array [3, H, W] with values in 0..255
    lines: Sequence[str]

    def html(self) -> str:
        """Return the card as HTML."""
        pixels = np.asarray(self.pixels, dtype=np.uint8).transpose(1, 2, 0)
        text = "<br>".join(map(html.escape, self.lines))
        return f'<figure><img alt="" src="{_png(pixels)}"><figcaption>{text}</figcaption></figure>'


def cards(title: str, shown: Sequence[Card | tuple[Card, Card]]) -> str:
    """Lay out cards side by side under a title; the cards of a pair stay adjacent."""
    if not shown:
        return ""
    body = ""
    for item in shown:
        if isinstance(item, tuple):
            body += f"<div class=pair>{item[0].html()}{item[1].html()}</div>"
        else:
            body += item.html()
    return f"<h2>{html.escape(title)}</h2><div class=cards>{body}</div>"


def write_report(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a self-contained HTML page of the given parts, which are HTML."""
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
        "color:#1b1f24}h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}"
        "table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #d8dee4;"
        "text-align:right}th:first-child,td:first-child{text-align:left}"
        # a shadow at each side to which a wide table can be scrolled
        ".wide{overflow-x:auto;background:linear-gradient(90deg,#fff,#fff0) 0/2rem 100% no-repeat "
        "local,linear-gradient(-90deg,#fff,#fff0) 100%/2rem 100% no-repeat local,linear-gradient("
        "90deg,#0004,#0000) 0/.7rem 100% no-repeat,linear-gradient(-90deg,#0004,#0000) "
        "100%/.7rem 100% no-repeat}"
        ".gallery{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax("
        "min(100%,24rem),1fr))}.gallery img{width:100%}.cards{display:grid;gap:1rem;"
        "grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr))}.cards img{width:100%;"
        "image-rendering:pixelated}.pair{grid-column:span 2;display:grid;gap:.5rem;"
        "grid-template-columns:1fr 1fr}td{white-space:pre}td:first-child{white-space:pre-line}"
        "img{max-width:100%;height:auto}figcaption,p.note{color:#57606a;font-size:.9rem}"
        "@media(max-width:30rem){th,td{padding:.25rem .4rem}}"
        # names and captions of users may be long, and without spaces
        "h1,h2,p,figcaption,td:first-child{overflow-wrap:anywhere}td:first-child{min-width:7rem}"
        "td.text{white-space:pre-line;overflow-wrap:anywhere;text-align:start;min-width:16rem}"
        ".sheet{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr))}"
        ".figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}"
        ".bars{width:100%}.bars td:nth-child(2){width:60%}.bars i{display:block;height:.9rem;"
        "background:#3b6ea5}td{vertical-align:top}summary{color:#3b6ea5;cursor:pointer}"
        "figure{margin:0;min-width:0}code{font-size:.85rem}small{color:#57606a}th.text{text-align:left}"
        "figcaption code,figcaption small{display:block}"
    )
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    title = html.escape(title)
    page = f"{head}<title>{title}</title><style>{style}</style><body>{body}</body></html>"
    write_in_place(path, page)


def gallery(title: str, panels: Sequence[str]) -> str:
    """Lay out panels in as many columns as the page is wide."""
    if not panels:
        return ""
    return f"<h2>{html.escape(title)}</h2><div class=gallery>{''.join(panels)}</div>"


LETTERS = 300  # of a text that are shown at once


def folded(text: str) -> str:
    """Return a text as HTML; the rest of a very long one is shown by a click."""
    if len(text) <= 2 * LETTERS:
        return html.escape(text)
    start, rest = html.escape(text[:LETTERS]), html.escape(text[LETTERS:])
    return f"{start}<details><summary>...</summary>{rest}</details>"


def bars(title: str, caption: str, counts: Sequence[tuple[str, int]]) -> str:
    """Draw a bar per name, in their order; return "" if there are no counts."""
    if not counts:
        return ""
    most = max(count for _, count in counts)
    rows = "".join(
        f"<tr><td dir=auto>{html.escape(name)}</td>"
        f'<td><i style="width:{100 * count / most:.1f}%"></i></td><td>{count:,}</td></tr>'
        for name, count in counts
    )
    table = f"<table class=bars>{rows}</table>"
    return f"<h2>{html.escape(title)}</h2><div class=wide>{table}</div>{paragraph(caption)}"


def paragraph(text: Any) -> str:
    """Return a text as an HTML paragraph."""
    return f"<p class=note>{html.escape(str(text))}</p>"


def _png(pixels: np.ndarray) -> str:
    """Encode pixels, [H, W, 3] uint8, as the data URL of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
