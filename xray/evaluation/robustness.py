"""Robustness: accuracy of a zero-shot and a linear-probe head on corrupted and attacked images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.artifacts.encoders import Encoder
from xray.artifacts.offers import VISION
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.errors import ConfigError
from xray.evaluation.attacks import Logits, fgsm, pgd, square
from xray.evaluation.class_labels import Classes, guess
from xray.evaluation.confidence import share
from xray.evaluation.corruptions import CORRUPTIONS, corrupt, stretch
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Change, Features, batches_of, labels_of
from xray.evaluation.linear_probe import LINEAR_PROBE, SOLVERS
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.evaluation.zero_shot import ZERO_SHOT, NamedClasses
from xray.reports.figures import subplots

Scores = dict[str, float]
ATTACKS = ("fgsm", "pgd", "square")
SHIFTS = ("resolution", "aspect")
TITLES = {
    "corrupted": "mean of corruptions",
    "attacked_clean": "those attacked, clean",
    "shift": "elsewhere",
}


@dataclass
class RobustnessConfig(SuiteConfig):
    """Changes to the labelled samples of eval.zero_shot and eval.linear_probe."""

    optional_sets = ("shift",)

    corruptions: list[str] = field(default_factory=lambda: list(CORRUPTIONS))
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    # factors of the artifact's resolution, and of the width relative to the height
    resolutions: list[float] = field(default_factory=lambda: [0.5, 0.75, 1.5])
    aspects: list[float] = field(default_factory=lambda: [0.5, 2.0])
    attacks: list[str] = field(default_factory=lambda: list(ATTACKS))
    eps: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # /255, L-infinity
    steps: int = 5  # of pgd
    queries: int = 100  # of the black-box attack
    attacked: int = 200  # samples that are attacked, evenly spaced
    shift: str = ""  # labelled samples of the same classes from another source
    seed: int = 0

    def validate(self, key: str) -> None:
        for option, known in (("corruptions", CORRUPTIONS), ("attacks", ATTACKS)):
            for name in getattr(self, option):
                if name not in known:
                    there = f"there are {', '.join(known)}"
                    raise ConfigError(f"{key}.{option} names {name!r}: {there}")
        if not self.severities or any(s not in (1, 2, 3, 4, 5) for s in self.severities):
            raise ConfigError(f"{key}.severities={self.severities} must be in 1 to 5")
        if any(value <= 0 for value in (*self.resolutions, *self.aspects, *self.eps)):
            raise ConfigError(f"{key}: resolutions, aspects and eps must be above 0")
        if min(self.steps, self.queries, self.attacked) < 1:
            raise ConfigError(f"{key}: steps, queries and attacked must be at least 1")


@dataclass
class Head:
    """A classifier on the features of one space, with its labelled samples.

    number: numbers another source's labels by this head's classes. predict: features -> [N]
    classes. logits: [B, D] -> [B, C], differentiable.
    """

    name: str
    space: str
    source: Source
    labels: Tensor
    chance: float
    number: Callable[[Tensor, Source], Tensor]
    predict: Callable[[Features], Tensor]
    logits: Callable[[Tensor], Tensor]


def robustness(sets: Sets, config: RobustnessConfig) -> Scores:
    """Measure accuracy of each head that has data: clean, corrupted, reshaped, attacked, shifted.

    Measures are HEAD/CHANGE/STRENGTH: `zero_shot/gaussian_noise/3`, `linear_probe/pgd/1` (of 255).
    """
    heads = list(_heads(sets))
    if not heads:
        raise ConfigError(
            f"{sets.what}: robustness is measured with a linear probe, set eval.linear_probe.train "
            "and .test (a zero-shot head needs a joint space)"
        )
    if config.shift:  # fail on unknown labels before hours of work
        for head in heads:
            source = sets.open("robustness.shift", config.shift, head.source.modality)
            head.number(labels_of(source), source)
    measures: Scores = {}
    hits: dict[str, dict[str, Tensor]] = {}
    for head in heads:
        measures[f"{head.name}/samples"] = float(len(head.labels))
        measures[f"{head.name}/chance"] = head.chance
        measures[f"{head.name}/attacked_samples"] = 0.0
        features = sets.features(head.source, head.space)
        hits[head.name] = {"clean": head.predict(features) == head.labels}
    for source in {id(head.source): head.source for head in heads}.values():
        own = [head for head in heads if head.source is source]
        for name, change, data in _changes(config, sets):
            seed = zlib.crc32(name.encode()) + config.seed
            views = replace(sets.views, change=change, seed=seed)
            spaces = sets.encode(replace(source, name=f"{source.name} {name}"), views, data)
            for head in own:
                hits[head.name][name] = head.predict(spaces[head.space]) == head.labels
    for head in heads:
        measures |= _scores(head.name, hits[head.name], config)
        measures |= _attacked(head, config, sets)
        measures |= _shifted(head, config, sets, measures[f"{head.name}/clean"])
    return measures


def _heads(sets: Sets) -> Iterator[Head]:
    configured, encoder = sets.config.configured(), sets.vision
    if ZERO_SHOT.name in configured and isinstance(encoder, Encoder):
        classes = NamedClasses.open(sets)
        weights = classes.weights(sets)
        labels = sets.features(classes.source, "joint").labels
        scale = float(encoder.logit_scale.detach())
        yield Head(
            "zero_shot", "joint", classes.source, classes.number(labels, classes.source),
            1 / len(classes.names), classes.number,
            lambda features: (features.rows @ weights.t()).argmax(dim=1),
            lambda x: scale * x @ weights.to(x).t(),
        )  # fmt: skip
    if LINEAR_PROBE.name in configured:
        config = sets.config.of(LINEAR_PROBE)
        train, test = sets.probe("linear_probe", config)
        head = SOLVERS[config.solver](train.views, train.labels)
        sources = sets.labelled("linear_probe", config)
        places = Classes.of(sets.features(sources[0]).labels, sources[0]).places
        yield Head(
            "linear_probe", "backbone", sources[1], test.labels,
            guess(train.labels, test.labels), places,
            lambda features: head.predict(features.views), head.logits,
        )  # fmt: skip


def _changes(
    config: RobustnessConfig, sets: Sets
) -> Iterator[tuple[str, Change | None, DataConfig]]:
    """Yield (name, change, data settings) of every changed data set to extract features of."""
    data = sets.data
    for kind in config.corruptions:
        for severity in config.severities:
            yield f"{kind}/{severity}", partial(corrupt, kind, severity), data
    own, patch = value_at(data.resolution, 1.0), max(sets.vision.vision.patch_size)
    sizes = {max(1, round(factor * own / patch)) * patch for factor in config.resolutions}
    for size in sorted(sizes - {own}):
        yield f"resolution/{size}", None, replace(data, resolution=size)
    for ratio in config.aspects:
        yield f"aspect/{ratio:g}", partial(stretch, ratio), data


def _scores(head: str, hits: dict[str, Tensor], config: RobustnessConfig) -> Scores:
    """Measure accuracy on each changed data set, and the means of each corruption and of all."""
    scores: Scores = {}
    for name, own in hits.items():
        scores |= share(f"{head}/{name}", own)
    corrupted = []
    for kind in config.corruptions:
        rows = torch.stack([hits[f"{kind}/{severity}"] for severity in config.severities])
        scores |= _mean(f"{head}/{kind}", rows)
        corrupted.append(rows)
    return scores | (_mean(f"{head}/corrupted", torch.cat(corrupted)) if corrupted else {})


def _mean(name: str, hits: Tensor) -> Scores:
    """Average hits [changes, N]; the bootstrap draws a sample with all its changes."""
    return share(name, hits.sum(dim=0), torch.full((hits.shape[1],), len(hits)))


def _shifted(head: Head, config: RobustnessConfig, sets: Sets, clean: float) -> Scores:
    """Measure accuracy on a data set of the same classes from another source, and the loss."""
    if not config.shift:
        return {}
    source = sets.open("robustness.shift", config.shift, head.source.modality)
    features = sets.features(source, head.space)
    labels = head.number(features.labels, source)
    scores = share(f"{head.name}/shift", head.predict(features) == labels)
    scores[f"{head.name}/shift_gap"] = clean - scores[f"{head.name}/shift"]
    return scores | {f"{head.name}/shift_samples": float(len(labels))}


class SomeSlots:
    """Slots of evenly spaced samples of a source; numbers: ascending numbers of the samples."""

    digest = "chosen"

    def __init__(self, source: Source, samples: int) -> None:
        chosen = np.unique(np.linspace(0, len(source) - 1, min(samples, len(source))).round())
        self.numbers = torch.from_numpy(chosen).long()
        shards, members = np.array(list(source.places()))[self.numbers].T
        self.members = [members[shards == shard] for shard in range(len(source.manifest))]
        self.counts = np.array([len(own) for own in self.members])

    def of(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        return self.members[shard], np.zeros_like(self.members[shard])

    def texts(self, shard: int, slot: int) -> np.ndarray | None:
        return None


def _attacked(head: Head, config: RobustnessConfig, sets: Sets) -> Scores:
    """Measure accuracy under each attack at each eps, on some of the samples, one view each."""
    if not config.attacks:
        return {}
    encoder = sets.vision
    slots = SomeSlots(head.source, config.attacked)
    source = replace(head.source, slots=slots, name=f"{head.source.name} attacked")
    labels, device = head.labels[slots.numbers], encoder.normalize.mean.device

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
    scores = {f"{head.name}/attacked_samples": float(len(labels))}
    for name, parts in hits.items():
        scores |= share(f"{head.name}/{name}", torch.cat(parts))
    return scores


def _attacks(
    config: RobustnessConfig, logits: Logits, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Yield (ATTACK/EPS, attack), where an attack maps images and labels to images."""
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


