"""Decoders of clips to RGB; a reader first reports the length of the clip.

The decode process imports this module, so it must not import torch.
"""

from __future__ import annotations

import io
import math
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from data_pipelines.decode.animations import mean_rate
from data_pipelines.decode.image_limits import MAX_PIXELS
from data_pipelines.decode.images import open_image, to_rgb
from data_pipelines.decode.pixel_shape import surely_square
from xray.errors import BadSample, brief

HEADER = {"probesize": "32", "analyzeduration": "0", "fpsprobesize": "0"}  # decodes no frame
ATTACHED = 0x400  # FFmpeg's disposition of a picture that belongs to a file, such as a cover
SQUARE = 0.02  # encoders set such a deviation to make up for a size rounded to whole pixels
LARGE = 100_000_000  # bytes of decoded frames above which the decoder itself scales them down


@dataclass(frozen=True)
class FrameChoice:
    """Rule that chooses frames of a clip, applied when the length of the clip is known.

    sampling: "uniform" divides the clip into equal parts and takes one frame of each. "strided"
    takes `rate` frames per second. "segment" is uniform within a segment of `seconds`. start: start
    of the strided frames or of the segment, from 0 (earliest) to 1 (latest possible). offsets:
    position of the frame in each part, from 0 (first) to 1 (end). If a clip is too short, its last
    frame is repeated.
    """

    frames: int
    sampling: str = "uniform"
    rate: float = 8.0
    seconds: float = 2.0
    start: float = 0.5
    offsets: tuple[float, ...] = ()  # () = the middle of each part

    def indices(self, total: int, fps: float) -> np.ndarray:
        """Return ascending frame numbers, [T] int64, for a clip of `total` frames at `fps`."""
        steps = np.arange(self.frames)
        if self.sampling == "strided":
            stride = fps / self.rate
            positions = max(0.0, total - self.frames * stride) * self.start + stride * steps
        else:
            length = float(total)
            if self.sampling == "segment":
                length = min(length, max(1.0, self.seconds * fps))
            offsets = np.array(self.offsets) if self.offsets else 0.5
            positions = (total - length) * self.start + (steps + offsets) * length / self.frames
        return positions.astype(np.int64).clip(0, total - 1)


class Clip(Protocol):
    """Opened clip of known length whose frames are not decoded yet."""

    total: int  # frames
    fps: float

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        """Decode the frames at ascending, distinct indices: each [H, W, 3] uint8, upright.

        least: length of the short side that is large enough, 0 = full size; see `shrunk`.
        """


def shrunk(width: int, height: int, frames: int, least: int) -> tuple[int, int] | None:
    """Return the (width, height) that the decoder should scale frames to; None = do not scale.

    Only frames that use much memory are scaled by the decoder; others are resized faster later.
    Raises BadSample for frames of more than MAX_PIXELS.
    """
    if width * height > MAX_PIXELS:
        raise BadSample("video too large", f"{width} x {height}")
    scale = least / min(width, height)
    if 0 < scale <= 0.5 and 3 * width * height * frames > LARGE:
        return math.ceil(width * scale), math.ceil(height * scale)
    return None


def film_of(container: Any) -> Any:
    """Return the video stream of an opened container, never its cover; decord takes the same.

    Raises ValueError if there is none.
    """
    films = [s for s in container.streams.video if not s.disposition & ATTACHED]
    if not films:
        raise ValueError("no video stream")
    best = container.streams.best("video")
    return next((film for film in films if film.index == best.index), films[0])


def square_size(width: int, height: int, aspect: float) -> tuple[int, int]:
    """Return the size of a frame after its pixels are made square; no side becomes shorter.

    aspect: width of a pixel divided by its height. Raises BadSample above MAX_PIXELS.
    """
    width, height = round(width * max(1, aspect)), round(height * max(1, 1 / aspect))
    if width * height > MAX_PIXELS:
        raise BadSample("video too large", f"{width} x {height}")
    return width, height


def pixel_aspect(film: Any) -> float:
    """Return the width of a pixel divided by its height, before the film is rotated."""
    aspect = float(film.sample_aspect_ratio or 1)
    return aspect if abs(aspect - 1) > SQUARE else 1.0


def quarter_turns(frame: Any) -> int:
    """Return the container's rotation of a frame, in counter-clockwise quarter turns."""
    return round(frame.rotation / 90) % 4


def import_decord() -> Any:
    """Import decord without the CUDA libraries of the `nvidia` packages.

    They would take 600 MB of memory in each decode process, but decoding runs on the CPU.
    """
    modules: dict[str, Any] = sys.modules  # an entry of None makes the import of a module fail
    hidden = modules.get("nvidia")
    modules["nvidia"] = None
    try:
        import decord
    finally:
        del modules["nvidia"]
        if hidden is not None:
            modules["nvidia"] = hidden
    return decord


