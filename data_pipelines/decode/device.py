"""Decoding of JPEGs on the training device, with the draws of decoding on the CPU.

A loader worker reads the header of a JPEG and draws its crop and augmentation. The main process
then decodes, crops, flips, resizes and augments on the device. torchvision decodes with nvJPEG on a
GPU, and with libjpeg on a CPU, where the tests run.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data_pipelines.decode.images import open_image, orientation_of, upright_size
from data_pipelines.decode.preparation import Box
from data_pipelines.decode.transforms import Augmentation
from xray.errors import brief

CHUNK = 1 << 25  # pixels that are processed at a time, padding included: about 0.5 GB of memory
END = b"\xff\xd9"  # of a JPEG that is whole
TIE = 1e-3  # added before rounding: more than the error of the sums, which depends on the chunk


# in a loader worker ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Jpeg:
    """Size of a JPEG, and the random draws of its sample."""

    size: tuple[int, int]  # (width, height) as stored
    orientation: int  # of EXIF
    box: Box  # crop of the upright image
    side: int  # of the result
    augmentation: Augmentation | None


@dataclass
class PendingJpeg:
    """Image of a sample, if the device decodes it; see `DeferredDecoding`."""

    media: bytes = b""
    jpeg: Jpeg | None = None  # None = the worker decodes the image

    def take(
        self,
        media: bytes,
        draw: Callable[[int, int], tuple[Box, Augmentation | None]],
        side: int,
    ) -> Tensor | None:
        """Keep a JPEG and return an empty tensor [1, 3, S, S]; None for another image."""
        self.jpeg = None  # it may be of a sample that this one replaces
        header = open_image(media)
        if not _suits_device(media, header):
            return None
        box, augmentation = draw(*upright_size(header))
        place = header.size, orientation_of(header), box, side
        self.media, self.jpeg = media, Jpeg(*place, augmentation)
        return torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta")


def _suits_device(media: bytes, header: Image.Image) -> bool:
    """Return True for a JPEG that nvJPEG decodes to the colours of libjpeg.

    nvJPEG may fill the end of a truncated image with grey, and expects YCbCr in three components.
    """
    if header.format != "JPEG" or header.mode not in ("RGB", "L") or not media.endswith(END):
        return False
    components = bytes(layer[0] for layer in getattr(header, "layer", ()))
    return header.info.get("adobe_transform") != 0 and components != b"RGB"


@dataclass(frozen=True)
class Pictures:
    """Images of a part of a micro-batch: JPEGs for the device, and pixels decoded by the worker.

    They are few tensors, because each one in shared memory costs a file descriptor.
    """

    data: Tensor  # [bytes] uint8, the JPEGs one after another
    # of each sample in order, with its part of `data`; None = the next one in `decoded`
    jpegs: list[tuple[slice, Jpeg] | None]
    decoded: Tensor  # [n, 1, 3, S, S] uint8

    @classmethod
    def taken_from(cls, rows: list[dict[str, Tensor]], pending: Sequence[PendingJpeg]) -> Pictures:
        """Take the images of samples, and leave empty tensors in `pixels` of the rows."""
        data, decoded = bytearray(), []
        jpegs: list[tuple[slice, Jpeg] | None] = []
        last: bytes | None = None  # views of a sample share its bytes
        for row, image in zip(rows, pending, strict=True):
            if image.jpeg is None:
                decoded.append(row["pixels"])
                row["pixels"] = torch.empty_like(row["pixels"], device="meta")
                jpegs.append(None)
                continue
            if image.media is not last:
                data += image.media
            last = image.media
            jpegs.append((slice(len(data) - len(last), len(data)), image.jpeg))
        return cls(
            torch.frombuffer(data or bytearray(1), dtype=torch.uint8),
            jpegs,
            torch.stack(decoded) if decoded else torch.empty(0, dtype=torch.uint8),
        )


# in the main process --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """JPEG of a row of the micro-batch."""

    row: int
    image: tuple[int, int]  # key of the image, which views share: numbers of part and first byte
    data: Tensor  # [bytes] uint8, on the host
    jpeg: Jpeg


def cannot_decode(device: torch.device) -> str:
    """Return the reason why a device cannot decode JPEGs; "" = it can."""
    if device.type != "cuda":
        return "training runs on the CPU"
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, format="JPEG")
    data = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        decode_jpeg([data], ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        return f"torchvision cannot decode a JPEG on {device}: {brief(error)}"
    return ""


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU for copies from the host, and for decoding."""
    return torch.cuda.Stream(device)


def beside_computation(device: torch.device) -> AbstractContextManager[object]:
    """Return a context whose work on a GPU runs beside its computation."""
    return torch.cuda.stream(copy_stream(device)) if device.type == "cuda" else nullcontext()


