"""Features of pixels and of texts by any artifact, on its device: [B, D]."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder
from xray.errors import ConfigError
from xray.precompute.inference import Place


class Batch(NamedTuple):
    """Readable places, their rows [n, D], and the cause by place of the others."""

    here: list[Place]
    rows: Tensor | None
    bad: dict[Place, str]


def set_keep_rate(
    encoder: VisionEncoder | TextEncoder, keep_rate: float | None, text: bool
) -> None:
    """Set another keep rate; raises ConfigError for texts."""
    if keep_rate is None:
        return
    if text or not isinstance(encoder, VisionEncoder):
        raise ConfigError("--keep-rate applies to pictures and clips, and these are texts")
    encoder.choose(keep_rate)


def width_of(encoder: VisionEncoder | TextEncoder, text: bool) -> int:
    """Return the number of features; raises ConfigError for a modality it cannot encode."""
    what = f"{encoder.artifact.path} is of stage {encoder.artifact.stage}"
    if isinstance(encoder, TextEncoder):
        if not text:
            raise ConfigError(f"{what}: it encodes texts (a .txt, or --texts), not pictures")
        return int(encoder.text.width)
    if isinstance(encoder, Encoder):
        return encoder.options.embed_dim
    if text:
        raise ConfigError(f"{what}: texts are encoded by a clip or text artifact")
    return int(encoder.vision.embed_dim)


def of_pixels(encoder: VisionEncoder | TextEncoder) -> Callable[[Tensor], Tensor]:
    """Return the encoder of pixels [B, T, 3, H, W] to [B, D], on their device."""
    if isinstance(encoder, Encoder):
        return encoder.image_features
    assert isinstance(encoder, VisionEncoder)
    return encoder.cls


def of_texts(encoder: VisionEncoder | TextEncoder) -> Callable[[Sequence[str]], Tensor]:
    """Return the encoder of N texts to [N, D]."""
    assert isinstance(encoder, Encoder | TextEncoder)
    device = next(encoder.parameters()).device

    def encode(texts: Sequence[str]) -> Tensor:
        tokens = {key: value.to(device) for key, value in encoder.tokenizer(texts).items()}
        if isinstance(encoder, Encoder):
            return encoder.text_features(tokens)
        found: Tensor = encoder.text(**tokens)
        return found

    return encode


def one_behind(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Move rows to the CPU one batch late, so that a GPU does not wait for the copy."""
    before: tuple[Batch, Any] | None = None
    for batch in batches:
        rows, ready = batch.rows, None
        if rows is not None and rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        if before is not None:
            yield _there(*before)
        before = batch._replace(rows=rows), ready
    if before is not None:
        yield _there(*before)


def _there(batch: Batch, ready: Any) -> Batch:
    if ready is not None:
        ready.synchronize()
    return batch


def warn_of_prefix(encoder: VisionEncoder | TextEncoder, dim: int) -> None:
    """Warn on stderr if the first `dim` features were not trained to be used alone."""
    trained = encoder.matryoshka if isinstance(encoder, Encoder) else []
    if dim not in trained:
        told = f"those of {', '.join(map(str, trained))} were" if trained else "none was"
        print(
            f"warning: a prefix of {dim} dimensions was not trained (clip.matryoshka), {told}",
            file=sys.stderr,
        )
