"""Resume checkpoints: written under a temporary name, renamed last, complete or not there.

checkpoints/step_00000200/  portable/  state.json  quarantine.jsonl  COMPLETE
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_pipelines import quarantine
from data_pipelines.quarantine import Entry
from xray import dist
from xray.artifact import sync_tree
from xray.engine import Engine
from xray.errors import ArtifactError, brief
from xray.portable import load_portable, save_portable


@dataclass
class TrainState:
    """What a run needs besides the engine's state: the data stream and the randomness follow."""

    step: int = 0  # optimizer steps done
    samples: int = 0
    seconds: float = 0.0  # spent training
    bad: dict[str, int] = field(default_factory=dict)  # samples replaced, by cause
    quarantine: list[Entry] = field(default_factory=list)  # samples not to be tried again
    world: int = 1
    zero_stage: int = 0


def find_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; rank 0 looks and tells the others."""
    found = None
    if dist.is_main() and folder.is_dir():
        for stale in folder.glob("tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        complete = [p for p in folder.glob("step_*") if (p / "COMPLETE").is_file()]
        found = str(max(complete)) if complete else None
    found = dist.broadcast_object(found)
    return Path(found) if found else None


def read_state(checkpoint: Path) -> TrainState:
    try:
        facts = json.loads((checkpoint / "state.json").read_text())
        return TrainState(**facts, quarantine=quarantine.load(checkpoint / "quarantine.jsonl"))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{checkpoint}/state.json cannot be read: {error}") from error


def load_checkpoint(engine: Engine, checkpoint: Path) -> TrainState:
    """Restore the engine, whatever number of ranks and ZeRO stage it was saved with."""
    state = read_state(checkpoint)
    load_portable(engine, checkpoint)
    return dataclasses.replace(state, world=dist.world_size(), zero_stage=engine.stage)


def save_checkpoint(engine: Engine, folder: Path, state: TrainState, keep: int) -> Path:
    """Write, then rename; prune to the newest `keep`. Collective.

    Raises ArtifactError on every rank where one cannot write; checkpoints that were there stay.
    """
    target = folder / f"step_{state.step:08d}"
    temporary = folder / f"tmp-{target.name}"

    def begin() -> None:
        if not folder.parent.is_dir():  # else a run would end with half of its files
            raise FileNotFoundError(f"{folder.parent} was removed while the run went on")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        facts = {key: value for key, value in asdict(state).items() if key != "quarantine"}
        (temporary / "state.json").write_text(json.dumps(facts, indent=1))
        quarantine.save(state.quarantine, temporary / "quarantine.jsonl")
        (temporary / "COMPLETE").write_text("")
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        for old in sorted(folder.glob("step_*"))[: -max(1, keep)]:
            shutil.rmtree(old, ignore_errors=True)

    try:
        _on_main(begin)
        save_portable(engine, temporary)
        _on_main(end)
    except ArtifactError as error:
        if dist.is_main():  # it may be all that fills the disk
            shutil.rmtree(temporary, ignore_errors=True)
        raise ArtifactError(
            f"checkpoint {target} cannot be written: {error}; those before it are as they were, "
            "and the same command goes on from the last of them"
        ) from error
    return target


def _on_main(work: Callable[[], None]) -> None:
    """work() on rank 0; raises its OSError as ArtifactError on every rank."""
    failure: ArtifactError | None = None
    if dist.is_main():
        try:
            work()
        except OSError as error:
            failure = ArtifactError(brief(error))
    dist.agree(failure)
