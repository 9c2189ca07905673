"""Supervised fine-tuning of the backbone on labels, by MAE's recipe (2111.06377).

It is the fair comparison for MAE, whose features are not linearly separable.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source
from data_pipelines.stream.loaded import Fields
from data_pipelines.stream.loader import WholeDataset, iterate_batches
from xray.artifacts.encoders import VisionEncoder
from xray.artifacts.manifest_config import data_config, model_config
from xray.config import DataConfig, OptimConfig, VisionOptim
from xray.config.schedule import largest
from xray.evaluation.class_labels import Classes, accuracy
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import batches_of, labels_of, stacked
from xray.evaluation.few_shot import draw
from xray.evaluation.suites.finetune import FinetuneConfig
from xray.models.backbone import VisionBackbone
from xray.models.heads import Normalize
from xray.models.inference import autocast
from xray.models.mixup import mix
from xray.models.token_reduction import KeepRate
from xray.models.weight_loading import load_adapted
from xray.optim import lr_at, make_optimizer, parameter_groups, set_lr
from xray.progress import progress_of


class Classifier(nn.Module):
    """A backbone at the artifact's keep rate, with a linear layer on its CLS features."""

    def __init__(self, encoder: VisionEncoder, classes: int, drop_path: float) -> None:
        super().__init__()
        model = dataclasses.replace(model_config(encoder.artifact), drop_path=drop_path)
        data = data_config(encoder.artifact)
        vision = VisionBackbone(model, largest(data.resolution), largest(data.frames))
        load_adapted(vision, encoder.vision.state_dict(), str(encoder.artifact.path))
        self.towers = nn.ModuleDict({"vision": vision})
        self.head = nn.Linear(vision.embed_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: logits start at 0
        nn.init.zeros_(self.head.bias)
        self.normalize = Normalize(*data.normalisation)
        self.keep_rate: KeepRate = encoder.keep_rate
        self.precision = encoder.precision

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits [B, C] of normalised pixels [B, T, 3, H, W]."""
        with autocast(pixels.device, self.precision):
            cls = self.towers["vision"](pixels, self.keep_rate).cls
        return self.head(cls.float())


class _Training(WholeDataset):
    """Samples by (epoch, number); augmentation depends only on these and on the seed."""

    def __init__(
        self, source: Source, labels: Tensor, data: DataConfig, config: FinetuneConfig
    ) -> None:
        names = ("crop_scale", "flip", "rand_augment")
        augmented = dataclasses.replace(data, **{name: getattr(config, name) for name in names})
        super().__init__(source, lambda s, rng: {"pixels": load_pixels(s, augmented, rng)}, data)
        self.labels, self.seed = labels, config.seed
        self.chosen = np.arange(len(labels))
        if config.shots:
            self.chosen = draw(labels, config.shots, 1, config.seed).flatten().numpy()

    def __getitem__(self, item: tuple[int, int]) -> Fields | str:
        epoch, number = item
        sample = self.load(number, np.random.default_rng([self.seed, epoch, number]))
        return sample if isinstance(sample, str) else {**sample, "label": self.labels[number]}


def finetune(sets: Sets, config: FinetuneConfig) -> dict[str, float]:
    """Measure top-1 accuracy on test after training the backbone and a linear head.

    The seed is fixed: results repeat on the same machine with the same number of threads.
    """
    source, test = sets.labelled("finetune", config)
    numbers = labels_of(source)
    classes = Classes.of(numbers, source)
    labels, truth = classes.places(numbers, source), classes.places(labels_of(test), test)
    device = sets.vision.normalize.mean.device
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Classifier(sets.vision, len(classes.numbers), config.drop_path).to(device)
        training = _Training(source, labels, sets.data, config)
        loss = _train(model, training, config, sets.data.workers, device)
    trained = labels[training.chosen]
    measures = accuracy(_predict(model, test, sets, device), truth, trained)
    return measures | {"train_samples": float(len(trained)), "train_loss": loss}


def _train(
    model: Classifier,
    training: _Training,
    config: FinetuneConfig,
    workers: int,
    device: torch.device,
) -> float:
    """Train for all epochs; returns the mean loss of the last one."""
    tower = VisionOptim(layer_decay=config.layer_decay)
    optim = OptimConfig(
        base_lr=config.base_lr, warmup=config.warmup, weight_decay=config.weight_decay,
        betas=[0.9, 0.999], vision=tower,
    )  # fmt: skip
    optimizer = make_optimizer(parameter_groups(model, optim), optim)
    order = _order(training.chosen, config)
    batches = iterate_batches(training, stacked, workers, batch_sampler=order)
    per_epoch = len(order) // config.epochs
    losses = deque[Tensor](maxlen=per_epoch)
    for step, batch in enumerate(progress_of("fine-tuning")(batches, len(order))):
        progress = step / len(order)
        set_lr(optimizer.param_groups, lr_at(progress, optim, config.batch_size))
        # drop path and mixup draw from torch's generator, which is seeded in each step
        torch.manual_seed((config.seed << 32) + step)
        model.train()
        loss = _loss(model, batch["pixels"].to(device), batch["label"].to(device), config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return math.fsum(torch.stack(list(losses)).tolist()) / per_epoch


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


def _order(chosen: np.ndarray, config: FinetuneConfig) -> list[list[tuple[int, int]]]:
    """Make batches of (epoch, sample), shuffled per epoch, without an epoch's incomplete batch."""
    rng, size = np.random.default_rng(config.seed), min(config.batch_size, len(chosen))
    batches = []
    for epoch in range(config.epochs):
        order = rng.permutation(chosen).tolist()
        for start in range(0, len(order) - size + 1, size):
            batches.append([(epoch, number) for number in order[start : start + size]])
    return batches


@torch.no_grad()
def _predict(model: Classifier, source: Source, sets: Sets, device: torch.device) -> Tensor:
    """Predict classes [N] by the mean softmax over views."""
    model.eval()
    predicted = []
    for pixels, _ in batches_of(source, sets.data, sets.config.batch_size, sets.views):
        logits = model(model.normalize(pixels.flatten(0, 1).to(device)))
        mean = logits.softmax(dim=-1).unflatten(0, pixels.shape[:2]).mean(dim=1)
        predicted.append(mean.argmax(dim=1))
    return torch.cat(predicted).cpu()
