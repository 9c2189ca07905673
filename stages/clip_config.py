"""Settings of the clip stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from data_pipelines.tags.reader import TagRules
from stages.hashtag_config import HashtagOptions
from stages.mae_config import MaeOptions
from xray.config import BlockConfig, RunConfig, TextConfig, TowerOptim, runtime
from xray.config.identity import added
from xray.config.model import TextHead
from xray.config.run import Parent
from xray.errors import ConfigError, nearest
from xray.losses.named import contrastive_loss

MASK_LEVELS = 8  # the mask ratio rises in this many steps, so that compiled graphs see few shapes


@dataclass
class ClipOptions:
    """The joint space, its loss and its temperature."""

    embed_dim: int = 512  # size of the vectors of images and texts
    text_head: TextHead = "adapter"  # layers on top of the LLM: LLM2CLIP's, or CLIP's linear map
    image_head: Literal["linear", "none"] = added("linear")  # layer on the backbone's feature
    head_bias: bool = added(False)  # linear heads have a bias
    # new = heads and logit scale start anew, parent = from the clip artifact of --init-from, whose
    # text tower is the run's, too, if no other is given
    heads: Literal["new", "parent"] = added("new")
    adapter_blocks: int = 4  # residual MLPs between the LLM and the projection
    loss: str = "info_nce"  # a name of xray.losses.named.CONTRASTIVE_LOSSES
    # initial factor of the cosine similarities; null = 1/0.07, and 10 for the sigmoid loss
    logit_scale: float | None = None
    logit_scale_max: float = 100.0  # largest value that the learned factor may reach
    # initial bias of the sigmoid loss; null = -ln of the largest block's samples
    logit_bias: float | None = None
    captions: int = 1  # captions read per sample and step; all of them are positives
    matryoshka: list[int] = field(default_factory=list)  # prefix sizes that are trained too
    mask_ratio: float = 0.0  # share of image tokens left out in training
    # progress at which mask_ratio begins to rise from 0, and at which it is reached
    mask_span: list[float] = field(default_factory=lambda: [0.0, 0.0])
    mask_until: float = 1.0  # progress after which no token is left out
    # a clip artifact or open_clip:MODEL:WEIGHTS, to distil from; identified by its hash
    teacher: str = runtime("")
    distill: float = 1.0  # weight of the distillation loss
    mae_weight: float = 0.0  # of the auxiliary mae loss, set by section mae
    hashtag_weight: float = 0.0  # of the auxiliary tag loss, set by section hashtag
    # sources whose samples need no captions: their blocks train with the auxiliary losses only
    uncaptioned: list[str] = added(factory=list)

    def validate(self) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        if not 1 <= self.first_scale <= self.logit_scale_max:
            raise ConfigError(
                f"clip.logit_scale={self.first_scale} must be in [1, clip.logit_scale_max="
                f"{self.logit_scale_max}]"
            )
        for name in ("captions", "embed_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"clip.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.adapter_blocks <= 16:
            raise ConfigError(f"clip.adapter_blocks={self.adapter_blocks} must be in [0, 16]")
        for size in self.matryoshka:
            if not 0 < size < self.embed_dim:
                raise ConfigError(
                    f"clip.matryoshka: {size} must be in (0, clip.embed_dim={self.embed_dim})"
                )
        for name in ("distill", "mae_weight", "hashtag_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"clip.{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.mask_ratio < 1:
            raise ConfigError(f"clip.mask_ratio={self.mask_ratio} must be in [0, 1)")
        if len(self.mask_span) != 2 or not 0 <= self.mask_span[0] <= self.mask_span[1] <= 1:
            raise ConfigError(f"clip.mask_span={self.mask_span} must be [start, end] in [0, 1]")
        if not self.mask_span[1] <= self.mask_until <= 1:
            raise ConfigError(
                f"clip.mask_until={self.mask_until} must be in [clip.mask_span's end, 1]"
            )

    def masked(self, progress: float) -> float:
        """Return the share of image tokens that patch dropout leaves out at a progress in [0, 1].

        It rises from 0 to `mask_ratio` inside `mask_span`, and is 0 again from `mask_until` on.
        """
        start, end = self.mask_span
        if progress < start or progress >= self.mask_until:
            return 0.0
        if progress >= end:
            return self.mask_ratio
        rise = math.floor(MASK_LEVELS * (progress - start) / (end - start)) / MASK_LEVELS
        return self.mask_ratio * rise

    @property
    def first_scale(self) -> float:
        """Initial logit scale."""
        initial = contrastive_loss(self.loss).logit_scale
        return initial if self.logit_scale is None else self.logit_scale

    def chance(self, samples: int) -> float:
        """Return the loss of a block if all features are equal."""
        return contrastive_loss(self.loss).chance(samples, self.captions)


@dataclass
class ClipConfig(RunConfig):
    """Settings of a clip run."""

    text: TextConfig = field(default_factory=lambda: TextConfig(tune="none"))
    clip: ClipOptions = field(default_factory=ClipOptions)
    mae: MaeOptions = field(default_factory=MaeOptions)
    hashtag: HashtagOptions = field(default_factory=HashtagOptions)

    def validate(self) -> None:
        super().validate()
        self.text.validate()
        self.clip.validate()
        if self.text.tune == "none" and self.optim.text != TowerOptim():
            raise ConfigError(
                "optim.text sets how the LLM is trained, and text.tune=none does not train it: "
                "set text.tune=lora or full, or remove optim.text"
            )
        if self.clip.uncaptioned:
            self._check_uncaptioned()
        if self.clip.mae_weight:
            self.mae.validate(self.model)
        if self.clip.hashtag_weight:
            self.hashtag.validate()
            check_unread(self.hashtag)

    def from_parents(self, parents: Sequence[Parent]) -> dict[str, Any]:
        """Return the settings of a parent clip artifact, if its text tower is the run's."""
        from stages.parent_settings import of_clip

        return {} if self.text.llm else of_clip(parents)

    def contrasts(self, source: str) -> bool:
        """Tell whether the images of a source are contrasted with their captions."""
        return source not in self.clip.uncaptioned

    @property
    def captioned(self) -> list[BlockConfig]:
        """Blocks of a step whose samples have captions."""
        return [block for block in self.blocks if self.contrasts(block.source)]

    def _check_uncaptioned(self) -> None:
        names, given = [block.source for block in self.data.blocks], self.clip.uncaptioned
        for name in given:
            if name not in names:
                raise ConfigError(
                    f"clip.uncaptioned: {name!r} is not a source of data.blocks, which are of "
                    f"{names}{nearest(name, names)}"
                )
        if not self.clip.mae_weight and not self.clip.hashtag_weight:
            raise ConfigError(
                f"clip.uncaptioned={given}: their blocks train with the auxiliary losses only: set "
                "clip.hashtag_weight or clip.mae_weight above 0"
            )
        if not self.captioned:
            raise ConfigError(
                f"clip.uncaptioned={given} leaves no block with captions: add one to data.blocks, "
                "or use stage mae or hashtag"
            )

    @property
    def first_bias(self) -> float | None:
        """Initial logit bias; None if the loss has no bias."""
        samples = max(block.samples for block in self.captioned)
        initial = contrastive_loss(self.clip.loss).logit_bias(samples)
        if initial is None or self.clip.logit_bias is None:
            return initial
        return self.clip.logit_bias


# Options of section hashtag that the auxiliary losses read: any other one is refused.
READ = {item.name for item in fields(TagRules)} | {"vocabulary", "loss", "smoothing", "chunk"}


def check_unread(options: HashtagOptions) -> None:
    """Raise ConfigError for an option of section hashtag that is set and that is not in READ."""
    for item in fields(options):
        value = getattr(options, item.name)
        if item.name not in READ and value != getattr(type(options)(), item.name):
            raise ConfigError(
                f"hashtag.{item.name}={value} does nothing in the clip stage, whose samples and "
                "labels stay unchanged: remove it from section clip.hashtag"
            )
