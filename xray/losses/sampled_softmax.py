"""Softmax loss over drawn classes, for vocabularies too large for all logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.losses.precision import full_precision
from xray.losses.tags import repeated


def sampling_probabilities(counts: Tensor, power: float = 0.75) -> Tensor:
    """Normalise counts^power: the probability that each class is drawn, [V] float64 (1310.4546).

    A count of 0 is taken as 1: the logits of a class that is never drawn would never be lowered.
    """
    # in fp32 the cumulative sum of 1e6 values would be wrong by a few percent of a value
    weights = counts.double().clamp(min=1).pow(power)
    return weights / weights.sum()


def draw_classes(
    probabilities: Tensor, number: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw classes with replacement: their ids [M] and the logs of their probabilities [M]."""
    ids = torch.multinomial(probabilities, number, replacement=True, generator=generator)
    return ids, probabilities[ids].log().float()


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; the host does not wait for the work queued on a GPU."""
    source = drawn.pin_memory() if device.type == "cuda" else drawn
    return source.to(device, non_blocking=True)


def sampled_softmax(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    tags: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor,
) -> Tensor:
    """Compute the softmax loss [B] with its sum of exponentials estimated from drawn classes.

    features: [B, D]. weight, bias: [V, D], [V], of which M + B K rows are read. negatives, log_q:
    [M] of `draw_classes`. Own classes are summed exactly, the others by importance sampling over
    the other draws (1412.2007). The sum is unbiased; its logarithm is too low (Jensen's
    inequality), less so with more draws.
    """
    number = len(negatives)
    ids = torch.cat([negatives, tags.clamp(min=0).flatten()])  # one gather: one [V, D] gradient
    rows, biases = weight.index_select(0, ids), bias.index_select(0, ids)
    drawn_rows, own_rows = rows.split([number, tags.numel()])
    drawn_bias, own_bias = biases.split([number, tags.numel()])

    drawn = full_precision(F.linear(features, drawn_rows, drawn_bias)) - log_q - math.log(number)
    own = torch.bmm(own_rows.unflatten(0, tags.shape), features.unsqueeze(2)).squeeze(2)
    own = full_precision(own) + own_bias.view_as(tags)
    is_own = torch.zeros_like(drawn, dtype=torch.bool)
    for column in tags.unbind(1):  # [B, M] at a time, not [B, M, K]
        is_own |= column[:, None] == negatives
    unused = repeated(tags) | (tags < 0)
    parts = [own.masked_fill(unused, -math.inf), drawn.masked_fill(is_own, -math.inf)]
    total = torch.cat(parts, dim=1).logsumexp(dim=1)
    return targets.sum(dim=1) * total - (targets * own).sum(dim=1)
