"""Numbers of embeddings in their stored types: fp32, fp16, int8 and signs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

Dtype = Literal["fp32", "fp16", "int8", "binary"]
STORED: dict[str, Any] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "int8": np.int8,
    "binary": np.uint8,
}


def shortened(rows: np.ndarray, dim: int) -> np.ndarray:
    """Return the first `dim` features of rows [N, D], normalised again."""
    return normalised(rows[:, :dim].astype(np.float32))


def normalised(rows: np.ndarray) -> np.ndarray:
    """Return rows [N, D] float32 of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def calibrate(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int8's (scale, offset), [D] each, from each dimension's least and largest value.

    A code c stands for c * scale + offset. The 256 codes cover the range evenly, so a value within
    it has an error of at most scale / 2.
    """
    scale = (high.astype(np.float64) - low) / 255
    scale = np.where(scale > 0, scale, 1.0)
    return scale.astype(np.float32), (low + 128 * scale).astype(np.float32)


def quantise(rows: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Return rows [N, D] float32 in their stored dtype: [N, D], or [N, D / 8] bytes of signs."""
    if facts["dtype"] == "binary":
        return np.packbits(rows > 0, axis=1)
    if facts["dtype"] == "int8":
        scale, offset = (np.array(facts[name], np.float32) for name in ("scale", "offset"))
        return np.rint((rows - offset) / scale).clip(-128, 127).astype(np.int8)
    return rows.astype(STORED[facts["dtype"]])


def restored(stored: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    """Return the values of stored rows, [N, D] float32; a sign is +-1/sqrt(D)."""
    if facts["dtype"] == "binary":
        signs = np.unpackbits(stored, axis=1, count=facts["dim"]).astype(np.float32)
        return (2 * signs - 1) / np.float32(np.sqrt(facts["dim"]))
    rows = stored.astype(np.float32)
    if facts["dtype"] == "int8":
        rows = rows * np.array(facts["scale"], np.float32) + np.array(facts["offset"], np.float32)
    return rows


def row_shape(facts: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a stored row: [D], [D / 8] of signs, or a grid of patch tokens [h, w, D],
    of a clip [t, h, w, D]."""
    if facts["dtype"] == "binary":
        return (-(-facts["dim"] // 8),)
    return (*facts.get("grid", ()), facts["dim"])


def row_length(facts: Mapping[str, Any]) -> int:
    """Return the count of numbers stored per row."""
    return math.prod(row_shape(facts))
