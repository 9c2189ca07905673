"""Retrieval and speed of EViT, ToMe and random tokens, with and without training at a keep rate.

Reads a finished ablation, such as `xray ablate token_reduction`. The results of arms that were
trained at a keep rate come from its ablation.json. The artifacts of the arm that keeps all tokens
are evaluated at the same rates without retraining, and timed. Prints a table; writes figure.json
and figure.png to the folder of the ablation.

    python -m tools.experiments.reduction_figure runs/ablate_token_reduction --root DATA \
        --shards captions_val
    python -m tools.experiments.reduction_figure runs/ablate_token_reduction/figure.json  # again
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
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
from xray.errors import ConfigError, XrayError
from xray.evaluation.config import EvalConfig
from xray.evaluation.evaluator import Evaluator
from xray.models.flops import vision_macs

DIRECTIONS = ("text_to_image", "image_to_text")
ALL_TOKENS: Variant = ("none", 1.0)
BATCH = 64  # images per timed forward pass

Results = dict[Variant, dict[str, list[float]]]  # variant -> metric -> value per seed


@dataclass(frozen=True)
class Arm:
    """Finished runs of an arm: artifacts of the clip stage, and R@k per seed by direction."""

    artifacts: list[Path]
    values: dict[str, list[float]]

    @property
    def variant(self) -> Variant:
        """Token reduction in training."""
        model = open_artifact(str(self.artifacts[0])).manifest["config"]["model"]
        reduction, rate = str(model["reduce"]), float(model["keep_rate"])
        return ALL_TOKENS if reduction == "none" or rate == 1 else (reduction, rate)


def arms_of(folder: Path, facts: dict[str, Any], k: int) -> list[Arm]:
    """Return the arms of an ablation with their R@k; facts: content of its ablation.json.

    Raises ConfigError if its metrics lack R@k.
    """
    metrics = {direction: f"retrieval.{direction}_R@{k}" for direction in DIRECTIONS}
    if lacking := set(metrics.values()).difference(*facts["runs"]):
        raise ConfigError(f"{folder}: the ablation has no {', '.join(sorted(lacking))}; set --k")
    arms = []
    for name in facts["arms"]:
        runs = [run for run in facts["runs"] if run["arm"] == name]
        recipes = [folder / "runs" / name / f"seed_{run['seed']}" / "recipe.yaml" for run in runs]
        artifacts = [Path(OmegaConf.load(recipe).clip.out) / "artifact" for recipe in recipes]
        values = {key: [run[metric] for run in runs] for key, metric in metrics.items()}
        arms.append(Arm(artifacts, values))
    return arms


def untrained(
    paths: list[Path], variants: list[Variant], config: EvalConfig, root: str, k: int
) -> Results:
    """Evaluate artifacts that were trained with all tokens at each variant; return R@k."""
    results: Results = {variant: {name: [] for name in DIRECTIONS} for variant in variants}
    for path in paths:
        evaluator = Evaluator.open(open_artifact(str(path)), config, root, 1)
        for variant in variants:
            select(evaluator.sets.vision, variant)
            evaluator.sets.forget()
            values = evaluator.run(["retrieval"])["retrieval"]
            found = {name: values[f"{name}_R@{k}"] for name in DIRECTIONS}
            for name, value in found.items():
                results[variant][name].append(value)
            print(path.parent.name, *variant, *(f"{100 * value:.1f}" for value in found.values()))
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


def compare(folder: Path, root: str, shards: str, k: int, rounds: int) -> dict[str, Any]:
    """Compare training at each keep rate with training on all tokens; return the JSON content."""
    facts = json.loads((folder / "ablation.json").read_text("utf-8"))
    arms = {arm.variant: arm for arm in arms_of(folder, facts, k)}
    if ALL_TOKENS not in arms:
        raise ConfigError(f"{folder}: no arm keeps all tokens (clip.model.keep_rate=1)")
    paths = arms[ALL_TOKENS].artifacts
    config = build(EvalConfig, {"retrieval": {"shards": shards}})
    reducing = [variant for variant in arms if variant != ALL_TOKENS]
    untrained_results = untrained(paths, reducing, config, root, k)
    cost = costs(paths[0], list(arms), rounds)
    rows = []
    for variant, arm in arms.items():
        macs, speed = cost[variant]
        row = {"reduce": variant[0], "keep_rate": variant[1], "mmacs": macs, "speed": speed}
        rows.append(
            row | {"trained": arm.values, "untrained": untrained_results.get(variant, arm.values)}
        )
    return {"hardware": hardware("cpu"), "k": k, "seeds": facts["seeds"], "rows": rows}


def _words(direction: str) -> str:
    return direction.replace("_", " ")


def _cell(values: list[float]) -> str:
    std = deviation(values)
    return f"{100 * mean(values):.1f}" + ("" if math.isnan(std) else f" ± {100 * std:.1f}")


def table(result: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    trainings = ("trained at this rate", "trained with all tokens")
    columns = [f"{_words(name)}, {training}" for name in DIRECTIONS for training in trainings]
    lines = [f"| reduce | keep | MMACs | speed | {' | '.join(columns)} |", "|---|" + "---:|" * 7]
    for row in result["rows"]:
        cells = [_cell(row[key][name]) for name in DIRECTIONS for key in ("trained", "untrained")]
        facts = f"| {row['reduce']} | {row['keep_rate']} | {row['mmacs']:.0f} "
        lines.append(f"{facts}| {row['speed']:.2f}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], out: Path) -> None:
    """Draw R@k over speed, one panel per direction; dashed lines are trained with all tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(DIRECTIONS), figsize=(9, 3.6), layout="constrained")
    full = [row for row in result["rows"] if row["reduce"] == "none"]
    for axis, direction in zip(axes, DIRECTIONS, strict=True):
        for reduction in REDUCTIONS:
            rows = [*full, *(row for row in result["rows"] if row["reduce"] == reduction)]
            speed = [row["speed"] for row in rows]
            for key, style, training in (
                ("trained", "o-", "trained at this rate"),
                ("untrained", "o--", "trained with all tokens"),
            ):
                values = [[100 * value for value in row[key][direction]] for row in rows]
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
        axis.set_title(f"{_words(direction)}, R@{result['k']} %", fontsize=10)
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
    parser.add_argument("--k", type=int, default=10, help="of R@k, which the ablation reports")
    parser.add_argument("--rounds", type=int, default=15)
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
        result = compare(options.input, options.root, options.shards, options.k, options.rounds)
        out = options.input / "figure.json"
        out.write_text(json.dumps(result, indent=1), "utf-8")
    plot(result, out.with_suffix(".png"))
    print(table(result), f"\n{result['hardware']}; seeds {result['seeds']}", sep="\n")


if __name__ == "__main__":
    main()
