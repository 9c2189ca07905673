"""R@10 over the number of captions, of the arms of docs/results/proof/scarce.yaml.

Reads the results of `xray ablate`, whose arms are named ARM_CAPTIONS, such as hashtag_clip_900.
Prints a table with the ratio to the arm `clip` at the same number of captions, over common seeds,
and the numbers of captions at which `clip` overtakes the others. Writes a plot. ± is the standard
deviation over seeds; the bars of the plot are 95 % intervals of the mean over three seeds or more.

    python -m tools.experiments.scarce_figure runs/ablate_scarce --out docs/results/proof/scarce
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from xray.ablations.comparison import deviation, mean
from xray.evaluation.student_t import mean_interval

METRICS = {
    "retrieval.text_to_image_R@10": "text to image",
    "retrieval.image_to_text_R@10": "image to text",
}
OTHERS = {
    "video_retrieval.text_to_image_R@1": "text to video R@1 %",
    "knn.top1": "kNN top1 %",
    "linear_probe.top1": "linear probe top1 %",
}
COSTS = {"pictures_and_clips": "images and clips read", "flops": "TFLOP"}
BASELINE = "clip"
NAMES = {  # of the arms, in tables and the plot
    "clip": "clip",
    "clip_texts": "clip, hashtags as texts",
    "hashtag_clip": "hashtag, clip",
    "mae_hashtag_clip": "mae, hashtag, clip",
    "all_losses": "clip with all losses",
    "clip_texts_all_tokens": "clip, hashtags as texts, all tokens",
    "mae_hashtag_clip_all_tokens": "mae, hashtag, clip, all tokens",
}
Results = dict[str, dict[int, float]]  # metric, in percent, or cost -> seed -> value
Points = dict[str, dict[int, Results]]  # arm -> captions -> results


def points(facts: dict[str, Any]) -> Points:
    """Sort the runs of ablation.json by arm and number of captions."""
    found: Points = {}
    for run in facts["runs"]:
        named = re.fullmatch(r"(\w+)_(\d+)", run["arm"])
        if named is None:
            continue
        arm = NAMES.get(named[1], named[1])
        own = found.setdefault(arm, {}).setdefault(int(named[2]), {})
        for name in (*METRICS, *OTHERS, *COSTS):
            if run.get(name) is not None:
                value = run[name] * (1 if name in COSTS else 100)
                own.setdefault(name, {})[run["seed"]] = value
    return found


def half_interval(values: list[float]) -> float:
    """Return half the width of the 95 % interval of a mean; nan for fewer than 3 values."""
    return mean_interval(values)[1] - mean(values) if len(values) > 2 else math.nan


def _with_deviation(values: Collection[float]) -> str:
    spread = f" ± {deviation([*values]):.1f}" if len(values) > 1 else ""
    return f"{mean([*values]):.1f}{spread}"


def _ratio(own: Mapping[int, float], base: Mapping[int, float]) -> str:
    """Format the ratio of the means over the seeds that both have."""
    seeds = own.keys() & base.keys()
    if not seeds:
        return ""
    one, other = (mean([values[seed] for seed in seeds]) for values in (own, base))
    return f"{one / other:.2f}"


def table(found: Points) -> str:
    """Format the points as a Markdown table."""
    recalls = [head for name in METRICS.values() for head in (f"{name} R@10 %", "ratio to `clip`")]
    heads = ["photos with captions", "arm", "seeds", *COSTS.values(), *recalls, *OTHERS.values()]
    rules = ["---:", "---", *["---:"] * (len(heads) - 2)]
    rows = [
        [f"{number:,}", arm, *_cells(own[number], found.get(BASELINE, {}).get(number, {}))]
        for number in sorted({number for own in found.values() for number in own})
        for arm, own in found.items()
        if number in own
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rules, *rows))


def _cells(own: Results, base: Results) -> list[str]:
    """Format the results of an arm, with the ratios to those of `clip`."""
    cells = [str(len(next(iter(own.values()))))]
    read, flops = (mean([*own.get(name, {}).values()]) for name in COSTS)
    cells += ["" if math.isnan(read) else f"{read / 1e3:.0f}k"]
    cells += ["" if math.isnan(flops) else f"{flops / 1e12:.0f}"]
    for metric in METRICS:
        cells += [_with_deviation(own[metric].values()), _ratio(own[metric], base.get(metric, {}))]
    others = (own.get(metric, {}).values() for metric in OTHERS)
    return cells + [_with_deviation(values) if values else "" for values in others]


def crossover(arm: Mapping[int, float], base: Mapping[int, float]) -> float | None:
    """Return the number of captions at which `base` becomes better than `arm`; None if it does not.

    Between measured numbers, the difference is linear in the logarithm of the number of captions.
    """
    numbers = sorted(arm.keys() & base.keys())
    for low, high in itertools.pairwise(numbers):
        ahead, behind = arm[low] - base[low], base[high] - arm[high]
        if ahead >= 0 and behind > 0:
            share = ahead / (ahead + behind)
            return math.exp(math.log(low) * (1 - share) + math.log(high) * share)
    return None


def crossovers(found: Points) -> Iterator[str]:
    """Yield a line on each arm and metric: where the arm `clip` becomes better than it."""
    for arm, own in found.items():
        for metric, name in METRICS.items():
            curves = [
                {number: mean([*values[metric].values()]) for number, values in points.items()}
                for points in (own, found.get(BASELINE, {}))
            ]
            if arm != BASELINE and (number := crossover(*curves)) is not None:
                yield f"{name}: {BASELINE} overtakes {arm!r} at about {number:,.0f} captions"


def plot(found: Points, out: Path) -> None:
    """Draw R@10 over the number of captions, one panel per direction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(METRICS), figsize=(9, 3.8), layout="constrained")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for arm, own in found.items():
            numbers = sorted(own)
            if len(numbers) < 2:  # an arm at one number of captions has no curve
                continue
            values = [[*own[number][metric].values()] for number in numbers]
            heights, bars = [*map(mean, values)], [*map(half_interval, values)]
            axis.errorbar(numbers, heights, bars, fmt="o-", markersize=4, capsize=2, label=arm)
        axis.set_xscale("log")
        every = sorted({number for own in found.values() for number in own})
        axis.set_xticks(every, [f"{number:,}" for number in every])
        axis.minorticks_off()
        axis.set_title(f"{title}, R@10 %", fontsize=10)
        axis.set_xlabel("photos with captions", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=8)
    figure.savefig(out / "figure.png", dpi=110)


def main() -> None:
    """Print the table and the crossovers, and write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ablation", type=Path, help="folder of the ablation")
    parser.add_argument("--out", type=Path, help="folder of figure.png; default: the ablation's")
    given = parser.parse_args()
    found = points(json.loads((given.ablation / "ablation.json").read_text("utf-8")))
    if not found:
        raise SystemExit(f"{given.ablation}: no arm is named ARM_CAPTIONS, such as clip_900")
    plot(found, given.out or given.ablation)
    print(table(found), *crossovers(found), sep="\n")


if __name__ == "__main__":
    main()
