"""Transforms from bytes to `[T, 3, S, S]` uint8 tensors, and their augmentation.

The caller passes the random generator.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from data_pipelines.decode.decoders import FrameChoice
from data_pipelines.decode.images import decode_image, open_image, upright, upright_size
from data_pipelines.decode.preparation import (
    Box,
    center_crop,
    crop_and_resize,
    least_side,
    prepare,
)
from data_pipelines.decode.sandbox import clip_decoder
from data_pipelines.shards.meter import metered
from data_pipelines.shards.source import Sample, SharedDecoding
from data_pipelines.shards.tar_index import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Modality, media_in
from xray.config import DataConfig
from xray.config.data import Interpolation
from xray.config.schedule import value_at
from xray.errors import BadSample, DataError
from xray.files import nearest_path

# torchvision warns that its decoder moves to torchcodec. We cannot follow yet: torchcodec's wheels
# need FFmpeg's shared libraries on the machine.
warnings.filterwarnings("ignore", message="The image decoding and encoding capabilities")
ASPECT = (3 / 4, 4 / 3)  # of the random crop (Inception, 1409.4842)
Crop = Callable[[int, int], Box]  # (width, height) of the image -> box of the crop


def load_pixels(sample: Sample, data: DataConfig, rng: np.random.Generator | None) -> Tensor:
    """Decode, crop, resize and augment one sample to [T, 3, S, S] uint8; T = 1 for an image.

    rng: source of all random draws; None = `prepare` and middle frames, as in evaluation. If the
    device decodes the sample later (`sample.deferred`), the result is an empty tensor on the meta
    device. Raises BadSample for a sample that cannot be decoded.
    """
    media = media_of(sample)

    def crop(width: int, height: int) -> Box:
        if rng is None:
            return center_crop(width, height, data.crop_pct)
        return random_crop(width, height, data.crop_scale, rng)

    def draw(width: int, height: int) -> tuple[Box, Augmentation | None]:
        return crop(width, height), None if rng is None else draw_augmentation(data, rng)

    interpolation: Interpolation = "bicubic" if rng is not None else data.interpolation
    with metered(sample.modality):
        if rng is None and data.resizes_first:
            return prepare(_whole(media, sample, data), data, sample.resolution)[0]
        if sample.deferred is not None and interpolation == "bicubic":  # the device has no other
            empty = sample.deferred.take(media, draw, sample.resolution)
            if empty is not None:
                return empty
        if sample.shared is not None:
            pixels = _load_view(media, crop, sample, data, sample.shared)
        elif sample.modality == "image":
            pixels = load_image(media, crop, sample.resolution, interpolation)
        else:
            pixels = load_clip(media, crop, sample, data, rng)
    return pixels if rng is None else augment(pixels, data, rng).contiguous()


def _load_view(
    media: bytes, crop: Crop, sample: Sample, data: DataConfig, shared: SharedDecoding
) -> Tensor:
    """Crop and resize one view of a sample, [T, 3, S, S]; the first one decodes for all of them.

    All views of a clip have the same frames. Raises BadSample.
    """
    if shared.pixels is None:
        least = _least_side(sample.resolution, data, shared.rng)
        if sample.modality == "image":
            header = open_image(media)
            shared.size = width, height = upright_size(header)
            shared.pixels = _decode(media, header, min(1.0, least / min(width, height)))
        else:
            choice = choose_frames(sample.frames, data, shared.rng)
            shared.pixels = _decode_clip(media, choice, least, data)
            shared.size = shared.pixels.shape[3], shared.pixels.shape[2]
    box = _scaled(crop(*shared.size), shared.size, shared.pixels)
    return crop_and_resize(shared.pixels, box, sample.resolution)


def load_views(sample: Sample, data: DataConfig, clips: int, crops: int) -> Tensor:
    """Load several views of a sample for evaluation, [clips * crops, T, 3, S, S] uint8.

    clips: evenly spaced times at which frames of a video are taken. crops: crops of each frame
    (`prepare`). Nothing is random. Raises BadSample.
    """
    media, views = media_of(sample), []
    for time in range(clips if sample.modality == "video" else 1):
        if sample.modality == "video":
            frames = _at_time(media, sample, data, time, clips)
        else:
            frames = _tensor_of(decode_image(media))
        views += prepare(frames, data, sample.resolution, crops)
    return torch.stack(views)


def _whole(media: bytes, sample: Sample, data: DataConfig) -> Tensor:
    """Decode an image, or the middle frames of a clip, at full size: [T, 3, H, W] uint8."""
    if sample.modality == "image":
        return _tensor_of(decode_image(media))
    return _at_time(media, sample, data, 0, 1)


def _tensor_of(image: Image.Image) -> Tensor:
    """Convert an image to [1, 3, H, W] uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _at_time(media: bytes, sample: Sample, data: DataConfig, time: int, clips: int) -> Tensor:
    """Decode the frames [T, 3, H, W] of view number `time` of `clips` evenly spaced ones."""
    settings = sample.frames, data.frame_sampling, data.frame_rate, data.segment_seconds
    start = 0.5 if clips == 1 else 0.9999 * time / (clips - 1)
    choice = FrameChoice(*settings, start=start, offsets=((time + 0.5) / clips,) * sample.frames)
    return _decode_clip(media, choice, _least_side(sample.resolution, data, None), data)


