"""Compression: recall of shortened and quantised embeddings against the bytes of each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from xray.artifacts.offers import JOINT
from xray.errors import ConfigError
from xray.evaluation.suite import Measures, Row, Suite, share_row
from xray.evaluation.suites.retrieval import DIRECTIONS, RETRIEVAL, RetrievalConfig
from xray.words import count

if TYPE_CHECKING:
    from xray.evaluation.datasets import Sets

SHOWN = "R@10"  # in the table and the plot
METHODS = {
    "full": "all",
    "matryoshka": "trained prefix",
    "prefix": "prefix",
    "pca": "PCA",
}
VARIANT = re.compile(r"([a-z]+)(\d+)_(\w+)")  # method, number of dimensions, dtype
COLOURS = {"fp32": "#3b6ea5", "fp16": "#8a6bb8", "int8": "#3a8f5c", "binary": "#c0562f"}
STYLES = {"full": ("*", ""), "matryoshka": ("o", "--"), "prefix": ("o", ":"), "pca": ("s", "-")}


@dataclass
class CompressionConfig(RetrievalConfig):
    """Images with captions to search, others to fit PCA on, and the sizes to compare."""

    optional_sets = ("train",)

    train: str = ""  # images of the training data, to fit PCA on; "" = no PCA
    # numbers of dimensions; [] = the trained prefixes, or a half, a quarter and an eighth of all
    dims: list[int] = field(default_factory=list)

    def validate(self, key: str) -> None:
        super().validate(key)
        if any(dim < 1 for dim in self.dims):
            raise ConfigError(f"{key}.dims={self.dims}: give numbers of dimensions, at least 1")
        if self.languages:
            raise ConfigError(f"{key}.languages: all captions are searched at once: leave it out")


def _run(sets: Sets, config: CompressionConfig) -> Measures:
    from xray.evaluation.compression import compression_of

    return compression_of(sets, config)


def _check(sets: Sets, config: CompressionConfig) -> None:
    from xray.evaluation.compression import check_compression

    check_compression(sets, config)


def _title(measure: str) -> str:
    """Name a measure, such as: text to image R@10, PCA 64 int8."""
    name, _, variant = measure.partition("/")
    title = name.replace("_", " ")
    return f"{title}, {_label(*_parts(variant))}" if variant else f"compression {title}"


def _parts(variant: str) -> tuple[str, int, str]:
    """Split the name of a variant, such as pca64_int8, into method, dimensions and dtype."""
    found = VARIANT.fullmatch(variant)
    assert found is not None
    return found[1], int(found[2]), found[3]


def _label(method: str, dim: int, dtype: str) -> str:
    return f"{METHODS[method]} {dim} {dtype}"


def _variants(measures: Measures, measure: str) -> Iterator[tuple[str, str]]:
    """Yield (key, variant) of a measure of all variants."""
    for key in measures:
        name, _, variant = key.partition("/")
        if name == measure:
            yield key, variant


def _rows(measures: Measures) -> Iterator[Row]:
    name = f"{DIRECTIONS[0]}_{SHOWN}"
    for key, variant in _variants(measures, name):
        over = count(measures[f"bytes/{variant}"], "byte")
        kept = f"{name}_kept/{variant}"
        if kept in measures:
            over += f", loss {round(100 - 100 * measures[kept], 1) + 0:.1f} %"
        elif variant.startswith("full") and variant.endswith("fp32"):
            over += f", {count(measures['images'], 'picture')}"
            over += f", {count(measures['texts'], 'caption')}"
        yield share_row(_title(key), measures, key, measures[f"chance_{name}"], over)


def _plot(measures: Measures, path: Path) -> None:
    """Plot the recall in both directions over the bytes of an embedding."""
    from xray.reports.figures import label_axis, subplots

    figure, axes = subplots(2, (8.4, 4.4))
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for key, variant in _variants(measures, f"{direction}_{SHOWN}"):
            method, _, dtype = _parts(variant)
            point = measures[f"bytes/{variant}"], 100 * measures[key]
            lines.setdefault((method, dtype), []).append(point)
        for (method, dtype), points in lines.items():
            marker, style = STYLES[method]
            axis.plot(
                *zip(*sorted(points), strict=True), marker=marker, ls=style, lw=1.2, ms=5,
                color=COLOURS[dtype], label=f"{METHODS[method]}, {dtype}",
            )  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.set_title(direction.replace("_", " "), fontsize=9)
        label_axis(axis, "bytes of an embedding", f"{SHOWN} %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path)


COMPRESSION = Suite(
    "compression",
    CompressionConfig,
    needs=frozenset({JOINT}),
    run=_run,
    rows=_rows,
    title=_title,
    sets_from=RETRIEVAL,
    plot=_plot,
    added=True,
    check=_check,
)
