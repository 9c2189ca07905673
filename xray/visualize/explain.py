"""`xray show`: drawings of reconstructions and of the tokens that token reduction keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_pipelines.decode.transforms import read_media
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import VisionEncoder, restore_decoder
from xray.artifacts.manifest_config import DecoderConfig, data_config, decoder_config
from xray.artifacts.offers import DECODER
from xray.errors import ConfigError
from xray.models.mae_decoder import MaeDecoder, patch_statistics
from xray.models.patch_embed import patchify, unpatchify
from xray.models.token_reduction import KeepRate, group_sizes, kept_alone
from xray.reports.html import Picture, paragraph, write_report

FORMATS = (".png", ".html")
SIDE = 144  # least pixels per shown image
GAP = 4
MARGIN = 104  # pixels for the rows' names
TEXT = 13
VEIL = (64.0, 96.0, 176.0)  # colour of removed tokens: a blue that backgrounds rarely have


@dataclass
class Sheet:
    """Grid of images: cells [R, C, 3, H, W] in 0..255, with a name per row and column."""

    rows: list[str]
    columns: list[str]
    cells: Tensor

    def draw(self) -> np.ndarray:
        """Draw the sheet as one image [H', W', 3] uint8."""
        R, C, _, H, W = self.cells.shape
        zoom = max(1, round(SIDE / max(H, W)))
        cells = self.cells.round().clamp(0, 255).byte()
        cells = cells.repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)
        h, w = H * zoom + GAP, W * zoom + GAP
        top = TEXT + 2 * GAP if any(self.columns) else 0
        canvas = Image.new("RGB", (MARGIN + C * w, top + R * h), "white")
        draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(TEXT)
        for c, name in enumerate(self.columns):
            short = name if font.getlength(name) < w else name[: max(1, w // 8 - 1)] + "…"
            draw.text((MARGIN + c * w, GAP), short, fill="black", font=font)
        for r, name in enumerate(self.rows):
            draw.multiline_text((GAP, top + r * h + GAP), name, fill="black", font=font)
            for c in range(C):
                cell = Image.fromarray(cells[r, c].permute(1, 2, 0).numpy())
                canvas.paste(cell, (MARGIN + c * w, top + r * h))
        return np.array(canvas)


@torch.no_grad()
def reconstructions(
    encoder: VisionEncoder,
    decoder: MaeDecoder,
    options: DecoderConfig,
    pixels: Tensor,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Sheet:
    """Draw masked, reconstructed and original [B, T, 3, S, S] uint8; a clip by tubelets.

    Under norm_pix_loss a patch's mean and variance are taken from the original.
    """
    vision, normalize = encoder.vision, encoder.normalize
    x = normalize(pixels)
    grid = vision.token_grid(x)
    masking = options.masking
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(x), masking.noise_size(grid), generator=generator)
    visible, _, restore = masking.draw(noise, grid, x.shape[1])
    tokens = vision(x, visible=visible)
    predicted = decoder(tokens.cls, tokens.patches, restore, grid)
    target = patchify(vision.tubelets(x), vision.patch_size, vision.tubelet)
    if options.norm_pix_loss:
        mean, deviation = patch_statistics(target, per_channel=options.norm_pix == "channel")
        predicted = predicted * deviation + mean
    removed = (restore >= visible.shape[1]).float()[..., None]

    def frames(patches: Tensor) -> Tensor:
        """Take the first frame of each tubelet: [B * t, 3, H, W]."""
        whole = unpatchify(patches, grid, vision.patch_size)[:, :: vision.tubelet]
        return whole.flatten(0, 1)

    original, filled = frames(target), frames(target * (1 - removed) + predicted * removed)
    original, filled = (y * normalize.std + normalize.mean for y in (original, filled))
    hidden = frames(removed.expand_as(target))
    cells = torch.stack([original * (1 - hidden) + 128 * hidden, filled, original])
    share = f"{removed.mean():.0%}"
    return Sheet(
        [f"masked\n{share}", "reconstructed", "original"], _columns(names, len(x), grid[0]), cells
    )


@torch.no_grad()
def kept_tokens(encoder: VisionEncoder, pixels: Tensor, names: Sequence[str] = ()) -> Sheet:
    """Draw the image, then the tokens left after each reducing block; a clip by tubelets.

    Fused or dropped tokens are veiled in blue; tokens merged by ToMe show their mean colour.
    """
    vision = encoder.vision
    x = encoder.normalize(pixels)
    rate = encoder.keep_rate
    tokens = vision(x, rate, track=True)
    t, h, w = vision.token_grid(x)
    frames = vision.tubelets(pixels)[:, :: vision.tubelet].flatten(0, 1).float()
    n = h * w if vision.video == "frames" else t * h * w  # tokens that attend to each other
    left = vision.token_counts(n, rate)
    rows, shown = [f"input\n{n} tokens"], [frames]
    for block, assign in zip(vision.rates(rate), tokens.assign, strict=True):
        rows.append(f"block {block}\n{left[block]} tokens")
        if vision.reduction == "tome":
            shown.append(_merged(frames, assign, (h, w)))
        else:
            mask = F.interpolate(
                kept_alone(assign).float().reshape(-1, 1, h, w), size=frames.shape[-2:]
            )
            veiled = 0.25 * frames + 0.75 * torch.tensor(VEIL)[:, None, None]
            shown.append(frames * mask + veiled * (1 - mask))
    return Sheet(rows, _columns(names, len(x), t), torch.stack(shown))


def _merged(frames: Tensor, assign: Tensor, grid: tuple[int, int]) -> Tensor:
    """Fill every merged token of frames [B * t, 3, H, W] with the mean colour of its patches."""
    B, n = assign.shape
    colour = F.adaptive_avg_pool2d(frames, grid).flatten(2)  # [B * t, 3, h * w]
    colour = colour.unflatten(0, (B, -1)).transpose(1, 2).reshape(B, 3, n)
    place = assign[:, None].expand(-1, 3, -1)
    groups = torch.zeros(B, 3, int(assign.max()) + 1)
    sizes = group_sizes(assign)
    mean = groups.scatter_add(2, place, colour).gather(2, place) / sizes[:, None]

    def spread(values: Tensor) -> Tensor:
        """Spread token values [B, c, n] over pixels [B * t, c, H, W]."""
        pictures = values.unflatten(2, (-1, *grid)).transpose(1, 2).flatten(0, 1)
        return F.interpolate(pictures, size=frames.shape[-2:])

    alone = spread((sizes == 1).float()[:, None])
    return frames * alone + spread(mean) * (1 - alone)


def _columns(names: Sequence[str], samples: int, slots: int) -> list[str]:
    """Make column names: one over the first image of each sample."""
    given = list(names) or [""] * samples
    return [name if slot == 0 else "" for name in given for slot in range(slots)]


def show(artifact: Artifact, files: Sequence[Path], out: Path, keep_rate: float | None) -> None:
    """Draw kept tokens of images and clips, and reconstructions if there is a decoder.

    Raises ConfigError if the artifact has neither, DataError for a file of another type.
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
