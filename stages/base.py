"""Interface between a stage and the trainer.

Batch keys, all with the micro-batch B first:
    pixels          [B, T, 3, S, S] uint8; T = 1 for images
    mask_noise      [B, h*w or t*h*w] float, uniform noise of the MAE masks, from the loader
    tags            [B, K] long, ids of the vocabulary, padded with -1
    weights         [B, K] float, of the tags: 1 = the sample's own, less for others, 0 = padding
    input_ids       [B, C, L] long, C captions per sample, padded
    attention_mask  [B, C, L] long
    teacher_*       [B, C, L], captions in the tokens of a teacher
    caption_rows    [B] long, the row in the split block that has a sample's captions, if they are
                    ordered by length
    sentences       [B, C, W] float, sentence vectors, if they are stored
    pooled_mask     [B, C, L] long, the tokens that are pooled into the sentence vector
The second pass of the gradient cache adds the first one's features without a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.shards.source import Sample, Source
from stages.feature_guard import FeatureGuard
from xray.artifacts.offers import VISION, slot_of
from xray.config import BlockConfig, RunConfig, TextConfig
from xray.config.run import text_section
from xray.config.schedule import largest, steps_of, value_at
from xray.errors import ConfigError
from xray.models.backbone import Tokens, VisionBackbone
from xray.models.compilation import explained_limit
from xray.models.flops import vision_macs
from xray.models.heads import Normalize
from xray.models.token_reduction import KeepRate, keep_rate_at
from xray.models.weight_loading import load_adapted
from xray.models.weight_loading import part as part  # stages import it from here

if TYPE_CHECKING:
    from xray.artifacts.artifact import Artifact

Batch = dict[str, Tensor]
StateDict = dict[str, Tensor]  # of a module, or a part of it
C = TypeVar("C", bound=RunConfig)
Task = Literal["loss", "features"]


class StepOutput(NamedTuple):
    """A step's loss and the metrics to log."""

    loss: Tensor  # scalar, the mean over the local micro-batch
    metrics: dict[str, Tensor]  # detached scalars


class StageModule(nn.Module, ABC):
    """The module that the engine wraps: all trainable parameters, and the loss.

    `progress` in [0, 1] is the only schedule input; the module knows no rank and no step.
    """

    towers: nn.ModuleDict  # "vision" and/or "text"
    # names of parameters whose rows the engine divides over ranks; their gradients must be complete
    sharded: tuple[str, ...] = ()

    def forward(
        self, batch: Batch, progress: float, task: Task = "loss"
    ) -> StepOutput | dict[str, Tensor]:
        with explained_limit():
            features = self.features(batch, progress)
            return features if task == "features" else self.loss_from_features(features)

    def keep_rate(self, progress: float) -> KeepRate:
        """Return the keep rate at this progress, or one per reducing block; 1 = all tokens."""
        return 1.0

    @abstractmethod
    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute the features that the loss is a function of.

        For a stage that spans the batch: rows of samples [B, ...], and 0-d tensors for parameters
        of the loss, such as the logit scale. Features without a gradient, such as the output of a
        frozen tower, may be in the batch: the gradient cache keeps them for its second pass.
        """

    @abstractmethod
    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        """Compute the loss and its metrics."""


class VisionModule(StageModule):
    """A stage module around the shared backbone."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.model_config = config.model
        self.towers = nn.ModuleDict({"vision": make_backbone(config)})
        self.normalize = Normalize(*config.data.normalisation)

        self.frozen_until = config.optim.vision.frozen_until

    @property
    def vision(self) -> VisionBackbone:
        return self.towers["vision"]  # type: ignore[return-value]

    def encode(
        self,
        pixels: Tensor,
        progress: float,
        visible: Tensor | None = None,
        keep_rate: KeepRate | None = None,
    ) -> Tokens:
        """Encode normalised pixels [B, T, 3, S, S]; without gradient while the backbone is frozen.

        keep_rate: replaces the scheduled keep rate.
        """
        rate = self.keep_rate(progress) if keep_rate is None else keep_rate
        trained = set_training(self.vision, self.training, progress, self.frozen_until)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self.vision(pixels, rate, visible)

    def keep_rate(self, progress: float) -> KeepRate:
        return keep_rate_at(self.model_config, progress)


