"""Parameter groups, optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from timm.optim import Lion
from torch import nn

from xray.config import OptimConfig, TowerOptim, ZeroConfig

ALONE = ("logit_scale", "logit_bias")  # parameters in a separate group
SLOTS = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}  # moments of a parameter
# Parameters of a tower's stem, and of its blocks.
BOTTOM = re.compile(r"embed|cls_token|reg_token|pos_temporal|norm_pre|wte|wpe|shared")
BLOCK = re.compile(r"(?:^|\.)(?:blocks?|layers?|h)\.(\d+)\.")


def lr_at(progress: float, config: OptimConfig, global_batch: int) -> float:
    """Return the lr: a linear warm-up to base_lr * global_batch / 256, then a half cosine."""
    peak = config.base_lr * global_batch / 256
    if progress < config.warmup:
        return peak * progress / config.warmup
    share = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    floor = peak * config.min_lr
    return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return trained parameters by (lr_scale, freeze, weight_decay); logit scale and bias apart.

    Weight decay leaves out 1-d parameters and those in a tower's `no_weight_decay`. A tower's lr
    falls by its `layer_decay` per block from the top; its stem is one layer below the first block.
    """
    towers: Any = getattr(module, "towers", {})
    settings = {name: getattr(config, name) for name in towers}
    depths = {name: depth_of(tower) for name, tower in towers.items()}
    exempt = {
        f"towers.{name}.{own}"
        for name, tower in towers.items()
        for own in getattr(tower, "no_weight_decay", set)()
    }
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        tower = name.split(".")[1] if name.startswith("towers.") else ""
        own = settings[tower] if tower else TowerOptim()
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in exempt and not name.endswith("mask_token")
        below = depths[tower] + 1 - layer_of(name, depths[tower]) if tower else 0
        lr_scale = config.logit_scale_lr if name in ALONE else own.lr * own.layer_decay**below
        weight_decay = config.weight_decay if decayed else 0.0
        key = (name in ALONE, lr_scale, own.freeze, weight_decay)
        options = {"lr_scale": lr_scale, "freeze": own.freeze, "weight_decay": weight_decay}
        groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    return list(groups.values())


def depth_of(tower: nn.Module) -> int:
    """Return the number of blocks of a tower."""
    return 1 + max((_block(name) for name, _ in tower.named_parameters()), default=-1)


def _block(name: str) -> int:
    match = BLOCK.search(name)
    return int(match.group(1)) if match else -1


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer: 0 is the stem, 1 the first block, depth + 1 all after them."""
    block = _block(name)
    return block + 1 if block >= 0 else 0 if BOTTOM.search(name) else depth + 1


def reduce_bucket(zero: ZeroConfig, trained: int) -> int:
    """Return the number of values in a bucket of gradients that are reduced together.

    DeepSpeed allocates the bucket whole, and its default is 5e8 values (2 GB) for any model. With
    `zero.overlap` several buckets are filled in a backward pass; 25e6 values use the network well.
    """
    given = zero.deepspeed.get("zero_optimization", {})
    default = max(1, min(25_000_000, trained // 8)) if zero.overlap else min(500_000_000, trained)
    return int(given.get("reduce_bucket_size", default))


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Create AdamW (torch) or Lion (timm); `set_lr` sets the lr before every step."""
    betas = (config.betas[0], config.betas[1])
    if config.name == "lion":
        return Lion(groups, lr=0.0, betas=betas)
    # fused: one pass over memory, 3 to 6 times faster on a CPU
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def set_lr(groups: list[dict[str, Any]], lr: float, progress: float = 1.0) -> None:
    """Set each group's lr to lr times its scale, or to 0 while the group is frozen."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"] if progress >= group["freeze"] else 0.0
