"""Large weights in several files on a hub, which are joined bit for bit when they are fetched.

    text.safetensors  ->  text-00001-of-00003.safetensors ...  text.safetensors.index.json

Each file is valid by itself, and has whole tensors in the order of the one file. The index has that
file's header, as the manifest hashes the file as it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xray.errors import ArtifactError
from xray.files import replacing
from xray.records import parse_record

SHARD = 5_000_000_000  # bytes of the largest file, as transformers has it, if no tensor is larger
LONGEST_HEADER = 100_000_000  # bytes, as safetensors allows
CHUNK = 1 << 22  # bytes per read
ENDING = ".safetensors"


@dataclass(frozen=True)
class Layout:
    """Header of a safetensors file, and its tensors by name, in the order of their bytes."""

    header: bytes
    tensors: dict[str, dict[str, Any]]

    @property
    def start(self) -> int:
        """First byte after the header."""
        return 8 + len(self.header)


def index_name(name: str) -> str:
    """Return the name of the index of a split file."""
    return f"{name}.index.json"


def shard_name(name: str, number: int, count: int) -> str:
    """Return the name of a shard, whose numbers begin at 1."""
    return f"{name.removesuffix(ENDING)}-{number:05d}-of-{count:05d}{ENDING}"


def is_large(path: Path) -> bool:
    """Return True for weights that are split on a hub."""
    return path.name.endswith(ENDING) and path.stat().st_size > SHARD


def make_index(path: Path) -> bytes:
    """Return the content of the index of a file; the same file always has the same index."""
    layout, groups = _layout(path), _groups(path)
    names = {
        tensor: shard_name(path.name, number, len(groups))
        for number, group in enumerate(groups, 1)
        for tensor in group
    }
    total = path.stat().st_size - layout.start
    content = {
        "metadata": {"total_size": total, "header": layout.header.decode(), "shards": len(groups)},
        "weight_map": names,
    }
    return json.dumps(content, indent=1).encode()


def shards_of(index: bytes) -> list[str]:
    """List the names of the shards in an index that `make_index` made."""
    return sorted(set(json.loads(index)["weight_map"].values()))


def split(path: Path, folder: Path) -> list[Path]:
    """Write the shards of a file into a folder."""
    layout, groups = _layout(path), _groups(path)
    paths = []
    with path.open("rb") as file:
        for number, group in enumerate(groups, 1):
            first = layout.tensors[group[0]]["data_offsets"][0]
            last = layout.tensors[group[-1]]["data_offsets"][1]
            header = {}
            for name in group:
                start, end = layout.tensors[name]["data_offsets"]
                offsets = [start - first, end - first]
                header[name] = {**layout.tensors[name], "data_offsets": offsets}
            paths.append(folder / shard_name(path.name, number, len(groups)))
            with paths[-1].open("wb") as target:
                target.write(header_bytes(header))
                file.seek(layout.start + first)
                for piece in _pieces(file, last - first):
                    target.write(piece)
    return paths


def header_bytes(tensors: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the length and the header of a safetensors file with these tensors."""
    header = {"__metadata__": {"format": "pt"}, **tensors}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def join(index: bytes, name: str, target: Path, fetch: Callable[[str, Path], str | None]) -> str:
    """Write the file of an index to `target` and return its sha256.

    fetch: downloads a file by name, and returns None if there is none. Raises ArtifactError for an
    index that cannot be read, and for a missing shard.
    """
    try:
        metadata = parse_record(index, dict[str, Any])["metadata"]
        header, count = str(metadata["header"]).encode(), int(metadata["shards"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index_name(name)} cannot be read: {error}") from error
    digest = hashlib.sha256()
    with replacing(target) as temporary, temporary.open("wb") as file:
        for piece in (len(header).to_bytes(8, "little"), header):
            digest.update(piece)
            file.write(piece)
        for number in range(1, count + 1):
            own = shard_name(name, number, count)  # with its folder, as the index lies beside it
            shard = target.with_name(Path(own).name)
            try:
                if fetch(own, shard) is None:
                    raise ArtifactError(f"{own} is missing, which {index_name(name)} names")
                with shard.open("rb") as source:
                    source.seek(_layout(shard).start)
                    while piece := source.read(CHUNK):
                        digest.update(piece)
                        file.write(piece)
            finally:
                shard.unlink(missing_ok=True)
    return digest.hexdigest()


def _layout(path: Path) -> Layout:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        entries = json.loads(header)
        tensors = {k: v for k, v in entries.items() if k != "__metadata__"}
        ordered = sorted(tensors.items(), key=lambda item: item[1]["data_offsets"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path} is not a readable safetensors file: {error}") from error
    return Layout(header, dict(ordered))


def _groups(path: Path) -> list[list[str]]:
    """Deal the tensors of a file to shards, in order."""
    groups: list[list[str]] = []
    size = SHARD + 1
    for name, entry in _layout(path).tensors.items():
        start, end = entry["data_offsets"]
        if size + end - start > SHARD:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += end - start
    return groups


def _pieces(file: Any, size: int) -> Iterator[bytes]:
    while size > 0:
        piece = file.read(min(size, CHUNK))
        if not piece:
            raise ArtifactError("the file ended before its last tensor")
        size -= len(piece)
        yield piece
