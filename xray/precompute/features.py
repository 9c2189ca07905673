"""Embeddings and caption scores of a pool's samples, for curation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards.columns import Columns
from data_pipelines.shards.sidecar import Sidecar, open_whole, pack_rows
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import find_captions
from xray.artifacts.encoders import Encoder, VisionEncoder
from xray.config import DataConfig
from xray.config.identity import hash_json
from xray.models.inference import recorded
from xray.precompute.config import FeaturesConfig
from xray.precompute.inference import Model, Pack, Place, Progress, write_from_model


def write_embeddings(
    source: Source,
    encoder: VisionEncoder,
    config: FeaturesConfig,
    data: DataConfig,
    progress: Progress | None = None,
) -> tuple[Sidecar, dict[str, int]]:
    """Write normalised features of images or clips, in the joint space if there is one.

    Columns: members [n] int32, embeddings [n, D] float32. Returns the sidecar, and the number of
    unreadable samples by cause.
    """
    encode, width = encoder.features, encoder.vision.embed_dim
    if isinstance(encoder, Encoder):
        encode, width = encoder.encode_pixels, encoder.options.embed_dim

    def embed(pixels: Tensor, places: Sequence[Place]) -> list[np.ndarray]:
        return list(encode(pixels).numpy())

    def pack(shard: int, rows: Mapping[int, np.ndarray]) -> Columns:
        members = np.array(sorted(rows), np.int32)
        embeddings = np.array([rows[member] for member in members.tolist()], np.float32)
        return {"members": members, "embeddings": embeddings.reshape(len(members), width)}

    encoder.precision = config.precision
    facts = {"kind": "embeddings", "artifact": encoder.artifact.digest}
    return _written(source, embed, pack, facts, config, data, progress)


def write_scores(
    source: Source,
    encoder: Encoder,
    config: FeaturesConfig,
    data: DataConfig,
    progress: Progress | None = None,
) -> tuple[Sidecar, dict[str, int]]:
    """Write the cosine of each caption and its image or clip in the joint space.

    Columns: score [T] float32, and ends per member. Returns the same as `write_embeddings`.
    """

    def score(pixels: Tensor, places: Sequence[Place]) -> list[np.ndarray]:
        captions = [find_captions(source, *place, config.captions) for place in places]
        flat = [caption for own in captions for caption in own]
        if not flat:
            return [np.empty(0, np.float32)] * len(places)
        sizes = torch.tensor([len(own) for own in captions])
        media = encoder.encode_pixels(pixels).repeat_interleave(sizes, dim=0)
        cosines = (media * encoder.encode_text(flat)).sum(dim=1)
        return [row.numpy() for row in cosines.split(sizes.tolist())]

    def pack(shard: int, rows: Mapping[int, np.ndarray]) -> Columns:
        none = np.empty(0, np.float32)
        members = range(len(source.index(shard)))
        scores, ends = pack_rows([rows.get(member, none) for member in members], np.float32)
        return {"score": scores, "ends": ends}

    encoder.precision = config.precision
    artifact = encoder.artifact.digest
    facts = {"kind": "scores", "artifact": artifact, "captions": config.captions}
    return _written(source, score, pack, facts, config, data, progress)


def _written(
    source: Source,
    model: Model,
    pack: Pack,
    facts: Mapping[str, Any],
    config: FeaturesConfig,
    data: DataConfig,
    progress: Progress | None,
) -> tuple[Sidecar, dict[str, int]]:
    """Open the sidecar of these facts, or write it."""
    facts = {
        **facts,
        **recorded(config.precision),
        "modality": source.modality,
        "animations": source.animations,
    }
    name = f"{facts['kind']}-{hash_json(facts)[:12]}"
    sidecar = open_whole(source, name)
    if sidecar is not None:
        return sidecar, {}
    return write_from_model(source, name, model, pack, facts, {}, data, config.batch_size, progress)
