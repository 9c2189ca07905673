"""Evaluation suites: each a function from the sets to numbers beside chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xray import dist

if TYPE_CHECKING:
    from xray.artifacts.artifact import Artifact
    from xray.evaluation.config import EvalConfig

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from data_pipelines.tags.vocabulary import Vocabulary
from xray.artifacts.encoders import Tagger, TextEncoder, VisionEncoder, class_weights
from xray.errors import ArtifactError, ConfigError, DataError
from xray.evaluation import knn as nearest
from xray.evaluation.attentive_probe import attentive_probe
from xray.evaluation.config import HEADS, SUITES, SUITES_OF, WAYS, EvalConfig, RetrievalConfig
from xray.evaluation.datasets import Sets, check_sets
from xray.evaluation.feature_extraction import read_all_captions
from xray.evaluation.finetune import finetune
from xray.evaluation.linear_probe import linear_probe
from xray.evaluation.retrieval import caption_retrieval, retrieval
from xray.evaluation.robustness import robustness
from xray.evaluation.tagging import tagging
from xray.evaluation.zero_shot import zero_shot

Measures = dict[str, float]


Results = dict[str, dict[str, float]]


class Suite:
    """Runs suites on one encoder; what they share is extracted once."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        config.validate()
        self.config = config
        self.sets = Sets(encoder, config.filled(), root, workers)

    def run(self, names: Sequence[str]) -> dict[str, Measures]:
        """The results of each named suite; raises as `check`."""
        return dict(self.each(names))

    def each(self, names: Sequence[str]) -> Iterator[tuple[str, Measures]]:
        """Each named suite with its results, as they are had; raises as `check` before any is."""
        self.check(names)
        for name in names:
            yield name, RUN[name](self.sets)

    def check(self, names: Sequence[str]) -> None:
        """Raise ConfigError for an unknown suite or one whose data are not given or not there,
        ArtifactError for one that the artifact has not the parts for."""
        given, able = self.sets.config.configured(), SUITES_OF[self.sets.encoder.artifact.stage]
        has_head = any(name in given for name in HEADS)
        for name in names:
            if name not in SUITES:
                raise ConfigError(f"unknown suite {name!r}: there are {', '.join(SUITES)}")
            if name not in able:
                stages = [stage for stage, own in SUITES_OF.items() if name in own]
                raise ArtifactError(
                    f"{self.sets.what}: suite {name} is of a {' or '.join(stages)} artifact"
                )
            if name not in given and not (name == "robustness" and has_head):
                raise ConfigError(f"suite {name} has no data: set eval.{_where(name)}")
        check_sets(self.sets.config, names, self.sets.data.root)

    def asked(self) -> list[str]:
        """The suites that have data and fit the artifact; raises ConfigError for none."""
        stage = self.sets.encoder.artifact.stage
        given, able = self.config.configured(), SUITES_OF[stage]
        has = (
            f"the data are for {', '.join(given)}" if given else "there are no data: give --recipe"
        )
        if not self.config.possible(stage):
            raise ConfigError(f"{self.sets.what}: it can be asked for {', '.join(able)}; {has}")
        return self.config.possible(stage)


def _where(suite: str) -> str:
    """The keys of a suite's data."""
    if suite == "robustness":
        return "zero_shot.shards, or eval.linear_probe.train and .test"
    if suite in ("zero_shot", "retrieval", "video_retrieval", "captions"):
        return f"{suite}.shards"
    return "tags.NAME.shards" if suite == "tags" else f"{suite}.train and .test"


def _zero_shot(sets: Sets) -> Measures:
    names, source = sets.class_names()
    found = sets.features(source, "joint")
    labels = sets.zero_shot_labels(found.labels, source, names)
    weights = class_weights(sets.texts, names, sets.config.zero_shot.templates)
    return zero_shot(found.rows, labels, weights)


