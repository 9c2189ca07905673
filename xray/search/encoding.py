"""Features of pixels, texts and queries by any artifact: [B, D]."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.user_data import open_corpus
from data_pipelines.shards.remote import is_remote
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder, data_of, restore_encoder
from xray.artifacts.manifest_config import data_config
from xray.config.schedule import value_at
from xray.errors import ArtifactError, BadSample, ConfigError, DataError
from xray.models.inference import autocast
from xray.search.embedding_file import Facts
from xray.search.pca import shaped


def set_keep_rate(
    encoder: VisionEncoder | TextEncoder, keep_rate: float | None, text: bool
) -> None:
    """Set another keep rate; raises ConfigError for texts."""
    if keep_rate is None:
        return
    if text or not isinstance(encoder, VisionEncoder):
        raise ConfigError("--keep-rate applies to pictures and clips, and these are texts")
    encoder.choose(keep_rate)


def width_of(encoder: VisionEncoder | TextEncoder, text: bool, patches: bool = False) -> int:
    """Return the number of features, those of a patch token if patches.

    Raises ConfigError for a modality it cannot encode.
    """
    what = f"{encoder.artifact.path} is of stage {encoder.artifact.stage}"
    if isinstance(encoder, TextEncoder):
        if not text:
            raise ConfigError(f"{what}: it encodes texts (a .txt, or --texts), not pictures")
        return int(encoder.text.width)
    if isinstance(encoder, Encoder) and not patches:
        return encoder.options.embed_dim
    if text:
        raise ConfigError(f"{what}: texts are encoded by a clip or text artifact")
    return int(encoder.vision.embed_dim)


def of_pixels(encoder: VisionEncoder | TextEncoder) -> Callable[[Tensor], Tensor]:
    """Return the encoder of pixels [B, T, 3, H, W] to [B, D], on their device."""
    if isinstance(encoder, Encoder):
        return encoder.image_features
    assert isinstance(encoder, VisionEncoder)
    return encoder.cls


def patch_grid(encoder: VisionEncoder | TextEncoder, modality: str) -> list[int]:
    """Return the grid of patch tokens: [h, w] of a picture, [t, h, w] of a clip.

    Raises ConfigError for texts.
    """
    if modality == "text" or not isinstance(encoder, VisionEncoder):
        raise ConfigError("--patches applies to pictures and clips, and these are texts")
    data = data_config(encoder.artifact)
    size, video = value_at(data.resolution, 1.0), modality == "video"
    frames = value_at(data.frames, 1.0) if video else 1
    grid = encoder.vision.geometry.grid(frames, size, size)
    return list(grid if video else grid[1:])


def of_patches(encoder: VisionEncoder | TextEncoder) -> Callable[[Tensor], Tensor]:
    """Return the encoder of pixels [B, T, 3, H, W] to all patch tokens [B, n * D], in order.

    An input token that was merged has the feature of its token, a dropped one has zeros.
    """
    assert isinstance(encoder, VisionEncoder)
    vision, normalize = encoder.vision, encoder.normalize

    def encode(pixels: Tensor) -> Tensor:
        x = normalize(pixels.to(normalize.mean.device, non_blocking=True))
        with autocast(x.device, encoder.precision):
            return vision(x, encoder.keep_rate, track=True).dense().flatten(1)

    return encode


def of_texts(encoder: VisionEncoder | TextEncoder) -> Callable[[Sequence[str]], Tensor]:
    """Return the encoder of N texts to [N, D]."""
    assert isinstance(encoder, Encoder | TextEncoder)
    device = next(encoder.parameters()).device

    def encode(texts: Sequence[str]) -> Tensor:
        tokens = {key: value.to(device) for key, value in encoder.tokenizer(texts).items()}
        return encoder.text_features(tokens)

    return encode


def warn_of_prefix(encoder: VisionEncoder | TextEncoder, dim: int) -> None:
    """Warn on stderr if the first `dim` features were not trained to be used alone."""
    trained = encoder.matryoshka if isinstance(encoder, Encoder) else []
    if dim not in trained:
        told = f"those of {', '.join(map(str, trained))} were" if trained else "none was"
        print(
            f"warning: a prefix of {dim} dimensions was not trained (clip.matryoshka), {told}",
            file=sys.stderr,
        )


def open_maker(facts: Facts, where: str = "", llm: str = "", trust_paths: bool = False) -> Artifact:
    """Open the artifact that made the embeddings; raises ArtifactError for another one.

    where: its folder or URL now, if it was moved. trust_paths: fetch it from a URL in the facts.
    """
    made = facts["artifact"]
    if not (where or trust_paths) and is_remote(made["where"]):
        raise ArtifactError(
            f"the embeddings were made with the artifact at {made['where']}: URLs that a file "
            "names are not fetched; give it as --artifact, or add --trust-paths"
        )
    try:
        artifact = open_artifact(where or made["where"], llm)
    except ArtifactError as error:
        if where:
            raise
        raise ArtifactError(f"{error}; give its folder or URL now as --artifact") from error
    if artifact.digest != made["digest"]:
        raise ArtifactError(
            f"{artifact.path} ({artifact.digest[:12]}) is not the {made['stage']} artifact that "
            f"the embeddings were made with ({made['digest'][:12]}): give that one as --artifact"
        )
    return artifact


def encode_query(artifact: Artifact, facts: Facts, query: str, device: torch.device) -> np.ndarray:
    """Encode a text, or a file of a picture or clip, to [1, D], reduced as the embeddings are.

    Raises ConfigError for a query that the artifact cannot encode, DataError for an unusable file.
    """
    if not query.strip():
        raise ConfigError("the query is empty: give a text, or the file of a picture or clip")
    encoder = restore_encoder(artifact).to(device)
    if isinstance(encoder, VisionEncoder):
        encoder.keep_rate = facts["keep_rate"] or encoder.keep_rate
    if ending_of(query) in MEDIA:
        return shaped(_picture(encoder, query), facts)
    if not isinstance(encoder, Encoder | TextEncoder):
        raise ConfigError(
            f"{artifact.path} is of stage {artifact.stage}, which encodes no text: give the "
            "file of a picture or clip"
        )
    return shaped(encoder.encode_text([query]).numpy(), facts)


def _picture(encoder: VisionEncoder | TextEncoder, name: str) -> np.ndarray:
    if isinstance(encoder, TextEncoder):
        raise ConfigError(f"{encoder.artifact.path} is of stage text: give a text as the query")
    data = data_of(encoder.artifact, 0)
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    try:
        pixels = load_pixels(open_corpus([name]).sample(0, 0, *size), data, None)[None]
    except BadSample as error:
        raise DataError(f"{Path(name)}: {error}") from error
    encode = encoder.encode_pixels if isinstance(encoder, Encoder) else encoder.features
    return encode(pixels).numpy()
