"""Effects of a pretrained sentence encoder, an adapter and stored vectors in the clip stage.

The clip stage is trained on photos with five captions each and evaluated by retrieval on other
photos. All variants have equal steps and photos and start from the same image tower (--tower, the
artifact of an earlier stage, such as real_small's hashtag run). Prints a table: the mean over seeds
± half the range between them.

a  a small version of CLIP's text transformer, from random weights
b  a small LLM, tuned on the captions by the text stage, then frozen, with an adapter
c  a frozen sentence encoder with an adapter
d  like e, without the adapter
e  like c, with sentence vectors that were stored in bfloat16 before

Variants a and e are tried with each of --rates and the first seed; b, c and d use the best rate of
e. The text stage of b runs once for all seeds. A second call with the same --work continues where
the first one stopped.

    python -m tools.experiments.clip_experiments --data DATA --sentences FOLDER --tower \
        ARTIFACT --work DIR
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.shards.source import open_source
from stages import stage_class
from tools.common.tables import spread
from tools.common.timing import hardware
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import Encoder, data_of
from xray.artifacts.language_model import Language
from xray.config import loading as cfg
from xray.config.model import LlmConfig
from xray.evaluation.feature_extraction import extract, read_all_captions
from xray.evaluation.retrieval import retrieval
from xray.files import write_text
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features
from xray.recipes.run import make_llm

DIRECTIONS = ("text_to_image", "image_to_text")
RANKS = (1, 5, 10)
LENGTH = "text.max_length=32"
ADAPTER = "clip.adapter_blocks=2"
STORED = "text.features=bf16"
CLASSIC = ("text.tune=full", "text.attention=causal", "text.pooling=last", "text.lora_rank=0")
SETTINGS = (
    "model=vit_xs8", "data.workers=1", "data.modalities=[image]", "data.crop_scale=[0.5,1.0]",
    "train.precision=fp32", "train.save_every=50", "train.keep_checkpoints=1",
)  # fmt: skip
CLIP = (
    LENGTH, "clip.embed_dim=256", "optim.name=adamw", "optim.weight_decay=0.2",
    "optim.betas=[0.9,0.98]", "train.log_every=1",
)  # fmt: skip
TEXT = (
    LENGTH, "text.tune=full", "text.lora_rank=0", "optim.base_lr=1e-3", "optim.weight_decay=0.05",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Text side of a run.

    Attributes:
        llm: "clip" or "qwen3" for a small model with a tokenizer of the captions, "sentences" for
            the folder of --sentences.
        rate_of: letter of the variant whose best learning rate is used.
        options: overrides of the clip stage's settings.
    """

    title: str
    llm: str
    rate_of: str
    options: tuple[str, ...]


VARIANTS = {
    "a": Variant("text transformer from scratch", "clip", "a", (*CLASSIC, "clip.adapter_blocks=0")),
    "b": Variant("LLM tuned on the captions, adapter", "qwen3", "e", (ADAPTER,)),
    "c": Variant("sentence encoder, adapter", "sentences", "e", (ADAPTER,)),
    "d": Variant("stored vectors, no adapter", "sentences", "e", (STORED, "clip.adapter_blocks=0")),
    "e": Variant("stored vectors, adapter", "sentences", "e", (STORED, ADAPTER)),
}


