"""Spikes, steps that are not finite and their bundles, hangs and stragglers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hang_helper
import pytest
import torch
from child_process import RECIPE, clean_environment, xray
from tiny import ALL_TOKENS, train
from torch import Tensor

from stages.base import StepOutput
from stages.mae import MaeModule
from xray.errors import ArtifactError, ConfigError, TrainingError
from xray.training import state as state_module
from xray.training.engine import Engine
from xray.training.metrics import read_metrics
from xray.training.replay import read_bundle
from xray.training.state import LossStatistics
from xray.training.telemetry import Stragglers
from xray.training.watchdog import verdict

SKIP = ("train.spikes=skip", "train.spike=4.0")


@pytest.fixture
def spiky(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the losses of the fourth step (two micro-batches) thirty times as large."""
    honest, calls = MaeModule.loss_from_features, []

    def spike(self: MaeModule, features: dict[str, Tensor]) -> StepOutput:
        calls.append(1)
        loss, metrics = honest(self, features)
        return StepOutput(loss * (30 if len(calls) in (7, 8) else 1), metrics)

    monkeypatch.setattr(MaeModule, "loss_from_features", spike)
    monkeypatch.setattr(state_module, "WARM_UP", 2)
    return calls


def test_loss_statistics_are_mean_and_deviation_of_the_losses() -> None:
    statistics, losses = LossStatistics(), [3.0 + 0.5 * (-1) ** k for k in range(30)]
    for loss in losses[:19]:
        statistics.add(loss)
    assert statistics.deviation(100.0) == 0.0  # during the warm-up
    for loss in losses[19:]:
        statistics.add(loss)
    expected = torch.tensor(losses, dtype=torch.float64)
    assert statistics.mean == pytest.approx(expected.mean().item())
    assert statistics.variance == pytest.approx(expected.var(correction=0).item())
    assert statistics.deviation(3.0 + 6 * 0.5) == pytest.approx(6.0)


