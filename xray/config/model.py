"""Settings of the two towers: vision backbone and text tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xray.config.fields import runtime as runtime
from xray.errors import ConfigError


@dataclass
class ModelConfig:
    """The vision backbone."""

    name: str = "vit_tiny_patch16_224"  # any standard timm VisionTransformer
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm (embed_dim, depth, ...)
    tubelet: int = 2  # frames per video token
    video: Literal["joint", "frames"] = "joint"  # attention over space and time, or frame by frame
    frame_pool: Literal["mean", "attention"] = "mean"  # of the frames' CLS tokens (video: frames)
    reduce: Literal["none", "evit", "tome", "random"] = "evit"
    reduce_at: list[int] | None = None  # zero-based blocks; None = depth/4, 2/4, 3/4
    fuse: bool = True  # evit, random: the other tokens become one instead of nothing
    keep_rate: float = 1.0  # share of patch tokens kept at each reducing block, at the end
    keep_rates: list[float] | None = None  # instead of keep_rate: one per reducing block
    keep_rate_levels: int = 8  # steps from 1 to keep_rate
    keep_rate_span: list[float] = field(default_factory=lambda: [0.0, 0.5])  # of the stage
    drop_path: float = 0.0
    pretrained: str = runtime("")  # timm weights: a local .safetensors file, or "timm" for the hub
    grad_checkpointing: bool = runtime(False)

    @property
    def final_rates(self) -> list[float]:
        """The keep rates at the end: one for all reducing blocks, or one for each."""
        return [self.keep_rate] if self.keep_rates is None else self.keep_rates

    def validate(self) -> None:
        """Check rules that span fields; raises ConfigError naming the key to change."""
        key = "keep_rate" if self.keep_rates is None else "keep_rates"
        for rate in self.final_rates:
            if not 0 < rate <= 1:
                raise ConfigError(f"model.{key}={rate} must be in (0, 1]")
            if self.reduce == "tome" and rate < 0.5:
                raise ConfigError(
                    f"model.{key}={rate} must be at least 0.5 with model.reduce=tome, which merges "
                    "pairs: raise it, or add blocks to model.reduce_at"
                )
        if self.tubelet < 1 or self.keep_rate_levels < 1:
            raise ConfigError("model.tubelet and model.keep_rate_levels must be at least 1")
        if len(self.keep_rate_span) != 2 or not 0 <= min(self.keep_rate_span) <= 1:
            raise ConfigError(f"model.keep_rate_span={self.keep_rate_span} must be [start, end]")


Features = Literal["live", "fp32", "bf16", "int8"]


@dataclass
class TextConfig:
    """The text tower; a run that starts from a text artifact takes the structure from there."""

    llm: str = runtime("")  # a transformers folder or a hub name; its files' hash is recorded
    tune: Literal["none", "lora", "full"] = "lora"  # what is trained of the LLM
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    # mean over tokens, the last, the first (cls), or tokens through learned latents, then the mean;
    # auto = what a sentence encoder's folder says, else the mean
    pooling: Literal["auto", "mean", "last", "cls", "latent"] = "auto"
    latents: int = 64  # of pooling=latent
    prompt: str = ""  # an instruction before every caption: read, but not pooled
    max_length: int = 64  # tokens, the prompt's too; longer captions are cut
    lora_rank: int = 16  # 0 = no LoRA
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(default_factory=list)  # names; [] = every linear layer
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights that are not trained
    # sentence vectors come from the model, or from what xray data text-features stored (clip stage)
    features: Features = "live"

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        for name in ("max_length", "latents"):
            if getattr(self, name) < 1:
                raise ConfigError(f"text.{name}={getattr(self, name)} must be at least 1")
        if self.lora_rank < 0:
            raise ConfigError(f"text.lora_rank={self.lora_rank} must be 0 (no LoRA) or more")
        if self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"text.lora_alpha={self.lora_alpha} must be above 0, and text.lora_dropout="
                f"{self.lora_dropout} in [0, 1)"
            )
        if self.attention == "causal" and self.pooling == "cls":
            raise ConfigError(
                "text.pooling=cls is the first token, which sees no other with "
                "text.attention=causal: use last or mean"
            )
        if self.features != "live" and self.tune != "none":
            raise ConfigError(
                f"text.features={self.features} are of a model that stays as it is: set "
                "text.tune=none, or text.features=live"
            )
        if self.tune == "full" and self.dtype != "fp32":
            raise ConfigError(
                f"text.dtype={self.dtype} is for weights that are not trained: "
                "leave it at fp32 with text.tune=full"
            )
