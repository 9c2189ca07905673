"""APGD and its losses against brute force, closed forms and the algorithm written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from xray.evaluation.attacks import apgd, checkpoints, cross_entropy, dlr, pgd

LOSSES = (cross_entropy, dlr)
SHAPE = (1, 3, 6, 6)  # of an image


def images(number: int, seed: int = 0) -> Tensor:
    """Images over the whole of [0, 1], so that many of their pixels are near an end."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, *SHAPE, generator=generator, dtype=torch.float64)


def linear(classes: int, seed: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Weights [C, 108] and the classifier with these weights."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(classes, 108, generator=generator, dtype=torch.float64)
    return weights, lambda x: (x - 0.5).flatten(1) @ weights.t()


def network(seed: int = 0) -> nn.Module:
    """A convolutional network of five classes with random weights."""
    torch.manual_seed(seed)
    layers = nn.Sequential(
        *(nn.Flatten(0, 1), nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(32, 5)),
    ).double()
    return layers.requires_grad_(False)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_difference_of_logits_ratio_equals_its_formula() -> None:
    """Also if the class is the first, the second or the third, and under shift and scale."""
    torch.manual_seed(0)
    logits = torch.randn(40, 6, dtype=torch.float64)
    labels = torch.randint(6, (40,))
    expected = []
    for row, label in zip(logits.numpy(), labels.tolist(), strict=True):
        high, _, third = sorted(row, reverse=True)[:3]
        expected.append(-(row[label] - max(np.delete(row, label))) / (high - third))
    assert dlr(logits, labels).numpy() == pytest.approx(np.array(expected), abs=1e-12)
    assert torch.allclose(dlr(7 * logits - 3, labels), dlr(logits, labels))
    flat = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)  # the ratio 0 / 0
    dlr(flat, torch.tensor([0])).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [1] and checkpoints(20) == [5, 9, 12, 14, 16, 18, 19, 20]


@pytest.mark.parametrize("loss", LOSSES)
def test_apgd_reaches_the_optimum_of_a_linear_model(loss: Callable[..., Tensor]) -> None:
    """Two classes and a far third: each pixel moves by eps against w, or up to 0 or 1."""
    eps, x = 0.01, images(16)
    weights, _ = linear(1)
    labels = torch.zeros(16, dtype=torch.long)

    def logits(x: Tensor) -> Tensor:
        score = (x - 0.5).flatten(1) @ weights.t()
        return torch.cat([score + 14, 0 * score, 0 * score - 500], dim=1)  # of class 0 everywhere

    best = (x - eps * weights.sign().view(SHAPE)).clamp(0, 1)
    found = apgd(logits, x, labels, eps, loss, 3, seeded())
    assert torch.allclose(found, best, atol=1e-12)
    assert (best - x).abs().amin() < eps / 2  # some pixels are clipped


def test_apgd_finds_what_can_be_misclassified_by_a_linear_model() -> None:
    """A class j can be reached if the margin to it is below 0 at its own optimum."""
    eps, x = 0.02, images(60)
    weights, logits = linear(4)
    labels = logits(x).argmax(dim=1)
    reachable = torch.zeros(60, dtype=torch.bool)
    for other in range(4):
        direction = weights[labels] - weights[other]
        moved = (x.flatten(1) - eps * direction.sign()).clamp(0, 1) - 0.5
        reachable |= ((moved * direction).sum(1) < 0) & (labels != other)
    assert 10 < reachable.sum() < 50
    fooled = torch.zeros(60, dtype=torch.bool)
    for loss in LOSSES:
        found = apgd(logits, x, labels, eps, loss, 20, seeded())
        assert (found - x).abs().max() <= eps + 1e-12 and found.min() >= 0 and found.max() <= 1
        fooled |= logits(found).argmax(dim=1) != labels
    assert torch.equal(fooled, reachable)


def written_out(
    model: nn.Module, x: Tensor, label: Tensor, eps: float, loss: Callable[..., Tensor], steps: int
) -> tuple[Tensor, int]:
    """Algorithm 1 of the paper for one image that stays correct, and how often it halves."""

    def f(at: Tensor) -> float:
        return float(loss(model(at), label))

    def slope(at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(loss(model(at), label).sum(), at)[0]

    def inside(y: Tensor) -> Tensor:
        return y.clamp(x - eps, x + eps).clamp(0, 1)

    noise = torch.rand(x.shape, generator=seeded()).double() * 2 - 1
    xs = [(x + eps * noise).clamp(0, 1)]
    best, eta, halvings = xs[0], 2 * eps, 0
    raised, tops = list[bool](), [f(best)]
    checked, used = 0, {0: eta}  # the last checkpoint, and the step size at each
    for k in range(steps):
        z = inside(xs[k] + eta * slope(xs[k]).sign())
        new = inside(xs[k] + 0.75 * (z - xs[k]) + 0.25 * (xs[k] - xs[k - 1])) if k else z
        value = f(new)
        raised.append(value > f(xs[k]))
        best = new if value > tops[k] else best
        tops.append(max(value, tops[k]))
        xs.append(new)
        if (w := k + 1) in checkpoints(steps):
            few = sum(raised[checked:w]) < 0.75 * (w - checked)
            used[w] = eta
            if few or (used[checked] == eta and tops[checked] == tops[w]):
                eta, xs[w], halvings = eta / 2, best, halvings + 1
            checked = w
    return best, halvings


@pytest.mark.parametrize("loss", LOSSES)
def test_apgd_equals_the_written_algorithm(loss: Callable[..., Tensor]) -> None:
    """On images of a network that no step misclassifies, whose steps are often halved."""
    steps, halvings = 20, []
    for scale, eps, x in product((6, 10), (0.01, 0.03), images(12).split(1)):
        model = network()
        for weights in model.parameters():
            weights.mul_(scale)  # far from linear
        label = model(x).argmax(dim=1)
        expected, halved = written_out(model, x, label, eps, loss, steps)
        if model(expected).argmax(dim=1) == label:
            assert torch.equal(apgd(model, x, label, eps, loss, steps, seeded()), expected)
            halvings.append(halved)
    assert len(halvings) > 10 and 0 < min(halvings) < max(halvings) <= len(checkpoints(steps))


def test_apgd_is_at_least_as_strong_as_pgd_with_equal_steps() -> None:
    """Samples do not depend on each other's step sizes."""
    model, x, eps = network(1), images(80), 0.1
    labels = model(x).argmax(dim=1)
    fooled = {}
    for name, changed in (
        ("pgd", pgd(model, x, labels, eps, 10, seeded())),
        ("ce", apgd(model, x, labels, eps, cross_entropy, 10, seeded())),
        ("dlr", apgd(model, x, labels, eps, dlr, 10, seeded())),
    ):
        fooled[name] = model(changed).argmax(dim=1) != labels
        assert (changed - x).abs().max() <= eps + 1e-12
    assert 8 < fooled["pgd"].sum() < 72
    assert fooled["ce"].sum() >= fooled["pgd"].sum() <= fooled["dlr"].sum()
