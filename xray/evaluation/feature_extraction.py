"""Features, captions and labels of an evaluation source."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels, load_views
from data_pipelines.ingest.tables import whole_number
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loaded import Fields
from data_pipelines.stream.loader import iterate_source
from data_pipelines.text.captions import find_captions, metadata_of
from xray import dist
from xray.artifacts.encoders import TEXTS, Encoder, TextEncoder, VisionEncoder, caption_rows
from xray.config import DataConfig
from xray.errors import ArtifactError, DataError
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
    """Read the class number: the cls file, else a whole number in the json's `label`, else -1.

    Raises DataError for a cls file that contains no number, and for a number that is too large.
    """
    label = whole_number(metadata_of(files).get("label")) if "cls" not in files else None
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
    identity = source.identity(sample.shard, sample.member)
    own = zlib.crc32(identity.encode("utf-8", "surrogateescape"))
    change, rng = views.change, np.random.default_rng([views.seed, own])
    return torch.stack([change(view, rng) for view in pixels])


def stacked(rows: Sequence[Fields]) -> Fields:
    """Stack rows of equal shapes into a batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class Samples:
    """All samples of a source with their views, in numbered batches of `size` samples."""

    source: Source
    data: DataConfig
    size: int
    views: Views = Views()

    @property
    def name(self) -> str:
        """Return the source's name, for progress."""
        return self.source.name

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.size)

    def rows(self, number: int) -> int:
        """Return the number of samples in a batch."""
        return min(self.size, len(self.source) - number * self.size)

    def fields(self, sample: Sample) -> Fields:
        """Load the pixels of a sample's views, [V, T, 3, S, S] uint8, and what else is needed."""
        pixels = view_pixels(sample, self.source, self.data, self.views)
        return {"pixels": pixels, "label": torch.tensor(label_of(sample.files))}

    def load(self, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield the fields of these batches."""
        starts = (number * self.size for number in numbers)
        batches = [range(start, min(start + self.size, len(self.source))) for start in starts]

        def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
            return self.fields(sample)

        return iterate_source(self.source, transform, stacked, self.data, batches)

    def encoded(
        self, encode: Callable[[Tensor], Mapping[str, Tensor]], numbers: Iterable[int]
    ) -> Iterator[Fields]:
        """Yield these batches with rows [B, V, ...] by name instead of pixels.

        encode: [B * V, T, 3, S, S] uint8 -> rows by name.
        """
        for batch in self.load(numbers):
            pixels = batch.pop("pixels")
            rows = encode(pixels.flatten(0, 1))
            yield batch | {name: row.unflatten(0, pixels.shape[:2]) for name, row in rows.items()}


@dataclass(frozen=True)
class FeaturesOf(Samples):
    """Encoding of samples into all spaces of an encoder by one pass of the backbone."""

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield labels [B] and rows [B, V, D] by space of these batches."""

        def into_spaces(pixels: Tensor) -> dict[str, Tensor]:
            cls = encoder.cls(pixels)
            spaces = {"backbone": F.normalize(cls.float(), dim=-1)}
            if isinstance(encoder, Encoder):
                spaces["joint"] = encoder.joint(cls)
            return spaces

        yield from self.encoded(into_spaces, numbers)


@dataclass(frozen=True)
class TextsOf:
    """Encoding of captions, in batches of TEXTS; base: by the model before tuning."""

    captions: Sequence[str]
    base: bool = False
    name = "texts"

    def __len__(self) -> int:
        return math.ceil(len(self.captions) / TEXTS)

    def rows(self, number: int) -> int:
        """Return the number of captions in a batch."""
        return min(TEXTS, len(self.captions) - number * TEXTS)

    @torch.no_grad()
    def encode(
        self, encoder: VisionEncoder | TextEncoder, numbers: Iterable[int]
    ) -> Iterator[Fields]:
        """Yield the rows [B, D] of these batches; raises ArtifactError without a text tower."""
        chosen = encoder.base if self.base and isinstance(encoder, TextEncoder) else encoder
        if not isinstance(chosen, Encoder | TextEncoder):
            what = "base model" if self.base else "text tower"
            raise ArtifactError(f"{encoder.artifact.path}: rank {dist.rank()} finds no {what}")
        starts, device = (number * TEXTS for number in numbers), next(chosen.parameters()).device
        how = chosen.tokenizer, chosen.text_features, device
        yield from caption_rows(self.captions, starts, *how)


def batch_samples(source: Source, batch_size: int, views: Views) -> int:
    """Return the number of samples in a batch of about batch_size views."""
    per_sample = views.clips * views.crops if source.modality == "video" else 1
    return max(1, batch_size // per_sample)


def batches_of(
    source: Source, data: DataConfig, batch_size: int, views: Views | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a whole source in order: pixels [B, V, T, 3, S, S] uint8, labels [B]; shows progress.

    A batch has about batch_size views.
    """
    chosen = views or Views()
    samples = Samples(source, data, batch_samples(source, batch_size, chosen), chosen)
    for batch in progress_of(source.name)(samples.load(range(len(samples))), len(samples)):
        yield batch["pixels"], batch["label"]


def features_of(source: Source, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Features]:
    """Join a source's batches of `FeaturesOf`, in order, to features by space.

    Only the rows grow with the source. Raises DataError for features that are NaN or infinite.
    """
    spaces: dict[str, Tensor] = {}
    labels, done = torch.empty(len(source), dtype=torch.long), 0
    for _, batch in one_behind((None, batch) for batch in batches):
        own = batch.pop("label")
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
    samples = Samples(source, data, batch_size)
    batches = samples.encoded(lambda pixels: {"": encode(pixels)}, range(len(samples)))
    return features_of(source, progress_of(source.name)(batches, len(samples)))[""]


def read_all_captions(source: Source, fields: Mapping[str, float] | None = None) -> list[list[str]]:
    """Read the captions of each sample of a source, in order; an empty list if it has none."""
    return [find_captions(source, *place, fields) for place in source.places()]


def flat_captions(
    captions: Sequence[Sequence[str]], key: str
) -> tuple[list[str], Tensor, list[int]]:
    """List all captions [M], and the captioned samples [N].

    Returns the captions, the place in the list of captioned samples that each belongs to, and that
    list. Raises DataError naming the config's key if no sample has a caption.
    """
    captioned = [number for number, own in enumerate(captions) if own]
    if not captioned:
        raise DataError(f"{key}: none of the {len(captions):,} samples has a caption")
    owner = [place for place, number in enumerate(captioned) for _ in captions[number]]
    return [caption for own in captions for caption in own], torch.tensor(owner), captioned
