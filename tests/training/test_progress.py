"""Progress lines without a terminal."""

from __future__ import annotations

import pytest

from xray import progress
from xray.training import metrics
from xray.training.state import TrainState


def test_long_work_prints_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.progress_of("reading")("abcdef", 6)) == list("abcdef")
    # updates at 10, 20 ... 60 seconds: at most one line every 15 s, none at the first update
    assert capsys.readouterr().err.splitlines() == [
        "reading  2/6  eta 80 s",
        "reading  4/6  eta 27 s",
        "reading  6/6  eta 0 s",
    ]


def test_work_done_before_is_left_out_of_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("encoding") as tell:
        tell(9_000, 10_000)  # done before
        tell(9_100, 10_000)
    assert capsys.readouterr().err == "encoding  9,100/10,000  eta 6 min\n"


@pytest.mark.parametrize(("following", "whole"), [(0.0, ""), (2.0, "  whole recipe about 2 min")])
def test_a_stage_of_a_recipe_tells_the_time_of_the_whole(
    following: float,
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    terminal = metrics.Terminal("mae", 20, 0, following)
    now[0] += 10
    state = TrainState(step=5, samples=50, world=1, zero_stage=0)
    terminal.show(state, {"loss": 1.0, "data/wait": 0.0})
    assert capsys.readouterr().err.rstrip().endswith(f"eta 30 s{whole}")
