"""EViT, ToMe and random reduction of one artifact's backbone at equal keep rates, on a probe.

Linear probe and kNN on classes_val (labelled photos) without retraining, multiply-adds, and the
measured speed against keep rate 1. Writes a JSON; --plot draws accuracy over speed from JSONs.

    python tools/compare_reductions.py runs/real_small/clip/artifact --root DATA --out clip.json
    python tools/compare_reductions.py --plot reductions.png mae.json clip.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import hardware, interleaved, speedup
from torch import Tensor

from data_pipelines.loader import iterate_source
from data_pipelines.shards import Sample, open_source
from data_pipelines.transforms import load_pixels
from xray.artifact import open_artifact
from xray.config import DataConfig
from xray.evaluation.features import label_of
from xray.evaluation.knn import knn
from xray.evaluation.linear_probe import linear_probe
from xray.models.flops import vision_macs
from xray.restore import VisionEncoder
from xray.schedule import value_at

RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
REDUCTIONS = ("evit", "tome", "random")
COLOURS = {"evit": "tab:blue", "tome": "tab:orange", "random": "tab:gray"}


def load(root: str, shards: str, resolution: int) -> tuple[Tensor, Tensor]:
    """All pictures of a source, [N, 1, 3, S, S] uint8, and their labels."""
    data = DataConfig(resolution=resolution, workers=2)

    def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
        label = torch.tensor(label_of(sample.files))
        return {"pixels": load_pixels(sample, data, rng), "label": label}

    def collate(rows: Any) -> dict[str, Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    batches = list(
        iterate_source(open_source(shards, shards, "image", root), transform, collate, data, 64)
    )
    return tuple(torch.cat([b[key] for b in batches]) for key in ("pixels", "label"))  # type: ignore[return-value]


def extract(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    return torch.cat([encoder.features(batch) for batch in pixels.split(128)])


def compare(path: str, root: str, rounds: int) -> dict[str, Any]:
    """The measures of every reduction and keep rate."""
    artifact = open_artifact(path)
    encoder = VisionEncoder(artifact)
    vision = encoder.vision
    resolution = value_at(artifact.manifest["config"]["data"]["resolution"], 1.0)
    train = load(root, "classes_val/probe_train", resolution)
    test = load(root, "classes_val/val", resolution)

    def run(reduction: str, rate: float) -> None:
        vision.reduction, encoder.keep_rate = reduction, rate
        encoder.features(test[0][:128])

    variants = {("none", 1.0): partial(run, "none", 1.0)}
    variants |= {(r, k): partial(run, r, k) for r in REDUCTIONS for k in RATES}
    seconds = interleaved({json.dumps(key): call for key, call in variants.items()}, rounds)
    rows = []
    for (reduction, rate), call in variants.items():
        call()  # sets the encoder
        features, tested = extract(encoder, train[0]), extract(encoder, test[0])
        rows.append(
            {
                "reduce": reduction,
                "keep_rate": rate,
                "mmacs": vision_macs(vision, 1, resolution, rate) / 1e6,
                "speed": speedup(seconds, json.dumps((reduction, rate)), json.dumps(("none", 1.0))),
                "linear": linear_probe(features, train[1], tested, test[1])["top1"],
                "knn": knn(features, train[1], tested, test[1])["top1"],
            }
        )
        print(_line(rows[-1]), flush=True)
    trained = {"reduce": artifact.manifest["config"]["model"]["reduce"]}
    trained["keep_rate"] = artifact.manifest["keep_rate"]
    return {
        "stage": artifact.stage,
        "trained": trained,
        "hardware": hardware("cpu"),
        "images": [len(train[0]), len(test[0])],
        "rows": rows,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['reduce']} | {row['keep_rate']} | {row['mmacs']:.1f} | {row['speed']:.2f}x | "
        f"{100 * row['linear']:.1f} | {100 * row['knn']:.1f} |"
    )


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """A panel per artifact: linear-probe accuracy over measured speed."""
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
        axis.set_xlabel("speed against keep rate 1", fontsize=8)
        axis.set_ylabel("linear probe top-1, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", help="an artifact; with --plot, JSONs written before")
    parser.add_argument("--root", default="", help="the folder that holds classes_val")
    parser.add_argument("--out", type=Path, default=Path("reductions.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="draw the JSONs given as inputs")
    options = parser.parse_args()
    if options.plot:
        plot([json.loads(Path(name).read_text()) for name in options.inputs], options.plot)
        return
    print(
        "| reduce | keep | MMACs | speed | linear probe % | kNN % |\n|---|---:|---:|---:|---:|---:|"
    )
    result = compare(options.inputs[0], options.root, options.rounds)
    options.out.write_text(json.dumps(result, indent=1))
    print(f"{result['hardware']}; {result['images']} images")


if __name__ == "__main__":
    main()
