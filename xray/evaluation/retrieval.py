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
from xray.evaluation.bootstrap import median, share, share_interval
from xray.evaluation.zero_shot import HELD


def retrieval(
    images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k both ways and the median place of the right answer, with chance.

    images: [N, D]. texts: [M, D]. owner: [M], the picture each text belongs to. All normalised.
    Intervals are over pictures, each with its captions.
    """
    N, M = len(images), len(texts)
    if N < 2 or not torch.equal(torch.unique(owner), torch.arange(N)):
        raise DataError("retrieval needs at least two samples, each with a caption")
    text_rank, image_rank = text_ranks(images, texts, owner), image_ranks(images, texts, owner)
    per_image = torch.bincount(owner, minlength=N).double()
    result = {"images": float(N), "texts": float(M)}
    for k in ks:
        hits = torch.zeros(N).index_add(0, owner, (text_rank < k).float())
        result |= share(f"text_to_image_R@{k}", hits, per_image)
        result |= share(f"image_to_text_R@{k}", image_rank < k)
        result[f"chance_text_to_image_R@{k}"] = min(1.0, k / N)
        result[f"chance_image_to_text_R@{k}"] = (1 - _missed(per_image, M, k)).mean().item()
    result |= median("text_to_image_median_rank", text_rank + 1, owner)
    result |= median("image_to_text_median_rank", image_rank + 1, torch.arange(N))
    result["chance_text_to_image_median_rank"] = (N + 1) / 2
    result["chance_image_to_text_median_rank"] = _chance_median(per_image, M)
    return result


def text_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """Places before each text's picture: those above it, and half of the others equal to it."""
    ranks, rows = [], max(1, HELD // len(images))
    for part, own in zip(texts.split(rows), owner.split(rows), strict=True):
        similarity = part @ images.t()
        right = similarity.gather(1, own[:, None])
        equal = (similarity == right).sum(dim=1) - 1
        ranks.append((similarity > right).sum(dim=1) + equal / 2)
    return torch.cat(ranks)


def image_ranks(images: Tensor, texts: Tensor, owner: Tensor) -> Tensor:
    """Places before the best of each picture's texts, counted likewise."""
    ranks, rows = [], max(1, HELD // len(texts))
    for start in range(0, len(images), rows):
        similarity = images[start : start + rows] @ texts.t()
        own = owner == torch.arange(start, start + len(similarity))[:, None]
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        equal = ((similarity == best) & ~own).sum(dim=1)
        ranks.append((similarity > best).sum(dim=1) + equal / 2)
    return torch.cat(ranks)


def _missed(per_image: Tensor, texts: int, k: int) -> Tensor:
    """Probability that a random ranking has none of a picture's c captions among the first k:
    C(M-c, k) / C(M, k)."""
    missed = torch.ones(len(per_image), dtype=torch.float64)
    for i in range(k):
        missed *= ((texts - per_image - i) / (texts - i)).clamp(min=0) if i < texts else 0
    return missed


def _chance_median(per_image: Tensor, texts: int) -> float:
    """The place at which a random ranking has found a caption of half of the pictures."""
    kinds, counts = per_image.unique(return_counts=True)
    missed, k = torch.ones(len(kinds), dtype=torch.float64), 0
    while float((missed * counts).sum()) > len(per_image) / 2:
        missed *= ((texts - kinds - k) / (texts - k)).clamp(min=0)
        k += 1
    return float(k)


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
    found = []
    for rows in asked.split(max(1, HELD // M)):
        similarity = texts[rows] @ texts.t()
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity == similarity.amax(dim=1, keepdim=True)
        same = owner[rows, None] == owner
        found.append((nearest & same).sum(dim=1) / nearest.sum(dim=1))
    hits = torch.zeros(int(owner.max()) + 1).index_add(0, owner[asked], torch.cat(found))
    weights = torch.bincount(owner[asked], minlength=len(hits))
    low, high = share_interval(hits[weights > 0], weights[weights > 0])
    top1 = float(torch.cat(found).double().mean())
    chance = float((partners[asked] / (M - 1)).mean())
    ends = {"top1_low": low, "top1_high": high}
    return {"top1": top1, **ends, "chance_top1": chance, "captions": float(M)}
