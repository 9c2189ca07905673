"""How well a tag head finds the tags of pictures and clips, each measure beside chance.

Blocks of probabilities [b, V] go in, one per sample and tag, and only what the measures need is
kept: hits among the top tags, and the scores of the tags whose average precision is measured.

    metrics = TagMetrics(counts, measured_tags(labels, samples))
    for probabilities, tags in blocks:
        metrics.add(probabilities, tags)
    metrics.results(), metrics.calibration()

Ties. Among a sample's equal tags the smaller id goes first. A vocabulary is ordered by descending
count, so a scorer that tells nothing apart guesses the frequent tags: it scores chance. Among a
tag's equal samples all are taken at once, so that their order is of no matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xray.errors import DataError

HELD = 2**28  # scores that are held for average precision: 1 GiB
BINS = 15  # of the calibration


def measured_tags(tags: Tensor, samples: int, held: int = HELD, seed: int = 0) -> Tensor:
    """The tags whose average precision is measured: [M] ids, ascending.

    All that the samples have; where these have more than `held` scores on that many samples, a
    random subset that fits. AP is exact on each of them, and their mean an unbiased estimate of the
    mean over all. tags: the samples' ids in any shape, -1 is none.
    """
    present = torch.unique(tags[tags >= 0])
    fitting = max(1, held // max(1, samples))
    order = torch.randperm(len(present), generator=torch.Generator().manual_seed(seed))
    return present[order[:fitting]].sort().values


@dataclass(frozen=True)
class Calibration:
    """Bins of equal width over the confidence, each (lower, upper]; 0 in a bin without samples.

    confidence, accuracy: [bins] float64, means over a bin's samples. count: [bins].
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over samples of their bin's gap (1706.04599)."""
        gap = (self.accuracy - self.confidence).abs()
        return ((gap * self.count).sum() / self.count.sum()).item()


