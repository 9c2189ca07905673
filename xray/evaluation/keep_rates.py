"""One artifact at several keep rates, without retraining: accuracy against speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xray.artifacts.encoders import VisionEncoder
from xray.config.schedule import value_at
from xray.errors import ConfigError
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.suites import SUITES, suite_named, title_of
from xray.models.flops import vision_macs
from xray.reports.figures import label_axis, subplots
from xray.reports.tables import ResultTable

KEEP_RATES = "keep_rates.json"  # in the folder of a recipe
ROUNDS = 15  # of timing, after one of warm-up

Rates = dict[str, dict[str, float]]  # keep rate -> measures


def over_keep_rates(
    evaluator: Evaluator, rates: Sequence[float], names: Sequence[str], batch: int = 32
) -> Rates:
    """Measure accuracy, GFLOPs, samples/s and the median speed-up over keep rate 1 at each rate.

    Speed is that of the forward pass on random images (videos, if all samples are videos). Rates
    take turns, so that other work on the machine disturbs all equally. FLOPs are 2 x multiply-adds.
    Raises ConfigError for rates that the model cannot have.
    """
    encoder, sets = evaluator.sets.vision, evaluator.sets
    if encoder.vision.reduction == "none" and min(rates) < 1:
        raise ConfigError(f"{sets.what} with model.reduce=none: it keeps every token")
    if encoder.vision.reduction == "tome" and min(rates) < 0.5:
        raise ConfigError("--keep-rates must be at least 0.5: model.reduce=tome merges pairs")
    rates = sorted({1.0, *rates}, reverse=True)
    own = encoder.keep_rate
    size = value_at(sets.data.resolution, 1.0)
    suites = [suite_named(name) for name in names]
    video = all(sets.config.of(suite).modality == "video" for suite in suites)
    frames = value_at(sets.data.frames, 1.0) if video else 1
    by_rate: Rates = {}
    for rate in rates:
        encoder.keep_rate = rate
        sets.forget()
        results = evaluator.run(names)
        row = by_rate[f"{rate:g}"] = {
            "gflops": 2 * vision_macs(encoder.vision, frames, size, rate) / 1e9
        }
        for suite in suites:
            for key in suite.compared:
                for end in ("", "_low", "_high"):
                    row[f"{suite.name}/{key}{end}"] = results[suite.name][f"{key}{end}"]
    device = encoder.normalize.mean.device
    pixels = torch.randint(256, (batch, frames, 3, size, size), dtype=torch.uint8, device=device)
    seconds = _interleaved(encoder, rates, pixels)
    encoder.keep_rate = own
    for row, column in zip(by_rate.values(), seconds.t(), strict=True):
        row["frames"] = frames
        row["samples_per_s"] = batch / column.median().item()
        row["speed"] = (seconds[:, 0] / column).median().item()
    return by_rate


def check_comparable(names: Sequence[str]) -> None:
    """Raise ConfigError for no suite, or for one that cannot be compared across keep rates."""
    excluded = [suite.name for suite in SUITES if not suite.compared]
    if not names or any(name in excluded for name in names):
        raise ConfigError(f"--keep-rates compares none of {', '.join(excluded)}: --suite knn, say")


@torch.no_grad()
def _interleaved(encoder: VisionEncoder, rates: Sequence[float], pixels: Tensor) -> Tensor:
    """Time forward passes at keep rates that take turns: seconds, [rounds, rates]."""
    seconds = torch.zeros(ROUNDS + 1, len(rates), dtype=torch.float64)
    for number in range(ROUNDS + 1):
        for column, rate in enumerate(rates):
            encoder.keep_rate, start = rate, time.perf_counter()
            encoder.cls(pixels).cpu()  # waits for a GPU
            seconds[number, column] = time.perf_counter() - start
    return seconds[1:]


def _compared(by_rate: Rates) -> list[str]:
    """List the keys of the measures that are compared: SUITE/MEASURE."""
    keys = next(iter(by_rate.values()))
    return [key for key in keys if "/" in key and not key.endswith(("_low", "_high"))]


def _speed_unit(by_rate: Rates) -> str:
    frames = next(iter(by_rate.values()))["frames"]
    return "images/s" if frames == 1 else f"clips/s ({frames:.0f} frames)"


def keep_rate_table(by_rate: Rates) -> ResultTable:
    """Make a table with a row per keep rate."""
    measures = _compared(by_rate)
    titles = [f"{title_of(*key.split('/', 1))} %" for key in measures]
    columns = ("keep rate", *titles, "GFLOPs", _speed_unit(by_rate), "x of keep 1")
    table = ResultTable("Accuracy against speed", columns)
    for rate, r in by_rate.items():
        shares = [
            f"{100 * r[key]:.1f} [{100 * r[f'{key}_low']:.1f}, {100 * r[f'{key}_high']:.1f}]"
            for key in measures
        ]
        speed = f"{r['gflops']:.3g}", f"{r['samples_per_s']:.0f}", f"{r['speed']:.2f}"
        table.rows.append((rate, *shares, *speed))
    return table


def plot_keep_rates(by_rate: Rates, path: Path) -> None:
    """Save `keep_rate_figure` to a file."""
    keep_rate_figure(by_rate).savefig(path)


def keep_rate_figure(by_rate: Rates) -> Any:
    """Draw each measure with its interval over speed and over FLOPs, one point per keep rate."""
    figure, axes = subplots(2, (7.4, 3.8))
    columns = ("samples_per_s", f"{_speed_unit(by_rate)} of the forward pass"), ("gflops", "GFLOPs")
    for axis, (column, title) in zip(axes, columns, strict=True):
        for number, key in enumerate(_compared(by_rate)):
            xs = [r[column] for r in by_rate.values()]
            values = [100 * r[key] for r in by_rate.values()]
            below = [100 * (r[key] - r[f"{key}_low"]) for r in by_rate.values()]
            above = [100 * (r[f"{key}_high"] - r[key]) for r in by_rate.values()]
            label = title_of(*key.split("/", 1)) if axis is axes[0] else None
            axis.errorbar(
                xs, values, [below, above], marker="os^v"[number % 4], ms=4, lw=1.2, capsize=2,
                label=label,
            )  # fmt: skip
            for rate, x, y in zip(by_rate, xs, values, strict=True):
                axis.annotate(rate, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7)
        label_axis(axis, title, "%" if axis is axes[0] else "")
        axis.grid(alpha=0.25)
    figure.suptitle("One artifact at several keep rates", fontsize=10)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)  # never on the curves
    return figure
