"""Resume checkpoints: written under a temporary name, then renamed, so that each is complete.

checkpoints/step_00000200/  portable/  state.json  quarantine.jsonl  COMPLETE

COMPLETE has the sha256 of each other file.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data_pipelines.stream import quarantine
from xray import dist
from xray.config import TrainConfig
from xray.errors import ArtifactError
from xray.files import inside, sha256_file, sync_tree
from xray.records import read_record
from xray.training.engine import Engine
from xray.training.portable_state import (
    FOLDER,
    Content,
    load_portable,
    portable_files,
    write_files,
)
from xray.training.state import TrainState

log = logging.getLogger("xray")
COMPLETE, DAMAGED = "COMPLETE", "DAMAGED"


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Contents of COMPLETE, by name of a file."""

    sha256: dict[str, str]


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that is not damaged, None if there is none at all.

    Rank 0 lists the folder; damaged checkpoints are logged and marked by the file DAMAGED.
    Collective. Raises ArtifactError if all checkpoints are damaged.
    """
    names: list[str] = []
    if dist.is_main() and folder.is_dir():
        for stale in folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        names = [path.name for path in complete_checkpoints(folder)]
    damaged: dict[Path, ArtifactError] = {}
    for name in reversed(dist.broadcast_object(names)):
        try:
            verify(folder / name)
        except ArtifactError as error:
            damaged[folder / name] = error
            continue
        for path, damage in damaged.items():
            log.warning("checkpoint %s is damaged: %s; the run uses an earlier one", path, damage)
            dist.on_main(partial(os.replace, path / COMPLETE, path / DAMAGED))
        return folder / name
    if damaged:
        why = "; ".join(str(error) for error in damaged.values())
        raise ArtifactError(
            f"no checkpoint in {folder} is whole: {why}; delete it to start from the beginning"
        ).on_all_ranks()
    return None


def verify(checkpoint: Path) -> None:
    """Compare the files of a checkpoint with the hashes in COMPLETE; ranks share them. Collective.

    Raises ArtifactError on every rank for a file that was changed or cannot be read.
    """

    def compare() -> None:
        hashes = read_hashes(checkpoint)
        if hashes is None:
            log.info("%s has no hashes (of an earlier version): it is not checked", checkpoint)
            return
        for name in sorted(hashes)[dist.rank() :: dist.world_size()]:
            if sha256_file(inside(checkpoint, name)) != hashes[name]:
                raise ArtifactError(f"{checkpoint / name} does not have its sha256 in {COMPLETE}")

    dist.together(compare, kind=ArtifactError, doing="checking the files of a checkpoint")


def read_hashes(checkpoint: Path) -> dict[str, str] | None:
    """Read the sha256 of each file of a checkpoint, None if it has none.

    Raises ArtifactError if they are damaged.
    """
    path = checkpoint / COMPLETE
    if not path.stat().st_size:
        return None
    return read_record(path, Hashes).sha256


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    steps = (p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit())
    return sorted(p for p in steps if (p / COMPLETE).is_file())


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def ranked(checkpoints: Sequence[Path], train: TrainConfig) -> list[Path]:
    """Return checkpoints with a finite `train.best_by`, best first; of equal ones the newest."""
    measured = ((path, read_state(path).score) for path in checkpoints)
    scores = {path: score for path, score in measured if score is not None and math.isfinite(score)}
    sign = 1 if train.best_is == "lowest" else -1
    return sorted(scores, key=lambda path: (sign * scores[path], -step_of(path)))


def staying(checkpoints: Sequence[Path], train: TrainConfig) -> set[Path]:
    """Select a run's checkpoints (oldest first) that are kept: last, best and periodic."""
    stay = set(checkpoints[-train.keep_checkpoints :])
    if train.keep_every:
        stay |= {path for path in checkpoints if step_of(path) % train.keep_every == 0}
    if train.keep_best:
        stay |= set(ranked(checkpoints, train)[: train.keep_best])
    return stay


def read_state(checkpoint: Path) -> TrainState:
    """Read a checkpoint's state; raises ArtifactError if it is damaged."""
    known = quarantine.load(checkpoint / "quarantine.jsonl")
    state = read_record(checkpoint / "state.json", TrainState)
    return dataclasses.replace(state, quarantine=known)


def load_checkpoint(engine: Engine, checkpoint: Path) -> TrainState:
    """Restore the engine from a checkpoint of any world size and ZeRO stage. Collective."""
    state = read_state(checkpoint)
    load_portable(engine, checkpoint)
    return dataclasses.replace(state, world=dist.world_size(), zero_stage=engine.stage)


def prune(folder: Path, train: TrainConfig) -> None:
    """Remove the checkpoints of a run that are no longer kept. Collective."""

    def remove() -> None:
        complete = complete_checkpoints(folder)
        for old in set(complete) - staying(complete, train):
            shutil.rmtree(old, ignore_errors=True)

    dist.on_main(remove)


def write_checkpoint(engine: Engine, target: Path, state: TrainState) -> None:
    """Write the engine and the state. Collective; raises ArtifactError on every rank."""
    writer = CheckpointWriter(target, state)
    writer.complete(lambda: writer.write(portable_files(engine)))


class CheckpointWriter:
    """Checkpoint under a temporary name, until it is complete.

    Creating it is collective and raises ArtifactError on every rank.
    """

    def __init__(self, target: Path, state: TrainState) -> None:
        self.target, self.state = target, copy.deepcopy(state)  # training may go on meanwhile
        self._temporary = target.with_name(f"tmp-{target.name}")
        with self.discarded_on_error():
            dist.on_main(self._begin)

    def write(self, files: Iterable[tuple[str, Content]]) -> dict[str, str]:
        """Write this rank's files; returns their sha256.

        Raises ArtifactError after the last of them.
        """
        return write_files(files, self._temporary)

    def complete(self, written: Callable[[], dict[str, str]]) -> None:
        """Call `written` for the hashes of each rank, then name the checkpoint. Collective.

        Raises ArtifactError on every rank; what was written is then removed.
        """
        own: dict[str, str] = {}
        with self.discarded_on_error():
            dist.together(
                lambda: own.update(written()), kind=ArtifactError, doing="writing the checkpoint"
            )
            hashes = {k: v for each in dist.gather_objects(own) for k, v in each.items()}
            dist.on_main(partial(self._end, hashes))

    def discard(self) -> None:
        """Remove the files of a checkpoint that is not complete."""
        if dist.is_main():
            shutil.rmtree(self._temporary, ignore_errors=True)

    @contextmanager
    def discarded_on_error(self) -> Iterator[None]:
        """Context in which an error discards the checkpoint."""
        try:
            yield
        except BaseException:
            self.discard()
            raise

    def _begin(self) -> None:
        run = self.target.parent.parent
        if not run.is_dir():  # creating it again would leave a run with half of its files
            raise FileNotFoundError(f"{run} was removed during training")
        self.discard()  # the remains of a killed run
        (self._temporary / FOLDER).mkdir(parents=True)

    def _end(self, hashes: dict[str, str]) -> None:
        temporary = self._temporary
        (temporary / "state.json").write_text(json.dumps(self.state.to_json(), indent=1), "utf-8")
        quarantine.save(self.state.quarantine, temporary / "quarantine.jsonl")
        hashes |= {
            name: sha256_file(temporary / name) for name in ("state.json", "quarantine.jsonl")
        }
        (temporary / COMPLETE).write_text(json.dumps({"sha256": hashes}, indent=1), "utf-8")
        sync_tree(temporary)
        shutil.rmtree(self.target, ignore_errors=True)
        os.replace(temporary, self.target)
