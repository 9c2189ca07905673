"""Stage 1: masked auto-encoding of images (random masks) and clips (tube masks)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards import Sample
from data_pipelines.transforms import load_pixels
from stages.base import (
    Batch,
    Parents,
    Stage,
    State,
    StepOutput,
    VisionModule,
    load_vision,
    part,
)
from xray.config import RunConfig
from xray.errors import ConfigError
from xray.losses import masked_patch_mse
from xray.models.mae_decoder import MaeDecoder, make_mask, normalize_patches, patchify


@dataclass
class MaeOptions:
    """Masks and decoder."""

    mask_ratio: float = 0.75  # images
    video_mask_ratio: float = 0.9  # clips, the same places in every time slot
    norm_pix_loss: bool = True
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 16


@dataclass
class MaeConfig(RunConfig):
    mae: MaeOptions = field(default_factory=MaeOptions)

    def validate(self) -> None:
        super().validate()
        for name in ("mask_ratio", "video_mask_ratio"):
            if not 0 < getattr(self.mae, name) < 1:
                raise ConfigError(f"mae.{name}={getattr(self.mae, name)} must be in (0, 1)")
        if self.mae.decoder_dim % (4 * self.mae.decoder_heads):
            raise ConfigError(
                f"mae.decoder_dim={self.mae.decoder_dim} must be a multiple of 4 x "
                f"mae.decoder_heads={self.mae.decoder_heads}"
            )


class MaeModule(VisionModule):
    """Backbone over visible tokens, decoder over all."""

    def __init__(self, config: MaeConfig) -> None:
        super().__init__(config)
        self.options = config.mae
        vision = self.vision
        options = self.options
        self.decoder = MaeDecoder(
            vision.embed_dim,
            vision.patch_values,
            options.decoder_dim,
            options.decoder_depth,
            options.decoder_heads,
        )

    def keep_rate(self, progress: float) -> float:
        return 1.0  # the decoder puts every visible token back in its place

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        vision = self.vision
        pixels = self.normalize(batch["pixels"])
        grid = vision.token_grid(pixels)
        is_clip = pixels.shape[1] > 1
        ratio = self.options.video_mask_ratio if is_clip else self.options.mask_ratio
        visible, mask, ids_restore = make_mask(batch["mask_noise"], grid[0], ratio)
        tokens = vision(pixels, visible=visible)
        predictions = self.decoder(tokens.cls, tokens.patches, ids_restore, grid)
        targets = patchify(pixels, vision.patch_size, vision.tubelet)
        if self.options.norm_pix_loss:
            targets = normalize_patches(targets)
        return {"predictions": predictions, "targets": targets, "mask": mask}

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        return StepOutput(masked_patch_mse(**features), {})


class MaeStage(Stage):
    name = "mae"
    Config = MaeConfig
    accepts = ("mae", "hashtag", "clip")

    def build(self, parents: Parents) -> MaeModule:
        module = MaeModule(self.config)
        load_vision(module, parents.vision)
        self.patch_size = module.vision.patch_size  # the masks are drawn on the data side
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        pixels = load_pixels(sample, self.config.data, rng)
        patches = pixels.shape[-2] // self.patch_size[0] * (pixels.shape[-1] // self.patch_size[1])
        draw = rng if rng is not None else np.random.default_rng(0)
        return {
            "pixels": pixels,
            "mask_noise": torch.from_numpy(draw.random(patches, dtype=np.float32)),
        }

    def export(self, module: MaeModule, state: State) -> dict[str, State]:
        return {"backbone": part(state, "towers.vision."), "decoder": part(state, "decoder.")}