class Bench:
    """Runs and results in a work folder; finished ones are reused."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.root = str(options.data)
        self.held_out = open_source("held_out", "captions_val", "image", self.root)
        self.stored = self.work / "store.json"  # time and number of the stored vectors
        self.tower = open_artifact(options.tower)
        self.device = dist.choose_device("auto")
        self.encoded: dict[str, Tensor] = {}  # sentence vectors by hash of a frozen model's folder

    def clip(self, letter: str, seed: int, rate: float) -> dict[str, float]:
        """Train and evaluate a variant."""
        variant = VARIANTS[letter]
        parents = [self.tower]
        if variant.llm == "qwen3":
            parents.append(self.tuned_llm())
        if STORED in variant.options:
            self.store()
        artifact = self.train(
            "clip", f"{letter}-{rate:g}-{seed}", seed, self.options.samples,
            *CLIP, f"text.llm={self.folder(variant.llm)}", f"optim.base_lr={rate}",
            *variant.options, parents=parents,
        )  # fmt: skip
        return self.measure(artifact)

    def train(
        self, stage: str, name: str, seed: int, samples: int, *overrides: str,
        parents: list[Artifact] | None = None,
    ) -> Artifact:  # fmt: skip
        """Run a stage in the work folder, or open its artifact if it is finished."""
        from xray.training.deepspeed_setup import init_distributed
        from xray.training.trainer import train_stage

        layers = [
            *SETTINGS, f"out={self.work / name}", f"seed={seed}", f"data.root={self.root}",
            f"data.resolution={self.options.resolution}", f"train.samples={samples}",
            "data.sources.photos={shards: captions_train, modality: image}",
            f"data.blocks=[{{source: photos, samples: {self.options.block}}}]", *overrides,
        ]  # fmt: skip
        config = cfg.load_config(stage_class(stage).Config, stage, cfg.parse_overrides(layers))
        config.init_from = [str(parent.path) for parent in parents or []]
        config.validate()
        init_distributed(self.device)
        return train_stage(stage_class(stage), config, self.device)

    def tuned_llm(self) -> Artifact:
        """Run the text stage for variant b."""
        llm = f"text.llm={self.folder('qwen3')}"
        return self.train("text", "text", 0, self.options.text_samples, *TEXT, llm)

    def folder(self, llm: str) -> Path:
        """Return the folder of a variant's text model; build small models on first use."""
        if llm == "sentences":
            return Path(self.options.sentences)
        path = self.work / llm
        sizes: dict[str, Any] = {"vocab_size": 4096, "width": 192, "depth": 2, "heads": 4}
        make_llm(LlmConfig(str(path), "captions_train", family=llm, **sizes), self.root)  # type: ignore[arg-type]
        return path

    def store(self) -> dict[str, float]:
        """Store the sentence vectors as in `xray data text-features`; return time and number."""
        if self.stored.exists():
            return json.loads(self.stored.read_text("utf-8"))
        settings = {"tune": "none", "llm": str(self.folder("sentences")), "max_length": 32}
        config = cfg.build(TextFeaturesConfig, {**settings, "workers": 1})
        config.validate()
        photos = open_source("photos", "captions_train", "image", self.root)
        start = time.perf_counter()
        features = write_text_features(photos, Language(config), config, self.device)
        facts = {
            "seconds": time.perf_counter() - start,
            "captions": features.facts["captions_stored"],
        }
        write_text(self.stored, json.dumps(facts))
        return facts

    def measure(self, artifact: Artifact) -> dict[str, float]:
        """Evaluate an artifact; keep the results, with facts of its run, in measures.json."""
        path = artifact.path.parent / "measures.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        encoder = Encoder(artifact).to(self.device)
        metrics = self.retrieve(encoder)
        lines = (artifact.path.parent / "metrics.jsonl").read_text("utf-8").splitlines()
        steps = [json.loads(line) for line in lines]
        times = [step["seconds"] for step in steps]
        metrics["step_seconds"] = median(b - a for a, b in pairwise(times))
        metrics["train_seconds"] = times[-1]
        metrics["trained"] = float(trained(artifact))
        metrics |= {f"end/{name}": value for name, value in final_means(steps).items()}
        write_text(path, json.dumps(metrics, indent=1))
        return metrics

    def retrieve(self, encoder: Encoder) -> dict[str, float]:
        """Compute R@k in both directions and R@1 from a caption to another of the same photo."""
        data = data_of(encoder.artifact, 1)
        images = extract(self.held_out, encoder.encode_pixels, data, 200)
        captions = read_all_captions(self.held_out)
        flat = [caption for of_photo in captions for caption in of_photo]
        owner = torch.tensor([i for i, of_photo in enumerate(captions) for _ in of_photo])
        with torch.no_grad():
            texts = F.normalize(encoder.text_adapter(self.sentences(encoder, flat)), dim=-1)
        nearest = (texts @ texts.t()).fill_diagonal_(-1).argmax(dim=1)
        metrics = retrieval(images.rows, texts.cpu(), owner, RANKS)
        same_photo = (owner[nearest.cpu()] == owner).float().mean().item()
        return {**metrics, "caption_to_caption_R@1": same_photo}

    def sentences(self, encoder: Encoder, captions: list[str]) -> Tensor:
        """Encode captions into sentence vectors; encode them only once for a frozen model."""
        changed = bool(encoder.artifact.manifest["tensors"]["text"])
        name = "" if changed else encoder.artifact.manifest["inputs"]["llm"]
        if name not in self.encoded or changed:
            rows = []
            for start in range(0, len(captions), 250):
                tokens = encoder.tokenizer(captions[start : start + 250])
                rows.append(encoder.text(**{k: v.to(self.device) for k, v in tokens.items()}))
            self.encoded[name] = torch.cat(rows).float()
        return self.encoded[name]


