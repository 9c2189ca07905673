"""An evaluation suite from a config: which sets, which names, and the table of results."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from data_pipelines.shards import Modality
from data_pipelines.sources import Source, open_source
from data_pipelines.vocabulary import Vocabulary
from xray.config import DataConfig
from xray.errors import ArtifactError, ConfigError, DataError
from xray.evaluation.features import extract, read_all_captions
from xray.evaluation.knn import knn
from xray.evaluation.retrieval import caption_retrieval, retrieval
from xray.evaluation.tag_suite import TaggingConfig, tagging
from xray.evaluation.zero_shot import zero_shot
from xray.report import ResultTable
from xray.restore import Encoder, Tagger, TextEncoder, VisionEncoder, class_weights

# What the artifact of a stage can be asked for.
SUITES_OF = {
    "mae": ("knn",),
    "hashtag": ("knn", "tags"),
    "text": ("captions",),
    "clip": ("zero_shot", "retrieval", "video_retrieval", "knn"),
}
SUITES = ("zero_shot", "retrieval", "video_retrieval", "captions", "knn", "tags")
WAYS = ("text_to_image", "image_to_text")  # of retrieval


@dataclass
class RetrievalConfig:
    """Pictures or clips with captions; for suite captions also texts alone."""

    shards: str = ""
    modality: Literal["image", "video", "text"] = "image"
    captions: dict[str, float] = field(default_factory=dict)  # json fields, if not the usual


@dataclass
class ZeroShotConfig:
    """Labelled samples and class names, one per line."""

    shards: str = ""
    classes: str = ""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    modality: Literal["image", "video"] = "image"


@dataclass
class KnnConfig:
    """Labelled samples to vote, and to classify."""

    train: str = ""
    test: str = ""
    k: int = 20
    temperature: float = 0.07
    modality: Literal["image", "video"] = "image"


@dataclass
class EvalConfig:
    """The sets of each suite; a suite without shards is left out."""

    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    video_retrieval: RetrievalConfig = field(
        default_factory=lambda: RetrievalConfig(modality="video")
    )
    # captions by captions: of a text artifact, after it was tuned and before
    captions: RetrievalConfig = field(default_factory=RetrievalConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    tags: dict[str, TaggingConfig] = field(default_factory=dict)  # sets by name
    batch_size: int = 64

    def configured(self) -> list[str]:
        """The suites that have data."""
        given = {
            "zero_shot": self.zero_shot.shards,
            "retrieval": self.retrieval.shards,
            "video_retrieval": self.video_retrieval.shards,
            "captions": self.captions.shards,
            "knn": self.knn.train and self.knn.test,
            "tags": self.tags,
        }
        return [name for name in SUITES if given[name]]

    def possible(self, stage: str) -> list[str]:
        """The suites that have data and can be asked of a stage's artifact."""
        return [name for name in self.configured() if name in SUITES_OF[stage]]


