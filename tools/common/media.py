"""Generated images, clips and shards."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from data_pipelines.stream.loaded import Fields


def moving_picture(seed: int, size: tuple[int, int], frames: int) -> list[Image.Image]:
    """Make frames of smooth noise that shifts sideways; size (width, height) in pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    return [Image.fromarray(np.roll(wide, 2 * shift, axis=1)) for shift in range(frames)]


def jpeg_of(image: Image.Image) -> bytes:
    """Encode an image as JPEG with quality 90."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def clip_of(frames: Iterable[Image.Image], size: tuple[int, int]) -> bytes:
    """Encode frames as an mp4 in H.264 with 30 frames and one key frame per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {"g": "30", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_shards(folder: Path, files: Iterable[tuple[str, dict[str, bytes]]], each: int) -> None:
    """Write samples (key, file contents by extension) as tars of `each` samples."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        for number, (key, content) in enumerate(files):
            if number % each == 0:
                stack.close()
                path = str(folder / f"{number // each:05d}.tar")
                writer = stack.enter_context(wds.TarWriter(path, encoder=False))
            writer.write({"__key__": key, **content})


def stack_rows(rows: Sequence[Fields]) -> dict[str, Tensor]:
    """Stack samples into a batch, like a stage's `collate`."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