def decode(
    parts: Sequence[Pictures], empty: Tensor, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Decode, crop, resize and augment the images of a micro-batch on the device.

    empty: a tensor of the shape of the result, [B, 1, 3, S, S] uint8. Also returns the rows of the
    JPEGs that the device cannot decode, whose pixels are not set.
    """
    pixels, row, jobs = torch.empty_like(empty, device=device), 0, list[_Job]()
    for number, part in enumerate(parts):
        decoded = iter(part.decoded)
        for place in part.jpegs:
            if place is None:
                pixels[row] = next(decoded).to(device)
            else:
                key = number, place[0].start
                jobs.append(_Job(row, key, part.data[place[0]], place[1]))
            row += 1
    failed: list[int] = []
    for chunk in _chunks(jobs):
        images = _decode_upright(chunk, device)
        failed += [job.row for job in chunk if job.image not in images]
        good = [job for job in chunk if job.image in images]
        if good:
            resized = _cropped_and_resized([images[job.image] for job in good], good)
            pixels[torch.tensor([job.row for job in good], device=device)] = resized[:, None]
        for job in good:
            if job.jpeg.augmentation is not None and job.jpeg.augmentation.seed is not None:
                pixels[job.row] = job.jpeg.augmentation.apply_policy(pixels[job.row])
    return pixels, sorted(failed)


def _chunks(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    """Split jobs into chunks of similar sizes that need limited memory."""
    chunk: list[_Job] = []
    width = height = 0
    for job in sorted(jobs, key=lambda job: (job.jpeg.size[0] * job.jpeg.size[1], job.row)):
        width, height = max(width, job.jpeg.size[0]), max(height, job.jpeg.size[1])
        each = (width + job.jpeg.side) * (height + job.jpeg.side)  # with the weights and the result
        if chunk and (len(chunk) + 1) * each > CHUNK:
            yield chunk
            chunk = []
            width, height = job.jpeg.size
        chunk.append(job)
    if chunk:
        yield chunk


def _decode_upright(jobs: Sequence[_Job], device: torch.device) -> dict[tuple[int, int], Tensor]:
    """Decode the images of jobs to [3, H, W], upright, without those that cannot be decoded."""
    distinct = {job.image: job for job in jobs}
    decoded = _decoded([job.data for job in distinct.values()], device)
    images = {}
    for (key, job), image in zip(distinct.items(), decoded, strict=True):
        if image is not None and image.shape[1:] == job.jpeg.size[::-1]:
            images[key] = _upright(image, job.jpeg.orientation)
    return images


def _decoded(data: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEGs to [3, H, W] as stored; None for one that cannot be decoded."""
    cuda = device.type == "cuda"
    if cuda:
        # nvJPEG writes on a stream of its own, to memory that this stream may still read.
        torch.cuda.current_stream(device).synchronize()
    try:
        return decode_jpeg(data, ImageReadMode.RGB, device=device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if cuda:
            torch.cuda.synchronize(device)  # it may still write to memory that is free now
    # A call returns all images or none.
    return [None] if len(data) == 1 else [x for one in data for x in _decoded([one], device)]


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to an image [3, H, W]."""
    if orientation > 4:
        image = image.transpose(1, 2)
    # the axes on which the stored, or the transposed, image is mirrored
    axes = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return image.flip(axes) if axes else image


def _cropped_and_resized(images: Sequence[Tensor], jobs: Sequence[_Job]) -> Tensor:
    """Crop images [3, H, W], flip them and resize them (bicubic) to [n, 3, S, S] uint8.

    One matrix product per axis resizes all images. A GPU needs one launch per image only for the
    crops.
    """
    device, side = images[0].device, jobs[0].jpeg.side
    width = max(job.jpeg.box[2] for job in jobs)
    height = max(job.jpeg.box[3] for job in jobs)
    crops = torch.zeros(len(jobs), 3, height, width, device=device)
    for crop, image, job in zip(crops, images, jobs, strict=True):
        left, top, w, h = job.jpeg.box
        crop[:, :h, :w] = image[:, top : top + h, left : left + w]
    drawn = [job.jpeg.augmentation for job in jobs]
    flips = [augmentation is not None and augmentation.flip for augmentation in drawn]
    numbers = [[*job.jpeg.box[2:], flip] for job, flip in zip(jobs, flips, strict=True)]
    widths, heights, flipped = torch.tensor(numbers, device=device).unbind(1)
    across, down = _bicubic_weights(widths, width, side), _bicubic_weights(heights, height, side)
    across = torch.where(flipped[:, None, None] > 0, across.flip(1), across)
    narrow = _rounded(torch.einsum("nchw,nxw->nchx", crops, across))
    return _rounded(torch.einsum("nchx,nyh->ncyx", narrow, down)).to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    """Round pixel values to [0, 255] in place, after each axis as on the CPU."""
    return values.add_(0.5 + TIE).floor_().clamp_(0, 255)


def _bicubic_weights(lengths: Tensor, longest: int, side: int) -> Tensor:
    """Return weights [n, S, longest] that resize n lengths to S pixels.

    They are those of Pillow and torchvision: antialiased, a = -0.5.
    """
    scale = (lengths / side)[:, None]
    centres = (torch.arange(side, device=lengths.device) + 0.5) * scale
    places = torch.arange(longest, device=lengths.device) + 0.5
    x = (places - centres[..., None]).abs_() / scale.clamp(min=1.0)[..., None]
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights *= places < lengths[:, None, None]
    return weights / weights.sum(dim=-1, keepdim=True)
