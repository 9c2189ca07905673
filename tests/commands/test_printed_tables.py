"""Output for people: tables on narrow terminals, counts and times."""

from __future__ import annotations

import pytest

from xray.reports.tables import ResultTable
from xray.words import count, duration

PLAN = ResultTable(
    "small -> runs/small",
    ("stage", "starts from", "batch", "length", "state"),
    [
        ("mae", "scratch", "64 images + 8 clips\n64 px x 4", "6.4k samples\n100 steps", "new"),
        ("clip", "hashtag\n+ text", "64 images\n64 px", "6.4k samples\n100 steps", "finished"),
    ],
)


@pytest.mark.parametrize("width", [120, 80, 60, 48, 30])
def test_a_table_breaks_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    PLAN.print()
    told = capsys.readouterr().out
    for row in (PLAN.columns, *PLAN.rows):
        for word in " ".join(row).replace("+", "").split():
            assert word in told.split() or f"{word}:" in told.split() or f"{word}," in told, word
    framed = [line for line in told.splitlines() if "│" in line]
    assert bool(framed) == (width >= 60)
    assert all(line.count("│") == len(PLAN.columns) + 1 for line in framed)
    assert all(len(line) <= width for line in framed)


def test_an_interval_is_not_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    intervals = ("[9.7, 18.1]", "[100.0, 100.0]")
    rows = [
        ("top1", f"{value} {own}", "360 captions")
        for value, own in zip("12", intervals, strict=True)
    ]
    for width in (80, 45, 41, 30):
        monkeypatch.setenv("COLUMNS", str(width))
        ResultTable("results", ("measure", "value", "over"), rows).print()
        told = capsys.readouterr().out
        assert all(own in told for own in intervals), told
        assert all(len(line) <= width for line in told.splitlines() if "│" in line)


def test_counts_agree_with_their_nouns() -> None:
    assert [count(n, "shard") for n in (0, 1, 1234)] == ["0 shards", "1 shard", "1,234 shards"]
    assert [count(n, "class", "classes") for n in (1, 8)] == ["1 class", "8 classes"]
    assert count(1.0, "sample") == "1 sample"  # measures are floats


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0 s"), (42, "42 s"), (119, "2 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min"),
     (100 * 3600, "4 d 4 h")],
)  # fmt: skip
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text
