"""Encodes a query, a text or a picture, with the artifact that made the embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.ingest.listing import MEDIA, ending_of
from data_pipelines.ingest.user_data import open_corpus
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import Encoder, TextEncoder, VisionEncoder, data_of, restore_encoder
from xray.config.schedule import value_at
from xray.errors import ArtifactError, BadSample, ConfigError, DataError
from xray.search.embedding_file import Facts, shortened


def open_maker(facts: Facts, where: str = "", llm: str = "") -> Artifact:
    """Open the artifact that made the embeddings; raises ArtifactError for another one.

    where: its folder or URL now, if it was moved.
    """
    made = facts["artifact"]
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
    """Encode a text, or a file of a picture or clip, to [1, D], shortened like the embeddings.

    Raises ConfigError for a query that the artifact cannot encode, DataError for an unusable file.
    """
    if not query.strip():
        raise ConfigError("the query is empty: give a text, or the file of a picture or clip")
    encoder = restore_encoder(artifact).to(device)
    if isinstance(encoder, VisionEncoder):
        encoder.keep_rate = facts["keep_rate"] or encoder.keep_rate
    if ending_of(query) in MEDIA:
        return shortened(_picture(encoder, query), facts["dim"])
    if not isinstance(encoder, Encoder | TextEncoder):
        raise ConfigError(
            f"{artifact.path} is of stage {artifact.stage}, which encodes no text: give the "
            "file of a picture or clip"
        )
    return shortened(encoder.encode_text([query]).numpy(), facts["dim"])


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
