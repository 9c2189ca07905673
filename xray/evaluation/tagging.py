"""Evaluation of a tag head on samples with tags; the measures are those of tag_metrics.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_views
from data_pipelines.shards.sidecar import Sidecar
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loaded import Fields
from data_pipelines.tags.labels import Labeller, label
from data_pipelines.tags.missing import TagKeys, why_no_tags
from data_pipelines.tags.reader import TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray.artifacts.encoders import Tagger
from xray.errors import ArtifactError, DataError
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples, Views
from xray.evaluation.suite import Measures
from xray.evaluation.suites.tagging import TaggingConfig
from xray.evaluation.tag_metrics import TagMetrics, measured_tags


@dataclass(frozen=True)
class ProbabilitiesOf(Samples):
    """Tag probabilities of samples; images have several crops, too."""

    def fields(self, sample: Sample) -> Fields:
        """Load the pixels of a sample's views, [C, T, 3, S, S] uint8."""
        return {"pixels": load_views(sample, self.data, self.views.clips, self.views.crops)}

    @torch.no_grad()
    def encode(self, tagger: Tagger, numbers: Iterable[int]) -> Iterator[Fields]:
        """Yield the mean probabilities [B, V] over views of these batches."""

        def probabilities(pixels: Tensor) -> dict[str, Tensor]:
            return {"rows": tagger.probabilities(pixels)}

        for batch in self.encoded(probabilities, numbers):
            yield {"rows": batch["rows"].mean(dim=1)}


def tagging(
    source: Source,
    batches: Iterable[Mapping[str, Tensor]],
    vocabulary: Vocabulary,
    config: TaggingConfig,
    workers: int,
) -> dict[str, float]:
    """Measure a tag head on a source; batches: those of `ProbabilitiesOf`, in order."""
    labels, present = tagged(source, vocabulary, config, workers)
    measured = measured_tags(torch.cat(present), len(source))
    metrics = TagMetrics(torch.tensor(vocabulary.counts), measured)
    rows = (labels.row(*place, "ids") for place in source.places())
    tags = (torch.tensor(own, dtype=torch.long) for own in rows)
    for batch in batches:
        own = list(islice(tags, len(batch["rows"])))
        metrics.add(batch["rows"], torch.nn.utils.rnn.pad_sequence(own, True, -1))
    return metrics.results()


def tagged(
    source: Source, vocabulary: Vocabulary, config: TaggingConfig, workers: int
) -> tuple[Sidecar, list[Tensor]]:
    """Return the labels of a source, and the tag ids of each shard.

    Raises DataError if no sample has a tag of the vocabulary.
    """
    rules = TagRules(field=config.field)
    work = Labeller(source, config.tags, rules, vocabulary, captions=config.captions)
    labels = label(work, workers)
    present = [
        torch.from_numpy(np.array(labels.table(s)["ids"])) for s in range(len(labels.counts))
    ]
    if not any(map(len, present)):
        keys = TagKeys(f"{source.name}.tags", f"{source.name}.field")
        why = why_no_tags(source, config.tags, rules, config.captions, keys)
        raise DataError(f"{source.name}: no sample has a tag of the vocabulary: {why}")
    return labels, present


def check_tags(sets: Sets, config: dict[str, TaggingConfig]) -> None:
    """Make the labels of each data set; raises DataError for one without tags."""
    vocabulary = Vocabulary.load(sets.encoder.artifact.file("vocabulary.json"))
    for name, own in config.items():
        tagged(own.open(sets, f"tags.{name}", "shards"), vocabulary, own, sets.data.workers)


def taggings(sets: Sets, config: dict[str, TaggingConfig]) -> Measures:
    """Measure the tag head on each data set; measures are NAME/MEASURE."""
    encoder = sets.encoder
    if not isinstance(encoder, Tagger):
        raise ArtifactError(f"{sets.what}: it has no tag head")
    vocabulary = Vocabulary.load(encoder.artifact.file("vocabulary.json"))
    results: dict[str, float] = {}
    for name, own in config.items():
        source = own.open(sets, f"tags.{name}", "shards")
        views = Views(own.clips, own.crops)
        batches = sets.encoded(ProbabilitiesOf(source, sets.data, sets.config.batch_size, views))
        measures = tagging(source, batches, vocabulary, own, sets.data.workers)
        results |= {f"{name}/{measure}": value for measure, value in measures.items()}
    return results
