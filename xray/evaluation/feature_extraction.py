"""Features, captions and labels of an evaluation source."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels, load_views
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loader import Fields, iterate_source
from data_pipelines.text.captions import find_captions, metadata_of
from xray.artifacts.encoders import Encoder, VisionEncoder
from xray.config import DataConfig
from xray.errors import DataError
from xray.models.inference import one_behind
from xray.progress import progress_of

# Changes an image or clip [T, 3, S, S] uint8; draws from the sample's own generator.
Change = Callable[[Tensor, np.random.Generator], Tensor]


@dataclass
class Features:
    """Features and labels of a source.

    rows: [N, D] normalised. labels: [N] long, -1 for a sample without a label. views: [N, V, D]
    normalised; rows are their normalised mean.
    """

    rows: Tensor
    labels: Tensor
    views: Tensor


@dataclass(frozen=True)
class Views:
    """Views of a sample: times and squares of a clip, and a change to each image."""

    clips: int = 1
    crops: int = 1
    change: Change | None = None
    seed: int = 0


def label_of(files: dict[str, bytes]) -> int:
    """Read the class number: the cls file, else an integer json field `label`, else -1.

    Raises DataError for a cls file that contains no number, and for a number that is too large.
    """
    label = metadata_of(files).get("label") if "cls" not in files else None
    if "cls" in files:
        try:
            label = int(files["cls"])
        except ValueError as error:
            raise DataError(f"cls file contains {files['cls'][:20]!r}, not a number") from error
    if not isinstance(label, int):
        return -1
    if label >= 2**63:
        raise DataError(f"class number {label} is too large")
    return max(label, -1)


def labels_of(source: Source) -> Tensor:
    """Read the class numbers of a source in order, [N], without its images."""
    files = ("cls", "json")
    return torch.tensor([label_of(source.read(*place, files)) for place in source.places()])


def view_pixels(sample: Sample, source: Source, data: DataConfig, views: Views) -> Tensor:
    """Load the views of a sample, [V, T, 3, S, S] uint8, the same at every call; images have 1."""
    if sample.modality == "video" and views.clips * views.crops > 1:
        pixels = load_views(sample, data, views.clips, views.crops)
    else:
        pixels = load_pixels(sample, data, None)[None]
    if views.change is None:
        return pixels
    own = zlib.crc32(source.identity(sample.shard, sample.member).encode())
    change, rng = views.change, np.random.default_rng([views.seed, own])
    return torch.stack([change(view, rng) for view in pixels])


def stacked(rows: Sequence[Fields]) -> Fields:
    """Stack rows of equal shapes into a batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches_of(
    source: Source, data: DataConfig, batch_size: int, views: Views | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a whole source in order: pixels [B, V, T, 3, S, S] uint8, labels [B]; shows progress.

    A batch has about batch_size views.
    """
    chosen = views or Views()
    per_sample = chosen.clips * chosen.crops if source.modality == "video" else 1
    size = max(1, batch_size // per_sample)

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        pixels = view_pixels(sample, source, data, chosen)
        return {"pixels": pixels, "label": torch.tensor(label_of(sample.files))}

    batches = iterate_source(source, transform, stacked, data, size)
    for batch in progress_of(source.name)(batches, math.ceil(len(source) / size)):
        yield batch["pixels"], batch["label"]


def extract_spaces(
    source: Source,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    data: DataConfig,
    batch_size: int = 64,
    views: Views | None = None,
) -> dict[str, Features]:
    """Encode a whole source once, in order, into each space that `encode` names.

    encode: [B, T, 3, S, S] uint8 -> rows by space. Only the rows grow with the source. Raises
    DataError for features that are NaN or infinite.
    """
    spaces: dict[str, Tensor] = {}
    labels, done = torch.empty(len(source), dtype=torch.long), 0

    def encoded() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for pixels, own in batches_of(source, data, batch_size, views):
            rows = encode(pixels.flatten(0, 1))
            yield own, {name: row.unflatten(0, pixels.shape[:2]) for name, row in rows.items()}

    for own, batch in one_behind(encoded()):
        until = done + len(own)
        for space, rows in batch.items():
            if space not in spaces:
                spaces[space] = rows.new_empty(len(source), *rows.shape[1:])
            if not rows.isfinite().all():  # NaN similarities would rank first
                raise DataError(f"{source.name}: the model's features are NaN or infinite")
            spaces[space][done:until] = rows
        labels[done:until], done = own, until
    pooled = {
        space: views[:, 0] if views.shape[1] == 1 else F.normalize(views.mean(dim=1), dim=-1)
        for space, views in spaces.items()
    }
    return {space: Features(pooled[space], labels, views) for space, views in spaces.items()}


def extract(
    source: Source, encode: Callable[[Tensor], Tensor], data: DataConfig, batch_size: int = 64
) -> Features:
    """Encode a whole source in order; `data` gives resolution, frames and workers."""
    return extract_spaces(source, lambda pixels: {"": encode(pixels)}, data, batch_size)[""]


def spaces_of(encoder: VisionEncoder) -> Callable[[Tensor], dict[str, Tensor]]:
    """Make the function that encodes pixels into all spaces by one pass of the backbone."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> dict[str, Tensor]:
        cls = encoder.cls(pixels)
        spaces = {"backbone": F.normalize(cls.float(), dim=-1)}
        if isinstance(encoder, Encoder):
            spaces["joint"] = encoder.joint(cls)
        return spaces

    return encode


def read_all_captions(source: Source, fields: Mapping[str, float] | None = None) -> list[list[str]]:
    """Read the captions of each sample of a source, in order; an empty list if it has none."""
    return [find_captions(source, *place, fields) for place in source.places()]


def flat_captions(captions: Sequence[Sequence[str]], key: str) -> tuple[list[str], Tensor]:
    """List all captions [M], and the number of the sample that each belongs to, [M].

    Raises DataError naming the config's key if a sample has none.
    """
    empty = sum(not own for own in captions)
    if empty:
        raise DataError(f"{key}: {empty} samples have no caption")
    owner = [number for number, own in enumerate(captions) for _ in own]
    return [caption for own in captions for caption in own], torch.tensor(owner)
