"""Distillation teachers of the clip stage: a clip artifact, or a model of open_clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder
from xray.artifacts.manifest_config import image_side, text_config
from xray.artifacts.offers import JOINT
from xray.errors import ArtifactError, ConfigError
from xray.files import sha256_file
from xray.models.hub import hub
from xray.models.tokenizer import TokenIds

OPEN_CLIP = "open_clip:"  # open_clip:MODEL:WEIGHTS; WEIGHTS: a file or a pretrained tag


def load_teacher(name: str, device: torch.device, llm: str = "") -> Teacher:
    """Load a teacher from an artifact's folder or URL, or open_clip:MODEL:WEIGHTS.

    llm: the run's own LLM, tried if the artifact's LLM is no longer at its path. Raises ConfigError
    or ArtifactError for a teacher that cannot be loaded.
    """
    if name.startswith(OPEN_CLIP):
        return OpenClip(name, device)
    return FromArtifact(name, device, llm)


class FromArtifact:
    """A clip artifact as a teacher, with its own tokenizer and image size."""

    def __init__(self, path: str, device: torch.device, llm: str = "") -> None:
        try:
            artifact = open_artifact(path)
        except ArtifactError as error:
            raise ArtifactError(f"clip.teacher: {error}") from error
        if JOINT not in artifact.offers:
            raise ArtifactError(
                f"clip.teacher={path} is of stage {artifact.stage}: a clip artifact can teach, or "
                f"{OPEN_CLIP}MODEL:WEIGHTS"
            )
        theirs = Path(text_config(artifact).llm)
        if theirs.is_absolute() and not theirs.exists():
            artifact = dataclasses.replace(artifact, llm=llm)
        self.encoder = Encoder(artifact).to(device)
        self.digest, self.scale = artifact.digest, float(self.encoder.logit_scale)
        self.side = image_side(artifact)

    def tokens(self, captions: Sequence[str]) -> TokenIds:
        """Tokenize the captions of one sample, [C, L]; runs in loader workers."""
        return self.encoder.tokenizer(captions)

    def pad(self, rows: Sequence[TokenIds]) -> TokenIds:
        """Stack [C, L] of each sample to [B, C, longest L]."""
        return self.encoder.tokenizer.pad(rows)

    @torch.no_grad()
    def features(self, pixels: Tensor, tokens: TokenIds) -> tuple[Tensor, Tensor]:
        """Encode pixels [B, T, 3, H, W] uint8 to [B, E] and tokens to [B, C, E], normalised."""
        sized = resized(pixels, (self.side, self.side))
        return self.encoder.image_features(sized), self.encoder.text_features(tokens)


class OpenClip:
    """A model of open_clip as a teacher; the feature of a clip is the mean over its frames."""

    def __init__(self, name: str, device: torch.device) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError(f"clip.teacher={name} needs pip install open_clip_torch") from error
        model, _, weights = name.removeprefix(OPEN_CLIP).partition(":")
        if not weights:
            raise ConfigError(f"clip.teacher={name} must be {OPEN_CLIP}MODEL:WEIGHTS")
        instead = f"download its weights, and set clip.teacher={OPEN_CLIP}{model}:FILE"
        with hub(instead) as explain:
            try:
                built = open_clip.create_model(model, pretrained=weights)
                self.tokenizer = open_clip.get_tokenizer(model)
            except Exception as error:  # an unknown model, no file, no network
                raise ConfigError(
                    f"clip.teacher={name} cannot be loaded: {explain(error)}"
                ) from error
        self.model: Any = built.to(device).eval()
        self.model.requires_grad_(False)
        self.digest = sha256_file(Path(weights)) if Path(weights).is_file() else name
        self.scale = float(self.model.logit_scale.exp())
        visual = self.model.visual
        self.mean, self.std = (
            torch.tensor(values, device=device).view(1, 3, 1, 1)
            for values in (visual.image_mean, visual.image_std)
        )
        size = visual.image_size
        self.size = size if isinstance(size, tuple) else (size, size)

    def tokens(self, captions: Sequence[str]) -> TokenIds:
        return {"input_ids": self.tokenizer(list(captions))}

    def pad(self, rows: Sequence[TokenIds]) -> TokenIds:
        return {"input_ids": torch.stack([row["input_ids"] for row in rows])}

    @torch.no_grad()
    def features(self, pixels: Tensor, tokens: TokenIds) -> tuple[Tensor, Tensor]:
        frames = resized(pixels, self.size).flatten(0, 1).float().div(255)
        frames = (frames - self.mean) / self.std
        image = F.normalize(self.model.encode_image(frames).float(), dim=-1)
        image = F.normalize(image.unflatten(0, pixels.shape[:2]).mean(dim=1), dim=-1)
        ids = tokens["input_ids"]
        text = F.normalize(self.model.encode_text(ids.flatten(0, 1)).float(), dim=-1)
        return image, text.unflatten(0, ids.shape[:2])


Teacher = FromArtifact | OpenClip  # its features are what the stage learns from


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pixels [B, T, 3, H, W] uint8, rounding to uint8."""
    if pixels.shape[-2:] == size:
        return pixels
    flat = F.interpolate(
        pixels.flatten(0, 1).float(), size, mode="bicubic", antialias=True, align_corners=False
    )
    return flat.round_().clamp_(0, 255).to(torch.uint8).unflatten(0, pixels.shape[:2])
