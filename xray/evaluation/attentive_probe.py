"""Attentive probe: one query that attends to frozen patch tokens (V-JEPA, 2404.08471)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipelines.shards.source import Source
from data_pipelines.stream.loader import Fields
from xray.artifacts.encoders import VisionEncoder
from xray.config import OptimConfig, Precision
from xray.evaluation.class_labels import Classes, accuracy
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples, batch_samples
from xray.evaluation.splits import Chosen, Scratch
from xray.evaluation.suites.attentive_probe import AttentiveProbeConfig
from xray.evaluation.token_files import Rows, batch_of, blocks, stored
from xray.models.inference import autocast
from xray.optim import lr_at, set_lr
from xray.progress import progress_of


class AttentiveProbe(nn.Module):
    """A learned query, cross-attention and an MLP, each with a residual, then a linear layer."""

    def __init__(self, width: int, heads: int, classes: int, precision: Precision = "fp32") -> None:
        super().__init__()
        self.precision: Precision = precision
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.norm_tokens, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [B, C] of tokens [B, n, D]."""
        with autocast(tokens.device, self.precision):
            x = self.norm_tokens(tokens)
            query = self.query.expand(len(x), -1, -1)
            attended, _ = self.attention(query, x, x, need_weights=False)
            pooled = self.query + attended
            pooled = (pooled + self.mlp(self.norm_mlp(pooled)))[:, 0]
        return self.head(pooled.float())


def attentive_probe(sets: Sets, config: AttentiveProbeConfig) -> dict[str, float]:
    """Measure top-1 accuracy of V-JEPA's recipe: AdamW, a learning rate of half a cosine.

    The backbone encodes each sample once, at the artifact's keep rate, and stores tokens in a file,
    in half precision. The query attends to the tokens of all views of a clip.
    """
    source, test_source = sets.labelled("attentive_probe", config)
    with sets.scratch() as scratch:
        train, labels = _stored(sets, source, scratch)
        test, truth = _stored(sets, test_source, scratch)
        classes = Classes.of(labels, source)
        labels, truth = classes.places(labels, source), classes.places(truth, test_source)
        device = sets.vision.normalize.mean.device
        layers: Any = sets.vision.vision.blocks
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            sizes = train.shape[-1], layers[0].attn.num_heads, int(labels.max()) + 1
            probe = AttentiveProbe(*sizes, sets.config.precision).to(device)
        _fit(probe, train, labels, config, device)
        predicted = _predict(probe, test, config.batch_size, device)
    return accuracy(predicted, truth, labels)


@dataclass(frozen=True)
class TokensOf(Samples):
    """Encoding of samples to patch tokens."""

    @torch.no_grad()
    def encode(self, encoder: VisionEncoder, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield labels [B] and tokens [B, V, n, D] float16 of these batches."""
        device = encoder.normalize.mean.device

        def tokens(pixels: Tensor) -> dict[str, Tensor]:
            x = encoder.normalize(pixels.to(device, non_blocking=True))
            with autocast(device, encoder.precision):
                return {"tokens": encoder.vision(x, encoder.keep_rate).patches.half()}

        yield from self.encoded(tokens, numbers)


def _stored(sets: Sets, source: Source, scratch: Scratch) -> tuple[Any, Tensor]:
    """Return the tokens of a source and its labels [N]; all splits of a set share one file."""
    whole, numbers = sets.part(source)
    files = scratch.stored
    if id(whole) not in files:
        files[id(whole)] = _tokens(sets, whole, scratch.folder / str(len(files)))
    tokens, labels = files[id(whole)]
    return (tokens, labels) if whole is source else (Chosen(tokens, numbers), labels[numbers])


def _tokens(sets: Sets, source: Source, path: Path) -> tuple[Rows, Tensor]:
    """Store patch tokens of all views, [N, V, n, D] float16, in a file; returns labels [N] too."""
    size = batch_samples(source, sets.config.batch_size, sets.views)
    batches = sets.encoded(TokensOf(source, sets.data, size, sets.views))
    files = stored(source, batches, path)
    return files["tokens"], torch.from_numpy(np.array(files["label"]))


def _batch(tokens: Rows, rows: slice | np.ndarray, device: torch.device) -> Tensor:
    """Return the tokens of all views of some samples, [B, V * n, D]."""
    return batch_of(tokens, rows, device).flatten(1, 2)


@torch.no_grad()
def _predict(probe: AttentiveProbe, tokens: Rows, size: int, device: torch.device) -> Tensor:
    """Predict classes [N], with one batch of tokens in memory."""
    parts = (_batch(tokens, rows, device) for rows in blocks(len(tokens), size))
    return torch.cat([probe(part).argmax(1).cpu() for part in parts])


def _fit(
    probe: AttentiveProbe,
    tokens: Rows,
    labels: Tensor,
    config: AttentiveProbeConfig,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(config.seed)
    schedule = OptimConfig(base_lr=config.lr, warmup=0.0)
    groups = [{"params": list(probe.parameters()), "lr_scale": 1.0, "freeze": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    per_epoch = -(-len(labels) // config.batch_size)
    for epoch in progress_of("attentive probe")(iter(range(config.epochs)), config.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for number, rows in enumerate(order.split(config.batch_size)):
            progress = (epoch + number / per_epoch) / config.epochs
            set_lr(optimizer.param_groups, lr_at(progress, schedule, 256))
            optimizer.zero_grad()
            logits = probe(_batch(tokens, rows.sort().values.numpy(), device))
            F.cross_entropy(logits, labels[rows.sort().values].to(device)).backward()
            optimizer.step()
    probe.eval()
