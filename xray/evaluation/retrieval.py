"""Retrieval: of images and videos by captions and back (R@k, median rank), and among captions.

Text to image: every caption is a query, and its own image is correct. Image to text: a query is
correct if any of its captions is among the first k (the CLIP benchmark's rule). Results of equal
similarity are in random order: R@k is the probability of a hit and the rank is a mean, so
that collapsed features score at chance. Retrieval of captions by captions tells how well a text
tower groups the captions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.artifacts.encoders import TextEncoder
from xray.errors import ArtifactError, DataError
from xray.evaluation.confidence import median, share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import flat_captions, read_all_captions
from xray.evaluation.suite import CaptionedConfig, Measures
from xray.evaluation.suites.retrieval import DIRECTIONS, RetrievalConfig
from xray.evaluation.zero_shot import HELD

COPIES = 4  # of a chunk of similarities in memory at once


def retrieval(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    kind: Tensor | None = None,
) -> dict[str, float]:
    """Measure R@k in both directions and the median rank of the best correct result, with chance.

    images: [N, D]. texts: [M, D]. owner: [M], the image of each text. Features are normalised.
    kind: [M] long, equal for equal texts: they share their correct images; None = each text is
    correct only for its own image. Intervals resample images, each with its captions. Raises
    DataError for fewer than two images or an image without a caption.
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
    """Ranks of the best correct results, as counts of [Q] queries."""

    above: Tensor  # results that are more similar
    right: Tensor  # correct results of the best correct one's similarity
    wrong: Tensor  # wrong results of the same similarity

    def hits(self, k: int) -> Tensor:
        """Compute the probability that a correct result is among the first k, [Q] double."""
        return 1 - _missed(self.right.double(), self.right + self.wrong, k - self.above)

    def mean_places(self) -> Tensor:
        """Compute the mean number of results before the first correct one, ties shuffled, [Q]."""
        return self.above + self.wrong / (self.right + 1)


def right_pairs(owner: Tensor, kind: Tensor) -> Tensor:
    """Pair each kind of text with its correct images: sparse [K, N] of ones."""
    pairs = torch.stack([kind, owner]).unique(dim=1)
    ones = torch.ones(pairs.shape[1])
    return torch.sparse_coo_tensor(pairs, ones, check_invariants=True).coalesce()


def text_ranks(images: Tensor, texts: Tensor, right: Tensor, kind: Tensor) -> Ranks:
    """Rank the best correct image of each text."""
    ranks, rows = [], max(1, HELD // COPIES // len(images))
    for part, own in zip(texts.split(rows), kind.split(rows), strict=True):
        ranks.append(_ranks(part @ images.t(), right.index_select(0, own).to_dense() > 0))
    return Ranks(*map(torch.cat, zip(*ranks, strict=True)))


def image_ranks(images: Tensor, texts: Tensor, right: Tensor, kind: Tensor) -> Ranks:
    """Rank the best correct text of each image."""
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
    """Compute the probability C(A-c, k) / C(A, k) of no correct one among k of A results, [Q]."""
    missed = torch.ones(len(right), dtype=torch.float64)
    for i in range(int(k.max())):
        factor = ((answers - right - i) / (answers - i).clamp(min=1)).clamp(min=0)
        missed *= torch.where(i < k, factor, 1.0)
    return missed


def _chance(right: Tensor, answers: int, k: int) -> float:
    return float((1 - _missed(right, torch.tensor(answers), torch.tensor(k))).mean())


def _chance_median(right: Tensor, answers: int) -> float:
    """Compute the median rank of the first correct result in random rankings, over all queries."""
    kinds, counts = right.unique(return_counts=True)
    missed, k, half = torch.ones(len(kinds), dtype=torch.float64), 0, len(right) / 2
    while (left := float((missed * counts).sum())) > half * (1 + 1e-9):
        missed *= ((answers - kinds - k) / (answers - k)).clamp(min=0)
        k += 1
    return k + 0.5 if left > half * (1 - 1e-9) else float(k)


def retrieval_of(name: str, sets: Sets, config: RetrievalConfig) -> Measures:
    """Measure retrieval on the data set of a suite, and on each prefix size of the features.

    Samples without captions are left out, and counted as `uncaptioned`.
    """
    source = sets.open(name, config.shards, config.modality)
    captions = read_all_captions(source, config.captions)
    texts, owner, captioned = flat_captions(captions, f"eval.{name}.shards")
    kind = None
    if config.same == "caption":
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        kind = torch.tensor([numbers[text] for text in texts])
    images, rows = sets.features(source, "joint").rows[captioned], sets.texts(texts)
    measures = retrieval(images, rows, owner, kind=kind)
    if left_out := len(captions) - len(captioned):
        measures["uncaptioned"] = float(left_out)
    for size in sets.joint.matryoshka:
        image_part, text_part = (F.normalize(x[:, :size], dim=-1) for x in (images, rows))
        part = retrieval(image_part, text_part, owner, kind=kind)
        recalls = {key: value for key, value in part.items() if key.startswith(DIRECTIONS)}
        measures |= {f"{key}/{size}": value for key, value in recalls.items()}
    return measures


def caption_retrieval(texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Measure the share of captions whose nearest other caption is of the same image, with chance.

    texts: [M, D] normalised. owner: [M], the image of each. If several are equally near, the share
    of correct ones counts. Raises DataError if no image has two captions.
    """
    M = len(texts)
    partners = (torch.bincount(owner)[owner] - 1).double()
    queries = torch.nonzero(partners > 0)[:, 0]
    if not len(queries):
        raise DataError("caption retrieval needs samples with two captions or more")
    hits_of = []
    for rows in queries.split(max(1, HELD // M)):
        similarity = texts[rows] @ texts.t()
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity == similarity.amax(dim=1, keepdim=True)
        same = owner[rows, None] == owner
        hits_of.append((nearest & same).sum(dim=1) / nearest.sum(dim=1))
    hits = torch.bincount(owner[queries], torch.cat(hits_of).double())
    weights = torch.bincount(owner[queries])
    chance = float((partners[queries] / (M - 1)).mean())
    measures = share("top1", hits[weights > 0], weights[weights > 0])
    return measures | {"chance_top1": chance, "captions": float(M)}


def captions_of_tower(sets: Sets, config: CaptionedConfig) -> Measures:
    """Measure the tuned model, and its base model as `before_*`, if the base model is found."""
    encoder = sets.encoder
    if not isinstance(encoder, TextEncoder):
        raise ArtifactError(f"{sets.what}: it has no tuned text tower")
    source = sets.open("captions", config.shards, config.modality)
    captions = read_all_captions(source, config.captions)
    texts, owner, _ = flat_captions(captions, "eval.captions.shards")
    measures = caption_retrieval(sets.encode_texts(texts), owner)
    if encoder.base is not None:
        before = caption_retrieval(sets.encode_texts(texts, base=True), owner)
        measures |= {f"before_{k}": v for k, v in before.items() if k.startswith("top1")}
    return measures
