"""Export of an artifact from any checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from stages import stage_class
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.config import TrainConfig
from xray.config import loading as cfg
from xray.errors import ArtifactError
from xray.training.checkpoint import complete_checkpoints, ranked, read_state, step_of, verify
from xray.training.metrics import STATE_KEYS, read_metrics
from xray.training.portable_state import read_buffers, read_weights
from xray.training.run import Run

Weights = Literal["last", "ema"]


def find_run(folder: Path, overrides: dict[str, Any]) -> Run:
    """Open the run of a folder by its config.yaml; overrides: for example, a new data.root.

    Raises ArtifactError without a run, ConfigError if the overrides make it another one.
    """
    values = cfg.stored_config(folder)
    stage = stage_class(str(values.get("stage", "")))
    config = cfg.load_config(stage.Config, stage.name, values, overrides)
    config.out = str(folder)
    run = Run.open(stage, config)
    dist.main_first(run.check_folder, "checking the folder of the run")
    return run


def choose(folder: Path, which: str, train: TrainConfig) -> Path:
    """Choose a run's checkpoint: of a step, `last`, or `best`; else ArtifactError lists them."""
    checkpoints = complete_checkpoints(folder / "checkpoints")
    if which == "best":
        matching = ranked(checkpoints, train)[:1]
    elif which == "last":
        matching = checkpoints[-1:]
    else:
        matching = [path for path in checkpoints if str(step_of(path)) == which]
    if not matching:
        steps = ", ".join(str(step_of(path)) for path in checkpoints) or "no checkpoint at all"
        why = f" with a measured {train.best_by}" if which == "best" else ""
        raise ArtifactError(f"{folder} has no checkpoint {which!r}{why}: there are {steps}")
    return matching[0]


def export_checkpoint(
    folder: Path, which: str, out: Path, weights: Weights, overrides: dict[str, Any]
) -> Artifact:
    """Write the artifact of a run's checkpoint.

    Raises ArtifactError if out exists or the checkpoint is damaged.
    """
    if out.exists():
        raise ArtifactError(f"{out} already exists: choose another --out, or delete it")
    run = find_run(folder, overrides)
    checkpoint = choose(folder, which, run.config.train)
    verify(checkpoint)
    state = read_state(checkpoint)
    module = run.build()
    module.load_state_dict(read_buffers(checkpoint), strict=False)
    trained = read_weights(checkpoint, None if weights == "last" else weights)
    own = {name: value for name, value in module.named_parameters() if name in trained}
    if own.keys() != trained.keys():
        raise ArtifactError(f"checkpoint {checkpoint} is not of this run's model")
    for name, parameter in own.items():
        parameter.data.copy_(trained[name])
    rows = read_metrics(folder / "metrics.jsonl")
    row = next((row for row in rows if row["step"] == state.step), {})
    metrics = {name: value for name, value in row.items() if name not in STATE_KEYS}
    run.write_artifact(out, module, module.state_dict(), state, metrics, weights)
    return open_artifact(out)
