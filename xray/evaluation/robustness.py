"""Accuracy of a zero-shot and of a linear-probe head on changed pictures."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.artifacts.encoders import Encoder, class_weights
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import ConfigError
from xray.evaluation.attacks import Logits, fgsm, pgd, square
from xray.evaluation.class_labels import Classes, guess
from xray.evaluation.confidence import share
from xray.evaluation.config import RobustnessConfig
from xray.evaluation.corruptions import aspect, corruption
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Change, Features, batches_of, labels_of
from xray.evaluation.linear_probe import fit_head

Measures = dict[str, float]


@dataclass
class Head:
    """A classifier on features of one space, with its own labelled samples.

    places: labels of another source as this head's classes. predict: features -> [N] classes.
    logits: [B, D] -> [B, C], with a gradient.
    """

    name: str
    space: str
    source: Source
    labels: Tensor
    chance: float
    places: Callable[[Tensor, Source], Tensor]
    predict: Callable[[Features], Tensor]
    logits: Callable[[Tensor], Tensor]


def robustness(sets: Sets) -> Measures:
    """Accuracy of each head that has data: clean, corrupted, reshaped, attacked, elsewhere.

    Measures are HEAD/CHANGE/STRENGTH: `zero_shot/gaussian_noise/3`, `linear_probe/pgd/1` (of 255).
    """
    heads = list(_heads(sets))
    if not heads:
        raise ConfigError(
            f"{sets.what}: corruptions and attacks are of its linear probe, set "
            "eval.linear_probe.train and .test (zero-shot is a clip artifact's)"
        )
    if sets.config.robustness.shift:  # labels that a head does not know are found before hours
        for head in heads:
            elsewhere = _elsewhere(head, sets)
            head.places(labels_of(elsewhere), elsewhere)
    found: Measures = {}
    hits: dict[str, dict[str, Tensor]] = {}
    for head in heads:
        found[f"{head.name}/samples"] = float(len(head.labels))
        found[f"{head.name}/chance"] = head.chance
        found[f"{head.name}/attacked_samples"] = 0.0
        hits[head.name] = {"clean": _hits(head, sets.features(head.source, head.space))}
    for source in {id(head.source): head.source for head in heads}.values():
        own = [head for head in heads if head.source is source]
        for name, change, data in _changes(sets):
            seed = zlib.crc32(name.encode()) + sets.config.robustness.seed
            look = replace(sets.look, change=change, seed=seed)
            spaces = sets.encode(replace(source, name=f"{source.name} {name}"), look, data)
            for head in own:
                hits[head.name][name] = _hits(head, spaces[head.space])
    for head in heads:
        found |= _scores(head.name, hits[head.name], sets.config.robustness)
        found |= _attacked(head, sets)
        found |= _shifted(head, sets, found[f"{head.name}/clean"])
    return found


def _heads(sets: Sets) -> Iterator[Head]:
    given, encoder = sets.config.configured(), sets.vision
    if "zero_shot" in given and isinstance(encoder, Encoder):
        names, source = sets.class_names()
        weights = class_weights(sets.texts, names, sets.config.zero_shot.templates)
        labels = sets.features(source, "joint").labels
        labels = sets.zero_shot_labels(labels, source, names)
        scale = float(encoder.logit_scale.detach())
        yield Head(
            "zero_shot", "joint", source, labels, 1 / len(names),
            lambda found, other: sets.zero_shot_labels(found, other, names),
            lambda found: (found.rows @ weights.t()).argmax(dim=1),
            lambda x: scale * x @ weights.to(x).t(),
        )  # fmt: skip
    if "linear_probe" in given:
        config = sets.config.linear_probe
        train, test = sets.probe("linear_probe", config)
        fitted = fit_head(train.views, train.labels, config.solver)
        sources = sets.labelled("linear_probe", config)
        classes = Classes.of(sets.features(sources[0]).labels, sources[0])
        yield Head(
            "linear_probe", "backbone", sources[1], test.labels,
            guess(train.labels, test.labels), classes.places,
            lambda found: fitted.predict(found.views), fitted.logits,
        )  # fmt: skip


def _changes(sets: Sets) -> Iterator[tuple[str, Change | None, DataConfig]]:
    """(name, change, how samples are read) of everything that features are extracted for."""
    config, data = sets.config.robustness, sets.data
    for kind in config.corruptions:
        for severity in config.severities:
            yield f"{kind}/{severity}", corruption(kind, severity), data
    own, patch = value_at(data.resolution, 1.0), max(sets.vision.vision.patch_size)
    sizes = {max(1, round(factor * own / patch)) * patch for factor in config.resolutions}
    for size in sorted(sizes - {own}):
        yield f"resolution/{size}", None, replace(data, resolution=size)
    for ratio in config.aspects:
        yield f"aspect/{ratio:g}", aspect(ratio), data


def _hits(head: Head, found: Features) -> Tensor:
    return head.predict(found) == head.labels


def _scores(head: str, hits: dict[str, Tensor], config: RobustnessConfig) -> Measures:
    """Accuracy on each changed set, and the mean of each corruption and of all of them."""
    found: Measures = {}
    for name, own in hits.items():
        found |= share(f"{head}/{name}", own)
    corrupted = []
    for kind in config.corruptions:
        rows = torch.stack([hits[f"{kind}/{severity}"] for severity in config.severities])
        found |= _mean(f"{head}/{kind}", rows)
        corrupted.append(rows)
    return found | (_mean(f"{head}/corrupted", torch.cat(corrupted)) if corrupted else {})


def _mean(name: str, hits: Tensor) -> Measures:
    """Of [changes, N]: a sample is drawn with all its changes."""
    return share(name, hits.sum(dim=0), torch.full((hits.shape[1],), len(hits)))


def _elsewhere(head: Head, sets: Sets) -> Source:
    return sets.open("robustness.shift", sets.config.robustness.shift, head.source.modality)


def _shifted(head: Head, sets: Sets, clean: float) -> Measures:
    """Accuracy on a set from elsewhere of the same classes, and what is lost."""
    if not sets.config.robustness.shift:
        return {}
    source = _elsewhere(head, sets)
    found = sets.features(source, head.space)
    labels = head.places(found.labels, source)
    scores = share(f"{head.name}/shift", head.predict(found) == labels)
    gap = clean - scores[f"{head.name}/shift"]
    return scores | {
        f"{head.name}/shift_gap": gap,
        f"{head.name}/shift_samples": float(len(labels)),
    }


@dataclass
class Chosen:
    """Slots of some samples of a source, evenly spaced over it."""

    members: dict[int, np.ndarray]
    counts: np.ndarray
    digest: str = "chosen"

    @classmethod
    def of_source(cls, source: Source, samples: int) -> tuple[Chosen, Tensor]:
        """The slots and the numbers of the samples, in order."""
        chosen = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).round())
        places = list(source.places())
        found: dict[int, list[int]] = {}
        for number in chosen.astype(int).tolist():
            shard, member = places[number]
            found.setdefault(shard, []).append(member)
        members = {shard: np.array(own) for shard, own in found.items()}
        counts = np.array([len(found.get(shard, ())) for shard in range(len(source.manifest))])
        return cls(members, counts), torch.from_numpy(chosen).long()

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        own = self.members.get(shard, np.empty(0, np.int64))
        return own, np.zeros(len(own), np.int64)

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        return None


def _attacked(head: Head, sets: Sets) -> Measures:
    """Accuracy under each attack at each eps, on some of the samples, each looked at once."""
    config, encoder = sets.config.robustness, sets.vision
    if not config.attacks:
        return {}
    slots, rows = Chosen.of_source(head.source, config.attacked)
    source = replace(head.source, slots=slots, name=f"{head.source.name} attacked")
    labels, device = head.labels[rows], encoder.normalize.mean.device

    def logits(x: Tensor) -> Tensor:
        cls = encoder.cls(255 * x)
        joint = head.space == "joint"
        rows = sets.joint.joint(cls) if joint else F.normalize(cls.float(), dim=-1)
        return head.logits(rows).to(device)  # a probe's weights are on the CPU

    hits: dict[str, list[Tensor]] = {}
    generator, done = torch.Generator().manual_seed(config.seed), 0
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for pixels, _ in batches_of(source, sets.data, sets.config.batch_size):
        x = pixels[:, 0].to(device).float() / 255
        truth = labels[done : done + len(x)].to(device)
        done += len(x)
        hits.setdefault("attacked_clean", []).append(_right(logits, x, truth))
        for name, attack in _attacks(config, logits, generator):
            hits.setdefault(name, []).append(_right(logits, attack(x, truth), truth))
    found = {f"{head.name}/attacked_samples": float(len(labels))}
    for name, parts in hits.items():
        found |= share(f"{head.name}/{name}", torch.cat(parts))
    return found


def _attacks(
    config: RobustnessConfig, logits: Logits, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """(ATTACK/EPS, pictures and labels -> pictures)."""
    makers: dict[str, Callable[..., Tensor]] = {
        "fgsm": fgsm,
        "pgd": partial(pgd, steps=config.steps, generator=generator),
        "square": partial(square, queries=config.queries, generator=generator),
    }
    for name in config.attacks:
        for eps in config.eps:
            yield f"{name}/{eps:g}", partial(makers[name], logits, eps=eps / 255)


@torch.no_grad()
def _right(logits: Logits, x: Tensor, labels: Tensor) -> Tensor:
    return (logits(x).argmax(dim=1) == labels).cpu()