def trained(artifact: Artifact) -> int:
    """Count the parameters that the clip stage trained."""
    tensors = artifact.manifest["tensors"]
    parts = ["backbone", "head"]
    if artifact.manifest["config"]["text"]["tune"] != "none":
        parts.append("text")
    sizes = [torch.Size(t["shape"]).numel() for part in parts for t in tensors[part].values()]
    return sum(sizes)


def final_means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Average some training metrics over the last tenth of the steps."""
    last = steps[-max(1, len(steps) // 10) :]
    names = ("loss", "photos/logit_scale", "photos/top1", "photos/positive_cosine")
    return {name.split("/")[-1]: mean(step[name] for step in last) for name in names}


def score(metrics: dict[str, float]) -> float:
    """Return the mean of all R@k, by which a learning rate is chosen."""
    return mean(metrics[f"{direction}_R@{k}"] for direction in DIRECTIONS for k in RANKS)


def try_rates(bench: Bench, letters: list[str]) -> dict[str, dict[float, float]]:
    """Score each learning rate with the first seed, for the variants that choose a rate."""
    if len(bench.options.rates) == 1:
        return {}
    choosing = sorted({VARIANTS[letter].rate_of for letter in letters})
    scores: dict[str, dict[float, float]] = {letter: {} for letter in choosing}
    for letter in choosing:
        for rate in bench.options.rates:
            scores[letter][rate] = score(bench.clip(letter, 0, rate))
            print(f"{letter} at {rate:g}: mean R@k {100 * scores[letter][rate]:.2f}", flush=True)
    return scores


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Format a Markdown table of means over seeds ± half the range between them, in percent."""
    measures = [f"{direction}_R@{k}" for direction in DIRECTIONS for k in RANKS]
    heads = [measure.replace("_", " ") for measure in measures]
    heads += ["caption to caption R@1", "trained, M", "s per step"]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for letter, runs in rows.items():
        cells = [spread([100 * r[m] for r in runs]) for m in (*measures, "caption_to_caption_R@1")]
        cells.append(f"{runs[0]['trained'] / 1e6:.2f}")
        cells.append(f"{median(run['step_seconds'] for run in runs):.2f}")
        lines.append(f"| {letter}: {VARIANTS[letter].title} | {' | '.join(cells)} |")
    first = next(iter(rows.values()))[0]
    chances = [f"{100 * first[f'chance_{m}']:.1f}" for m in measures]
    return "\n".join([*lines, f"| *chance* | {' | '.join(chances)} | | | |"])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with captions_train and captions_val"
    )
    parser.add_argument("--sentences", required=True, help="folder of a sentence encoder")
    parser.add_argument("--tower", required=True, help="artifact with the backbone vit_xs8")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--samples", type=int, default=7_680, help="training samples per clip run")
    parser.add_argument(
        "--text-samples", type=int, default=7_680, help="training samples of b's text stage"
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 2e-3, 6e-3],
        help="values of base_lr to try",
    )
    parser.add_argument("--block", type=int, default=96, help="photos per step")
    parser.add_argument("--resolution", type=int, default=48, help="side of the photos in pixels")
    parser.add_argument("--out", type=Path, help="also write all results to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Choose learning rates, train and evaluate all variants, and print the table."""
    options = arguments()
    dist.setup_environment()
    machine = hardware("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine}; {options.samples:,} samples per run, {options.seeds} seeds", flush=True)
    bench = Bench(options)
    scores = try_rates(bench, options.variants)
    best = {letter: max(by_rate, key=by_rate.__getitem__) for letter, by_rate in scores.items()}
    rows: dict[str, list[dict[str, float]]] = {letter: [] for letter in options.variants}
    for seed in range(options.seeds):
        for letter in options.variants:
            rate = best.get(VARIANTS[letter].rate_of, options.rates[0])
            metrics = bench.clip(letter, seed, rate)
            rows[letter].append(metrics)
            print(f"{letter}, seed {seed}: mean R@k {100 * score(metrics):.2f}", flush=True)
    print(f"\nbase_lr {best or options.rates}\n\n{table(rows)}\n", flush=True)
    results: dict[str, Any] = {"hardware": machine, "rates": best, "tried": scores, "runs": rows}
    names = ("samples", "text_samples", "block", "resolution", "seeds", "rates")
    results["settings"] = {name: getattr(options, name) for name in names}
    results["tower"] = {name: bench.tower.manifest[name] for name in ("stage", "samples")}
    results["tower"]["digest"] = bench.tower.digest
    if bench.stored.exists():
        results["store"] = bench.store()
        print("stored {captions:,} captions in {seconds:.0f} s".format(**results["store"]))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
