"""Parts of a released model in our form, which become an artifact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xray.artifacts.manifest_config import JointHead
from xray.config import DataConfig, ModelConfig, TextConfig
from xray.config.model import ImageHead
from xray.errors import ArtifactError
from xray.exports.names.table import Renamed
from xray.imports.source import Source

log = logging.getLogger("xray")
State = dict[str, Tensor]
Naming = Callable[[str], str]  # from our name of a tensor to that in the source's files
# Models of timm whose sizes are left out of model.kwargs, with the epsilon of their layer norms.
CLIP_VIT, PLAIN_VIT = "vit_base_patch16_clip_224", "vit_base_patch16_224"
DINOV2_GIANT = "vit_giant_patch14_dinov2"  # the only one with a SwiGLU MLP: all sizes are given
SIGLIP_VIT, DINOV3_VIT = "vit_base_patch16_siglip_224", "vit_base_patch16_dinov3_qkvb"
EPS = {CLIP_VIT: 1e-5, PLAIN_VIT: 1e-6, SIGLIP_VIT: 1e-6, DINOV3_VIT: 1e-5, DINOV2_GIANT: 1e-6}
SIZES = {
    "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0,
    "act_layer": "gelu", "init_values": None, "pre_norm": True, "qkv_bias": True, "reg_tokens": 0,
    # of DINOv3
    "num_reg_tokens": 4, "rope_temperature": 100, "swiglu_mlp": False, "swiglu_align_to": 0,
}  # fmt: skip
STEM = "patch_embed.proj.weight"
# Activations by transformers' names, which timm calls differently.
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass
class Vision:
    """A backbone: its settings, how its images are prepared, and its weights by timm's names.

    clips: the weights have seen clips; the stem then has kernels over time.
    """

    model: ModelConfig
    data: DataConfig
    state: State
    theirs: Naming = str
    clips: bool = False


@dataclass
class Text:
    """A text tower: its settings, a folder with its config and tokenizer, and its weights."""

    config: TextConfig
    folder: Path
    state: State  # by the names of xray.models.text_tower.TextTower
    theirs: Naming = str


@dataclass
class Imported:
    """A released model in our form.

    joint: sizes of the joint space, None without one. head: its projections, logit scale and bias.
    theirs: names of the head's tensors.
    """

    library: str
    vision: Vision | None = None
    text: Text | None = None
    joint: JointHead | None = None
    head: State = field(default_factory=dict)
    theirs: Naming = str


class Family(NamedTuple):
    """A family of released models.

    fits: tells by a folder's files if it is one. read: reads it; its second argument is an empty
    folder for the config and the tokenizer of the text tower.
    """

    name: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, Path], Imported]


def vit(name: str, eps: float, pool: Any = "cls", **sizes: Any) -> ModelConfig:
    """Return the settings of a plain ViT. name: of EPS. eps: of its layer norms."""
    own = {k: v for k, v in sizes.items() if name == DINOV2_GIANT or v != SIZES[k]}
    norm_eps = None if eps == EPS[name] else eps
    return ModelConfig(name=name, kwargs=own, norm_eps=norm_eps, pool=pool)


def activation(source: Source, name: str) -> str:
    """Return timm's name of an activation of transformers; raises ArtifactError for another."""
    if name not in ACTIVATIONS:
        raise ArtifactError(f"{source}: the activation {name} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def square(source: Source, size: Any) -> int:
    """Return the side of images in pixels; raises ArtifactError unless they are square."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ArtifactError(f"{source}: images of {list(size)} pixels are not square")
    return int(sides.pop())


def side_of(source: Source, size: Any, state: Mapping[str, Tensor]) -> int:
    """Return the side of images in pixels, rounded down to a multiple of the patch size.

    size: what the source states; SigLIP's patches of 14 leave 6 of 384 pixels out. state: by timm's
    names.
    """
    side, kernel = square(source, size), state.get(STEM)
    patch = 1 if kernel is None else kernel.shape[-1]
    if side % patch:
        log.warning("%s: images of %d pixels have patches of %d: their side becomes %d",
                    source, side, patch, side // patch * patch)  # fmt: skip
    return side // patch * patch


def complete(source: Source, what: str, renamed: Renamed, prefix: str = "") -> State:
    """Return renamed tensors; raises ArtifactError for one that our model has no place for.

    prefix: what was removed from the names in the source's files.
    """
    for names, problem in (
        (renamed.missing, "does not fit its config: {} is missing"),
        (renamed.unknown, "has weights that our model has no place for: {}"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArtifactError(f"{source}: {what} {problem.format(prefix + names[0])}{more}")
    return renamed.state


def check_fit(
    source: Source, what: str, module: nn.Module, state: Mapping[str, Tensor], theirs: Naming
) -> None:
    """Raise ArtifactError with the first difference of a module's names and shapes to a state's."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    problems = [f"{theirs(name)} is missing" for name in own if name not in given]
    problems += [f"{theirs(name)} is not a part of it" for name in given if name not in own]
    problems += [
        f"{theirs(name)} has the shape {list(given[name])}, not {list(own[name])}"
        for name in own
        if name in given and given[name] != own[name]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"{source}: {what} does not fit its config: {problems[0]}{more}")


def linear_head(size: int, image_head: ImageHead = "linear", bias: bool = False) -> JointHead:
    """Return the sizes of a joint space whose heads are linear maps."""
    return JointHead(size, 0, "linear", image_head, bias)


def flat(state: Mapping[str, Tensor], *names: str) -> State:
    """Select scalars, each as [1]."""
    return {name: state[name].reshape(1).clone() for name in names if name in state}


def zeros(like: Tensor) -> Tensor:
    """Return a bias of zeros for a weight whose first dimension is the output."""
    return torch.zeros(len(like))
