"""Decoder of images to RGB.

The decode process imports this module, so it must not import torch.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_pipelines.decode.image_limits import check_size, limited_time
from xray.errors import BadSample, brief

# Pillow tries these formats whatever the file's name is. None of them may need another program:
# Pillow starts Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
ORIENTATION = 274  # the EXIF tag; values 5 to 8 exchange width and height


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
