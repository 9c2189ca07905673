"""Fine-tuning of a clip model, and the line of mixtures between the models before and after.

A small clip model (image tower and text transformer, from random weights) is trained on photos with
captions. With each seed it is then fine-tuned on labelled photos, whose captions are "a photo of a
CLASS". `xray merge` evaluates the mixtures (1 - alpha) before + alpha after by zero-shot
classification of other labelled photos and by retrieval on other photos with captions.

Prints a table over alpha: the mean over seeds ± half the range between them. *Gain kept* is the
share of the gain in zero-shot top-1 at alpha 1; *loss avoided* is the share of the R@10 (mean of
both directions) that alpha 1 loses and that the mixture does not lose. A second call with the same
--work continues where the first one stopped.

    python -m tools.experiments.merge_line --data DATA --work DIR --out docs/results/merge_line.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages import stage_class
from tools.common.tables import Table, spread
from tools.common.timing import hardware
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.config import loading as cfg
from xray.config.model import LlmConfig
from xray.evaluation.config import EvalConfig
from xray.evaluation.suite import Measures
from xray.merging.frozen_text import share_text
from xray.merging.mixtures import line, parse_alphas
from xray.merging.search import Judge, Search
from xray.recipes.run import make_llm

SUITES = ("zero_shot", "retrieval")
RECALLS = ("text_to_image_R@10", "image_to_text_R@10")
SETTINGS = (
    "model.name=vit_tiny_patch16_224",
    "model.kwargs={patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}",
    "model.reduce=none", "data.workers=0", "data.resolution=48", "data.crop_scale=[0.5,1.0]",
    "text.tune=full", "text.attention=causal", "text.pooling=last", "text.lora_rank=0",
    "text.max_length=24", "clip.text_head=linear", "clip.embed_dim=128", "optim.name=adamw",
    "optim.weight_decay=0.2", "optim.betas=[0.9,0.98]", "train.precision=fp32",
    "train.keep_checkpoints=1",
)  # fmt: skip
EVAL = {
    "zero_shot": {"shards": "classes_val/val", "classes": "classes_val/classes.txt"},
    "retrieval": {"shards": "captions_val"},
}


def train(
    options: argparse.Namespace, name: str, shards: str, samples: int, *overrides: str,
    init_from: Sequence[Artifact] = (),
) -> Artifact:  # fmt: skip
    """Run the clip stage in the work folder, or open its artifact if it is finished."""
    from xray.training.deepspeed_setup import init_distributed
    from xray.training.trainer import train_stage

    layers = [
        *SETTINGS, f"out={options.work / name}", f"data.root={options.data}",
        f"text.llm={options.work / 'llm'}", f"train.samples={samples}",
        f"data.sources.photos={{shards: {shards}, modality: image}}",
        f"data.blocks=[{{source: photos, samples: {options.block}}}]", *overrides,
    ]  # fmt: skip
    stage = stage_class("clip")
    config = cfg.load_config(stage.Config, "clip", cfg.parse_overrides(layers))
    config.init_from = [str(artifact.path) for artifact in init_from]
    config.validate()
    device = dist.choose_device("auto")
    init_distributed(device)
    return train_stage(stage, config, device)


def evaluated(options: argparse.Namespace, seed: int, pair: Sequence[Artifact]) -> list[Any]:
    """Evaluate the line between two artifacts: the results of each alpha."""
    config = cfg.build(EvalConfig, EVAL, section="eval.")
    vectors: dict[str, Any] | None = {} if share_text(pair) else None
    judge = Judge(SUITES, config, str(options.data), 1, dist.choose_device("auto"), vectors)
    out = options.work / f"merged-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    search = Search(pair, judge, out)
    mixtures = line(options.alphas, 2)
    search.measure(mixtures)
    return [search.of(mixture) for mixture in mixtures]


def recall(results: Mapping[str, Measures]) -> float:
    """Return the mean R@10 of both directions."""
    return sum(results["retrieval"][name] for name in RECALLS) / len(RECALLS)


def shares(rows: Sequence[Mapping[str, Measures]]) -> list[tuple[float, float]]:
    """Return (gain kept, loss avoided) of each mixture of a line, in percent."""
    top1 = [row["zero_shot"]["top1"] for row in rows]
    recalls = [recall(row) for row in rows]
    gain, loss = top1[-1] - top1[0], recalls[0] - recalls[-1]
    if not gain or not loss:
        raise SystemExit("the fine-tuning gained or lost nothing: there is nothing to keep")
    return [
        (100 * (value - top1[0]) / gain, 100 * (own - recalls[-1]) / loss)
        for value, own in zip(top1, recalls, strict=True)
    ]


def table(alphas: Sequence[float], runs: Sequence[Sequence[Mapping[str, Measures]]]) -> Table:
    """Make the table over alpha."""
    heads = ["alpha", "zero-shot top-1 %", "text to image R@10 %", "image to text R@10 %",
             "gain kept %", "loss avoided %"]  # fmt: skip
    kept = [shares(run) for run in runs]
    rows = []
    for number, alpha in enumerate(alphas):
        own = [run[number] for run in runs]
        cells = [spread([100 * row["zero_shot"]["top1"] for row in own])]
        cells += [spread([100 * row["retrieval"][name] for row in own]) for name in RECALLS]
        cells += [spread([of_run[number][side] for of_run in kept]) for side in (0, 1)]
        rows.append([f"{alpha:g}", *cells])
    return Table(f"Mixtures, {len(runs)} seeds", heads, rows)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with captions_* and classes_val"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tuning runs")
    parser.add_argument("--samples", type=int, default=30_000, help="training samples before")
    parser.add_argument("--rate", default="3e-3", help="base_lr of the training before")
    parser.add_argument("--tuning", type=int, default=6_000, help="samples of the fine-tuning")
    parser.add_argument("--tuning-rate", default="3e-3", help="base_lr of the fine-tuning")
    parser.add_argument("--block", type=int, default=64, help="photos per step")
    parser.add_argument("--alphas", type=parse_alphas, default="0:1:.1", help="as of xray merge")
    parser.add_argument("--out", type=Path, help="also write all results to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Train, fine-tune, evaluate the lines, and print the table."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    dist.setup_environment()
    began = time.process_time()
    sizes: dict[str, Any] = {"vocab_size": 2048, "width": 128, "depth": 2, "heads": 4}
    llm = LlmConfig(str(options.work / "llm"), "captions_train", family="clip", **sizes)
    make_llm(llm, str(options.data))
    own = f"optim.base_lr={options.rate}", "clip.captions=2"
    base = train(options, "base", "captions_train", options.samples, *own)
    runs = []
    for seed in range(options.seeds):
        rate = f"optim.base_lr={options.tuning_rate}"
        own = rate, f"seed={seed}", "clip.heads=parent"
        shards = "classes_val/probe_train"
        tuned = train(
            options, f"tuned-{seed}", shards, options.tuning, *own, init_from=[base]
        )  # fmt: skip
        runs.append(evaluated(options, seed, [base, tuned]))
        print(f"seed {seed}: {time.process_time() - began:.0f} s of CPU", flush=True)
    shown = table(options.alphas, runs)
    print(f"{shown}\n\n{hardware('cpu')}", flush=True)
    if options.out:
        names = ("samples", "rate", "tuning", "tuning_rate", "block", "alphas")
        facts = {"hardware": hardware("cpu"), "settings": {n: getattr(options, n) for n in names}}
        facts["shares"] = [shares(run) for run in runs]
        content = json.dumps({**facts, "table": shown.rows, "runs": runs}, indent=1)
        options.out.write_text(content + "\n", "utf-8")


if __name__ == "__main__":
    main()
