"""Retrieval: cross-modal, both ways, R@k; and of captions by captions.

text -> image: every caption is a query, and the picture it belongs to is right. image -> text: a
picture is found when any of its captions is among the first k (the CLIP benchmark's rule). Answers
of equal similarity are in random order: what counts is the probability of a hit, and the mean
place, so that collapsed features score like a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xray.errors import DataError
from xray.evaluation.confidence import median, share, share_interval
from xray.evaluation.zero_shot import HELD

COPIES = 4  # of a piece of similarities that are held at once


def retrieval(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    kind: Tensor | None = None,
) -> dict[str, float]:
    """R@k both ways and the median place of the best right answer, with chance.

    images: [N, D]. texts: [M, D]. owner: [M], the picture each text belongs to. All normalised.
    kind: [M] long, alike for texts that are the same: what is right for one is right for all of
    them; None = each is right for its own picture alone. Intervals are over pictures, each with its
    captions.
    """
    N, M = len(images), len(texts)
    if N < 2 or not torch.equal(torch.unique(owner), torch.arange(N)):
        raise DataError("retrieval needs at least two samples, each with a caption")
    kind = torch.arange(M) if kind is None else kind
    right = right_pairs(owner, kind)
    text_rank, image_rank = (f(images, texts, right, kind) for f in (text_ranks, image_ranks))
    own = torch.bincount(owner, minlength=N).double()
    per_text = right.sum(dim=1).to_dense().double()[kind]
    per_image = torch.mv(right.t().double(), torch.bincount(kind).double())
    result = {"images": float(N), "texts": float(M)}
    for k in ks:
        hits = torch.zeros(N, dtype=torch.float64).index_add(0, owner, text_rank.hits(k))
        result |= share(f"text_to_image_R@{k}", hits, own)
        result |= share(f"image_to_text_R@{k}", image_rank.hits(k))
        result[f"chance_text_to_image_R@{k}"] = _chance(per_text, N, k)
        result[f"chance_image_to_text_R@{k}"] = _chance(per_image, M, k)
    result |= median("text_to_image_median_rank", text_rank.mean_places() + 1, owner)
    result |= median("image_to_text_median_rank", image_rank.mean_places() + 1, torch.arange(N))
    result["chance_text_to_image_median_rank"] = _chance_median(per_text, N)
    result["chance_image_to_text_median_rank"] = _chance_median(per_image, M)
    return result


class Ranks(NamedTuple):
    """Where the best right answers are: [Q] each."""

    above: Tensor  # answers that are more similar
    right: Tensor  # right ones, of one similarity
    wrong: Tensor  # wrong ones of the same

    def hits(self, k: int) -> Tensor:
        """Probability that a right one is among the first k, [Q] double."""
        return 1 - _missed(self.right.double(), self.right + self.wrong, k - self.above)

    def mean_places(self) -> Tensor:
        """Places before the first right one, on average over the order of equals, [Q]."""
        return self.above + self.wrong / (self.right + 1)


def right_pairs(owner: Tensor, kind: Tensor) -> Tensor:
    """Which kinds of text are right for which pictures: sparse [K, N] of ones."""
    pairs = torch.stack([kind, owner]).unique(dim=1)
    ones = torch.ones(pairs.shape[1])
    return torch.sparse_coo_tensor(pairs, ones, check_invariants=True).coalesce()


def text_ranks(images: Tensor, texts: Tensor, right: Tensor, kind: Tensor) -> Ranks:
    """The best picture that is right for each text."""
    ranks, rows = [], max(1, HELD // COPIES // len(images))
    for part, own in zip(texts.split(rows), kind.split(rows), strict=True):
        ranks.append(_ranks(part @ images.t(), right.index_select(0, own).to_dense() > 0))
    return Ranks(*map(torch.cat, zip(*ranks, strict=True)))


def image_ranks(images: Tensor, texts: Tensor, right: Tensor, kind: Tensor) -> Ranks:
    """The best text that is right for each picture."""
    ranks, rows = [], max(1, HELD // COPIES // len(texts))
    for own in torch.arange(len(images)).split(rows):
        kinds = right.index_select(1, own).to_dense().t() > 0  # [rows, K]
        ranks.append(_ranks(images[own] @ texts.t(), kinds[:, kind]))
    return Ranks(*map(torch.cat, zip(*ranks, strict=True)))


def _ranks(similarity: Tensor, right: Tensor) -> Ranks:
    best = similarity.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    equal = similarity == best
    own = (equal & right).sum(dim=1)
    return Ranks((similarity > best).sum(dim=1), own, equal.sum(dim=1) - own)


def _missed(right: Tensor, answers: Tensor, k: Tensor) -> Tensor:
    """Probability that a random ranking of all answers has none of c right ones among the first k:
    C(A-c, k) / C(A, k), [Q]."""
    missed = torch.ones(len(right), dtype=torch.float64)
    for i in range(int(k.max())):
        factor = ((answers - right - i) / (answers - i).clamp(min=1)).clamp(min=0)
        missed *= torch.where(i < k, factor, 1.0)
    return missed


def _chance(right: Tensor, answers: int, k: int) -> float:
    return float((1 - _missed(right, torch.tensor(answers), torch.tensor(k))).mean())


def _chance_median(right: Tensor, answers: int) -> float:
    """The median place of the first right answer in a random ranking, over all that is asked."""
    kinds, counts = right.unique(return_counts=True)
    missed, k, half = torch.ones(len(kinds), dtype=torch.float64), 0, len(right) / 2
    while (left := float((missed * counts).sum())) > half * (1 + 1e-9):
        missed *= ((answers - kinds - k) / (answers - k)).clamp(min=0)
        k += 1
    return k + 0.5 if left > half * (1 - 1e-9) else float(k)


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
