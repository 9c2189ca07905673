"""A user's pictures and clips as the pixels that evaluation sees: centre crop, middle frames."""

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
    """What a file is by its ending; raises DataError for no picture and no clip."""
    ending = path.suffix.lower().removeprefix(".")
    if ending in IMAGE_EXTENSIONS:
        return "image"
    if ending in VIDEO_EXTENSIONS:
        return "video"
    known = ", ".join(f".{name}" for name in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))
    raise DataError(f"{path} is neither a picture nor a clip: it must end in one of {known}")


def read_media(path: Path, data: DataConfig) -> Tensor:
    """A picture or clip: [T, 3, S, S] uint8, T = 1 for a picture; raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    modality, ending = modality_of(path), path.suffix.lower().removeprefix(".")
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    sample = Sample({ending: path.read_bytes()}, "file", modality, path.stem, *size)
    try:
        return load_pixels(sample, data, None)
    except BadSample as error:
        raise DataError(f"{path}: {error}") from error


def read_picture(image: Image.Image, data: DataConfig) -> Tensor:
    """A picture in memory: [1, 3, S, S] uint8; raises DataError for one that is not whole."""
    return load_picture(image, value_at(data.resolution, 1.0))
