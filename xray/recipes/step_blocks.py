"""Division of a training step over the sources of a user's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xray.recipes.survey import Found

Settings = dict[str, Any]
FEWEST = 8  # samples of a source in a step


def blocks(sources: Sequence[Found], most: int, devices: int) -> list[Settings]:
    """Divide a step over sources: pictures by their numbers, and about 1 clip for 8 pictures.

    A clip costs as much as several pictures. A step has at most a tenth of the samples, but
    enough that each is contrasted with some others.
    """
    images = sum(found.samples for found in sources if found.modality == "image")
    clips = sum(found.samples for found in sources) - images
    most_images = most * 8 // 9 if clips else most
    most_clips = most // 9 if images else most // 2
    step = {
        "image": min(most_images, max(4 * FEWEST, images // 10)),
        "video": min(most_clips, max(2 * FEWEST, clips // 10)),
    }
    totals = {"image": images, "video": clips}
    made = []
    for found in sources:
        share = int(step[found.modality] * found.samples / totals[found.modality])
        own = min(max(FEWEST, share), max(devices, found.samples))
        made.append({"source": found.name, "samples": max(1, own // devices) * devices})
    return made
