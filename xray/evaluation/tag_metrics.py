"""Metrics of a tag head on images and videos, each with its chance level.

Probabilities arrive in blocks [b, V]. Only what the metrics need is kept: hits among the top tags,
and the scores of the tags whose average precision is measured.

Ties: of a sample's tags with equal scores, the smaller id comes first. A vocabulary is ordered by
descending count, so constant scores predict the frequent tags, which is chance. A tag's samples
with equal scores are counted together, so that their order does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xray.errors import DataError

HELD = 2**28  # scores in memory for average precision: 1 GiB
BINS = 15  # of the calibration


def measured_tags(tags: Tensor, samples: int, held: int = HELD, seed: int = 0) -> Tensor:
    """Choose the tags whose average precision is measured: [M] ids, ascending.

    These are all tags of the samples or, if their scores are more than `held`, a random subset,
    whose mean AP is unbiased. tags: ids of the samples in any shape, -1 = none.
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
        """Compute the expected calibration error, the samples' mean gap (1706.04599)."""
        gap = (self.accuracy - self.confidence).abs()
        return ((gap * self.count).sum() / self.count.sum()).item()


def calibrate(confidence: Tensor, correct: Tensor, bins: int = BINS) -> Calibration:
    """Compare confidence [N] in [0, 1] with accuracy, from correct [N] bool."""
    inner = torch.linspace(0, 1, bins + 1)[1:-1]
    place = torch.bucketize(confidence.float(), inner)
    count = torch.bincount(place, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(place, values.double(), bins) / count.clamp(min=1)

    return Calibration(mean(confidence), mean(correct), count)


def average_precision(scores: np.ndarray, own: np.ndarray) -> float:
    """Average the precision at each positive's score: sum_n (R_n - R_{n-1}) P_n over the scores.

    scores: [N] of one tag. own: [P], the scores of its positives, which are among them.
    """
    above = len(scores) - np.searchsorted(np.sort(scores), own)
    hits = len(own) - np.searchsorted(np.sort(own), own)
    return float(np.mean(hits / above))


def random_precision(positives: Tensor, samples: int) -> Tensor:
    """Compute the expected average precision of a random order, [T] float64.

    With P of N positive, sum_k (1 + (k - 1) (P - 1) / (N - 1)) / k / N over the ranks k = 1..N.
    """
    harmonic = (1 / torch.arange(1, samples + 1, dtype=torch.float64)).sum()
    others = (positives.double() - 1) / max(1, samples - 1)  # share of the other samples
    return (harmonic + others * (samples - harmonic)) / samples


def top_tags(scores: Tensor, k: int) -> Tensor:
    """Find the k best tags of each sample, best first, ties by id: [b, V] -> [b, k].

    Raises DataError for scores that are not finite.
    """
    values, ids = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if not torch.isfinite(values).all():  # NaN comes first in topk
        raise DataError("the tag scores of a sample are not finite: look for NaN in the weights")
    ids, least = ids[:, :k], values[:, k - 1 : k]
    tied = (values[:, k:] == least).any(dim=1)  # topk takes any of the tied tags
    for i in tied.nonzero().flatten().tolist():
        above, equal = scores[i] > least[i], scores[i] == least[i]
        ids[i] = torch.cat([above.nonzero(), equal.nonzero()])[:k, 0]
    ids = ids.sort(dim=1).values
    return ids.gather(1, scores.gather(1, ids).argsort(dim=1, descending=True, stable=True))


class _Block(NamedTuple):
    """Data of b samples with tags."""

    scores: Tensor  # [M, b] of the measured tags
    hits: Tensor  # [b, k] bool: a top tag is one of the sample's
    guesses: Tensor  # [b, k] the same for the most frequent tags
    confidence: Tensor  # [b] of the top tag
    owned: Tensor  # [b] number of tags of each sample
    tags: Tensor  # [sum of owned] their ids


class TagMetrics:
    """Metrics of a tag head over samples in blocks of any size.

    counts: [V], number of training samples with each tag. measured: [M] distinct ids, the tags of
    mAP; if empty there is no mAP. ks: the k of recall. A tag is dead if it is in no sample's top
    max(ks). A sample without tags counts for dead tags only.
    """

    def __init__(self, counts: Tensor, measured: Tensor, ks: Sequence[int] = (1, 5, 10)) -> None:
        self.counts, self.measured, self.ks = counts, measured, ks
        self.top = min(max(ks), len(counts))
        self.frequent = counts.argsort(descending=True, stable=True)[: self.top]
        self.seen = torch.zeros(len(counts), dtype=torch.bool)
        self.samples = 0
        self.blocks: list[_Block] = []

    def add(self, probabilities: Tensor, tags: Tensor) -> None:
        """Add b samples; raises DataError for scores that are not finite and for ids >= V.

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
        """Compute all metrics; raises DataError if no sample has a tag.

        precision@1: share of samples whose top tag is one of theirs. recall@k: |top k and own tags|
        / |own tags|, mean over samples; below 1 for a sample with more than k tags. mAP: the mean
        of `average_precision` over the `mAP_tags` measured tags, among samples with tags;
        mAP[10-99]: over the tags with such a training count, for each decade that has tags.
        chance_*: the same for the most frequent training tags or, if that is better, random tags;
        for AP, for constant scores of each tag, which gives its share of the samples. random_mAP:
        the score of noise, far above chance for rare tags (`random_precision`). dead@k: tags in no
        sample's top k, out of `vocabulary`; least_dead@k: the smallest possible number for so few
        samples. ece: of `calibration`.
        """
        whole = self._joined()
        measures = {
            "samples": float(len(whole.owned)),
            "untagged": float(self.samples - len(whole.owned)),
            "vocabulary": float(len(self.counts)),
            "tags": float(len(torch.unique(whole.tags))),
        }
        for prefix, hits in (("", whole.hits), ("chance_", whole.guesses)):
            measures[f"{prefix}precision@1"] = hits[:, 0].double().mean().item()
            for k in self.ks:
                recall = hits[:, :k].sum(dim=1) / whole.owned.double()
                measures[f"{prefix}recall@{k}"] = recall.mean().item()
        V = len(self.counts)
        at_random = {f"recall@{k}": min(k, V) / V for k in self.ks}
        at_random["precision@1"] = whole.owned.double().mean().item() / V
        for name, value in at_random.items():  # may beat training's most frequent tags
            measures[f"chance_{name}"] = max(value, measures[f"chance_{name}"])
        measures |= self._mean_precisions(whole) | self._dead()
        return measures | {"ece": self.calibration().error}

    def calibration(self) -> Calibration:
        """Compare the top tag's probability with its accuracy, in 15 bins."""
        whole = self._joined()
        return calibrate(whole.confidence, whole.hits[:, 0])

    def _joined(self) -> _Block:
        """Join all blocks, without the scores; raises DataError if no sample has a tag."""
        if not any(len(block.owned) for block in self.blocks):
            raise DataError(f"none of the {self.samples} samples has a tag of the vocabulary")
        columns = [torch.cat(column) for column in list(zip(*self.blocks, strict=True))[1:]]
        return _Block(torch.empty(0), *columns)

    def _mean_precisions(self, whole: _Block) -> dict[str, float]:
        """Compute mAP over all measured tags and by training count, with the numbers of tags."""
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
        means = {}
        for group, members in groups.items():
            if members.any():
                for name, values in measures.items():
                    means[f"{name}{group}"] = values[members].mean().item()
                means[f"mAP_tags{group}"] = float(members.sum())
        return means

    def _average_precisions(self, whole: _Block) -> tuple[Tensor, Tensor, Tensor]:
        """Return the measured tags that samples have, their AP and number of samples: [T] each."""
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
        return self.measured[present], torch.tensor(precision, dtype=torch.float64), sizes

    def _dead(self) -> dict[str, float]:
        V, k = len(self.counts), max(self.ks)
        dead = float((~self.seen).sum())
        least = float(max(0, V - k * self.samples))
        return {f"dead@{k}": dead, f"dead_share@{k}": dead / V, f"least_dead@{k}": least}


def _hits(top: Tensor, tags: Tensor) -> Tensor:
    """Mark the top tags [b, k] that are among the sample's tags [b, K], padded with -1: [b, k]."""
    return (top[:, :, None] == tags[:, None, :]).any(dim=2)


def _decade(digits: int) -> str:
    """Name the counts with so many digits: "<10", "10-99", "100-999", "1,000-9,999", ..."""
    return "<10" if digits == 1 else f"{10 ** (digits - 1):,}-{10**digits - 1:,}"
