"""`xray show`: kept tokens and reconstructions of the user's images and clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode.transforms import read_media
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import VisionEncoder, restore_decoder
from xray.artifacts.manifest_config import data_config, decoder_config
from xray.artifacts.offers import DECODER
from xray.errors import ConfigError
from xray.models.token_reduction import KeepRate
from xray.reports.html import Picture, paragraph, write_report
from xray.visualize.token_maps import Sheet, kept_tokens, reconstructions

FORMATS = (".png", ".html")


def show(artifact: Artifact, files: Sequence[Path], out: Path, keep_rate: float | None) -> None:
    """Draw kept tokens of images and clips, and reconstructions if there is a decoder.

    Raises ConfigError if the artifact has neither, DataError for a file that is no image or clip.
    """
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out} must end in {' or '.join(FORMATS)}")
    data = data_config(artifact)
    media = [read_media(path, data) for path in files]
    explainer = Explainer(artifact, keep_rate)
    if not explainer.kinds:
        remedy = "show" if explainer.reduction == "none" else "give --keep-rate, or show"
        raise ConfigError(
            f"{artifact.path} has no decoder and keeps all tokens: {remedy} another artifact"
        )
    pictures = [
        picture for names, pixels in group(files, media) for picture in explainer(pixels, names)
    ]
    if out.suffix == ".html":
        note = paragraph(f"{artifact.path}, stage {artifact.stage}")
        write_report(out, "xray show", [note, *(picture.html() for picture in pictures)])
    else:
        Image.fromarray(stack([picture.pixels for picture in pictures])).save(out)


class Explainer:
    """Draws what an artifact sees; `kinds` lists the drawings it supports.

    Raises ConfigError for a keep rate that the model cannot have.
    """

    def __init__(self, artifact: Artifact, keep_rate: KeepRate | None = None) -> None:
        self.artifact = artifact
        self.encoder = VisionEncoder(artifact)
        self.reduction = self.encoder.vision.reduction
        if keep_rate is not None:
            self.encoder.choose(keep_rate)
        self.kinds = []
        if DECODER in artifact.offers:
            self.decoder = restore_decoder(artifact, self.encoder.vision)
            self.kinds.append(self._reconstructed)
        if self.encoder.vision.rates(self.encoder.keep_rate):
            self.kinds.append(self._kept)

    def __call__(self, pixels: Tensor, names: Sequence[str] = ()) -> list[Picture]:
        """Draw a picture of each kind for [B, T, 3, S, S] uint8 images or one clip."""
        return [kind(pixels, names) for kind in self.kinds]

    def _reconstructed(self, pixels: Tensor, names: Sequence[str]) -> Picture:
        options = decoder_config(self.artifact)
        sheet = reconstructions(self.encoder, self.decoder, options, pixels, names)
        caption = "Masked, reconstructed, original."
        if options.norm_pix_loss:
            caption += " Each patch's mean and variance are taken from the original."
        return self._picture("MAE reconstructions", caption, sheet, pixels)

    def _kept(self, pixels: Tensor, names: Sequence[str]) -> Picture:
        sheet = kept_tokens(self.encoder, pixels, names)
        gone = {
            "tome": "Tokens that were merged show their mean colour.",
            "fused": "Blue ones were fused into one.",
            "dropped": "Blue ones were dropped.",
        }
        fate = "fused" if self.encoder.vision.fuse else "dropped"
        caption = "The input, then the tokens left after each block that reduces them. "
        caption += gone["tome" if self.reduction == "tome" else fate]
        title = f"Kept tokens ({self.reduction}, keep rate {self.encoder.keep_rate})"
        return self._picture(title, caption, sheet, pixels)

    def _picture(self, title: str, caption: str, sheet: Sheet, pixels: Tensor) -> Picture:
        clip = pixels.shape[1] > 1
        if clip:
            caption += " A clip shows the first frame of each tubelet."
        title = f"{title}, {'clip' if clip else 'images'} ({self.artifact.stage})"
        return Picture(title, caption, sheet.draw())


def group(files: Sequence[Path], media: Sequence[Tensor]) -> list[tuple[list[str], Tensor]]:
    """Group all images together and each clip by itself: (names, [B, T, 3, S, S])."""
    images = [(path.name, x) for path, x in zip(files, media, strict=True) if len(x) == 1]
    clips = [(path.name, x) for path, x in zip(files, media, strict=True) if len(x) > 1]
    groups = [([name], x[None]) for name, x in clips]
    if images:
        names, pixels = zip(*images, strict=True)
        groups.insert(0, (list(names), torch.stack(pixels)))
    return groups


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Stack images vertically on white."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(p, ((0, 12), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures
    ]
    return np.concatenate(padded)
