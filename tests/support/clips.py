"""Encoded clips, and the command of the hostile decode process."""

from __future__ import annotations

import sys

import hostile_decoder
import numpy as np

from data_pipelines.ingest import demo as demo_data

HOSTILE = (sys.executable, hostile_decoder.__file__)


def clip(side: int = 64, frames: int = 12) -> bytes:
    """Encode a clip of a moving star, side x side pixels."""
    scene = demo_data.Scene("red", "star", "white", "large", "in the middle", "up")
    config = demo_data.DemoConfig(side=side, frames=frames)
    return demo_data._clip(scene, config, np.random.default_rng(0))
