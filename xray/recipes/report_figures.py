"""Curves of a run: all its stages on one axis of samples seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from stages import STAGES, stage_class
from xray.artifacts.offers import VISION
from xray.config import RunConfig
from xray.config.schedule import value_at
from xray.reports.figures import subplots, svg
from xray.reports.html import gallery
from xray.reports.tables import ResultTable

COLOURS = ("#3b6ea5", "#b4552d", "#6f5b9a", "#2f7d5b", "#a33c63", "#8a6d1f", "#4a4a4a")
SIZE = (4.4, 2.6)  # inches: the width of a phone, or half of a page
Rows = Sequence[Mapping[str, float]]


def curves(metrics: Mapping[str, Rows]) -> str:
    """Plot each stage's rows of metrics.jsonl over the samples of all stages; "" for none."""
    shown = {stage: rows for stage, rows in metrics.items() if rows}
    panels = [
        _panel(shown, "loss", "loss", lambda row: row.get("loss")),
        _panel(shown, "validation loss", "val/loss", lambda row: row.get("val/loss")),
        _panel(shown, "samples per second", "samples/s", lambda row: row.get("samples/s")),
        _panel(shown, "learning rate", "lr", lambda row: row.get("lr")),
        _panel(shown, "keep rate", "keep_rate", _keep_rate, seen=True),
        _panel(shown, "resolution, pixels", "resolution", lambda row: row.get("resolution")),
    ]
    return gallery("Training", [panel for panel in panels if panel])


def _keep_rate(row: Mapping[str, float]) -> float | None:
    """Return the keep rate; the mean if each block has its own."""
    own = [value for key, value in row.items() if key.split("/")[0] == "keep_rate"]
    return sum(own) / len(own) if own else None


def _panel(
    metrics: Mapping[str, Rows],
    title: str,
    name: str,
    value: Callable[[Mapping[str, float]], float | None],
    seen: bool = False,
) -> str:
    """Plot a line per stage that has this value; seen: only of those with a backbone."""
    figure, (axis,) = subplots(1, SIZE)
    start, lows, highs = 0.0, list[float](), list[float]()
    for stage, rows in metrics.items():
        points = [(start + row["samples"], value(row)) for row in rows]
        left_out = seen and VISION not in stage_class(stage).offers
        known = [(x, y) for x, y in points if y is not None and not left_out]
        if known:
            xs, ys = zip(*known, strict=True)
            mark = "o" if len(known) == 1 else None
            axis.plot(xs, ys, color=_colour(stage), label=stage, linewidth=1.3, marker=mark)
            lows.append(min(ys))
            highs.append(max(ys))
        start += rows[-1]["samples"]
    if not highs:
        return ""
    if name in ("loss", "lr") and min(lows) > 0 and max(highs) > 20 * min(highs):
        axis.set_yscale("log")
    axis.set_xlim(0, start)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("samples seen, all stages", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_formatter(_thousands)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return svg(figure, f"{title} over samples seen")


def _colour(stage: str) -> str:
    """Return the colour of a stage, the same in every report."""
    return COLOURS[list(STAGES).index(stage) % len(COLOURS)]


def _thousands(value: float, position: int) -> str:
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def data_mix(runs: Sequence[RunConfig], metrics: Mapping[str, Rows]) -> ResultTable:
    """List the sources of a step of each stage, and the epochs over each source."""
    columns = ("stage", "source", "samples of a step", "share", "epochs", "size at the end")
    table = ResultTable("Data", columns)
    for run in runs:
        last = (metrics.get(run.stage) or [{}])[-1]
        for block in run.blocks:
            source = run.data.sources[block.source]
            epochs = last.get(f"{block.source}/epochs")
            side, frames = (value_at(x, 1.0) for x in (run.data.resolution, run.data.frames))
            size = {"image": f"{side} px", "video": f"{frames} x {side} px", "text": ""}
            table.rows.append(
                (
                    run.stage,
                    block.source,
                    f"{block.samples:,}",
                    f"{block.samples / run.global_batch:.0%}",
                    "" if epochs is None else f"{epochs:.3g}",
                    size[source.modality] if VISION in stage_class(run.stage).offers else "",
                )
            )
    return table
