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
from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.source import Sample, Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.stream.loader import Fields, iterate_source
from data_pipelines.text.captions import captions_of, metadata_of
from xray.artifacts.encoders import Encoder, VisionEncoder
from xray.config import DataConfig
from xray.errors import DataError
from xray.progress import progress_of

# Makes another picture of one: [T, 3, S, S] uint8, and draws of the sample's own.
Change = Callable[[Tensor, np.random.Generator], Tensor]


@dataclass
class Features:
    """rows: [N, D] normalised. labels: [N] long, -1 where a sample has none.

    views: [N, V, D] normalised; rows are their normalised mean.
    """

    rows: Tensor
    labels: Tensor
    views: Tensor


@dataclass(frozen=True)
class Look:
    """How samples are looked at: times and squares of a clip, and a change of the pictures."""

    clips: int = 1
    crops: int = 1
    change: Change | None = None
    seed: int = 0


def label_of(files: dict[str, bytes]) -> int:
    """The class number: the cls file, else an integer json field `label`, else -1."""
    label = metadata_of(files).get("label") if "cls" not in files else None
    if "cls" in files:
        try:
            label = int(files["cls"])
        except ValueError as error:
            raise DataError(f"cls file holds {files['cls'][:20]!r}, not a number") from error
    if not isinstance(label, int):
        return -1
    if label >= 2**63:
        raise DataError(f"class number {label} is too large")
    return max(label, -1)


def labels_of(source: Source) -> Tensor:
    """The class numbers of a source in order, [N], without its pictures."""
    files = ("cls", "json")
    return torch.tensor([label_of(source.read(*place, files)) for place in source.places()])


def look_at(sample: Sample, source: Source, data: DataConfig, look: Look) -> Tensor:
    """Views of a sample, [V, T, 3, S, S] uint8; the same at every call. V = 1 for an image."""
    if sample.modality == "video" and look.clips * look.crops > 1:
        views = load_views(sample, data, look.clips, look.crops)
    else:
        views = load_pixels(sample, data, None)[None]
    if look.change is None:
        return views
    own = zlib.crc32(source.identity(sample.shard, sample.member).encode())
    change, rng = look.change, np.random.default_rng([look.seed, own])
    return torch.stack([change(view, rng) for view in views])


def stacked(rows: Sequence[Fields]) -> Fields:
    """Rows of equal fields as one batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def batches_of(
    source: Source, data: DataConfig, batch_size: int, look: Look | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a source in order: views [B, V, T, 3, S, S] uint8, labels [B]; shows progress.

    So many samples at a time that their views are about batch_size.
    """
    look = look or Look()
    views = look.clips * look.crops if source.modality == "video" else 1
    size = max(1, batch_size // views)

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        found = look_at(sample, source, data, look)
        return {"pixels": found, "label": torch.tensor(label_of(sample.files))}

    batches = iterate_source(source, transform, stacked, data, size)
    for batch in progress_of(source.name)(batches, math.ceil(len(source) / size)):
        yield batch["pixels"], batch["label"]


def extract_spaces(
    source: Source,
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    data: DataConfig,
    batch_size: int = 64,
    look: Look | None = None,
) -> dict[str, Features]:
    """Encode a whole source once, in order, into each space that `encode` names.

    encode: [B, T, 3, S, S] uint8 -> rows by space. Nothing but the rows grows with the source.
    Raises DataError for features that are no numbers.
    """
    views: dict[str, Tensor] = {}
    labels, done = torch.empty(len(source), dtype=torch.long), 0
    for pixels, own in batches_of(source, data, batch_size, look):
        until = done + len(pixels)
        for space, rows in encode(pixels.flatten(0, 1)).items():
            rows = rows.unflatten(0, pixels.shape[:2])
            if space not in views:
                views[space] = rows.new_empty(len(source), *rows.shape[1:])
            if not rows.isfinite().all():  # whose similarities no rank would tell from the best
                raise DataError(f"{source.name}: the model's features are NaN or infinite")
            views[space][done:until] = rows
        labels[done:until], done = own, until
    return {space: Features(_pooled(rows), labels, rows) for space, rows in views.items()}


def _pooled(views: Tensor) -> Tensor:
    """[N, V, D] -> [N, D]: a sample's only view as it is, else the normalised mean."""
    return views[:, 0] if views.shape[1] == 1 else F.normalize(views.mean(dim=1), dim=-1)


def extract(
    source: Source,
    encode: Callable[[Tensor], Tensor],
    data: DataConfig,
    batch_size: int = 64,
) -> Features:
    """Encode a whole source in order; data gives resolution, frames and workers."""
    return extract_spaces(source, lambda pixels: {"": encode(pixels)}, data, batch_size)[""]


def spaces_of(encoder: VisionEncoder) -> Callable[[Tensor], dict[str, Tensor]]:
    """What encodes pixels into all spaces of an artifact by one pass of the backbone, on CPU."""

    @torch.no_grad()
    def encode(pixels: Tensor) -> dict[str, Tensor]:
        cls = encoder.cls(pixels)
        found = {"backbone": F.normalize(cls.float(), dim=-1).cpu()}
        if isinstance(encoder, Encoder):
            found["joint"] = encoder.joint(cls).cpu()
        return found

    return encode


def read_all_captions(source: Source, fields: Mapping[str, float] | None = None) -> list[list[str]]:
    """The captions of each sample of a source, in order; none where it has none."""
    result = []
    for shard, member in source.places():
        try:
            result.append(captions_of(source.read(shard, member, TEXT_FILES), fields))
        except BadSample:
            result.append([])
    return result
