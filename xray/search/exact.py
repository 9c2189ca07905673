"""Exact search over embeddings: compares every row, in chunks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xray.errors import ConfigError
from xray.search.embedding_file import Embeddings, by_digest
from xray.search.quantisation import quantise, restored

ROWS = 2048  # per comparison: 4 MB of fp32 at 512 dimensions, which fits a core's cache
OVERSAMPLE = 4
SAME_ROWS = ["artifact", "source", "rows", "left_out", "dim", "pca", "grid"]
SAME_ROWS += ["keep_rate", "captions", "modality"]


@dataclass(frozen=True)
class Hits:
    """Best rows of each query, best first: rows [Q, k] int64, scores [Q, k] (cosines)."""

    rows: np.ndarray
    scores: np.ndarray


def search(
    embeddings: Embeddings,
    queries: np.ndarray,
    top: int,
    oversample: int = OVERSAMPLE,
    rescore: Embeddings | None = None,
) -> Hits:
    """Find the rows of highest cosine with each query [Q, D], normalised float32.

    Binary rows: the `oversample` * `top` nearest by Hamming distance are ranked again by the cosine
    of the query with their signs (Yamada et al., 2106.00882); oversample = 1 keeps the Hamming
    ranking. rescore: the same rows in a finer dtype, used to rank that many candidates again.
    """
    k = min(top, len(embeddings))
    binary = embeddings.facts["dtype"] == "binary"
    again = rescore if rescore is not None else embeddings if binary and oversample > 1 else None
    wanted = min(len(embeddings), k * oversample) if again is not None else k
    compare = _by_bits if binary else _by_cosine
    best = _Best(wanted)
    with _one_thread():
        for start, values in compare(embeddings, queries):
            best.add(start, values)
    rows, values = best.rows.numpy(), best.values
    if again is None:
        cosines = values.numpy()
        if binary:  # the values hold Hamming distances, as `_by_bits` makes them
            distance = -cosines >> 40
            cosines = (1 - 2 * distance / embeddings.facts["dim"]).astype(np.float32)
        return Hits(rows, cosines)
    scores = np.empty((len(queries), k), np.float32)
    chosen = np.empty((len(queries), k), np.int64)
    for number, candidates in enumerate(rows):
        found = restored(again.take(candidates), again.facts) @ queries[number]
        order = np.argsort(-found, kind="stable")[:k]
        chosen[number], scores[number] = candidates[order], found[order]
    return Hits(chosen, scores)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: it saturates memory bandwidth, and several wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_same_rows(embeddings: Embeddings, other: Embeddings) -> None:
    """Raise ConfigError unless two files have the same samples, artifact, dim and PCA.

    Their folders may differ.
    """
    one, two = by_digest(embeddings.facts), by_digest(other.facts)
    for name in SAME_ROWS:
        ours, theirs = one.get(name), two.get(name)
        if ours != theirs:
            raise ConfigError(f"--rescore has other rows ({name}: {theirs}, not {ours})")


class _Best:
    """Best rows so far: values and rows [Q, k]."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.values, self.rows = torch.empty(0), torch.empty(0)

    def add(self, start: int, values: Tensor) -> None:
        """Add the values [Q, n] of the rows from `start`."""
        found, places = values.topk(min(self.k, values.shape[1]), dim=1)
        places = places + start
        if start:
            found, places = torch.cat([self.values, found], 1), torch.cat([self.rows, places], 1)
        self.values, order = found.topk(min(self.k, found.shape[1]), dim=1)
        self.rows = places.gather(1, order)


def _by_cosine(embeddings: Embeddings, queries: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, [Q, n] products) of all chunks; int8: sum of q (c scale + offset)."""
    facts, asked = embeddings.facts, torch.from_numpy(queries)
    shift = torch.zeros(len(asked), 1)
    if facts["dtype"] == "int8":
        shift = asked @ torch.tensor(facts["offset"], dtype=torch.float32)[:, None]
        asked = asked * torch.tensor(facts["scale"], dtype=torch.float32)
    room = torch.empty(ROWS, facts["dim"])  # reused: allocation is slow
    start = 0
    for chunk in embeddings.chunks():
        for at in range(0, len(chunk), ROWS):
            rows = _tensor(chunk[at : at + ROWS])
            if facts["dtype"] != "fp32":
                rows = room[: len(rows)].copy_(rows)
            yield start, (rows @ asked.t()).t() + shift
            start += len(rows)


def _tensor(rows: np.ndarray) -> Tensor:
    """Return memory-mapped rows as a tensor, which is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(rows)


def _by_bits(embeddings: Embeddings, queries: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, [Q, n]) of all chunks: Hamming distance and row in one number.

    Higher is better; of equally near rows the first is best.
    """
    asked = _words(quantise(queries, embeddings.facts))
    start = 0
    for chunk in embeddings.chunks():
        words, rows = _words(chunk), np.arange(start, start + len(chunk))
        values = np.empty((len(asked), len(chunk)), np.int64)
        for number, query in enumerate(asked):
            distance = np.bitwise_count(words ^ query).sum(axis=1, dtype=np.int64)
            values[number] = -((distance << 40) | rows)
        yield start, torch.from_numpy(values)
        start += len(chunk)


def _words(stored: np.ndarray) -> np.ndarray:
    """Return bytes [n, w] as the widest words that fit."""
    size = next(size for size in (8, 4, 2, 1) if stored.shape[1] % size == 0)
    return np.ascontiguousarray(stored).view(f"u{size}")
