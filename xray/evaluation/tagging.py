"""A tag head on samples with tags: views through the model, and the measures of `tagging.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_views
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loader import Fields, iterate_source
from data_pipelines.tags.labels import Labeller, label
from data_pipelines.tags.reader import TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray.config import DataConfig
from xray.evaluation.config import TaggingConfig
from xray.evaluation.tag_metrics import TagMetrics, average_views, measured_tags


def tagging(
    source: Source,
    probabilities: Callable[[Tensor], Tensor],
    vocabulary: Vocabulary,
    config: TaggingConfig,
    data: DataConfig,
    batch_size: int,
) -> tuple[dict[str, float], TagMetrics]:
    """The measures of a tag head on a source; probabilities: [B, T, 3, S, S] uint8 -> [B, V]."""
    rules = TagRules(field=config.field)
    work = Labeller(source, config.tags, rules, vocabulary, captions=config.captions)
    labels = label(work, data.workers)
    present = [
        torch.from_numpy(np.array(labels.table(s)["ids"])) for s in range(len(labels.counts))
    ]
    measured = measured_tags(torch.cat(present), len(source))
    metrics = TagMetrics(torch.tensor(vocabulary.counts), measured)

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        own = labels.row(sample.shard, sample.member, "ids")
        views = load_views(sample, data, config.clips, config.crops)
        return {"pixels": views, "tags": torch.tensor(own, dtype=torch.long)}

    def collate(rows: Sequence[Fields]) -> Fields:
        tags = [row["tags"] for row in rows]
        padded = torch.nn.utils.rnn.pad_sequence(tags, True, -1)
        return {"pixels": torch.stack([row["pixels"] for row in rows]), "tags": padded}

    for batch in iterate_source(source, transform, collate, data, batch_size):
        views = batch["pixels"].shape[1]
        found = probabilities(batch["pixels"].flatten(0, 1)).unflatten(0, (-1, views))
        metrics.add(average_views(found), batch["tags"])
    return metrics.results(), metrics
