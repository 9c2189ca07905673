"""Memory-mapped tables of columns in one file, used for shard indexes, manifests and sidecars.

The file format is safetensors: a JSON header, then the columns. Texts are packed in two columns:
the UTF-8 bytes of all texts, and the end of each text in them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from xray.files import replacing, unique_temporary, usual_mode

DTYPES = {
    "I64": np.int64, "I32": np.int32, "U8": np.uint8, "F32": np.float32,
    "I8": np.int8, "U16": np.uint16,
}  # fmt: skip
Columns = dict[str, np.ndarray]


def save_columns(path: Path, columns: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write columns and facts to a file, atomically.

    columns: arrays of one of the types in DTYPES. facts: values for JSON. Raises OSError.
    """
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    try:
        with replacing(path, unique_temporary(path)) as temporary, usual_mode(temporary):
            save_file(contiguous, temporary, metadata={"facts": json.dumps(facts)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def open_columns(path: Path) -> tuple[Columns, dict[str, Any]]:
    """Map a file's columns, and read its facts; raises OSError, ValueError or KeyError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{path} is not a table of columns")
        header = json.loads(file.read(length))
    facts = json.loads(header.pop("__metadata__")["facts"])
    body = np.memmap(path, np.uint8, "r", offset=8 + length) if header else np.empty(0, np.uint8)
    columns = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        columns[name] = np.asarray(body[begin:end]).view(DTYPES[entry["dtype"]])
        columns[name] = columns[name].reshape(entry["shape"])
    return columns, facts


def open_first(paths: Iterable[Path], wanted: Mapping[str, Any]) -> tuple[Columns, dict[str, Any]]:
    """Open the first readable file whose facts contain `wanted`; ({}, {}) if there is none."""
    for path in paths:
        with contextlib.suppress(OSError, ValueError, KeyError):
            columns, facts = open_columns(path)
            if wanted.items() <= facts.items():
                return columns, facts
    return {}, {}


def pack_texts(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pack texts as (bytes [total] uint8, ends [n] int64)."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def text_at(blob: np.ndarray, ends: np.ndarray, number: int) -> str:
    """Return the packed text at a position."""
    start = int(ends[number - 1]) if number else 0
    return blob[start : int(ends[number])].tobytes().decode("utf-8", "surrogateescape")


def unpack_texts(blob: np.ndarray, ends: np.ndarray) -> list[str]:
    """Return all packed texts."""
    whole, bounds = blob.tobytes(), [0, *ends.tolist()]
    return [whole[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise(bounds)]
