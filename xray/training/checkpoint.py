"""Resume checkpoints: written under a temporary name, then renamed, so that each is complete.

checkpoints/step_00000200/  portable/  state.json  quarantine.jsonl  COMPLETE
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from data_pipelines.stream import quarantine
from xray import dist
from xray.config import TrainConfig
from xray.errors import ArtifactError
from xray.files import replacing, sync_tree
from xray.training.engine import Engine
from xray.training.portable_state import load_portable, save_portable
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
    try:
        values = json.loads((checkpoint / "state.json").read_text())
        return TrainState.from_json(values, quarantine.load(checkpoint / "quarantine.jsonl"))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{checkpoint}/state.json cannot be read: {error}") from error


def load_checkpoint(engine: Engine, checkpoint: Path) -> TrainState:
    """Restore the engine from a checkpoint of any world size and ZeRO stage. Collective."""
    state = read_state(checkpoint)
    load_portable(engine, checkpoint)
    return dataclasses.replace(state, world=dist.world_size(), zero_stage=engine.stage)


def save_checkpoint(engine: Engine, folder: Path, state: TrainState, train: TrainConfig) -> Path:
    """Write a checkpoint of a run and remove those that are no longer kept. Collective.

    Raises ArtifactError on every rank if one cannot write; earlier checkpoints are then kept.
    """
    target = folder / f"step_{state.step:08d}"
    try:
        write_checkpoint(engine, target, state)
    except ArtifactError as error:
        raise ArtifactError(
            f"checkpoint {target} cannot be written: {error}; earlier checkpoints are unchanged, "
            "and the same command continues from the last of them"
        ).on_all_ranks() from error

    def prune() -> None:
        complete = complete_checkpoints(folder)
        for old in set(complete) - staying(complete, train):
            shutil.rmtree(old, ignore_errors=True)

    dist.on_main(prune)
    return target


def write_checkpoint(engine: Engine, target: Path, state: TrainState) -> None:
    """Write the engine and the state. Collective; raises ArtifactError on every rank."""
    temporary = target.with_name(f"tmp-{target.name}")

    def begin() -> None:
        run = target.parent.parent
        if not run.is_dir():  # creating it again would leave a run with half of its files
            raise FileNotFoundError(f"{run} was removed during training")
        writing.enter_context(replacing(target, temporary))
        temporary.mkdir(parents=True)

    def end() -> None:
        (temporary / "state.json").write_text(json.dumps(state.to_json(), indent=1))
        quarantine.save(state.quarantine, temporary / "quarantine.jsonl")
        (temporary / "COMPLETE").write_text("")
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
        writing.close()

    with ExitStack() as writing:  # on an error it removes the temporary folder, on rank 0
        dist.on_main(begin)
        save_portable(engine, temporary)
        dist.on_main(end)
