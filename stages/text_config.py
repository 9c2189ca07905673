"""Settings of the text stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from xray.config import RunConfig, TextConfig
from xray.errors import ConfigError


@dataclass
class TextOptions(TextConfig):
    """LLM and contrastive loss."""

    temperature: float = 0.05  # cosine similarities are divided by it (fixed, not learned)
    negatives: str = ""  # json field of hard negatives: wrong texts similar to the captions
    negatives_each: int = 1  # negatives per sample and step; a sample may have fewer


@dataclass
class TextRunConfig(RunConfig):
    """Settings of a text run."""

    text: TextOptions = field(default_factory=TextOptions)

    def validate(self) -> None:
        super().validate()
        self.text.validate()
        if self.text.features != "live":
            raise ConfigError("text.features is for the clip stage: the text stage trains the LLM")
        if self.optim.text.freeze:
            raise ConfigError(
                "optim.text.freeze is for the clip stage: the text stage trains only the LLM"
            )
        if self.text.tune == "none":
            raise ConfigError("text.tune=none leaves nothing to train: set text.tune=lora or full")
        if self.text.temperature <= 0:
            raise ConfigError(f"text.temperature={self.text.temperature} must be above 0")
        if self.text.negatives_each < 1:
            raise ConfigError(f"text.negatives_each={self.text.negatives_each} must be at least 1")
