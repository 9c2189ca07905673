"""`xray show`: what an artifact sees in the user's own pictures and clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode import BadSample
from data_pipelines.shards import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Sample
from data_pipelines.transforms import load_pixels
from xray.artifact import Artifact
from xray.config import DataConfig
from xray.errors import ConfigError, DataError
from xray.models.reduce import KeepRate
from xray.pictures import Sheet, kept_tokens, reconstructions
from xray.report import Picture, paragraph, write_report
from xray.restore import VisionEncoder
from xray.schedule import value_at

FORMATS = (".png", ".html")
RECONSTRUCTED = (
    "Masked, reconstructed, original. Each patch's mean and variance are taken from the original; "
    "a clip shows the first frame of each tubelet."
)
KEPT = (
    "The input, then the tokens left after each block that reduces them. Blue ones were fused "
    "(merged ones of ToMe show their mean colour); a clip shows the first frame of each tubelet."
)


def show(artifact: Artifact, files: Sequence[Path], out: Path, keep_rate: float | None) -> None:
    """Write kept tokens, and reconstructions where there is a decoder, of images and clips.

    Raises ConfigError when the artifact has neither to show, DataError for a file that is no
    picture and no clip.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {' or '.join(FORMATS)}")
    data = artifact.manifest["config"]["data"]
    size = value_at(data["resolution"], 1.0), value_at(data["frames"], 1.0)
    groups = group(files, [read_media(path, *size) for path in files])
    pictures = []
    for names, pixels in groups:
        pictures += explain(artifact, pixels, names, keep_rate)
    if not pictures:
        raise ConfigError(
            f"{artifact.path} has no decoder and keeps all tokens (keep rate 1): give --keep-rate, "
            "or show an artifact of stage mae"
        )
    if out.suffix == ".html":
        note = paragraph(f"{artifact.path}, stage {artifact.stage}")
        write_report(out, "xray show", [note, *(picture.html() for picture in pictures)])
    else:
        Image.fromarray(stack([picture.pixels for picture in pictures])).save(out)


def explain(
    artifact: Artifact,
    pixels: Tensor,
    names: Sequence[str] = (),
    keep_rate: KeepRate | None = None,
) -> list[Picture]:
    """The pictures an artifact can give of [B, T, 3, S, S] uint8 images or one clip."""
    what = "images" if pixels.shape[1] == 1 else "clip"
    found: list[tuple[str, str, Sheet]] = []
    if artifact.stage == "mae":
        sheet = reconstructions(artifact, pixels, names)
        found.append(("MAE reconstructions", RECONSTRUCTED, sheet))
    encoder = VisionEncoder(artifact)
    rate = encoder.keep_rate if keep_rate is None else keep_rate
    if keep_rate is not None and encoder.vision.reduction == "none":
        raise ConfigError(f"{artifact.path} was trained with model.reduce=none: leave --keep-rate")
    if encoder.vision.rates(rate):
        sheet = kept_tokens(encoder, pixels, names, rate)
        found.append((f"Kept tokens ({encoder.vision.reduction}, keep rate {rate})", KEPT, sheet))
    return [
        Picture(f"{title}, {what} ({artifact.stage})", caption, sheet.draw())
        for title, caption, sheet in found
    ]


def read_media(path: Path, resolution: int, frames: int) -> Tensor:
    """A picture or clip, centre-cropped: [T, 3, S, S] uint8, T = 1 for a picture."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    ending = path.suffix.lower().removeprefix(".")
    endings = (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS)
    if ending not in endings:
        known = ", ".join(f".{name}" for name in endings)
        raise DataError(f"{path} is neither a picture nor a clip: it must end in one of {known}")
    modality = "image" if ending in IMAGE_EXTENSIONS else "video"
    sample = Sample({ending: path.read_bytes()}, "show", modality, path.stem, resolution, frames)
    try:
        return load_pixels(sample, DataConfig(), None)
    except BadSample as error:
        raise DataError(f"{path}: {error}") from error


def group(files: Sequence[Path], media: Sequence[Tensor]) -> list[tuple[list[str], Tensor]]:
    """All images together, each clip for itself: (names, [B, T, 3, S, S])."""
    images = [(path.name, x) for path, x in zip(files, media, strict=True) if len(x) == 1]
    clips = [(path.name, x) for path, x in zip(files, media, strict=True) if len(x) > 1]
    groups = [([name], x[None]) for name, x in clips]
    if images:
        names, pixels = zip(*images, strict=True)
        groups.insert(0, (list(names), torch.stack(pixels)))
    return groups


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below each other on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(p, ((0, 12), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures
    ]
    return np.concatenate(padded)
