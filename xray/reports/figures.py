"""Figures of reports, drawn by matplotlib without a display."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from xray.reports.html import Picture, paragraph

COLOR = "#3b6ea5"
COLOURS = (COLOR, "#b4552d", "#6f5b9a", "#2f7d5b", "#a33c63", "#8a6d1f", "#4a4a4a")


def subplots(across: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Create a figure with `across` axes side by side; size (width, height) in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, across, squeeze=False)[0]


def label_axis(axis: Any, x: str, y: str = "") -> None:
    """Label an axis in small print, without its frame's top and right side."""
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def section(title: str, caption: str, figure: Any) -> str:
    """Render a figure as a section of a page, with a title and a caption."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return Picture(title, caption, pixels).html()


def figures(title: str, caption: str, panels: Sequence[tuple[Any, str]]) -> str:
    """Lay out figures, each with its text for screen readers, in as many columns as fit."""
    drawn = "".join(svg(figure, text) for figure, text in panels)
    return f"<h2>{html.escape(title)}</h2><div class=figures>{drawn}</div>{paragraph(caption)}"


def svg(figure: Any, title: str) -> str:
    """Render a figure as an <img> element with SVG data; title: its text for screen readers."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "xray"}):  # the same figure gives the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{data}">'
