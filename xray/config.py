"""Typed configuration: dataclasses <- yaml layers <- `key=value`, strict, dumped and hashed.

A field is *identity* (it changes the result, is hashed, and must be equal when a run is resumed)
unless it is declared with `runtime()`: workers, micro-batch, ZeRO stage, logging, saving, paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from xray import schedule
from xray.data_config import BlockConfig as BlockConfig
from xray.data_config import DataConfig as DataConfig
from xray.data_config import SourceConfig as SourceConfig
from xray.data_config import validate_data
from xray.deepspeed_keys import OPEN, OWNED
from xray.errors import ConfigError
from xray.fields import nearest as nearest
from xray.fields import runtime as runtime
from xray.hashing import to_dict


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


@dataclass
class TowerOptim:
    """How a tower is trained beside what is new on top of it."""

    lr: float = 1.0  # factor of the lr
    layer_decay: float = 1.0  # further factor per block, from the top down
    freeze: float = 0.0  # share of the stage through which it is held still; 1 = all of it


@dataclass
class OptimConfig:
    """Optimizer and schedule; lr = base_lr * global_batch / 256."""

    name: Literal["adamw", "lion"] = "adamw"
    base_lr: float = 1e-3
    min_lr: float = 0.0  # at the end, as a share of the peak
    warmup: float = 0.05  # share of the stage's samples
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    logit_scale_lr: float = 1.0  # factor of the lr, for the logit scale and bias
    vision: TowerOptim = field(default_factory=TowerOptim)
    text: TowerOptim = field(default_factory=TowerOptim)
    clip_grad: float = 1.0  # global norm; 0 = off

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers in [0, 1)")
        if self.eps <= 0:
            raise ConfigError(f"optim.eps={self.eps} must be above 0")
        for name in ("base_lr", "min_lr", "weight_decay", "logit_scale_lr", "clip_grad"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be 0 or more")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"optim.warmup={self.warmup} must be in [0, 1)")
        for name, tower in (("vision", self.vision), ("text", self.text)):
            if not 0 <= tower.freeze <= 1:
                raise ConfigError(f"optim.{name}.freeze={tower.freeze} must be in [0, 1]")
            if tower.lr <= 0 or not 0 < tower.layer_decay <= 1:
                raise ConfigError(
                    f"optim.{name}: lr={tower.lr} must be above 0 (freeze holds it still), and "
                    f"layer_decay={tower.layer_decay} in (0, 1]"
                )


@dataclass
class ZeroConfig:
    """DeepSpeed's partitioning."""

    stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False  # optimizer state (and ZeRO-3 parameters) to CPU memory
    # DeepSpeed's own keys, merged into its config: {zero_optimization: {overlap_comm: false}}
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.offload and self.stage == 0:
            raise ConfigError("zero.offload=true needs zero.stage of 1 to 3")
        for key, value in self.deepspeed.items():
            section = key in ("zero_optimization", "torch_autocast")
            if section and not isinstance(value, dict):
                raise ConfigError(f"zero.deepspeed.{key}={value!r} must be a dict")
            for name in (key, *(f"{key}.{inner}" for inner in (value if section else ()))):
                if name in OWNED:
                    raise ConfigError(f"zero.deepspeed may not set {name}: {OWNED[name]}")
            if key not in OPEN:
                hint = nearest(key, OPEN) or f": it may set {', '.join(OPEN)}"
                raise ConfigError(f"zero.deepspeed has an unknown key {key!r}{hint}")


