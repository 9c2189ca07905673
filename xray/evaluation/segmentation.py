"""Linear segmentation probe on frozen patch tokens (DINOv2, 2304.07193)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.config import OptimConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.masked_tokens import (
    IGNORED,
    MaskedSets,
    encode_sets,
    measure_masks,
    upsampled,
)
from xray.evaluation.suites.segmentation import SegmentationConfig
from xray.evaluation.token_files import Rows, batch_of, blocks, token_folder
from xray.optim import lr_at, set_lr
from xray.progress import progress_of


class LinearMaps(nn.Module):
    """A linear layer on standardised patch tokens, [B, h, w, D] to logits [B, C, h, w]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.layer = nn.Linear(len(mean), classes)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits."""
        logits: Tensor = self.layer((tokens - self.mean) / self.deviation)
        return logits.permute(0, 3, 1, 2)


def segmentation(sets: Sets, config: SegmentationConfig) -> dict[str, float]:
    """Measure mIoU of a linear layer on the patch tokens of a frozen backbone.

    It is trained with cross-entropy on logits that are resized to the masks, by AdamW. The tokens,
    at the artifact's keep rate, are stored in a file, in half precision.
    """
    device = sets.vision.normalize.mean.device
    with token_folder() as folder:
        masked = encode_sets(sets, "segmentation", config, folder)
        moments = _moments(masked.train.tokens, device)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            probe = LinearMaps(*moments, masked.classes).to(device)
        _fit(probe, masked, config, device)
        with torch.no_grad():
            return measure_masks("segmentation", probe, masked, device)


def _moments(tokens: Rows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the mean and the deviation of each feature of tokens [N, h, w, D]."""
    total = torch.zeros(2, tokens.shape[-1], dtype=torch.float64, device=device)
    for rows in blocks(len(tokens), 64):
        x = batch_of(tokens, rows, device).flatten(0, 2).double()
        total += torch.stack([x.sum(dim=0), x.square().sum(dim=0)])
    mean, square = total / math.prod(tokens.shape[:3])
    deviation = (square - mean.square()).clamp(min=0).sqrt() + 1e-6
    return mean.float(), deviation.float()


def _orders(samples: int, config: SegmentationConfig) -> Iterator[np.ndarray]:
    """Yield batches of sample numbers, sorted, from one shuffled pass after another."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        for rows in torch.randperm(samples, generator=generator).split(config.batch_size):
            yield rows.sort().values.numpy()


def _fit(
    probe: LinearMaps, sets: MaskedSets, config: SegmentationConfig, device: torch.device
) -> None:
    tokens, masks = sets.train
    schedule = OptimConfig(base_lr=config.lr, warmup=0.0)
    groups = [{"params": list(probe.parameters()), "lr_scale": 1.0, "freeze": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    batches = islice(_orders(len(tokens), config), config.steps)
    for step, rows in enumerate(progress_of("segmentation probe")(batches, config.steps)):
        set_lr(optimizer.param_groups, lr_at(step / config.steps, schedule, 256))
        truth = batch_of(masks, rows, device).long()
        if not (truth >= 0).any():
            continue  # the mean over no pixel would be NaN
        optimizer.zero_grad()
        logits = upsampled(probe(batch_of(tokens, rows, device)), truth.shape[-1])
        F.cross_entropy(logits, truth, ignore_index=IGNORED).backward()
        optimizer.step()
    probe.eval()
