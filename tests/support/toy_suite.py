"""The command line of xray with one more evaluation suite, added only to SUITES.

usage: toy_suite.py COMMANDS, a json list of lists of arguments; prints a json list of
[exit code, stdout, stderr].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from xray.artifacts.offers import VISION
from xray.evaluation import suites
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled


@dataclass
class ToyConfig(SuiteConfig):
    required_sets = ("samples",)

    samples: str = ""
    modality: Literal["image", "video"] = "image"


def run(sets: Sets, config: ToyConfig) -> Measures:
    """Measure how often the nearest other sample is of the same class."""
    features = sets.features(sets.open("toy.samples", config.samples, config.modality))
    labels, similarity = features.labels, features.rows @ features.rows.t()
    nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
    same = labels[:, None] == labels
    chance = (same.double().sum() - len(labels)) / (len(labels) * (len(labels) - 1))
    top1 = share("top1", labels[nearest] == labels)
    return top1 | {"chance_top1": float(chance), "samples": float(len(labels))}


def rows(measures: Measures) -> Iterator[Row]:
    over = f"{measures['samples']:.0f} toys"
    yield share_row("toy neighbours", measures, "top1", measures["chance_top1"], over)


TOY = Suite(
    "toy",
    ToyConfig,
    needs=frozenset({VISION}),
    run=run,
    rows=rows,
    title=titled("toy"),
    compared=("top1",),
)
suites.SUITES = (*suites.SUITES, TOY)


def main() -> None:
    from in_process import invoke

    torch.set_num_threads(1)
    done = [invoke(*command) for command in json.loads(sys.argv[1])]
    print(json.dumps([[d.exit_code, d.stdout, d.stderr or repr(d.exception)] for d in done]))


if __name__ == "__main__":
    main()
