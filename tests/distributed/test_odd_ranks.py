"""Two processes of which one is slow or fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from child_process import SUPPORT, torchrun
from odd_ranks import TROUBLE
from run_comparison import assert_same

from xray.training.checkpoint import complete_checkpoints
from xray.training.metrics import read_metrics

SAID = {
    "folder": "'/sys/run'",
    "metrics": "metrics.jsonl",
    "checkpoints": "step_00000003 cannot be written: .*earlier checkpoints are unchanged",
    "artifact": "artifact cannot be written: .*/no/notes",
    "thread": "step_00000003 cannot be written: .*No space left.*earlier checkpoints are unchanged",
    "signal": "stopped by a signal at step 2; the same command continues",
}


@pytest.fixture(scope="module")
def ended(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of the runs, and their output."""
    out = tmp_path_factory.mktemp("ranks")
    return out, torchrun(str(SUPPORT / "odd_ranks.py"), str(demo), str(out))


def test_a_straggler_is_named(ended: tuple[Path, str]) -> None:
    """Only a rank's own work counts, not its waiting for others."""
    out, said = ended
    for run in ("slow_forward-0", "slow_forward-1", "slow_data-0"):
        rows = read_metrics(out / run / "metrics.jsonl")
        assert [row["rank/slowest"] >= 3 for row in rows] == [True], rows
    assert len(re.findall(r"rank 1 \(\S+\) delays the others: it needs 0\.[2-9]", said)) >= 3


@pytest.mark.parametrize("name", TROUBLE)
def test_an_error_of_one_rank_ends_both(ended: tuple[Path, str], name: str) -> None:
    """Both raise the same error, marked as agreed, so that rank 0 prints it once."""
    one, two = ((ended[0] / f"{name}.{rank}").read_text() for rank in (0, 1))
    assert one == two
    assert re.match(rf"True \w+ .*{SAID[name]}", one), one


def test_ranks_complete_a_slow_checkpoint_after_the_same_step(ended: tuple[Path, str]) -> None:
    one, two = (json.loads((ended[0] / f"completed.{rank}").read_text()) for rank in (0, 1))
    assert one == two and [name for name, _ in one][:2] == ["step_00000003", "step_00000006"]
    assert 5 <= one[0][1] <= 6  # before the next one begins at the latest
    assert not list((ended[0] / "thread" / "checkpoints").iterdir())


def test_ranks_share_the_check_of_a_checkpoint(ended: tuple[Path, str]) -> None:
    out, said = ended
    assert [(out / f"found.{rank}").read_text() for rank in (0, 1)] == ["step_00000009"] * 2
    assert re.search(r"step_00000010 is damaged: .*00002.safetensors", said)
    names = [path.name for path in complete_checkpoints(out / "slow_write" / "checkpoints")]
    assert names == ["step_00000009"]


def test_two_processes_continue_from_a_mirror_alone(ended: tuple[Path, str]) -> None:
    out, _ = ended
    names = [path.name for path in complete_checkpoints(out / "again" / "checkpoints")]
    assert names == ["step_00000003", "step_00000006"]
    assert_same(out / "whole", out / "again", exact=True)
