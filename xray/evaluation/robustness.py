"""Robustness: accuracy of a zero-shot and a linear-probe head on corrupted and attacked images."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.shards.source import ChosenSlots
from xray.config import DataConfig
from xray.config.schedule import value_at
from xray.evaluation.attacks import Logits, apgd, cross_entropy, dlr, fgsm, pgd, square
from xray.evaluation.confidence import share
from xray.evaluation.corruption_folders import CorruptionFolders
from xray.evaluation.corruptions import corrupt, stretch
from xray.evaluation.datasets import Sets
from xray.evaluation.domain_shift import check_shift, shifted
from xray.evaluation.feature_extraction import Change, batches_of
from xray.evaluation.heads import Head, head_classes, open_heads
from xray.evaluation.suites.robustness import RobustnessConfig

log = logging.getLogger("xray")

Scores = dict[str, float]


def robustness(sets: Sets, config: RobustnessConfig) -> Scores:
    """Measure accuracy of each head that has data: clean, corrupted, reshaped, attacked, shifted.

    Measures are HEAD/CHANGE/STRENGTH: `zero_shot/gaussian_noise/3`, `linear_probe/pgd/1` (of 255).
    """
    heads = list(open_heads(sets))
    folders = CorruptionFolders.open(config, sets, heads) if config.corrupted else None
    measures: Scores = {}
    hits: dict[str, dict[str, Tensor]] = {}
    for head in heads:
        measures[f"{head.name}/samples"] = float(len(head.labels))
        measures[f"{head.name}/chance"] = head.chance
        measures[f"{head.name}/attacked_samples"] = 0.0
        features = sets.features(head.source, head.space)
        hits[head.name] = {"clean": head.right(features, head.labels)}
    for source in {id(head.source): head.source for head in heads}.values():
        own = [head for head in heads if head.source is source]
        for name, change, data in _changes(config, sets):
            seed = zlib.crc32(name.encode()) + config.seed
            views = replace(sets.views, change=change, seed=seed)
            spaces = sets.encode(replace(source, name=f"{source.name} {name}"), views, data)
            for head in own:
                hits[head.name][name] = head.right(spaces[head.space], head.labels)
    for head in heads:
        measures |= _scores(head.name, hits[head.name], config)
        measures |= _attacked(head, config, sets)
        measures |= shifted(head, config, sets)
    return measures | (folders.measure(sets, heads, measures) if folders else {})


def check_robustness(sets: Sets, config: RobustnessConfig) -> None:
    """Raise the errors of the heads' data and of the stored sets, before hours of work."""
    heads = head_classes(sets)
    for head in heads:
        check_shift(head, config, sets)
    if config.corrupted:
        CorruptionFolders.open(config, sets, heads).check(heads)


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


def _attacked(head: Head, config: RobustnessConfig, sets: Sets) -> Scores:
    """Measure accuracy under each attack and all of them at each eps, on some samples, one view."""
    names = [name for name in config.attacks if name != "apgd_dlr" or head.classes > 2]
    if len(names) < len(config.attacks):
        log.warning("%s: apgd_dlr is left out: its loss needs three classes, not two", head.name)
    if not names:
        return {}
    encoder = sets.vision
    samples = len(head.source)
    chosen = np.linspace(0, samples - 1, min(config.attacked, samples)).round().astype(np.int64)
    slots = ChosenSlots(head.source, np.unique(chosen))
    source = replace(head.source, slots=slots, name=f"{head.source.name} attacked")
    labels, device = head.labels[torch.from_numpy(slots.numbers)], encoder.normalize.mean.device

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
        for name, attack in _attacks(names, config, logits, generator):
            hits.setdefault(name, []).append(_right(logits, attack(x, truth), truth))
    rows = {name: torch.cat(parts) for name, parts in hits.items()}
    for eps in config.eps:  # correct without a change and under every attack
        tried = [rows[name] for name in rows if name.endswith(f"/{eps:g}")]
        rows[f"adversarial/{eps:g}"] = torch.stack([rows["attacked_clean"], *tried]).all(dim=0)
    scores = {f"{head.name}/attacked_samples": float(len(labels))}
    for name, own in rows.items():
        scores |= share(f"{head.name}/{name}", own)
    return scores


def _attacks(
    names: Sequence[str], config: RobustnessConfig, logits: Logits, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Yield (ATTACK/EPS, attack), where an attack maps images and labels to images."""
    adaptive = partial(apgd, steps=config.apgd_steps, generator=generator)
    makers: dict[str, Callable[..., Tensor]] = {
        "fgsm": fgsm,
        "pgd": partial(pgd, steps=config.steps, generator=generator),
        "square": partial(square, queries=config.queries, generator=generator),
        "apgd_ce": partial(adaptive, loss=cross_entropy),
        "apgd_dlr": partial(adaptive, loss=dlr),
    }
    for name in names:
        for eps in config.eps:
            yield f"{name}/{eps:g}", partial(makers[name], logits, eps=eps / 255)


@torch.no_grad()
def _right(logits: Logits, x: Tensor, labels: Tensor) -> Tensor:
    return (logits(x).argmax(dim=1) == labels).cpu()
