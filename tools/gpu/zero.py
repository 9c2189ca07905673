"""ZeRO 0 to 3, with and without offloading: losses, master weights, checkpoints, memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tools.gpu.findings import Check, Finding, Number, Scale
from tools.gpu.stage_steps import StageSteps, toy_settings
from xray.training.checkpoint import load_checkpoint, write_checkpoint
from xray.training.host_buffer import HostBuffer
from xray.training.portable_state import own_values, portable_files
from xray.training.state import TrainState

CASES = [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)]
STEPS = 3
LOSS = 1e-4  # largest relative difference of a loss from ZeRO 0's, in fp32
LEFT = 1.0  # MB that may stay allocated after an engine is destroyed
SAVED, LOADED = 2, 0  # ZeRO stages of a checkpoint that is written and read again


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Train the clip stage in every ZeRO stage and look at what each one promises."""
    first: list[float] = []
    for stage, offload in CASES:
        name = f"ZeRO {stage}" + (", offloaded" if offload else "")
        before = _allocated(device)
        try:
            losses, references = _train(device, stage, offload)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            yield Check(name, False, f"{type(error).__name__}: {text}", "3 steps")
            continue
        first = first or losses
        worst = max(abs(a / b - 1) for a, b in zip(losses, first, strict=True))
        yield Check(f"{name}, loss against ZeRO 0", worst <= LOSS, worst, f"<= {LOSS}")
        gc.collect()
        alive = [kind for kind, reference in references.items() if reference() is not None]
        yield Check(f"{name}, alive after its end", not alive, alive, "nothing")
        if device.type == "cuda":
            torch.cuda.empty_cache()
            left = (_allocated(device) - before) / 1e6
            yield Check(f"{name}, MB left after its end", left < LEFT, left, f"< {LEFT}")
    for stage in range(4):
        yield from _promises(device, stage)
    yield from _moved(device)
    if device.type == "cuda":
        yield _copied(device)


def _steps(device: torch.device, stage: int, offload: bool = False) -> StageSteps:
    zero = {"stage": stage, "offload": offload}
    more = {"zero": zero, "train": {"ema": 0.9}}
    return StageSteps("clip", toy_settings("clip", more), device)


def _train(
    device: torch.device, stage: int, offload: bool
) -> tuple[list[float], dict[str, weakref.ref]]:
    """Train some steps; returns the losses and weak references to the module and the engine."""
    steps = _steps(device, stage, offload)
    losses = [steps.step(number) for number in range(STEPS)]
    steps.engine.destroy()
    return losses, {"module": weakref.ref(steps.module), "engine": weakref.ref(steps.engine)}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _promises(device: torch.device, stage: int) -> Iterator[Finding]:
    """Check that `skip` changes nothing, and that `clamp` reaches the fp32 master."""
    steps = _steps(device, stage)
    engine, name = steps.engine, "logit_scale"
    steps.step()
    before = {key: engine.read(key).clone() for key in engine.trained}
    steps.accumulator.train(1, 0.9, steps.shape.micro, steps.loaded)
    engine.skip()
    changed = [key for key, value in before.items() if not torch.equal(value, engine.read(key))]
    yield Check(f"ZeRO {stage}, weights that skip changes", not changed, changed[:3], "none")
    engine.clamp(steps.module.logit_scale, 0.0, 0.5)
    found = engine.read(name).item(), engine.state_dict()[name].item()
    ok = found == (0.5, 0.5)
    yield Check(f"ZeRO {stage}, master and weight after clamp", ok, list(found), "[0.5, 0.5]")
    engine.destroy()


def _moved(device: torch.device) -> Iterator[Finding]:
    """Write a checkpoint in one ZeRO stage and read it in another one."""
    with TemporaryDirectory() as folder:
        saved, loaded = _steps(device, SAVED), _steps(device, LOADED)
        saved.step()
        path = Path(folder) / "step_00000001"
        write_checkpoint(saved.engine, path, TrainState(step=1))
        loaded.step(5)
        load_checkpoint(loaded.engine, path)
    different = [
        f"{name}, {slot or 'weight'}"
        for name in saved.engine.trained
        for slot in (None, *saved.engine.slots)
        if not torch.equal(saved.engine.read(name, slot), loaded.engine.read(name, slot))
    ]
    title = f"checkpoint of ZeRO {SAVED}, tensors that differ in ZeRO {LOADED}"
    yield Check(title, not different, different[:3], "none")
    yield Number("trained values", sum(saved.engine.trained.values()))
    for steps in (saved, loaded):
        steps.engine.destroy()


def _copied(device: torch.device) -> Check:
    """Copy a state to page-locked memory, train on, and compare it with the state before."""
    steps = _steps(device, SAVED)
    steps.step()
    expected = dict(portable_files(steps.engine))
    host = HostBuffer(own_values(steps.engine), device)
    copied = dict(portable_files(steps.engine, host.keep))
    steps.step()
    host.wait()
    different = [
        f"{file}, {name}"
        for file, tensors in expected.items()
        if isinstance(tensors, dict)
        for name, value in tensors.items()
        if not torch.equal(value, copied[file][name])
    ]
    host.close()
    steps.engine.destroy()
    return Check(
        "tensors that differ in a copy for the background", not different, different[:3], "none"
    )
