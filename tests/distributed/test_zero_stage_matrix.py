"""Stages x ZeRO 0 to 3 on two processes: losses, exact resume, changes of stage and world size.

Each run of the tests has clip x {0, 1, 3}, mae x 3 and a few more; the whole is slow.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from child_process import SUPPORT, torchrun
from run_comparison import assert_same, assert_same_losses
from tiny import train
from two_process import (
    CHANGES,
    MORE,
    MOVES,
    QUICK,
    QUICK_MORE,
    STAGES,
    WHOLE,
    halfway,
    settings,
)


def marked(cells: Iterable[tuple[str, int]], quick: list[tuple[str, int]]) -> list[object]:
    slow = pytest.mark.slow
    return [cell if cell in quick else pytest.param(*cell, marks=slow) for cell in cells]


CELLS = marked(WHOLE, QUICK)
RUNS = marked(dict.fromkeys([*WHOLE, *MORE]), [*QUICK, *QUICK_MORE])


@pytest.fixture(scope="module")
def plain(
    demo: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Runs of one process in ZeRO 0."""
    out = tmp_path_factory.mktemp("plain")
    quick = {stage for stage, _ in [*QUICK, *QUICK_MORE]}
    for stage, changes in CHANGES.items():
        if stage not in quick and not request.config.getoption("--slow"):
            continue
        train(STAGES.get(stage, stage), demo, out / stage, *changes)
    return out


@pytest.fixture(scope="module")
def cells(
    demo: Path,
    plain: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """Runs of two processes, some of which one process began."""
    out = tmp_path_factory.mktemp("cells")
    slow = request.config.getoption("--slow")
    for stage, zero in WHOLE if slow else QUICK:
        halfway(plain / stage, out / f"{stage}-joined-{zero}")
    torchrun(str(SUPPORT / "two_process.py"), str(demo), str(out), "whole" if slow else "quick")
    return out


@pytest.mark.parametrize(("stage", "zero"), RUNS)
def test_losses_equal_those_of_one_process_without_zero(
    cells: Path, plain: Path, stage: str, zero: int
) -> None:
    assert_same_losses(plain / stage, cells / f"{stage}-{zero}", 6)


@pytest.mark.parametrize(("stage", "zero"), CELLS)
def test_a_resumed_run_is_bit_equal(cells: Path, stage: str, zero: int) -> None:
    assert_same(cells / f"{stage}-{zero}", cells / f"{stage}-{zero}-to-{zero}", exact=True)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "first", "second"), MOVES)
def test_the_zero_stage_may_change(cells: Path, stage: str, first: int, second: int) -> None:
    assert_same_losses(cells / f"{stage}-{first}", cells / f"{stage}-{first}-to-{second}", 6)


@pytest.mark.parametrize(("stage", "zero"), CELLS)
def test_two_processes_resume_a_run_of_one(cells: Path, plain: Path, stage: str, zero: int) -> None:
    assert_same_losses(plain / stage, cells / f"{stage}-joined-{zero}", 6)


@pytest.mark.parametrize(("stage", "zero"), CELLS)
def test_one_process_resumes_a_run_of_two(
    demo: Path, cells: Path, plain: Path, tmp_path: Path, stage: str, zero: int
) -> None:
    """The ZeRO stage changes at the same time."""
    out = halfway(cells / f"{stage}-{zero}", tmp_path / "run")
    train(stage, demo, out, *settings(stage, (zero + 1) % 4))
    assert_same_losses(plain / stage, out, 6)
