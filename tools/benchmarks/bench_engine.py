"""Cost of training through the engine: a step against plain PyTorch, the loop, checkpoints.

    python -m tools.benchmarks.bench_engine [--tables abc] [--batch 4] [--rounds 12] [--device cuda]
        [--processor-time] [--out FILE.json]

(a) A step (forward, backward, gradient clipping, AdamW) of the mae stage's module with ViT-S/16 at
112 px: plain PyTorch and ZeRO 0 to 3 on one process, which take turns on the same batch. (b) The
overhead of the training loop per step (metrics, sample plan, progress, files). (c) Time and bytes
of a checkpoint against those of the state.

On CUDA, steps run in bf16. If other work shares the cores, use one thread (OMP_NUM_THREADS=1) and
--processor-time, which does not count the time of other processes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipelines.ingest.demo import DemoConfig, make_demo
from stages.mae import MaeModule, MaeStage
from stages.mae_config import MaeConfig
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved
from xray.config import BlockConfig, SourceConfig
from xray.dist import choose_device
from xray.optim import parameter_groups, set_lr
from xray.training.checkpoint import load_checkpoint, write_checkpoint
from xray.training.deepspeed_setup import init_distributed
from xray.training.engine import Engine
from xray.training.loop import TrainingLoop
from xray.training.saving import Saver
from xray.training.state import TrainState
from xray.training.step_data import StepData
from xray.training.trainer import train_stage

SIDE, PATCHES = 112, 49
LR = 1e-4
STATE = 12  # bytes per parameter: weight and two moments in fp32


def make_config(precision: str, zero: int) -> MaeConfig:
    """Return the configuration of all tables for a precision and a ZeRO stage."""
    config = MaeConfig(stage="mae")
    config.model.name, config.data.resolution, config.data.frames = "vit_small_patch16_224", SIDE, 2
    config.train.precision, config.zero.stage = precision, zero  # type: ignore[assignment]
    return config


def make_module(config: MaeConfig, device: torch.device) -> MaeModule:
    """Build the mae stage's module with the same weights on each call."""
    torch.manual_seed(0)
    return MaeModule(config).to(device)


class Steps:
    """Factory of training steps on one batch, each with a copy of the same model."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device = device
        self.precision = "bf16" if device.type == "cuda" else "fp32"
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randint(256, (batch, 1, 3, SIDE, SIDE), generator=generator)
        noise = torch.rand(batch, PATCHES, generator=generator)
        self.batch = {"pixels": pixels.to(torch.uint8).to(device), "mask_noise": noise.to(device)}

    def plain(self) -> Callable[[], Tensor]:
        """Return a step in plain PyTorch."""
        config = make_config(self.precision, 0)
        module = make_module(config, self.device)
        groups = parameter_groups(module, config.optim)
        betas = (config.optim.betas[0], config.optim.betas[1])
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.optim.eps)
        autocast = partial(torch.autocast, self.device.type, torch.bfloat16)

        def step() -> Tensor:
            set_lr(optimizer.param_groups, LR)
            with autocast(enabled=self.precision == "bf16"):
                loss = module(self.batch, 0.5).loss
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), config.optim.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    def engine(self, zero: int) -> Engine:
        """Return an engine with a ZeRO stage."""
        config = make_config(self.precision, zero)
        return Engine(make_module(config, self.device), config)

    def through(self, engine: Engine) -> Callable[[], Tensor]:
        """Return a step through the engine, as in the trainer."""

        def step() -> Tensor:
            engine.begin(0, 1)
            loss = engine(self.batch, 0.5).loss
            engine.backward(loss)
            engine.set_lr(LR, 0.5)
            engine.step()
            return loss.detach()

        return step


def against_plain(options: argparse.Namespace, device: torch.device) -> Table:
    """Make table (a): steps of plain PyTorch and ZeRO."""
    steps = Steps(device, options.batch)
    runs = {"plain PyTorch": steps.plain()}
    runs |= {f"ZeRO {zero}": steps.through(steps.engine(zero)) for zero in options.zero}
    losses = {name: float(step()) for name, step in runs.items()}
    spread = max(losses.values()) - min(losses.values())
    assert spread < 1e-2, f"the losses differ: {losses}"
    seconds = interleaved(runs, options.rounds, options.clock)
    base, rows = seconds["plain PyTorch"], []
    target = f"<= {1.05 if device.type == 'cuda' else 1.10:.2f}x"
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        cells = [f"{1e3 * statistics.median(times):,.0f}", f"{ratio:.3f}x"]
        cells.append(f"{min(times) / min(base):.3f}x")
        rows.append([name, *cells, target if name == "ZeRO 0" else ""])
    heads = ["step with", "ms, median", "ratio, median of pairs", "ratio of best rounds", "target"]
    size = sum(p.numel() for p in make_module(make_config("fp32", 0), device).parameters())
    title = f"(a) ViT-S/16 mae, {size / 1e6:.1f} M parameters, {SIDE} px, batch {options.batch}, "
    title += f"{steps.precision}, {options.rounds} rounds; first losses equal to {spread:.0e}"
    return Table(title, heads, rows)


class Stopwatch:
    """Timer of the seconds inside wrapped calls; nested calls count once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seconds = clock, 0.0
        self.depth = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call so that its time is counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, self.depth = self.clock(), self.depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += self.clock() - start

        return timed


