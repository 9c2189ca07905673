"""Pictures with masks for tests: coloured rectangles, in shards, in folders and in a list."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image
from shards import write_tar

COLORS = ((120, 120, 120), (220, 40, 40), (40, 60, 220))  # of classes 0 (the ground), 1 and 2
SIZE = (56, 44)  # width and height


def png(pixels: np.ndarray) -> bytes:
    """Encode a mask."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def masked_picture(rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Draw two rectangles on noise: a JPEG, and its mask, whose last rows have no class (255)."""
    width, height = SIZE
    mask = np.zeros((height, width), np.uint8)
    for number in (1, 2):
        top, left = rng.integers(0, height - 16), rng.integers(6, width - 22)
        mask[top : top + 16, left : left + 16] = number
    pixels = np.array(COLORS)[mask] + rng.normal(0, 8, (height, width, 3))
    mask[-3:] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), mask


def write_masked(root: Path, pictures: int, seed: int = 0) -> Path:
    """Write the same pictures as root/0.tar, root/plain/images and /masks, and root/list.csv."""
    rng = np.random.default_rng(seed)
    files, rows = {}, [("path", "mask")]
    for number in range(pictures):
        picture, mask = masked_picture(rng)
        key = f"{number:03d}"
        files |= {f"{key}.jpg": picture, f"{key}.mask.png": png(mask)}
        for folder, ending, content in (("images", "jpg", picture), ("masks", "png", png(mask))):
            path = root / "plain" / folder / "part" / f"{key}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        rows.append((f"plain/images/part/{key}.jpg", f"plain/masks/part/{key}.png"))
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    write_tar(root / "shards" / "0.tar", files)
    return root
