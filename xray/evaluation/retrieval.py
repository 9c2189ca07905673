"""Retrieval: of images and videos by captions and back (R@k, median rank), and among captions.

Text to image: every caption is a query, and its own image is correct. Image to text: a query is
correct if any of its captions is among the first k (the CLIP benchmark's rule). Results of equal
similarity are in random order: R@k is the probability of a hit and the rank is a mean, so
that collapsed features score at chance. Retrieval of captions by captions tells how well a text
tower groups the captions of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.artifacts.encoders import TextEncoder
from xray.errors import ArtifactError, DataError
from xray.evaluation.confidence import median, share
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import flat_captions, read_all_captions
from xray.evaluation.suite import CaptionedConfig, Measures
from xray.evaluation.suites.retrieval import DIRECTIONS, RetrievalConfig
from xray.evaluation.zero_shot import HELD
from xray.files import lines_of

KS = (1, 5, 10)  # of R@k
TEXT_TO_IMAGE, IMAGE_TO_TEXT = DIRECTIONS
TOO_FEW = "retrieval needs at least two samples, each with a caption"
TOO_FEW_CAPTIONS = "caption retrieval needs samples with two captions or more"
COPIES = 4  # of a chunk of similarities in memory at once


def retrieval(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    ks: Sequence[int] = KS,
    kind: Tensor | None = None,
) -> dict[str, float]:
    """Measure R@k in both directions and the median rank of the best correct result, with chance.

    images: [N, D]. texts: [M, D]. owner: [M], the image of each text. Features are normalised.
    kind: [M] long, equal for equal texts: they share their correct images; None = each text is
    correct only for its own image. Intervals resample images, each with its captions. Raises
    DataError for fewer than two images or an image without a caption.
    """
    return Ranking.of(images, texts, owner, kind).measures(ks)


@dataclass(frozen=True)
class Ranking:
    """Ranks of texts for images and of images for texts; see `retrieval`."""

    text: Ranks  # of the images, for each text
    image: Ranks  # of the texts, for each image
    owner: Tensor
    per_text: Tensor  # number of correct images of each text, [M]
    per_image: Tensor  # number of correct texts of each image, [N]

    @classmethod
    def of(
        cls,
        images: Tensor,
        texts: Tensor,
        owner: Tensor,
        kind: Tensor | None,
        stored: tuple[Tensor, Tensor] | None = None,
    ) -> Ranking:
        """Rank all images and texts; the arguments and errors are those of `retrieval`.

        stored: images and texts that are ranked; the others are the queries. None = the same.
        """
        N, M = len(images), len(texts)
        if N < 2 or not torch.equal(torch.unique(owner), torch.arange(N)):
            raise DataError(TOO_FEW)
        kind = torch.arange(M) if kind is None else kind
        right = right_pairs(owner, kind)
        ranked_images, ranked_texts = stored or (images, texts)
        text_rank = text_ranks(ranked_images, texts, right, kind)
        image_rank = image_ranks(images, ranked_texts, right, kind)
        per_text = right.sum(dim=1).to_dense().double()[kind]
        per_image = torch.mv(right.t().double(), torch.bincount(kind).double())
        return cls(text_rank, image_rank, owner, per_text, per_image)

    def hits(self, direction: str, k: int) -> tuple[Tensor, Tensor]:
        """Return the hits among the first k, summed by image, and the number of queries, [N]."""
        N = len(self.per_image)
        if direction == IMAGE_TO_TEXT:
            return self.image.hits(k), torch.ones(N)
        hits = torch.zeros(N, dtype=torch.float64).index_add(0, self.owner, self.text.hits(k))
        return hits, torch.bincount(self.owner, minlength=N).double()

    def chance(self, direction: str, k: int) -> float:
        """Compute R@k of random rankings."""
        N, M = len(self.per_image), len(self.per_text)
        both = {TEXT_TO_IMAGE: (self.per_text, N), IMAGE_TO_TEXT: (self.per_image, M)}
        return _chance(*both[direction], k)

    def measures(self, ks: Sequence[int]) -> dict[str, float]:
        """Compute the measures of `retrieval`."""
        N, M = len(self.per_image), len(self.per_text)
        result = {"images": float(N), "texts": float(M)}
        for k in ks:
            for direction in DIRECTIONS:
                result |= share(f"{direction}_R@{k}", *self.hits(direction, k))
            for direction in DIRECTIONS:
                result[f"chance_{direction}_R@{k}"] = self.chance(direction, k)
        text, image = (rank.mean_places() + 1 for rank in (self.text, self.image))
        result |= median("text_to_image_median_rank", text, self.owner)
        result |= median("image_to_text_median_rank", image, torch.arange(N))
        result["chance_text_to_image_median_rank"] = _chance_median(self.per_text, N)
        result["chance_image_to_text_median_rank"] = _chance_median(self.per_image, M)
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


class Captioned(NamedTuple):
    """The captions [M] of a suite's data set."""

    source: Source
    texts: list[str]
    owner: Tensor  # [M], the place of each caption's sample among `samples`
    samples: list[int]  # numbers [N] of the samples with captions

    @property
    def left_out(self) -> int:
        """Number of samples without captions."""
        return len(self.source) - len(self.samples)


