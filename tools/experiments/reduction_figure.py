"""Retrieval over speed of EViT, ToMe and random tokens, trained at each keep rate and not.

Reads a finished `xray ablate token_reduction`: the arms that were trained at a keep rate are taken
from its ablation.json. The artifacts of its arm that keeps all tokens are then evaluated at the
same rates without retraining, and timed. Prints a table; writes a JSON and a plot beside it.

    python -m tools.experiments.reduction_figure runs/ablate_token_reduction --root DATA \
        --shards captions_val
    python -m tools.experiments.reduction_figure docs/results/token_reduction.json # its plot again
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

WAYS = {"text_to_image_R@10": "text to image", "image_to_text_R@10": "image to text"}
BATCH = 64  # pictures that are timed at once


def trained(facts: dict[str, Any]) -> dict[Variant, dict[str, list[float]]]:
    """Each arm's measures by seed, by what it was trained with."""
    found = {}
    for name, arm in facts["arms"].items():
        reduction = arm["settings"]["clip.model.reduce"]
        rate = arm["settings"].get("clip.model.keep_rate", 1.0)
        runs = [run for run in facts["runs"] if run["arm"] == name]
        found[reduction, rate] = {w: [run[f"retrieval.{w}"] for run in runs] for w in WAYS}
    return found


def untrained(
    paths: list[Path], variants: list[Variant], config: EvalConfig, root: str
) -> dict[Variant, dict[str, list[float]]]:
    """The same measures of artifacts that were trained with all tokens."""
    found: dict[Variant, dict[str, list[float]]] = {v: {w: [] for w in WAYS} for v in variants}
    for path in paths:
        evaluator = Evaluator.open(open_artifact(str(path)), config, root, 1)
        for variant in variants:
            select(evaluator.sets.vision, variant)
            evaluator.sets.forget()
            measures = evaluator.run(["retrieval"])["retrieval"]
            for way in WAYS:
                found[variant][way].append(measures[way])
            print(path.parent.name, *variant, f"{100 * measures['text_to_image_R@10']:.1f}")
    return found


def costs(path: Path, variants: list[Variant], rounds: int) -> dict[Variant, tuple[float, float]]:
    """Multiply-adds of a picture in millions, and speed against all tokens, of the image tower."""
    artifact = open_artifact(str(path))
    encoder = VisionEncoder(artifact)
    size = value_at(artifact.manifest["config"]["data"]["resolution"], 1.0)
    pixels = torch.randint(256, (BATCH, 1, 3, size, size), dtype=torch.uint8)
    found = {}
    for variant, speed in speeds(encoder, pixels, rounds, variants).items():
        select(encoder, variant)
        found[variant] = vision_macs(encoder.vision, 1, size, variant[1]) / 1e6, speed
    return found


def compare(folder: Path, root: str, shards: str, rounds: int) -> dict[str, Any]:
    """All rows: a reduction, a keep rate, and the measures with and without training at it."""
    facts = json.loads((folder / "ablation.json").read_text())
    own = trained(facts)
    base = facts["baseline"]
    seeds = [run["seed"] for run in facts["runs"] if run["arm"] == base]
    recipes = [folder / "runs" / base / f"seed_{seed}" / "recipe.yaml" for seed in seeds]
    paths = [Path(OmegaConf.load(recipe).clip.out) / "artifact" for recipe in recipes]
    config = build(EvalConfig, {"retrieval": {"shards": shards}})
    others = [variant for variant in own if variant[0] != "none"]
    found = untrained(paths, others, config, root)
    cost = costs(paths[0], list(own), rounds)
    rows = []
    for variant, measures in own.items():
        macs, speed = cost[variant]
        row = {"reduce": variant[0], "keep_rate": variant[1], "mmacs": macs, "speed": speed}
        rows.append(row | {"trained": measures, "untrained": found.get(variant, measures)})
    return {"hardware": hardware("cpu"), "seeds": facts["seeds"], "rows": rows}


def _cell(values: list[float]) -> str:
    spread = deviation(values)
    return f"{100 * mean(values):.1f}" + ("" if math.isnan(spread) else f" ± {100 * spread:.1f}")


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    columns = [f"{name}, {how}" for name in WAYS.values() for how in ("trained", "not")]
    lines = [f"| reduce | keep | MMACs | speed | {' | '.join(columns)} |", "|---|" + "---:|" * 7]
    for row in result["rows"]:
        cells = [_cell(row[how][way]) for way in WAYS for how in ("trained", "untrained")]
        facts = f"| {row['reduce']} | {row['keep_rate']} | {row['mmacs']:.0f} "
        lines.append(f"{facts}| {row['speed']:.2f}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """A panel per direction: lines are trained at the keep rate, dashed ones are not."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WAYS), figsize=(9, 3.6), layout="constrained")
    full = [row for row in result["rows"] if row["reduce"] == "none"]
    for axis, (way, title) in zip(axes, WAYS.items(), strict=True):
        for reduction in REDUCTIONS:
            rows = [*full, *(row for row in result["rows"] if row["reduce"] == reduction)]
            speed = [row["speed"] for row in rows]
            for how, style in (("trained", "o-"), ("untrained", "o--")):
                values = [[100 * value for value in row[how][way]] for row in rows]
                axis.errorbar(
                    speed,
                    [mean(own) for own in values],
                    [0.0 if math.isnan(deviation(own)) else deviation(own) for own in values],
                    fmt=style,
                    color=COLOURS[reduction],
                    markersize=4,
                    elinewidth=0.8,
                    markerfacecolor=None if how == "trained" else "white",
                    label=f"{reduction}, {'trained at it' if how == 'trained' else 'not'}",
                )
        axis.set_title(f"{title}, R@10 %", fontsize=10)
        axis.set_xlabel("speed against all tokens", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path, help="an ablation's folder, or a JSON written before")
    parser.add_argument("--root", default="", help="the folder that holds the shards")
    parser.add_argument("--shards", default="captions_val", help="pictures with captions")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("token_reduction.json"))
    options = parser.parse_args()
    try:
        run(options)
    except XrayError as error:
        sys.exit(f"reduction_figure: {error}")


def run(options: argparse.Namespace) -> None:
    if options.input.suffix == ".json":
        result, out = json.loads(options.input.read_text()), options.input
    else:
        result = compare(options.input, options.root, options.shards, options.rounds)
        out = options.out
        out.write_text(json.dumps(result, indent=1))
    plot(result, out.with_suffix(".png"))
    print(table(result), f"\n{result['hardware']}; seeds {result['seeds']}", sep="\n")


if __name__ == "__main__":
    main()
