"""Evaluation of a tag head on samples with tags; the measures are those of tag_metrics.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_views
from data_pipelines.shards.source import Sample, Source
from data_pipelines.stream.loaded import Fields
from data_pipelines.tags.labels import Labeller, label
from data_pipelines.tags.reader import Origin, TagRules
from data_pipelines.tags.vocabulary import Vocabulary
from xray.artifacts import offers
from xray.artifacts.encoders import Tagger
from xray.errors import ArtifactError, ConfigError
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import Samples, Views
from xray.evaluation.suite import Measures, Row, Suite, SuiteConfig, share_row, titled
from xray.evaluation.tag_metrics import TagMetrics, measured_tags


@dataclass
class TaggingConfig(SuiteConfig):
    """Samples with tags, and the views that their probabilities are averaged over."""

    required_sets = ("shards",)

    shards: str = ""
    modality: Literal["image", "video"] = "image"
    tags: Origin = "hashtags"  # where a sample's tags come from
    field: str = "hashtags"  # their json field
    # json fields of the captions that tags are read from, and their weights
    captions: dict[str, float] = dataclass_field(default_factory=dict)
    clips: int = 1  # times per video
    crops: int = 1  # squares per image or frame: 1 or 3

    def validate(self, key: str) -> None:
        if not self.shards:
            raise ConfigError(f"{key}.shards is not set")
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError(f"{key}.clips must be at least 1, and {key}.crops 1 or 3")


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
    rules = TagRules(field=config.field)
    work = Labeller(source, config.tags, rules, vocabulary, captions=config.captions)
    labels = label(work, workers)
    present = [
        torch.from_numpy(np.array(labels.table(s)["ids"])) for s in range(len(labels.counts))
    ]
    measured = measured_tags(torch.cat(present), len(source))
    metrics = TagMetrics(torch.tensor(vocabulary.counts), measured)
    rows = (labels.row(*place, "ids") for place in source.places())
    tags = (torch.tensor(own, dtype=torch.long) for own in rows)
    for batch in batches:
        own = list(islice(tags, len(batch["rows"])))
        metrics.add(batch["rows"], torch.nn.utils.rnn.pad_sequence(own, True, -1))
    return metrics.results()


def _run(sets: Sets, config: dict[str, TaggingConfig]) -> Measures:
    encoder = sets.encoder
    if not isinstance(encoder, Tagger):
        raise ArtifactError(f"{sets.what}: it has no tag head")
    vocabulary = Vocabulary.load(encoder.artifact.file("vocabulary.json"))
    results: dict[str, float] = {}
    for name, own in config.items():
        source = sets.open(f"tags.{name}", own.shards, own.modality)
        views = Views(own.clips, own.crops)
        batches = sets.encoded(ProbabilitiesOf(source, sets.data, sets.config.batch_size, views))
        measures = tagging(source, batches, vocabulary, own, sets.data.workers)
        results |= {f"{name}/{measure}": value for measure, value in measures.items()}
    return results


def _rows(measures: Measures) -> Iterator[Row]:
    for name in dict.fromkeys(key.split("/")[0] for key in measures):
        prefix = f"{name}/"
        r = {k.removeprefix(prefix): v for k, v in measures.items() if k.startswith(prefix)}
        samples, size = r["samples"] + r["untagged"], r["vocabulary"]
        over = f"{r['samples']:.0f} of {samples:.0f} samples, {r['tags']:.0f} tags"
        for measure in ("precision@1", "recall@5"):
            yield share_row(f"{name} {measure}", r, measure, r[f"chance_{measure}"], over)
        for measure in [m for m in r if m == "mAP" or m.startswith("mAP[")]:
            tags = f"{r[measure.replace('mAP', 'mAP_tags')]:.0f} tags"
            yield share_row(f"{name} {measure}", r, measure, r[f"random_{measure}"], tags)
        least = r["least_dead@10"] / size
        yield share_row(f"{name} dead tags", r, "dead_share@10", least, f"{size:.0f} tags")
        yield f"{name} calibration error", f"{100 * r['ece']:.1f}", "", over


TAGS = Suite(
    "tags",
    dict[str, TaggingConfig],
    needs=frozenset({offers.TAGS}),
    run=_run,
    rows=_rows,
    title=titled("tags"),
)
