"""Losses of samples with several tags, over a vocabulary that may be too large for all its logits.

A sample's tags are `tags`, [B, K] ids padded with -1, and `targets`, [B, K] >= 0 and 0 where
padded; an id that occurs twice in a row has the sum of its targets. Each loss is linear in the
targets: a term over all classes, which is the only large one and is taken in chunks of classes if
asked for, and a term over the sample's own tags. Reductions are in fp32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from xray.errors import ConfigError
from xray.losses.precision import full_precision


@dataclass(frozen=True)
class TagLoss:
    """Loss of every sample, and its likeliest class; the softmax's is weighted by the row's sum.

    - softmax: cross-entropy, -sum t' log softmax(z), with t' = (1 - eps) t + eps sum(t) / V and eps
      the smoothing (1512.00567).
    - bce: binary cross-entropy summed over all V classes, with the targets as labels in [0, 1] and
      y' = (1 - eps) y + eps / 2.
    - asymmetric: like bce, with the two sides focused and the negatives' probabilities shifted
      (2009.14119): y' L+ + (1 - y') L-, L+ = -(1 - p)^gamma_pos log p and
      L- = -m^gamma_neg log(1 - m), m = max(p - margin, 0).

    Raises ConfigError for a setting out of its range.
    """

    kind: Literal["softmax", "bce", "asymmetric"] = "softmax"
    smoothing: float = 0.0
    chunk: int = 0  # classes whose logits are held at a time; 0 = all
    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.kind not in ("softmax", "bce", "asymmetric"):
            raise ConfigError(f"kind={self.kind} of a tag loss is none of softmax, bce, asymmetric")
        for name in ("smoothing", "margin"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of a tag loss must be in [0, 1)")
        for name in ("chunk", "gamma_pos", "gamma_neg"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} of a tag loss must be >= 0")

    def __call__(
        self, features: Tensor, weight: Tensor, bias: Tensor, tags: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] and likeliest classes [B] of features [B, D] under a head [V, D], [V]."""
        if not self.chunk:
            return self.from_logits(F.linear(features, weight, bias), tags, targets)
        criterion = self._criterion(len(weight))
        total, picked, top = _Chunked.apply(features, weight, bias, tags, criterion, self.chunk)
        return self._losses(criterion, total, picked, tags, targets), top

    def from_logits(self, logits: Tensor, tags: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The same from all logits, [B, V]."""
        criterion, logits = self._criterion(logits.shape[1]), full_precision(logits)
        picked = logits.gather(1, tags.clamp(min=0))
        total = criterion.total(criterion.reduce(logits))
        return self._losses(criterion, total, picked, tags, targets), logits.detach().argmax(dim=1)

    def _criterion(self, classes: int) -> _Criterion:
        if self.kind == "softmax":
            return _Softmax(self.smoothing, classes)
        if self.kind == "bce":  # is the asymmetric loss without its asymmetry
            return _Binary(self.smoothing, 0.0, 0.0, 0.0)
        return _Binary(self.smoothing, self.gamma_pos, self.gamma_neg, self.margin)

    def _losses(
        self, criterion: _Criterion, total: Tensor, picked: Tensor, tags: Tensor, targets: Tensor
    ) -> Tensor:
        """[B] from the term over all classes, [B], and the own tags' logits, [B, K]."""
        if self.kind == "softmax":
            total = targets.sum(dim=1) * total
        else:
            targets = _labels(tags, targets)
        return total + (targets * criterion.own(picked)).sum(dim=1)


def target_entropy(targets: Tensor, smoothing: float = 0.0, classes: int = 0) -> Tensor:
    """The least softmax loss, [B], that targets [B, K] permit: sum(t) log sum(t) - sum(t log t).

    An id that occurs twice in a row is counted as two, which gives too high a floor. smoothing
    needs the number of classes.
    """
    assert not smoothing or classes, "smoothing spreads over a number of classes"
    targets = full_precision(targets)
    total = targets.sum(dim=1)
    share = smoothing / max(classes, 1) * total  # of every class, and all that the other ones have
    own = (1 - smoothing) * targets + share[:, None]
    others = (classes - targets.shape[1]) * torch.xlogy(share, share)
    return torch.xlogy(total, total) - torch.xlogy(own, own).sum(dim=1) - others


def truncate(losses: Tensor, doubts: Tensor, share: float, u: float) -> Tensor:
    """Mean of losses [B] but for those of the largest doubts [B], which get no gradient.

    share: in [0, 1), of those that are left out; u in [0, 1) rounds their number, so that small
    batches leave out as many on average.
    """
    assert 0 <= share < 1, share
    dropped = min(math.floor(share * len(losses) + u), len(losses) - 1)
    return losses[doubts.detach().topk(len(losses) - dropped, largest=False).indices].mean()


# sampled softmax ------------------------------------------------------------------------------


def sampling_probabilities(counts: Tensor, power: float = 0.75) -> Tensor:
    """counts^power, normalised: the classes' probabilities of being drawn, [V] float64 (1310.4546).

    A count of 0 is taken for 1, since a class that is never drawn would never be pushed down.
    """
    # in fp32 the running sum of 1e6 of them would be off by a few percent of one
    weights = counts.double().clamp(min=1).pow(power)
    return weights / weights.sum()


def draw_classes(
    probabilities: Tensor, number: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw classes with replacement: their ids [M] and the logs of their probabilities [M]."""
    ids = torch.multinomial(probabilities, number, replacement=True, generator=generator)
    return ids, probabilities[ids].log().float()


def sampled_softmax(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    tags: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor,
) -> Tensor:
    """Softmax loss [B] with its sum of exponentials estimated from drawn classes.

    features: [B, D]. weight, bias: [V, D], [V], of which M + B K rows are read. negatives, log_q:
    [M] as of `draw_classes`. Own classes are summed exactly; the sum over all others is the mean of
    exp(z) / q over the draws that are none of them (importance sampling, 1412.2007). The sum is
    unbiased; its logarithm is too low, by Jensen's inequality, the less so the more are drawn.
    There is no label smoothing.
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
    unused = _repeated(tags) | (tags < 0)
    parts = [own.masked_fill(unused, -math.inf), drawn.masked_fill(is_own, -math.inf)]
    total = torch.cat(parts, dim=1).logsumexp(dim=1)
    return targets.sum(dim=1) * total - (targets * own).sum(dim=1)


# the term over all classes --------------------------------------------------------------------


class _Criterion(Protocol):
    """A loss as a term over all classes, `total`, and one of every own tag, `own`."""

    def reduce(self, logits: Tensor) -> Tensor:
        """What `total` needs, [..., B], of some classes' logits, [B, C]."""

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """The state of two groups of classes together."""

    def total(self, state: Tensor) -> Tensor:
        """The term over all classes, [B]."""

    def slope(self, logits: Tensor, state: Tensor) -> Tensor:
        """d total / d logits, [B, C]; may overwrite the logits."""

    def own(self, logits: Tensor) -> Tensor:
        """What a class adds per unit of target, elementwise."""


@dataclass(frozen=True)
class _Softmax:
    """logsumexp(z) - eps mean(z), and -(1 - eps) z for own tags."""

    smoothing: float
    classes: int

    def reduce(self, logits: Tensor) -> Tensor:
        lse = logits.logsumexp(dim=1)
        return torch.stack([lse, logits.sum(dim=1) if self.smoothing else torch.zeros_like(lse)])

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.stack([torch.logaddexp(one[0], other[0]), one[1] + other[1]])

    def total(self, state: Tensor) -> Tensor:
        return state[0] - self.smoothing / self.classes * state[1]

    def slope(self, logits: Tensor, state: Tensor) -> Tensor:
        slope = logits.sub_(state[0].unsqueeze(1)).exp_()
        return slope.sub_(self.smoothing / self.classes) if self.smoothing else slope

    def own(self, logits: Tensor) -> Tensor:
        return (self.smoothing - 1) * logits


@dataclass(frozen=True)
class _Binary:
    """The sum of (1 - eps / 2) L- + eps / 2 L+, and (1 - eps) (L+ - L-) for own tags."""

    smoothing: float
    gamma_pos: float
    gamma_neg: float
    margin: float

    def reduce(self, logits: Tensor) -> Tensor:
        negative, half = self._negative(logits), self.smoothing / 2
        if half:
            negative = (1 - half) * negative + half * self._positive(logits)
        return negative.sum(dim=1)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def total(self, state: Tensor) -> Tensor:
        return state

    @torch.enable_grad()
    def slope(self, logits: Tensor, state: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(self.reduce(logits).sum(), logits)[0]

    def own(self, logits: Tensor) -> Tensor:
        return (1 - self.smoothing) * (self._positive(logits) - self._negative(logits))

    def _positive(self, logits: Tensor) -> Tensor:
        loss = -F.logsigmoid(logits)
        if self.gamma_pos:
            loss = loss * (self.gamma_pos * F.logsigmoid(-logits)).exp()
        return loss

    def _negative(self, logits: Tensor) -> Tensor:
        log_rest = F.logsigmoid(-logits)
        if self.margin:
            margin = log_rest.new_tensor(self.margin)
            log_rest = torch.logaddexp(log_rest, margin.log()).clamp(max=0)  # log(1 - p + margin)
        if not self.gamma_neg:
            return -log_rest
        shifted = logits.sigmoid() - self.margin
        tiny = torch.finfo(logits.dtype).tiny  # at 0 a power below 1 has no finite slope
        return -shifted.clamp(min=tiny).pow(self.gamma_neg) * log_rest


class _Chunked(torch.autograd.Function):
    """`total`, the own tags' logits and the likeliest class, a chunk of classes at a time.

    No [B, V] is ever held: logits are computed once more on the way back, where each chunk of the
    weight's gradient is written at its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor,
        tags: Tensor,
        criterion: _Criterion,
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.criterion, ctx.chunk, ctx.dtype = criterion, chunk, _matmul_dtype(features)
        low, empty = features.to(ctx.dtype), full_precision(features[:, :0])
        state, picked = criterion.reduce(empty), empty.new_zeros(tags.shape)
        highest, top = empty.new_full(tags.shape[:1], -math.inf), tags.new_zeros(len(tags))
        for piece, _, logits in _pieces(low, weight, bias, chunk):
            index, inside = _own_in(piece, tags)
            state = criterion.join(state, criterion.reduce(logits))
            picked = torch.where(inside, logits.gather(1, index), picked)
            value, place = logits.max(dim=1)
            top = torch.where(value > highest, place + piece.start, top)
            highest = torch.maximum(value, highest)
        ctx.save_for_backward(features, weight, bias, tags, state)
        ctx.mark_non_differentiable(top)
        return criterion.total(state), picked, top

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor, grad_picked: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        features, weight, bias, tags, state = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_features = full_precision(torch.zeros_like(features)) if wanted[0] else None
        grad_weight = torch.empty_like(weight) if wanted[1] else None
        grad_bias = torch.empty_like(bias) if wanted[2] else None
        low = features.to(ctx.dtype)
        for piece, rows, logits in _pieces(low, weight, bias, ctx.chunk):
            index, inside = _own_in(piece, tags)
            slope = ctx.criterion.slope(logits, state).mul_(grad_total.unsqueeze(1))
            slope.scatter_add_(1, index, grad_picked * inside)
            if grad_bias is not None:
                grad_bias[piece] = slope.sum(dim=0)
            slope = slope.to(ctx.dtype)
            if grad_features is not None:
                grad_features += slope @ rows
            if grad_weight is not None:
                grad_weight[piece] = slope.t() @ low
        if grad_features is not None:
            grad_features = grad_features.to(features.dtype)
        return grad_features, grad_weight, grad_bias, None, None, None


def _pieces(
    features: Tensor, weight: Tensor, bias: Tensor, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of the classes: where, their rows [C, D] in the features' dtype, logits [B, C]."""
    for start in range(0, len(weight), chunk):
        piece = slice(start, min(start + chunk, len(weight)))
        rows = weight[piece].to(features.dtype)
        yield piece, rows, full_precision(F.linear(features, rows, bias[piece].to(features.dtype)))


def _own_in(piece: slice, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Places [B, K] of the tags in a chunk of the classes, and whether they are in it at all."""
    inside = (tags >= piece.start) & (tags < piece.stop)
    return (tags - piece.start).clamp(0, piece.stop - piece.start - 1), inside


def _matmul_dtype(features: Tensor) -> torch.dtype:
    """What F.linear would compute in here."""
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


def _labels(tags: Tensor, targets: Tensor) -> Tensor:
    """Targets [B, K] as labels in [0, 1]: an id's sum at its first place, 0 at the others."""
    equal = tags.unsqueeze(2) == tags.unsqueeze(1)
    sums = (equal * targets.unsqueeze(1)).sum(dim=2)
    return sums.clamp(max=1) * ~_repeated(tags)


def _repeated(tags: Tensor) -> Tensor:
    """[B, K], whether an id has occurred in its row before."""
    return (tags.unsqueeze(2) == tags.unsqueeze(1)).tril(-1).any(dim=2)
