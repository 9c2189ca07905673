"""Files as other people can read them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """A file written inside gets the permissions that open() gives; safetensors' are 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)
