"""Checkpoints that are written in the background."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import assert_same
from tiny import ALL_TOKENS, settings, train
from torch import Tensor
from two_process import halfway

from stages.base import StepOutput
from stages.mae import MaeModule, MaeStage
from xray.errors import ArtifactError, ConfigError, TrainingError
from xray.training import host_buffer
from xray.training import portable_state as portable
from xray.training.deepspeed_setup import init_distributed
from xray.training.engine import Engine
from xray.training.metrics import Sinks, read_metrics
from xray.training.run import Run
from xray.training.saving import Saver

EVERY_TWO = (ALL_TOKENS, "train.save_every=2", "train.keep_checkpoints=3")
IN_BACKGROUND = "train.save_in_background=true"
LIMIT = 600.0  # seconds until a test fails that would wait forever


def contents(run: Path) -> dict[str, bytes]:
    """Read the files of all checkpoints, without times and the hash of metrics, which hold some."""
    files = {}
    for path in sorted((run / "checkpoints").rglob("*.*")):
        content = path.read_bytes()
        if path.name == "state.json":
            content = json.dumps({**json.loads(content), "seconds": 0, "logged": ""}).encode()
        files[str(path.relative_to(run))] = content
    return files


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Delay each file of the checkpoint of step 2 until step 4 is logged; yields the order."""
    order, logged = [], threading.Event()
    write, save_tensors = Sinks.write, portable.save_tensors

    def log(self: Sinks, state: Any, *given: Any) -> None:
        write(self, state, *given)
        order.append(f"step {state.step}")
        if state.step == 4:
            logged.set()

    def wait(path: Path, tensors: dict[str, Tensor]) -> None:
        if "step_00000002" in str(path):
            assert logged.wait(LIMIT), "training waits for the checkpoint"
        save_tensors(path, tensors)
        order.append(path.parts[-3])

    monkeypatch.setattr(Sinks, "write", log)
    monkeypatch.setattr(portable, "save_tensors", wait)
    yield order
    logged.set()


@pytest.mark.parametrize("zero", range(4))
def test_a_checkpoint_of_the_background_has_the_same_bytes(
    demo: Path, tmp_path: Path, zero: int, request: pytest.FixtureRequest
) -> None:
    """Training changes the state before its copy is written."""
    more = (*EVERY_TWO, f"zero.stage={zero}", "train.ema=0.9")
    train("mae", demo, tmp_path / "at_once", *more)
    order = request.getfixturevalue("delayed")
    train("mae", demo, tmp_path / "background", *more, IN_BACKGROUND)
    assert order.index("step 4") < order.index("tmp-step_00000002")
    expected = contents(tmp_path / "at_once")
    assert len(expected) == 3 * 5 and expected == contents(tmp_path / "background")
    again = halfway(tmp_path / "background", tmp_path / "again")  # after four steps
    train("mae", demo, again, *more)  # the setting is no part of the run's identity
    assert_same(tmp_path / "at_once", again, exact=True)


def test_metrics_tell_waiting_from_writing(demo: Path, tmp_path: Path, delayed: list[str]) -> None:
    train("mae", demo, tmp_path / "run", *EVERY_TWO, IN_BACKGROUND)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    (first, *_) = [row for row in rows if "save/seconds" in row]
    assert first["step"] > 4  # of the checkpoint of step 2, which the fixture delays
    assert first["save/seconds"] > 0 and first["save/write_seconds"] > 0
    train("mae", demo, tmp_path / "at_once", *EVERY_TWO)
    rows = read_metrics(tmp_path / "at_once" / "metrics.jsonl")
    assert [row["step"] for row in rows if "save/seconds" in row] == [3, 5]
    assert not any("save/write_seconds" in row for row in rows)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at(patch: pytest.MonkeyPatch, step: int, file: str) -> None:
    """Let the disk be full when a file of a step's checkpoint is written."""
    name = f"step_{step:08d}"
    owner, attribute = (portable, "save_tensors") if "tensors" in file else (Path, "write_text")
    write = getattr(owner, attribute)

    def full(path: Path, *given: Any) -> Any:
        return (no_space if path.name == file and name in str(path) else write)(path, *given)

    patch.setattr(owner, attribute, full)


