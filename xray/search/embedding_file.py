"""Embeddings in a file: one row per picture, clip or text, with its key and path.

X.parquet   columns key, path, (text,) embedding. An embedding is fixed-size binary, the numbers as
            in memory: lists of numbers are read several times slower, and use 4 bytes per int8
X.npy       only the rows, and X.npy.json with keys, facts and checksums

The facts describe the rows: dtype, dim, artifact, source. int8 has a scale and an offset per
dimension; binary holds the signs, eight dimensions per byte. `grid` is that of patch tokens: a row
is then [h, w, dim]. Rows that PCA projected have it in the facts, too (`xray.search.pca`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xray.errors import ConfigError, DataError, brief
from xray.files import NPY_DAMAGE, nearest_path, replacing, usual_mode
from xray.records import parse_record
from xray.search.pca import Pca
from xray.search.quantisation import STORED, quantise, row_length, row_shape

log = logging.getLogger("xray")
VERSION = 1
GROUP = 16_384  # rows per Parquet row group
GROUP_BYTES = 2**27  # of patch tokens in a group, which has fewer rows
ENDINGS = (".parquet", ".npy")
FACTS, DIGEST = b"xray", b"xray_sha256"  # of the schema's metadata
CHECKED = "\n], "  # ends the part of X.npy.json that has the checksum
Facts = dict[str, Any]
NEEDED: dict[str, Any] = {  # facts and their types
    **{name: int for name in ("version", "rows", "dim")},
    **{name: str for name in ("dtype", "modality")},
    **{name: dict for name in ("artifact", "source")},
    "keep_rate": float | int | None,
}


@dataclass(frozen=True)
class Names:
    """Names of rows: keys, paths, and for embeddings of texts the texts."""

    keys: list[str]
    paths: list[str]
    texts: list[str] | None = None


Block = tuple[np.ndarray, Names]  # rows [n, D] float32, and their names


def by_digest(facts: Mapping[str, Any]) -> Facts:
    """Return facts with only the digests of the artifact, the source and the PCA."""
    named = [name for name in ("artifact", "source", "pca") if facts.get(name)]
    return {**facts, **{name: facts[name]["digest"] for name in named}}


# writing --------------------------------------------------------------------------------------


def check_out(out: Path) -> None:
    """Raise ConfigError for a file name that ends in neither .parquet nor .npy."""
    if out.suffix not in ENDINGS:
        raise ConfigError(f"--out {out} must end in {' or '.join(ENDINGS)}")


def write_embeddings(out: Path, facts: Facts, blocks: Iterable[Block]) -> None:
    """Write blocks of `facts["rows"]` rows in all; the finished file appears in one rename."""
    write = _write_parquet if out.suffix == ".parquet" else _write_npy
    write(out, {"version": VERSION, **facts}, _grouped(blocks, rows_per_group(facts)))


def rows_per_group(facts: Mapping[str, Any]) -> int:
    """Return the number of rows of a group, or of a block with a checksum."""
    each = row_length(facts) * np.dtype(STORED[facts["dtype"]]).itemsize
    return min(GROUP, max(1, GROUP_BYTES // each)) if "grid" in facts else GROUP


def _grouped(blocks: Iterable[Block], least: int) -> Iterator[Block]:
    """Yield the same rows in blocks of at least `least` rows; only the last may be smaller."""
    held: list[Block] = []
    for block in blocks:
        held.append(block)
        if sum(len(rows) for rows, _ in held) >= least:
            yield _joined(held)
            held = []
    if held:
        yield _joined(held)


def _joined(blocks: Sequence[Block]) -> Block:
    names = [block[1] for block in blocks]
    texts = None
    if names[0].texts is not None:
        texts = [text for own in names for text in own.texts or ()]
    keys = [key for own in names for key in own.keys]
    paths = [path for own in names for path in own.paths]
    return np.concatenate([rows for rows, _ in blocks]), Names(keys, paths, texts)


def _write_parquet(out: Path, facts: Facts, blocks: Iterable[Block]) -> None:
    width = row_length(facts) * np.dtype(STORED[facts["dtype"]]).itemsize
    texts = ["text"] if facts["modality"] == "text" else []
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("key", "path", *texts)]
    fields.append(pa.field("embedding", pa.binary(width), nullable=False))
    content = json.dumps(facts).encode()
    digest = hashlib.sha256(content).hexdigest().encode()
    schema = pa.schema(fields, metadata={FACTS: content, DIGEST: digest})
    # embeddings do not compress: stored plain, they are read in place
    packing: Any = {name: "zstd" for name in ("key", "path", *texts)} | {"embedding": "none"}
    with (
        replacing(out) as temporary,
        usual_mode(temporary),
        pq.ParquetWriter(
            temporary,
            schema,
            compression=packing,
            use_dictionary=["path"],
            write_statistics=False,
            write_page_checksum=True,
        ) as writer,
    ):
        for rows, names in blocks:
            stored = np.ascontiguousarray(quantise(rows, facts))
            buffers = [None, pa.py_buffer(stored)]
            columns = [pa.array(names.keys, pa.string()), pa.array(names.paths, pa.string())]
            columns += [pa.array(names.texts, pa.string())] if texts else []
            columns.append(pa.Array.from_buffers(pa.binary(width), len(stored), buffers))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), len(stored))


def _write_npy(out: Path, facts: Facts, blocks: Iterable[Block]) -> None:
    shape = (facts["rows"], *row_shape(facts))
    header = {"descr": np.dtype(STORED[facts["dtype"]]).str, "fortran_order": False, "shape": shape}
    with (
        replacing(out) as rows_file,  # renamed last: its presence means that both are complete
        usual_mode(rows_file),
        replacing(_names_of(out)) as names_file,
        usual_mode(names_file),
        names_file.open("w", encoding="utf-8") as lines,
        rows_file.open("wb") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        digest, sums = hashlib.sha256(), []

        def write(text: str) -> None:
            digest.update(text.encode())
            lines.write(text)

        write(f'{{"xray": {json.dumps(facts)},\n"rows": [')
        start = "\n"
        for rows, names in blocks:
            stored = np.ascontiguousarray(quantise(rows, facts)).tobytes()
            file.write(stored)
            sums.append((len(rows), zlib.crc32(stored)))
            columns = [names.keys, names.paths, *([names.texts] if names.texts else [])]
            for row in zip(*columns, strict=True):
                write(start + json.dumps(row))
                start = ",\n"
        lines.write(f'{CHECKED}"crc32": {json.dumps(sums)}, "sha256": "{digest.hexdigest()}"}}\n')


def _names_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.json")


# reading --------------------------------------------------------------------------------------


class Embeddings(ABC):
    """Rows of a file that are not held in memory: memory-mapped, or read by group.

    Every method raises DataError for a part of the file that is damaged.
    """

    facts: Facts

    def __init__(self, path: Path) -> None:
        self._path = path
        with _readable(path):
            self._open(path)
            _check_facts(self.facts)

    def __len__(self) -> int:
        return int(self.facts["rows"])

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield all rows in their stored dtype, in order, by chunk."""
        with _readable(self._path):
            yield from self._chunks()

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return some rows in their stored dtype."""
        with _readable(self._path):
            return self._take(rows)

    def names(self, rows: Sequence[int]) -> Names:
        """Return the names of some rows."""
        with _readable(self._path):
            return self._names(rows)

    @abstractmethod
    def _open(self, path: Path) -> None: ...

    @abstractmethod
    def _chunks(self) -> Iterator[np.ndarray]: ...

    @abstractmethod
    def _take(self, rows: np.ndarray) -> np.ndarray: ...

    @abstractmethod
    def _names(self, rows: Sequence[int]) -> Names: ...


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise DataError that names a file, for the errors of a damaged one."""
    try:
        yield
    except (OSError, pa.ArrowException, *NPY_DAMAGE) as error:
        detail = brief(error)
        raise DataError(
            f"{path} is not a sound embedding file: {detail}; make it again with xray embed"
        ) from error


