"""Capabilities of artifacts: code that reads an artifact asks for these, not for its stage.

A stage writes them into the manifest: `offers`, a list of the names below; `heads`, the section of
the run's config that describes a head, if it is not the usual one; `summary`, a sentence for the
model card. `xray merge` writes `mixture`: the weights of the parents, by slot, and why (`by`).
`xray import` writes `imported`: source, library and the hashes of the source's files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VISION = "vision"  # a backbone
DECODER = "decoder"  # the decoder of a masked auto-encoder
TAGS = "tags"  # a tag head with its vocabulary
SENTENCES = "sentences"  # a text tower tuned on captions
JOINT = "joint"  # images, clips and texts in one space
# Keys of a manifest
MIXTURE = "mixture"
IMPORTED = "imported"

# For manifests of older versions, which have no `offers`.
OFFERS_OF_STAGE = {
    "mae": (VISION, DECODER),
    "hashtag": (VISION, TAGS),
    "text": (SENTENCES,),
    "clip": (VISION, JOINT),
}
USUAL_SECTION = {DECODER: "mae", TAGS: "hashtag", JOINT: "clip"}


def offers_of(manifest: Mapping[str, Any]) -> frozenset[str]:
    """Return the capabilities of the artifact that a manifest describes."""
    return frozenset(manifest.get("offers", OFFERS_OF_STAGE.get(str(manifest.get("stage")), ())))


def offers_are_sound(manifest: Mapping[str, Any]) -> bool:
    """Check if the keys that a stage or a merge writes about its artifact have the right types."""
    names, heads = manifest.get("offers", []), manifest.get("heads", {})
    if not isinstance(names, list) or not isinstance(heads, dict):
        return False
    mixture = manifest.get(MIXTURE, {"weights": {}, "by": ""})
    if not isinstance(mixture, dict) or not isinstance(mixture.get("weights"), dict):
        return False
    if not all(isinstance(weight, int | float) for weight in mixture["weights"].values()):
        return False
    texts = [*names, *heads.values(), manifest.get("summary", ""), mixture.get("by", "")]
    return all(isinstance(value, str) for value in texts)


def slot_of(offers: frozenset[str]) -> str:
    """Return the parent slot that an artifact fills: `vision`, or `text` if it has no backbone."""
    return "text" if SENTENCES in offers and VISION not in offers else "vision"
