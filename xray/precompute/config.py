"""Settings of the commands that write a model's results as sidecars, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field

from data_pipelines.tags.reader import Origin
from xray.config import Features, Precision, TextConfig
from xray.errors import ConfigError


@dataclass
class PseudoTagsConfig:
    """Settings of a teacher, which adds those of its `top` tags that are above `threshold`."""

    tags: Origin = "hashtags"  # origin of a sample's own tags
    field: str = "hashtags"  # json field of the tags
    captions: dict[str, float] = dataclass_field(default_factory=dict)  # json fields of captions
    top: int = 5  # most tags that a sample gets
    threshold: float = 0.1  # smallest probability of a tag that is added
    temperature: float = 1.0  # of the softmax; above 1 is less confident
    template: str = "a photo of {}"  # prompt of a clip artifact: {} is the tag
    precision: Precision = "fp32"  # of the teacher
    llm: str = ""  # folder of the artifact's base LLM, if it has moved since training
    batch_size: int = 64  # samples per forward pass
    workers: int = 2  # loader processes

    def validate(self) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        if self.top < 1 or self.batch_size < 1:
            raise ConfigError("top and batch_size must be at least 1")
        if not 0 <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold} must be in [0, 1)")
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0")
        if "{}" not in self.template:
            raise ConfigError(f"template={self.template!r} needs {{}} in the place of the tag")


@dataclass
class FeaturesConfig:
    """Settings for reading samples."""

    captions: dict[str, float] = dataclass_field(
        default_factory=dict
    )  # json fields, if not the default ones
    precision: Precision = "fp32"  # of the encoder
    llm: str = ""  # folder of the artifact's base LLM, if it has moved since training
    batch_size: int = 64  # samples per forward pass
    workers: int = 2  # loader processes

    def validate(self) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError("batch_size must be at least 1, and workers at least 0")


@dataclass
class TextFeaturesConfig(TextConfig):
    """Text section, and how captions are read and vectors are stored."""

    features: Features = "bf16"  # number format of the stored vectors
    captions: dict[str, float] = dataclass_field(
        default_factory=dict
    )  # json fields, if not the default ones
    batch_size: int = 256  # captions per forward pass
    workers: int = 2  # loader processes

    def validate(self) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        super().validate()
        if self.features == "live":
            raise ConfigError("features=live stores nothing: use bf16, int8 or fp32")
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError("batch_size must be at least 1, and workers at least 0")
