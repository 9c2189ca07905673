"""Sinks of metrics: metrics.jsonl, tensorboard, wandb and the terminal."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from xray import dist
from xray.config import RunConfig, TrainConfig
from xray.errors import ArtifactError, ConfigError, brief
from xray.files import write_text
from xray.progress import LINE_SECONDS
from xray.records import parse_record
from xray.training.state import TrainState
from xray.words import duration

log = logging.getLogger("xray")
console = Console(stderr=True, highlight=False)
STATE_KEYS = ("step", "samples", "seconds")  # in a line of metrics.jsonl, beside the metrics


def check_sinks(config: TrainConfig) -> None:
    """Raise ConfigError for a configured sink whose library is missing."""
    for name, wanted, install in (
        ("tensorboard", config.tensorboard, "tensorboard"),
        ("wandb", bool(config.wandb), "'xray-trainer[wandb]'"),
    ):
        spec = importlib.util.find_spec(name) if wanted else None
        # A spec without an origin is a plain folder of that name, such as wandb leaves behind.
        if wanted and (spec is None or spec.origin is None):
            raise ConfigError(
                f"train.{name} needs the package {name}: pip install {install}, or turn it off "
                f"(train.{name}={'false' if name == 'tensorboard' else ''})"
            )


class Sinks:
    """Writer of a run's metrics on rank 0; drops lines after the step from which the run resumes.

    following: work of a recipe's later stages, as a multiple of this one's, for the time left.
    Raises on every rank: ConfigError if wandb does not start, ArtifactError if it cannot write.
    """

    def __init__(
        self, out: Path, name: str, config: RunConfig, state: TrainState, following: float = 0.0
    ) -> None:
        self.last: dict[str, float] = {}
        self.main = dist.is_main()
        self.following = following
        self.wandb: Any = None
        if config.train.wandb:
            self.wandb = dist.main_first(lambda: _wandb(out, config) if dist.is_main() else None)
        dist.on_main(lambda: self._open(out, name, config, state))

    def _open(self, out: Path, name: str, config: RunConfig, state: TrainState) -> None:
        path = out / "metrics.jsonl"
        kept = lines_up_to(path, state.step)
        self.logged = hashlib.sha256("".join(kept).encode())
        if state.logged not in ("", self.logged.hexdigest()):
            log.warning("%s is damaged: lines up to step %d have changed", path, state.step)
        write_text(path, "".join(kept))
        if kept:
            self.last = {
                k: v
                for k, v in parse_record(kept[-1], dict[str, float]).items()
                if k not in STATE_KEYS
            }
        self.file = path.open("a", buffering=1, encoding="utf-8")
        self.board: Any = None
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tb"), purge_step=state.samples + 1)
        self.terminal = Terminal(name, config.steps, state.step, self.following)

    def write(self, state: TrainState, values: Mapping[str, float], logged: bool) -> None:
        """Show a step in the terminal; write its line if it is logged, which is collective."""
        if self.main:
            self.terminal.show(state, values)
        if logged:
            dist.on_main(lambda: self._record(state, values))

    def _record(self, state: TrainState, values: Mapping[str, float]) -> None:
        self.last = dict(values)
        facts = {"step": state.step, "samples": state.samples, "seconds": round(state.seconds, 3)}
        line = json.dumps({**facts, **values}) + "\n"
        self.logged.update(line.encode())
        state.logged = self.logged.hexdigest()
        try:
            self.file.write(line)
            if self.board is not None:
                for key, value in values.items():
                    self.board.add_scalar(key, value, state.samples)
        except OSError as error:
            raise ArtifactError(
                f"{self.file.name} cannot be written: {brief(error)}; the same command continues "
                "from the last checkpoint"
            ) from error
        if self.wandb is not None:  # it ignores steps that it received before a kill
            self.wandb.log({**facts, **values}, step=state.step)

    def close(self) -> None:
        """Finish all files and wandb's run."""
        if not self.main:
            return
        self.terminal.progress.stop()
        self.file.close()
        if self.board is not None:
            with contextlib.suppress(OSError):  # it may write only now; metrics.jsonl is complete
                self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb(out: Path, config: RunConfig) -> Any:
    """wandb's run of this folder, the same one after a resume."""
    import wandb

    name = out / "wandb_id"
    if not name.exists():
        write_text(name, secrets.token_hex(4))
    try:
        run = wandb.init(
            project=config.train.wandb,
            id=name.read_text("utf-8"),
            name=f"{out.parent.name}/{out.name}",
            dir=str(out),
            config=asdict(config),
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise ConfigError(
            f"train.wandb={config.train.wandb}: wandb does not start: {brief(error)} Set "
            "WANDB_MODE=offline to keep its run on disk"
        ) from error
    run.define_metric("*", step_metric="samples")
    log.info("wandb: %s", run.url or run.dir)
    return run


class Terminal:
    """Progress bar, or progress lines if there is no tty; following: as for Sinks."""

    def __init__(self, name: str, steps: int, step: int, following: float = 0.0) -> None:
        self.name, self.steps, self.following = name, steps, following
        self.resumed_at, self.started, self.printed = step, time.monotonic(), 0.0
        self.progress = Progress(
            TextColumn("[bold]{task.description:>8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.progress.start()
        self.task = self.progress.add_task(name, total=steps, completed=step, note="")

    def show(self, state: TrainState, values: Mapping[str, float]) -> None:
        """Show a step's loss and rate."""
        elapsed = time.monotonic() - self.started
        done = state.step - self.resumed_at
        rate = state.samples / state.step * done / elapsed
        note = f"loss {values['loss']:.4f}  {rate:,.0f} samples/s"
        note += f"  data wait {values['data/wait']:.0%}"
        eta = (self.steps - state.step) * elapsed / done
        recipe = eta + self.following * self.steps * elapsed / done
        whole = f"  whole recipe about {duration(recipe)}" if self.following else ""
        self.progress.update(self.task, completed=state.step, note=note + whole)
        if console.is_terminal or (
            time.monotonic() - self.printed <= LINE_SECONDS and state.step != self.steps
        ):
            return
        self.printed = time.monotonic()
        line = f"{self.name:>8}  step {state.step}/{self.steps}  {note}  eta {duration(eta)}{whole}"
        print(line, file=sys.stderr, flush=True)


def lines_up_to(path: Path, step: int) -> list[str]:
    """Return the sound lines of a metrics.jsonl up to a step, and warn of damaged ones."""
    if not path.is_file():
        return []
    kept, damaged = [], 0
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_record(line, dict[str, float])
            reached, _ = row["step"], row["samples"]
        except (ValueError, KeyError):
            damaged += number < len(lines)  # a kill leaves the last one incomplete
            continue
        if reached <= step:
            kept.append(line.decode() + "\n")
    if damaged:
        log.warning("%s: %d damaged of %d lines are left out", path, damaged, len(lines))
    return kept


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the rows of a metrics.jsonl, [] if there is none."""
    return [parse_record(line, dict[str, float]) for line in lines_up_to(path, sys.maxsize)]
