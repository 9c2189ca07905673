"""Bytes to RGB: pictures here and now, clips as readers that know their length before they decode.

This module is what the decode process imports: it must not import torch.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.shards.bad_sample import BadSample
from xray.errors import brief

MAX_PIXELS = 64_000_000  # refuse before decoding: a decompression bomb, not a photo
LARGE = 100_000_000  # bytes of a clip's frames that are worth another opening to shrink
ORIENTATION = 274  # the EXIF tag; 5 to 8 turn the picture on its side


# pictures -------------------------------------------------------------------------------------


def open_image(data: bytes) -> Image.Image:
    """Read a picture's header, no pixels; raises BadSample for what is none or far too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        raise BadSample("undecodable image", brief(error)) from error
    if image.width * image.height > MAX_PIXELS:
        raise BadSample("image too large", f"{image.width} x {image.height}")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a picture once its EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if turned(image) > 4 else (width, height)


def turned(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 = upright, also where the EXIF block is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken block says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1


def decode_image(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """An RGB picture, upright.

    at_least: (width, height) that will do; a JPEG is then decoded at the smallest scale of 1/2,
    1/4, 1/8 (by its DCT) that is no smaller. Raises BadSample for anything that is not whole.
    """
    return upright(open_image(data), at_least)


def upright(image: Image.Image, at_least: tuple[int, int] | None = None) -> Image.Image:
    """An opened picture as RGB, turned as its EXIF block says; otherwise as `decode_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if at_least is not None:
                side = turned(image) > 4
                image.draft("RGB", at_least[::-1] if side else at_least)
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise BadSample("undecodable image", brief(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 and 32 bit are scaled, alpha is laid on white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float32)
        high = 65535.0 if pixels.max(initial=0) > 255 else 255.0
        image = Image.fromarray((pixels / high * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# clips ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a clip to take, once its length is known.

    uniform: one per equal part of the clip. strided: `rate` per second from a start. segment:
    uniform over a stretch of `seconds`. `start` and `offsets` are in [0, 1): where a stretch
    begins in the room there is, and which place of each part is taken. A clip that is too short
    repeats its last frame.
    """

    frames: int
    sampling: str = "uniform"
    rate: float = 8.0
    seconds: float = 2.0
    start: float = 0.5
    offsets: tuple[float, ...] = ()  # () = the middle of each part

    def indices(self, total: int, fps: float) -> np.ndarray:
        """`frames` ascending frame numbers, [T] int64."""
        steps = np.arange(self.frames)
        if self.sampling == "strided":
            stride = fps / self.rate
            places = max(0.0, total - self.frames * stride) * self.start + stride * steps
        else:
            length = float(total)
            if self.sampling == "segment":
                length = min(length, max(1.0, self.seconds * fps))
            offsets = np.array(self.offsets) if self.offsets else 0.5
            places = (total - length) * self.start + (steps + offsets) * length / self.frames
        return places.astype(np.int64).clip(0, total - 1)


class Clip(Protocol):
    """A clip that is open: its length is known, its frames are not decoded yet."""

    total: int  # frames
    fps: float

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        """The frames at ascending, distinct indices, each [H, W, 3] uint8 and upright.

        least: a short side that will do, 0 = full size; see `shrunk`.
        """


def shrunk(width: int, height: int, frames: int, least: int) -> tuple[int, int] | None:
    """The size to decode frames at, None = their own; raises BadSample for absurd sizes.

    Only frames that fill much memory are shrunk by the decoder: others are resized faster later.
    """
    if width * height > MAX_PIXELS:
        raise BadSample("video too large", f"{width} x {height}")
    scale = least / min(width, height)
    if 0 < scale <= 0.5 and 3 * width * height * frames > LARGE:
        return math.ceil(width * scale), math.ceil(height * scale)
    return None


def import_decord() -> Any:
    """decord without the CUDA libraries its import loads from the `nvidia` packages: 600 MB of
    memory in each decode process, which is to decode on the CPU."""
    modules: dict[str, Any] = sys.modules  # None there says that a module cannot be found
    hidden = modules.get("nvidia")
    modules["nvidia"] = None
    try:
        import decord
    finally:
        del modules["nvidia"]
        if hidden is not None:
            modules["nvidia"] = hidden
    return decord


class DecordClip:
    """decord: fast access by frame number; applies a rotation of the container."""

    def __init__(self, data: bytes) -> None:
        decord = import_decord()
        self._open = lambda **size: decord.VideoReader(io.BytesIO(data), num_threads=1, **size)
        self._reader = self._open()
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        first = self._reader[int(indices[0])].asnumpy()
        if first.shape[2] != 3:  # a small frame whose rows are padded
            raise ValueError(f"a frame of shape {first.shape}")
        size = shrunk(first.shape[1], first.shape[0], len(indices), least)
        if size is not None:
            return list(self._open(width=size[0], height=size[1]).get_batch(indices).asnumpy())
        rest = self._reader.get_batch(indices[1:]).asnumpy() if len(indices) > 1 else ()
        return [first, *rest]


class AvClip:
    """PyAV: what decord cannot read, or would number wrongly.

    Frames are decoded in order from the first, those that are not asked for without conversion to
    RGB: after a seek, times are not reliable in just the containers that come here.
    """

    def __init__(self, data: bytes) -> None:
        import av

        self._open = lambda: av.open(io.BytesIO(data))
        with self._open() as container:
            if not container.streams.video:
                raise ValueError("no video stream")
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate or stream.guessed_rate or 25)
            packets = [packet for packet in container.demux(stream) if packet.size]
            self.total = sum(not packet.is_discard for packet in packets) or len(packets)

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        wanted, found = set(indices.tolist()), {}
        with self._open() as container:
            for number, frame in enumerate(container.decode(video=0)):
                last = frame
                if number in wanted:
                    found[number] = self._pixels(frame, len(wanted), least)
                if number >= indices[-1]:
                    break
            for index in sorted(wanted - found.keys()):  # the stream ends early: its last frame
                found[index] = self._pixels(last, len(wanted), least)
        return [found[index] for index in indices.tolist()]

    def _pixels(self, frame: Any, frames: int, least: int) -> np.ndarray:
        width, height = shrunk(frame.width, frame.height, frames, least) or (None, None)
        pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.rot90(pixels, round(frame.rotation / 90) % 4)


class Animation:
    """GIF and animated WebP, by Pillow."""

    def __init__(self, data: bytes) -> None:
        self._image = open_image(data)
        self.total = int(getattr(self._image, "n_frames", 1))
        self._image.load()  # WebP tells its timing with its first frame
        self.fps = 1000 / (self._image.info.get("duration") or 100)

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        size = shrunk(*self._image.size, len(indices), least)
        frames = []
        for index in indices.tolist():
            self._image.seek(index)
            frame = to_rgb(self._image.copy())
            frames.append(np.asarray(frame.resize(size) if size else frame))
        return frames


def open_clip(data: bytes) -> Clip:
    """The first reader that can open a clip; raises BadSample."""
    if data[:4] == b"GIF8" or data[8:12] == b"WEBP":
        readers: tuple[type[Any], ...] = (Animation,)
    else:
        # decord seeks to wrong frames in AVI, whose index has no times.
        readers = (AvClip, DecordClip) if data[8:12] == b"AVI " else (DecordClip, AvClip)
    reasons = []
    for reader in readers:
        try:
            clip = reader(data)
        except Exception as error:  # each library raises types of its own
            reasons.append(brief(error))
            continue
        if clip.total > 0:
            return clip
    raise BadSample("undecodable video", "; ".join(reasons))


def read_clip(clip: Clip, data: bytes, indices: np.ndarray, least: int = 0) -> list[np.ndarray]:
    """The frames at ascending indices; PyAV takes over where decord opens a clip and fails later.

    Raises BadSample.
    """
    distinct, places = np.unique(indices, return_inverse=True)
    try:
        frames = clip.read(distinct, least)
    except BadSample:
        raise
    except Exception as first:
        if not isinstance(clip, DecordClip):
            raise BadSample("undecodable video", brief(first)) from first
        try:
            frames = AvClip(data).read(distinct, least)
        except BadSample:
            raise
        except Exception as second:
            raise BadSample("undecodable video", f"{brief(first)}; {brief(second)}") from second
    return [frames[place] for place in places.tolist()]
