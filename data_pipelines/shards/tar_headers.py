"""Reads the headers of a tar: name, kind and place of every member.

Every number of a header is bounded by the size of the file before it is used. tarfile is not used
for this: it follows a negative size backwards for ever, reads an extended header of any length into
memory, takes the map of a sparse file for its content, and stops at the first end marker although
another archive may follow (`cat a.tar b.tar`).

Source: POSIX.1-2017, pax, "ustar Interchange Format"; the manual of GNU tar, "Basic Tar Format".
"""

from __future__ import annotations

import posixpath
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

BLOCK = 512
RECORD = 20 * BLOCK  # a tar is padded to a multiple of it
MAGIC = b"ustar"
PIECE = 1 << 20  # bytes of zeros read at a time
MOST_EXTENDED = 1 << 20  # bytes of one extended header: a long name, or pax records
# Fields: name, size, checksum, type, target of a link, magic, prefix of the name.
FIELDS = struct.Struct("100s24x12s12x8sc100s6s82x155s12x")
OCTAL, DECIMAL = re.compile(rb"[0-7]{0,12}"), re.compile(rb"[0-9]{1,19}")
FILES, LINKS, FOLDERS = b"07\x00", b"12", b"5DV"  # types; V is the label of a volume
WITHOUT_CONTENT = b"123456"  # whatever size their header gives
PAX, PAX_OF_ALL, LONG_NAME, LONG_LINK, SPARSE = b"xX", b"g", b"L", b"K", b"S"
SPARSE_NAME = b"GNU.sparse.name"
SPARSE_RECORDS = (b"GNU.sparse.", b"SCHILY.realsize")
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}

Kind = Literal["file", "link", "folder", "sparse", "special"]


class DamagedTar(Exception):  # noqa: N818 - not for the user: `build_index` names the shard
    """Tar whose headers cannot be followed to its end."""


class Member(NamedTuple):
    """Member of a tar; offset and size of its content in bytes."""

    name: str
    kind: Kind
    offset: int
    size: int
    target: str  # of a link: a path in the tar
    archive: int  # number of the archive, in a file of several


def compression(path: Path) -> tuple[str, str] | None:
    """Return (name of the compression, program that unpacks it); None if there is none."""
    with path.open("rb") as file:
        start = file.read(8)
    return next((names for magic, names in COMPRESSED.items() if start.startswith(magic)), None)


