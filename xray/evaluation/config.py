"""What an evaluation's config says: the sets of each suite, and how they are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import field as dataclass_field
from typing import Literal

from data_pipelines.tags.reader import Origin
from xray.errors import ConfigError
from xray.evaluation.corruptions import CORRUPTIONS

# What the artifact of a stage can be asked for.
PROBES = ("knn", "linear_probe", "attentive_probe", "finetune", "robustness")
SUITES_OF = {
    "mae": PROBES,
    "hashtag": (*PROBES, "tags"),
    "text": ("captions",),
    "clip": ("zero_shot", "retrieval", "video_retrieval", *PROBES),
}
HEADS = ("zero_shot", "linear_probe")  # whose data robustness changes
PLACES = ("shards", "classes", "train", "test", "shift")  # keys that name a set
WAYS = ("text_to_image", "image_to_text")  # of retrieval
SUITES = ("zero_shot", "retrieval", "video_retrieval", "captions", *PROBES, "tags")

# Wherever a set is named: shards (a folder, glob, {000..123} pattern or URL), a folder of folders
# named after classes, or a .csv with the columns path and label or caption.


@dataclass
class ViewsConfig:
    """Looks at a clip, whose features are averaged: evenly spaced times x squares."""

    clips: int = 1
    crops: int = 1  # 1 in the centre, or 3: left, centre, right

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError("eval.views.clips must be at least 1, and eval.views.crops 1 or 3")


@dataclass
class CaptionedConfig:
    """Pictures or clips with captions; for suite captions also texts alone."""

    shards: str = ""
    modality: Literal["image", "video", "text"] = "image"
    captions: dict[str, float] = field(default_factory=dict)  # json fields, if not the usual


@dataclass
class RetrievalConfig(CaptionedConfig):
    """Captions by pictures or clips, and these by captions."""

    # what is right for a caption: its own sample, or all that have the same caption
    same: Literal["sample", "caption"] = "sample"


@dataclass
class ZeroShotConfig:
    """Labelled samples and class names, one per line; "" = those that the samples come with."""

    shards: str = ""
    classes: str = ""
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}"])
    modality: Literal["image", "video"] = "image"

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if not self.templates or not all("{}" in template for template in self.templates):
            raise ConfigError("eval.zero_shot.templates: each needs {} where the class name goes")


@dataclass
class LabelledConfig:
    """Labelled samples to learn from, and to classify; a probe without takes those of eval.knn."""

    train: str = ""
    test: str = ""
    modality: Literal["image", "video"] = "image"


@dataclass
class KnnConfig(LabelledConfig):
    """The nearest neighbours' vote."""

    k: int = 20
    temperature: float = 0.07

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.k < 1 or self.temperature <= 0:
            raise ConfigError("eval.knn: k must be at least 1, and temperature above 0")


@dataclass
class LinearProbeConfig(LabelledConfig):
    """A linear layer on frozen features."""

    solver: Literal["lbfgs", "sgd", "mae"] = "lbfgs"


@dataclass
class AttentiveProbeConfig(LabelledConfig):
    """One query that attends to frozen patch tokens (V-JEPA's settings)."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.epochs < 1 or self.batch_size < 1:
            raise ConfigError("eval.attentive_probe: epochs and batch_size must be at least 1")


@dataclass
class FinetuneConfig(LabelledConfig):
    """The whole backbone on labels: MAE's recipe for a ViT-B, in smaller batches and half the
    epochs, at half its peak lr."""

    epochs: int = 50
    batch_size: int = 32
    base_lr: float = 8e-3  # x batch_size / 256
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    warmup: float = 0.1  # share of the steps
    drop_path: float = 0.1
    smoothing: float = 0.1  # of labels
    crop_scale: list[float] = field(default_factory=lambda: [0.35, 1.0])
    flip: bool = True
    rand_augment: list[int] = field(default_factory=lambda: [0, 9])  # operations, magnitude of 30
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.epochs < 1 or self.batch_size < 2:
            raise ConfigError("eval.finetune: epochs must be at least 1 and batch_size at least 2")
        if len(self.crop_scale) != 2 or not 0 < min(self.crop_scale) <= max(self.crop_scale) <= 1:
            raise ConfigError("eval.finetune.crop_scale must be [smallest, largest] in (0, 1]")
        if len(self.rand_augment) != 2 or min(self.rand_augment) < 0:
            raise ConfigError("eval.finetune.rand_augment must be [operations, magnitude]")


@dataclass
class TaggingConfig:
    """Samples with tags, and how often each is looked at."""

    shards: str = ""
    modality: Literal["image", "video"] = "image"
    tags: Origin = "hashtags"  # where they are found
    field: str = "hashtags"  # their json field
    captions: dict[str, float] = dataclass_field(default_factory=dict)  # or those of their captions
    clips: int = 1  # times at which a clip is looked at
    crops: int = 1  # squares of a picture or frame: 1 or 3

    def validate(self, key: str) -> None:
        """Raises ConfigError naming the key to change."""
        if not self.shards:
            raise ConfigError(f"{key}.shards is not set")
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError(f"{key}.clips must be at least 1, and {key}.crops 1 or 3")


@dataclass
class RobustnessConfig:
    """Changes of the labelled samples of eval.zero_shot, and of the linear probe's."""

    corruptions: list[str] = field(default_factory=lambda: list(CORRUPTIONS))
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    resolutions: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.5])  # x the artifact's
    aspects: list[float] = field(default_factory=lambda: [0.5, 2.0])  # width stretched, x height
    attacks: list[str] = field(default_factory=lambda: ["fgsm", "pgd", "square"])
    eps: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # of 255, L-infinity
    steps: int = 5  # of pgd
    queries: int = 100  # of the black box
    attacked: int = 200  # samples, evenly spaced over the set
    shift: str = ""  # labelled samples of the same classes from elsewhere
    seed: int = 0

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        for given, known, key in (
            (self.corruptions, CORRUPTIONS, "corruptions"),
            (self.attacks, ATTACKS, "attacks"),
        ):
            for name in given:
                if name not in known:
                    raise ConfigError(
                        f"eval.robustness.{key} names {name!r}: there are {', '.join(known)}"
                    )
        if not self.severities or any(s not in (1, 2, 3, 4, 5) for s in self.severities):
            raise ConfigError(f"eval.robustness.severities={self.severities} must be of 1 to 5")
        if any(value <= 0 for value in (*self.resolutions, *self.aspects, *self.eps)):
            raise ConfigError("eval.robustness: resolutions, aspects and eps must be above 0")
        if min(self.steps, self.queries, self.attacked) < 1:
            raise ConfigError("eval.robustness: steps, queries and attacked must be at least 1")


