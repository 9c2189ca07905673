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
HALVED = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # progress of the square's halvings


def fgsm(logits: Logits, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Take one step of eps along the sign of the loss's gradient (1412.6572)."""
    return (x + eps * _gradient(logits, x, labels).sign()).clamp(0, 1)


def pgd(
    logits: Logits, x: Tensor, labels: Tensor, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Take steps of eps / 2 from a random start, each projected back (1706.06083).

    At eps 2/255 the step is that of TeCoA (2212.07016), 1/255.
    """
    noise = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
    adversarial = (x + eps * noise).clamp(0, 1)
    for _ in range(steps):
        adversarial = adversarial + eps / 2 * _gradient(logits, adversarial, labels).sign()
        adversarial = torch.minimum(torch.maximum(adversarial, x - eps), x + eps).clamp(0, 1)
    return adversarial


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


def _gradient(logits: Logits, x: Tensor, labels: Tensor) -> Tensor:
    """Compute the gradient of the cross-entropy; raises ArtifactError if there is none."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        output = logits(x)
        if not output.requires_grad:
            raise ArtifactError(
                "no gradient reaches the pixels through this classifier: FGSM and PGD need one, "
                "set eval.robustness.attacks=[square]"
            )
        loss = F.cross_entropy(output, labels, reduction="sum")
    return torch.autograd.grad(loss, x)[0]
