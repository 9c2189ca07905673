"""Saving of a run's checkpoints, at once or while training goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

from xray import dist
from xray.errors import ArtifactError
from xray.training.checkpoint import CheckpointWriter, prune
from xray.training.engine import Engine
from xray.training.host_buffer import HostBuffer
from xray.training.portable_state import Content, own_values, portable_files
from xray.training.run import Run
from xray.training.state import TrainState

log = logging.getLogger("xray")


class Written(NamedTuple):
    """Result of the thread: hashes of this rank's files, and the seconds that it took."""

    hashes: dict[str, str]
    seconds: float


class Saver:
    """Writer of a run's checkpoints.

    With train.save_in_background a thread writes a copy of the state while training goes on; the
    checkpoint gets its name by `complete`. Creating it is collective.
    """

    def __init__(self, run: Run, engine: Engine, device: torch.device) -> None:
        self._run, self._engine, self._train = run, engine, run.config.train
        self._folder = run.out / "checkpoints"
        self._writer: CheckpointWriter | None = None  # of the checkpoint that is not complete
        self._written: Future[Written] | None = None
        self._stood = 0.0  # seconds for which training has waited for it
        self._metrics: dict[str, float] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._host: HostBuffer | None = None
        self._stopped = threading.Event()
        if self._train.save_in_background:
            begin = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
            self._thread = ThreadPoolExecutor(1, "saving", *begin)
            if device.type == "cuda":
                dist.together(lambda: self._reserve(device))

    def _reserve(self, device: torch.device) -> None:
        self._host = HostBuffer(own_values(self._engine), device)

    @property
    def pending(self) -> bool:
        """True if a checkpoint waits for `complete`; equal on all ranks."""
        return self._writer is not None

    @property
    def writing(self) -> bool:
        """True while the thread of this rank writes."""
        return self._written is not None and not self._written.done()

    def save(self, state: TrainState, at_once: bool) -> None:
        """Save a checkpoint, after the one that is not complete. Collective.

        at_once: return after it is complete, also with train.save_in_background. Raises
        ArtifactError on every rank if one cannot write; earlier checkpoints are then kept.
        """
        self.complete()
        begun = time.monotonic()
        target = self._folder / f"step_{state.step:08d}"
        with _explained(target):
            writer = CheckpointWriter(target, state)
        if self._thread is not None and not at_once:
            with writer.discarded_on_error():
                files = self._copies()
            self._written = self._thread.submit(self._write, writer, files)
        self._writer, self._stood = writer, time.monotonic() - begun
        if self._written is None:
            self.complete()

    def _copies(self) -> list[tuple[str, Content]]:
        """Copy the state to the host's memory."""
        if self._host is None:
            return list(portable_files(self._engine))
        self._host.clear()
        return list(portable_files(self._engine, self._host.keep))

    def _write(self, writer: CheckpointWriter, files: list[tuple[str, Content]]) -> Written:
        """Write copies, in the thread."""
        begun = time.monotonic()
        if self._host is not None:
            self._host.wait()
        hashes = writer.write(takewhile(lambda _: not self._stopped.is_set(), files))
        return Written(hashes, time.monotonic() - begun)

    def complete(self) -> None:
        """Wait until the pending checkpoint, if there is one, is written, and name it. Collective.

        Then prune checkpoints and start to copy to the mirror. Raises the error of `save`.
        """
        writer, written = self._writer, self._written
        if writer is None:
            return
        self._writer = self._written = None
        begun, mirror = time.monotonic(), self._run.mirror
        if mirror is not None:
            mirror.wait()  # it reads checkpoints that are removed below
        with _explained(writer.target):
            if written is None:
                writer.complete(lambda: writer.write(portable_files(self._engine)))
            else:
                writer.complete(lambda: written.result().hashes)
        prune(self._folder, self._train)
        self._run.copy()
        seconds = self._stood + time.monotonic() - begun
        self._metrics = {"save/seconds": seconds}
        note = ""
        if written is not None:
            self._metrics["save/write_seconds"] = written.result().seconds
            note = f" for a write of {written.result().seconds:.1f} s in the background"
        if dist.is_main():
            size = sum(f.stat().st_size for f in writer.target.rglob("*") if f.is_file())
            line = "step %d: saved %.3g GB in %.1f s%s"
            log.info(line, writer.state.step, size / 1e9, seconds, note)

    def complete_after(self, error: BaseException) -> None:
        """Complete the pending checkpoint if all ranks end with this error; log a failed write."""
        alone = dist.world_size() == 1 and isinstance(error, Exception)
        if alone or getattr(error, "agreed", False):
            try:
                self.complete()
            except ArtifactError as failure:
                log.warning("%s", failure)

    def take_metrics(self) -> dict[str, float]:
        """Return the metrics of the last complete checkpoint, once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def close(self) -> None:
        """Stop the thread, and discard a checkpoint that is not complete."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.shutdown()
        if self._writer is not None:
            self._writer.discard()
        if self._host is not None:
            self._host.close()


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Say in an ArtifactError which checkpoint cannot be written, and which are kept."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(
            f"checkpoint {target} cannot be written: {error}; earlier checkpoints are unchanged, "
            "and the same command continues from the last of them"
        ).on_all_ranks() from error
