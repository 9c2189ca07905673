"""Settings of the optimizer, ZeRO, the training loop and debugging."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from xray.config import schedule
from xray.config.identity import added, runtime
from xray.config.model import Precision
from xray.errors import ConfigError, nearest

# DeepSpeed ignores a misspelled top-level key silently, so `zero.deepspeed` may set only these;
# inside zero_optimization and torch_autocast, all keys that are not in OWNED.
OPEN = (
    "comms_logger",
    "communication_data_type",
    "flops_profiler",
    "gradient_predivide_factor",
    "prescale_gradients",
    "timers",
    "torch_autocast",
    "zero_optimization",
)
# DeepSpeed key -> the xray key that sets it, or the reason why it must not be set.
OWNED = {
    "activation_checkpointing": "set model.grad_checkpointing",
    "amp": "set train.precision",
    "bf16": "set train.precision: bf16 is autocast over fp32 weights",
    "bfloat16": "set train.precision: bf16 is autocast over fp32 weights",
    "checkpoint": "xray writes its own checkpoints: set train.save_every",
    "compile": "set train.compile",
    "data_types": "set train.precision",
    "fp16": "set train.precision: bf16 needs no loss scale",
    "gradient_accumulation_steps": "set train.micro_batch: the steps follow from it",
    "gradient_allreduce_op": "gradients are means over processes",
    "gradient_clipping": "set optim.clip_grad",
    "optimizer": "set optim.name",
    "scheduler": "set optim.warmup and optim.min_lr",
    "steps_per_print": "set train.log_every",
    "torch_autocast.dtype": "set train.precision",
    "torch_autocast.enabled": "set train.precision",
    "train_batch_size": "set the samples of data.blocks",
    "train_micro_batch_size_per_gpu": "set train.micro_batch",
    "zero_allow_untested_optimizer": "set optim.name",
    "zero_force_ds_cpu_optimizer": "set optim.name",
    "zero_optimization.compute_grad_norm": "the norm is written to the metrics",
    "zero_optimization.cpu_offload": "set zero.offload",
    "zero_optimization.cpu_offload_param": "set zero.offload",
    "zero_optimization.mics_shard_size": "checkpoints need parts of equal size on all processes",
    "zero_optimization.offload_optimizer": "set zero.offload",
    "zero_optimization.offload_param": "set zero.offload",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.zenflow": "checkpoints need the optimizer's own moments",
}

TUNES = ("full", "lora", "bias", "norm", "none")  # beside last:N
LAST_BLOCKS = re.compile(r"last:([1-9]\d*)")


@dataclass
class TowerOptim:
    """Learning rate and freezing of a tower, relative to the new layers on top of it."""

    lr: float = 1.0  # factor of the learning rate of this tower
    layer_decay: float = 1.0  # additional factor of the rate per block, from the top down
    freeze: float = 0.0  # share of the stage in which the tower is frozen; 1 = the whole stage

    @property
    def frozen_until(self) -> float:
        """Progress at which the training of the tower begins; 1 = never."""
        return self.freeze


@dataclass
class VisionOptim(TowerOptim):
    """Learning rate, freezing and trained part of the image tower."""

    # trained part: full, lora (low-rank updates of the attention, merged at export), bias, norm,
    # last:N (the last N blocks and what follows them), none (frozen for the whole stage)
    tune: str = added("full")
    lora_rank: int = added(8)  # rank of the LoRA matrices (tune=lora)
    lora_alpha: int = added(16)  # LoRA's scale: its update is multiplied by lora_alpha / lora_rank

    @property
    def frozen_until(self) -> float:
        return 1.0 if self.tune == "none" else self.freeze

    @property
    def last_blocks(self) -> int:
        """N of tune=last:N; 0 for the other values."""
        found = LAST_BLOCKS.fullmatch(self.tune)
        return int(found.group(1)) if found else 0

    def validate(self) -> None:
        """Check the settings of the trained part; raises ConfigError."""
        if self.tune not in TUNES and not self.last_blocks:
            raise ConfigError(
                f"optim.vision.tune={self.tune} must be {', '.join(TUNES)} or last:N, for example "
                f"last:4{nearest(self.tune, TUNES)}"
            )
        if self.freeze == 1 and self.tune not in ("full", "none"):
            raise ConfigError(
                f"optim.vision.freeze=1 and tune={self.tune} contradict each other: set "
                "optim.vision.freeze below 1 to train a part of the image tower, or tune=none"
            )
        if self.lora_rank < 1 or self.lora_alpha <= 0:
            raise ConfigError(
                f"optim.vision: lora_rank={self.lora_rank} must be at least 1, and lora_alpha="
                f"{self.lora_alpha} above 0"
            )
        unused = [
            f"{name}={getattr(self, name)}"
            for name in ("lora_rank", "lora_alpha")
            if getattr(self, name) != getattr(VisionOptim, name)
        ]
        if unused and self.tune != "lora":
            raise ConfigError(
                f"optim.vision.{unused[0]} does nothing with optim.vision.tune={self.tune}: set "
                "optim.vision.tune=lora, or remove it"
            )


@dataclass
class OptimConfig:
    """Settings of the optimizer and its schedule; lr = base_lr * global_batch / 256."""

    name: Literal["adamw", "lion"] = "adamw"  # algorithm
    base_lr: float = 1e-3  # peak learning rate per 256 samples of a step
    min_lr: float = 0.0  # final learning rate, as a share of the peak (cosine schedule)
    warmup: float = 0.05  # share of the stage in which the learning rate rises from 0
    weight_decay: float = 0.05  # decoupled decay of matrices, not of biases and norms
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay of both moments
    eps: float = 1e-8  # added to the denominator of AdamW
    logit_scale_lr: float = 1.0  # factor of the learning rate of the logit scale and bias
    vision: VisionOptim = field(default_factory=VisionOptim)
    text: TowerOptim = field(default_factory=TowerOptim)
    clip_grad: float = 1.0  # largest global norm of the gradients; 0 = off

    def validate(self) -> None:
        """Check the settings; raises ConfigError that names the key to change."""
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
                    f"optim.{name}: lr={tower.lr} must be above 0 (set freeze instead), and "
                    f"layer_decay={tower.layer_decay} in (0, 1]"
                )
        self.vision.validate()


@dataclass
class ZeroConfig:
    """Settings of DeepSpeed's ZeRO."""

    # parts divided over processes: 1 optimizer state, 2 gradients too, 3 parameters too; 0 = none
    stage: Literal[0, 1, 2, 3] = 0
    offload: bool = False  # optimizer state (and ZeRO-3 parameters) to CPU memory
    # sum gradients over processes while the backward pass runs (ZeRO 3 always does, ZeRO 1 never)
    overlap: bool = runtime(False)
    # DeepSpeed's own keys, merged into its config: {zero_optimization: {overlap_comm: false}}
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Check the settings; raises ConfigError that names the key to change."""
        if self.offload and self.stage == 0:
            raise ConfigError("zero.offload=true needs zero.stage of 1 to 3")
        if self.overlap and self.stage == 0:
            self.check_own_reduction("zero.overlap=true with zero.stage=0", ", or set zero.stage=2")
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

    def check_own_reduction(self, what: str, way_out: str = "") -> None:
        """Raise ConfigError for a key of DeepSpeed's reduction, which a setting replaces."""
        for key in ("prescale_gradients", "gradient_predivide_factor"):
            if key in self.deepspeed:
                raise ConfigError(
                    f"{what} does not know zero.deepspeed.{key}: remove one of them{way_out}"
                )


