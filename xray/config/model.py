"""Settings of the vision backbone and the text tower."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from xray.config.identity import added, runtime
from xray.errors import ConfigError

Checkpointing = bool | Literal["mlp"]
Reduction = Literal["none", "evit", "tome", "random"]


@dataclass
class ModelConfig:
    """Settings of the vision backbone."""

    name: str = "vit_tiny_patch16_224"  # any timm VisionTransformer or Eva of standard blocks
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm (embed_dim, depth, ...)
    tubelet: int = 2  # frames per video token; an image counts as one frame
    video: Literal["joint", "frames"] = "joint"  # attention over space and time, or per frame
    # pooling of the tokens into one feature: the CLS token (which is added to a model without one),
    # timm's attention pooling head (map, as in SigLIP) or the mean of the patch tokens
    pool: Literal["cls", "map", "mean"] = added("cls")
    # positions of the later time slots of a clip: one for each slot, added to those of the grid, or
    # one for each token, as in VideoMAE (video: joint)
    clip_positions: Literal["slots", "tokens"] = added("slots")
    # pooling of the frames' features (video: frames)
    frame_pool: Literal["mean", "attention"] = "mean"
    # token reduction: evit keeps the tokens with the most attention of CLS (or of what pools them),
    # tome merges similar tokens, random keeps random ones
    reduce: Reduction = "evit"
    # numbers of the blocks that reduce tokens, from 0; null = depth/4, 2/4, 3/4
    reduce_at: list[int] | None = None
    # the half that comes first in sine-cosine positions, initial ones and those of the MAE decoder:
    # columns, as in MAE's code, or rows; auto = columns. Runs made before the key existed have rows
    sincos: Literal["auto", "columns", "rows"] = added("auto", older="rows")
    # true = a merged token counts as all its tokens in attention (tome); MAE's weights want false
    proportional_attention: bool = added(True)
    # resize of the position table: with antialiasing, as in timm, or without, as in the code of
    # MAE, EViT and SWAG
    resize_positions: Literal["antialias", "plain"] = added("antialias")
    fuse: bool = True  # evit, random: fuse the dropped tokens into one
    keep_rate: float = 1.0  # final share of patch tokens kept at each reducing block
    keep_rates: list[float] | None = None  # one keep rate per reducing block, not keep_rate
    keep_rate_levels: int = 8  # number of steps in which the keep rate falls from 1
    # progress of the stage, in [0, 1], at which the keep rate begins and ends to fall
    keep_rate_span: list[float] = field(default_factory=lambda: [0.0, 0.5])
    norm_eps: float | None = added(None)  # epsilon of the layer norms; null = timm's
    drop_path: float = 0.0  # stochastic depth: probability in the last block
    pretrained: str = runtime("")  # timm weights: a local .safetensors file, or "timm" for the hub
    # true = compute the activations of blocks again in the backward pass; mlp = of their MLPs only
    grad_checkpointing: Checkpointing = runtime(False)

    @property
    def rows_first(self) -> bool:
        """True if the sine-cosine positions begin with those of rows."""
        return self.sincos == "rows"

    @property
    def final_rates(self) -> list[float]:
        """Final keep rates: one for all reducing blocks, or one for each."""
        return [self.keep_rate] if self.keep_rates is None else self.keep_rates

    @property
    def first_weights(self) -> str:
        """Origin of a new backbone's weights: timm, a file, or "scratch"."""
        return f"{self.name} of timm" if self.pretrained == "timm" else self.pretrained or "scratch"

    def validate(self) -> None:
        """Check the settings; raises ConfigError that names the key to change."""
        key = "keep_rate" if self.keep_rates is None else "keep_rates"
        for rate in self.final_rates:
            if not 0 < rate <= 1:
                raise ConfigError(f"model.{key}={rate} must be in (0, 1]")
            if self.reduce == "tome" and rate < 0.5:
                raise ConfigError(
                    f"model.{key}={rate} must be at least 0.5 with model.reduce=tome, which merges "
                    "pairs: raise it, or add blocks to model.reduce_at"
                )
        if self.norm_eps is not None and self.norm_eps <= 0:
            raise ConfigError(f"model.norm_eps={self.norm_eps} must be above 0")
        if self.tubelet < 1 or self.keep_rate_levels < 1:
            raise ConfigError("model.tubelet and model.keep_rate_levels must be at least 1")
        if len(self.keep_rate_span) != 2 or not 0 <= min(self.keep_rate_span) <= 1:
            raise ConfigError(f"model.keep_rate_span={self.keep_rate_span} must be [start, end]")