def _changed(measures: Measures) -> Iterator[tuple[str, str, str, float]]:
    """Yield (head, change, strength, accuracy) of every changed data set."""
    for key, value in measures.items():
        parts = key.split("/")
        if len(parts) == 3 and not parts[2].endswith(("_low", "_high")):
            yield parts[0], parts[1], parts[2], value


def _rows(measures: Measures) -> Iterator[Row]:
    """Make the rows of each head; a corruption has one, the mean over its severities."""
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        prefix = f"{head}/"
        own = {key.removeprefix(prefix).replace("/", " "): v for key, v in measures.items()}
        steps = [(change, strength) for h, change, strength, _ in _changed(measures) if h == head]
        for key, over in _listed(own, steps):
            title = TITLES.get(key, key.replace("_", " "))
            title += "/255" if key.startswith(ATTACKS) else ""
            yield share_row(f"{head.replace('_', '-')}, {title}", own, key, own["chance"], over)


def _listed(own: Measures, steps: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """List the measures of a head that have a row, each with its number of samples."""
    every, some = f"{own['samples']:.0f} samples", f"{own['attacked_samples']:.0f} samples"
    corruptions = dict.fromkeys(c for c, _ in steps if c not in SHIFTS + ATTACKS)
    rows = [(key, every) for key in ("clean", *corruptions, "corrupted")]
    rows += [(f"{change} {strength}", every) for change, strength in steps if change in SHIFTS]
    rows.append(("attacked_clean", some))
    rows += [(f"{change} {strength}", some) for change, strength in steps if change in ATTACKS]
    rows.append(("shift", f"{own.get('shift_samples', 0):.0f} samples"))
    return [row for row in rows if row[0] in own]


def _plot(measures: Measures, path: Path) -> None:
    """Plot each head's accuracy over the severity of corruptions and the eps of attacks."""
    steps = list(_changed(measures))
    panels = []
    for head in dict.fromkeys(key.split("/")[0] for key in measures):
        own = [(c, s, 100 * value) for h, c, s, value in steps if h == head]
        corrupted = [row for row in own if row[0] not in SHIFTS + ATTACKS]
        attacked = [row for row in own if row[0] in ATTACKS]
        title = head.replace("_", "-")
        severity, eps = "severity (0 = clean)", "eps of 255 (0 = clean)"
        panels.append((f"{title}: corruptions", head, "clean", severity, corrupted))
        panels.append((f"{title}: attacks", head, "attacked_clean", eps, attacked))
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        return
    figure, axes = subplots(len(panels), (4.5 * len(panels), 3.6))
    for axis, (title, head, clean, across, rows) in zip(axes, panels, strict=True):
        _curves(axis, rows, 100 * measures[f"{head}/{clean}"], 100 * measures[f"{head}/chance"])
        axis.set(title=title, xlabel=across)
    figure.savefig(path)


def _curves(axis: Any, rows: Sequence[tuple[str, str, float]], clean: float, chance: float) -> None:
    for change in dict.fromkeys(change for change, *_ in rows):
        points = sorted((float(s), value) for c, s, value in rows if c == change)
        label = change.replace("_", " ")
        axis.plot(*zip((0.0, clean), *points, strict=True), marker="o", ms=3, lw=1.2, label=label)
    axis.axhline(chance, color="gray", lw=0.8, ls=":", label="chance")
    ticks = [0.0, *sorted({float(strength) for _, strength, _ in rows})]
    axis.set(ylabel="top-1 %", ylim=(0, 105), xticks=ticks)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7)


ROBUSTNESS = Suite(
    "robustness",
    RobustnessConfig,
    needs=frozenset({VISION}),
    run=robustness,
    rows=_rows,
    title=titled("robustness"),
    reads=(ZERO_SHOT, LINEAR_PROBE),
    plot=_plot,
)
