"""Sources as a survey finds them, and a machine without a GPU, for tests of first recipes."""

from __future__ import annotations

from typing import Any

from xray.recipes.machine import Machine
from xray.recipes.survey import Found

LAPTOP = Machine(2, 0, "", 25e9)
CAPTIONED = {"captioned": 1.0, "captions": 5.0}


def found(name: str = "images", **more: Any) -> Found:
    """Make a source of 1,000 pictures of 128 px without captions, tags and classes."""
    own = {"modality": "image", "samples": 1000, "side": 128, "captioned": 0.0, "captions": 0.0}
    return Found(name, name, **{**own, "tagged": 0.0, "labelled": 0.0, **more})