def read_members(file: BinaryIO, length: int) -> Iterator[Member]:
    """Yield the members of a tar of `length` bytes in order, also behind an end marker.

    Raises DamagedTar.
    """
    position = archive = 0
    extended: dict[bytes, bytes] = {}  # of the next member
    while position < length:
        block = _bytes_at(file, position, min(BLOCK, length - position))
        if not any(block):
            end, position = position, _end_of_zeros(file, position, length)
            if length - end <= RECORD and MAGIC not in _bytes_at(file, position, length - position):
                break  # some programs do not clear the rest of the last record
            archive += 1
            continue
        name, field, kind, target, magic, prefix = _fields(block, position)
        size = _number(field, position)
        position += BLOCK
        if kind in PAX + PAX_OF_ALL + LONG_NAME + LONG_LINK:
            _check_size(size, min(length - position, MOST_EXTENDED), position)
            content = _bytes_at(file, position, size)
            position += -(-size // BLOCK) * BLOCK
            extended |= _extension(kind, content, position)
            continue
        if b"size" in extended:
            size = _decimal(extended[b"size"], position)
        if kind in WITHOUT_CONTENT:
            size = 0
        if kind == SPARSE:
            position = _end_of_map(file, position, block[482], length)
        if prefix and magic != b"ustar ":  # GNU tar has other fields in this place
            name = prefix + b"/" + name
        name = extended.get(SPARSE_NAME, extended.get(b"path", name))
        target = extended.get(b"linkpath", target)
        _check_size(size, length - position, position)
        named = _text(name, position)
        found = _kind(kind, named, extended)
        led = _led(named, _text(target, position), kind) if found == "link" else ""
        yield Member(named.rstrip("/"), found, position, size, led, archive)
        position += -(-size // BLOCK) * BLOCK
        extended = {}
    if extended or position > length:
        raise DamagedTar("unexpected end of data")


def _bytes_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    content = file.read(size)
    if len(content) < size:
        raise DamagedTar("unexpected end of data")
    return content


def _end_of_zeros(file: BinaryIO, position: int, length: int) -> int:
    """Return the position of the first block after `position` that is not zero, or the end."""
    while position < length:
        piece = _bytes_at(file, position, min(PIECE, length - position))
        zeros = len(piece) - len(piece.lstrip(b"\0"))
        if zeros < len(piece):
            return position + zeros // BLOCK * BLOCK
        position += zeros
    return position


def _fields(block: bytes, position: int) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes]:
    """Return name, size, type, target, magic and prefix of a header; raises DamagedTar."""
    if len(block) < BLOCK:
        raise DamagedTar("unexpected end of data")
    name, size, checksum, kind, target, magic, prefix = FIELDS.unpack(block)
    missing = _number(checksum, position) - sum(block) + sum(checksum) - 8 * ord(" ")
    if missing and missing != _signed(block) - _signed(checksum):
        raise DamagedTar(f"no header at byte {position:,}")
    name, target, prefix = (text.partition(b"\0")[0] for text in (name, target, prefix))
    return name, size, kind, target, magic, prefix


def _signed(field: bytes) -> int:
    """Return the sum of bytes as signed less that of unsigned; some programs sum signed ones."""
    return -256 * sum(byte > 127 for byte in field)


def _number(field: bytes, position: int) -> int:
    """Return a number of a header, in octal digits or as a positive binary number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if not OCTAL.fullmatch(digits):
        raise DamagedTar(f"no header at byte {position:,}")
    return int(digits or b"0", 8)


def _decimal(digits: bytes, position: int) -> int:
    if not DECIMAL.fullmatch(digits):
        raise DamagedTar(f"impossible size in the header before byte {position:,}")
    return int(digits)


def _check_size(size: int, most: int, position: int) -> None:
    if size > most:
        raise DamagedTar(f"unexpected end of data: {size:,} bytes at byte {position:,}")


def _extension(kind: bytes, content: bytes, position: int) -> dict[bytes, bytes]:
    """Return the records of an extended header; a long name is one record."""
    if kind in LONG_NAME + LONG_LINK:
        name = b"path" if kind == LONG_NAME else b"linkpath"
        return {name: content.partition(b"\0")[0]}
    records = _records(content, position)
    if kind in PAX:
        return records
    if records:
        raise DamagedTar(f"one {min(records).decode()} for all members at byte {position:,}")
    return {}


def _records(content: bytes, position: int) -> dict[bytes, bytes]:
    """Return the pax records that matter here, from lines "LENGTH NAME=VALUE"."""
    records, start = {}, 0
    while start < len(content) and content[start]:
        space = content.find(b" ", start, start + 20)
        digits = content[start : max(space, start)]
        stop = start + int(digits) if DECIMAL.fullmatch(digits) else 0
        line = content[space + 1 : stop]
        name, equals, value = line.partition(b"=")
        if stop > len(content) or not equals or not line.endswith(b"\n"):
            raise DamagedTar(f"damaged extended header before byte {position:,}")
        wanted = name in (b"path", b"linkpath", b"size") or name.startswith(SPARSE_RECORDS)
        if wanted and (value := value[:-1]):
            records[name] = value
        start = stop
    return records


def _end_of_map(file: BinaryIO, position: int, more: int, length: int) -> int:
    """Return the position behind the blocks that continue the map of a sparse file."""
    while more:
        _check_size(BLOCK, length - position, position)
        more = _bytes_at(file, position, BLOCK)[504]
        position += BLOCK
    return position


def _text(name: bytes, position: int) -> str:
    if b"\0" in name:
        raise DamagedTar(f"a name with a NUL before byte {position:,}")
    return name.decode("utf-8", "surrogateescape")


def _kind(kind: bytes, name: str, extended: dict[bytes, bytes]) -> Kind:
    if kind in LINKS:
        return "link"
    if kind in FOLDERS or (kind in FILES and name.endswith("/")):
        return "folder"
    if kind == SPARSE or any(key.startswith(SPARSE_RECORDS) for key in extended):
        return "sparse"
    return "file" if kind in FILES else "special"


def _led(name: str, target: str, kind: bytes) -> str:
    """Return the path that a link leads to; a symbolic one starts at its own folder."""
    if kind == b"2":
        target = posixpath.join(posixpath.dirname(name), target)
    return posixpath.normpath(target)