def test_only_one_process_trains_in_a_folder(demo: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from xray.files import lock_folder\n"
        "held = lock_folder(Path(sys.argv[1]), 'trained in'); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(ConfigError, match=rf"by another process \(process {other.pid} on"):
            train("mae", demo, tmp_path)
        assert not (tmp_path / "run.json").exists()
        other.kill()
    train("mae", demo, tmp_path)  # the lock of a killed process is free


def test_a_spike_is_skipped_in_every_zero_stage(
    demo: Path, tmp_path: Path, spiky: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []

    def record(self: Engine, steps: int) -> None:
        slots = (None, *self.slots)
        states.append({f"{s}/{name}": self.read(name, s) for name in self.trained for s in slots})

    monkeypatch.setattr(Engine, "update_average", record)
    norms = []
    for zero in range(4):
        states.clear(), spiky.clear()
        out = tmp_path / str(zero)
        train("mae", demo, out, ALL_TOKENS, *SKIP, f"zero.stage={zero}")
        assert all(torch.equal(value, states[3][name]) for name, value in states[2].items())
        assert not all(torch.equal(value, states[4][name]) for name, value in states[3].items())
        rows = read_metrics(out / "metrics.jsonl")
        assert [row.get("skipped") for row in rows] == [None, None, None, 1.0, None, None]
        norms.append(rows[4]["grad_norm"])  # without gradients of the skipped step
        (line,) = (out / "spikes.jsonl").read_text().splitlines()
        facts = json.loads(line)
        assert facts["step"] == 4 and facts["loss"] == rows[3]["loss"] > 20 * rows[2]["loss"]
        assert len(facts["samples"]["photos"]) == 8 and facts["samples"]["photos"][0]["key"]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_a_spike_is_logged_and_not_skipped_by_default(
    demo: Path, tmp_path: Path, spiky: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="xray")
    train("mae", demo, tmp_path / "run", "train.spike=4.0")
    assert "step 4: the loss " in caplog.text and "is skipped" not in caplog.text
    assert all("skipped" not in row for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_too_many_skipped_steps_end_the_run(
    demo: Path, tmp_path: Path, spiky: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xray.training.loss_spikes.MOST_IN_A_ROW", 0)
    with pytest.raises(
        TrainingError, match=r"step 4: the loss of 1 steps in a row.*these are not spikes"
    ):
        train("mae", demo, tmp_path / "run", *SKIP)
    assert (tmp_path / "run" / "checkpoints" / "step_00000003").is_dir()


def test_a_step_that_is_not_finite_is_replayed(demo: Path, tmp_path: Path) -> None:
    """With an extreme learning rate the loss of the second step is not finite."""
    out = tmp_path / "run"
    wild = ["optim.base_lr=1e30", "optim.warmup=0", "optim.clip_grad=0", "stages=[mae]"]
    done = xray("run", RECIPE, f"data.root={demo}", f"out={out}", *wild)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    bundle = out / "mae" / "bundles" / "step_00000001"
    assert f"`xray debug replay {bundle}`" in done.stderr and "of step 2 is" in done.stderr
    again = xray("debug", "replay", str(bundle))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "nan then, nan now" in again.stdout and "not finite, in this order: the" in again.stdout
    keys = [s["key"] for s in json.loads((bundle / "bundle.json").read_text())["samples"]["photos"]]
    assert f":{keys[0]}" in again.stdout
    facts = json.loads((bundle / "bundle.json").read_text())
    other = {**facts, "values": {**facts["values"], facts["what"]: "1.5"}}
    (bundle / "bundle.json").write_text(json.dumps(other))
    different = xray("debug", "replay", str(bundle))
    assert different.returncode == 1 and "the result differs" in different.stdout
    with pytest.raises(ArtifactError, match="is not a bundle"):
        read_bundle(out)


FACTS = {"host": "a", "pid": 7, "place": "forward and backward", "step": 11, "waits": True}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([(0, {}), (2, {})], "rank 1 has written nothing: it is dead, frozen or unreachable"),
        (
            [(0, {}), (1, {"waits": False, "place": "waiting for data"}), (2, {})],
            r"rank 1 \(a, process 7\) is in waiting for data, while the others",
        ),
        (
            [(0, {"waits": False}), (1, {"step": 10, "waits": False}), (2, {"waits": False})],
            r"at step 11: rank 1 \(a, process 7\) is in forward",
        ),
        ([(0, {}), (1, {}), (2, {})], "no rank stands out, rank 0 is in forward and backward"),
    ],
)
def test_the_verdict_names_the_rank_that_others_wait_for(
    known: list[tuple[int, dict]], expected: str, tmp_path: Path
) -> None:
    facts = [{**FACTS, "rank": rank, **own} for rank, own in known]
    assert re.search(expected, verdict(facts, 3, 60.0, tmp_path))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_frozen_rank_is_named(demo: Path, tmp_path: Path) -> None:
    out, port = tmp_path / "run", free_port()
    frozen = tmp_path / "frozen"
    settings = ["stages=[mae]", "mae.train.samples=48000"]
    helper = [sys.executable, hang_helper.__file__, str(frozen)]
    command = [*helper, "run", RECIPE, f"data.root={demo}", f"out={out}"]
    ranks = [
        subprocess.Popen(
            [*command, *settings],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=clean_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        metrics = out / "mae" / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text()):
            assert ranks[0].poll() is None
            time.sleep(0.2)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        frozen.touch()
        _, stderr = ranks[0].communicate()
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            assert process.stderr is not None
            process.stderr.close()
    assert ranks[0].returncode == 1
    assert "rank 1 has written nothing: it is dead, frozen or unreachable" in stderr
    assert "trainer.py" in (out / "mae" / "stuck" / "rank_00000.txt").read_text()


def test_a_single_rank_is_no_straggler() -> None:
    stragglers = Stragglers(torch.nn.ModuleDict(), torch.device("cpu"))
    stragglers.begin()
    stragglers.end(0.5)
    values, warning = stragglers.compare()
    assert values == {"rank/slowest": 1.0} and warning is None
