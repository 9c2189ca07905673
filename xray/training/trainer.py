"""Training of a run: open, restore, run the loop, export the artifact."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from stages.base import Stage
from stages.tuning import in_words, parameter_counts
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.config import RunConfig
from xray.errors import Preempted
from xray.training import checkpoint
from xray.training.engine import Engine
from xray.training.loop import StopSignals, TrainingLoop
from xray.training.metrics import Sinks
from xray.training.run import Run, named
from xray.training.saving import Saver
from xray.training.state import TrainState
from xray.training.step_result import Events
from xray.training.telemetry import Telemetry
from xray.training.watchdog import SAVING, Watchdog

log = logging.getLogger("xray")


def train_stage(
    stage_class: type[Stage], config: RunConfig, device: torch.device, following: float = 0.0
) -> Artifact:
    """Train a stage to the end, from its checkpoint or its parents; return the verified artifact.

    A run that was finished before is only verified. The device's memory is free afterwards.
    following: work of a recipe's later stages, as a multiple of this one's; for the time shown.
    Raises ConfigError, ArtifactError or DataError if the run cannot be trained, and the errors of
    `TrainingLoop.run_steps`.
    """
    run = Run.open(stage_class, config)
    dist.main_first(run.restore, "checking the folder and the mirror of the run")
    if finished := run.finished():
        return finished
    run.settle(device)
    artifact = _train(run, device, following)
    gc.collect()  # the module and DeepSpeed's engine refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return artifact


def _train(run: Run, device: torch.device, following: float) -> Artifact:
    config = run.config
    module = run.build()
    counts = parameter_counts(module, dict(module.named_parameters()))
    log.info("trains %s", in_words(counts))
    _warn_of_random_weights(run, counts.get("vision"))
    engine = Engine(module, config)
    with ExitStack() as stack:
        stack.callback(engine.destroy)
        run.begin()
        stack.callback(run.release)
        state = _restore(run, engine)
        signals = stack.enter_context(StopSignals())
        sinks = Sinks(run.out, run.stage.name, config, state, following)
        stack.callback(sinks.close)
        if run.mirror is not None:
            stack.callback(run.mirror.wait)  # while signals are still handled
        watchdog = Watchdog(run.out, config.train.hang_seconds)
        stack.callback(watchdog.close)
        telemetry = Telemetry(run.stage, module, device, watchdog)
        saver = Saver(run, engine, device)
        stack.callback(saver.close)
        loop = TrainingLoop(run, engine, state, device, sinks, telemetry, saver, signals)
        try:
            loop.run_steps()
        except BaseException as error:
            dist.report_failure(error)
            watchdog.at("saving", state.step, SAVING)
            saver.complete_after(error)
            raise
        if config.debug.overfit_batch and dist.is_main():
            _log_overfit(run, sinks.last)
        watchdog.at("writing the artifact", state.step, SAVING)
        artifact = _export(run, engine, state, sinks.last)
        if Events(preempted=signals.received).agreed(device).preempted:
            message = f"stage {run.stage.name} is finished; run the same command to continue"
            raise Preempted(message).on_all_ranks()
    return artifact


def _warn_of_random_weights(run: Run, vision: Mapping[str, int] | None) -> None:
    """Warn about an image tower of which a part keeps random weights; vision: its counts."""
    started = run.parents.vision is not None or run.config.model.pretrained
    if vision and vision["trained"] < vision["all"] and not started:
        log.warning(
            "optim.vision leaves weights of the image tower as they start, at random: start from "
            "an artifact (--init-from), set model.pretrained, or set optim.vision.tune=full"
        )


def _restore(run: Run, engine: Engine) -> TrainState:
    """Return the state of the newest checkpoint, loaded into the engine, or of a new run."""
    newest = checkpoint.find_checkpoint(run.out / "checkpoints")
    if newest is not None:
        state = checkpoint.load_checkpoint(engine, newest)
        log.info("continues from %s, step %d of %d", newest, state.step, run.config.steps)
        return state
    paths = [str(artifact.path) for artifact in named(run.parents).values()]
    log.info("starts from %s", ", ".join(paths) or run.stage.first_weights())
    return TrainState(world=dist.world_size(), zero_stage=run.config.zero.stage)


def _export(run: Run, engine: Engine, state: TrainState, metrics: dict[str, float]) -> Artifact:
    chosen = run.config.train.export
    state_dict = engine.state_dict(None if chosen == "last" else chosen)  # collective
    path = run.out / "artifact"
    given = path, engine.module, state_dict, state, metrics, chosen
    dist.on_main(lambda: run.write_artifact(*given), doing="writing the artifact")
    run.copy()
    return open_artifact(path)


def _log_overfit(run: Run, last: dict[str, float]) -> None:
    """Log the loss of a run on one batch beside the loss of guessing (debug.overfit_batch)."""
    for block in run.config.blocks:
        loss, chance = last[f"{block.source}/loss"], run.stage.chance(block)
        loss = last.get(f"{block.source}/contrast", loss)  # without auxiliary losses
        verdict = ""
        if chance and loss < 0.5 * chance:
            verdict = f", guessing gives {chance:.3f}: learned"
        elif chance:
            verdict = (
                f", guessing gives {chance:.3f}: not learned, so more data will not help: try "
                "another optim.base_lr, more train.samples, or check the data with xray data stats"
            )
        log.info(
            "overfit_batch: after %d steps on the same %d samples %s/loss is %.3f%s",
            run.config.steps, block.samples, block.source, loss, verdict,
        )  # fmt: skip
