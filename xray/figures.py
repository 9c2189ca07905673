"""Figures of reports: matplotlib without a window."""

from __future__ import annotations

from typing import Any

import numpy as np

COLOR = "#3b6ea5"


def subplots(across: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes side by side; size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, across, squeeze=False)[0]


def pixels_of(figure: Any) -> np.ndarray:
    """A figure as [H, W, 3] uint8."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
