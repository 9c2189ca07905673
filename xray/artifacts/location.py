"""Location of an artifact: a local folder, or a URL that fsspec reads."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipelines.shards.remote import fetch_file, fetch_small, is_remote
from xray.artifacts.shards import ENDING, index_name, join
from xray.files import inside, sha256_file

FIRST_PATIENCE = 60.0  # seconds of retries to read a manifest
PATIENCE = 600.0  # seconds of retries to download a file


@dataclass(frozen=True)
class Place:
    """A folder or a URL, and the files below it by name.

    Its methods raise ArtifactError for a link that points outside, and DataError for a URL that
    cannot be read.
    """

    where: str

    def __str__(self) -> str:
        return self.where

    @property
    def remote(self) -> bool:
        return is_remote(self.where)

    @property
    def folder(self) -> Path:
        return Path(self.where)

    def read(self, name: str) -> bytes | None:
        """Read a small file; None if there is none."""
        if self.remote:
            return fetch_small(self._url(name), FIRST_PATIENCE, fresh=True)
        path = inside(self.folder, name)
        return path.read_bytes() if path.is_file() else None

    def sha256(self, name: str) -> str | None:
        """Hash a file; None if there is none. A file at a URL is downloaded and not kept."""
        if self.remote:
            with TemporaryDirectory() as folder:
                return self.fetch(name, Path(folder) / "file")
        path = inside(self.folder, name)
        return sha256_file(path) if path.is_file() else None

    def fetch(self, name: str, target: Path) -> str | None:
        """Download a file of a URL and return its hash; None if there is none.

        Weights that are in several files there are joined.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            return fetch_file(self._url(name), target, PATIENCE)
        index = self.read(index_name(name)) if name.endswith(ENDING) else None
        return None if index is None else join(index, name, target, self.fetch)

    def unnamed(self, files: list[str]) -> list[str]:
        """List other files in the subfolders of these, which a library would read."""
        if self.remote:  # only named files are downloaded
            return []
        folders = {self.folder / name.partition("/")[0] for name in files if "/" in name}
        below = [path for top in folders for path in top.rglob("*")]
        names = {
            str(path.relative_to(self.folder))
            for path in below
            if path.is_symlink() or not path.is_dir()
        }
        return sorted(names - set(files))

    def _url(self, name: str) -> str:
        return f"{self.where}/{name}"
