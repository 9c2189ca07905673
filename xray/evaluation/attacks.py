"""Adversarial attacks on a classifier of images, within an L-infinity distance.

Pixels are in [0, 1]; the classifier normalises them: [B, T, 3, H, W] -> logits. Adversarial images
are floats, not rounded to 8 bits. With token reduction the gradient flows through the kept and the
merged tokens, but not through the choice of tokens, so gradient-based attacks should be compared
with the black-box attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.errors import ArtifactError

Logits = Callable[[Tensor], Tensor]  # [B, T, 3, H, W] in [0, 1] -> [B, C]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, C], labels [B] -> [B]
HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # progress of the square's halvings
MOMENTUM = 0.75  # APGD's weight of the new step; the rest is that of the last step
RISING = 0.75  # share of steps that must raise the loss, or APGD's step size is halved


def fgsm(logits: Logits, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Take one step of eps along the sign of the loss's gradient (1412.6572)."""
    return (x + eps * _gradient(logits, x, labels).sign()).clamp(0, 1)


def pgd(
    logits: Logits, x: Tensor, labels: Tensor, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Take steps of eps / 2 from a random start, each projected back (1706.06083).

    At eps 2/255 the step is that of TeCoA (2212.07016), 1/255.
    """
    adversarial = _random_start(x, eps, generator)
    for _ in range(steps):
        adversarial = adversarial + eps / 2 * _gradient(logits, adversarial, labels).sign()
        adversarial = _projected(adversarial, x, eps)
    return adversarial


def apgd(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    eps: float,
    loss: Loss,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Take steps of 2 eps with momentum, halved for a sample when its loss stops rising (APGD).

    At each of `checkpoints`, a sample whose step is halved continues from its point of the highest
    loss (2003.01690, algorithm 1). A sample is finished once it is misclassified. Returns the
    misclassified images, and of the others those of the highest loss.
    """
    now = _random_start(x, eps, generator)
    before, best = now.clone(), now.clone()
    value, gradient, wrong = _ascent(logits, now, labels, loss)
    best_value, best_gradient = value.clone(), gradient.clone()
    step = x.new_full((len(x),), 2 * eps)
    rises, since = torch.zeros_like(value), best_value.clone()  # since the last checkpoint
    halved, last, checks = torch.zeros_like(wrong), 0, checkpoints(steps)
    for number in range(1, steps + 1):
        own = (~wrong).nonzero()[:, 0]
        if not len(own):
            break
        at = now[own]
        ahead = at + step[own].view(-1, 1, 1, 1, 1) * gradient[own].sign()
        moved = _projected(ahead, x[own], eps)
        if number > 1:
            moved = at + MOMENTUM * (moved - at) + (1 - MOMENTUM) * (at - before[own])
            moved = _projected(moved, x[own], eps)
        reached, slope, fooled = _ascent(logits, moved, labels[own], loss)
        rises[own] += reached > value[own]
        before[own], now[own] = at, moved
        value[own], gradient[own], wrong[own] = reached, slope, fooled
        better = fooled | (reached > best_value[own])
        up = own[better]
        best[up], best_value[up], best_gradient[up] = now[up], value[up], gradient[up]
        if number in checks:
            stalled = rises < RISING * (number - last)
            halved = stalled | (~halved & (best_value <= since))
            step = torch.where(halved, step / 2, step)
            now[halved], value[halved] = best[halved], best_value[halved]
            gradient[halved] = best_gradient[halved]
            rises, since, last = torch.zeros_like(rises), best_value.clone(), number
    return best


def checkpoints(steps: int) -> list[int]:
    """List the steps after which APGD may halve its step size: 22, 41, 57 % ... of all."""
    percent, gap = 22, 22
    found = []
    while percent <= 100:
        found.append(-(-percent * steps // 100))
        gap = max(gap - 3, 6)
        percent += gap
    return sorted({*found})


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample, [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the difference of logits ratio of each sample, [B], for three or more classes.

    It is the negative margin divided by the difference of the largest and the third largest logit
    (2003.01690, equation 6), so it changes neither with a shift nor with a scale of the logits.
    """
    top = logits.topk(3, dim=1).values
    return -_margin(logits, labels) / (top[:, 0] - top[:, 2]).clamp(min=1e-12)


@torch.no_grad()
def square(
    logits: Logits, x: Tensor, labels: Tensor, eps: float, queries: int, generator: torch.Generator
) -> Tensor:
    """Add random squares of +-eps, each kept if it lowers the margin (Square Attack, 1912.00049).

    The attack starts from vertical stripes. The squares shrink from 0.8 of the image by the paper's
    schedule, scaled from 10,000 queries. Misclassified samples are not changed.
    """
    B, _, C, H, W = x.shape

    def signs(*shape: int) -> Tensor:
        return (torch.randint(2, shape, generator=generator) * 2 - 1).to(x)

    best = (x + eps * signs(B, 1, C, 1, W)).clamp(0, 1)
    least = _margin(logits(best), labels)
    clean = _margin(logits(x), labels)
    best[clean < 0], least[clean < 0] = x[clean < 0], clean[clean < 0]
    for query in range(queries - 1):
        active = (least >= 0).nonzero()[:, 0]
        if not len(active):
            break
        area = 0.8 / 2 ** sum(query / queries > at for at in HALVED)  # share of the image
        side = max(1, round(math.sqrt(area * H * W)))
        h, w = min(side, H), min(side, W)
        tried = best[active].clone()
        for row, own in enumerate(active.tolist()):
            top, left = (
                int(torch.randint(n, (), generator=generator)) for n in (H - h + 1, W - w + 1)
            )
            window = ..., slice(top, top + h), slice(left, left + w)
            tried[row][window] = (x[own][window] + eps * signs(1, C, 1, 1)).clamp(0, 1)
        margin = _margin(logits(tried), labels[active])
        better = margin < least[active]
        best[active[better]], least[active[better]] = tried[better], margin[better]
    return best


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Subtract the best other logit from the correct class's; negative if misclassified."""
    right = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return right - others


def _random_start(x: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    return (x + eps * noise).clamp(0, 1)


def _projected(changed: Tensor, x: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(changed, x - eps), x + eps).clamp(0, 1)


def _gradient(logits: Logits, x: Tensor, labels: Tensor) -> Tensor:
    return _ascent(logits, x, labels, cross_entropy)[1]


def _ascent(logits: Logits, x: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of each sample [B], its gradient, and which are misclassified [B].

    Raises ArtifactError if there is no gradient.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = logits(x)
        if not output.requires_grad:
            raise ArtifactError(
                "no gradient reaches the pixels through this classifier: every attack but square "
                "needs one, set eval.robustness.attacks=[square]"
            )
        values = loss(output, labels)
    gradient = torch.autograd.grad(values.sum(), x)[0]
    return values.detach(), gradient, output.detach().argmax(dim=1) != labels
