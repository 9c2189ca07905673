"""Patch tokens and masks of pictures, and measures of predicted masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.decode.masks import load_mask
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loaded import Fields
from xray.artifacts.encoders import VisionEncoder
from xray.errors import BadSample, DataError
from xray.evaluation.confidence import mean_ratio, share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples
from xray.evaluation.suite import MaskedConfig
from xray.evaluation.token_files import Rows, batch_of, blocks, stored
from xray.models.inference import autocast
from xray.progress import progress_of

IGNORED = -1  # of a pixel without a class
MOST = np.iinfo(np.int16).max  # classes that a stored mask can have
HELD = 2**26  # logits of pixels in memory at a time: 256 MiB


@dataclass(frozen=True)
class TokensAndMasks(Samples):
    """Encoding of pictures to their patch tokens, dense, beside their masks."""

    ending: str = ""  # of masks
    ignore: Sequence[int] = ()
    classes: int = MOST
    given_by: str = ""  # the key that gives the number of classes, for errors

    def fields(self, sample: Sample) -> Fields:
        """Load a picture, [1, 3, S, S] uint8, and its mask, [S, S] int32."""
        mask = load_mask(sample, self.ending, self.data)
        ignored = torch.isin(mask, torch.tensor(self.ignore, dtype=torch.int32)) | (mask < 0)
        mask = mask.masked_fill(ignored, IGNORED)
        if int(mask.max()) >= self.classes:
            section = self.given_by.rpartition(".")[0]
            raise BadSample(
                "class beyond the classes",
                f"its mask has class {int(mask.max())}, and {self.given_by} gives {self.classes}: "
                f"raise {section}.classes, or add this value to {section}.ignore",
            )
        return {"pixels": load_pixels(sample, self.data, None), "mask": mask}

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield tokens [B, h, w, D] float16 and masks [B, S, S] of these batches."""
        for batch in self.load(numbers):
            yield {"tokens": dense_tokens(encoder, batch["pixels"]), "mask": batch["mask"]}


def dense_tokens(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Encode pictures [B, 1, 3, S, S] to one token per patch, [B, h, w, D] float16."""
    x = encoder.normalize(pixels.to(encoder.normalize.mean.device, non_blocking=True))
    _, h, w = encoder.vision.token_grid(x)
    with autocast(x.device, encoder.precision):
        tokens = encoder.vision(x, encoder.keep_rate, track=True).dense()
    return tokens.half().unflatten(1, (h, w))


class MaskedSet(NamedTuple):
    """Patch tokens [N, h, w, D] float16 and masks [N, S, S] int16 of a set, in files."""

    tokens: Rows
    masks: Rows


class MaskedSets(NamedTuple):
    """Sets for training and for test, and the number of classes."""

    train: MaskedSet
    test: MaskedSet
    classes: int


def encode_sets(sets: Sets, name: str, config: MaskedConfig, folder: Path) -> MaskedSets:
    """Encode the sets of a suite into files in a folder; `name` is the suite's, for errors.

    Raises DataError for a mask that does not fit its picture or the classes.
    """
    train_source, test_source = sets.masked(name, config)

    def encoded(source: Source, which: str, classes: int, given_by: str) -> MaskedSet:
        task = TokensAndMasks(
            source, sets.data, sets.config.batch_size, ending=config.mask.lstrip("."),
            ignore=tuple(config.ignore), classes=classes, given_by=f"eval.{name}.{given_by}",
        )  # fmt: skip
        files = stored(source, sets.encoded(task), folder / which, {"mask": np.int16})
        if not any((files["mask"][rows] != IGNORED).any() for rows in blocks(len(source), 64)):
            raise DataError(f"{source.name}: no pixel of its masks has a class")
        return MaskedSet(files["tokens"], files["mask"])

    train = encoded(train_source, "train", config.classes or MOST, "classes")
    classes = config.classes or 1 + max(
        int(train.masks[rows].max()) for rows in blocks(len(train.masks), 64)
    )
    if classes < 2:
        raise DataError(f"{train_source.name}: its masks have a single class, 0")
    given_by = "classes" if config.classes else "train"
    return MaskedSets(train, encoded(test_source, "test", classes, given_by), classes)


def upsampled(maps: Tensor, side: int) -> Tensor:
    """Resize maps [B, C, h, w] to [B, C, S, S], bilinear."""
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def pixel_counts(predicted: Tensor, masks: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class in each picture, [3, B, C]: correct, predicted, true.

    predicted, masks: [B, S, S]. Pixels without a class are not counted.
    """
    known = masks >= 0
    first = torch.arange(len(masks), device=masks.device)[:, None, None] * classes

    def counted(numbers: Tensor, which: Tensor) -> Tensor:
        counts = torch.bincount((numbers + first)[which], minlength=len(masks) * classes)
        return counts.view(len(masks), classes)

    correct = known & (predicted == masks)
    return torch.stack(
        [counted(masks, correct), counted(predicted, known), counted(masks, known)]
    ).cpu()


def measure_masks(
    name: str, logits: Callable[[Tensor], Tensor], sets: MaskedSets, device: torch.device
) -> dict[str, float]:
    """Measure mIoU and pixel accuracy of predicted masks, with intervals over pictures, and chance.

    logits: tokens [B, h, w, D] to maps [B, C, h, w], which are resized to the masks; the class of a
    pixel is that of the highest. mIoU is the mean over classes of the intersections summed over
    the set, divided by the summed unions; a class that is neither in a mask nor predicted is left
    out. Chance is to predict the most frequent class of training everywhere.
    """
    train, test, classes = sets
    side = test.masks.shape[1]
    parts = list(blocks(len(test.masks), max(1, min(64, HELD // (classes * side * side)))))
    counts = []
    for rows in progress_of(name)(iter(parts), len(parts)):
        masks = batch_of(test.masks, rows, device).long()
        predicted = upsampled(logits(batch_of(test.tokens, rows, device)), side).argmax(dim=1)
        counts.append(pixel_counts(predicted, masks, classes))
    correct, predicted, true = torch.cat(counts, dim=1)
    some = true.sum(dim=1) > 0
    correct, predicted, true = correct[some], predicted[some], true[some]
    union = predicted + true - correct
    measures = mean_ratio("mIoU", correct, union)
    measures |= share("pixel_accuracy", correct.sum(dim=1), true.sum(dim=1))
    for number in union.sum(dim=0).nonzero()[:, 0].tolist():
        iou = correct[:, number].sum().item() / union[:, number].sum().item()
        measures[f"IoU/{number}"] = iou
    return measures | _chance(class_pixels(train.masks, classes), true.sum(dim=0)) | {
        "pictures": float(len(true)),
        "classes": float((true.sum(dim=0) > 0).sum()),
    }  # fmt: skip


def class_pixels(masks: Rows, classes: int) -> Tensor:
    """Count the pixels of each class in masks [N, S, S], [C]."""
    total = np.zeros(classes, np.int64)
    for rows in blocks(len(masks), 64):
        total += np.bincount(masks[rows].ravel() + 1, minlength=classes + 1)[1:]
    return torch.from_numpy(total)


def _chance(train: Tensor, test: Tensor) -> dict[str, float]:
    """Compute the measures of predicting training's most frequent class everywhere.

    train, test: pixels of each class, [C].
    """
    most = int(train.argmax())
    accuracy = test[most].item() / test.sum().item()
    present = int((test > 0).sum()) + int(test[most] == 0)
    return {"chance_mIoU": accuracy / present, "chance_pixel_accuracy": accuracy}