def upright_aspect(data: bytes) -> float:
    """Return the width of a pixel of a clip divided by its height, in its upright frames.

    The result is 1 if FFmpeg cannot tell.
    """
    if surely_square(data):
        return 1.0
    import av

    with suppress(av.FFmpegError, ValueError), av.open(io.BytesIO(data), options=HEADER) as file:
        film = film_of(file)
        aspect = pixel_aspect(film)
        turned = aspect != 1 and any(quarter_turns(f) % 2 for f in islice(file.decode(film), 1))
        return 1 / aspect if turned else aspect
    return 1.0


class DecordClip:
    """Clip read by decord: fast access by frame number; applies the container's rotation."""

    def __init__(self, data: bytes) -> None:
        decord = import_decord()
        self._open = lambda **size: decord.VideoReader(io.BytesIO(data), num_threads=1, **size)
        self._reader = self._open()
        self.total = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())
        self._aspect = upright_aspect(data)

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        first = self._reader[int(indices[0])].asnumpy()
        if first.shape[2] != 3:  # decord returns the padded rows of small frames
            raise ValueError(f"a frame of shape {first.shape}")
        full = first.shape[1], first.shape[0]
        width, height = shrunk(*full, len(indices), least) or full
        size = square_size(width, height, self._aspect)
        if size != full:
            return list(self._open(width=size[0], height=size[1]).get_batch(indices).asnumpy())
        rest = self._reader.get_batch(indices[1:]).asnumpy() if len(indices) > 1 else ()
        return [first, *rest]


class AvClip:
    """Clip read by PyAV, for files that decord cannot read or whose frames it numbers wrongly.

    All frames are decoded in order from the first, and only the requested ones are converted to
    RGB. It does not seek, because times after a seek are unreliable in these containers.
    """

    def __init__(self, data: bytes) -> None:
        import av

        self._open = lambda: av.open(io.BytesIO(data))
        with self._open() as container:
            stream = film_of(container)
            self.fps = float(stream.average_rate or stream.guessed_rate or 25)
            packets = [packet for packet in container.demux(stream) if packet.size]
            self.total = sum(not packet.is_discard for packet in packets) or len(packets)

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        wanted, frames = set(indices.tolist()), {}
        with self._open() as container:
            film = film_of(container)
            self._aspect = pixel_aspect(film)
            for number, frame in enumerate(container.decode(film)):
                last = frame
                if number in wanted:
                    frames[number] = self._pixels(frame, len(wanted), least)
                if number >= indices[-1]:
                    break
            for index in sorted(wanted - frames.keys()):  # the stream ended early: repeat the last
                frames[index] = self._pixels(last, len(wanted), least)
        return [frames[index] for index in indices.tolist()]

    def _pixels(self, frame: Any, frames: int, least: int) -> np.ndarray:
        full = frame.width, frame.height
        width, height = shrunk(*full, frames, least) or full
        size = square_size(width, height, self._aspect)
        scaled = {"width": size[0], "height": size[1]} if size != full else {}
        pixels = frame.to_ndarray(format="rgb24", **scaled)
        return np.rot90(pixels, quarter_turns(frame))


class Animation:
    """GIF or animated WebP read by Pillow."""

    def __init__(self, data: bytes) -> None:
        self._image = open_image(data)
        self.total = int(getattr(self._image, "n_frames", 1))
        self.fps = mean_rate(data)

    def read(self, indices: np.ndarray, least: int) -> list[np.ndarray]:
        size = shrunk(*self._image.size, len(indices), least)
        frames = []
        for index in indices.tolist():
            self._image.seek(index)
            frame = to_rgb(self._image.copy())
            frames.append(np.asarray(frame.resize(size) if size else frame))
        return frames


def open_clip(data: bytes) -> Clip:
    """Open a clip with the first reader that can read it; raises BadSample."""
    if data[:4] == b"GIF8" or data[8:12] == b"WEBP":
        readers: tuple[type[Any], ...] = (Animation,)
    else:
        # decord seeks to wrong frames in AVI files, because their index has no times.
        readers = (AvClip, DecordClip) if data[8:12] == b"AVI " else (DecordClip, AvClip)
    reasons = []
    for reader in readers:
        try:
            clip = reader(data)
        except Exception as error:  # each library has its own error types
            reasons.append(brief(error))
            continue
        if clip.total > 0:
            return clip
    raise BadSample("undecodable video", "; ".join(reasons))


def read_clip(clip: Clip, data: bytes, indices: np.ndarray, least: int = 0) -> list[np.ndarray]:
    """Decode the frames at ascending indices, by PyAV if decord cannot; raises BadSample."""
    distinct, rows = np.unique(indices, return_inverse=True)
    reasons = []
    for open_again in (False, True) if isinstance(clip, DecordClip) else (False,):
        try:
            frames = (AvClip(data) if open_again else clip).read(distinct, least)
        except BadSample:
            raise
        except Exception as error:  # each library has its own error types
            reasons.append(brief(error))
        else:
            if len({frame.shape for frame in frames}) > 1:
                raise BadSample("undecodable video", "the size of its frames changes")
            return [frames[row] for row in rows.tolist()]
    raise BadSample("undecodable video", "; ".join(reasons))
