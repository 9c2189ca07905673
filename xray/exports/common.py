"""Shared parts of all exports: test images, comparison of features, weights for images."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from xray.artifacts.artifact import Artifact, save_tensors
from xray.artifacts.encoders import VisionEncoder, vision_encoder
from xray.artifacts.offers import VISION
from xray.artifacts.shards import SHARD
from xray.errors import ArtifactError
from xray.models.token_reduction import KeepRate

CAPTIONS = (
    "a dog on a beach",
    "Two people ride bicycles along a river, in the rain.",
    "red",
    "a very long caption " * 40,  # longer than any text tower reads: truncated
)
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, which transformers writes


@dataclass
class Export:
    """Result of an export."""

    library: str
    code: list[str]  # lines of Python that load the export
    # output -> largest absolute difference between its normalised features and ours
    differences: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def vision_of(artifact: Artifact, what: str) -> VisionEncoder:
    """Load the vision side of an artifact; raises ArtifactError if it has no backbone."""
    if VISION not in artifact.offers:
        raise ArtifactError(
            f"{artifact.origin} is of stage {artifact.stage}: it has no backbone for {what}"
        )
    return vision_encoder(artifact)


def sample_images(side: int, frames: int = 1, count: int = 4) -> Tensor:
    """Make smooth and noisy images or clips [B, T, 3, S, S] uint8, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count * frames, 3, 5, 5, generator=draw)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
    noise = torch.rand(count * frames, 3, side, side, generator=draw) - 0.5
    pixels = (255 * (smooth + 0.3 * noise)).clamp(0, 255).to(torch.uint8)
    return pixels.unflatten(0, (count, frames))


def ours(encoder: VisionEncoder, pixels: Tensor, keep_rate: KeepRate) -> Tensor:
    """Compute our normalised CLS features [B, D] at a keep rate."""
    encoder.keep_rate = keep_rate
    return encoder.features(pixels)


def difference(theirs: Tensor, features: Tensor) -> float:
    """Normalise their features; return the largest absolute difference from ours."""
    return (F.normalize(theirs.float(), dim=-1) - features).abs().max().item()


def image_state(encoder: VisionEncoder, side: int) -> dict[str, Tensor]:
    """Return the backbone's weights for still images, by timm's names.

    Kernels are summed over time; position embeddings are resampled to `side`.
    """
    vision = encoder.vision
    state = {k: v.detach().clone() for k, v in vision.state_dict().items()}
    for name in ("pos_temporal", "frame_query"):
        state.pop(name, None)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].sum(dim=2)
    if "pos_embed" in state:
        height, width = vision.patch_size
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"],
            new_size=[side // height, side // width],
            old_size=list(vision.grid),
            num_prefix_tokens=vision.position_prefix,
            antialias=vision.antialias,
        )
    return state


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the MLP ratio whose product with the width, rounded down, is `hidden`."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else (hidden + 0.5) / width


def save_sharded(folder: Path, state: dict[str, Tensor]) -> None:
    """Write model.safetensors, or several files of at most 5 GB and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
    for name, tensors in plan.filename_to_tensors.items():
        save_tensors(folder / name, {tensor: state[tensor] for tensor in tensors})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        save_json(folder / "model.safetensors.index.json", index)


def is_present(module: nn.Module | None) -> bool:
    """Check if an optional module is present."""
    return module is not None and not isinstance(module, nn.Identity)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
