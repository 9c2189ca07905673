"""Training loop: one for all stages, on one process or many."""

from __future__ import annotations

import logging
import math
import signal
import time
from contextlib import closing
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import torch

from data_pipelines.stream.loaded import Replaced
from data_pipelines.stream.sampling import StepShape
from xray import dist
from xray.config.schedule import steps_of, value_at
from xray.errors import Preempted, TrainingError
from xray.optim import lr_at
from xray.training.accumulation import Accumulator
from xray.training.bad_samples import BadSamples
from xray.training.engine import Engine
from xray.training.loss_spikes import SpikeDetector
from xray.training.metrics import Sinks
from xray.training.out_of_memory import explained
from xray.training.replay import write_bundle
from xray.training.run import Run
from xray.training.saving import Saver
from xray.training.state import TrainState
from xray.training.step_data import (
    StepData,
    ValidationData,
    decoding_metrics,
    replaced_samples,
    step_shape,
    training_stream,
)
from xray.training.step_result import Events, ReducedStep
from xray.training.telemetry import DATA, Telemetry
from xray.training.watchdog import SAVING

log = logging.getLogger("xray")
READING = "reading the metrics of the step"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Context in which SIGNALS set `received`, so that the run saves and stops.

    A second interrupt stops at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            log.info("stops after this step and saves it; interrupt again to stop at once")
        self.received = True


@dataclass
class PendingStep:
    """A step whose update is on its way on the device, and whose numbers the host has not read."""

    step: int
    result: ReducedStep
    bad: list[Replaced]  # this rank's samples that could not be used
    values: dict[str, float]  # metrics that the host knows
    skipped: bool = False  # its loss was a spike


