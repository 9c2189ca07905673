"""Settings of the hashtag stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_pipelines.tags.balance import Balance
from data_pipelines.tags.reader import TagRules
from xray.config import RunConfig
from xray.config.identity import runtime
from xray.errors import ConfigError
from xray.losses.named import check_tag_loss, tag_loss


@dataclass
class HashtagOptions(TagRules):
    """Vocabulary, class balance, labels and loss."""

    vocabulary: str = ""  # a vocabulary.json of `xray data tags`; "" = built from the run's shards
    balance: Balance = "sqrt"  # repeats of samples with rare tags: by 1/sqrt(count), 1/count, none
    epoch_length: float = 1.5  # draws per sample in an epoch; those above 1 are repeats
    strip: bool = True  # a repeat keeps only the tags that are rare enough to cause it
    teacher: str = ""  # sidecar of `xray data pseudo-tags`, which prints its name; "" = none
    pseudo_weight: float = 0.5  # of the teacher's tags on untagged samples
    # a sample's tag is dropped if the teacher's probability is below this multiple of the tag's
    # mean probability; 0 = off
    min_lift: float = 0.0
    loss: str = "softmax"  # a name of xray.losses.named.TAG_LOSSES
    smoothing: float = 0.0  # label smoothing
    chunk: int = 0  # tags per chunk of the loss, which saves memory of logits; 0 = all at once
    # each process has the head's rows of a part of the tags; changes results by rounding only
    shard_classes: bool = runtime(False)
    sampled: int = 0  # sampled softmax with this many drawn tags; 0 = over all tags
    # share of a micro-batch treated as mislabelled: the largest losses above their lower bound
    truncate: float = 0.0
    truncate_after: float = 0.3  # progress from which on losses are truncated
    # a of the Beta(a, a) that mixup blends two images with; 0 = off; a step with both set draws one
    mixup: float = 0.0
    # a of the Beta(a, a) that gives the area cutmix takes from another image; 0 = off
    cutmix: float = 0.0

    def validate(self, section: str = "hashtag") -> None:
        """Check all values; raises ConfigError that names the key to change."""
        super().validate(section)
        for name in ("mixup", "cutmix", "min_lift", "chunk", "sampled"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{section}.{name}={getattr(self, name)} must be >= 0")
        for name in ("smoothing", "truncate", "truncate_after", "pseudo_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{section}.{name}={getattr(self, name)} must be in [0, 1]")
        if self.truncate == 1 or self.smoothing == 1:
            raise ConfigError(f"{section}.truncate and {section}.smoothing must be below 1")
        if self.epoch_length < 1:
            raise ConfigError(f"{section}.epoch_length={self.epoch_length} must be at least 1")
        check_tag_loss(self.loss, f"{section}.loss")
        if self.sampled and not tag_loss(self.loss).samples_classes:
            raise ConfigError(f"{section}.sampled does not work with {section}.loss={self.loss}")
        if self.sampled and self.smoothing:
            raise ConfigError(f"{section}.smoothing needs all tags: set {section}.sampled=0")
        if self.sampled and self.shard_classes:
            raise ConfigError(
                f"{section}.shard_classes=true computes the loss over all tags: set "
                f"{section}.sampled=0, or {section}.shard_classes=false"
            )


@dataclass
class HashtagConfig(RunConfig):
    """Settings of a hashtag run."""

    hashtag: HashtagOptions = field(default_factory=HashtagOptions)

    def validate(self) -> None:
        super().validate()
        self.hashtag.validate()
        if self.hashtag.shard_classes:
            if self.zero.stage:
                raise ConfigError(
                    f"hashtag.shard_classes=true does not work with zero.stage={self.zero.stage}, "
                    "which partitions the head itself: set zero.stage=0"
                )
            self.zero.check_own_reduction("hashtag.shard_classes=true")

    def without_effect(self, rows: int) -> list[str]:
        mixes, options = rows > self.data.views, self.hashtag
        works = {"mixup": mixes, "cutmix": mixes, "truncate": rows > 1}
        idle = {name: getattr(options, name) for name, does in works.items() if not does}
        return [f"hashtag.{name}={value:g}" for name, value in idle.items() if value]

    @property
    def zero_limit(self) -> Literal[0, 2, 3]:
        return 0 if self.hashtag.shard_classes else super().zero_limit