ATTACKS = ("fgsm", "pgd", "square")


@dataclass
class EvalConfig:
    """The sets of each suite; a suite without is left out, but for those asked for by name."""

    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    video_retrieval: RetrievalConfig = field(
        default_factory=lambda: RetrievalConfig(modality="video", same="caption")
    )
    # captions by captions: of a text artifact, after it was tuned and before
    captions: CaptionedConfig = field(default_factory=CaptionedConfig)
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    linear_probe: LinearProbeConfig = field(default_factory=LinearProbeConfig)
    attentive_probe: AttentiveProbeConfig = field(default_factory=AttentiveProbeConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    tags: dict[str, TaggingConfig] = field(default_factory=dict)  # sets by name
    views: ViewsConfig = field(default_factory=ViewsConfig)
    batch_size: int = 64

    def validate(self) -> None:
        """Check all suites; raises ConfigError naming the key to change."""
        if self.batch_size < 1:
            raise ConfigError(f"eval.batch_size={self.batch_size} must be at least 1")
        for part in (self.views, self.zero_shot, self.knn, self.attentive_probe, self.finetune,
                     self.robustness):  # fmt: skip
            part.validate()
        for name in PROBES[:4]:
            own: LabelledConfig = getattr(self, name)
            if bool(own.train) != bool(own.test):
                there, lacks = ("train", "test") if own.train else ("test", "train")
                raise ConfigError(f"eval.{name}.{there} is set: set eval.{name}.{lacks}, too")
        for name, tagging in self.tags.items():
            tagging.validate(f"eval.tags.{name}")

    def configured(self) -> list[str]:
        """The suites that have data of their own."""
        given = {
            "zero_shot": self.zero_shot.shards,
            "retrieval": self.retrieval.shards,
            "video_retrieval": self.video_retrieval.shards,
            "captions": self.captions.shards,
            "tags": self.tags,
        }
        for name in ("knn", "linear_probe", "attentive_probe", "finetune"):
            own: LabelledConfig = getattr(self, name)
            given[name] = own.train and own.test
        return [name for name in SUITES if given.get(name)]

    def possible(self, stage: str) -> list[str]:
        """The suites that have data of their own and can be asked of a stage's artifact."""
        return [name for name in self.configured() if name in SUITES_OF[stage]]

    def in_recipe(self, stages: Sequence[str]) -> dict[str, list[str]]:
        """What the artifact of each of a recipe's stages is asked at its end: the last one of
        pictures everything, those before for their own, captions and tags."""
        last = [stage for stage in stages if stage != "text"][-1:]
        own = ("captions", "tags")
        return {
            stage: [name for name in self.possible(stage) if stage in last or name in own]
            for stage in stages
        }

    def sets(self, suites: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(key, pattern) of every set that these suites read."""
        read = dict.fromkeys(suites)
        if "robustness" in read:
            read |= dict.fromkeys(name for name in HEADS if name in self.configured())
        for name in read:
            own = getattr(self, name)
            parts = {f"tags.{k}": v for k, v in own.items()} if name == "tags" else {name: own}
            for suite, part in parts.items():
                given = {key: vars(part).get(key) for key in PLACES}
                yield from ((f"{suite}.{key}", place) for key, place in given.items() if place)

    def filled(self) -> EvalConfig:
        """The same, with the sets of kNN for every probe that has none of its own."""
        own = {name: getattr(self, name) for name in PROBES[1:4]}
        sets = {"train": self.knn.train, "test": self.knn.test, "modality": self.knn.modality}
        lent = {name: replace(c, **sets) for name, c in own.items() if not (c.train or c.test)}
        return replace(self, **lent)
