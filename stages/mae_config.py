"""Settings of the mae stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xray.config import ModelConfig, RunConfig
from xray.config.identity import added
from xray.errors import ConfigError


@dataclass
class MaeOptions:
    """Masks and decoder."""

    mask_ratio: float = 0.75  # share of the patches of an image that are masked
    video_mask_ratio: float = 0.9  # share of the patches of a clip that are masked
    video_mask: Literal["tube", "random"] = "tube"  # the same places in each time slot, or any
    norm_pix_loss: bool = True  # targets are the pixels of a patch, normalised within the patch
    # values that a target is normalised over: all of a patch or tubelet, as in MAE, or those of
    # each colour channel, as in VideoMAE
    norm_pix: Literal["tubelet", "channel"] = added("tubelet")
    decoder_dim: int = 512  # width of the decoder; a multiple of 4 x decoder_heads
    decoder_depth: int = 4  # number of transformer blocks of the decoder
    decoder_heads: int = 16  # attention heads per block of the decoder

    def validate(self, model: ModelConfig) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        for name in ("mask_ratio", "video_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"mae.{name}={getattr(self, name)} must be in (0, 1)")
        if self.video_mask == "random" and model.video == "frames":
            raise ConfigError(
                "mae.video_mask=random leaves frames with unequal numbers of tokens, which "
                "model.video=frames cannot encode: set mae.video_mask=tube"
            )
        if self.decoder_dim % (4 * self.decoder_heads):
            raise ConfigError(
                f"mae.decoder_dim={self.decoder_dim} must be a multiple of 4 x "
                f"mae.decoder_heads={self.decoder_heads}"
            )


@dataclass
class MaeConfig(RunConfig):
    """Settings of a mae run."""

    mae: MaeOptions = field(default_factory=MaeOptions)

    def validate(self) -> None:
        super().validate()
        self.mae.validate(self.model)