def captioned_of(name: str, sets: Sets, config: RetrievalConfig) -> Captioned:
    """Open the data set of a suite and read the captions of each sample.

    Raises DataError for fewer than two samples with captions.
    """
    source = config.open(sets, name, "shards")
    captions = read_all_captions(source, config.captions)
    if config.lines:
        captions = [[line for text in own for line in stripped_lines(text)] for own in captions]
    found = Captioned(source, *flat_captions(captions, f"eval.{name}.shards"))
    if len(found.samples) < 2:
        raise DataError(TOO_FEW)
    return found


def stripped_lines(text: str) -> list[str]:
    """List the lines of a text that are not empty."""
    return [line.strip() for line in lines_of(text) if line.strip()]


def retrieval_of(name: str, sets: Sets, config: RetrievalConfig) -> Measures:
    """Measure retrieval on the data set of a suite, and on each prefix size of the features.

    Samples without captions are left out, and counted as `uncaptioned`.
    """
    own = captioned_of(name, sets, config)
    kind = kinds_of(own.texts, config.same)
    images, rows = sets.features(own.source, "joint").rows[own.samples], sets.texts(own.texts)

    def part(images: Tensor, rows: Tensor) -> dict[str, float]:
        return retrieval(images, rows, own.owner, kind=kind)

    measures = part(images, rows)
    if own.left_out:
        measures["uncaptioned"] = float(own.left_out)
    return measures | of_prefixes(sets, images, rows, part)


def kinds_of(texts: Sequence[str], same: str) -> Tensor | None:
    """Number the texts, equal for equal texts, if they share their correct images; else None."""
    if same != "caption":
        return None
    numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([numbers[text] for text in texts])


def of_prefixes(
    sets: Sets, images: Tensor, texts: Tensor, measure: Callable[[Tensor, Tensor], Measures]
) -> dict[str, float]:
    """Return the measures of both directions on each prefix size, which ends their names."""
    found: dict[str, float] = {}
    for size in sets.joint.matryoshka:
        part = measure(*(F.normalize(x[:, :size], dim=-1) for x in (images, texts)))
        found |= {f"{key}/{size}": part[key] for key in part if key.startswith(DIRECTIONS)}
    return found


def caption_retrieval(texts: Tensor, owner: Tensor) -> dict[str, float]:
    """Measure the share of captions whose nearest other caption is of the same image, with chance.

    texts: [M, D] normalised. owner: [M], the image of each. If several are equally near, the share
    of correct ones counts. Raises DataError if no image has two captions.
    """
    M = len(texts)
    partners = (torch.bincount(owner)[owner] - 1).double()
    queries = torch.nonzero(partners > 0)[:, 0]
    if not len(queries):
        raise DataError(TOO_FEW_CAPTIONS)
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


def grouped_captions(sets: Sets, config: CaptionedConfig) -> tuple[list[str], Tensor]:
    """Read the captions [M] of the suite's data set, and the image [M] of each.

    Raises DataError if no image has two captions.
    """
    source = config.open(sets, "captions", "shards")
    captions = read_all_captions(source, config.captions)
    texts, owner, _ = flat_captions(captions, "eval.captions.shards")
    if max(map(len, captions)) < 2:
        raise DataError(f"eval.captions.shards: {TOO_FEW_CAPTIONS}")
    return texts, owner


def captions_of_tower(sets: Sets, config: CaptionedConfig) -> Measures:
    """Measure the tuned model, and its base model as `before_*`, if the base model is found."""
    encoder = sets.encoder
    if not isinstance(encoder, TextEncoder):
        raise ArtifactError(f"{sets.what}: it has no tuned text tower")
    texts, owner = grouped_captions(sets, config)
    measures = caption_retrieval(sets.encode_texts(texts), owner)
    if encoder.base is not None:
        before = caption_retrieval(sets.encode_texts(texts, base=True), owner)
        measures |= {f"before_{k}": v for k, v in before.items() if k.startswith("top1")}
    return measures
