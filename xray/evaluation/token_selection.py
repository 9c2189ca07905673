"""Token selection: how much of the object in a picture token reduction keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.decode.images import open_image, upright_size
from data_pipelines.decode.preparation import shown_box
from data_pipelines.decode.transforms import load_pixels, media_of
from data_pipelines.shards.source import Sample
from data_pipelines.stream.loaded import Fields
from data_pipelines.text.captions import metadata_of
from xray.artifacts.encoders import VisionEncoder
from xray.config import DataConfig
from xray.errors import DataError
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples
from xray.evaluation.suite import Measures
from xray.evaluation.suites.token_selection import TokenSelectionConfig
from xray.models.inference import autocast
from xray.models.token_reduction import kept_alone

log = logging.getLogger("xray")

UNKNOWN = (float("nan"),) * 4  # the box of a sample without one


def box_of(sample: Sample, name: str, data: DataConfig) -> tuple[float, ...]:
    """Read the box of a picture's object as shares of its shown part; UNKNOWN if it has none.

    The part outside that is cut off. Raises DataError for a field that contains no box.
    """
    value = listed_box(sample.files, name, sample.key)
    if not value:
        return UNKNOWN
    width, height = upright_size(open_image(media_of(sample)))
    left, top, w, h = shown_box(width, height, data)
    starts, sizes, crop = (left, top) * 2, (width, height) * 2, (w, h) * 2
    ends = zip(value, starts, sizes, crop, strict=True)
    return tuple(min(max((x * size - start) / own, 0), 1) for x, start, size, own in ends)


def listed_box(files: dict[str, bytes], name: str, key: str) -> list[float]:
    """Read a box as shares of the whole picture; [] if it has none. Raises DataError."""
    value = metadata_of(files).get(name)
    if value is None:
        return []
    numbers = isinstance(value, list) and all(isinstance(x, int | float) for x in value)
    if not (numbers and len(value) == 4 and 0 <= min(value) <= max(value) <= 1):
        raise DataError(
            f"{key}: json field {name}={value} must be [left, top, right, bottom], as "
            "shares of the picture's width and height"
        )
    return [*value]


def check_boxes(sets: Sets, config: TokenSelectionConfig) -> None:
    """Raise DataError for a picture whose field contains no box."""
    source = config.open(sets, "token_selection", "shards")
    for shard, member in source.places():
        files, key = source.read(shard, member, ("json",)), source.index(shard).key(member)
        listed_box(files, config.box, key)


def areas(boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the area of each patch of a grid (h, w) that lies in boxes [B, 4]: [B, h * w]."""

    def lengths(low: Tensor, high: Tensor, parts: int) -> Tensor:
        edges = torch.arange(parts + 1, device=boxes.device) / parts
        return (high[:, None].minimum(edges[1:]) - low[:, None].maximum(edges[:-1])).clamp(min=0)

    h, w = grid
    left, top, right, bottom = boxes.unbind(1)
    return (lengths(top, bottom, h)[:, :, None] * lengths(left, right, w)[:, None]).flatten(1)


@dataclass(frozen=True)
class KeptShares(Samples):
    """Shares of each picture's object, and of its tokens, that are kept at several keep rates."""

    box: str = ""
    rates: Sequence[float] = ()

    def fields(self, sample: Sample) -> Fields:
        """Load the pixels of a picture, [1, 3, S, S] uint8, and the box of its object, [4]."""
        pixels = load_pixels(sample, self.data, None)
        return {"pixels": pixels, "box": torch.tensor(box_of(sample, self.box, self.data))}

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield both shares [B, rates] of these batches; NaN for an object outside the crop."""
        for batch in self.load(numbers):
            x = encoder.normalize(batch["pixels"].to(encoder.normalize.mean.device))
            _, h, w = encoder.vision.token_grid(x)
            area = areas(batch["box"].to(x.device), (h, w))
            objects, tokens = [], []
            for rate in self.rates:
                with autocast(x.device, encoder.precision):
                    assign = encoder.vision(x, rate, track=True).assign
                kept = kept_alone(assign[-1]) if assign else torch.ones_like(area)
                objects.append((kept * area).sum(1) / area.sum(1))
                tokens.append(kept.float().mean(1))
            yield {"object": torch.stack(objects, 1), "tokens": torch.stack(tokens, 1)}


def measure_selection(sets: Sets, config: TokenSelectionConfig) -> Measures:
    """Measure the shares of objects and of tokens that are kept, over the pictures with a box.

    Returns {} if no picture has one.
    """
    encoder = sets.vision
    rates = [1.0] if encoder.vision.reduction == "none" else config.keep_rates
    source = config.open(sets, "token_selection", "shards")
    task = KeptShares(source, sets.data, sets.config.batch_size, box=config.box, rates=rates)
    batches = [(batch["object"].cpu(), batch["tokens"].cpu()) for batch in sets.encoded(task)]
    objects, tokens = (torch.cat(part) for part in zip(*batches, strict=True))
    known = objects.isfinite().all(dim=1)
    if not known.any():
        log.warning(
            "eval.token_selection is left out: no picture of eval.token_selection.shards=%s has a "
            "box in json field %s (eval.token_selection.box): [left, top, right, bottom], as "
            "shares of its width and height", config.shards, config.box,
        )  # fmt: skip
        return {}
    measures = {"images": float(known.sum())}
    for column, rate in enumerate(rates):
        name = f"object_kept@{rate:g}"
        measures |= share(name, objects[known, column])
        measures[f"chance_{name}"] = tokens[known, column].double().mean().item()
    return measures
