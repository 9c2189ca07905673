"""Correspondence of patches: a patch gets the classes of the nearest training patches.

It is nearest-neighbour retrieval in the space of patch tokens, without training (Hummingbird,
2306.01667).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xray.errors import DataError
from xray.evaluation.datasets import Sets
from xray.evaluation.masked_tokens import MaskedSet, encode_sets, measure_masks
from xray.evaluation.suites.correspondence import CorrespondenceConfig
from xray.evaluation.token_files import batch_of, blocks, token_folder
from xray.evaluation.zero_shot import HELD
from xray.progress import progress_of


@dataclass(frozen=True)
class Memory:
    """Training patches: features [M, D], normalised, and the classes' shares of their pixels."""

    rows: Tensor
    shares: Tensor  # [M, C]

    def votes(self, tokens: Tensor, k: int, temperature: float) -> Tensor:
        """Compute class shares [B, C, h, w] of tokens [B, h, w, D] from their k nearest patches.

        A neighbour's shares are weighted by the softmax of cosine / temperature.
        """
        own = F.normalize(tokens.flatten(0, 2), dim=-1)
        voted = []
        each = max(len(self.rows), k * self.shares.shape[1])  # numbers held for a patch
        for part in own.split(max(1, HELD // each)):
            similarity, nearest = (part @ self.rows.t()).topk(k, dim=1)
            weight = (similarity / temperature).softmax(dim=1)
            voted.append((weight[:, None] @ self.shares[nearest])[:, 0])
        return torch.cat(voted).unflatten(0, tokens.shape[:3]).permute(0, 3, 1, 2)


def correspondence(sets: Sets, config: CorrespondenceConfig) -> dict[str, float]:
    """Measure mIoU of masks that the nearest training patches predict.

    The tokens, at the artifact's keep rate, are stored in a file, in half precision. Raises
    DataError for fewer than k training patches with a class.
    """
    device = sets.vision.normalize.mean.device
    with token_folder() as folder, torch.no_grad():
        masked = encode_sets(sets, "correspondence", config, folder)
        memory = remember(masked.train, masked.classes, config.memory, config.seed, device)
        if len(memory.rows) < config.k:
            raise DataError(
                f"eval.correspondence.k={config.k} needs that many training patches with a class, "
                f"there are {len(memory.rows)}: lower k"
            )

        def votes(tokens: Tensor) -> Tensor:
            return memory.votes(tokens, config.k, config.temperature)

        return measure_masks("correspondence", votes, masked, device)


def remember(train: MaskedSet, classes: int, most: int, seed: int, device: torch.device) -> Memory:
    """Collect the training patches with a class; only `most` patches, drawn at random, are read."""
    pictures, h, w, width = train.tokens.shape
    drawn = np.random.default_rng(seed).permutation(pictures * h * w)[:most]
    wanted = torch.zeros(pictures, h * w, dtype=torch.bool)
    wanted.view(-1)[torch.from_numpy(drawn)] = True
    rows, shares = [torch.empty(0, width, device=device)], [torch.empty(0, classes, device=device)]
    parts = [part for part in blocks(pictures, 64) if wanted[part].any()]
    for part in progress_of("training patches")(iter(parts), len(parts)):
        masks = batch_of(train.masks, part, device).long()
        own = patch_shares(masks, (h, w), classes).flatten(1, 2)
        chosen = wanted[part].to(device) & (own.sum(dim=-1) > 0)
        tokens = batch_of(train.tokens, part, device).flatten(1, 2)
        rows.append(F.normalize(tokens[chosen], dim=-1))
        shares.append(own[chosen])
    return Memory(torch.cat(rows), torch.cat(shares))


def patch_shares(masks: Tensor, grid: tuple[int, int], classes: int) -> Tensor:
    """Compute the classes' shares of each patch's pixels with a class: [B, h, w, C].

    masks: [B, S, S], divided into a grid (h, w). A patch without such pixels has zeros.
    """
    h, w = grid
    pixels = masks.unflatten(2, (w, -1)).unflatten(1, (h, -1)).transpose(2, 3).flatten(3)
    counts = torch.zeros(*pixels.shape[:3], classes + 1, device=masks.device)
    counts = counts.scatter_add(3, pixels + 1, torch.ones_like(pixels, dtype=counts.dtype))[..., 1:]
    return counts / counts.sum(dim=3, keepdim=True).clamp(min=1)
