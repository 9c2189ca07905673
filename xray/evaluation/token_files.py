"""Tokens of all samples of a source, in files that are mapped into memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.shards.source import Source
from xray.errors import DataError
from xray.models.inference import one_behind

Rows = np.ndarray  # memory-mapped, a row per sample


@contextmanager
def token_folder() -> Iterator[Path]:
    """Make a folder in TMPDIR for files of tokens, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="xray-tokens-") as folder:
        yield Path(folder)


def stored(
    source: Source,
    batches: Iterable[Mapping[str, Tensor]],
    path: Path,
    types: Mapping[str, Any] | None = None,
) -> dict[str, Rows]:
    """Store the tensors of a source's batches, in order: by name, a file PATH.NAME of N rows.

    types: numpy types by name; otherwise, a file has the type of its tensors. Raises DataError for
    a disk that is too small, and for numbers that are NaN or infinite.
    """
    files: dict[str, Rows] = {}
    done, until = 0, 0
    for _, batch in one_behind((None, batch) for batch in batches):
        for name, tensor in batch.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise DataError(f"{source.name}: the model's features are NaN or infinite")
            rows = tensor.numpy()
            if name not in files:
                kind = (types or {}).get(name, rows.dtype)
                files[name] = _mapped(Path(f"{path}.{name}"), kind, (len(source), *rows.shape[1:]))
            until = done + len(rows)
            files[name][done:until] = rows
        done = until
    return files


def _mapped(path: Path, kind: Any, shape: tuple[int, ...]) -> Rows:
    """Map a file of numbers, allocated in full: a full disk then raises instead of killing."""
    size = np.dtype(kind).itemsize * math.prod(shape)
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise DataError(
            f"{path.parent}: no room for {size / 1e9:.1f} GB of tokens ({error.strerror}): set "
            "TMPDIR to a folder on a larger disk"
        ) from error
    return np.memmap(path, kind, "r+", shape=shape)


def batch_of(rows: Rows, chosen: slice | np.ndarray, device: torch.device) -> Tensor:
    """Return some rows on a device; half floats become floats."""
    batch = torch.from_numpy(np.array(rows[chosen])).to(device)
    return batch.float() if batch.is_floating_point() else batch


def blocks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of up to `size` rows that cover `count` rows, in order."""
    return (slice(at, min(at + size, count)) for at in range(0, count, size))
