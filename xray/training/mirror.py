"""Mirror of a run at a URL, for machines whose disks do not outlive them.

URL/STAGE/  checkpoints/step_00000200/...  run.json  config.yaml  metrics.jsonl  artifact/...

The file that marks a folder as complete (COMPLETE, manifest.json) is copied last; a folder without
it is ignored.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem

from data_pipelines.shards.remote import filesystem, retry
from xray.errors import DataError
from xray.files import inside, replacing
from xray.urls import conceal

log = logging.getLogger("xray")
PATIENCE = 60.0  # seconds to retry an operation
BESIDE = ("config.yaml", "metrics.jsonl", "wandb_id", "run.json")
LAST = ("COMPLETE", "manifest.json")  # file that completes a folder


class Mirror:
    """Mirror of one stage's run, used on rank 0.

    A thread copies files during training. A failure is logged and retried with the next checkpoint.
    Checkpoints that an earlier machine copied are never removed.
    """

    def __init__(self, url: str, stage: str, out: Path) -> None:
        self.url, self.out = f"{conceal(url).rstrip('/')}/{stage}", out
        self._thread: threading.Thread | None = None
        self._fs: DirFileSystem | None = None
        self._sent: set[str] = set()  # own checkpoints at the URL, which may be removed there

    def send(self, folders: list[Path]) -> None:
        """Start copying these folders of the run; other checkpoints sent before are removed."""
        self.wait()
        self._thread = threading.Thread(target=self._send, args=(folders,), name="mirror")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last copy is done or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def holds(self, check: Callable[[Path], None]) -> bool:
        """Call `check` on a folder with the URL's run.json; return False if there is no run.

        Raises DataError if the URL cannot be reached, and the errors of `check`.
        """
        if not self._has("run.json"):
            return False
        with tempfile.TemporaryDirectory() as folder:
            self._get_file("run.json", Path(folder) / "run.json")
            check(Path(folder))
        return True

    def fetch(self) -> None:
        """Fetch the newest checkpoint, the artifact and the records into the run's new folder.

        Raises DataError if the URL cannot be reached, ArtifactError for names outside the folder.
        """
        complete = [n for n in self._steps() if self._has(f"checkpoints/{n}/COMPLETE")]
        folders = [f"checkpoints/{max(complete)}"] if complete else []
        if self._has("artifact/manifest.json"):
            folders.append("artifact")
        for folder in folders:
            log.info("fetches %s/%s", self.url, folder)
            self._get(folder)
        for name in BESIDE:  # run.json, the last one, marks the folder as complete
            if self._has(name):
                self._get_file(name, self.out / name)

    # --------------------------------------------------------------------------------------------

    def _send(self, folders: list[Path]) -> None:
        try:
            current = {folder.name for folder in folders}
            for name in BESIDE:  # before the checkpoints that they describe
                if (self.out / name).is_file():
                    self._put_file(self.out / name)
            for folder in folders:
                name = str(folder.relative_to(self.out))
                last = next(last for last in LAST if (folder / last).is_file())
                if self._has(f"{name}/{last}"):
                    continue
                files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != last]
                for file in [*files, folder / last]:
                    self._put_file(file)
            for stale in self._sent - current:
                self._try(methodcaller("rm", f"checkpoints/{stale}", recursive=True))
            self._sent = current
        except (DataError, OSError) as error:
            log.warning(
                "%s is not up to date: %s; the copy is retried at the next checkpoint, or by the "
                "same command",
                self.url, error,
            )  # fmt: skip

    def _try(self, work: Callable[[DirFileSystem], Any]) -> Any:
        """Call work with the file system below the URL, again for PATIENCE seconds if it fails."""
        if self._fs is None:
            fs, root = filesystem(self.url, PATIENCE)
            self._fs = DirFileSystem(root.rstrip("/"), fs)
        below = self._fs
        return retry(self.url, PATIENCE, lambda: work(below))

    def _has(self, name: str) -> bool:
        return bool(self._try(lambda fs: fs.exists(name)))

    def _steps(self) -> list[str]:
        """List the folders of checkpoints, complete or not."""

        def names(fs: DirFileSystem) -> list[str]:
            fs.invalidate_cache()
            return [path.rstrip("/").rpartition("/")[2] for path in fs.ls("checkpoints", False)]

        with suppress(FileNotFoundError):
            return [name for name in self._try(names) if re.fullmatch(r"step_\d+", name)]
        return []

    def _put_file(self, file: Path) -> None:
        target = str(file.relative_to(self.out))

        def put(fs: DirFileSystem) -> None:
            fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            fs.put_file(str(file), target)

        self._try(put)

    def _get(self, folder: str) -> None:
        """Fetch a folder completely, or not at all."""
        target = self.out / folder
        with replacing(target, target.with_name(f"tmp-{target.name}")) as temporary:
            for name in self._try(lambda fs: fs.find(folder)):
                self._get_file(name, inside(temporary, name.removeprefix(f"{folder}/")))
            shutil.rmtree(target, ignore_errors=True)

    def _get_file(self, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._try(lambda fs: fs.get_file(name, str(target)))