@dataclass
class TrainConfig:
    """Length, precision, logging and checkpoints of a stage."""

    samples: int = 0  # samples seen in the stage, over all blocks
    # instead of samples: passes over the source that takes the most steps for one pass; a run
    # records the samples that follow from its data
    epochs: float | None = added(None)
    precision: Precision = "fp32"  # bf16 = autocast over fp32 weights
    compile: bool = runtime(False)  # torch.compile the transformer blocks
    # samples per device and forward pass; 0 = the whole block of the rank; a number, or steps as
    # in data.resolution
    micro_batch: Any = runtime(0)
    # steps between two lines of metrics; null = 10, or fewer in a stage of less than 200 steps;
    # 0 = at the end only
    log_every: int | None = runtime(None)
    save_every: int = runtime(200)  # steps between two checkpoints; 0 = at the end only
    # write checkpoints while training goes on, from copies in the host's memory
    save_in_background: bool = runtime(False)
    keep_checkpoints: int = runtime(2)  # number of newest checkpoints to keep
    mirror: str = runtime("")  # a URL: checkpoints and the artifact are copied to URL/STAGE/
    keep_every: int = runtime(0)  # also keep checkpoints at multiples of this step; 0 = none
    keep_best: int = runtime(0)  # also keep this many checkpoints with the best `best_by`
    best_by: str = runtime("val/loss")  # a metric of metrics.jsonl at the saved step
    best_is: Literal["lowest", "highest"] = runtime("lowest")  # best value of `best_by`
    validate_every: int = runtime(0)  # steps between two validations; 0 = at the end only
    device: Literal["auto", "cpu", "cuda"] = runtime("auto")  # auto = a GPU if there is one
    tensorboard: bool = runtime(True)  # write tensorboard files, too, beside metrics.jsonl
    wandb: str = runtime("")  # name of a Weights & Biases project; "" = off
    # action if a loss is more than `spike` standard deviations above its running mean
    spikes: Literal["ignore", "warn", "skip"] = "warn"
    spike: float = 6.0  # standard deviations that make a loss a spike
    hang_seconds: float = runtime(1200.0)  # a run ends if a step takes longer; 0 = no limit
    ema: float = 0.0  # decay per step of averaged weights, e.g. 0.9999; 0 = no average
    export: Literal["last", "ema"] = "last"  # weights of the artifact

    def validate(self) -> None:
        """Check the settings; raises ConfigError that names the key to change."""
        self._validate_length()
        if self.spike <= 0 or self.hang_seconds < 0:
            raise ConfigError(
                f"train.spike={self.spike} must be above 0, and train.hang_seconds="
                f"{self.hang_seconds} 0 (off) or more"
            )
        if not 0 <= self.ema < 1:
            raise ConfigError(f"train.ema={self.ema} must be in [0, 1), e.g. 0.9999")
        if self.export == "ema" and not self.ema:
            raise ConfigError(
                "train.export=ema needs averaged weights: set train.ema, e.g. to 0.9999"
            )
        for name in ("log_every", "save_every", "validate_every", "keep_every", "keep_best"):
            if (getattr(self, name) or 0) < 0:
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
                f"train.validate_every={self.validate_every} steps: set train.save_every="
                f"{self.save_every} to a multiple of it"
            )
        schedule.check(self.micro_batch, "train.micro_batch", least=0)

    def _validate_length(self) -> None:
        if self.epochs is None:
            if self.samples < 1:
                raise ConfigError(
                    "train.samples is not set: set the number of samples to see in this stage, or "
                    "train.epochs, the passes over its data"
                )
            return
        if self.samples:
            raise ConfigError(
                f"train.samples={self.samples} and train.epochs={self.epochs:g} both set the "
                "length of the stage: remove one of them"
            )
        if not 0 < self.epochs < math.inf:
            raise ConfigError(f"train.epochs={self.epochs} must be a number above 0")


@dataclass
class DebugConfig:
    """Settings for debugging."""

    overfit_batch: bool = False  # train on the samples of the first step only, without augmentation
