"""Compression: recall of shortened and quantised embeddings against the bytes of each.

Embeddings are reduced to fewer dimensions, by a prefix of the features or by PCA, normalised again
and stored as numbers of fewer bits, as `xray embed` stores them. Queries are reduced by the same,
and stay fp32. PCA is fitted on other images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xray.errors import ConfigError, DataError
from xray.evaluation.confidence import share
from xray.evaluation.datasets import Sets
from xray.evaluation.retrieval import KS, Ranking, captioned_of, kinds_of, retrieval
from xray.evaluation.suite import Measures
from xray.evaluation.suites.compression import CompressionConfig
from xray.evaluation.suites.retrieval import DIRECTIONS
from xray.progress import progress_of
from xray.search.pca import Pca
from xray.search.quantisation import (
    STORED,
    Dtype,
    calibrate,
    quantise,
    restored,
    row_length,
    shortened,
)

WHOLE: tuple[Dtype, ...] = ("fp32", "fp16", "int8", "binary")
REDUCED: tuple[Dtype, ...] = ("fp32", "int8", "binary")
FEWEST = 20  # images with a hit, below which a ratio of recalls says nothing

Reduce = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Normalised features of images [N, D] and of their captions [M, D].

    owner: [M], the image of each caption. kind: [M], equal for captions with the same images, or
    None.
    """

    images: Tensor
    texts: Tensor
    owner: Tensor
    kind: Tensor | None


def compression_of(sets: Sets, config: CompressionConfig) -> Measures:
    """Measure the recall of compressed embeddings on the data sets of the suite.

    Samples without captions are left out, and counted as `uncaptioned`.
    """
    dims, own = dims_of(sets, config), captioned_of("compression", sets, config)
    images = sets.features(own.source, "joint").rows[own.samples]
    pairs = Pairs(images, sets.texts(own.texts), own.owner, kinds_of(own.texts, config.same))
    pca = None
    if config.train:
        train = sets.features(config.open(sets, "compression.train", "train"), "joint")
        pca = Pca.fit(part.numpy() for part in train.rows.split(2**16))
    measures = compression(pairs, dims, sets.joint.matryoshka, pca)
    if own.left_out:
        measures["uncaptioned"] = float(own.left_out)
    return measures


def check_compression(sets: Sets, config: CompressionConfig) -> None:
    """Raise the errors of captions and dimensions that are known without decoding pictures."""
    dims = dims_of(sets, config)
    captioned_of("compression", sets, config)
    if config.train:
        samples = len(config.open(sets, "compression.train", "train"))
        if samples <= dims[0]:
            raise DataError(
                f"eval.compression.train has {samples:,} samples: PCA to {dims[0]} dimensions "
                "needs more"
            )


def dims_of(sets: Sets, config: CompressionConfig) -> list[int]:
    """List the numbers of dimensions, largest first; ConfigError for one the artifact lacks."""
    width = sets.joint.options.embed_dim
    dims = config.dims or [*sets.joint.matryoshka] or [width // 2, width // 4, width // 8]
    if max(dims) >= width:
        raise ConfigError(f"eval.compression.dims={dims}: the artifact has {width} dimensions")
    return sorted({*dims}, reverse=True)


def compression(
    pairs: Pairs, dims: Sequence[int], trained: Sequence[int], pca: Pca | None
) -> dict[str, float]:
    """Measure R@k in both directions for each way to store the embeddings, and its bytes.

    trained: Matryoshka prefixes. Keys are MEASURE/VARIANT, such as text_to_image_R@10/pca64_int8.
    `_kept` is the recall relative to that of all features in fp32, with the interval of the ratio:
    both are resampled together.
    """
    whole = retrieval(pairs.images, pairs.texts, pairs.owner, KS, pairs.kind)
    measures = {key: whole[key] for key in whole if key in ("images", "texts") or "chance" in key}
    variants = [*_variants(pairs.images.shape[1], dims, trained, pca)]
    first: dict[str, Tensor] = {}
    for name, reduce, dtype in progress_of("compression")(variants, len(variants)):
        images, texts = (reduce(rows.numpy()) for rows in (pairs.images, pairs.texts))
        facts = facts_of(images, dtype)
        measures[f"bytes/{name}"] = float(row_length(facts) * np.dtype(STORED[dtype]).itemsize)
        hits = _hits(images, texts, pairs, dtype)
        first = first or {key: own for key, (own, _) in hits.items()}
        for key, (own, weights) in hits.items():
            found = share(key, own, weights)
            if own is not first[key] and int((first[key] > 0).sum()) >= FEWEST:
                found |= share(f"{key}_kept", own, first[key])
            measures |= {f"{part}/{name}": value for part, value in found.items()}
    return measures


def _variants(
    width: int, dims: Sequence[int], trained: Sequence[int], pca: Pca | None
) -> Iterator[tuple[str, Reduce, Dtype]]:
    """Yield (name, function that reduces rows, dtype), the uncompressed one first."""
    for dtype in WHOLE:
        yield f"full{width}_{dtype}", np.asarray, dtype
    for dim in dims:
        prefix = "matryoshka" if dim in trained else "prefix"
        ways: dict[str, Reduce] = {prefix: partial(shortened, dim=dim)}
        if pca is not None:
            ways["pca"] = pca.first(dim).project
        for dtype in REDUCED:
            yield from ((f"{way}{dim}_{dtype}", own, dtype) for way, own in ways.items())


def facts_of(rows: np.ndarray, dtype: Dtype) -> dict[str, Any]:
    """Return the facts that rows [N, D] are stored by; int8 is calibrated on the rows."""
    facts: dict[str, Any] = {"dtype": dtype, "dim": rows.shape[1]}
    if dtype == "int8":
        facts["scale"], facts["offset"] = calibrate(rows.min(axis=0), rows.max(axis=0))
    return facts


def _hits(
    images: np.ndarray, texts: np.ndarray, pairs: Pairs, dtype: Dtype
) -> dict[str, tuple[Tensor, Tensor]]:
    """Find hits [N] by measure, and their weights: fp32 queries search stored rows."""

    def stored(rows: np.ndarray) -> Tensor:
        facts = facts_of(rows, dtype)
        return torch.from_numpy(restored(quantise(rows, facts), facts))

    queries = torch.from_numpy(images), torch.from_numpy(texts)
    ranking = Ranking.of(*queries, pairs.owner, pairs.kind, (stored(images), stored(texts)))
    return {f"{way}_R@{k}": ranking.hits(way, k) for k in KS for way in DIRECTIONS}
