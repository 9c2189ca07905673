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
from xray.artifacts.offers import IMPORTED, JOINT, SENTENCES, VISION, offers_of
from xray.config import ModelConfig, schedule
from xray.config.run import Parent
from xray.errors import ArtifactError, ConfigError, NoArtifactError

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


def of_imported(parents: Sequence[Parent]) -> dict[str, Any]:
    """Return the settings of the backbone and the images of an imported parent, {} without one."""
    found = [own for own in parents if IMPORTED in own[1] and VISION in offers_of(own[1])]
    return _taken(*found[0], VISION_KEYS) if found else {}


def of_clip(parents: Sequence[Parent]) -> dict[str, Any]:
    """Return the settings of the parent clip artifact; {} if a text artifact is a parent, too."""
    joint = [own for own in parents if JOINT in offers_of(own[1])]
    if len(joint) != 1 or any(SENTENCES in offers_of(own) for _, own in parents):
        return {}
    layer = _taken(*joint[0], VISION_KEYS | JOINT_KEYS)
    layer["clip"]["heads"] = "parent"
    return layer


def _taken(
    place: str, manifest: Mapping[str, Any], keys: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Select the settings of a parent; raises ArtifactError if its manifest lacks them."""
    theirs = manifest["config"]
    for name in ("model", "data"):
        if not isinstance(theirs.get(name), Mapping):
            raise ArtifactError(f"{place}/manifest.json is damaged: it has no config.{name}")
    for name in keys:
        if not isinstance(theirs.get(name, {}), Mapping):
            raise ArtifactError(
                f"{place}/manifest.json is damaged: its config.{name} is no section"
            )
    try:
        schedule.check(theirs["data"].get("resolution"), "config.data.resolution")
    except ConfigError as error:
        raise ArtifactError(f"{place}/manifest.json is damaged: {error}") from error
    layer: dict[str, Any] = {
        name: {key: theirs[name][key] for key in own if key in theirs.get(name, {})}
        for name, own in keys.items()
    }
    layer["data"] = {"resolution": schedule.value_at(theirs["data"]["resolution"], 1.0)}
    return layer


def parents_at(init_from: Sequence[str]) -> list[Parent]:
    """Read the manifests of the parents that exist; the run itself says which do not.

    Raises ArtifactError or DataError for one that cannot be read.
    """
    found = list[Parent]()
    for path in init_from:
        with suppress(NoArtifactError):
            place, _, manifest = find_manifest(path)
            found.append((str(place), manifest))
    return found
