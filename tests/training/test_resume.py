"""Killed runs, folders of other runs and changed artifacts, through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from child_process import RECIPE, clean_environment, xray
from click.testing import Result
from in_process import invoke
from run_comparison import assert_equal_runs
from tiny import settings

from stages.mae import MaeStage
from xray.training.run import Run

IN_BACKGROUND = "train.save_in_background=true"


def run(root: Path, out: Path, *more: str, killed_at: str = "") -> subprocess.CompletedProcess[str]:
    """Run the recipe in a process of its own."""
    return xray("run", RECIPE, *given(root, out, *more), killed_at=killed_at)


def run_here(root: Path, out: Path, *more: str) -> Result:
    """Run the recipe in this process."""
    return invoke("run", RECIPE, *given(root, out, *more))


def given(root: Path, out: Path, *more: str) -> list[str]:
    return [f"data.root={root}", f"out={out}", "stages=[mae,clip]", *more]


@pytest.fixture(scope="module")
def unkilled(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unkilled") / "run"
    done = run(demo, out)
    assert done.returncode == 0, done.stderr
    assert "Results" in done.stdout and (out / "report.html").is_file()
    return out


@pytest.mark.parametrize(
    ("moment", "more"),
    [
        ("step:5", ()),
        ("artifact:mae", ()),
        ("save:2", ()),
        pytest.param("save:2", (IN_BACKGROUND,), marks=pytest.mark.slow),
        ("file:3", (IN_BACKGROUND,)),  # the first of two files of the second checkpoint
    ],
)
def test_killed_runs_have_the_results_of_others(
    demo: Path, tmp_path: Path, unkilled: Path, moment: str, more: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    assert run(demo, out, *more, killed_at=moment).returncode == -signal.SIGKILL
    if more:
        names = sorted(path.name for path in (out / "mae" / "checkpoints").iterdir())
        assert names == ["step_00000002", "tmp-step_00000004"]
    again = run(demo, out)
    assert again.returncode == 0, again.stderr
    expected = "stage mae is finished" if moment.startswith("artifact") else "continues from"
    assert expected in again.stderr
    assert_equal_runs(unkilled, out)


def test_a_finished_run_is_not_repeated(demo: Path, unkilled: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in unkilled.rglob("*.safetensors")}
    again = run_here(demo, unkilled)
    assert again.exit_code == 0 and "stage clip is finished" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in unkilled.rglob("*.safetensors")}


def test_another_config_is_refused(demo: Path, unkilled: Path) -> None:
    again = run_here(demo, unkilled, "mae.mask_ratio=0.5")
    assert again.exit_code == 2
    assert "config.mae.mask_ratio: 0.75 -> 0.5" in again.stderr
    assert "choose another out=" in again.stderr and "Traceback" not in again.stderr


def test_a_plan_shows_finished_stages_and_those_with_other_settings(
    demo: Path, unkilled: Path
) -> None:
    def states(*more: str) -> str:
        return "".join(re.findall(r"[\w ]+(?= *│$)", run_here(demo, unkilled, *more).stdout, re.M))

    assert states("--plan").split() == ["finished", "finished"]
    other = " ".join(states("--plan", "mae.mask_ratio=0.5").split())
    assert other == "other settings there finished"


def test_a_run_of_an_older_version_without_new_settings_is_accepted(
    demo: Path, unkilled: Path
) -> None:
    file = unkilled / "mae" / "run.json"
    record = json.loads(file.read_text())
    for section, key in (("model", "video"), ("mae", "video_mask"), ("model", "keep_rates")):
        del record["config"][section][key]
    file.write_text(json.dumps(record))
    again = run_here(demo, unkilled)
    assert again.exit_code == 0 and "stage mae is finished" in again.stderr


def test_one_flipped_byte_stops_the_next_stage(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_here(demo, out, "stages=[mae]").exit_code == 0
    file = out / "mae" / "artifact" / "backbone.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    done = run_here(demo, out)
    assert done.exit_code == 2 and "backbone.safetensors was changed" in done.stderr
    alone = invoke(
        "train", "clip", "--recipe", RECIPE, "--init-from", str(out / "mae" / "artifact"),
        "--out", str(tmp_path / "clip"), f"data.root={demo}",
    )  # fmt: skip
    assert alone.exit_code == 2 and "backbone.safetensors was changed" in alone.stderr
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize("numbers", [[signal.SIGTERM, signal.SIGINT], [signal.SIGINT]])
def test_a_signal_saves_and_exits_with_the_code_to_rerun(
    demo: Path, tmp_path: Path, numbers: list[signal.Signals]
) -> None:
    """SIGINT after SIGTERM is the first interrupt: only a second one ends without saving."""
    out = tmp_path / "run"
    arguments = [f"data.root={demo}", f"out={out}", "stages=[mae]", "mae.train.samples=4800"]
    process = subprocess.Popen(
        [sys.executable, "-m", "xray", "run", RECIPE, *arguments, "train.save_every=100000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=clean_environment(),
        start_new_session=True,
    )
    metrics = out / "mae" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.2)
    for number in numbers:
        os.killpg(process.pid, number)  # torchrun and terminals signal the loader workers, too
    _, stderr = process.communicate()
    assert process.returncode == 75 and "stopped by a signal at step" in stderr
    assert len(list((out / "mae" / "checkpoints").glob("step_*"))) == 1


def test_opening_a_run_writes_nothing(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    opened = Run.open(MaeStage, settings("mae", demo, out, f"train.mirror=file://{tmp_path}/copy"))
    assert opened.record["stage"] == "mae" and not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_and_not_used(
    demo: Path, tmp_path: Path, unkilled: Path
) -> None:
    out = tmp_path / "run"
    assert run(demo, out, killed_at="step:5").returncode == -signal.SIGKILL
    (file,) = (out / "mae" / "checkpoints").glob("step_00000004/portable/00000.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    again = run(demo, out)
    assert again.returncode == 0 and "00000.safetensors does not have its sha256" in again.stderr
    assert "continues from" in again.stderr and "step_00000002" in again.stderr
    assert_equal_runs(unkilled, out)
