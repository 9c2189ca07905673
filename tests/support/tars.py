"""Tars made header by header, for members that tarfile would not write."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

END = bytes(1024)


def header(name: str, size: bytes, kind: bytes = b"0", target: str = "") -> bytes:
    """Make a header; size: the 12 bytes of its field."""
    block = bytearray(512)
    block[:100] = name.encode().ljust(100, b"\0")
    block[100:124] = b"0000644\0" * 3
    block[124:136] = size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157:257] = target.encode().ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[148:156] = f"{sum(block):06o}".encode() + b"\0 "
    return bytes(block)


def octal(size: int) -> bytes:
    """Return the field of a size."""
    return f"{size:011o}\0".encode()


def padded(content: bytes) -> bytes:
    """Pad content to whole blocks."""
    return content + bytes(-len(content) % 512)


def member(name: str, content: bytes, kind: bytes = b"0") -> bytes:
    """Make a header and its content."""
    return header(name, octal(len(content)), kind) + padded(content)


def pax(records: Mapping[str, str], kind: bytes = b"x") -> bytes:
    """Make an extended header."""
    lines = b""
    for name, value in records.items():
        rest = f" {name}={value}\n".encode()
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        lines += str(length).encode() + rest
    return member("PaxHeaders/x", lines, kind)


def tar_of(files: Mapping[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Make a tar of files, as tarfile does."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
