"""Loading of weights into the backbone, strict by name, with a few logged adaptations."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.hub import hub
from xray.models.mae_checkpoints import clip_table, published, read_weights
from xray.models.patch_embed import inflate
from xray.models.timm_vit import timm_kwargs

if TYPE_CHECKING:
    from xray.models.backbone import VisionBackbone

log = logging.getLogger("xray")
FOLDER = "local-dir:"
HUBS = ("hf-hub:", FOLDER)  # prefixes that timm defines
HEADS = ("head.", "head_drop.")  # parts of timm's models that the backbone lacks


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Select the tensors under a prefix and remove it from their names."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_pretrained(backbone: VisionBackbone, config: ModelConfig) -> None:
    """Load the weights that `model.pretrained` names.

    It is `timm` (the default weights of `model.name`), a hub name or a file: .safetensors, or a
    torch file of plain tensors, by timm's names or in the layouts of MAE and VideoMAE. Raises
    ConfigError if the weights are not available and ArtifactError if they do not fit.
    """
    if not config.pretrained:
        return
    source = config.pretrained
    from_timm = source == "timm" or source.startswith(HUBS)
    state = _from_timm(config) if from_timm else _from_file(source, backbone)
    unused = HEADS if backbone.attn_pool is not None else (*HEADS, "attn_pool.")
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    current = backbone.state_dict()
    for norm, other in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        # timm calls the final norm fc_norm in models that pool before it
        if f"{norm}weight" in current and f"{norm}weight" not in state:
            state = {_renamed(key, other, norm): value for key, value in state.items()}
    norms = ("norm.", "fc_norm.")
    state = {k: v for k, v in state.items() if k in current or not k.startswith(norms)}
    load_adapted(backbone, state, f"model.pretrained={source}")


def _from_timm(config: ModelConfig) -> dict[str, Tensor]:
    name = config.name if config.pretrained == "timm" else config.pretrained
    instead = "download its model.safetensors, and set model.pretrained to that file"
    with contextlib.nullcontext(str) if name.startswith(FOLDER) else hub(instead) as explain:
        try:
            return timm.create_model(name, pretrained=True, **timm_kwargs(config)).state_dict()
        except Exception as error:  # no network, unknown name, wrong sizes: timm raises many types
            raise ConfigError(
                f"timm finds no weights for model.pretrained={config.pretrained} ({name}): "
                f"{explain(error)}"
            ) from error


def _from_file(path: str, backbone: VisionBackbone) -> dict[str, Tensor]:
    origin = f"model.pretrained={path}"
    if not Path(path).is_file():
        raise ConfigError(
            f"{origin} is not a file: set it to a .safetensors file, `timm`, or a hub name such as "
            "hf-hub:timm/vit_base_patch16_224.mae"
        )
    found = published(read_weights(Path(path), origin), origin)
    if not found.sinusoid:
        return found.backbone
    return {**found.backbone, **_sinusoids(backbone, origin)}


def _sinusoids(backbone: VisionBackbone, origin: str) -> dict[str, Tensor]:
    """Return VideoMAE's fixed positions for the backbone's own size, by our names."""
    clip, slots = backbone.pos_temporal, 1
    if clip is not None:
        if clip.ndim == 3:
            raise ConfigError(
                f"{origin} is of VideoMAE, whose positions are of each token of a clip: set "
                "model.clip_positions=tokens"
            )
        slots += clip.shape[1]
    first, later = clip_table((slots, *backbone.grid), backbone.embed_dim)
    table = {"pos_embed": F.pad(first, (0, 0, backbone.position_prefix, 0))}
    return table if clip is None else {**table, "pos_temporal": later}


def _renamed(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


def load_adapted(backbone: VisionBackbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a backbone's weights, strictly by name.

    Three adaptations are made and logged: a 2-d stem is inflated, position tables are resized, and
    parameters that timm's models do not have (an added CLS token, clip positions, frame pooling)
    keep their initial values if absent.

    origin: source of the weights, for messages. Raises ArtifactError with the first difference.
    """
    state = dict(state)
    current = backbone.state_dict()
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4:
        state["patch_embed.proj.weight"] = inflate(stem, backbone.tubelet)
    table = state.get("pos_embed")
    if table is not None and "pos_embed" in current and table.shape != current["pos_embed"].shape:
        positions = table.shape[1] - backbone.position_prefix
        if math.isqrt(max(0, positions)) ** 2 != positions:
            raise ArtifactError(
                f"{origin}: its {positions} positions are not a square grid: set data.resolution "
                "to the resolution that it was trained with"
            )
        state["pos_embed"] = resample_abs_pos_embed(
            table,
            new_size=list(backbone.grid),
            num_prefix_tokens=backbone.position_prefix,
            antialias=backbone.antialias,
        )
        log.info("%s: position embedding resized to %s", origin, backbone.grid)
    _adapt_time(state, backbone, origin)
    added = {"frame_query"} | ({"cls_token"} if backbone.cls_added else set())
    for key in added:
        if key in current and key not in state:
            state[key] = current[key]
            log.info("%s has no %s: it keeps its initial value", origin, key)
    if "frame_query" not in current and state.pop("frame_query", None) is not None:
        log.info("%s: frame_query is dropped (model.video=%s)", origin, backbone.video)
    problems = [f"{key} is missing" for key in current if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in current]
    problems += [
        f"{key} has shape {list(state[key].shape)} instead of {list(current[key].shape)}"
        for key in current
        if key in state and state[key].shape != current[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"{origin} has the weights of another model: {problems[0]}{more}; "
            "set model.name, model.kwargs and model.pool to the values that it was trained with"
        )
    backbone.load_state_dict(state)


def _adapt_time(state: dict[str, Tensor], backbone: VisionBackbone, origin: str) -> None:
    """Resize clip positions, set absent ones to zero, drop those that the model lacks."""
    loaded, target = state.pop("pos_temporal", None), backbone.pos_temporal
    if target is None:
        if loaded is not None:
            log.info("%s: clip positions dropped", origin)
        return
    if loaded is None:
        state["pos_temporal"] = torch.zeros_like(target)
        return
    if loaded.shape != target.shape and loaded.shape[-1] == target.shape[-1]:
        slots, side = target.shape[1] + 1, math.isqrt(loaded.shape[2])
        grids = (side, side), backbone.grid
        resized = resample_clip(loaded, slots, *grids, backbone.antialias)[:, 1:]
        log.info("%s: clip positions resized to %d slots", origin, slots)
        # one for each token from one for each slot, or the other way round
        resized = resized.mean(dim=2) if target.ndim == 3 else resized.expand_as(target)
        loaded = resized.contiguous()
    state["pos_temporal"] = loaded


def resample_clip(
    table: Tensor, slots: int, old: tuple[int, int], new: tuple[int, int], antialias: bool
) -> Tensor:
    """Resample clip positions [1, s, D] or [1, s, n, D] to [1, slots, 1 or n', D].

    old, new: grids (h, w) of the n and n' places. See `resample_time`.
    """
    if table.ndim == 3:
        return resample_time(table, slots)[:, :, None]
    width = table.shape[3]
    if old != new:  # the time slots of a place as one long vector
        flat = table.transpose(1, 2).flatten(2)
        flat = resample_abs_pos_embed(
            flat, list(new), list(old), num_prefix_tokens=0, antialias=antialias
        )
        table = flat.unflatten(2, (-1, width)).transpose(1, 2)
    return resample_time(table.flatten(2), slots).unflatten(2, (-1, width))


def resample_time(pos_temporal: Tensor, slots: int) -> Tensor:
    """Resample clip positions linearly in time, [1, s, D] -> [1, slots, D].

    The input has the positions after the first slot; the output begins with the first slot's zero.
    The first and last slots of input and output coincide.
    """
    table = F.pad(pos_temporal, (0, 0, 1, 0))
    if slots == table.shape[1]:
        return table
    resized = F.interpolate(table.transpose(1, 2), size=slots, mode="linear", align_corners=True)
    return resized.transpose(1, 2)
