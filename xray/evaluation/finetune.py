"""Supervised fine-tuning of the backbone on labels: MAE's recipe (2111.06377), the fair judge of a
first stage whose features are not linear."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source
from data_pipelines.stream.loader import Fields, WholeDataset, iterate_batches
from xray.artifacts.encoders import VisionEncoder
from xray.config import DataConfig, ModelConfig, OptimConfig, TowerOptim
from xray.config.schedule import largest
from xray.evaluation.class_labels import Classes, guess
from xray.evaluation.confidence import share
from xray.evaluation.config import FinetuneConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import batches_of, labels_of, stacked
from xray.models.backbone import VisionBackbone
from xray.models.heads import Normalize
from xray.models.mixup import mix
from xray.models.token_reduction import KeepRate
from xray.models.weight_loading import load_adapted
from xray.optim import lr_at, make_optimizer, parameter_groups, set_lr
from xray.progress import progress_of


class Classifier(nn.Module):
    """A backbone at its artifact's keep rate, and a linear layer on its CLS features."""

    def __init__(self, encoder: VisionEncoder, classes: int, drop_path: float) -> None:
        super().__init__()
        config = encoder.artifact.manifest["config"]
        model = ModelConfig(**{**config["model"], "pretrained": "", "drop_path": drop_path})
        data = config["data"]
        vision = VisionBackbone(model, largest(data["resolution"]), largest(data["frames"]))
        load_adapted(vision, encoder.vision.state_dict(), str(encoder.artifact.path))
        self.towers = nn.ModuleDict({"vision": vision})
        self.head = nn.Linear(vision.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: the first step is the data's
        nn.init.zeros_(self.head.bias)
        self.normalize = Normalize(data["mean"], data["std"])
        self.keep_rate: KeepRate = encoder.keep_rate

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised [B, T, 3, H, W] -> logits [B, C]."""
        return self.head(self.towers["vision"](pixels, self.keep_rate).cls.float())


class _Training(WholeDataset):
    """Samples by (epoch, number), augmented by draws that follow from both and the seed."""

    def __init__(
        self, source: Source, labels: Tensor, data: DataConfig, config: FinetuneConfig
    ) -> None:
        names = ("crop_scale", "flip", "rand_augment")
        augmented = dataclasses.replace(data, **{name: getattr(config, name) for name in names})
        super().__init__(source, lambda s, rng: {"pixels": load_pixels(s, augmented, rng)}, data)
        self.labels, self.seed = labels, config.seed

    def __getitem__(self, item: tuple[int, int]) -> Fields | str:
        epoch, number = item
        found = self.load(number, np.random.default_rng([self.seed, epoch, number]))
        return found if isinstance(found, str) else {**found, "label": self.labels[number]}


def finetune(sets: Sets) -> dict[str, float]:
    """Top-1 on test after training: AdamW, layer-wise lr decay, drop path, label smoothing.

    One process, seeded: the same numbers again on the same machine and threads.
    """
    config = sets.config.finetune
    source, test = sets.labelled("finetune", config)
    given = labels_of(source)
    classes = Classes.of(given, source)
    labels, truth = classes.places(given, source), classes.places(labels_of(test), test)
    device = sets.vision.normalize.mean.device
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Classifier(sets.vision, len(classes.numbers), config.drop_path).to(device)
        training = _Training(source, labels, sets.data, config)
        loss = _train(model, training, config, sets.data.workers, device)
    hits = _predict(model, test, sets, device) == truth
    found = share("top1", hits) | {"chance_top1": guess(labels, truth)}
    counts = {"samples": float(len(truth)), "train_samples": float(len(labels))}
    return found | counts | {"train_loss": loss}


def _train(
    model: Classifier, training: _Training, config: FinetuneConfig, workers: int, device: Any
) -> float:
    """All epochs; returns the last one's mean loss."""
    tower = TowerOptim(layer_decay=config.layer_decay)
    optim = OptimConfig(
        base_lr=config.base_lr, warmup=config.warmup, weight_decay=config.weight_decay,
        betas=[0.9, 0.999], vision=tower,
    )  # fmt: skip
    optimizer = make_optimizer(parameter_groups(model, optim), optim)
    order = _order(len(training), config)
    batches = iterate_batches(training, stacked, workers, batch_sampler=order)
    last, per_epoch = list[float](), len(order) // config.epochs
    for step, batch in enumerate(progress_of("fine-tuning")(batches, len(order))):
        progress = step / len(order)
        set_lr(optimizer.param_groups, lr_at(progress, optim, config.batch_size))
        # layers of drop path and mixing draw from torch's generator, seeded for each step
        torch.manual_seed((config.seed << 32) + step)
        model.train()
        loss = _loss(model, batch["pixels"].to(device), batch["label"].to(device), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last.append(float(loss.detach()))
    return math.fsum(last[-per_epoch:]) / per_epoch


def _loss(model: Classifier, pixels: Tensor, labels: Tensor, config: FinetuneConfig) -> Tensor:
    x = model.normalize(pixels)
    if not (config.mixup or config.cutmix):
        return F.cross_entropy(model(x), labels, label_smoothing=config.smoothing)
    mixed, share_own = mix(x, config.mixup, config.cutmix)
    logits = model(mixed)
    own, other = (
        F.cross_entropy(logits, targets, label_smoothing=config.smoothing)
        for targets in (labels, labels.roll(1, 0))
    )
    return share_own * own + (1 - share_own) * other


def _order(samples: int, config: FinetuneConfig) -> list[list[tuple[int, int]]]:
    """Batches of (epoch, sample) of all epochs, shuffled each; what does not fill one is left out,
    but for a set that is smaller than a batch."""
    rng, size = np.random.default_rng(config.seed), min(config.batch_size, samples)
    batches = []
    for epoch in range(config.epochs):
        order = rng.permutation(samples).tolist()
        for start in range(0, samples - size + 1, size):
            batches.append([(epoch, number) for number in order[start : start + size]])
    return batches


@torch.no_grad()
def _predict(model: Classifier, source: Source, sets: Sets, device: Any) -> Tensor:
    """[N] classes, by the mean over views of the softmax."""
    model.eval()
    found = []
    for pixels, _ in batches_of(source, sets.data, sets.config.batch_size, sets.look):
        logits = model(model.normalize(pixels.flatten(0, 1).to(device)))
        mean = logits.softmax(dim=-1).unflatten(0, pixels.shape[:2]).mean(dim=1)
        found.append(mean.argmax(dim=1).cpu())
    return torch.cat(found)
