"""Effects of balancing, loss truncation and a teacher's tags in the hashtag stage, on real photos.

The tags of a photo are the words of its captions that occur in many photos. A small ViT is
trained from scratch on each variant of the data, with several seeds, and evaluated on the tags of
the validation photos. Prints a table per experiment: the mean over seeds ± half the range between
the seeds.

noise    a share of all tags is replaced by random tags, drawn by frequency: without a remedy, with
         loss truncation, with the teacher's filter (the run without remedy is the teacher), and
         with both
semi     a tenth of the photos keep their tags: these photos alone, and together with as many others
         per step that have the teacher's tags
balance  none, sqrt, uniform; and sqrt with all tags of a repeated photo instead of the rarer ones

    python -m tools.experiments.hashtag_experiments --data DATA \
        [--experiments noise semi balance] [--seeds 2]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from data_pipelines.shards.source import open_source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.reader import TagReader, TagRules
from data_pipelines.tags.vocabulary import build_vocabulary, count_tags
from stages import stage_class
from tools.common.tables import spread
from tools.common.timing import hardware
from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import Tagger, data_of
from xray.config import DataConfig
from xray.config import loading as cfg
from xray.evaluation.suites.tagging import TaggingConfig
from xray.evaluation.tagging import ProbabilitiesOf, tagging
from xray.precompute.config import PseudoTagsConfig
from xray.precompute.pseudo_tags import write_pseudo_tags

MEASURES = ("precision@1", "recall@5", "mAP")
NOISES = (0.2, 0.4)
TRUNCATE = ("hashtag.truncate=0.15",)
FILTER = ("hashtag.min_lift=1.0", "hashtag.pseudo_weight=0")
# (number of a photo, its tags) -> new tags, or None to leave the photo out
TagChange = Callable[[int, list[str]], list[str] | None]


class Bench:
    """Photos, their vocabulary, and training runs on variants of their tags."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        root = str(options.data)
        self.photos = open_source("photos", "captions_train", "image", root)
        self.held_out = open_source("held_out", "captions_val", "image", root)
        rules = TagRules(min_count=options.min_count, plurals=True)
        counts = count_tags(self.photos, "caption_words", rules)
        self.vocabulary, _ = build_vocabulary(counts, rules, "captions_train")
        self.vocabulary.save(work / "vocabulary.json")
        self.device = dist.choose_device("auto")

    def photos_with(self, name: str, change: TagChange) -> Path:
        """Write the training photos with changed tags as shards."""
        folder = self.work / name
        folder.mkdir()
        reader, number = TagReader("", {}), 0
        for shard in range(len(self.photos.manifest)):
            with wds.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as writer:
                for member in self.photos.members(shard).tolist():
                    files = self.photos.read(shard, member)
                    text = {ending: files[ending] for ending in TEXT_FILES if ending in files}
                    numbers = self.vocabulary.encode(reader.tags_of(text, "caption_words"))
                    tags = change(number, [self.vocabulary.tags[tag] for tag in numbers])
                    number += 1
                    if tags is None:
                        continue
                    content = json.dumps({"hashtags": tags}).encode()
                    key = self.photos.index(shard).key(member)
                    writer.write({"__key__": key, "jpg": files["jpg"], "json": content})
        return folder

    def train(self, shards: Path, name: str, seed: int, *overrides: str) -> Artifact:
        """Run the hashtag stage from scratch."""
        from xray.training.deepspeed_setup import init_distributed
        from xray.training.trainer import train_stage

        shared = cfg.parse_overrides(
            [
                f"out={self.work / name}-{seed}", f"seed={seed}", "model=vit_xs8",
                f"data.resolution={self.options.resolution}", "data.workers=1",
                "data.crop_scale=[0.5,1.0]", f"data.sources.photos.shards={shards}",
                "data.blocks=[{source: photos, samples: 128}]", "data.modalities=[image]",
                f"train.samples={self.options.samples}", "train.precision=fp32",
                "train.save_every=0", "optim.base_lr=1e-3", "hashtag.balance=none",
                f"hashtag.vocabulary={self.work / 'vocabulary.json'}",
            ]
        )  # fmt: skip
        stage = stage_class("hashtag")
        config = cfg.load_config(stage.Config, "hashtag", shared, cfg.parse_overrides(overrides))
        config.validate()
        init_distributed(self.device)
        return train_stage(stage, config, self.device)

    def measure(self, artifact: Artifact) -> dict[str, float]:
        """Evaluate an artifact on the validation photos and the words of their captions."""
        tagger = Tagger(artifact).to(self.device)
        data, config = data_of(artifact, 1), TaggingConfig("", "image", "caption_words")
        samples = ProbabilitiesOf(self.held_out, data, 128)
        batches = samples.encode(tagger, range(len(samples)))
        return tagging(self.held_out, batches, self.vocabulary, config, data.workers)

    def teach(self, artifact: Artifact, shards: Path) -> str:
        """Write an artifact's predicted tags beside the shards; return the option to use them."""
        source = open_source("photos", str(shards), "image")
        config = PseudoTagsConfig(top=8, threshold=0.03, workers=1)
        tagger = Tagger(artifact).to(self.device)
        data: DataConfig = data_of(artifact, 1)
        result = write_pseudo_tags(source, tagger, self.vocabulary, config, data, artifact.digest)
        print(
            f"the teacher tags {result.added:,} of {result.untagged:,} untagged photos", flush=True
        )
        return f"hashtag.teacher={result.name}"


