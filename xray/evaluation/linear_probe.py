"""Linear probe: multinomial logistic regression on frozen features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from xray.config import OptimConfig
from xray.evaluation.class_labels import accuracy, check_labels
from xray.optim import lr_at
from xray.progress import progress_of

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # L2 on the weights, chosen on held-out training samples
HELD_OUT = 0.2  # fraction of the training samples


class LinearHead(NamedTuple):
    """A fitted probe: standardisation of the features, then a linear layer."""

    mean: Tensor  # [D]
    deviation: Tensor  # [D]
    weights: Tensor  # [D + 1, C], the bias last
    strength: float = 0.0  # of L2

    def logits(self, x: Tensor) -> Tensor:
        """Compute logits of features [..., D] -> [..., C]."""
        scaled = (x.to(self.mean) - self.mean) / self.deviation
        return scaled @ self.weights[:-1] + self.weights[-1]

    def scores(self, views: Tensor) -> Tensor:
        """Score classes by the mean softmax over views, [N, V, D] -> [N, C]; logits of one view."""
        if views.shape[1] == 1:
            return self.logits(views[:, 0])
        return self.logits(views).softmax(dim=-1).mean(dim=1)

    def predict(self, views: Tensor) -> Tensor:
        """Predict classes [N] of views [N, V, D]."""
        return self.scores(views).argmax(dim=1)


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, solver: str = "lbfgs"
) -> dict[str, float]:
    """Measure top-1 accuracy, with chance (`guess`).

    Features are [N, D] and [M, D], or [N, V, D] and [M, V, D] with V views.
    """
    check_labels(train_labels, "a linear probe")
    check_labels(test_labels, "a linear probe")
    train, test = (x[:, None] if x.ndim == 2 else x for x in (train, test))
    head = SOLVERS[solver](train, train_labels)
    return accuracy(head.predict(test), test_labels, train_labels) | {"l2": head.strength}


def _rows(views: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten views [N, V, D] and labels [N] to rows [N * V, D] and [N * V]."""
    return views.flatten(0, 1), labels.repeat_interleave(views.shape[1])


def _lbfgs(views: Tensor, own: Tensor) -> LinearHead:
    """Fit by L-BFGS on standardised features to convergence, in double precision.

    The L2 strength is the best of STRENGTHS on held-out samples; the final fit uses all samples.
    """
    train, labels = _rows(views, own)
    mean, deviation = train.mean(0).double(), train.std(0).double() + 1e-6
    x = (train.double() - mean) / deviation
    # hold out a sample with all its views, which are similar
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(0))
    row_numbers = torch.arange(len(x)).view(len(views), -1)[order]
    count = round(HELD_OUT * len(views))
    held, fitted = row_numbers[:count].flatten(), row_numbers[count:].flatten()

    weights = x.new_zeros(x.shape[1] + 1, int(labels.max()) + 1)
    by_strength: dict[float, tuple[float, Tensor]] = {}
    strongest_first = iter(sorted(STRENGTHS, reverse=True))  # each starts from the last solution
    for strength in progress_of("linear probe")(strongest_first, len(STRENGTHS)):
        weights = fit(x[fitted], labels[fitted], strength, weights)
        guess = (x[held] @ weights[:-1] + weights[-1]).argmax(dim=1)
        by_strength[strength] = float((guess == labels[held]).double().mean()), weights
    strength = max(sorted(by_strength), key=lambda strength: by_strength[strength][0])
    weights = fit(x, labels, strength, by_strength[strength][1])
    return LinearHead(mean, deviation, weights, strength)


def fit(
    x: Tensor,
    labels: Tensor,
    strength: float,
    start: Tensor,
    tolerance: float = 1e-9,
    history: int = 100,
) -> Tensor:
    """Minimise the mean cross-entropy + strength/2 * |W|^2; returns weights [D + 1, C], bias last.

    This is scikit-learn's LogisticRegression with C = 1 / (strength * N). x: [N, D] double. start:
    initial weights, which do not change the minimum. With x [R, N, D], labels [R, N] and start
    [R, D + 1, C], R separate problems are solved together. tolerance: largest derivative at the
    end. history: steps that L-BFGS remembers.
    """
    weights = start.clone().requires_grad_()
    problems = x[..., 0, 0].numel()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=1000,
        tolerance_grad=tolerance,
        tolerance_change=1e-16,
        history_size=history,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weights[..., :-1, :] + weights[..., -1:, :]
        loss = problems * F.cross_entropy(logits.flatten(0, -2), labels.flatten())
        loss = loss + strength / 2 * weights[..., :-1, :].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _sgd(views: Tensor, own: Tensor) -> LinearHead:
    """Fit by LLM2CLIP's recipe (2411.04997) on standardised features.

    SGD, lr 0.1 with half a cosine, momentum 0.9, no weight decay, batches of 1024, 50 epochs.
    """
    train, labels = _rows(views, own)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    layer = _layer(train, labels)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    x = (train - mean) / deviation
    schedule = OptimConfig(base_lr=0.1, warmup=0.0)
    _descend(layer, x, labels, optimizer, schedule, 1024, epochs=50, whole=False)
    return LinearHead(mean, deviation, _weights(layer))


def _mae(views: Tensor, own: Tensor) -> LinearHead:
    """Fit by MAE's recipe (2111.06377): BatchNorm without affine, a linear layer, LARS.

    lr 0.1 * batch / 256, no weight decay, 10 of 90 epochs of warm-up, batches of 16,384 or all
    samples. Features are of centre crops; the paper uses random crops.
    """
    train, labels = _rows(views, own)
    batch = min(16384, len(train))
    layer = _layer(train, labels)
    norm = nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6)
    groups = [{"params": [layer.weight], "always_adapt": True}, {"params": [layer.bias]}]
    lr = 0.1 * batch / 256
    optimizer = Lars(groups, lr=lr, momentum=0.9)
    model = nn.Sequential(norm, layer)
    schedule = OptimConfig(base_lr=lr, warmup=10 / 90)
    _descend(model, train, labels, optimizer, schedule, batch, epochs=90, whole=True)
    assert norm.running_mean is not None and norm.running_var is not None
    deviation = (norm.running_var + norm.eps).sqrt()
    return LinearHead(norm.running_mean, deviation, _weights(layer))


def _layer(train: Tensor, labels: Tensor) -> nn.Linear:
    layer = nn.Linear(train.shape[1], int(labels.max()) + 1)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    return layer


def _weights(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight.t(), layer.bias[None]]).detach()


def _descend(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: OptimConfig,
    batch: int,
    epochs: int,
    whole: bool,
) -> None:
    """Train on shuffled batches, with a fixed seed; whole: drop a smaller last batch."""
    generator = torch.Generator().manual_seed(0)
    per_epoch = len(x) // batch if whole else -(-len(x) // batch)
    model.train()
    for epoch in progress_of("linear probe")(iter(range(epochs)), epochs):
        order = torch.randperm(len(x), generator=generator)
        for number, rows in enumerate(order.split(batch)[:per_epoch]):
            progress = (epoch + number / per_epoch) / epochs
            for group in optimizer.param_groups:
                group["lr"] = lr_at(progress, schedule, 256)
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), labels[rows]).backward()
            optimizer.step()


# Fit a head to features [N, V, D] of V views and labels [N].
SOLVERS: dict[str, Callable[[Tensor, Tensor], LinearHead]]
SOLVERS = {"lbfgs": _lbfgs, "sgd": _sgd, "mae": _mae}
