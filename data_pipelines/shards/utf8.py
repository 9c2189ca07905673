"""UTF-8 for users' texts: reading a file that a setting names, printing any sample name."""

from __future__ import annotations

from pathlib import Path

from xray.errors import ConfigError


def printable(text: str) -> str:
    """Replace characters that UTF-8 cannot encode; file names in a tar may contain such bytes."""
    return text.encode("utf-8", "replace").decode()


def read_utf8(path: str, key: str) -> str:
    """Read a UTF-8 text file.

    Raises ConfigError naming the config key for a file that cannot be read or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{key}={path} is not UTF-8 (line {line}): convert it, e.g. with iconv -t UTF-8"
        ) from error