def _across(name: str, config: RetrievalConfig, sets: Sets) -> Measures:
    source = sets.open(name, config.shards, config.modality)
    texts, owner = _texts(read_all_captions(source, config.captions), name)
    kind = _kinds(texts) if config.same == "caption" else None
    found = sets.features(source, "joint")
    rows = sets.texts(texts)
    result = retrieval(found.rows, rows, owner, kind=kind)
    for size in sets.joint.matryoshka:
        images, captions = (F.normalize(x[:, :size], dim=-1) for x in (found.rows, rows))
        part = retrieval(images, captions, owner, kind=kind)
        recalls = {k: v for k, v in part.items() if k.startswith(WAYS)}
        result |= {f"{name}/{size}": value for name, value in recalls.items()}
    return result


def _captions(sets: Sets) -> Measures:
    """Of the tuned model, and of its base as `before`."""
    encoder = sets.encoder
    if not isinstance(encoder, TextEncoder):
        raise ArtifactError(f"{sets.what}: captions are compared by a text artifact")
    config = sets.config.captions
    captions = read_all_captions(
        sets.open("captions", config.shards, config.modality), config.captions
    )
    texts, owner = _texts([own for own in captions if own], "captions")
    found = caption_retrieval(encoder.encode_text(texts), owner)
    base = TextEncoder.before(encoder.artifact)
    if base is not None:
        base.to(next(encoder.parameters()).device)
        before = caption_retrieval(base.encode_text(texts), owner)
        found |= {f"before_{k}": v for k, v in before.items() if k.startswith("top1")}
    return found


def _knn(sets: Sets) -> Measures:
    config = sets.config.knn
    train, test = sets.probe("knn", config)
    settings = config.k, config.temperature
    return nearest.knn(train.rows, train.labels, test.rows, test.labels, *settings)


def _linear_probe(sets: Sets) -> Measures:
    config = sets.config.linear_probe
    train, test = sets.probe("linear_probe", config)
    return linear_probe(train.views, train.labels, test.views, test.labels, config.solver)


def _tags(sets: Sets) -> Measures:
    encoder = sets.encoder
    if not isinstance(encoder, Tagger):
        raise ArtifactError(f"{sets.what}: only a hashtag artifact has tags")
    vocabulary = Vocabulary.load(encoder.artifact.file("vocabulary.json"))
    found: Measures = {}
    for name, config in sets.config.tags.items():
        source = sets.open(f"tags.{name}", config.shards, config.modality)
        run = (vocabulary, config, sets.data, sets.config.batch_size)
        measures, _ = tagging(source, encoder.probabilities, *run)
        found |= {f"{name}/{measure}": value for measure, value in measures.items()}
    return found


def _texts(captions: list[list[str]], suite: str) -> tuple[list[str], torch.Tensor]:
    """All captions in a row, and whose each is; raises DataError where a sample has none."""
    empty = sum(not own for own in captions)
    if empty:
        raise DataError(f"eval.{suite}.shards: {empty} samples have no caption")
    owner = [number for number, own in enumerate(captions) for _ in own]
    return [caption for own in captions for caption in own], torch.tensor(owner)


def _kinds(texts: list[str]) -> torch.Tensor:
    """[M]: the number of each text among the different ones."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([number[text] for text in texts])


RUN: dict[str, Callable[[Sets], Measures]] = {
    "zero_shot": _zero_shot,
    "retrieval": lambda sets: _across("retrieval", sets.config.retrieval, sets),
    "video_retrieval": lambda sets: _across("video_retrieval", sets.config.video_retrieval, sets),
    "captions": _captions,
    "knn": _knn,
    "linear_probe": _linear_probe,
    "attentive_probe": attentive_probe,
    "finetune": finetune,
    "robustness": robustness,
    "tags": _tags,
}


def evaluated(
    artifact: Artifact, config: EvalConfig, root: str, workers: int, suites: list[str]
) -> Results:
    """The results of an artifact, by suite: what `xray eval` and a recipe's end both run."""
    return prepared(artifact, config, root, workers).run(suites)


def prepared(artifact: Artifact, config: EvalConfig, root: str, workers: int) -> Suite:
    """An artifact's suites, ready to run, which check what they are asked for."""
    from xray.artifacts.encoders import restore_encoder

    encoder = restore_encoder(artifact).to(dist.choose_device("auto"))
    return Suite(encoder, config, root, workers)
