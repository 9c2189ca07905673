"""Users' images and clips, loaded as in evaluation: centre crop, middle frames."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from torch import Tensor

from data_pipelines.decode.transforms import load_picture, load_pixels
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.source import Sample
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Modality
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import DataError


def modality_of(path: Path) -> Modality:
    """Return the modality of a file by its extension; raises DataError for an unknown one."""
    extension = path.suffix.lower().removeprefix(".")
    if extension in IMAGE_EXTENSIONS:
        return "image"
    if extension in VIDEO_EXTENSIONS:
        return "video"
    supported = ", ".join(f".{name}" for name in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
    raise DataError(f"{path} is neither an image nor a video: it must end in one of {supported}")


def read_media(path: Path, data: DataConfig) -> Tensor:
    """Load an image or clip as [T, 3, S, S] uint8, T = 1 for an image; raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    modality, extension = modality_of(path), path.suffix.lower().removeprefix(".")
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    sample = Sample({extension: path.read_bytes()}, "file", modality, path.stem, *size)
    try:
        return load_pixels(sample, data, None)
    except BadSample as error:
        raise DataError(f"{path}: {error}") from error


def read_picture(image: Image.Image, data: DataConfig) -> Tensor:
    """Load a Pillow image as [1, 3, S, S] uint8; raises DataError if it is broken."""
    return load_picture(image, value_at(data.resolution, 1.0))
