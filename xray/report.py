"""Metrics as they were written, tables, and the HTML report of a run."""

from __future__ import annotations

import base64
import html
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table


def lines_up_to(path: Path, step: int) -> list[str]:
    """Whole metric lines of steps that a resumed run will not do again."""
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if row["step"] <= step:
            kept.append(line if line.endswith("\n") else line + "\n")
    return kept


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, [] where there is none."""
    return [json.loads(line) for line in lines_up_to(path, sys.maxsize)]


@dataclass
class ResultTable:
    """Rows of text under headings; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def print(self) -> None:
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            justify: Any = "left" if number == 0 else "right"
            table.add_column(column, justify=justify, overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        Console(highlight=False).print(table)

    def html(self) -> str:
        cells = ["".join(f"<th>{html.escape(c)}</th>" for c in self.columns)]
        cells += ["".join(f"<td>{html.escape(str(c))}</td>" for c in row) for row in self.rows]
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<h2>{html.escape(self.title)}</h2><div class=wide><table>{body}</table></div>"


@dataclass
class Picture:
    """An RGB array with a caption for the report."""

    title: str
    caption: str
    pixels: np.ndarray  # [H, W, 3] uint8

    def html(self) -> str:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, format="PNG")
        return _figure(self.title, self.caption, buffer.getvalue())


def loss_curves(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One panel per stage, one line per block, over samples seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {name: rows for name, rows in metrics.items() if rows}
    if not shown:
        return ""
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.6 * len(shown), 2.8), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], shown.items(), strict=True):
        for key in [k for k in rows[0] if k.endswith("/loss") and not k.startswith("val/")]:
            points = [(row["samples"], row[key]) for row in rows if key in row]
            axis.plot(*zip(*points, strict=True), label=key.removesuffix("/loss"), linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("samples seen", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return _figure("Training loss", "Each stage's loss by block, over samples.", buffer.getvalue())


def write_report(path: Path, title: str, parts: Iterable[str]) -> None:
    """A self-contained HTML page; `parts` are HTML."""
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
        "color:#1b1f24}h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}"
        "table{border-collapse:collapse}th,td{padding:.3rem .8rem;border-bottom:1px solid #d8dee4;"
        "text-align:right}th:first-child,td:first-child{text-align:left}.wide{overflow-x:auto}"
        ".gallery{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax("
        "min(100%,24rem),1fr))}.gallery img{width:100%}td{white-space:pre}"
        "img{max-width:100%;height:auto}figcaption,p.note{color:#57606a;font-size:.9rem}"
        "figure{margin:0}code{font-size:.85rem;overflow-wrap:anywhere}"
    )
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
    )
    body = f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
    path.write_text(
        f"{head}<title>{html.escape(title)}</title><style>{style}</style><body>{body}</body></html>"
    )


def gallery(title: str, panels: Sequence[str]) -> str:
    """Panels side by side where there is room for more than one."""
    if not panels:
        return ""
    return f"<h2>{html.escape(title)}</h2><div class=gallery>{''.join(panels)}</div>"


def paragraph(text: Any) -> str:
    return f"<p class=note>{html.escape(str(text))}</p>"


def _figure(title: str, caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<h2>{html.escape(title)}</h2><figure><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
    )
