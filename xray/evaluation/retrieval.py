"""Retrieval: cross-modal, both ways, R@k; and of captions by captions.

text -> image: every caption is a query and has one right picture. image -> text: a picture is found
when any of its captions is among the first k (the CLIP benchmark's rule). Equal similarities count
as half a place each, so that collapsed features score like a guess and not like a hit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xray.errors import DataError

ROWS = 1024  # captions whose similarities are held at a time


def retrieval(
    images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k both ways, with chance.

    images: [N, D]. texts: [M, D]. owner: [M], the picture each text belongs to. All normalised.
    """
    N, M = len(images), len(texts)
    if N < 2 or not torch.equal(torch.unique(owner), torch.arange(N)):
        raise DataError("retrieval needs at least two samples, each with a caption")
    similarity = texts @ images.t()  # [M, N]
    own = similarity[torch.arange(M), owner]
    text_rank = _rank(similarity, own, torch.ones(M))
    best = torch.full((N,), -torch.inf).scatter_reduce(0, owner, own, "amax")
    ties = torch.zeros(N).index_add(0, owner, (own == best[owner]).float())
    image_rank = _rank(similarity.t(), best, ties)
    per_image = torch.bincount(owner, minlength=N).double()
    result = {"images": float(N), "texts": float(M)}
    for k in ks:
        result[f"text_to_image_R@{k}"] = (text_rank < k).float().mean().item()
        result[f"image_to_text_R@{k}"] = (image_rank < k).float().mean().item()
        result[f"chance_text_to_image_R@{k}"] = min(1.0, k / N)
        # a random ranking misses all c captions of a picture with C(M-c, k) / C(M, k)
        miss = torch.ones(N, dtype=torch.float64)
        for i in range(k):
            miss *= ((M - per_image - i) / (M - i)).clamp(min=0) if i < M else 0
        result[f"chance_image_to_text_R@{k}"] = (1 - miss).mean().item()
    return result


def caption_retrieval(texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Share of captions whose nearest other one is of the same picture, with chance.

    texts: [M, D] normalised. owner: [M], the picture each belongs to. Of several nearest ones, the
    right ones' share counts. Raises DataError where no picture has two.
    """
    M = len(texts)
    partners = (torch.bincount(owner)[owner] - 1).double()
    asked = torch.nonzero(partners > 0)[:, 0]
    if not len(asked):
        raise DataError("caption retrieval needs samples with two captions or more")
    right = 0.0
    for rows in asked.split(ROWS):
        similarity = texts[rows] @ texts.t()
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity == similarity.amax(dim=1, keepdim=True)
        same = owner[rows, None] == owner
        right += float(((nearest & same).sum(dim=1) / nearest.sum(dim=1)).sum())
    chance = float((partners[asked] / (M - 1)).mean())
    return {"top1": right / len(asked), "chance_top1": chance, "captions": float(M)}


def _rank(similarity: Tensor, own: Tensor, own_count: Tensor) -> Tensor:
    """Places before the right answer: those above it, and half of the others equal to it."""
    above = (similarity > own[:, None]).sum(dim=1)
    equal = (similarity == own[:, None]).sum(dim=1) - own_count
    return above + equal / 2
