"""Resume checkpoints: written under a temporary name, then renamed, so that each is complete.

checkpoints/step_00000200/  portable/  state.json  quarantine.jsonl  COMPLETE
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.stream import quarantine
from xray import dist
from xray.config import TrainConfig
from xray.errors import ArtifactError
from xray.files import sync_tree
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


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, as rank 0 sees the folder. Collective."""
    newest = None
    if dist.is_main() and folder.is_dir():
        for stale in folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        complete = complete_checkpoints(folder)
        newest = str(complete[-1]) if complete else None
    newest = dist.broadcast_object(newest)
    return Path(newest) if newest else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    steps = (p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit())
    return sorted(p for p in steps if (p / "COMPLETE").is_file())


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

    def write(self, files: Iterable[tuple[str, Content]]) -> None:
        """Write this rank's files; raises ArtifactError after the last of them."""
        write_files(files, self._temporary)

    def complete(self, written: Callable[[], object]) -> None:
        """Call `written` on each rank, then give the checkpoint its name. Collective.

        Raises ArtifactError on every rank; what was written is then removed.
        """
        with self.discarded_on_error():
            dist.together(written, kind=ArtifactError, doing="writing the checkpoint")
            dist.on_main(self._end)

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

    def _end(self) -> None:
        temporary = self._temporary
        (temporary / "state.json").write_text(json.dumps(self.state.to_json(), indent=1))
        quarantine.save(self.state.quarantine, temporary / "quarantine.jsonl")
        (temporary / "COMPLETE").write_text("")
        sync_tree(temporary)
        shutil.rmtree(self.target, ignore_errors=True)
        os.replace(temporary, self.target)
