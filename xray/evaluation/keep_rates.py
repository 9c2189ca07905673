"""One artifact at several keep rates, without retraining: accuracy against speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from xray.config.schedule import value_at
from xray.errors import ConfigError
from xray.evaluation.results_table import title_of
from xray.evaluation.suites import Measures, Suite
from xray.models.flops import vision_macs
from xray.reports.tables import ResultTable

ROUNDS = 15  # of timing, after one of warm-up
MAIN = ("top1", "text_to_image_R@1", "image_to_text_R@1")  # what a suite is judged by
NOT_OF_RATES = ("tags", "captions", "robustness", "finetune")

Rates = dict[str, Measures]  # keep rate -> measures


def over_keep_rates(
    suite: Suite, rates: Sequence[float], names: Sequence[str], batch: int = 32
) -> Rates:
    """Main measures, GFLOPs, samples/s and its ratio to keep 1, of each rate.

    Speed is of the forward pass on random pictures (clips, where the samples are) at the artifact's
    resolution; the rates take turns, so that other work on the machine disturbs all alike, and the
    ratio is the median over rounds. FLOPs are 2 x multiply-adds. Raises ConfigError for rates that
    the model cannot have.
    """
    encoder, sets = suite.sets.vision, suite.sets
    if encoder.vision.reduction == "none" and min(rates) < 1:
        raise ConfigError(f"{sets.what} with model.reduce=none: it keeps every token")
    if encoder.vision.reduction == "tome" and min(rates) < 0.5:
        raise ConfigError("--keep-rates must be at least 0.5: model.reduce=tome merges pairs")
    rates = sorted({1.0, *rates}, reverse=True)
    own = encoder.keep_rate
    size = value_at(sets.data.resolution, 1.0)
    video = all(_modality(suite, name) == "video" for name in names)
    frames = value_at(sets.data.frames, 1.0) if video else 1
    found: Rates = {}
    for rate in rates:
        encoder.keep_rate = rate
        sets.forget()
        results = suite.run(names)
        macs = vision_macs(encoder.vision, frames, size, rate)
        found[f"{rate:g}"] = {"gflops": 2 * macs / 1e9} | {
            f"{name}/{key}{end}": measures[f"{key}{end}"]
            for name, measures in results.items()
            for key in MAIN
            for end in ("", "_low", "_high")
            if f"{key}{end}" in measures
        }
    device = encoder.normalize.mean.device
    pixels = torch.randint(256, (batch, frames, 3, size, size), dtype=torch.uint8, device=device)

    def forward(rate: float) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            encoder.keep_rate = rate
            encoder.cls(pixels).cpu()  # which waits for a GPU

        return run

    seconds = _interleaved([forward(rate) for rate in rates])
    encoder.keep_rate = own
    for rate, row in zip(rates, seconds.t(), strict=True):
        found[f"{rate:g}"]["frames"] = frames
        found[f"{rate:g}"]["samples_per_s"] = batch / row.median().item()
        found[f"{rate:g}"]["speed"] = (seconds[:, 0] / row).median().item()
    return found


def _modality(suite: Suite, name: str) -> str:
    return str(getattr(suite.sets.config, name).modality)


def _interleaved(runs: Sequence[Callable[[], None]]) -> torch.Tensor:
    """Seconds, [rounds, runs], of runs that take turns."""
    seconds = torch.zeros(ROUNDS + 1, len(runs), dtype=torch.float64)
    for number in range(ROUNDS + 1):
        for column, run in enumerate(runs):
            start = time.perf_counter()
            run()
            seconds[number, column] = time.perf_counter() - start
    return seconds[1:]


def per_second(found: Rates) -> str:
    """What the speed counts: images, or clips."""
    frames = next(iter(found.values()))["frames"]
    return "images/s" if frames == 1 else f"clips/s ({frames:.0f} frames)"


def keep_rate_table(found: Rates) -> ResultTable:
    """A row per keep rate."""
    measures = [key for key in next(iter(found.values())) if key.endswith(MAIN)]
    titles = [f"{title_of(*key.split('/', 1))} %" for key in measures]
    columns = ("keep rate", *titles, "GFLOPs", per_second(found), "x of keep 1")
    table = ResultTable("Accuracy against speed", columns)
    for rate, r in found.items():
        shares = [
            f"{100 * r[key]:.1f} [{100 * r[f'{key}_low']:.1f}, {100 * r[f'{key}_high']:.1f}]"
            for key in measures
        ]
        speed = f"{r['gflops']:.3g}", f"{r['samples_per_s']:.0f}", f"{r['speed']:.2f}"
        table.rows.append((rate, *shares, *speed))
    return table
