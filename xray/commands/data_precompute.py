"""`xray data pseudo-tags`, `embeddings`, `scores` and `text-features`: a model's results as
sidecars of shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray.commands.common import (
    SHARDS,
    ArtifactName,
    Modality,
    check_model,
    checking,
    connected_device,
    guarded,
    open_shards,
    settings,
    split_settings,
    takes,
)
from xray.errors import ConfigError
from xray.progress import progress_bar, progress_of
from xray.words import count, counted

if TYPE_CHECKING:
    from data_pipelines.shards.sidecar import Sidecar
    from data_pipelines.shards.source import Source

ShardsAndSettings = Annotated[
    list[str], typer.Argument(metavar="SHARDS... [KEY=VALUE]...", help=f"{SHARDS}, and settings")
]


@takes("xray.precompute.config:PseudoTagsConfig")
@guarded
def data_pseudo_tags(
    artifact: ArtifactName,
    items: ShardsAndSettings,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Vocabulary of the tags, for a clip artifact")
    ] = None,
    modality: Modality = "",
) -> None:
    """Predict tags of samples with a hashtag or clip ARTIFACT, and score the tags they have.

    Writes a sidecar to .xray beside the shards and prints its name, for hashtag.teacher. After an
    interruption, run the same command again: it continues.
    """
    from xray.artifacts.artifact import open_artifact
    from xray.precompute.config import PseudoTagsConfig

    shards, given = split_settings(items)
    config = settings(PseudoTagsConfig, given)
    config.validate()
    teacher = open_artifact(artifact, config.llm)
    sources = _open_all(shards, modality, "xray data pseudo-tags")
    from xray.artifacts.encoders import data_of
    from xray.precompute.pseudo_tags import open_teacher, write_pseudo_tags

    tagger, tags = open_teacher(teacher, vocabulary, config)
    for pattern, source in zip(shards, sources, strict=True):
        with progress_bar("tagging") as progress:
            data = data_of(teacher, config.workers)
            made = write_pseudo_tags(source, tagger, tags, config, data, teacher.digest, progress)
        print(
            f"{pattern}: {made.added:,} of {made.untagged:,} untagged samples got tags, "
            f"{len(source):,} in all; hashtag.teacher={made.name}"
        )
        _print_left_out(made.causes)


@takes("xray.precompute.config:FeaturesConfig")
@guarded
def data_embeddings(
    artifact: ArtifactName, items: ShardsAndSettings, modality: Modality = ""
) -> None:
    """Embed pictures or clips with the backbone of ARTIFACT, to find duplicates.

    Writes a sidecar to .xray beside the shards and prints its name, for dedup.embeddings. After an
    interruption, run the same command again: it continues.
    """
    _write_features(artifact, items, modality, "xray data embeddings", "dedup.embeddings")


@takes("xray.precompute.config:FeaturesConfig")
@guarded
def data_scores(artifact: ArtifactName, items: ShardsAndSettings, modality: Modality = "") -> None:
    """Score how well each caption fits its picture or clip: their cosine by a clip ARTIFACT.

    Writes a sidecar to .xray beside the shards and prints its name, for filters.scores and
    filters.min_score. After an interruption, run the same command again: it continues.
    """
    _write_features(artifact, items, modality, "xray data scores", "filters.scores")


def _write_features(
    artifact: str,
    items: list[str],
    modality: str,
    user: str,
    key: str,
) -> None:
    from xray import dist
    from xray.artifacts.artifact import open_artifact
    from xray.precompute.config import FeaturesConfig

    shards, given = split_settings(items)
    config = settings(FeaturesConfig, given)
    config.validate()
    scores = key == "filters.scores"
    opened = open_artifact(artifact, config.llm)
    sources = _open_all(shards, modality, user)
    from xray.artifacts.encoders import Encoder, TextEncoder, data_of, restore_encoder
    from xray.precompute.features import write_embeddings, write_scores

    write: Callable[..., tuple[Sidecar, dict[str, int]]] = write_embeddings
    if scores:
        write = write_scores
    encoder = restore_encoder(opened).to(dist.choose_device("auto"))
    if isinstance(encoder, TextEncoder):
        raise ConfigError(f"{opened.path} is of stage text: it has no backbone")
    if scores and not isinstance(encoder, Encoder):
        raise ConfigError(f"{opened.path} is of stage {opened.stage}: scores need a clip artifact")
    for pattern, source in zip(shards, sources, strict=True):
        with progress_bar("encoding") as progress:
            data = data_of(opened, config.workers)
            sidecar, causes = write(source, encoder, config, data, progress)
        print(f"{pattern}: {count(len(source), 'sample')}; {key}={sidecar.name}")
        _print_left_out(causes)


@takes("xray.precompute.config:TextFeaturesConfig", "tune")
@guarded
def data_text_features(
    items: ShardsAndSettings,
    init_from: Annotated[
        str,
        typer.Option(
            help="The text or clip artifact, or released weights, that the clip stage starts from"
        ),
    ] = "",
    modality: Modality = "",
) -> None:
    """Encode every caption once, for a clip stage with text.tune=none and text.features=bf16.

    Takes the settings of the stage's text section. After an interruption, run the same command
    again: it continues. With torchrun, each process does a part.
    """
    from xray import dist
    from xray.precompute.config import TextFeaturesConfig

    shards, given = split_settings(items)
    config = settings(TextFeaturesConfig, ["tune=none", *given])
    with checking():
        config.validate()
        if init_from:
            check_model(init_from)
        elif not config.llm:
            raise ConfigError("no LLM is named: give llm=FOLDER, a hub name, or --init-from")
    device = connected_device()
    opening = partial(_open_all, shards, modality, "xray data text-features")
    sources = dist.main_first(opening)
    from xray.artifacts.language_model import Language
    from xray.imports.cached import open_model
    from xray.precompute.text_features import write_text_features

    def open_language() -> Language:
        return Language(config, open_model(init_from) if init_from else None)

    language = dist.main_first(open_language)
    for pattern, source in zip(shards, sources, strict=True):
        reading = progress_of("reading captions")
        with progress_bar("encoding") if dist.is_main() else nullcontext() as progress:
            store = write_text_features(source, language, config, device, progress, reading)
        if not dist.is_main():
            continue
        unique = store.facts["captions_stored"]
        print(
            f"{pattern}: {count(unique, 'different caption')} of {count(len(source), 'sample')}; "
            f"train clip with text.features={config.features} and the same text settings "
            f"({store.name})"
        )


def _open_all(shards: Sequence[str], modality: str, user: str) -> list[Source]:
    return [open_shards(pattern, modality, user) for pattern in shards]


def _print_left_out(causes: Mapping[str, int]) -> None:
    if causes:
        print(f"left out: {counted(causes)}")