def calibrate(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Calibration:
    """Compare confidence [N] in [0, 1] with how often it was right, correct [N] bool."""
    inner = torch.linspace(0, 1, bins + 1)[1:-1]
    place = torch.bucketize(confidence.float(), inner)
    count = torch.bincount(place, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(place, values.double(), bins) / count.clamp(min=1)

    return Calibration(mean(confidence), mean(correct), count)


def average_precision(scores: np.ndarray, own: np.ndarray) -> float:
    """Mean over the positives of the precision at their score: among samples that score as much or
    more, the share of positives. Equals sum_n (R_n - R_{n-1}) P_n over the distinct scores.

    scores: [N] of one tag. own: [P] those of its positives, which are among them.
    """
    above = len(scores) - np.searchsorted(np.sort(scores), own)
    hits = len(own) - np.searchsorted(np.sort(own), own)
    return float(np.mean(hits / above))


def random_precision(positives: Tensor, samples: int) -> Tensor:
    """Expected average precision of a random order, [T] float64 of [T] numbers of positives.

    With P of N positive, sum_k (1 + (k - 1) (P - 1) / (N - 1)) / k / N over the ranks k = 1..N.
    """
    harmonic = (1 / torch.arange(1, samples + 1, dtype=torch.float64)).sum()
    others = (positives.double() - 1) / max(1, samples - 1)  # share of the other samples
    return (harmonic + others * (samples - harmonic)) / samples


def top_tags(scores: Tensor, k: int) -> Tensor:
    """The k best tags of each sample, best first, equal ones by id: [b, V] -> [b, k].

    Raises DataError for scores that are not finite.
    """
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if not torch.isfinite(values).all():  # NaN comes first in topk
        raise DataError("the tag scores of a sample are not finite: look for NaN in the weights")
    ids, least = ids[:, :k], values[:, k - 1 : k]
    tied = (values[:, k:] == least).any(dim=1)  # topk takes any of those that are equal
    for i in tied.nonzero().flatten().tolist():
        above, equal = scores[i] > least[i], scores[i] == least[i]
        ids[i] = torch.cat([above.nonzero(), equal.nonzero()])[:k, 0]
    ids = ids.sort(dim=1).values
    return ids.gather(1, scores.gather(1, ids).argsort(dim=1, descending=True, stable=True))


class _Block(NamedTuple):
    """What is kept of b samples with tags."""

    scores: Tensor  # [M, b] of the measured tags
    hits: Tensor  # [b, k] whether a top tag is one of the sample's
    guesses: Tensor  # [b, k] the same of the most frequent tags
    confidence: Tensor  # [b] of the first tag
    owned: Tensor  # [b] tags of each sample
    tags: Tensor  # [sum of owned] their ids


class TagMetrics:
    """Measures of a tag head over samples that come in blocks of any size.

    counts: [V], how many training samples have each tag. measured: [M] distinct ids, the tags of
    mAP; with none there is no mAP. ks: the k of recall; a tag is dead that is in no sample's top
    max(ks).

    A sample without tags counts for dead tags only: nobody said what it shows.
    """

    def __init__(self, counts: Tensor, measured: Tensor, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.counts, self.measured, self.ks = counts, measured, ks
        self.top = min(max(ks), len(counts))
        self.frequent = counts.argsort(descending=True, stable=True)[: self.top]
        self.seen = torch.zeros(len(counts), dtype=torch.bool)
        self.samples = 0
        self.blocks: list[_Block] = []

    def add(self, probabilities: Tensor, tags: Tensor) -> None:
        """Count b samples; raises DataError for scores that are not finite and for ids >= V.

        probabilities: [b, V], softmax over tags, on any device. tags: [b, K] ids, each once,
        padded with -1.
        """
        V, tags = len(self.counts), tags.cpu()
        assert probabilities.shape == (len(tags), V), (probabilities.shape, tags.shape, V)
        if (tags >= V).any():
            raise DataError(
                f"a sample has tag {int(tags.max())}, but the head tells {V} tags: the labels are "
                "of another vocabulary"
            )
        top = top_tags(probabilities, self.top)
        confidence = probabilities.gather(1, top[:, :1])[:, 0].float().cpu()
        assert (confidence <= 1 + 1e-3).all(), "softmax probabilities, not logits"
        top = top.cpu()
        self.samples += len(tags)
        self.seen[top.flatten()] = True
        owned = (tags >= 0).sum(dim=1)
        rows = owned > 0
        columns = probabilities.index_select(1, self.measured.to(probabilities.device))
        scores = columns.float().cpu()[rows].t().contiguous()  # [b, M] -> [M, b]
        tags = tags[rows]
        guesses = _hits(self.frequent.expand(len(tags), -1), tags)
        hits = _hits(top[rows], tags)
        kept = _Block(scores, hits, guesses, confidence[rows], owned[rows], tags[tags >= 0])
        self.blocks.append(kept)

    def results(self) -> dict[str, float]:
        """All measures; raises DataError where no sample has a tag.

        precision@1: share of samples whose first tag is theirs. recall@k: |top k and own tags| /
        |own tags|, mean over samples; one with more than k tags cannot reach 1. mAP: the mean of
        `average_precision` over those `mAP_tags` of `tags` that are measured, among samples with
        tags; mAP[10-99] over those of such a training count, of any decade that has some.
        chance_*: the same of giving each sample the most frequent tags of the training, or, where
        that is better, random ones; for AP, of scoring each tag alike on all samples, which gives
        its share of them. random_mAP: what noise
        reaches, far above chance for rare tags; see `random_precision`. dead@k: tags in no sample's
        top k, of `vocabulary`; least_dead@k: how many have to be, with so few samples. ece: of
        `calibration`.
        """
        whole = self._joined()
        found = {
            "samples": float(len(whole.owned)),
            "untagged": float(self.samples - len(whole.owned)),
            "vocabulary": float(len(self.counts)),
            "tags": float(len(torch.unique(whole.tags))),
        }
        for prefix, hits in (("", whole.hits), ("chance_", whole.guesses)):
            found[f"{prefix}precision@1"] = hits[:, 0].double().mean().item()
            for k in self.ks:
                recall = hits[:, :k].sum(dim=1) / whole.owned.double()
                found[f"{prefix}recall@{k}"] = recall.mean().item()
        for measure, blind in self._blind(whole).items():
            found[f"chance_{measure}"] = max(blind, found[f"chance_{measure}"])
        found |= self._mean_precisions(whole) | self._dead()
        return found | {"ece": self.calibration().error}

    def _blind(self, whole: _Block) -> dict[str, float]:
        """What tags drawn at random reach: more than the most frequent, if these are of others."""
        V = len(self.counts)
        recalls = {f"recall@{k}": min(k, V) / V for k in self.ks}
        return {"precision@1": whole.owned.double().mean().item() / V, **recalls}

    def calibration(self) -> Calibration:
        """The first tag's probability against whether it is one of the sample's, in 15 bins."""
        whole = self._joined()
        return calibrate(whole.confidence, whole.hits[:, 0])

    def _joined(self) -> _Block:
        """All samples; their scores stay in the blocks."""
        if not any(len(block.owned) for block in self.blocks):
            raise DataError(
                f"none of the {self.samples} samples has a tag of the vocabulary: say where their "
                "tags are, eval.tags.NAME.tags=caption_words, say"
            )
        columns = [torch.cat(column) for column in list(zip(*self.blocks, strict=True))[1:]]
        return _Block(torch.empty(0), *columns)

    def _mean_precisions(self, whole: _Block) -> dict[str, float]:
        """mAP over all measured tags and by their training count, each with its number of tags."""
        samples = len(whole.owned)
        tags, precision, positives = self._average_precisions(whole)
        measures = {
            "mAP": precision,
            "chance_mAP": positives.double() / samples,
            "random_mAP": random_precision(positives, samples),
        }
        digits = torch.tensor([len(str(count)) for count in self.counts[tags].tolist()])
        groups = {"": digits > 0}
        groups |= {f"[{_decade(d)}]": digits == d for d in digits.unique().tolist()}
        found = {}
        for group, members in groups.items():
            if members.any():
                for name, values in measures.items():
                    found[f"{name}{group}"] = values[members].mean().item()
                found[f"mAP_tags{group}"] = float(members.sum())
        return found

    def _average_precisions(self, whole: _Block) -> tuple[Tensor, Tensor, Tensor]:
        """The measured tags that samples have, their AP, and how many have them: [T] each."""
        places = torch.full((len(self.counts),), -1)
        places[self.measured] = torch.arange(len(self.measured))
        places = places[whole.tags]
        samples = torch.arange(len(whole.owned)).repeat_interleave(whole.owned)
        order = places.argsort(stable=True)[int((places < 0).sum()) :]  # by measured tag
        present, sizes = places[order].unique_consecutive(return_counts=True)
        precision = []
        owners = samples[order].split(sizes.tolist())
        for place, own in zip(present.tolist(), owners, strict=True):
            scores = torch.cat([block.scores[place] for block in self.blocks])
            precision.append(average_precision(scores.numpy(), scores[own].numpy()))
        found = torch.tensor(precision, dtype=torch.float64)
        return self.measured[present], found, sizes

    def _dead(self) -> dict[str, float]:
        V, k = len(self.counts), max(self.ks)
        dead = float((~self.seen).sum())
        least = float(max(0, V - k * self.samples))
        return {f"dead@{k}": dead, f"dead_share@{k}": dead / V, f"least_dead@{k}": least}


def _hits(found: Tensor, tags: Tensor) -> Tensor:
    """[b, k] whether each found tag is among the sample's, [b, K] padded with -1."""
    return (found[:, :, None] == tags[:, None, :]).any(dim=2)


def _decade(digits: int) -> str:
    """The counts of so many digits: "<10", "10-99", "100-999", "1,000-9,999", ..."""
    return "<10" if digits == 1 else f"{10 ** (digits - 1):,}-{10**digits - 1:,}"


def average_views(probabilities: Tensor) -> Tensor:
    """The mean of the probabilities (not of the logits) over views: [B, views, V] -> [B, V]."""
    return probabilities.mean(dim=1)
