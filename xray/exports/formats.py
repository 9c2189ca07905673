"""Formats of `xray export --to`, which are checked without torch."""

from __future__ import annotations

from typing import Literal, get_args

from xray.errors import ConfigError, nearest

Format = Literal["timm", "open_clip", "transformers", "onnx", "safetensors"]


def check_format(form: str, keep_rate: object, frames: int) -> None:
    """Raise ConfigError for an unknown format, and for options that it does not have."""
    formats = get_args(Format)
    if form not in formats:
        raise ConfigError(f"--to {form}: it is one of {', '.join(formats)}{nearest(form, formats)}")
    if form != "onnx" and (keep_rate is not None or frames != 1):
        raise ConfigError(
            f"--keep-rate and --frames are for --to onnx: --to {form} has neither fixed"
        )
