"""The training loop: one for all stages, on one process or many."""

from __future__ import annotations

import logging
import math
import signal
import time
from contextlib import closing
from types import FrameType
from typing import Any, NoReturn

import torch

from stages.base import Stage
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.config.schedule import steps_of, value_at
from xray.errors import Preempted, TrainingError, XrayError
from xray.optim import lr_at
from xray.training import checkpoint
from xray.training.accumulation import Accumulator
from xray.training.bad_samples import BadSamples
from xray.training.engine import Engine
from xray.training.loss_spikes import Spikes
from xray.training.metrics import Sinks
from xray.training.replay import write_bundle
from xray.training.run import Run
from xray.training.state import TrainState
from xray.training.step_data import Feed, training_stream, validation_stream
from xray.training.step_shape import step_shape
from xray.training.stragglers import Slowest
from xray.training.throughput import Pace
from xray.training.watchdog import SAVING, Watchdog

log = logging.getLogger("xray")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # to save and stop


class Trainer:
    """Trains a run: restored from its own checkpoint, else started from its parents.

    Raises ConfigError, ArtifactError or DataError before training where the cause can be known.
    """

    def __init__(self, stage_class: type[Stage], config: Any, device: torch.device) -> None:
        self.run = Run(stage_class, config)
        self.config, self.out, self.stage = self.run.config, self.run.out, self.run.stage
        self.device = device

    def finished(self) -> Artifact | None:
        """The artifact of this run, verified, if it ran to its end before."""
        return self.run.finished()

    def _build(self) -> None:
        """Module, engine and state: from the run's own checkpoint, else its parents, else new."""
        config = self.config
        self.module = self.run.build()
        self.engine = Engine(self.module, config)
        self.micros = Accumulator(self.engine, self.stage, self.device, config.seed)
        self.state = TrainState(world=dist.world_size(), zero_stage=config.zero.stage)
        self.run.begin()
        found = checkpoint.find_checkpoint(self.out / "checkpoints")
        if found is not None:
            self.state = checkpoint.load_checkpoint(self.engine, found)
            log.info("continues from %s, step %d of %d", found, self.state.step, config.steps)
        elif self.run.parents:
            paths = (str(artifact.path) for artifact in self.run.parents.values())
            log.info("starts from %s", ", ".join(paths))
        else:
            log.info("starts from scratch")
        plans = self.run.plans | self.run.validation_plans
        self.bad = BadSamples(self.out, self.state, plans)
        self.spikes = Spikes(self.run, self.state)
        self.preempted = False
        self.interrupted = False
        self._saved: dict[str, float] = {}  # of the last save, until it is logged

    # the loop ---------------------------------------------------------------------------------

    def fit(self) -> Artifact:
        """Train to the end and write the artifact.

        Raises Preempted after saving, DataError past `data.max_bad_fraction`, TrainingError for a
        loss that is not finite (before the optimizer sees it).
        """
        self._build()
        config, state = self.config, self.state
        sinks = Sinks(self.out, self.stage.name, config, state)
        self.watchdog = Watchdog(self.out, config.train.hang_seconds)
        previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            self._loop(sinks)
            if self.config.debug.overfit_batch and dist.is_main():
                self._say_whether_learned(sinks.last)
            self.watchdog.at("writing the artifact", state.step, SAVING)
            artifact = self._export(sinks.last)
            if self._reduce({}, None)["preempted"]:
                message = f"stage {self.stage.name} is finished; run it again to go on"
                raise Preempted(message).on_all_ranks()
        finally:
            self.watchdog.close()
            if self.run.mirror is not None:
                self.run.mirror.wait()
            sinks.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.engine.destroy()
        return artifact

    def _loop(self, sinks: Sinks) -> None:
        config, state = self.config, self.state
        if state.step >= config.steps:  # killed between the last save and the export
            return
        pin = self.device.type == "cuda"
        remaining = range(state.step, config.steps)
        stream = training_stream(self.stage, config, self.run.plans, remaining, pin)
        with closing(Feed(stream)) as feed:
            self._steps(remaining, feed, sinks)

    def _steps(self, remaining: range, feed: Feed, sinks: Sinks) -> None:
        config, state = self.config, self.state
        self.watchdog.at("waiting for data", state.step)
        pending, failure = feed.next()
        self._reduce({}, failure)
        feed.waited()  # for the loader to start
        pace = Pace(self.stage, self.module, self.device)
        slowest = Slowest(self.module.towers, self.device)
        started = time.monotonic() - state.seconds
        for step in remaining:
            pace.begin()
            slowest.start()
            progress = config.progress(step)
            shape = step_shape(self.stage, config.blocks, progress)
            loaded, pending = pending, []
            self.watchdog.at("forward and backward", step)
            values = self.micros.train(step, progress, shape.micro, loaded)
            if step + 1 < config.steps:  # read ahead: its failure travels in this step's reduction
                self.watchdog.at("waiting for data", step)
                pending, failure = feed.next()
            values |= feed.waited()
            slowest.stop(values["data/wait"])
            self.watchdog.at("adding up the step's values", step)
            values = self._reduce(values, failure, sum(len(item.bad) for item in loaded))
            if values.pop("bad"):
                read = state.samples + config.global_batch
                self.bad.account(loaded, read, config.data.max_bad_fraction)
            values |= feed.readings(loaded) | self._epochs()
            preempted = values.pop("preempted") > 0
            values |= self._update(step, progress, values)
            state.seconds = time.monotonic() - started
            pace.end(progress, values.pop("data/wait"), loaded)
            values |= self._sizes(progress) | pace.rates()
            last = state.step == config.steps
            if _every(state.step, config.train.validate_every) or last:
                self.watchdog.at("validation", step)
                values |= self._validate(1.0 if last else progress)
            logged = _every(state.step, config.train.log_every) or last
            if logged:
                values |= pace.memory() | self._compare(slowest) | self._saved
                self._saved = {}
            sinks.write(state, values, logged)
            for warning in self.stage.watch(values, progress) if logged else []:
                log.warning("step %d: %s", state.step, warning)
            if logged:
                pace.restart()
            if _every(state.step, config.train.save_every) or last or preempted:
                self._save(values)
            if preempted:
                raise Preempted(
                    f"stopped by a signal at step {state.step}; the same command goes on"
                ).on_all_ranks()

    def _update(self, step: int, progress: float, values: dict[str, float]) -> dict[str, float]:
        """The optimizer's step, unless its loss is a spike that is to be left out; what came of it.

        Raises TrainingError for a loss or a gradient that is not finite, the weights as they were.
        """
        config, state = self.config, self.state
        if not math.isfinite(values["loss"]):
            self._stop("loss", values["loss"], values)
        lr = lr_at(progress, config.optim, config.global_batch)
        skipped = self.spikes.found(values["loss"])
        if skipped:
            self.engine.skip()
        else:
            self.engine.set_lr(lr, progress)
            self.engine.step()
            if not math.isfinite(self.engine.grad_norm):
                self._stop("gradient norm", self.engine.grad_norm, values)
            self.stage.after_step(self.engine, self.module)
        state.step, state.samples = step + 1, state.samples + config.global_batch
        self.engine.update_average(state.step)
        return {"lr": lr} | ({"skipped": 1.0} if skipped else {"grad_norm": self.engine.grad_norm})

    def _compare(self, slowest: Slowest) -> dict[str, float]:
        """How far the slowest rank is behind, with a warning that names it."""
        if dist.world_size() == 1:
            return {}
        values, warning = slowest.compare()
        if warning is not None:
            log.warning("step %d: %s", self.state.step, warning)
        return values

    def _save(self, values: dict[str, float]) -> None:
        """A checkpoint of this step; what it took is in the next line of the log."""
        train, state = self.config.train, self.state
        state.score = values.get(train.best_by)
        if train.keep_best and state.score is None:
            log.warning(
                "step %d has no %s to choose train.keep_best by: it has %s",
                state.step, train.best_by, ", ".join(sorted(values)),
            )  # fmt: skip
        self.watchdog.at("saving", state.step - 1, SAVING)
        begun = time.monotonic()
        if self.run.mirror is not None:
            self.run.mirror.wait()  # it reads what is about to be removed
        folder = checkpoint.save_checkpoint(self.engine, self.out / "checkpoints", state, train)
        seconds = time.monotonic() - begun
        self._saved = {"save/seconds": seconds}
        self.run.copy()
        if dist.is_main():
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            log.info("step %d: saved %.3g GB in %.1f s", state.step, size / 1e9, seconds)

    def _say_whether_learned(self, last: dict[str, float]) -> None:
        """Of a run that saw one batch only: its loss beside that of guessing."""
        for block in self.config.blocks:
            loss, chance = last[f"{block.source}/loss"], self.stage.chance(block.samples)
            loss = last.get(f"{block.source}/contrast", loss)  # without what is added to it
            verdict = (
                ""
                if loss < 0.5 * chance
                else (
                    ": not learned, so more data will not help: try another optim.base_lr, more "
                    "train.samples, or look at the data with xray data stats"
                )
            )
            log.info(
                "overfit_batch: after %d steps on the same %d samples %s/loss is %.3f%s",
                self.config.steps, block.samples, block.source, loss,
                f", guessing gives {chance:.3f}{verdict or ': learned'}" if chance else "",
            )  # fmt: skip

    def _epochs(self) -> dict[str, float]:
        """How often each source has been gone through, once this step is done."""
        return {
            f"{block.source}/epochs": (self.state.step + 1)
            * block.samples
            / self.run.plans[block.source].total
            for block in self.config.blocks
        }

    def _sizes(self, progress: float) -> dict[str, float]:
        """What schedules have come to: the keep rate (or each block's), resolution and frames."""
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

    def _validate(self, progress: float) -> dict[str, float]:
        """Means over the fixed validation samples at the current sizes, as `val/...`."""
        config = self.config
        if not config.validation:
            return {}
        shape = step_shape(self.stage, config.validation, progress)
        stream = validation_stream(self.stage, config, self.run.validation_plans, shape)
        with closing(Feed(stream)) as feed:
            loaded, failure = feed.next()
        if self._reduce({}, failure, sum(len(item.bad) for item in loaded))["bad"]:
            read = self.state.samples + sum(block.samples for block in config.validation)
            self.bad.account(loaded, read, config.data.max_bad_fraction)
        sums = self.micros.evaluate(progress, shape.micro, loaded)
        values = self._reduce(sums, None)
        found = {name: values[name] for name in sums} | self._sizes(progress)
        return {f"val/{name}": value for name, value in found.items()}

    # helpers ----------------------------------------------------------------------------------

    def _reduce(
        self, values: dict[str, float], failure: XrayError | None, bad: int = 0
    ) -> dict[str, float]:
        """The step's one small all-reduce: metrics as means, flags as sums, agreed by all ranks."""
        flags = [float(self.preempted), float(failure is not None), float(bad)]
        names = sorted(values)
        vector = torch.tensor([*flags, *(values[n] for n in names)], dtype=torch.float64)
        vector = dist.sum_over_ranks(vector.to(self.device)).cpu()
        if vector[1]:
            dist.agree(failure)
        means = (vector[3:] / dist.world_size()).tolist()
        result = dict(zip(names, means, strict=True))
        return result | {"preempted": float(vector[0]), "bad": float(vector[2])}

    def _stop(self, what: str, value: float, values: dict[str, float]) -> NoReturn:
        """End the run before weights change, with a bundle of the step. Collective."""
        self.watchdog.at("saving", self.state.step, SAVING)
        where = write_bundle(self.run, self.engine, self.state, what, {**values, what: value})
        raise TrainingError(
            f"the {what} of step {self.state.step + 1} is {value}: stopped before the weights "
            f"changed {where}; start again in another out= with a lower optim.base_lr or with "
            "optim.clip_grad; the checkpoints are kept"
        ).on_all_ranks()

    def _export(self, metrics: dict[str, float]) -> Artifact:
        chosen = self.config.train.export
        state_dict = self.engine.state_dict(None if chosen == "last" else chosen)  # collective
        path = self.out / "artifact"
        given = path, self.module, state_dict, self.state, metrics, chosen
        dist.on_main(lambda: self.run.write_artifact(*given))
        self.run.copy()
        return open_artifact(path)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            log.info("stops after this step, which is saved; interrupt again to stop at once")
        self.preempted = True


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
