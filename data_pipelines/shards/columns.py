"""Memory-mapped tables of columns in one file, used for shard indexes, manifests and sidecars.

The file format is safetensors: a JSON header, then the columns. Texts are packed in two columns:
the UTF-8 bytes of all texts, and the end of each text in them. The metadata in the header holds the
facts. Among them is a checksum of facts and columns, which is verified when a process first opens
the file.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from data_pipelines.shards.side_files import make_side_folder
from xray.errors import DataError, brief
from xray.files import replacing_shared, usual_mode

log = logging.getLogger("xray")
CHECKSUM = "checksum"  # the fact that holds it, which callers do not see
LONGEST_HEADER = 100_000_000  # bytes, as in safetensors
VERIFIED = 1 << 16  # files that a process remembers to have verified
DTYPES = {
    "I64": np.int64, "I32": np.int32, "U8": np.uint8, "F32": np.float32,
    "I8": np.int8, "U16": np.uint16,
}  # fmt: skip
Columns = dict[str, np.ndarray]


def save_columns(path: Path, columns: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Write columns and facts to a file, atomically.

    columns: arrays of one of the types in DTYPES. facts: values for JSON. Raises OSError, and
    DataError if its folder cannot be created.
    """
    make_side_folder(path.parent)
    contiguous = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    # One entry: safetensors writes several in any order, and equal content is to be equal bytes.
    facts = {**facts, CHECKSUM: _checksum(contiguous, facts)}
    metadata = {"facts": json.dumps(facts)}
    try:
        with replacing_shared(path) as temporary, usual_mode(temporary):
            save_file(contiguous, temporary, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def open_columns(path: Path) -> tuple[Columns, dict[str, Any]]:
    """Map a file's columns, and read its facts.

    Raises OSError, or ValueError for a file that is damaged or no such table. A file without
    checksum, of an older version, is opened with a warning, once for each kind of file in a folder.
    """
    try:
        columns, facts, identity = _mapped(path)
        checksum = facts.pop(CHECKSUM, None)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a table of columns: {brief(error)}") from error
    if checksum is None:
        _warn_of_no_checksum(path.parent, path.suffix)
    else:
        _verify(path, identity)
    return columns, facts


def _mapped(path: Path) -> tuple[Columns, dict[str, Any], tuple[int, ...]]:
    """Map a file: columns, facts with their checksum, and the identity of the file."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if length > min(status.st_size, LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        facts = json.loads(header.pop("__metadata__")["facts"])
        mapped = np.memmap(file, np.uint8, "r", offset=8 + length) if header else None
    body = np.empty(0, np.uint8) if mapped is None else mapped
    columns = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        columns[name] = np.asarray(body[begin:end]).view(DTYPES[entry["dtype"]])
        columns[name] = columns[name].reshape(entry["shape"])
    return columns, facts, (status.st_ino, status.st_size, status.st_mtime_ns)


def _checksum(columns: Columns, facts: Mapping[str, Any]) -> str:
    """Return the sha256 of columns, with their names, types and shapes, and of the facts."""
    state = hashlib.sha256(json.dumps(facts).encode())
    for name in sorted(columns):
        column = columns[name]
        state.update(f"\0{name}\0{column.dtype}\0{column.shape}\0".encode())
        state.update(column.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


@functools.lru_cache(maxsize=VERIFIED)
def _verify(path: Path, identity: tuple[int, ...]) -> None:
    """Compare a file with its checksum; identity: of the file. Raises ValueError."""
    columns, facts, _ = _mapped(path)
    if facts.pop(CHECKSUM) != _checksum(columns, facts):
        raise ValueError(f"{path} is damaged: its content does not have its checksum")


@functools.cache
def _warn_of_no_checksum(folder: Path, ending: str) -> None:
    if multiprocessing.parent_process() is None:  # workers open the files that their parent opens
        log.warning(
            "%s/*%s: written by an older version without checksums, so damage in these files is "
            "not noticed; the command that wrote them adds checksums",
            *(folder, ending),
        )


def open_first(
    paths: Iterable[Path],
    wanted: Mapping[str, Any],
    check: Callable[[Path, Columns, Mapping[str, Any]], None] | None = None,
) -> tuple[Columns, dict[str, Any]]:
    """Open the first readable file whose facts contain `wanted`; ({}, {}) if there is none.

    check: raises ValueError for impossible content. A damaged file is passed over with a warning.
    """
    for path in paths:
        try:
            columns, facts = open_columns(path)
            if wanted.items() <= facts.items():
                if check is not None:
                    check(path, columns, facts)
                return columns, facts
        except OSError:
            continue
        except ValueError as error:
            log.warning("%s; it is not used", error)
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
    """Return all packed texts; raises DataError if they overlap, which would multiply them."""
    if len(ends) and (ends[0] < 0 or ends[-1] > len(blob) or (ends[1:] < ends[:-1]).any()):
        raise DataError("the names in an index are damaged: write it again with xray data index")
    whole, bounds = blob.tobytes(), [0, *ends.tolist()]
    return [whole[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise(bounds)]
