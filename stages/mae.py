"""MAE stage: masked auto-encoding of images (random masks) and clips (tube masks)."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample
from stages.base import (
    Batch,
    Parents,
    Stage,
    StateDict,
    StepOutput,
    VisionModule,
    load_vision,
    part,
    sketch,
)
from stages.feature_guard import RANK
from stages.mae_config import MaeConfig, MaeOptions
from xray.artifacts.offers import DECODER, VISION
from xray.config import RunConfig
from xray.config.schedule import value_at
from xray.losses.reconstruction import masked_patch_mse
from xray.models.backbone import VisionBackbone
from xray.models.effective_rank import effective_rank
from xray.models.flops import decoder_macs, vision_macs
from xray.models.mae_checkpoints import load_decoder
from xray.models.mae_decoder import MaeDecoder, Masking, normalize_patches
from xray.models.patch_embed import Geometry, patchify, whole_tubelets
from xray.models.token_reduction import KeepRate


def masking(options: MaeOptions) -> Masking:
    """Build the mask sampler of the options."""
    return Masking(options.mask_ratio, options.video_mask_ratio, options.video_mask)


def draw_noise(
    options: MaeOptions, geometry: Geometry, pixels: Tensor, rng: np.random.Generator | None
) -> Tensor:
    """Draw `mask_noise` for the mask of a sample's pixels [T, 3, S, S]."""
    size = masking(options).noise_size(geometry.grid(len(pixels), *pixels.shape[-2:]))
    draw = rng if rng is not None else np.random.default_rng(0)
    return torch.from_numpy(draw.random(size, dtype=np.float32))


def example_noise(
    config: RunConfig, options: MaeOptions, samples: int, frames: int, side: int
) -> Tensor:
    """Make zeros of the shape of `mask_noise`, for planning."""
    grid = sketch(config).geometry.grid(frames, side, side)
    return torch.zeros(samples, masking(options).noise_size(grid))


def make_decoder(options: MaeOptions, vision: VisionBackbone) -> MaeDecoder:
    """Build the decoder for a backbone."""
    sizes = options.decoder_dim, options.decoder_depth, options.decoder_heads
    return MaeDecoder(vision.embed_dim, vision.patch_values, *sizes, vision.rows_first)


def reconstruct(
    module: VisionModule,
    decoder: MaeDecoder,
    options: MaeOptions,
    pixels: Tensor,
    noise: Tensor,
    progress: float,
) -> dict[str, Tensor]:
    """Reconstruct the masked patches of normalised pixels: predictions [B, k, f * P] and targets
    [B, k, P] for `masked_patch_mse`, and the backbone's feature cls [B, D].

    The backbone keeps every visible token: the decoder needs each one at its place.
    """
    vision = module.vision
    grid = vision.token_grid(pixels)
    visible, masked, ids_restore = masking(options).draw(noise, grid, pixels.shape[1])
    tokens = module.encode(pixels, progress, visible, keep_rate=1.0)
    predictions = decoder(tokens.cls, tokens.patches, ids_restore, grid, masked)
    # Each frame of a tubelet is predicted. Those of an image, or of a clip that is encoded frame by
    # frame, are equal and have one target.
    equal = vision.tubelet if pixels.shape[1] == 1 or vision.video == "frames" else 1
    frames = pixels if equal > 1 else whole_tubelets(pixels, vision.tubelet)
    targets = patchify(frames, vision.patch_size, vision.tubelet // equal, masked)
    if options.norm_pix_loss:
        targets = normalize_patches(targets, equal, options.norm_pix == "channel")
    return {"predictions": predictions, "targets": targets, "cls": tokens.cls}


class MaeModule(VisionModule):
    """Backbone over the visible tokens, decoder over all tokens."""

    def __init__(self, config: MaeConfig) -> None:
        super().__init__(config)
        self.options = config.mae
        self.decoder = make_decoder(config.mae, self.vision)

    def keep_rate(self, progress: float) -> KeepRate:
        return 1.0  # the decoder needs every visible token at its place

    def features(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        pixels = self.normalize(batch["pixels"])
        given = pixels, batch["mask_noise"], progress
        return reconstruct(self, self.decoder, self.options, *given)

    def loss_from_features(self, features: dict[str, Tensor]) -> StepOutput:
        losses = masked_patch_mse(features["predictions"], features["targets"])
        return StepOutput(losses.mean(), {RANK: effective_rank(features["cls"])})


class MaeStage(Stage[MaeConfig]):
    """Masked autoencoding of images and clips (MAE, VideoMAE)."""

    name = "mae"
    Config = MaeConfig
    offers = frozenset({VISION, DECODER})

    def build(self, parents: Parents) -> MaeModule:
        module = MaeModule(self.config)
        load_vision(module, parents.vision)
        if parents.vision is None:
            load_decoder(module.decoder, self.config.model)
        self.geometry = module.vision.geometry  # transform draws the masks
        return module

    def transform(self, sample: Sample, rng: np.random.Generator | None) -> Batch:
        pixels = load_pixels(sample, self.config.data, rng)
        noise = draw_noise(self.config.mae, self.geometry, pixels, rng)
        return {"pixels": pixels, "mask_noise": noise}

    def macs(self, frames: int, progress: float = 1.0) -> int:
        """Count the encoder over the visible tokens and the decoder over all tokens."""
        side = value_at(self.config.data.resolution, progress)
        seen = self.visible(frames, progress)
        encoder = vision_macs(self._sketch, frames, side, visible=seen)
        return encoder + decoder_macs(self._decoder_sketch, self.tokens(frames, side), seen)

    def visible(self, frames: int, progress: float) -> int:
        side = value_at(self.config.data.resolution, progress)
        grid = self._sketch.geometry.grid(frames, side, side)
        return math.prod(masking(self.config.mae).kept(grid, frames))

    def example_batch(
        self, module: MaeModule, samples: int, frames: int, side: int, source: str = ""
    ) -> Batch:
        batch = super().example_batch(module, samples, frames, side)
        size = samples, frames, side
        return {**batch, "mask_noise": example_noise(self.config, self.config.mae, *size)}

    def spans(self) -> list[tuple[float, float]]:
        return []  # no token is reduced: see MaeModule.keep_rate

    @functools.cached_property
    def _decoder_sketch(self) -> MaeDecoder:
        with torch.device("meta"):
            return make_decoder(self.config.mae, self._sketch)

    def export(self, module: MaeModule, state: StateDict) -> dict[str, StateDict]:
        return {"backbone": part(state, "towers.vision."), "decoder": part(state, "decoder.")}
