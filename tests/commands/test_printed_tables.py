"""Output for people: tables on narrow terminals, counts and times."""

from __future__ import annotations

import re

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


def test_long_names_of_models_break_between_their_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    models = ("vit_base_patch16_siglip_224.webli", "ViT-B-16-SigLIP2-256", "photos-lora8")
    cells = ("61.3 [55.1, 66.7]", "100.0 [100.0, 100.0]", "place 2.0 [2.0, 2.0]", "1.00")
    rows = [(name, *cells) for name in ("text to image R@1", "image to text median rank")]
    ResultTable("Results", ("measure", *models, "chance %"), rows).print()
    told = capsys.readouterr().out
    framed = [line for line in told.splitlines() if "│" in line or "┃" in line]
    assert len(framed) > 4 and all(len(line) <= 80 for line in framed)
    columns = [
        [*parts] for parts in zip(*(re.split("[│┃]", line)[1:-1] for line in framed), strict=True)
    ]
    for column, model in zip(columns[1:], models, strict=False):
        heads = [part.strip() for part, line in zip(column, framed, strict=True) if "┃" in line]
        assert "".join(heads) == model
        assert all(part == "" or part[-1] in "_.-" or model.endswith(part) for part in heads)
    assert all(whole in told for whole in ("61.3", "[55.1, 66.7]", "[100.0, 100.0]"))


def test_long_names_in_cells_break_between_their_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ("mae_hashtag_clip_all_tokens_900", "/data/photos_of_dogs/train/00000.tar", "clip_900")
    rows = [("hashtag", "\n".join(names), "34k of 68k samples", "0/3 done", "all of the rest")]
    ResultTable("plan", ("stage", "arms", "samples", "state", "more"), rows).print()
    cells = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines()[4:-1]]
    assert "".join(cells) == "".join(names) and "clip_900" in cells
    assert len(cells) > len(names) and all(cell[-1] in "_/." or cell[-3:] in ("900", "tar")
                                           for cell in cells)  # fmt: skip


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