class Suite:
    """Runs suites on one encoder."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        self.encoder = encoder
        self.config = config
        section = encoder.artifact.manifest["config"]["data"]
        names = {item.name for item in dataclasses.fields(DataConfig)}
        plain = {k: v for k, v in section.items() if k in names and k not in ("sources", "blocks")}
        self.data = dataclasses.replace(
            DataConfig(**{**plain, "validation": []}), root=root, workers=workers
        )

    def run(self, names: list[str]) -> dict[str, dict[str, float]]:
        """The results of each named suite; raises ConfigError for one that has no data."""
        results = {}
        for name in names:
            if name not in self.config.configured():
                raise ConfigError(f"suite {name} has no data: set eval.{name}'s shards")
            results[name] = getattr(self, f"_{name}")()
        return results

    def _open(self, name: str, pattern: str, modality: Modality) -> Source:
        return open_source(f"eval.{name}", pattern, modality, self.data.root)

    def asked(self) -> list[str]:
        """The suites that have data and fit the artifact; raises ConfigError for none."""
        stage = self.encoder.artifact.stage
        given, able = self.config.configured(), SUITES_OF[stage]
        has = (
            f"the data are for {', '.join(given)}" if given else "there are no data: give --recipe"
        )
        if not self.config.possible(stage):
            raise ConfigError(f"{self._what}: it can be asked for {', '.join(able)}; {has}")
        return self.config.possible(stage)

    @property
    def _joint(self) -> Encoder:
        if not isinstance(self.encoder, Encoder):
            raise ArtifactError(f"{self._what}: only a clip artifact compares pictures with text")
        return self.encoder

    @property
    def _vision(self) -> VisionEncoder:
        if not isinstance(self.encoder, VisionEncoder):
            raise ArtifactError(f"{self._what}: it has no backbone")
        return self.encoder

    @property
    def _what(self) -> str:
        return f"{self.encoder.artifact.path} is of stage {self.encoder.artifact.stage}"

    def _extract(self, source: Source, joint: bool) -> Any:
        encode = self._joint.encode_pixels if joint else self._vision.features
        return extract(source, encode, self.data, self.config.batch_size)

    def _zero_shot(self) -> dict[str, float]:
        config = self.config.zero_shot
        path = Path(self.data.root) / config.classes
        if not config.classes or not path.is_file():
            raise ConfigError(f"eval.zero_shot.classes={path}: no such file of class names")
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if len(names) < 2:
            raise ConfigError(f"{path} names {len(names)} class: zero-shot needs at least two")
        found = self._extract(self._open("zero_shot", config.shards, config.modality), joint=True)
        weights = class_weights(self._joint.encode_text, names, config.templates)
        return zero_shot(found.rows, found.labels, weights)

    def _retrieval(self) -> dict[str, float]:
        return self._across("retrieval", self.config.retrieval)

    def _video_retrieval(self) -> dict[str, float]:
        return self._across("video_retrieval", self.config.video_retrieval)

    def _across(self, name: str, config: RetrievalConfig) -> dict[str, float]:
        source = self._open(name, config.shards, config.modality)
        found = self._extract(source, joint=True)
        texts, owner = _texts(read_all_captions(source, config.captions), name)
        rows = self._joint.encode_text(texts)
        result = retrieval(found.rows, rows, owner)
        for size in self._joint.matryoshka:
            images, captions = (F.normalize(x[:, :size], dim=-1) for x in (found.rows, rows))
            part = retrieval(images, captions, owner)
            recalls = {k: v for k, v in part.items() if k.startswith(WAYS)}
            result |= {f"{name}/{size}": value for name, value in recalls.items()}
        return result

    def _captions(self) -> dict[str, float]:
        """Of the tuned model, and of its base as `before`."""
        if not isinstance(self.encoder, TextEncoder):
            raise ArtifactError(f"{self._what}: captions are compared by a text artifact")
        config = self.config.captions
        source = self._open("captions", config.shards, config.modality)
        captions = read_all_captions(source, config.captions)
        texts, owner = _texts([own for own in captions if own], "captions")
        found = caption_retrieval(self.encoder.encode_text(texts), owner)
        base = TextEncoder.before(self.encoder.artifact)
        if base is not None:
            base.to(next(self.encoder.parameters()).device)
            found["before_top1"] = caption_retrieval(base.encode_text(texts), owner)["top1"]
        return found

    def _knn(self) -> dict[str, float]:
        config = self.config.knn
        train = self._extract(self._open("knn", config.train, config.modality), joint=False)
        test = self._extract(self._open("knn", config.test, config.modality), joint=False)
        return knn(train.rows, train.labels, test.rows, test.labels, config.k, config.temperature)

    def _tags(self) -> dict[str, float]:
        if not isinstance(self.encoder, Tagger):
            raise ArtifactError(f"{self._what}: only a hashtag artifact has tags")
        vocabulary = Vocabulary.load(self.encoder.artifact.file("vocabulary.json"))
        found: dict[str, float] = {}
        for name, config in self.config.tags.items():
            config.validate(f"eval.tags.{name}")
            source = self._open(f"tags.{name}", config.shards, config.modality)
            run = (vocabulary, config, self.data, self.config.batch_size)
            measures, _ = tagging(source, self.encoder.probabilities, *run)
            found |= {f"{name}/{measure}": value for measure, value in measures.items()}
        return found


def _texts(captions: list[list[str]], suite: str) -> tuple[list[str], torch.Tensor]:
    """All captions in a row, and whose each is; raises DataError where a sample has none."""
    empty = sum(not own for own in captions)
    if empty:
        raise DataError(f"eval.{suite}.shards: {empty} samples have no caption")
    owner = [number for number, own in enumerate(captions) for _ in own]
    return [caption for own in captions for caption in own], torch.tensor(owner)


def result_table(results: dict[str, dict[str, float]]) -> ResultTable:
    """Each measure beside chance, in percent."""
    table = ResultTable("Results", ("measure", "result %", "chance %", "over"))

    def row(name: str, value: float, chance: float, over: str) -> None:
        table.rows.append((name, f"{100 * value:.1f}", f"{100 * chance:.2f}", over))

    if "zero_shot" in results:
        r = results["zero_shot"]
        over = f"{r['samples']:.0f} samples, {r['classes']:.0f} classes"
        for k in ("top1", "top5"):
            row(f"zero-shot {k}", r[k], r[f"chance_{k}"], over)
    for suite, medium in (("retrieval", "image"), ("video_retrieval", "clip")):
        r = results.get(suite, {})
        prefixes = dict.fromkeys(name.partition("/")[2] for name in r if name.startswith(WAYS))
        for prefix, way, rank in product(prefixes, WAYS, (1, 5, 10)):
            what = "pictures" if medium == "image" else "clips"
            over = f"{r['images']:.0f} {what}, {r['texts']:.0f} captions"
            name = f"{way}_R@{rank}"
            title = name.replace("image", medium).replace("_", " ")
            whose = f", first {prefix} features" if prefix else ""
            value = r[f"{name}/{prefix}" if prefix else name]
            row(title + whose, value, r[f"chance_{name}"], over)
    if "captions" in results:
        r = results["captions"]
        over = f"{r['captions']:.0f} captions"
        if "before_top1" in r:
            row("caption to caption top1, before tuning", r["before_top1"], r["chance_top1"], over)
        row("caption to caption top1", r["top1"], r["chance_top1"], over)
    if "knn" in results:
        r = results["knn"]
        row("kNN top1", r["top1"], r["chance_top1"], f"{r['samples']:.0f} samples")
    for name in dict.fromkeys(key.split("/")[0] for key in results.get("tags", {})):
        r = {k.split("/")[1]: v for k, v in results["tags"].items() if k.startswith(f"{name}/")}
        both = r["samples"] + r["untagged"]
        over = f"{r['samples']:.0f} of {both:.0f} samples, {r['tags']:.0f} tags"
        row(f"{name} precision@1", r["precision@1"], r["chance_precision@1"], over)
        row(f"{name} recall@5", r["recall@5"], r["chance_recall@5"], over)
        for measure in [m for m in r if m == "mAP" or m.startswith("mAP[")]:
            tags = f"{r[measure.replace('mAP', 'mAP_tags')]:.0f} tags"
            row(f"{name} {measure}", r[measure], r[f"random_{measure}"], tags)
        least = r["least_dead@10"] / r["vocabulary"]
        row(f"{name} dead tags", r["dead_share@10"], least, f"{r['vocabulary']:.0f} tags")
        row(f"{name} calibration error", r["ece"], 0.0, over)
    return table
