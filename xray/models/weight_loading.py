"""Loading weights into the backbone: strict by name, with a few adaptations, each logged."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.patch_embed import inflate

if TYPE_CHECKING:
    from xray.models.backbone import VisionBackbone

log = logging.getLogger("xray")
HUBS = ("hf-hub:", "local-dir:")  # timm's own prefixes
HEADS = ("head.", "head_drop.", "attn_pool.")  # of timm's models; the backbone has none


def load_pretrained(backbone: VisionBackbone, config: ModelConfig) -> None:
    """Load timm's weights: `timm` (of the name's tag), a hub name or a .safetensors file."""
    if not config.pretrained:
        return
    source = config.pretrained
    state = (
        _from_timm(config) if source == "timm" or source.startswith(HUBS) else _from_file(source)
    )
    state = {key: value for key, value in state.items() if not key.startswith(HEADS)}
    own = backbone.state_dict()
    for norm, other in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{norm}weight" in own and f"{norm}weight" not in state:  # pooled before, or after, it
            state = {_renamed(key, other, norm): value for key, value in state.items()}
    state = {k: v for k, v in state.items() if k in own or not k.startswith(("norm.", "fc_norm."))}
    load_adapted(backbone, state, f"model.pretrained={source}")


def _from_timm(config: ModelConfig) -> dict[str, Tensor]:
    name = config.name if config.pretrained == "timm" else config.pretrained
    try:
        return timm.create_model(name, pretrained=True, **config.kwargs).state_dict()
    except Exception as error:  # no network, no such name, other sizes: many kinds
        raise ConfigError(
            f"timm finds no weights for model.pretrained={config.pretrained} ({name}): {error}"
        ) from error


def _from_file(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise ConfigError(
            f"model.pretrained={path} is no file: give a .safetensors file, `timm`, or a hub name "
            "such as hf-hub:timm/vit_base_patch16_224.mae"
        )
    try:
        return load_file(path)
    except Exception as error:  # safetensors has errors of its own
        raise ArtifactError(
            f"model.pretrained={path} is no readable safetensors: {error}"
        ) from error


def _renamed(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def load_adapted(backbone: VisionBackbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a backbone's weights strictly by name.

    Adapted, and logged: a 2-d stem is inflated, position tables are resized, and what timm's models
    do not have (an added CLS, clip positions, frame pooling) keeps its initial value if absent.
    Raises ArtifactError naming what differs.
    """
    state = dict(state)
    own = backbone.state_dict()
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4:
        state["patch_embed.proj.weight"] = inflate(stem, backbone.tubelet)
    table = state.get("pos_embed")
    if table is not None and table.shape != own["pos_embed"].shape:
        places = table.shape[1] - backbone.position_prefix
        if math.isqrt(max(0, places)) ** 2 != places:
            raise ArtifactError(
                f"{origin}: its {places} positions are no square grid: give VisionBackbone the "
                "resolution it was made with"
            )
        state["pos_embed"] = resample_abs_pos_embed(
            table, new_size=list(backbone.grid), num_prefix_tokens=backbone.position_prefix
        )
        log.info("%s: position embedding resized to %s", origin, backbone.grid)
    _adapt_time(state, own, origin)
    added = {"frame_query"} | ({"cls_token"} if backbone.cls_added else set())
    for key in added:
        if key in own and key not in state:
            state[key] = own[key]
            log.info("%s has no %s: it starts anew", origin, key)
    if "frame_query" not in own and state.pop("frame_query", None) is not None:
        log.info("%s: frame_query is dropped (model.video=%s)", origin, backbone.video)
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has an unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, the model's {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"{origin} is of another model: {problems[0]}{more}; "
            "set model.name and model.kwargs to what it was trained with"
        )
    backbone.load_state_dict(state)


def _adapt_time(state: dict[str, Tensor], own: Mapping[str, Tensor], origin: str) -> None:
    """Fit the clip positions: resized in time, zero if absent, dropped where there are none."""
    given, wanted = state.pop("pos_temporal", None), own.get("pos_temporal")
    if wanted is None:
        if given is not None:
            log.info("%s: clip positions dropped", origin)
        return
    if given is None:
        state["pos_temporal"] = torch.zeros_like(wanted)
        return
    if given.shape[1] != wanted.shape[1]:
        given = resample_time(given, wanted.shape[1] + 1)[:, 1:]
        log.info("%s: clip positions resized to %d", origin, wanted.shape[1] + 1)
    state["pos_temporal"] = given


def resample_time(pos_temporal: Tensor, slots: int) -> Tensor:
    """Clip positions after the first, [1, s, D] -> [1, slots, D] with the zero of the first slot.

    Linear, first slot on first and last on last.
    """
    table = F.pad(pos_temporal, (0, 0, 1, 0))
    if slots == table.shape[1]:
        return table
    resized = F.interpolate(table.transpose(1, 2), size=slots, mode="linear", align_corners=True)
    return resized.transpose(1, 2)
