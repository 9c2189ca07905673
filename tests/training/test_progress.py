"""Progress lines without a terminal."""

from __future__ import annotations

import pytest

from xray import progress


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
    assert capsys.readouterr().err == "encoding  9,100/10,000  eta 360 s\n"