@dataclass
class TrainingLoop:
    """Steps of a run from its state to the end; every rank runs it."""

    run: Run
    engine: Engine
    state: TrainState
    device: torch.device
    sinks: Sinks
    telemetry: Telemetry
    saver: Saver
    signals: StopSignals

    def __post_init__(self) -> None:
        run = self.run
        self.config, self.stage, self.module = run.config, run.stage, self.engine.module
        self.micros = Accumulator(self.engine, run.stage, self.device, run.config.seed)
        self.bad = BadSamples(run.out, self.state, run.plans | run.validation_plans)
        self.spikes = SpikeDetector(run, self.state)
        plans = run.validation_plans
        self.validation = ValidationData(run.stage, run.config, plans, self.device)

    def run_steps(self) -> None:
        """Train the remaining steps.

        Raises Preempted after saving, DataError past `data.max_bad_fraction`, TrainingError for a
        loss or gradient that is not finite, before the weights change.
        """
        remaining = range(self.state.step, self.config.steps)
        if not remaining:  # killed between the last save and the export
            return
        plans = self.run.plans
        stream = training_stream(self.stage, self.config, plans, remaining, self.device)
        with closing(StepData(stream)) as data, closing(self.validation):
            self.telemetry.watchdog.at(DATA, self.state.step)
            Events(failure=data.fetch()).agreed(self.device)
            self._started = time.monotonic() - self.state.seconds
            before: PendingStep | None = None
            shape = self._shape(self.state.step)
            for step in remaining:
                following = self._shape(step + 1)
                self.telemetry.begin(step)
                loaded = data.loaded
                with explained(self.config, step, self.device):
                    pending = self._run_passes(step, shape, data)
                if before is not None:  # while the device runs the passes
                    self._finish(before)
                with explained(self.config, step, self.device):
                    self._update(pending)
                # A rank that fails to read the next step's data takes part in it with these.
                at_once = following != shape or self._needed_at_once(step + 1)
                shape = following
                if at_once:
                    pending.result.wait()
                self.telemetry.end(self.config.progress(step), loaded)
                if at_once:
                    self._finish(pending)
                before = None if at_once else pending

    def _shape(self, step: int) -> StepShape:
        """Return the sizes and this rank's micro-batches of a step."""
        return step_shape(self.stage, self.config.blocks, self.config.progress(step))

    def _needed_at_once(self, done: int) -> bool:
        """Return True if the numbers of the step that ends as `done` are needed before the next.

        Otherwise they are read while the next step's passes run.
        """
        train = self.config.train
        intervals = self.config.log_every, train.save_every, train.validate_every
        return done == self.config.steps or any(_every(done, each) for each in intervals)

    def _run_passes(self, step: int, shape: StepShape, data: StepData) -> PendingStep:
        """Run forward and backward of all micro-batches, then fetch the next step's data.

        Nothing waits for the device.
        """
        config, loaded = self.config, data.loaded
        metrics = self.micros.train(step, config.progress(step), shape.micro, loaded)
        failure = None
        if step + 1 < config.steps:
            self.telemetry.mark(DATA)
            failure = data.fetch()
        waited = self.telemetry.end_own_work()
        bad = replaced_samples(loaded)
        writing = self.saver.writing
        events = Events(self.signals.received, failure, len(bad), waited, writing)
        values = decoding_metrics(loaded) | self._epochs(step)
        return PendingStep(step, ReducedStep(events, metrics, self.device), bad, values)

    def _update(self, pending: PendingStep) -> None:
        """Make the optimizer's step, or skip it as a spike.

        Weights do not change if the loss or a gradient is not finite.
        """
        config, progress = self.config, self.config.progress(pending.step)
        loss, skip = pending.result["loss"], config.train.spikes == "skip"
        lr = pending.values["lr"] = lr_at(progress, config.optim, config.global_batch)
        if skip and math.isfinite(value := dist.to_host(loss)):
            pending.skipped = self.spikes.skips(value)
        if pending.skipped:
            self.engine.skip()
        else:
            self.engine.set_lr(lr, progress)
            self.engine.step(loss)
            pending.result.append("grad_norm", self.engine.norm)
            self.stage.after_step(self.engine, self.module)
        pending.result.copy_to_host()

    def _finish(self, pending: PendingStep) -> None:
        """Read a step's numbers; log, validate and save if its time has come.

        Raises the errors of `run_steps`.
        """
        config, state, step = self.config, self.state, pending.step
        self.telemetry.mark(READING)
        events, metrics = pending.result.read()
        if self.saver.pending and not events.writing:  # on no rank
            self.telemetry.mark("saving", SAVING)
            self.saver.complete()
            self.telemetry.mark(READING)
        if events.replaced:
            read = state.samples + config.global_batch
            self.bad.account(pending.bad, read, config.data.max_bad_fraction)
        outcome = {"skipped": 1.0} if pending.skipped else {"grad_norm": metrics.pop("grad_norm")}
        values = metrics | pending.values | outcome | self._sizes(config.progress(step))
        for what, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
            if not math.isfinite(values.get(name, 0.0)):
                self._stop(what, values[name], values)
        if config.train.spikes != "skip":
            self.spikes.skips(values["loss"])
        state.step, state.samples = step + 1, state.samples + config.global_batch
        state.seconds = time.monotonic() - self._started
        self.engine.update_average(state.step)
        values |= self.telemetry.rates(events.waited)
        last = state.step == config.steps
        if last or _every(state.step, config.train.validate_every):
            values |= self._validate(1.0 if last else config.progress(step))
        self._log(values, config.progress(step), last or _every(step + 1, config.log_every))
        if last or events.preempted or _every(step + 1, config.train.save_every):
            self._save(values, at_once=last or events.preempted)
        if events.preempted:
            raise Preempted(
                f"stopped by a signal at step {step + 1}; the same command continues"
            ).on_all_ranks()

    def _stop(self, what: str, value: float, values: dict[str, float]) -> NoReturn:
        """Write a bundle of the step and end the run before weights change. Collective."""
        self.telemetry.mark("saving", SAVING)
        where = write_bundle(self.run, self.engine, self.state, what, {**values, what: value})
        raise TrainingError(
            f"the {what} of step {self.state.step + 1} is {value}: stopped before the weights "
            f"changed {where}; start again in another out= with a lower optim.base_lr or with "
            "optim.clip_grad; the checkpoints are kept"
        ).on_all_ranks()

    def _validate(self, progress: float) -> dict[str, float]:
        """Return means over the fixed validation samples at the current sizes, as `val/...`."""
        config = self.config
        self.telemetry.mark("validation")
        if not config.validation:
            return {}
        shape = step_shape(self.stage, config.validation, progress)
        loaded, failure = self.validation.read(shape)
        bad = replaced_samples(loaded)
        if Events(failure=failure, replaced=len(bad)).agreed(self.device).replaced:
            read = self.state.samples + sum(block.samples for block in config.validation)
            self.bad.account(bad, read, config.data.max_bad_fraction)
        metrics = self.micros.evaluate(progress, shape.micro, loaded)
        _, values = ReducedStep(Events(), metrics, self.device).read()
        values |= self._sizes(progress)
        return {f"val/{name}": value for name, value in values.items()}

    def _log(self, values: dict[str, float], progress: float, logged: bool) -> None:
        """Show the step, and write its line and the stage's warnings if it is logged."""
        if logged:
            values |= self.telemetry.report() | self.saver.take_metrics()
        self.sinks.write(self.state, values, logged)
        if logged:
            for warning in self.stage.watch(values, progress):
                log.warning("step %d: %s", self.state.step, warning)

    def _save(self, values: dict[str, float], at_once: bool) -> None:
        """Save a checkpoint; the seconds it takes are in the next logged line."""
        train, state = self.config.train, self.state
        state.score = values.get(train.best_by)
        if train.keep_best and state.score is None:
            log.warning(
                "step %d has no metric %s (train.best_by), by which train.keep_best chooses "
                "checkpoints; its metrics: %s",
                state.step, train.best_by, ", ".join(sorted(values)),
            )  # fmt: skip
        self.telemetry.mark("saving", SAVING)
        self.saver.save(state, at_once)

    def _epochs(self, step: int) -> dict[str, float]:
        """Return the number of epochs over each source after a step."""
        views = self.config.data.views
        return {
            f"{b.source}/epochs": (step + 1) * b.samples / views / self.run.plans[b.source].total
            for b in self.config.blocks
        }

    def _sizes(self, progress: float) -> dict[str, float]:
        """Return current values of schedules: keep rate (or one per block), resolution, frames."""
        rate = self.module.keep_rate(progress)
        if isinstance(rate, float | int):
            values = {"keep_rate": float(rate)}
        else:
            values = {f"keep_rate/{number}": value for number, value in enumerate(rate)}
        for name in ("resolution", "frames"):
            steps = getattr(self.config.data, name)
            if len(steps_of(steps)) > 1:
                values[name] = float(value_at(steps, progress))
        return values


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
