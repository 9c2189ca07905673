"""Manifests of many shards without files, for benchmarks at scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.shards.columns import pack_texts, save_columns
from data_pipelines.shards.manifest import MANIFEST_VERSION
from data_pipelines.shards.tar_index import INDEX_VERSION

GROUP = 8  # shards shuffled together, the default of data.shuffle_shards


def write_manifest(
    path: Path, names: Sequence[str], mtimes: np.ndarray, counts: np.ndarray
) -> None:
    """Write a manifest in the real format for shards that are never read.

    mtimes, counts: modification time and number of samples of each shard.
    """
    blob, ends = pack_texts(names)
    no_digest = np.zeros((len(names), 32), np.uint8)
    columns = {"names": blob, "name_ends": ends, "mtimes": mtimes}
    columns |= {"sizes": np.zeros(len(names), np.int64), "digests": no_digest, "sha256": no_digest}
    columns["counts"] = np.repeat(counts.astype(np.int32)[:, None], 4, axis=1)
    versions = {"version": MANIFEST_VERSION, "index_version": INDEX_VERSION}
    save_columns(path, columns, {**versions, "digest": "none"})


def uneven(shards: int, samples: int) -> np.ndarray:
    """Draw samples per shard between 0.5 and 1.5 times the mean, with the sum `samples`."""
    mean = samples // shards
    counts = np.random.default_rng(0).integers(mean // 2, mean + mean // 2 + 1, shards)
    step = np.sign(samples - counts.sum())
    counts[: abs(samples - counts.sum()) % shards] += step
    return counts + (samples - counts.sum()) // shards
