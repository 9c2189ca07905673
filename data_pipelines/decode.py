"""Bytes to RGB: images by Pillow, clips by decord with PyAV behind it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from xray.errors import DataError

MAX_PIXELS = 64_000_000  # refuse before decoding: a decompression bomb, not a photo

PickFrames = Callable[[int], np.ndarray]  # frames in the clip -> indices to decode


class BadSample(DataError):  # noqa: N818 - it is reported and replaced, not raised to the user
    """A sample that cannot be used; `cause` groups the counts."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def media_of(files: dict[str, bytes], modality: str) -> bytes:
    """The picture or clip of a sample."""
    for extension in IMAGE_EXTENSIONS if modality == "image" else VIDEO_EXTENSIONS:
        if extension in files:
            return files[extension]
    raise BadSample(f"no {modality}")


def decode_image(data: bytes, least: int = 0) -> Image.Image:
    """An RGB picture, upright; a JPEG may be decoded at a reduced scale of at least `least` px.

    Raises BadSample for anything that is not a whole picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("image too large", f"{image.width} x {image.height}")
            if least:
                image.draft("RGB", (least, least))
            return _to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on broken bytes
        raise BadSample("undecodable image", str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bit: scale, do not wrap
        pixels = np.asarray(image, np.float32)
        high = 65535.0 if pixels.max(initial=0) > 255 else 255.0
        image = Image.fromarray((pixels / high * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_clip(data: bytes, pick: PickFrames) -> np.ndarray:
    """The picked frames of a clip, [T, H, W, 3] uint8.

    decord first; PyAV where it fails (AV1 in some builds, FFV1, tiny pictures). Readers are made
    per sample, inside the worker: a decord reader does not survive a fork.
    """
    try:
        frames = _decode_decord(data, pick)
    except Exception as first:  # decord raises RuntimeError, DECORDError and IndexError alike
        try:
            frames = _decode_av(data, pick)
        except Exception as second:
            raise BadSample("undecodable video", f"{_brief(first)}; {_brief(second)}") from second
    return frames


def _decode_decord(data: bytes, pick: PickFrames) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(pick(len(reader))).asnumpy()


def _decode_av(data: bytes, pick: PickFrames) -> np.ndarray:
    import av

    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[i] for i in pick(len(frames))])


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
