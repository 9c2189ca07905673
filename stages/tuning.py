"""Trained parameters of a run: frozen towers, and the part of the image tower that is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from xray.config import OptimConfig, VisionOptim
from xray.errors import ConfigError
from xray.models.backbone import VisionBackbone
from xray.models.lora import add_lora, is_lora
from xray.optim import depth_of, layer_of


def set_trained(module: nn.Module, config: OptimConfig) -> None:
    """Choose the parameters that a run trains, and add LoRA if `optim.vision.tune` says so.

    Towers that are frozen for the whole stage are not trained. Raises ConfigError for more blocks
    than the image tower has.
    """
    towers: Any = getattr(module, "towers", {})
    for name, tower in towers.items():
        if getattr(config, name).frozen_until >= 1:
            tower.requires_grad_(False)
        elif name == "vision" and config.vision.tune != "full":
            _tune(tower, config.vision)


def _tune(tower: VisionBackbone, config: VisionOptim) -> None:
    """Train a part of the tower: LoRA, biases, norms, or the last blocks and what follows them.

    With the first three, so is what the tower has beside timm's model: released weights lack it.
    With the last blocks it is not, so that no gradient passes through the blocks below.
    """
    if config.tune == "lora":
        add_lora(tower, config.lora_rank, config.lora_alpha)
    depth, blocks = depth_of(tower), config.last_blocks
    if blocks > depth:
        raise ConfigError(
            f"optim.vision.tune={config.tune}: the image tower has only {depth} blocks; set "
            "optim.vision.tune=full to train all of them, or fewer"
        )
    added = {"pos_temporal", "frame_query"} | ({"cls_token"} if tower.cls_added else set())
    for name, parameter in tower.named_parameters():
        if blocks:
            trained = layer_of(name, depth) > depth - blocks
        else:
            trained = name in added or _is_of(config.tune, name)
        parameter.requires_grad_(trained)


def _is_of(tune: str, name: str) -> bool:
    """Tell whether a parameter is a bias, of a norm, or of LoRA, whichever `tune` names."""
    if tune == "norm":
        return any("norm" in part for part in name.split("."))
    return is_lora(name) if tune == "lora" else name.endswith("bias")


def reach(tower: nn.Module) -> float:
    """Return the share of a tower's blocks that the gradient of its trained parameters passes."""
    depth = depth_of(tower)
    trained = [layer_of(n, depth) for n, p in tower.named_parameters() if p.requires_grad]
    if not trained or not depth:
        return float(bool(trained))
    return (depth + 1 - max(1, min(trained))) / depth


def parameter_counts(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """Count the trained and all parameters of each tower, and of the `other` layers.

    values: the parameters by name, whole. Those of the module may be divided over ranks.
    """
    counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"trained": 0, "all": 0})
    for name, parameter in module.named_parameters():
        part = counts[name.split(".")[1] if name.startswith("towers.") else "other"]
        part["all"] += values[name].numel()
        part["trained"] += parameter.requires_grad * values[name].numel()
    return {name: counts[name] for name in sorted(counts, key="other".__eq__)}


def in_words(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Write parameter counts as one line."""
    parts = [
        f"{name} {own['trained']:,} of {own['all']:,} ({100 * own['trained'] / own['all']:.3g} %)"
        for name, own in counts.items()
    ]
    return ", ".join(parts)
