"""Masks: pictures of one channel whose pixel values are class numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.images import decoding_image, open_image, upright_size
from data_pipelines.decode.preparation import shown_pixels
from data_pipelines.decode.transforms import media_of
from data_pipelines.shards.source import Sample
from xray.config import DataConfig
from xray.errors import BadSample

ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16L", "I;16B")  # Pillow's modes of whole numbers


def load_mask(sample: Sample, ending: str, data: DataConfig) -> Tensor:
    """Load the part of a picture's mask that evaluation shows, [S, S] int32, nearest pixels.

    ending: of the mask among the sample's files. Raises BadSample for a picture without a mask, a
    mask that cannot be read, and one of another size than its picture.
    """
    if ending not in sample.files:
        raise BadSample("no mask", f"the sample has no file .{ending}")
    mask = decode_mask(sample.files[ending])
    height, width = mask.shape
    size = upright_size(open_image(media_of(sample)))
    if size != (width, height):
        raise BadSample(
            "mask of another size",
            f"it has {width} x {height} pixels, and its picture {size[0]} x {size[1]}",
        )
    rows, columns = shown_pixels(width, height, data, sample.resolution)
    return torch.from_numpy(mask[rows.numpy()[:, None], columns.numpy()].astype(np.int32))


def decode_mask(content: bytes) -> np.ndarray:
    """Decode a mask to its class numbers, [H, W]; of a palette, to the numbers of its colours."""
    image = open_image(content)
    if image.mode not in ONE_CHANNEL:
        raise BadSample(
            "mask without class numbers",
            f"it has the channels {image.mode}: store one channel, whose values are class numbers",
        )
    with decoding_image():
        return np.asarray(image)
