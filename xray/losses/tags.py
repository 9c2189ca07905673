"""Losses of samples with several tags, over a vocabulary that may be too large for all its logits.

A sample's tags are `tags`, [B, K] ids padded with -1, and `targets`, [B, K] >= 0 and 0 at the
padding; an id that occurs twice in a row has the sum of its targets. Each loss is linear in the
targets: a term over all classes, which can be computed in chunks of classes, and a term over the
sample's own tags. Reductions are in fp32 or better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from xray import dist
from xray.errors import ConfigError
from xray.losses.chunked_classes import Chunked
from xray.losses.precision import full_precision


@dataclass(frozen=True)
class TagLoss(ABC):
    """A loss of tags: a term over all classes, and a term `own` per unit of target of a tag.

    Raises ConfigError for a setting out of its range.
    """

    samples_classes: ClassVar[bool] = False  # has a form over drawn classes (sampled_softmax)
    below_one: ClassVar[tuple[str, ...]] = ("smoothing",)  # settings in [0, 1)

    smoothing: float = 0.0  # of the targets (label smoothing, 1512.00567)
    chunk: int = 0  # classes whose logits are in memory at a time; 0 = all

    def __post_init__(self) -> None:
        for item in fields(self):
            value, below_one = getattr(self, item.name), item.name in self.below_one
            if value < 0 or (below_one and value >= 1):
                allowed = "in [0, 1)" if below_one else ">= 0"
                raise ConfigError(f"{item.name}={value} of a tag loss must be {allowed}")

    def __call__(
        self, features: Tensor, weight: Tensor, bias: Tensor, tags: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute losses [B] and likeliest classes [B] of features [B, D], head [V, D], [V]."""
        if not self.chunk:
            return self.from_logits(F.linear(features, weight, bias), tags, targets)
        total, picked, top = Chunked.apply(features, weight, bias, tags, self)
        return self.combine(total, picked, tags, targets), top

    def from_logits(self, logits: Tensor, tags: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute losses and likeliest classes from all logits [B, V]."""
        logits = full_precision(logits)
        picked = logits.gather(1, tags.clamp(min=0))
        total = self.total(self.reduce(logits), logits.shape[1])
        return self.combine(total, picked, tags, targets), logits.detach().argmax(dim=1)

    def combine(self, total: Tensor, picked: Tensor, tags: Tensor, targets: Tensor) -> Tensor:
        """Combine the term over all classes [B] and the logits [B, K] of the own tags: [B]."""
        own = (self.merge(tags, targets) * self.own(picked)).sum(dim=1)
        return self.weight(targets) * total + own

    def chance(self, frequency: Tensor) -> float:
        """Compute the expected loss of predicting each tag's frequency [V] for every sample."""
        frequency = frequency.double()
        logits, targets = self.initial_bias(frequency)[None], self.targets(frequency[None])
        total = self.total(self.reduce(logits), len(frequency))
        return float(self.weight(targets) * total + (targets * self.own(logits)).sum())

    def floor(self, targets: Tensor, classes: int) -> Tensor | None:
        """Return the smallest possible loss for targets [B, K], [B]; None = not known."""
        return None

    @abstractmethod
    def targets(self, weights: Tensor) -> Tensor:
        """Turn the weights of labels [B, K] into targets."""

    @abstractmethod
    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits [B, V] into probabilities."""

    @abstractmethod
    def initial_bias(self, frequency: Tensor) -> Tensor:
        """Return the head's bias [V] that predicts each tag's frequency [V] in (0, 1).

        Without it the features learn the frequencies first, and become alike (1708.02002).
        """

    def weight(self, targets: Tensor) -> Tensor:
        """Return the weights of the term over all classes, [B], for targets [B, K]."""
        return targets.new_ones(len(targets))

    def merge(self, tags: Tensor, targets: Tensor) -> Tensor:
        """Return the targets [B, K] that `own` is weighed by, for tags that may be repeated."""
        return targets

    @abstractmethod
    def reduce(self, logits: Tensor) -> Tensor:
        """Reduce the logits [B, C] of some classes to what `total` needs, [..., B]."""

    @abstractmethod
    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """Join the reductions of two groups of classes."""

    @abstractmethod
    def join_ranks(self, state: Tensor) -> Tensor:
        """Join the reductions of the classes of each rank; collective."""

    @abstractmethod
    def total(self, state: Tensor, classes: int) -> Tensor:
        """Compute the term over all classes, [B]."""

    @abstractmethod
    def slope(self, logits: Tensor, state: Tensor, classes: int) -> Tensor:
        """Compute d total / d logits, [B, C]; may overwrite the logits."""

    @abstractmethod
    def own(self, logits: Tensor) -> Tensor:
        """Compute the term per unit of target, elementwise."""


@dataclass(frozen=True)
class SoftmaxLoss(TagLoss):
    """Cross-entropy, -sum t' log softmax(z), weighted by the row's sum of targets.

    t' = (1 - eps) t + eps sum(t) / V, with eps the smoothing.
    """

    samples_classes = True

    def targets(self, weights: Tensor) -> Tensor:
        """Divide the weights by their sum, if that is above 1: less certain samples count less."""
        return weights / weights.sum(1, keepdim=True).clamp(min=1)

    def activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    def initial_bias(self, frequency: Tensor) -> Tensor:
        return (frequency / frequency.sum()).log()

    def floor(self, targets: Tensor, classes: int) -> Tensor:
        """Return sum(t) log sum(t) - sum(t' log t'), [B].

        An id that occurs twice in a row is counted as two, which makes it too large.
        """
        targets = full_precision(targets)
        total = targets.sum(dim=1)
        share = self.smoothing / classes * total  # of each class
        own = (1 - self.smoothing) * targets + share[:, None]
        others = (classes - targets.shape[1]) * torch.xlogy(share, share)
        return torch.xlogy(total, total) - torch.xlogy(own, own).sum(dim=1) - others

    def weight(self, targets: Tensor) -> Tensor:
        return targets.sum(dim=1)

    def reduce(self, logits: Tensor) -> Tensor:
        lse = logits.logsumexp(dim=1)
        return torch.stack([lse, logits.sum(dim=1) if self.smoothing else torch.zeros_like(lse)])

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.logaddexp(one[0], other[0]), one[1] + other[1]])

    def join_ranks(self, state: Tensor) -> Tensor:
        highest = dist.largest_over_ranks(state[0].clone())
        sums = dist.sum_over_ranks(torch.stack([(state[0] - highest).exp(), state[1]]))
        return torch.stack([highest + sums[0].log(), sums[1]])

    def total(self, state: Tensor, classes: int) -> Tensor:
        return state[0] - self.smoothing / classes * state[1]

    def slope(self, logits: Tensor, state: Tensor, classes: int) -> Tensor:
        slope = logits.sub_(state[0].unsqueeze(1)).exp_()
        return slope.sub_(self.smoothing / classes) if self.smoothing else slope

    def own(self, logits: Tensor) -> Tensor:
        return (self.smoothing - 1) * logits


@dataclass(frozen=True)
class AsymmetricLoss(TagLoss):
    """Asymmetric loss, summed over all V classes (2009.14119).

    y' L+ + (1 - y') L-, with L+ = -(1 - p)^gamma_pos log p, L- = -m^gamma_neg log(1 - m),
    m = max(p - margin, 0), and y' = (1 - eps) y + eps / 2 of the targets y in [0, 1].
    """

    below_one = ("smoothing", "margin")

    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05

    def targets(self, weights: Tensor) -> Tensor:
        return weights

    def activate(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def initial_bias(self, frequency: Tensor) -> Tensor:
        return frequency.logit()

    def merge(self, tags: Tensor, targets: Tensor) -> Tensor:
        """Put the sum of an id's targets, at most 1, at its first place and 0 at the others."""
        equal = tags.unsqueeze(2) == tags.unsqueeze(1)
        return (equal * targets.unsqueeze(1)).sum(dim=2).clamp(max=1) * ~repeated(tags)

    def reduce(self, logits: Tensor) -> Tensor:
        negative, half = self.negative(logits), self.smoothing / 2
        if half:
            negative = (1 - half) * negative + half * self.positive(logits)
        return negative.sum(dim=1)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def join_ranks(self, state: Tensor) -> Tensor:
        return dist.sum_over_ranks(state)

    def total(self, state: Tensor, classes: int) -> Tensor:
        return state

    @torch.enable_grad()
    def slope(self, logits: Tensor, state: Tensor, classes: int) -> Tensor:
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(self.reduce(logits).sum(), logits)[0]

    def own(self, logits: Tensor) -> Tensor:
        return (1 - self.smoothing) * (self.positive(logits) - self.negative(logits))

    def positive(self, logits: Tensor) -> Tensor:
        """Compute L+, elementwise."""
        loss = -F.logsigmoid(logits)
        if self.gamma_pos:
            loss = loss * (self.gamma_pos * F.logsigmoid(-logits)).exp()
        return loss

    def negative(self, logits: Tensor) -> Tensor:
        """Compute L-, elementwise."""
        log_rest = F.logsigmoid(-logits)
        if self.margin:
            margin = log_rest.new_full((), self.margin)
            log_rest = torch.logaddexp(log_rest, margin.log()).clamp(max=0)  # log(1 - p + margin)
        if not self.gamma_neg:
            return -log_rest
        shifted = logits.sigmoid() - self.margin
        tiny = torch.finfo(logits.dtype).tiny  # at 0 a power below 1 has no finite slope
        return -shifted.clamp(min=tiny).pow(self.gamma_neg) * log_rest


@dataclass(frozen=True)
class BinaryLoss(AsymmetricLoss):
    """Binary cross-entropy, summed over all V classes: the asymmetric loss without asymmetry."""

    gamma_neg: float = 0.0
    margin: float = 0.0


def truncate(losses: Tensor, doubts: Tensor, share: float, u: float) -> Tensor:
    """Average losses [B] without those of the largest doubts [B], which get no gradient.

    share: fraction to leave out, in [0, 1). u: in [0, 1), rounds their number, so that small
    batches leave out the same fraction on average.
    """
    assert 0 <= share < 1, share
    dropped = min(math.floor(share * len(losses) + u), len(losses) - 1)
    return losses[doubts.detach().topk(len(losses) - dropped, largest=False).indices].mean()


def repeated(tags: Tensor) -> Tensor:
    """Mask the ids [B, K] that have occurred in their row before."""
    return (tags.unsqueeze(2) == tags.unsqueeze(1)).tril(-1).any(dim=2)
