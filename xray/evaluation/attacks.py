"""Adversarial pictures within an L-infinity distance, and what a classifier makes of them.

Pixels are in [0, 1], normalisation is inside the classifier: logits of [B, T, 3, H, W]. The found
pictures are floats: they are not rounded to 8 bits. A gradient goes through the tokens that a model
keeps and fuses; that another choice of tokens could follow from a change is not in it, which is one
reason to look at the attack without gradients beside.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.errors import ArtifactError

Logits = Callable[[Tensor], Tensor]  # [B, T, 3, H, W] in [0, 1] -> [B, C]


def fgsm(logits: Logits, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """One step of eps along the sign of the loss's gradient (1412.6572)."""
    return (x + eps * _gradient(logits, x, labels).sign()).clamp(0, 1)


def pgd(
    logits: Logits, x: Tensor, labels: Tensor, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Steps of eps / 2 from a random start, each projected back (1706.06083).

    At eps 2/255 and 5 steps that is TeCoA's (2212.07016) step of 1/255.
    """
    noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    found = (x + eps * noise).clamp(0, 1)
    for _ in range(steps):
        found = found + eps / 2 * _gradient(logits, found, labels).sign()
        found = torch.minimum(torch.maximum(found, x - eps), x + eps).clamp(0, 1)
    return found


@torch.no_grad()
def square(
    logits: Logits, x: Tensor, labels: Tensor, eps: float, queries: int, generator: torch.Generator
) -> Tensor:
    """Random squares of +-eps, each kept where it lowers the margin (Square Attack, 1912.00049).

    It starts from vertical stripes; the squares' area falls from .8 of the picture as there, their
    schedule of 10,000 queries scaled to these. A sample that is wrong already is left alone.
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
        side = max(1, round(math.sqrt(_area(query / queries) * H * W)))
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


def _area(progress: float) -> float:
    """The share of a picture that a square covers, halved at shares of all queries."""
    halvings = sum(progress > at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
    return 0.8 / 2**halvings


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The right class's logit above the best other one; below 0 it is wrong."""
    right = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    return right - others


def _gradient(logits: Logits, x: Tensor, labels: Tensor) -> Tensor:
    """Of the cross-entropy in the pixels; raises ArtifactError where none reaches them."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        found = logits(x)
        if not found.requires_grad:
            raise ArtifactError(
                "no gradient reaches the pixels through this classifier: FGSM and PGD need one, "
                "set eval.robustness.attacks=[square]"
            )
        loss = F.cross_entropy(found, labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]
