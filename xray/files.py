"""Files as other people can read them, and as a list of them may name them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from xray.errors import ArtifactError


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """A file written inside gets the permissions that open() gives; safetensors' are 0600."""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def is_inside(name: str) -> bool:
    """Whether a name that a file gives stays in that file's folder, whatever links lie there."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def inside(folder: Path, name: str) -> Path:
    """The file of a name below a folder; raises ArtifactError where that is outside, by a link."""
    if not is_inside(name) or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{folder} names a file outside of it: {name}")
    return folder / name