def set_training(tower: nn.Module, training: bool, progress: float, frozen_until: float) -> bool:
    """Set a tower to train or eval mode, and tell whether it is trained at this progress."""
    trained = is_trained(progress, frozen_until)
    tower.train(training and trained)
    return trained


def is_trained(progress: float, frozen_until: float) -> bool:
    """Tell whether a tower is trained; frozen_until: progress at which that begins, 1 = never."""
    return frozen_until < 1 and progress >= frozen_until


@dataclass
class Parents:
    """Parent artifacts of a run; None means training from scratch."""

    vision: Artifact | None = None
    text: Artifact | None = None


@dataclass(frozen=True)
class Facts:
    """Sizes that a run learns from its data and parents, given to `xray plan` beforehand.

    tags: size of the vocabulary. llm: a folder with a config.json, None if it is not known. text:
    the text section that a parent text artifact brings.
    """

    tags: int = 0
    llm: Path | None = None
    text: TextConfig | None = None


class Stage(ABC, Generic[C]):
    """A learning task: builds the module, turns samples into batches, exports the artifact.

    A subclass sets `name` and `Config` and defines `build`, `transform` and `export`. All else has
    a default, for a stage that trains the backbone on images and clips.
    """

    name: ClassVar[str]
    Config: ClassVar[type[RunConfig]]
    # capabilities (xray.artifacts.offers) of its artifact, and of those it can start from
    offers: ClassVar[frozenset[str]] = frozenset({VISION})
    accepts: ClassVar[frozenset[str]] = frozenset({VISION})
    heads: ClassVar[Mapping[str, str]] = {}  # config section of a head, if not the usual one
    summary: ClassVar[str] = ""  # a sentence for the model card; "" = written from `offers`
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")  # of the sources it can use
    spans_batch: ClassVar[bool] = False  # the loss can compare samples of a whole block

    def __init__(self, config: C) -> None:
        self.config = config
        self.feature_guard = FeatureGuard(config)

    def prepare(self, sources: dict[str, Source], parents: Parents) -> dict[str, Source]:
        """Read data and parents before anything is built; may leave out samples of a source.

        A stage that completes its config, e.g. from its LLM, replaces `self.config`.
        """
        return sources

    def foresee(
        self, sources: dict[str, Source], parents: Parents, pending: frozenset[str]
    ) -> None:
        """Raise what `prepare` would raise, before an earlier stage of a recipe trains.

        parents: those that exist. pending: what the others will offer.
        """
        self.prepare(sources, parents)

    @abstractmethod
    def build(self, parents: Parents) -> StageModule:
        """Build the module with the parents' weights."""

    @abstractmethod
    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        """Turn one sample into tensors, in a loader worker; raises BadSample.

        It may use only the shape of the pixels, which the device may decode later (`data.decode`).
        """

    def contrasts(self, source: str) -> bool:
        """Tell whether the loss compares all samples of a source's block with each other."""
        return self.spans_batch

    def collate(self, rows: Sequence[Batch]) -> Batch:
        """Stack the samples of a micro-batch."""
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def arrange(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Arrange the micro-batches of a split block that the loss spans, e.g. captions by length.

        Their sizes must stay. The loss may change by rounding and by random draws only.
        """
        return batches

    def after_step(self, engine: Any, module: Any) -> None:
        """Change parameters after an optimizer step, through the engine's fp32 master weights."""

    def watch(self, values: dict[str, float], progress: float) -> list[str]:
        """Return warnings about the training so far, each naming the setting to change."""
        return self.feature_guard.check(values, progress)

    def chance(self, block: BlockConfig) -> float:
        """Return the loss of guessing at random in a block; 0 = not known."""
        return 0.0

    @abstractmethod
    def export(self, module: Any, state: StateDict) -> dict[str, StateDict]:
        """Split the full state dict into the artifact's parts: {"backbone": ...}."""

    def export_files(self) -> dict[str, Any]:
        """Return further files by name: a path, or an object with `save(path)`."""
        return {}

    def macs(self, frames: int, progress: float = 1.0) -> int:
        """Count multiply-adds of a forward pass of an image (frames = 1) or clip in training."""
        side = value_at(self.config.data.resolution, progress)
        keep_rate = keep_rate_at(self.config.model, progress)
        seen = self.visible(frames, progress)
        return vision_macs(self._sketch, frames, side, keep_rate, seen)

    def visible(self, frames: int, progress: float) -> int:
        """Count the patch tokens of an image (frames = 1) or clip that training encodes."""
        return self.tokens(frames, value_at(self.config.data.resolution, progress))

    def tokens(self, frames: int, resolution: int) -> int:
        """Count the tokens of an image (frames = 1) or clip before masking and token reduction."""
        return math.prod(self._sketch.geometry.grid(frames, resolution, resolution))

    @functools.cached_property
    def _sketch(self) -> VisionBackbone:
        return sketch(self.config)

    def inputs(self) -> dict[str, str]:
        """Return hashes of the run's inputs other than config, data and parents, by name."""
        return {}

    def first_weights(self) -> str:
        """Return the origin of the weights of a run without parents; "scratch" for new ones."""
        return self.config.model.first_weights

    def text_parent(self, parents: Parents) -> Artifact | None:
        """Return the artifact whose text tower the run starts from; None = that of text.llm."""
        return parents.text

    def models(self) -> dict[str, str]:
        """Return paths or names of the other models that the run reads, by role."""
        text = text_section(self.config)
        return {} if text is None else {"llm": text.llm}

    # for `xray plan`, which reads no weights ----------------------------------------------------

    def count(self, sources: dict[str, Source], facts: Facts) -> tuple[Facts, list[str]]:
        """Complete the facts from the config and from the sources that can be opened.

        Returns them with a note on everything that had to be assumed.
        """
        return facts, []

    def meta_module(self, facts: Facts) -> StageModule:
        """Build the module under torch's meta device, without data, weights or parents."""
        return self.build(Parents())

    def example_batch(
        self, module: Any, samples: int, frames: int, side: int, source: str = ""
    ) -> Batch:
        """Make a micro-batch of a source as `collate` does: zeros, captions of full length."""
        return {"pixels": torch.zeros(samples, frames, 3, side, side, dtype=torch.uint8)}

    def spans(self) -> list[tuple[float, float]]:
        """List parts [start, end] of the progress in which the cost of a step changes gradually.

        A sudden change is a part of length 0. Schedules of the shared sections are not listed.
        """
        model = self.config.model
        if model.reduce == "none" or min(model.final_rates) == 1:
            return []
        return [(model.keep_rate_span[0], model.keep_rate_span[1])]


def split_parents(stage: type[Stage], artifacts: Sequence[Artifact]) -> Parents:
    """Sort artifacts into vision and text parents; raises ConfigError for an unusable one."""
    parents = Parents()
    for artifact in artifacts:
        if not artifact.offers & stage.accepts:
            raise ConfigError(
                f"stage {stage.name} cannot start from {artifact.path}, an artifact of stage "
                f"{artifact.stage}: it needs one that offers {' or '.join(sorted(stage.accepts))}"
            )
        slot = slot_of(artifact.offers)
        if getattr(parents, slot) is not None:
            raise ConfigError(f"--init-from names two {slot} artifacts: give one")
        setattr(parents, slot, artifact)
    return parents


def make_backbone(config: RunConfig) -> VisionBackbone:
    """Make the backbone of a run, with position embeddings for the stage's largest input."""
    data = config.data
    backbone = VisionBackbone(config.model, largest(data.resolution), largest(data.frames))
    for _, side in steps_of(data.resolution):
        backbone.geometry.grid(1, side, side)  # raises for a side that does not fit
    return backbone


def sketch(config: RunConfig) -> VisionBackbone:
    """Make the backbone on the meta device, to count its tokens and operations."""
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, pretrained=""))
    with torch.device("meta"):
        return make_backbone(plain)


def load_vision(module: VisionModule, parent: Artifact | None) -> None:
    """Load the backbone's weights from a parent artifact, if there is one."""
    if parent is not None:
        load_adapted(module.vision, parent.load("backbone"), str(parent.path))
