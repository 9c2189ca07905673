"""Parameter groups, optimizers, and schedules as pure functions of samples seen."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from timm.optim import Lion
from torch import nn

from xray.config import OptimConfig

VISION = "towers.vision."


def lr_at(progress: float, config: OptimConfig, global_batch: int) -> float:
    """Linear warm-up, then a half cosine to min_lr; the peak is base_lr * global_batch / 256."""
    peak = config.base_lr * global_batch / 256
    if progress < config.warmup:
        return peak * progress / config.warmup
    share = min(1.0, (progress - config.warmup) / (1 - config.warmup))
    floor = peak * config.min_lr
    return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters by (lr_scale, weight_decay); `logit_scale` alone in its group.

    1-d parameters and those a tower's `no_weight_decay` names are not decayed. The vision tower's
    lr falls by `layer_decay` per block from the top; its stem is one layer below the first block.
    """
    vision = getattr(module, "towers", {})
    depth = len(vision["vision"].blocks) if "vision" in vision else 0
    exempt = set(vision["vision"].no_weight_decay()) if depth else set()
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = name.removeprefix(VISION)
        decayed = parameter.ndim > 1 and plain not in exempt and not name.endswith("mask_token")
        lr_scale = _layer_scale(plain, depth, config) if name.startswith(VISION) else 1.0
        weight_decay = config.weight_decay if decayed else 0.0
        key = (name == "logit_scale", lr_scale, weight_decay)
        group = groups.setdefault(
            key, {"params": [], "lr_scale": lr_scale, "weight_decay": weight_decay}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer_scale(name: str, depth: int, config: OptimConfig) -> float:
    match = re.match(r"blocks\.(\d+)\.", name)
    top = depth + 1 if name.startswith(("norm.", "fc_norm.", "frame_query")) else 0
    layer = int(match.group(1)) + 1 if match else top
    return config.layer_decay ** (depth + 1 - layer)


def make_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (torch's) or Lion (timm's); the lr is set before every step."""
    betas = (config.betas[0], config.betas[1])
    if config.name == "lion":
        return Lion(groups, lr=0.0, betas=betas)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps)


def set_lr(groups: list[dict[str, Any]], lr: float) -> None:
    """lr times each group's own scale."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
