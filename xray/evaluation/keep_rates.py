"""One artifact at several keep rates, and with several methods of token reduction, without
retraining: accuracy against speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xray.artifacts.encoders import VisionEncoder
from xray.config.model import Reduction
from xray.config.schedule import value_at
from xray.errors import ConfigError
from xray.evaluation.evaluator import Evaluator
from xray.evaluation.suite import Measures, Suite, with_bars
from xray.evaluation.suites import SUITES, suite_named, title_of
from xray.evaluation.suites.zero_shot import MAP
from xray.models.flops import vision_macs
from xray.reports.figures import label_axis, subplots
from xray.reports.tables import ResultTable

KEEP_RATES = "keep_rates.json"  # in the folder of a recipe
ROUNDS = 15  # of timing, after one of warm-up
TITLES = {"evit": "EViT", "tome": "ToMe", "random": "random"}  # methods of token reduction

Rates = dict[str, dict[str, float]]  # keep rate -> measures
Setting = tuple[Reduction, float]  # method of token reduction, keep rate


def over_keep_rates(
    evaluator: Evaluator, rates: Sequence[float], names: Sequence[str], batch: int = 32
) -> Rates:
    """Measure accuracy, GFLOPs, samples/s and the median speed-up over keep rate 1 at each rate.

    Speed is that of the forward pass on random images (videos, if all samples are videos). Rates
    take turns, so that other work on the machine disturbs all equally. FLOPs are 2 x multiply-adds.
    Raises ConfigError for rates that the model cannot have.
    """
    own = evaluator.sets.vision.vision.reduction
    return over_methods(evaluator, [own], rates, names, batch)[own]


def over_methods(
    evaluator: Evaluator,
    methods: Sequence[Reduction],
    rates: Sequence[float],
    names: Sequence[str],
    batch: int = 32,
) -> dict[str, Rates]:
    """Measure as `over_keep_rates` with several methods of token reduction, by method.

    The methods have no parameters, so the same weights are evaluated with each of them. At keep
    rate 1 they do nothing: it is measured once for all.
    """
    encoder, sets = evaluator.sets.vision, evaluator.sets
    if "none" in methods and min(rates) < 1:
        raise ConfigError(
            f"{sets.what} with model.reduce=none: it keeps every token; xray eval --reduce evit "
            "gives it a method"
        )
    if "tome" in methods and min(rates) < 0.5:
        raise ConfigError("--keep-rates must be at least 0.5: model.reduce=tome merges pairs")
    below = sorted({*rates} - {1.0}, reverse=True)
    settings = [(methods[0], 1.0), *((method, rate) for method in methods for rate in below)]
    own = encoder.vision.reduction, encoder.keep_rate
    try:
        measured = _measured(evaluator, settings, names, batch)
    finally:
        encoder.vision.reduction, encoder.keep_rate = own
        sets.forget()
    all_tokens = {"1": measured[settings[0]]}
    return {
        method: all_tokens | {f"{rate:g}": measured[method, rate] for rate in below}
        for method in methods
    }


def _measured(
    evaluator: Evaluator, settings: Sequence[Setting], names: Sequence[str], batch: int
) -> dict[Setting, dict[str, float]]:
    """Run the suites with each setting, the first of which keeps all tokens, then time them."""
    encoder, sets = evaluator.sets.vision, evaluator.sets
    size = value_at(sets.data.resolution, 1.0)
    suites = [suite_named(name) for name in names]
    video = all(sets.config.of(suite).modality == "video" for suite in suites)
    frames = value_at(sets.data.frames, 1.0) if video else 1
    measured: dict[Setting, dict[str, float]] = {}
    for setting in settings:
        encoder.vision.reduction, encoder.keep_rate = setting
        sets.forget()
        results = evaluator.run(names)
        row = measured[setting] = {
            "gflops": 2 * vision_macs(encoder.vision, frames, size, setting[1]) / 1e9
        }
        for suite in suites:
            for key in _compared_of(suite, results[suite.name]):
                for end in ("", "_low", "_high"):
                    row[f"{suite.name}/{key}{end}"] = results[suite.name][f"{key}{end}"]
    device = encoder.normalize.mean.device
    pixels = torch.randint(256, (batch, frames, 3, size, size), dtype=torch.uint8, device=device)
    seconds = _interleaved(encoder, settings, pixels)
    for row, column in zip(measured.values(), seconds.t(), strict=True):
        row["frames"] = frames
        row["samples_per_s"] = batch / column.median().item()
        row["speed"] = (seconds[:, 0] / column).median().item()
    return measured


def _compared_of(suite: Suite[Any], measures: Measures) -> list[str]:
    """List the measures of a suite that are compared; samples with several classes have no top1."""
    return [key for key in (*suite.compared, MAP) if key in measures]


def check_comparable(names: Sequence[str]) -> None:
    """Raise ConfigError for no suite, or for one that cannot be compared across keep rates."""
    excluded = [suite.name for suite in SUITES if not suite.compared]
    if not names or any(name in excluded for name in names):
        raise ConfigError(f"--keep-rates compares none of {', '.join(excluded)}: --suite knn, say")


@torch.no_grad()
def _interleaved(encoder: VisionEncoder, settings: Sequence[Setting], pixels: Tensor) -> Tensor:
    """Time forward passes with settings that take turns: seconds, [rounds, settings]."""
    seconds = torch.zeros(ROUNDS + 1, len(settings), dtype=torch.float64)
    for number in range(ROUNDS + 1):
        for column, setting in enumerate(settings):
            encoder.vision.reduction, encoder.keep_rate = setting
            start = time.perf_counter()
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
    table = _table(by_rate, "keep rate")
    table.rows += [(rate, *_cells(row)) for rate, row in by_rate.items()]
    return table


def method_table(by_method: Mapping[str, Rates]) -> ResultTable:
    """Make a table with a row per keep rate and method; all methods share that of keep rate 1."""
    first = next(iter(by_method.values()))
    table = _table(first, "method, keep rate")
    for number, (method, by_rate) in enumerate(by_method.items()):
        for rate, row in by_rate.items():
            if rate != "1":
                table.rows.append((f"{TITLES[method]}, {rate}", *_cells(row)))
            elif not number:
                table.rows.append(("all tokens, 1", *_cells(row)))
    return table


def _table(by_rate: Rates, first: str) -> ResultTable:
    titles = [f"{title_of(*key.split('/', 1))} %" for key in _compared(by_rate)]
    columns = (first, *titles, "GFLOPs", _speed_unit(by_rate), "x of keep 1")
    return ResultTable("Accuracy against speed", columns)


def _cells(row: Mapping[str, float]) -> list[str]:
    """Format the measures of a keep rate, with their intervals, and its speed."""
    shares = [
        f"{100 * row[key]:.1f} [{100 * row[f'{key}_low']:.1f}, {100 * row[f'{key}_high']:.1f}]"
        for key in _compared({"": dict(row)})
    ]
    speed = f"{row['gflops']:.3g}", f"{row['samples_per_s']:.0f}", f"{row['speed']:.2f}"
    return [*shares, *speed]


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
            values, bars = with_bars([(row, key) for row in by_rate.values()])
            label = title_of(*key.split("/", 1)) if axis is axes[0] else None
            axis.errorbar(
                xs, values, bars, marker="os^v"[number % 4], ms=4, lw=1.2, capsize=2,
                label=label,
            )  # fmt: skip
            for rate, x, y in zip(by_rate, xs, values, strict=True):
                axis.annotate(rate, (x, y), textcoords="offset points", xytext=(4, 5), fontsize=7)
        label_axis(axis, title, "%" if axis is axes[0] else "")
        axis.grid(alpha=0.25)
    figure.suptitle("One artifact at several keep rates", fontsize=10)
    figure.legend(fontsize=7, loc="outside lower center", ncols=2)  # never on the curves
    return figure


def plot_methods(by_method: Mapping[str, Rates], path: Path) -> None:
    """Draw each measure over the keep rate, with a curve per method, and save it to a file."""
    measures = _compared(next(iter(by_method.values())))
    figure, axes = subplots(len(measures), (max(4.2, 3.4 * len(measures)), 3.4))
    for axis, key in zip(axes, measures, strict=True):
        for number, (method, by_rate) in enumerate(by_method.items()):
            rates = [float(rate) for rate in by_rate]
            values, bars = with_bars([(row, key) for row in by_rate.values()])
            label = TITLES[method] if axis is axes[0] else None
            axis.errorbar(
                rates, values, bars, marker="os^"[number % 3], ms=4, lw=1.2, capsize=2,
                label=label,
            )  # fmt: skip
        label_axis(axis, "keep rate", f"{title_of(*key.split('/', 1))} %")
        axis.grid(alpha=0.25)
    figure.suptitle("One artifact with several methods of token reduction", fontsize=10)
    figure.legend(fontsize=7, loc="outside lower center", ncols=len(by_method))
    figure.savefig(path)
