"""`xray data pseudo-tags`, `embeddings`, `scores`, `text-features`: what models say of shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xray.commands.common import guarded
from xray.commands.data import data_app
from xray.commands.data_common import Items, Modality, open_any, split_items
from xray.errors import ConfigError
from xray.precompute.pseudo_tags import open_teacher
from xray.progress import progress_bar, progress_of

if TYPE_CHECKING:
    from data_pipelines.shards.sidecar import Sidecar


@data_app.command("pseudo-tags")
@guarded
def data_pseudo_tags(
    artifact: Annotated[str, typer.Argument(help="A hashtag or clip artifact, folder or URL")],
    items: Items,
    vocabulary: Annotated[
        Path | None, typer.Option(help="The tags that a clip artifact looks for")
    ] = None,
    modality: Modality = "",
) -> None:
    """Have a hashtag or clip artifact tag samples, and judge the tags they have.

    Writes a sidecar beside the shards, and prints its name for hashtag.teacher. The same command
    goes on where it was stopped. Settings: tags=hashtags field=hashtags captions={} (the samples'
    own tags) top=5 threshold=0.1 temperature=1.0 template='a photo of {}' (a clip artifact's)
    llm='' (where its LLM is, if that was moved) batch_size=64 workers=2.
    """
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.encoders import data_of
    from xray.config.loading import build, parse_overrides
    from xray.precompute.pseudo_tags import PseudoTagsConfig, write_pseudo_tags

    shards, settings = split_items(items)
    config = build(PseudoTagsConfig, parse_overrides(settings))
    config.validate()
    teacher = open_artifact(artifact, config.llm)
    tagger, tags = open_teacher(teacher, vocabulary, config.template)
    for pattern in shards:
        source = open_any(pattern, modality)
        with progress_bar("tagging") as progress:
            data = data_of(teacher, config.workers)
            found = write_pseudo_tags(source, tagger, tags, config, data, teacher.digest, progress)
        print(
            f"{pattern}: {found.added:,} of {found.untagged:,} untagged samples got tags, "
            f"{len(source):,} in all; hashtag.teacher={found.name}"
        )
        print_left_out(found.causes)


@data_app.command("embeddings")
@guarded
def data_embeddings(
    artifact: Annotated[str, typer.Argument(help="An artifact with a backbone: folder or URL")],
    items: Items,
    modality: Modality = "",
) -> None:
    """Embed pictures or clips, for the duplicates that dedup.embeddings drops.

    Writes a sidecar beside the shards, and prints its name. The same command goes on where it was
    stopped. Settings: batch_size=64 workers=2.
    """
    from xray.precompute.features import write_embeddings

    _write_features(write_embeddings, artifact, items, modality, "dedup.embeddings")


@data_app.command("scores")
@guarded
def data_scores(
    artifact: Annotated[str, typer.Argument(help="A clip artifact: folder or URL")],
    items: Items,
    modality: Modality = "",
) -> None:
    """Score how well each caption fits its picture or clip (cosine), for filters.min_score.

    Writes a sidecar beside the shards, and prints its name. The same command goes on where it was
    stopped. Settings: captions={} (their json fields) llm='' (where the LLM is, if that was moved)
    batch_size=64 workers=2.
    """
    from xray.precompute.features import write_scores

    _write_features(write_scores, artifact, items, modality, "filters.scores")


def _write_features(
    write: Callable[..., tuple[Sidecar, dict[str, int]]],
    artifact: str,
    items: list[str],
    modality: str,
    key: str,
) -> None:
    from xray import dist
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.encoders import Encoder, TextEncoder, data_of, restore_encoder
    from xray.config.loading import build, parse_overrides
    from xray.precompute.features import FeaturesConfig

    shards, settings = split_items(items)
    config = build(FeaturesConfig, parse_overrides(settings))
    config.validate()
    opened = open_artifact(artifact, config.llm)
    encoder = restore_encoder(opened).to(dist.choose_device("auto"))
    if isinstance(encoder, TextEncoder):
        raise ConfigError(f"{opened.path} is of stage text: it has no backbone")
    if key == "filters.scores" and not isinstance(encoder, Encoder):
        raise ConfigError(f"{opened.path} is of stage {opened.stage}: scores need a clip artifact")
    for pattern in shards:
        source = open_any(pattern, modality)
        with progress_bar("encoding") as progress:
            data = data_of(opened, config.workers)
            found, causes = write(source, encoder, config, data, progress)
        print(f"{pattern}: {len(source):,} samples; {key}={found.name}")
        print_left_out(causes)


@data_app.command("text-features")
@guarded
def data_text_features(
    items: Items,
    init_from: Annotated[
        str, typer.Option(help="A text artifact, folder or URL, if the clip stage starts from it")
    ] = "",
    modality: Modality = "",
) -> None:
    """Encode every caption once, for a clip stage with text.tune=none and text.features=bf16.

    Takes the keys of the stage's text section: llm=FOLDER prompt='' pooling=auto max_length=64
    attention=bidirectional dtype=fp32, and features=bf16 (or int8, fp32) captions={} (their json
    fields) batch_size=256 workers=2. The same command goes on where it was stopped.
    """
    from xray import dist
    from xray.artifacts.artifact import open_artifact
    from xray.artifacts.language_model import Language
    from xray.config.loading import build, parse_overrides
    from xray.precompute.text_features import TextFeaturesConfig, write_text_features

    shards, settings = split_items(items)
    config = build(TextFeaturesConfig, {"tune": "none", **parse_overrides(settings)})
    config.validate()
    language = Language(config, open_artifact(init_from) if init_from else None)
    for pattern in shards:
        source = open_any(pattern, modality)
        reading = progress_of("reading captions")
        with progress_bar("encoding") as progress:
            found = write_text_features(
                source, language, config, dist.choose_device("auto"), progress, reading
            )
        unique = found.facts["captions_stored"]
        print(
            f"{pattern}: {unique:,} different captions of {len(source):,} samples; train clip with "
            f"text.features={config.features} and the same text settings ({found.name})"
        )


def print_left_out(causes: Mapping[str, int]) -> None:
    """Samples that could not be read, by cause."""
    if causes:
        print("left out: " + ", ".join(f"{cause}: {n:,}" for cause, n in sorted(causes.items())))