def _check_digest(path: Path, content: bytes, digest: str | None) -> None:
    """Raise ValueError for facts or names that differ from their sha256; warn if there is none."""
    if not digest:
        log.warning("%s: an older version wrote it without checksums, so damage is not found", path)
    elif hashlib.sha256(content).hexdigest() != digest:
        raise ValueError("it is damaged: its facts or names do not have their checksum")


def _check_facts(facts: Any) -> None:
    """Raise ValueError for facts that lack one or have another type."""
    for name, kind in NEEDED.items():
        if not isinstance(facts[name], kind):
            raise ValueError(f"its {name} is {facts[name]!r}")
    if facts["version"] != VERSION:
        raise ValueError(f"it has version {facts['version']}, and this xray reads {VERSION}")
    Pca.of(facts)


def is_embedding_file(path: Path) -> bool:
    """Check the name of a file, and of a parquet file the facts: without, it is a list of files.

    A file that is missing or damaged is taken for one of embeddings.
    """
    if path.suffix != ".parquet" or not path.is_file():
        return path.suffix in ENDINGS
    try:
        return FACTS in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        return True


def open_embeddings(path: Path) -> Embeddings:
    """Open a file of embeddings; raises DataError for any other file."""
    if path.suffix not in ENDINGS:
        raise DataError(f"{path} is not an embedding file: it must end in {' or '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"{path} does not exist{nearest_path(path)}")
    return ParquetEmbeddings(path) if path.suffix == ".parquet" else NpyEmbeddings(path)


class NpyEmbeddings(Embeddings):
    """X.npy, memory-mapped."""

    def _open(self, path: Path) -> None:
        text = _names_of(path).read_bytes()
        content = parse_record(text, dict[str, Any])
        checked = text.rpartition(CHECKED.encode())[0]
        _check_digest(path, checked, content.get("sha256"))
        self.facts, self._listed = content["xray"], content["rows"]
        self.rows = np.lib.format.open_memmap(path, mode="r")
        if self.rows.shape != (len(self), *row_shape(self.facts)):
            raise ValueError(f"its rows are {self.rows.shape}, and {_names_of(path)} is of others")

        blocks = [(min(GROUP, len(self) - start), None) for start in range(0, len(self), GROUP)]
        blocks = content.get("crc32", blocks)  # (rows, checksum); older files have no checksums
        self.ends = np.cumsum([rows for rows, _ in blocks], dtype=np.int64)
        if self.ends[-1:].sum() != len(self):
            raise ValueError(f"its checksums are of {self.ends[-1:].sum()} rows")
        self._sums = dict(enumerate(checksum for _, checksum in blocks))

    def _chunks(self) -> Iterator[np.ndarray]:
        for number in range(len(self.ends)):
            yield self._chunk(number)

    def _chunk(self, number: int) -> np.ndarray:
        """Return the rows of a block; compares them with their checksum the first time."""
        start, end = self.ends[number - 1] if number else 0, self.ends[number]
        rows = self.rows[start:end]
        checksum = self._sums.pop(number, None)
        if checksum is not None and zlib.crc32(rows.data) != checksum:
            raise ValueError(f"it is damaged: rows {start:,} to {end:,} differ from their checksum")
        return rows

    def _take(self, rows: np.ndarray) -> np.ndarray:
        for number in np.unique(np.searchsorted(self.ends, rows, side="right")).tolist():
            self._chunk(number)
        return np.asarray(self.rows[rows])

    def _names(self, rows: Sequence[int]) -> Names:
        found = [self._listed[row] for row in rows]
        texts = [row[2] for row in found] if self.facts["modality"] == "text" else None
        return Names([row[0] for row in found], [row[1] for row in found], texts)


class ParquetEmbeddings(Embeddings):
    """X.parquet, read by row group."""

    def _open(self, path: Path) -> None:
        self.file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        metadata = self.file.schema_arrow.metadata or {}
        _check_digest(path, metadata[FACTS], metadata.get(DIGEST, b"").decode())
        self.facts = parse_record(metadata[FACTS], dict[str, Any])
        meta = self.file.metadata
        counts = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self.ends = np.cumsum(counts, dtype=np.int64)
        if meta.num_rows != len(self):
            raise ValueError(f"it has {meta.num_rows} rows of {len(self)}")
        width = row_length(self.facts) * np.dtype(STORED[self.facts["dtype"]]).itemsize
        if self.file.schema_arrow.field("embedding").type.byte_width != width:
            raise ValueError(f"its rows do not have dim={self.facts['dim']} of its facts")

    def _chunks(self) -> Iterator[np.ndarray]:
        for group in range(len(self.ends)):
            yield self._stored(group)

    def _stored(self, group: int) -> np.ndarray:
        column = self.file.read_row_group(group, ["embedding"]).column(0)
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        dtype, length = STORED[self.facts["dtype"]], row_length(self.facts)
        flat = np.frombuffer(array.buffers()[1], dtype)[array.offset * length :]
        return cast(np.ndarray, flat[: len(array) * length].reshape(-1, *row_shape(self.facts)))

    def _by_group(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (row group, places in `rows`, their rows in the group)."""
        groups = np.searchsorted(self.ends, rows, side="right")
        for group in np.unique(groups).tolist():
            places = np.flatnonzero(groups == group)
            yield group, places, rows[places] - (self.ends[group - 1] if group else 0)

    def _take(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *row_shape(self.facts)), STORED[self.facts["dtype"]])
        for group, places, own in self._by_group(rows):
            found[places] = self._stored(group)[own]
        return found

    def _names(self, rows: Sequence[int]) -> Names:
        wanted = ["key", "path", *(["text"] if self.facts["modality"] == "text" else [])]
        columns: dict[str, list[str]] = {name: [""] * len(rows) for name in wanted}
        for group, places, own in self._by_group(np.asarray(rows)):
            picked = self.file.read_row_group(group, wanted).take(own)
            for name in wanted:
                for place, value in zip(places, picked.column(name).to_pylist(), strict=True):
                    columns[name][place] = value
        return Names(columns["key"], columns["path"], columns.get("text"))
