"""The training loop: one for all stages, on one process or many."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from data_pipelines.curation.keep import keep_listed
from data_pipelines.sampling import make_plans
from data_pipelines.sources import Source, check_same_on_all_ranks, open_sources
from stages.base import Stage, split_parents
from xray import checkpoint, dist
from xray.accumulate import Accumulator
from xray.artifact import Artifact, open_artifact, write_artifact, write_text
from xray.bad_samples import BadSamples
from xray.checkpoint import TrainState
from xray.config import RunConfig, dump
from xray.engine import Engine
from xray.errors import DataError, Preempted, TrainingError
from xray.feed import Feed, check_batches, step_shape, training_stream, validation_stream
from xray.hashing import config_hash, hash_json, identity, to_dict
from xray.optim import lr_at
from xray.pace import Pace
from xray.run_record import check_same_run, run_record
from xray.schedule import steps_of, value_at
from xray.sinks import Sinks, check_sinks

log = logging.getLogger("xray")


class Trainer:
    """A stage's run in a folder: restored from its own checkpoint, else started from its parents.

    Raises ConfigError, ArtifactError or DataError before training where the cause can be known.
    """

    def __init__(self, stage_class: type[Stage], config: Any, device: torch.device) -> None:
        config.validate()
        self.config: RunConfig = config
        self.device = device
        self.out = Path(config.out)
        parents = split_parents(stage_class, [open_artifact(path) for path in config.init_from])
        self.parents = {
            slot: artifact
            for slot, artifact in (("vision", parents.vision), ("text", parents.text))
            if artifact is not None
        }
        self.stage = stage_class(config)
        check_batches(self.stage, config)
        check_sinks(config.train)
        names = [block.source for block in [*config.blocks, *config.validation]]
        opened = open_sources(config.data, names)

        def prepared() -> dict[str, Source]:
            kept = {n: keep_listed(s, config.data.sources[n]) for n, s in opened.items()}
            return self.stage.prepare(kept, parents)

        self.sources = dist.main_first(prepared)
        check_same_on_all_ranks(self.sources)
        self.plans, self.validation_plans = (
            make_plans(blocks, self.sources, config.data, config.seed)
            for blocks in (config.blocks, config.validation)
        )
        self.record = run_record(self.stage, config, self.sources, self.parents)
        check_same_run(self.out, self.record, identity(type(config)()))
        self._start_from = parents

    def finished(self) -> Artifact | None:
        """The artifact of this run, verified, if it ran to its end before."""
        path = self.out / "artifact"
        if not path.exists():
            return None
        log.info("stage %s is finished: %s", self.stage.name, path)
        return open_artifact(path)

    def _build(self) -> None:
        """Module, engine and state: from the run's own checkpoint, else its parents, else new."""
        config = self.config
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        self.module = self.stage.build(self._start_from)
        self.engine = Engine(self.module, config)
        self.micros = Accumulator(self.engine, self.stage, self.device, config.seed)
        self.state = TrainState(world=dist.world_size(), zero_stage=config.zero.stage)
        if dist.is_main():
            self.out.mkdir(parents=True, exist_ok=True)
            dump(config, self.out / "config.yaml")
            if not (self.out / "run.json").exists():
                write_text(self.out / "run.json", json.dumps(self.record, indent=1))
        found = checkpoint.find_checkpoint(self.out / "checkpoints")
        if found is not None:
            self.state = checkpoint.load_checkpoint(self.engine, found)
            log.info("continues from %s, step %d of %d", found, self.state.step, config.steps)
        elif self.parents:
            log.info("starts from %s", ", ".join(str(a.path) for a in self.parents.values()))
        else:
            log.info("starts from scratch")
        self.bad = BadSamples(self.out, self.state, self.plans | self.validation_plans)
        self.preempted = False

    # the loop ---------------------------------------------------------------------------------

    def fit(self) -> Artifact:
        """Train to the end and write the artifact.

        Raises Preempted after saving, DataError past `data.max_bad_fraction`, TrainingError for a
        loss that is not finite (before the optimizer sees it).
        """
        self._build()
        config, state = self.config, self.state
        sinks = Sinks(self.out, self.stage.name, config, state)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            self._loop(sinks)
            if self.config.debug.overfit_batch and dist.is_main():
                self._say_whether_learned(sinks.last)
            metrics = {**sinks.last, **self._validate(1.0)}
            artifact = self._export(metrics)
            if self._reduce({}, None)["preempted"]:
                raise Preempted(f"stage {self.stage.name} is finished; run it again to go on")
        finally:
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
        feed = Feed(training_stream(self.stage, config, self.plans, remaining, pin))
        pending, failure = feed.next()
        self._reduce({}, failure)
        feed.waited()  # for the loader to start
        pace = Pace(self.stage, self.module, self.device)
        started = time.monotonic() - state.seconds
        for step in remaining:
            pace.begin()
            progress = config.progress(step)
            shape = step_shape(self.stage, config.blocks, progress)
            loaded, pending = pending, []
            values = self.micros.train(step, progress, shape.micro, loaded)
            if step + 1 < config.steps:  # read ahead: its failure travels in this step's reduction
                pending, failure = feed.next()
            values |= feed.waited()
            values = self._reduce(values, failure, sum(len(item.bad) for item in loaded))
            if values.pop("bad"):
                read = state.samples + config.global_batch
                self.bad.account(loaded, read, config.data.max_bad_fraction)
            values |= feed.readings(loaded) | self._epochs()
            if not math.isfinite(values["loss"]):
                raise TrainingError(self._bundle(step, "loss", values["loss"]))
            lr = lr_at(progress, config.optim, config.global_batch)
            self.engine.set_lr(lr, progress)
            self.engine.step()
            if not math.isfinite(self.engine.grad_norm):
                raise TrainingError(self._bundle(step, "gradient norm", self.engine.grad_norm))
            self.stage.after_step(self.engine, self.module)
            state.step, state.samples = step + 1, state.samples + config.global_batch
            state.seconds = time.monotonic() - started
            pace.end(progress, values.pop("data/wait"), loaded)
            preempted = values.pop("preempted") > 0
            values |= {"lr": lr, "grad_norm": self.engine.grad_norm, **self._sizes(progress)}
            values |= pace.rates()
            if _every(state.step, config.train.validate_every) and state.step < config.steps:
                values |= self._validate(progress)
            last = state.step == config.steps
            logged = _every(state.step, config.train.log_every) or last
            values |= pace.memory() if logged else {}
            sinks.write(state, values, logged)
            for warning in self.stage.watch(values, progress) if logged else []:
                log.warning("step %d: %s", state.step, warning)
            if logged:
                pace.restart()
            if _every(state.step, config.train.save_every) or last or preempted:
                folder = self.out / "checkpoints"
                checkpoint.save_checkpoint(
                    self.engine, folder, state, config.train.keep_checkpoints
                )
            if preempted:
                raise Preempted(
                    f"stopped by a signal at step {state.step}; the same command goes on"
                )

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
            / self.plans[block.source].total
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
        feed = Feed(validation_stream(self.stage, config, self.validation_plans, shape))
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
        self, values: dict[str, float], failure: str | None, bad: int = 0
    ) -> dict[str, float]:
        """The step's one small all-reduce: metrics as means, flags as sums, agreed by all ranks."""
        flags = [float(self.preempted), float(failure is not None), float(bad)]
        names = sorted(values)
        vector = torch.tensor([*flags, *(values[n] for n in names)], dtype=torch.float64)
        vector = dist.sum_over_ranks(vector.to(self.device)).cpu()
        if vector[1]:
            reasons = [text for text in dist.gather_objects(failure) if text]
            raise DataError(reasons[0])
        means = (vector[3:] / dist.world_size()).tolist()
        result = dict(zip(names, means, strict=True))
        return result | {"preempted": float(vector[0]), "bad": float(vector[2])}

    def _bundle(self, step: int, what: str, value: float) -> str:
        """Write down what a step was made of and return the message about it."""
        path = self.out / f"nonfinite_step_{step + 1:08d}.json"
        if dist.is_main():
            drawn = 0 if self.config.debug.overfit_batch else step  # whose samples it had
            blocks = {
                block.source: self.plans[block.source].positions(drawn, block.samples).tolist()
                for block in self.config.blocks
            }
            facts = {"step": step, "seed": self.config.seed, what: str(value), "positions": blocks}
            path.write_text(json.dumps(facts))
        return (
            f"the {what} of step {step + 1} is {value}: stopped before the weights changed; its "
            f"samples are in {path}; start again in another out= with a lower optim.base_lr or "
            "with optim.clip_grad; the checkpoints are kept"
        )

    def _export(self, metrics: dict[str, float]) -> Artifact:
        state_dict = self.engine.state_dict()  # collective
        path = self.out / "artifact"
        if dist.is_main():
            facts = {
                "stage": self.stage.name,
                "config": to_dict(self.config),
                "config_hash": config_hash(self.config),
                "data_digest": hash_json(self.record["data"]),
                "inputs": self.record["inputs"],
                "keep_rate": self.module.keep_rate(1.0),
                "samples": self.state.samples,
                "seconds": round(self.state.seconds, 1),
                "bad_samples": self.state.bad,
                "metrics": metrics,
            }
            parts = self.stage.export(self.module, state_dict)
            write_artifact(path, parts, self.stage.export_files(), facts, self.parents)
        dist.barrier()
        return open_artifact(path)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.preempted = True


def _every(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
