"""Resume checkpoints: written under a temporary name, renamed last, complete or not there.

checkpoints/step_00000200/  portable/  state.json  quarantine.jsonl  COMPLETE
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.stream import quarantine
from xray import dist
from xray.config import TrainConfig
from xray.errors import ArtifactError
from xray.files import sync_tree
from xray.training.engine import Engine
from xray.training.portable_state import load_portable, save_portable
from xray.training.state import TrainState


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; rank 0 looks and tells the others."""
    found = None
    if dist.is_main() and folder.is_dir():
        for stale in folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        complete = complete_checkpoints(folder)
        found = str(complete[-1]) if complete else None
    found = dist.broadcast_object(found)
    return Path(found) if found else None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that count, oldest first."""
    steps = (p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit())
    return sorted(p for p in steps if (p / "COMPLETE").is_file())


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def ranked(checkpoints: Sequence[Path], train: TrainConfig) -> list[Path]:
    """Those with a finite measured `train.best_by`, best first; of equals the newest."""
    found = ((path, read_state(path).score) for path in checkpoints)
    scores = {path: score for path, score in found if score is not None and math.isfinite(score)}
    sign = 1 if train.best_is == "lowest" else -1
    return sorted(scores, key=lambda path: (sign * scores[path], -step_of(path)))


def staying(checkpoints: Sequence[Path], train: TrainConfig) -> set[Path]:
    """Of a run's checkpoints, oldest first, the newest, the best and those that stay for good."""
    stay = set(checkpoints[-train.keep_checkpoints :])
    if train.keep_every:
        stay |= {path for path in checkpoints if step_of(path) % train.keep_every == 0}
    if train.keep_best:
        stay |= set(ranked(checkpoints, train)[: train.keep_best])
    return stay


def read_state(checkpoint: Path) -> TrainState:
    try:
        values = json.loads((checkpoint / "state.json").read_text())
        return TrainState.from_json(values, quarantine.load(checkpoint / "quarantine.jsonl"))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{checkpoint}/state.json cannot be read: {error}") from error


def load_checkpoint(engine: Engine, checkpoint: Path) -> TrainState:
    """Restore the engine, whatever number of ranks and ZeRO stage it was saved with."""
    state = read_state(checkpoint)
    load_portable(engine, checkpoint)
    return dataclasses.replace(state, world=dist.world_size(), zero_stage=engine.stage)


def save_checkpoint(engine: Engine, folder: Path, state: TrainState, train: TrainConfig) -> Path:
    """Write a checkpoint of a run and remove those that need not stay. Collective.

    Raises ArtifactError on every rank where one cannot write; checkpoints that were there stay.
    """
    target = folder / f"step_{state.step:08d}"
    try:
        write_checkpoint(engine, target, state)
    except ArtifactError as error:
        raise ArtifactError(
            f"checkpoint {target} cannot be written: {error}; those before it are as they "
            "were, and the same command goes on from the last of them"
        ).on_all_ranks() from error

    def prune() -> None:
        complete = complete_checkpoints(folder)
        for old in set(complete) - staying(complete, train):
            shutil.rmtree(old, ignore_errors=True)

    dist.on_main(prune)
    return target


def write_checkpoint(engine: Engine, target: Path, state: TrainState) -> None:
    """Write the engine and the state under a temporary name, then rename. Collective.

    Raises ArtifactError on every rank where one cannot write; nothing is left of it then.
    """
    temporary = target.with_name(f"tmp-{target.name}")

    def begin() -> None:
        run = target.parent.parent
        if not run.is_dir():  # else a run would end with half of its files
            raise FileNotFoundError(f"{run} was removed while the run went on")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        (temporary / "state.json").write_text(json.dumps(state.to_json(), indent=1))
        quarantine.save(state.quarantine, temporary / "quarantine.jsonl")
        (temporary / "COMPLETE").write_text("")
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)

    try:
        dist.on_main(begin)
        save_portable(engine, temporary)
        dist.on_main(end)
    except ArtifactError:
        if dist.is_main():  # it may be all that fills the disk
            shutil.rmtree(temporary, ignore_errors=True)
        raise
