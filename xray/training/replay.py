"""Bundles of steps that were not finite, and their replay by `xray debug replay BUNDLE`.

bundles/step_00000003/  bundle.json  portable/  state.json     the state before the fourth step
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xray import dist
from xray.errors import ArtifactError, ConfigError, DataError, brief
from xray.records import read_record
from xray.training import checkpoint
from xray.training.accumulation import Accumulator
from xray.training.engine import Engine
from xray.training.run import Run, samples_of
from xray.training.state import TrainState
from xray.training.step_data import StepData, step_shape, training_stream
from xray.training.step_result import Events, ReducedStep

FOLDER, FACTS = "bundles", "bundle.json"
MOST = 8  # outputs and gradients that are reported


@dataclass(frozen=True)
class Bundle:
    """Contents of a bundle.json: the step that was not finite.

    what: name of the value that is not finite. values: the step's, as text, by name. samples:
    position, shard and key of each, by source.
    """

    step: int
    seed: int
    world: int
    what: str
    values: dict[str, str]
    samples: dict[str, list[dict[str, Any]]]


def write_bundle(
    run: Run, engine: Engine, state: TrainState, what: str, values: dict[str, float]
) -> str:
    """Write the state before a step, its values and samples. Collective.

    what: name of the value that is not finite. Returns a note on the bundle for an error message.
    """
    path = run.out / FOLDER / f"step_{state.step:08d}"
    try:
        checkpoint.write_checkpoint(engine, path, state)
        if dist.is_main():
            facts = Bundle(
                step=state.step,
                seed=run.config.seed,
                world=dist.world_size(),
                what=what,
                values={name: repr(value) for name, value in sorted(values.items())},
                samples=samples_of(run, state.step),
            )
            (path / FACTS).write_text(json.dumps(asdict(facts), indent=1), "utf-8")
    except (ArtifactError, DataError, OSError) as error:
        return f"(its bundle could not be written: {brief(error)})"
    return (
        f"(`xray debug replay {shlex.quote(str(path))}` repeats the step and shows where it breaks)"
    )


def read_bundle(path: Path) -> Bundle:
    """Read a bundle.json; raises ArtifactError if there is none, or a damaged one."""
    if not (path / FACTS).is_file():
        raise ArtifactError(
            f"{path} is not a bundle: it has no {FACTS}; bundles are in RUN/{FOLDER}/"
        )
    return read_record(path / FACTS, Bundle)


def replay(path: Path, run: Run, device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Repeat a bundle's step without changing weights. Collective.

    Returns its values as means over ranks, which equal those of the run, and the names of outputs
    and gradients that were not finite, in order. Raises ConfigError for another world size.
    """
    facts, config = read_bundle(path), run.config
    if facts.world != dist.world_size():
        raise ConfigError(
            f"{path} was written by {facts.world} processes: replay it with the same number "
            f"(torchrun --nproc_per_node {facts.world} -m xray debug replay ...)"
        )
    run.settle(device)
    module = run.build()
    engine = Engine(module, config)
    checkpoint.verify(path)
    state = checkpoint.load_checkpoint(engine, path)
    broken: list[str] = []
    watch(module, broken.append)
    step = state.step
    stream = training_stream(run.stage, config, run.plans, range(step, step + 1), device)
    with closing(StepData(stream)) as data:
        failure, loaded = data.fetch(), data.loaded
    if failure is not None:
        raise ArtifactError(f"{path} cannot be replayed: {failure}")
    progress = config.progress(step)
    shape = step_shape(run.stage, config.blocks, progress)
    micros = Accumulator(engine, run.stage, device, config.seed)
    metrics = micros.train(step, progress, shape.micro, loaded)
    _, means = ReducedStep(Events(), metrics, device).read()
    engine.set_lr(0.0, progress)
    engine.step()
    engine.destroy()
    return means | {"grad_norm": engine.grad_norm}, broken


def watch(module: nn.Module, report: Callable[[str], None]) -> None:
    """Report the first outputs of modules and gradients of parameters that are not finite."""
    seen: set[str] = set()

    def check(what: str, value: Any) -> None:
        values = value if isinstance(value, tuple | list) else [value]
        infinite = any(isinstance(v, Tensor) and not v.isfinite().all() for v in values)
        if infinite and what not in seen and len(seen) < MOST:
            seen.add(what)
            report(what)

    for name, each in module.named_modules():
        if name and not any(True for _ in each.children()):
            each.register_forward_hook(
                lambda _, __, output, name=name: check(f"the output of {name}", output)
            )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g, name=name: check(f"the gradient of {name}", g))
