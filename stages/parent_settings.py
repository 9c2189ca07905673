"""Settings that a run takes from its parents: of released weights, or of a clip artifact.

Older runs took none. So a run takes them only where it could not begin before: from an artifact of
`xray import`, or, in the clip stage, if it names no text tower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any

from xray.artifacts.artifact import find_manifest
from xray.artifacts.offers import JOINT, SENTENCES, VISION, offers_of
from xray.config import ModelConfig
from xray.config.schedule import value_at
from xray.errors import ArtifactError

Manifest = Mapping[str, Any]
# Settings of a run's backbone that do not belong to the weights.
OF_THE_RUN = ("pretrained", "grad_checkpointing", "drop_path", "keep_rate_levels", "keep_rate_span")
# Keys of each section. Of the text tower's structure and of how pictures are prepared, a run takes
# its parent's in any case (xray.artifacts.language_model, xray.training.open_settings).
VISION_KEYS: dict[str, Sequence[str]] = {
    "model": [item.name for item in fields(ModelConfig) if item.name not in OF_THE_RUN],
}
JOINT_KEYS: dict[str, Sequence[str]] = {
    "text": ("max_length",),
    "clip": ("embed_dim", "text_head", "image_head", "head_bias", "adapter_blocks", "loss",
             "logit_scale_max", "matryoshka"),
}  # fmt: skip


def of_imported(init_from: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the backbone and the images of an imported parent, {} without one."""
    found = [own for own in _manifests(init_from) if "imported" in own]
    found = [own for own in found if VISION in offers_of(own)]
    return _taken(found[0], VISION_KEYS) if found else {}


def of_clip(init_from: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the parent clip artifact; {} if a text artifact is a parent, too."""
    manifests = _manifests(init_from)
    joint = [own for own in manifests if JOINT in offers_of(own)]
    if len(joint) != 1 or any(SENTENCES in offers_of(own) for own in manifests):
        return {}
    layer = _taken(joint[0], VISION_KEYS | JOINT_KEYS)
    layer["clip"]["heads"] = "parent"
    return layer


def _taken(manifest: Manifest, keys: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    theirs = manifest["config"]
    layer: dict[str, Any] = {
        name: {key: theirs[name][key] for key in own if key in theirs.get(name, {})}
        for name, own in keys.items()
    }
    layer["data"] = {"resolution": value_at(theirs["data"]["resolution"], 1.0)}
    return layer


def _manifests(init_from: Sequence[str]) -> list[Manifest]:
    """Read the parents that exist; the run itself says what is wrong with others."""
    manifests: list[Manifest] = []
    for path in init_from:
        with suppress(ArtifactError):
            manifests.append(find_manifest(path)[2])
    return manifests
