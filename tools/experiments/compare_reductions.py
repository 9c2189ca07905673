"""Linear probe and kNN of artifacts' backbones with EViT, ToMe and random token reduction.

The backbones are not retrained. The probe uses classes_val (labelled photos). The tables also show
multiply-adds and the speed relative to keep rate 1, measured on the first artifact, because all
share a model. Prints tables; writes a JSON file and a plot of accuracy over speed.

    python -m tools.experiments.compare_reductions runs/real_small/{mae,hashtag,clip}/artifact \
        --root DATA
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.shards.source import open_source
from tools.common.timing import hardware, interleaved, speedup
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.evaluation.feature_extraction import extract
from xray.evaluation.knn import knn
from xray.evaluation.linear_probe import linear_probe
from xray.models.flops import vision_macs

RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
REDUCTIONS = ("evit", "tome", "random")
Data = tuple[Tensor, Tensor]  # pixels, labels
Row = dict[str, Any]
COLOURS = {"evit": "tab:blue", "tome": "tab:orange", "random": "tab:gray"}


def load(root: str, shards: str, resolution: int) -> Data:
    """Load all images of a source, [N, 1, 3, S, S] uint8, and their labels."""
    source = open_source(shards, shards, "image", root)
    images = extract(source, lambda pixels: pixels, DataConfig(resolution=resolution))
    return images.rows, images.labels


def encode(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Encode all pixels in batches, [N, 1, 3, S, S] -> [N, D]."""
    return torch.cat([encoder.features(batch) for batch in pixels.split(128)])


Variant = tuple[str, float]  # reduction, keep rate
VARIANTS: list[Variant] = [("none", 1.0), *((r, k) for r in REDUCTIONS for k in RATES)]


def select(encoder: VisionEncoder, variant: Variant) -> None:
    """Set an encoder's reduction and keep rate."""
    encoder.vision.reduction, encoder.keep_rate = variant


def speeds(
    encoder: VisionEncoder, pixels: Tensor, rounds: int, variants: list[Variant]
) -> dict[Variant, float]:
    """Measure the speed of each variant relative to keep rate 1."""

    def run(variant: Variant) -> None:
        select(encoder, variant)
        encoder.features(pixels)

    names = {variant: json.dumps(variant) for variant in variants}
    runs = {names[variant]: partial(run, variant) for variant in variants}
    seconds = interleaved(runs, rounds)
    return {v: speedup(seconds, names[v], names["none", 1.0]) for v in variants}


def probe(
    encoder: VisionEncoder, train: Data, test: Data, speed: dict[Variant, float]
) -> list[Row]:
    """Measure all variants of an encoder; return a row for each."""
    rows, resolution = [], train[0].shape[-1]
    for variant in VARIANTS:
        select(encoder, variant)
        features, test_features = encode(encoder, train[0]), encode(encoder, test[0])
        reduction, rate = variant
        row = {"reduce": reduction, "keep_rate": rate, "speed": speed[variant]}
        row["mmacs"] = vision_macs(encoder.vision, 1, resolution, rate) / 1e6
        row["linear"] = linear_probe(features, train[1], test_features, test[1])["top1"]
        row["knn"] = knn(features, train[1], test_features, test[1])["top1"]
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def compare(paths: list[str], root: str, rounds: int) -> dict[str, Any]:
    """Measure all variants of all artifacts; return the content of the JSON file."""
    artifacts = [open_artifact(path) for path in paths]
    resolution = value_at(artifacts[0].manifest["config"]["data"]["resolution"], 1.0)
    train = load(root, "classes_val/probe_train", resolution)
    test = load(root, "classes_val/val", resolution)
    speed = speeds(VisionEncoder(artifacts[0]), test[0][:128], rounds, VARIANTS)
    results = []
    for artifact in artifacts:
        print(f"\n{artifact.stage}\n\n| reduce | keep | MMACs | speed | linear probe % | kNN % |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        rows = probe(VisionEncoder(artifact), train, test, speed)
        trained = artifact.manifest["config"]["model"]["reduce"], artifact.manifest["keep_rate"]
        results.append({"stage": artifact.stage, "trained": trained, "rows": rows})
    return {
        "hardware": hardware("cpu"),
        "images": [len(train[0]), len(test[0])],
        "artifacts": results,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['reduce']} | {row['keep_rate']} | {row['mmacs']:.1f} | {row['speed']:.2f}x | "
        f"{100 * row['linear']:.1f} | {100 * row['knn']:.1f} |"
    )


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Draw linear-probe accuracy over measured speed, one panel per artifact."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(3.7 * len(results), 3.1), squeeze=False, layout="constrained"
    )
    for axis, result in zip(axes[0], results, strict=True):
        full = next(row for row in result["rows"] if row["reduce"] == "none")
        for reduction in REDUCTIONS:
            rows = [full, *(row for row in result["rows"] if row["reduce"] == reduction)]
            x, y = [row["speed"] for row in rows], [100 * row["linear"] for row in rows]
            axis.plot(x, y, "o-", label=reduction, color=COLOURS[reduction], markersize=4)
        axis.set_title(f"{result['stage']} artifact", fontsize=10)
        axis.set_xlabel("speed relative to keep rate 1", fontsize=8)
        axis.set_ylabel("linear probe top-1, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measure, print tables, and write the JSON file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", nargs="+", help="artifacts to measure, or a JSON file of this tool to plot again"
    )
    parser.add_argument("--root", default="", help="folder that contains classes_val")
    parser.add_argument("--out", type=Path, default=Path("reductions.json"), help="JSON file")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.inputs[0].endswith(".json"):
        result, out = (
            json.loads(Path(options.inputs[0]).read_text("utf-8")),
            Path(options.inputs[0]),
        )
    else:
        result, out = compare(options.inputs, options.root, options.rounds), options.out
        out.write_text(json.dumps(result, indent=1), "utf-8")
    plot(result["artifacts"], out.with_suffix(".png"))
    print(f"\n{result['hardware']}; {result['images']} images for fitting and testing")


if __name__ == "__main__":
    main()
