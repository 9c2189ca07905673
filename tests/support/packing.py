"""Pictures and clips to pack, and what is in the shards of a packed folder."""

from __future__ import annotations

import functools
import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipelines.ingest.pack import PackConfig, PackReport, pack
from data_pipelines.shards.tar_index import index_shard

Samples = dict[str, dict[str, bytes]]


def picture(
    size: tuple[int, int] = (40, 20), form: str = "JPEG", seed: int = 0, **save: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, form, **save)
    return buffer.getvalue()


@functools.cache
def clip(
    size: tuple[int, int] = (64, 48),
    times: tuple[int, ...] = tuple(range(0, 1200, 100)),
    form: str = "mp4",
    full_range: bool = False,
    sound: bool = False,
) -> bytes:
    """Twelve frames; each has its number as brightness, and a white upper left corner."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"g": "250"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if full_range else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if full_range:
            stream.codec_context.color_range = 2
        if sound:
            container.mux(tone(container.add_stream("aac", rate=8000)))
        for number, milliseconds in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 40 + 12 * number, np.uint8)
            pixels[: size[1] // 3, : size[0] // 3] = 255
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def tone(stream: Any) -> list[Any]:
    samples = np.zeros((1, 8000), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 8000
    return [*stream.encode(frame), *stream.encode()]


def frames_of(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder, and return the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def packed(source: Path, out: Path, **settings: int) -> tuple[PackReport, Samples]:
    report = pack(source, out, PackConfig(**settings))
    return report, samples_of(out)


def samples_of(out: Path) -> Samples:
    found = {}
    for path in sorted(out.glob("*.tar")):
        index = index_shard(path)
        found |= {str(key): index.read(i) for i, key in enumerate(index.keys)}
    return found


def meta_of(files: dict[str, bytes]) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(files["json"])
    return meta


def tree(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def skipped_in(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "pack_skipped.jsonl").read_text().splitlines()]
