"""Encoded clips, and the command of the hostile decode process."""

from __future__ import annotations

import functools
import io
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import hostile_decoder
import numpy as np

from data_pipelines.ingest import demo as demo_data

HOSTILE = (sys.executable, hostile_decoder.__file__)


def clip(side: int = 64, frames: int = 12) -> bytes:
    """Encode a clip of a moving star, side x side pixels."""
    scene = demo_data.Scene("red", "star", "white", "large", "in the middle", "up")
    config = demo_data.DemoConfig(side=side, frames=frames)
    return demo_data._clip(scene, config, np.random.default_rng(0))


@functools.cache
def film(
    pixel: Fraction = Fraction(1), cover: bool = False, turned: bool = False, frames: int = 24
) -> bytes:
    """Encode frames of 384 x 256 pixels as mp4; frame i has the brightness 8 i.

    pixel: its width divided by its height. cover: a white picture of 300 x 200 is attached, and
    comes before the film. turned: the container turns the film by a quarter.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=12, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 384, 256, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel
        if cover:
            attached: Any = container.add_stream("mjpeg", rate=1)
            attached.width, attached.height, attached.pix_fmt = 300, 200, "yuvj420p"
            attached.disposition = av.stream.Disposition.attached_pic
            white = np.full((200, 300, 3), 255, np.uint8)
            container.mux(attached.encode(av.VideoFrame.from_ndarray(white, "rgb24")))
            container.mux(attached.encode())
        for number in range(frames):
            grey = np.full((256, 384, 3), 8 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        container.mux(stream.encode())
    data = buffer.getvalue()
    if turned:
        matrix = data.index(b"tkhd") + 44
        data = (
            data[:matrix]
            + struct.pack(">9i", 0, 1, 0, -1, 0, 0, 0, 0, 1 << 30)
            + data[matrix + 36 :]
        )
    return _cover_first(data) if cover else data


def _cover_first(data: bytes) -> bytes:
    """Move the box of an mp4 with the cover before the tracks: FFmpeg numbers streams in order."""
    ((start, size),) = [(i, n) for kind, i, n in _boxes(data, 0, len(data)) if kind == b"moov"]
    inner = list(_boxes(data, start + 8, start + size))
    inner.sort(key=lambda box: {b"mvhd": 0, b"udta": 1}.get(box[0], 2))
    ordered = b"".join(data[i : i + n] for _, i, n in inner)
    return data[: start + 8] + ordered + data[start + size :]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, position and size of the boxes of an mp4."""
    while start < end:
        size = int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, size
        start += size