def _decode_clip(media: bytes, choice: FrameChoice, least: int, data: DataConfig) -> Tensor:
    """Decode chosen frames to [T, 3, H, W] uint8; least: short side that is large enough."""
    frames = clip_decoder(data).decode(media, choice, least).pixels
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def media_of(sample: Sample) -> bytes:
    """Return the bytes of the image or clip of a sample; raises BadSample if it has none."""
    return media_in(sample.files, sample.modality, sample.animations)


def load_image(
    media: bytes, crop: Crop, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Decode an image, crop it and resize to size x size: [1, 3, S, S] uint8.

    A JPEG is decoded at the smallest DCT scale at which the crop is not enlarged. Raises BadSample.
    """
    header = open_image(media)
    width, height = upright_size(header)
    box = crop(width, height)
    # The smallest decoding scale at which the crop has at least `size` pixels per side.
    pixels = _decode(media, header, min(1.0, max(size / box[2], size / box[3])))
    return crop_and_resize(pixels, _scaled(box, (width, height), pixels), size, interpolation)


def _decode(media: bytes, header: Image.Image, scale: float) -> Tensor:
    """Decode an image to [1, 3, H, W], upright, at this scale or a larger one up to 1."""
    if scale > 0.5 and header.format == "JPEG" and header.mode in ("RGB", "L"):
        pixels = _decode_jpeg(media)
        if pixels is not None:
            return pixels
    width, height = upright_size(header)
    at_least = math.ceil(width * scale), math.ceil(height * scale)
    return _tensor_of(decode_image(media, at_least))


def load_picture(image: Image.Image, data: DataConfig, size: int) -> Tensor:
    """Prepare a Pillow image as in evaluation: [1, 3, S, S] uint8; raises BadSample.

    An image that Pillow has opened but not decoded yet gives exactly the result of its file.
    """
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.fp is not None:
        position = image.fp.tell()
        image.fp.seek(0)
        media = image.fp.read()
        image.fp.seek(position)
        return load_pixels(Sample({"jpg": media}, "file", "image", "", size, 1), data, None)
    if not min(image.size):
        raise BadSample("decode error", "the image has no pixels")
    return prepare(_tensor_of(upright(image)), data, size)[0]


def _decode_jpeg(media: bytes) -> Tensor | None:
    """Decode a JPEG to [1, 3, H, W] at full size, upright; None if torchvision cannot decode it."""
    encoded = torch.frombuffer(bytearray(media), dtype=torch.uint8)
    try:
        return decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)[None]
    except RuntimeError:
        return None


def load_clip(
    media: bytes, crop: Crop, sample: Sample, data: DataConfig, rng: np.random.Generator | None
) -> Tensor:
    """Decode frames of a clip, crop and resize them: [T, 3, S, S] uint8; raises BadSample."""
    least = _least_side(sample.resolution, data, rng)
    choice = choose_frames(sample.frames, data, rng)
    pixels = _decode_clip(media, choice, least, data)
    box, interpolation = crop(pixels.shape[3], pixels.shape[2]), data.interpolation
    if rng is not None:
        interpolation = "bicubic"
    return crop_and_resize(pixels, box, sample.resolution, interpolation)


def _least_side(size: int, data: DataConfig, rng: np.random.Generator | None) -> int:
    """Return the short side of a frame at which no crop has fewer than `size` pixels per side."""
    if rng is None:
        return least_side(data, size)
    # Short side of the smallest possible crop, as a share of the frame's: the area of a crop is at
    # least crop_scale[0] and its aspect ratio within ASPECT.
    return math.ceil(size / math.sqrt(data.crop_scale[0] * ASPECT[0]))


def choose_frames(frames: int, data: DataConfig, rng: np.random.Generator | None) -> FrameChoice:
    """Make the frame choice that a config describes, at random; without `rng`, in the middle."""
    settings = frames, data.frame_sampling, data.frame_rate, data.segment_seconds
    if rng is None:
        return FrameChoice(*settings)
    return FrameChoice(*settings, start=rng.random(), offsets=tuple(rng.random(frames)))


def random_crop(width: int, height: int, scale: list[float], rng: np.random.Generator) -> Box:
    """Draw a crop by area and aspect ratio; after ten tries that do not fit, the centre crop."""
    area = width * height
    for _ in range(10):
        target = area * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    return center_crop(width, height)


def _scaled(box: Box, full: tuple[int, int], pixels: Tensor) -> Box:
    """Convert a box of the full image to an image that was decoded at a smaller scale."""
    height, width = pixels.shape[-2:]
    if (width, height) == full:
        return box
    across, down = width / full[0], height / full[1]
    left, top = min(round(box[0] * across), width - 1), min(round(box[1] * down), height - 1)
    w, h = max(1, round(box[2] * across)), max(1, round(box[3] * down))
    return left, top, min(w, width - left), min(h, height - top)


Policy = tuple[tuple[float, ...], tuple[int, ...], float]


@dataclass(frozen=True)
class Augmentation:
    """Random draws of a sample's augmentation."""

    flip: bool
    policy: Policy  # colour jitter, RandAugment and random erasing, as configured
    seed: int | None  # of the policy's random numbers; None = the policy is empty

    def apply_policy(self, pixels: Tensor) -> Tensor:
        """Return pixels [T, 3, S, S] uint8 on any device after all but the flip."""
        if self.seed is not None:
            with _torch_seeded_by(self.seed):
                for transform in _transforms(self.policy):
                    pixels = transform(pixels)
        return pixels


def draw_augmentation(data: DataConfig, rng: np.random.Generator) -> Augmentation:
    """Draw the configured flip, and a seed of the rest."""
    flip = bool(data.flip and rng.random() < 0.5)
    policy = tuple(data.color_jitter), tuple(data.rand_augment), data.erase
    return Augmentation(flip, policy, int(rng.integers(2**63)) if _transforms(policy) else None)


def augment(pixels: Tensor, data: DataConfig, rng: np.random.Generator) -> Tensor:
    """Apply the configured flip, colour jitter, RandAugment and random erasing.

    pixels: [T, 3, S, S] uint8; the result has the same shape and type. All random numbers come from
    `rng`, and all frames use the same ones.
    """
    drawn = draw_augmentation(data, rng)
    return drawn.apply_policy(pixels.flip(-1) if drawn.flip else pixels)


@functools.lru_cache(maxsize=8)
def _transforms(policy: Policy) -> list[v2.Transform]:
    (brightness, contrast, saturation, hue), (operations, magnitude), erase = policy
    transforms: list[v2.Transform] = []
    if any((brightness, contrast, saturation, hue)):
        transforms.append(v2.ColorJitter(brightness, contrast, saturation, hue))
    if operations:
        bilinear = v2.InterpolationMode.BILINEAR
        transforms.append(v2.RandAugment(operations, magnitude, interpolation=bilinear))
    if erase:
        transforms.append(v2.RandomErasing(erase))
    return transforms


@contextmanager
def _torch_seeded_by(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator, which torchvision draws from; restore it afterwards."""
    generator = torch.default_generator  # torch.manual_seed would seed the GPUs too
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


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
    if path.is_dir():
        raise DataError(f"{path} is a folder: name images or videos in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file{nearest_path(path)}")
    modality, extension = modality_of(path), path.suffix.lower().removeprefix(".")
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    sample = Sample({extension: path.read_bytes()}, "file", modality, path.stem, *size)
    try:
        return load_pixels(sample, data, None)
    except BadSample as error:
        raise DataError(f"{path}: {error}") from error


def read_picture(image: Image.Image, data: DataConfig) -> Tensor:
    """Load a Pillow image as [1, 3, S, S] uint8; raises DataError if it is broken."""
    return load_picture(image, data, value_at(data.resolution, 1.0))