@dataclass
class TrainConfig:
    """Length, precision and housekeeping of a stage."""

    samples: int = 0  # samples seen in this stage, all blocks together
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast over fp32 weights
    compile: bool = runtime(False)  # the blocks of the backbone by torch.compile
    # samples per device and forward; 0 = the rank's whole block; may be steps as data.resolution
    micro_batch: Any = runtime(0)
    log_every: int = runtime(10)  # steps; 0 = at the end only, as below
    save_every: int = runtime(200)  # steps
    keep_checkpoints: int = runtime(2)  # the newest
    mirror: str = runtime("")  # a URL to which checkpoints and artifact are copied: URL/STAGE/
    keep_every: int = runtime(0)  # steps; besides, those at its multiples; 0 = none
    keep_best: int = runtime(0)  # besides, as many with the best `best_by`
    best_by: str = runtime("val/loss")  # a metric of metrics.jsonl, at the step that is saved
    best_is: Literal["lowest", "highest"] = runtime("lowest")
    validate_every: int = runtime(0)  # steps; 0 = at the end only
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")
    tensorboard: bool = runtime(True)  # metrics.jsonl is always written
    wandb: str = runtime("")  # a project's name; "" = off
    # a loss more than `spike` standard deviations above its mean: leave the step out, or say so
    spikes: Literal["ignore", "warn", "skip"] = "warn"
    spike: float = 6.0
    hang_seconds: float = runtime(1200.0)  # a step may take before the run is ended; 0 = for ever
    ema: float = 0.0  # decay per step of a moving average of the weights; 0 = none is kept
    export: Literal["last", "ema"] = "last"  # which weights the artifact has

    def validate(self) -> None:
        """Raises ConfigError naming the key to change."""
        if self.samples < 1:
            raise ConfigError("train.samples is not set: give the samples to see in this stage")
        if self.spike <= 0 or self.hang_seconds < 0:
            raise ConfigError(
                f"train.spike={self.spike} must be above 0, and train.hang_seconds="
                f"{self.hang_seconds} 0 (off) or more"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train.ema={self.ema} must be in [0, 1), e.g. 0.9999")
        if self.export == "ema" and not self.ema:
            raise ConfigError("train.export=ema needs an average: set train.ema, e.g. to 0.9999")
        for name in ("log_every", "save_every", "validate_every", "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be 0 (off) or more")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"train.keep_checkpoints={self.keep_checkpoints} must be at least 1")
        if (
            self.keep_best
            and self.best_by.startswith("val/")
            and (not self.validate_every or self.save_every % self.validate_every)
        ):
            raise ConfigError(
                f"train.keep_best compares {self.best_by}, which is measured every "
                f"train.validate_every={self.validate_every} steps: let train.save_every="
                f"{self.save_every} be a multiple of that"
            )
        schedule.check(self.micro_batch, "train.micro_batch", least=0)


@dataclass
class DebugConfig:
    """First aid."""

    overfit_batch: bool = False  # every step is the first one's samples, without augmentation


@dataclass
class RunConfig:
    """Everything one stage's run is made of; stages add their own section."""

    stage: str = ""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    zero: ZeroConfig = runtime(factory=ZeroConfig)
    init_from: list[str] = runtime(factory=list)  # artifacts of earlier stages
    license: str = runtime("")  # of the weights, as the model card says: an SPDX identifier
    out: str = runtime("")  # this stage's folder

    @property
    def blocks(self) -> list[BlockConfig]:
        """The blocks of a step that `data.modalities` leaves in."""
        sources = self.data.sources
        return [b for b in self.data.blocks if sources[b.source].modality in self.data.modalities]

    @property
    def validation(self) -> list[BlockConfig]:
        """The validation blocks that `data.modalities` leaves in."""
        sources = self.data.sources
        blocks = self.data.validation
        return [b for b in blocks if sources[b.source].modality in self.data.modalities]

    @property
    def global_batch(self) -> int:
        return sum(block.samples for block in self.blocks)

    @property
    def steps(self) -> int:
        return max(1, round(self.train.samples / self.global_batch))

    def progress(self, step: int) -> float:
        """Where a step lies in the stage, in (0, 1): what every schedule is a function of."""
        return (step + 0.5) / self.steps

    def validate(self) -> None:
        """Check rules that span fields; raises ConfigError naming the key to change."""
        validate_data(self.data)
        if not self.blocks:
            raise ConfigError(
                f"data.blocks has no block of data.modalities={self.data.modalities}: "
                "add a block, or widen data.modalities"
            )
        self.train.validate()
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")
        self.model.validate()
        self.optim.validate()
        self.zero.validate()
        if self.train.compile and self.zero.stage == 3:
            raise ConfigError(
                "train.compile=true does not go with zero.stage=3, which gathers a layer's "
                "parameters when it is called, within what is compiled: set zero.stage to 2 or less"
            )
        if self.data.workers < 0:
            raise ConfigError(f"data.workers={self.data.workers} must be 0 or more")
        if self.data.tokens_per_batch < 0:
            raise ConfigError("data.tokens_per_batch must be 0 (off) or more")
        if self.data.tokens_per_batch and self.train.micro_batch != 0:
            raise ConfigError(
                "data.tokens_per_batch and train.micro_batch both set the size of a forward: "
                "leave one of them at 0"
            )


def dump(config: Any, path: Path) -> None:
    """Write the resolved config as yaml that can be given back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