def noise(bench: Bench, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Run the experiment `noise`; yield (variant, metrics)."""
    rng = np.random.default_rng(seed)
    counts = np.array(bench.vocabulary.counts, float)

    def random_tags(share: float) -> TagChange:
        def change(_: int, tags: list[str]) -> list[str]:
            drawn = rng.choice(len(counts), len(tags), p=counts / counts.sum())
            wrong = rng.random(len(tags)) < share
            changed = [
                bench.vocabulary.tags[other] if replace else tag
                for tag, other, replace in zip(tags, drawn.tolist(), wrong.tolist(), strict=True)
            ]
            return list(dict.fromkeys(changed))

        return change

    clean = bench.photos_with(f"clean-{seed}", lambda _, tags: tags)
    yield "no noise", bench.measure(bench.train(clean, "clean", seed))
    for share in NOISES:
        name = f"{share:.0%} of the tags random"
        shards = bench.photos_with(f"noise{share}-{seed}", random_tags(share))
        plain = bench.train(shards, f"noise{share}", seed)
        yield name, bench.measure(plain)
        teacher = bench.teach(plain, shards)
        for remedy, options in (
            ("truncation", TRUNCATE),
            ("filter", (teacher, *FILTER)),
            ("truncation and filter", (*TRUNCATE, teacher, *FILTER)),
        ):
            run = f"noise{share}-{remedy.replace(' ', '_')}"
            yield f"{name}, {remedy}", bench.measure(bench.train(shards, run, seed, *options))


def semi(bench: Bench, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Run the experiment `semi`; yield (variant, metrics)."""
    rng = np.random.default_rng(seed)
    tagged = rng.random(len(bench.photos)) < 0.1
    shards = bench.photos_with(f"tenth-{seed}", lambda n, tags: tags if tagged[n] else None)
    others = bench.photos_with(f"others-{seed}", lambda n, _: None if tagged[n] else [])
    alone = bench.train(shards, "tenth", seed)
    yield "10 % tagged, alone", bench.measure(alone)
    teacher = bench.teach(alone, shards)
    assert bench.teach(alone, others) == teacher
    for weight in (0.5, 1.0):
        options = (
            f"data.sources.others={{shards: {others}, modality: image}}",
            "data.blocks=[{source: photos, samples: 64}, {source: others, samples: 64}]",
            teacher,
            f"hashtag.pseudo_weight={weight}",
        )
        artifact = bench.train(shards, f"tenth-taught{weight}", seed, *options)
        yield f"10 % tagged, 90 % by the teacher at {weight:g}", bench.measure(artifact)
    all_tags = bench.photos_with(f"all-{seed}", lambda _, tags: tags)
    yield "100 % tagged", bench.measure(bench.train(all_tags, "all", seed))


def balance(bench: Bench, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Run the experiment `balance`; yield (variant, metrics)."""
    shards = bench.photos_with(f"balance-{seed}", lambda _, tags: tags)
    for name, options in (
        ("none", ()),
        ("sqrt", ("hashtag.balance=sqrt",)),
        ("uniform", ("hashtag.balance=uniform",)),
        ("sqrt, all tags with each copy", ("hashtag.balance=sqrt", "hashtag.strip=false")),
    ):
        options = (*options, "hashtag.epoch_length=3")
        artifact = bench.train(shards, f"balance-{name.replace(' ', '_')}", seed, *options)
        yield name, bench.measure(artifact)


EXPERIMENTS = {"noise": noise, "semi": semi, "balance": balance}


def table(title: str, rows: dict[str, list[dict[str, float]]]) -> str:
    """Format a Markdown table of means over seeds ± half the range between them, in percent."""
    first = next(iter(rows.values()))[0]
    by_frequency = [name for name in first if name.startswith("mAP[")]
    measures = [*MEASURES, *by_frequency]
    lines = [f"({title})", "", f"| | {' | '.join(measures)} |", f"|---|{'---:|' * len(measures)}"]
    for name, runs in rows.items():
        cells = [spread([100 * run[measure] for run in runs]) for measure in measures]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chances = [
        100 * first[f"{'random' if m.startswith('mAP') else 'chance'}_{m}"] for m in measures
    ]
    lines.append(f"| *chance* | {' | '.join(f'{value:.1f}' for value in chances)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the experiments and print their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with captions_train and captions_val"
    )
    parser.add_argument("--experiments", nargs="+", default=list(EXPERIMENTS), choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds")
    parser.add_argument("--samples", type=int, default=24_000, help="training samples per run")
    parser.add_argument("--resolution", type=int, default=32, help="side of the photos in pixels")
    parser.add_argument(
        "--min-count", type=int, default=200, help="minimum number of photos with a tag"
    )
    parser.add_argument("--out", type=Path, help="also write all metrics to this JSON file")
    options = parser.parse_args()
    dist.setup_environment()
    results: dict[str, Any] = {}
    print(
        f"{hardware('cuda' if torch.cuda.is_available() else 'cpu')}; {options.samples:,} samples "
        f"per run at {options.resolution} px, {options.seeds} seeds"
    )
    for name in options.experiments:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                for variant, metrics in EXPERIMENTS[name](Bench(options, Path(folder)), seed):
                    rows.setdefault(variant, []).append(metrics)
                    values = ", ".join(f"{m} {100 * metrics[m]:.1f}" for m in MEASURES)
                    print(f"{name}, seed {seed}, {variant}: {values}", flush=True)
        results[name] = rows
        print(f"\n{table(name, rows)}\n", flush=True)
        if options.out:
            options.out.write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