@pytest.mark.parametrize("file", ["00000.safetensors", "buffers.safetensors", "index.json"])
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_full_disk_ends_the_run_and_keeps_earlier_checkpoints(
    demo: Path, tmp_path: Path, file: str, background: str
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, 4, file)
        message = r"step_00000004 cannot be written: .*No space left.*earlier checkpoints"
        with pytest.raises(ArtifactError, match=message) as raised:
            train("mae", demo, out, *EVERY_TWO, f"train.save_in_background={background}")
    assert raised.value.agreed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000002"]
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] < 6 + (background == "true")
    train("mae", demo, out, *EVERY_TWO)
    train("mae", demo, tmp_path / "whole", *EVERY_TWO)
    assert_same(tmp_path / "whole", out, exact=True)


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of step 4 NaN, after the checkpoint of step 3 was begun."""
    honest, calls = MaeModule.loss_from_features, []

    def loss(self: MaeModule, features: dict[str, Tensor]) -> StepOutput:
        calls.append(1)
        value, metrics = honest(self, features)
        return StepOutput(value * (torch.nan if len(calls) in (7, 8) else 1), metrics)

    monkeypatch.setattr(MaeModule, "loss_from_features", loss)


@pytest.fixture
def until_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay files of checkpoints until the run ends with an error."""
    failed = threading.Event()
    save_tensors, complete_after = portable.save_tensors, Saver.complete_after

    def wait(path: Path, tensors: dict[str, Tensor]) -> None:
        if "checkpoints" in str(path):
            assert failed.wait(LIMIT)
        save_tensors(path, tensors)

    def complete(self: Saver, error: BaseException) -> None:
        failed.set()
        complete_after(self, error)

    monkeypatch.setattr(portable, "save_tensors", wait)
    monkeypatch.setattr(Saver, "complete_after", complete)


def test_an_error_of_all_ranks_completes_the_checkpoint(
    demo: Path, tmp_path: Path, not_finite: None, until_the_error: None
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match="the loss of step 4 is nan"):
        train("mae", demo, out, ALL_TOKENS, IN_BACKGROUND)
    assert (out / "bundles" / "step_00000003" / "COMPLETE").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_write_that_fails_then_is_logged(
    demo: Path,
    tmp_path: Path,
    not_finite: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    name = "checkpoints/tmp-step_00000003"
    save_tensors = portable.save_tensors
    monkeypatch.setattr(
        portable,
        "save_tensors",
        lambda path, tensors: (no_space if name in str(path) else save_tensors)(path, tensors),
    )
    request.getfixturevalue("until_the_error")
    with pytest.raises(TrainingError, match="the loss of step 4 is nan"):
        train("mae", demo, tmp_path / "run", ALL_TOKENS, IN_BACKGROUND)
    assert "step_00000003 cannot be written: [Errno 28] No space left" in caplog.text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_interrupt_discards_the_checkpoint(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until_the_error: None
) -> None:
    """Raise what the second Ctrl-C raises."""
    write: Callable[..., None] = Sinks.write

    def interrupted(self: Sinks, state: Any, *given: Any) -> None:
        write(self, state, *given)
        if state.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Sinks, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("mae", demo, tmp_path / "run", ALL_TOKENS, IN_BACKGROUND)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_own_values_are_those_of_the_files(demo: Path, tmp_path: Path) -> None:
    """The buffer for copies has the size of what a rank copies."""
    config = settings("mae", demo, tmp_path / "run", "train.ema=0.9")
    init_distributed(torch.device("cpu"))
    engine = Engine(Run.open(MaeStage, config).build(), config)
    copied = []
    dict(portable.portable_files(engine, lambda value: copied.append(value) or value))
    assert portable.own_values(engine) == sum(value.numel() for value in copied) > 0
    engine.destroy()


class Stream:
    """Stands for a CUDA stream: does its work at once, and records what waits for what."""

    def __init__(self, *_: Any) -> None:
        self.log: list[str] = []

    def wait_stream(self, other: Any) -> None:
        self.log.append(f"wait for {other}")

    def record_event(self) -> Stream:
        self.log.append("event")
        return self

    def synchronize(self) -> None:
        self.log.append("synchronize")


class OnGpu(Tensor):
    """Stands for a value on a GPU."""

    is_cuda = True


def test_copies_of_a_gpu_fill_the_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies themselves are compared by tools/gpu_check.py, on a GPU."""
    locked: list[tuple[int, int]] = []
    stream = Stream()
    monkeypatch.setattr(host_buffer, "pin_memory", lambda *where: locked.append(where))
    monkeypatch.setattr(host_buffer, "unpin_memory", lambda at: locked.remove((at, 48)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: "the present one")
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(OnGpu, "record_stream", lambda value, on: on.log.append("kept"))
    host = host_buffer.HostBuffer(12, torch.device("cuda"))
    for _ in range(2):
        host.clear()
        gathered = torch.randn(2)  # on the host, as the parameters of `hashtag.shard_classes`
        values = [OnGpu(torch.randn(2, 3)), gathered, OnGpu(torch.randn(4))]
        copies = [host.keep(value) for value in values]
        assert all(torch.equal(a, b) for a, b in zip(values, copies, strict=True))
        assert copies[0].data_ptr() == locked[0][0] and copies[2].data_ptr() == locked[0][0] + 32
    once = ["wait for the present one", "kept", "event"]
    assert stream.log == [*once, *["synchronize", *once] * 3]
    host.close()
    assert not locked

    def fail(*_: Any) -> None:
        raise RuntimeError("Registering memory failed with cudaError: 2.")

    monkeypatch.setattr(host_buffer, "pin_memory", fail)
    message = r"save_in_background needs 1 GB of page-locked .*cudaError: 2.*background=false"
    with pytest.raises(ConfigError, match=message):
        host_buffer.HostBuffer(250_000_000, torch.device("cuda"))
