"""Retrieval and speed of EViT, ToMe and random tokens, with and without training at a keep rate.

Reads a finished `xray ablate token_reduction`. The results of arms that were trained at a keep rate
come from its ablation.json. The artifacts of the baseline, which keeps all tokens, are evaluated at
the same rates without retraining, and timed. Prints a table; writes a JSON file and a plot.

    python -m tools.experiments.reduction_figure runs/ablate_token_reduction --root DATA \
        --shards captions_val
    python -m tools.experiments.reduction_figure docs/results/token_reduction.json # plots it again
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from tools.common.timing import hardware
from tools.experiments.compare_reductions import COLOURS, REDUCTIONS, Variant, select, speeds
from xray.ablations.comparison import deviation, mean
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder
from xray.config.loading import build
from xray.config.schedule import value_at
from xray.errors import XrayError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.models.flops import vision_macs

METRICS = {"text_to_image_R@10": "text to image", "image_to_text_R@10": "image to text"}
BATCH = 64  # images per timed forward pass

Results = dict[Variant, dict[str, list[float]]]  # variant -> metric -> value per seed


def trained(facts: dict[str, Any]) -> Results:
    """Return each arm's metrics from the content of ablation.json."""
    results = {}
    for name, arm in facts["arms"].items():
        reduction = arm["settings"]["clip.model.reduce"]
        rate = arm["settings"].get("clip.model.keep_rate", 1.0)
        runs = [run for run in facts["runs"] if run["arm"] == name]
        results[reduction, rate] = {m: [run[f"retrieval.{m}"] for run in runs] for m in METRICS}
    return results


def untrained(paths: list[Path], variants: list[Variant], config: EvalConfig, root: str) -> Results:
    """Evaluate artifacts that were trained with all tokens at each variant."""
    results: Results = {variant: {metric: [] for metric in METRICS} for variant in variants}
    for path in paths:
        evaluator = Evaluator.open(open_artifact(str(path)), config, root, 1)
        for variant in variants:
            select(evaluator.sets.vision, variant)
            evaluator.sets.forget()
            values = evaluator.run(["retrieval"])["retrieval"]
            for metric in METRICS:
                results[variant][metric].append(values[metric])
            print(path.parent.name, *variant, f"{100 * values['text_to_image_R@10']:.1f}")
    return results


def costs(path: Path, variants: list[Variant], rounds: int) -> dict[Variant, tuple[float, float]]:
    """Return (multiply-adds per image in millions, relative speed) of the image tower."""
    artifact = open_artifact(str(path))
    encoder = VisionEncoder(artifact)
    size = value_at(artifact.manifest["config"]["data"]["resolution"], 1.0)
    pixels = torch.randint(256, (BATCH, 1, 3, size, size), dtype=torch.uint8)
    results = {}
    for variant, speed in speeds(encoder, pixels, rounds, variants).items():
        select(encoder, variant)
        results[variant] = vision_macs(encoder.vision, 1, size, variant[1]) / 1e6, speed
    return results


def compare(folder: Path, root: str, shards: str, rounds: int) -> dict[str, Any]:
    """Compare training at each keep rate with training on all tokens; return the JSON content."""
    facts = json.loads((folder / "ablation.json").read_text("utf-8"))
    trained_results = trained(facts)
    base = facts["baseline"]
    seeds = [run["seed"] for run in facts["runs"] if run["arm"] == base]
    recipes = [folder / "runs" / base / f"seed_{seed}" / "recipe.yaml" for seed in seeds]
    paths = [Path(OmegaConf.load(recipe).clip.out) / "artifact" for recipe in recipes]
    config = build(EvalConfig, {"retrieval": {"shards": shards}})
    reducing = [variant for variant in trained_results if variant[0] != "none"]
    untrained_results = untrained(paths, reducing, config, root)
    cost = costs(paths[0], list(trained_results), rounds)
    rows = []
    for variant, values in trained_results.items():
        macs, speed = cost[variant]
        row = {"reduce": variant[0], "keep_rate": variant[1], "mmacs": macs, "speed": speed}
        rows.append(row | {"trained": values, "untrained": untrained_results.get(variant, values)})
    return {"hardware": hardware("cpu"), "seeds": facts["seeds"], "rows": rows}


def _cell(values: list[float]) -> str:
    std = deviation(values)
    return f"{100 * mean(values):.1f}" + ("" if math.isnan(std) else f" ± {100 * std:.1f}")


def table(result: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    trainings = ("trained at this rate", "trained with all tokens")
    columns = [f"{name}, {training}" for name in METRICS.values() for training in trainings]
    lines = [f"| reduce | keep | MMACs | speed | {' | '.join(columns)} |", "|---|" + "---:|" * 7]
    for row in result["rows"]:
        cells = [_cell(row[key][m]) for m in METRICS for key in ("trained", "untrained")]
        facts = f"| {row['reduce']} | {row['keep_rate']} | {row['mmacs']:.0f} "
        lines.append(f"{facts}| {row['speed']:.2f}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw R@10 over speed, one panel per direction; dashed lines are trained with all tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 3.6), layout="constrained")
    full = [row for row in result["rows"] if row["reduce"] == "none"]
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for reduction in REDUCTIONS:
            rows = [*full, *(row for row in result["rows"] if row["reduce"] == reduction)]
            speed = [row["speed"] for row in rows]
            for key, style, training in (
                ("trained", "o-", "trained at this rate"),
                ("untrained", "o--", "trained with all tokens"),
            ):
                values = [[100 * value for value in row[key][metric]] for row in rows]
                axis.errorbar(
                    speed,
                    [mean(seeds) for seeds in values],
                    [0.0 if math.isnan(deviation(seeds)) else deviation(seeds) for seeds in values],
                    fmt=style,
                    color=COLOURS[reduction],
                    markersize=4,
                    elinewidth=0.8,
                    markerfacecolor=None if key == "trained" else "white",
                    label=f"{reduction}, {training}",
                )
        axis.set_title(f"{title}, R@10 %", fontsize=10)
        axis.set_xlabel("speed relative to all tokens", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Measure, print the table, and write the JSON file and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "input", type=Path, help="folder of an ablation, or a JSON file of this tool to plot again"
    )
    parser.add_argument("--root", default="", help="folder that contains the shards")
    parser.add_argument("--shards", default="captions_val", help="shards of captioned images")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("token_reduction.json"), help="JSON file")
    options = parser.parse_args()
    try:
        run(options)
    except XrayError as error:
        sys.exit(f"reduction_figure: {error}")


def run(options: argparse.Namespace) -> None:
    """Measure or read the results, then write and print them."""
    if options.input.suffix == ".json":
        result, out = json.loads(options.input.read_text("utf-8")), options.input
    else:
        result = compare(options.input, options.root, options.shards, options.rounds)
        out = options.out
        out.write_text(json.dumps(result, indent=1), "utf-8")
    plot(result, out.with_suffix(".png"))
    print(table(result), f"\n{result['hardware']}; seeds {result['seeds']}", sep="\n")


if __name__ == "__main__":
    main()
