"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from xray import progress


def test_long_work_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.progress_of("reading")("abcdef", 6)) == list("abcdef")
    # looks at 10, 20 ... 60 seconds: a line at most every 15, and none at the first
    assert capsys.readouterr().err.splitlines() == [
        "reading  2/6  eta 80 s",
        "reading  4/6  eta 27 s",
        "reading  6/6  eta 0 s",
    ]


def test_what_was_done_before_is_not_in_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("encoding") as tell:
        tell(9_000, 10_000)  # found done
        tell(9_100, 10_000)
    assert capsys.readouterr().err == "encoding  9,100/10,000  eta 360 s\n"
