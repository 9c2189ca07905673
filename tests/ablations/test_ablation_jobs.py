"""Tests of an ablation's processes: devices, order, the lock of the folder, signals."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from ablation_files import load
from child_process import RECIPE

from xray import processes
from xray.ablations import jobs as ablation_jobs
from xray.ablations.jobs import Job, Jobs, exclusive
from xray.errors import ConfigError, Preempted


def test_concurrent_runs_get_different_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with exclusive(tmp_path) as lock:
        monkeypatch.setattr(ablation_jobs, "visible_gpus", lambda: ["2", "5"])
        jobs = Jobs(tmp_path, 0, lock)
        environments = [jobs._environment(slot) for slot in range(jobs.at_once)]
        assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == ["2", "5"]
        assert all("RANK" not in env for env in environments)
        monkeypatch.setattr(ablation_jobs, "visible_gpus", lambda: [])
        assert Jobs(tmp_path, 0, lock).at_once == 1 and Jobs(tmp_path, 3, lock).at_once == 3


def test_trial_waits_for_a_stage_run_that_another_trains(tmp_path: Path) -> None:
    """Only one of two arms with the same parent may start, and beside it one of another seed."""
    text = f"base: {RECIPE}\nseeds: [0, 1]\ncommon: {{stages: [mae, clip]}}\n"
    ablation = load(tmp_path, text + "axes: {clip.loss: [info_nce, sigmoid]}", f"out={tmp_path}")
    zero_a, zero_b, one_a, _ = ablation.trials
    with exclusive(tmp_path) as lock:
        jobs = Jobs(tmp_path, 3, lock)
        assert jobs._next(ablation.trials) is zero_a
        jobs.running = [Job(zero_a, None, 0)]  # type: ignore[arg-type]
        assert jobs._next([zero_b, one_a]) is one_a
        parent = Path(zero_a.recipe.runs[0].out) / "artifact"
        parent.mkdir(parents=True)
        (parent / "manifest.json").write_text("{}")  # the shared stage is finished
        assert jobs._next([zero_b, one_a]) is zero_b


def test_a_trial_whose_results_were_deleted_is_not_finished(tmp_path: Path) -> None:
    """Deletion is the advice of the error about a damaged results.json."""
    trial = load(tmp_path, f"base: {RECIPE}\narms: {{a: {{}}}}", f"out={tmp_path}").trials[0]
    for run in trial.recipe.runs:
        artifact = Path(run.out) / "artifact"
        artifact.mkdir(parents=True)
        (artifact / "manifest.json").write_text("{}")
    trial.folder.mkdir(parents=True)
    trial.finish()
    assert trial.finished()  # nothing was evaluated, or an older version wrote the file
    (trial.folder / "results.json").write_text("{}")
    trial.finish()
    assert trial.finished()
    (trial.folder / "results.json").unlink()
    assert not trial.finished()


def test_folder_in_use_is_rejected(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path),
        pytest.raises(ConfigError, match=re.escape(f"out={tmp_path} is in use")),
        exclusive(tmp_path),
    ):
        pass


def test_signal_during_the_start_of_a_run_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation = load(tmp_path, f"base: {RECIPE}\narms: {{a: {{}}}}", f"out={tmp_path}")
    (tmp_path / "runs" / "a" / "seed_0").mkdir(parents=True)
    start = processes.start

    def signalled(command: list[str], **more: Any) -> Any:
        process = start(["sleep", "10000"], **more)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(processes, "start", signalled)
    with exclusive(tmp_path) as lock, pytest.raises(Preempted):
        Jobs(tmp_path, 1, lock).run(ablation.trials[:1])
