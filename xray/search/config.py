"""Settings of `xray embed`, which are read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from xray.config import Precision
from xray.errors import ConfigError
from xray.search.quantisation import Dtype


@dataclass
class EmbedConfig:
    """Settings of an embedding job."""

    dtype: Dtype = "fp32"
    dim: int = 0  # number of leading features or components, normalised again; 0 = all
    # embedding file to fit PCA on, or one whose own PCA is used; "" = keep features as they are
    pca: str = ""
    keep_rate: float | None = None  # replaces the artifact's own
    precision: Precision = "fp32"  # of the encoder
    captions: dict[str, float] = field(default_factory=dict)  # json fields; {} = the usual ones
    patches: bool = False  # patch tokens in the place of one feature per sample
    batch_size: int = 64
    workers: int = 2

    def validate(self) -> None:
        """Raise ConfigError naming the option to change."""
        for name, kinds in (("dtype", get_args(Dtype)), ("precision", get_args(Precision))):
            if getattr(self, name) not in kinds:
                raise ConfigError(f"--{name} {getattr(self, name)}: use {', '.join(kinds)}")
        if self.dim < 0 or self.batch_size < 1 or self.workers < 0:
            raise ConfigError("--dim and --workers must be at least 0, --batch-size at least 1")
        if self.patches and (self.dim or self.pca or self.dtype not in ("fp32", "fp16")):
            raise ConfigError("--patches: use --dtype fp32 or fp16, and leave out --dim and --pca")
