"""Texts that users give and get: files that a setting names, names that can be printed."""

from __future__ import annotations

from pathlib import Path

from xray.errors import ConfigError


def printable(text: str) -> str:
    """Text that can be written as UTF-8: names in tars need not be."""
    return text.encode("utf-8", "replace").decode()


def read_utf8(path: str, key: str) -> str:
    """A file's text; raises ConfigError naming the key for one that is missing or not UTF-8."""
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{key}={path} is not UTF-8 (line {line}): convert it, e.g. with iconv -t UTF-8"
        ) from error