def loop_overhead(options: argparse.Namespace, device: torch.device) -> Table:
    """Make table (b): the training loop's time per step."""
    init_distributed(device)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo = DemoConfig(photos=64, clips=0, heldout=0, per_shard=32, side=64, frames=2)
        make_demo(folder / "demo", demo)
        for log_every in (1, 10):
            config = make_config("bf16" if device.type == "cuda" else "fp32", 0)
            config.data.root, config.data.workers = str(folder / "demo"), 2
            config.data.sources = {"photos": SourceConfig("photos")}
            config.data.blocks = [BlockConfig("photos", options.batch)]
            config.train.samples = options.batch * options.steps
            config.train.log_every, config.train.save_every = log_every, 10**6
            config.out = str(folder / f"run{log_every}")
            every = f"{log_every} step" + "s" * (log_every > 1)
            rows.append([every, *_loop_times(config, device, options.clock)])
    heads = ["metrics written every", "steps", "ms per step", "model and optimizer"]
    heads += ["data and saving", "loop overhead", "target"]
    return Table(f"(b) The training loop, batch {options.batch}, ZeRO 0", heads, rows)


def _loop_times(config: MaeConfig, device: torch.device, clock: Callable[[], float]) -> list[str]:
    """Run a training and return its times, as the cells of table (b)."""
    loop, model, rest = (Stopwatch(clock) for _ in range(3))
    timed = [
        (TrainingLoop, "run_steps", loop),
        *((Engine, name, model) for name in ("__call__", "backward", "step")),
        (StepData, "fetch", rest),
        (Saver, "save", rest),
    ]
    with ExitStack() as patches:
        for owner, name, watch in timed:
            call = watch.around(getattr(owner, name))
            patches.enter_context(patch.object(owner, name, call))
        train_stage(MaeStage, config, device)
    overhead = loop.seconds - model.seconds - rest.seconds
    steps = config.steps
    cells = [f"{steps}", f"{1e3 * (loop.seconds - rest.seconds) / steps:.1f}"]
    cells += [f"{1e3 * seconds / steps:.1f} ms" for seconds in (model.seconds, rest.seconds)]
    share = overhead / (overhead + model.seconds)
    return [*cells, f"{1e3 * overhead / steps:.2f} ms, {share:.2%}", "<= 1%"]


def checkpoints(options: argparse.Namespace, device: torch.device) -> Table:
    """Make table (c): saving and loading checkpoints."""
    steps, rows = Steps(device, options.batch), []
    for zero in options.zero:
        engine = steps.engine(zero)
        steps.through(engine)()  # creates the optimizer's moments
        size = STATE * sum(engine.trained.values())
        with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
            folder, target = Path(temporary), Path(temporary) / "step_00000001"
            state = {"state": torch.zeros(size // 4)}
            runs: dict[str, Callable[[], object]] = {
                "plain": partial(save_file, state, folder / "plain.safetensors"),
                "save": partial(write_checkpoint, engine, target, TrainState(step=1)),
                "load": partial(load_checkpoint, engine, target),
            }
            seconds = interleaved(runs, 5)
            files = [path for path in target.rglob("*") if path.is_file()]
            written = sum(path.stat().st_size for path in files)
        save, load, plain = (statistics.median(seconds[k]) for k in ("save", "load", "plain"))
        cells = [f"{size / 1e6:,.0f}", f"{written / 1e6:,.0f}", f"{written / size:.4f}"]
        cells += [f"{x:.2f}" for x in (save, load, plain)]
        rows.append(
            [f"ZeRO {zero}", *cells, f"{size / save / 1e6:,.0f}", f"{size / load / 1e6:,.0f}"]
        )
        engine.destroy()
    heads = ["ZeRO stage, one process", "state, MB", "checkpoint, MB", "bytes / state", "save, s"]
    heads += ["load, s", "one safetensors of the state, s", "saved, MB/s", "loaded, MB/s"]
    return Table("(c) A checkpoint; the state is weights and two moments in fp32", heads, rows)


def tables(options: argparse.Namespace, device: torch.device) -> Iterator[Table]:
    """Make the chosen tables, one after the other."""
    functions = {"a": against_plain, "b": loop_overhead, "c": checkpoints}
    for letter in options.tables:
        yield functions[letter](options, device)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="abc", help="any of abc")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60, help="steps of table b")
    parser.add_argument("--folder", help="folder for table c; default: the temporary folder")
    parser.add_argument(
        "--processor-time", action="store_true", help="measure CPU time, on a shared machine"
    )
    parser.add_argument("--out", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    options.clock = time.process_time if options.processor_time else time.perf_counter
    device = choose_device(options.device)
    init_distributed(device)
    machine = hardware(options.device)
    print(machine, flush=True)
    print_tables(tables(options, device), machine, options.out)


if __name__ == "__main__":
    main()
