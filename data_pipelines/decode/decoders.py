"""Decoders of images and clips to RGB; a reader of clips first reports the length of the clip.

The decode process imports this module, so it must not import torch.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_pipelines.decode.animations import mean_rate
from data_pipelines.decode.image_limits import MAX_PIXELS, check_size, limited_time
from data_pipelines.decode.pixel_shape import surely_square
from xray.errors import BadSample, brief

# Pillow tries these formats whatever the file's name is. None of them may need another program:
# Pillow starts Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
HEADER = {"probesize": "32", "analyzeduration": "0", "fpsprobesize": "0"}  # decodes no frame
ATTACHED = 0x400  # FFmpeg's disposition of a picture that belongs to a file, such as a cover
SQUARE = 0.02  # encoders set such a deviation to make up for a size rounded to whole pixels
LARGE = 100_000_000  # bytes of decoded frames above which the decoder itself scales them down
ORIENTATION = 274  # the EXIF tag; values 5 to 8 exchange width and height


# images ---------------------------------------------------------------------------------------


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image of one of FORMATS and read its header; the only call of Image.open.

    Raises BadSample if the image is broken, too large or of another format.
    """
    with decoding_image():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image, data)
    return image


@contextmanager
def decoding_image() -> Iterator[None]:
    """Limit the CPU time in Pillow, and convert any of its errors to BadSample."""
    try:
        with warnings.catch_warnings(), limited_time():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except UnidentifiedImageError as error:  # its text has an address in memory
        detail = f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        raise BadSample("undecodable image", detail) from error
    except Exception as error:  # Pillow raises many different types on broken bytes
        raise BadSample("undecodable image", brief(error)) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an image after its EXIF orientation is applied."""
    width, height = image.size
    return (height, width) if orientation_of(image) > 4 else (width, height)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if there is none or EXIF is broken."""
    value = 1
    with suppress(Exception), warnings.catch_warnings():  # the pixels may be fine
        warnings.simplefilter("ignore")
        value = image.getexif().get(ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def decode_image(data: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode an image to RGB, upright.

    at_least: (width, height) that is large enough. A JPEG is then decoded at the smallest DCT scale
    (1, 1/2, 1/4 or 1/8) that is not below it. Raises BadSample for a broken or truncated image.
    """
    return upright(open_image(data), at_least)


def upright(image: Image.Image, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decode an opened image to RGB with its EXIF orientation applied; see `decode_image`."""
    with decoding_image():
        if at_least is not None:
            image.draft("RGB", at_least[::-1] if orientation_of(image) > 4 else at_least)
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; scales 16 and 32 bit to 8, puts alpha on white."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float32)
        highest = pixels.max(initial=0)
        high = 65535.0 if highest > 255 else 255.0 if highest > 1 or image.mode != "F" else 1.0
        image = Image.fromarray((pixels / high * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# clips ----------------------------------------------------------------------------------------


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