TextHead = Literal["adapter", "linear"]
ImageHead = Literal["linear", "none"]
IsPooled = bool | Literal["auto"]
Features = Literal["live", "fp32", "bf16", "int8"]
Precision = Literal["fp32", "bf16"]  # bf16 = autocast over fp32 weights


@dataclass
class TextConfig:
    """Settings of the text tower; a run that starts from a text artifact takes its structure."""

    llm: str = runtime("")  # a transformers folder or a hub name; the hash of its files is recorded
    tune: Literal["none", "lora", "full"] = "lora"  # trained part of the LLM
    attention: Literal["bidirectional", "causal"] = "bidirectional"  # mask of the LLM's attention
    # mean over tokens, the last token, the first (cls), or attention with learned latents, then the
    # mean; auto = the setting in a sentence encoder's folder, last for SigLIP, otherwise mean
    pooling: Literal["auto", "mean", "last", "cls", "latent"] = "auto"
    latents: int = 64  # number of latents (pooling=latent)
    prompt: str = ""  # an instruction before every caption
    # pool the prompt's tokens; auto = as a sentence encoder's folder says, otherwise those of
    # encoders only. Runs made before the key existed have false
    pool_prompt: IsPooled = added("auto", older=False)
    # pool the special tokens before a caption (BOS, [CLS]); auto = those of encoders and sentence
    # encoders only. Runs made before the key existed have true
    pool_special: IsPooled = added("auto", older=True)
    # longest = captions are padded to the longest of a batch, and no token attends to the padding;
    # full = to max_length, and the padding is attended to and pooled like other tokens (SigLIP)
    padding: Literal["longest", "full"] = added("longest")
    max_length: int = 64  # tokens, including the prompt; longer captions are truncated
    lora_rank: int = 16  # rank of the LoRA matrices; 0 = no LoRA
    lora_alpha: int = 32  # LoRA's scale: its update is multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.05  # dropout probability on the input of the LoRA layers
    lora_targets: list[str] = field(default_factory=list)  # layer names; [] = every linear layer
    dtype: Literal["fp32", "bf16"] = "fp32"  # of frozen weights
    # captions of similar length share a micro-batch, where the loss spans a split block
    bucket_by_length: bool = added(False)
    # sentence vectors from the model, or as stored by xray data text-features (clip stage)
    features: Features = "live"
    precision: Precision = added("fp32")  # of the LLM that makes the stored vectors

    def validate(self) -> None:
        """Check the settings; raises ConfigError that names the key to change."""
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
                f"text.features={self.features} reads stored vectors of a frozen model: set "
                "text.tune=none, or text.features=live"
            )
        if self.features != "live" and self.bucket_by_length:
            raise ConfigError(
                f"text.bucket_by_length has no captions to order with text.features="
                f"{self.features}: leave it out"
            )
        if self.bucket_by_length and self.padding == "full":
            raise ConfigError(
                "text.bucket_by_length has nothing to order with text.padding=full, which gives "
                "all captions the same length: leave it out"
            )
        if self.features == "live" and self.precision != "fp32":
            raise ConfigError(
                f"text.precision={self.precision} is for stored vectors: set text.features=bf16, "
                "or train.precision for a model in training"
            )
        if self.tune == "full" and self.dtype != "fp32":
            raise ConfigError(
                f"text.dtype={self.dtype} is for frozen weights: set text.dtype=fp32 with "
                "text.tune=full"
            )


@dataclass
class LlmConfig:
    """Sizes of a small, randomly initialised language model with a tokenizer of the captions."""

    path: str = ""  # folder to write
    captions: str = ""  # shards, under data.root, whose captions the tokenizer is built from
    vocab_size: int = 2048  # largest number of tokens of the tokenizer
    width: int = 128  # size of the hidden states
    depth: int = 2  # number of transformer blocks
    heads: int = 4  # attention heads per block
    family: Literal["qwen3", "clip"] = "qwen3"  # a decoder, or CLIP's text transformer
