"""Heads of the clip artifact that a clip run continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.base import Parents
from xray.artifacts.artifact import Artifact
from xray.artifacts.offers import JOINT
from xray.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

HEADS = ("vision_projection.", "text_adapter.", "logit_scale", "logit_bias")


def joint_parent(parents: Parents) -> Artifact:
    """Return the clip artifact that a run continues; raises ConfigError if there is none."""
    if parents.vision is None or JOINT not in parents.vision.offers:
        raise ConfigError(
            "clip.heads=parent needs a clip artifact to start from: give one with --init-from, or "
            "set clip.heads=new"
        )
    return parents.vision


def load_heads(module: nn.Module, parent: Artifact) -> None:
    """Load the projections, logit scale and bias of a clip artifact.

    A bias of the logits that one of both losses lacks is left out. Raises ConfigError for heads of
    another shape.
    """
    stored = parent.load("head")
    own = {name: t for name, t in module.state_dict().items() if name.startswith(HEADS)}
    if "logit_bias" in own and "logit_bias" not in stored:
        stored["logit_bias"] = own["logit_bias"]
    stored = {k: v for k, v in stored.items() if k != "logit_bias" or k in own}
    shapes = [{name: list(t.shape) for name, t in state.items()} for state in (own, stored)]
    for name in sorted({*own, *stored}):
        if shapes[0].get(name) != shapes[1].get(name):
            raise ConfigError(
                f"clip.heads=parent: {name} of {parent.path} is {shapes[1].get(name, 'missing')}, "
                f"the run's is {shapes[0].get(name, 'missing')}: leave out clip.embed_dim, "
                "clip.text_head, clip.image_head and clip.adapter_blocks, or set clip.heads=new"
            )
    module.load_state_dict(stored, strict=False)
