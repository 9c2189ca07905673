"""People see the names of their own files, not keys of tars; and all of a long caption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import invoke
from shards import jpeg, write_tar

from data_pipelines.shards.source import open_source
from data_pipelines.text.names import name_at, original_name, with_key
from xray.reports.figures import subplots
from xray.reports.html import bars, folded
from xray.reports.shards import _histogram
from xray.reports.tables import ResultTable
from xray.words import count

LONG = "قطة تجلس على الكرسي " * 60
NAMES = {"000000001": "Ferien am Meer & <Düne>.jpg", "000000002": "x" * 200 + ".jpg"}


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A tar of two pictures and a broken one, with the names that `xray data pack` writes."""
    files = {}
    for key, name in {**NAMES, "000000003": "broken one.jpg"}.items():
        record = {"original_name": name, "caption": LONG.strip()}
        files |= {f"{key}.jpg": jpeg(), f"{key}.json": json.dumps(record).encode()}
    files["000000003.jpg"] = b"junk"
    (tmp_path / "shards").mkdir()
    return write_tar(tmp_path / "shards" / "0.tar", files).parent


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b'{"original_name": "a/b.jpg", "url": "http://x/y"}', "a/b.jpg"),
        (b'{"original_name": "", "url": "http://x/y.jpg"}', "http://x/y.jpg"),
        (b'{"original_name": 3, "key": "000"}', ""),
        (b"[1]", ""),
        (b"{", ""),
    ],
)
def test_the_name_is_of_the_json(record: bytes, expected: str) -> None:
    assert original_name({"json": record}) == expected
    assert with_key(expected, "000") == (f"{expected} (000)" if expected else "000")


def test_a_sample_without_a_name_has_its_key(packed: Path) -> None:
    write_tar(packed / "1.tar", {"k.jpg": jpeg()})
    source = open_source("s", str(packed), "image")
    assert name_at(source, 0, 0) == NAMES["000000001"] and name_at(source, 1, 0) == "k"
    assert original_name({}) == "" and with_key("k", "k") == "k"


def test_check_and_stats_name_the_files(packed: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "check.json", tmp_path / "stats.html"
    done = invoke("data", "check", packed, "--json", out)
    line = f"{packed}/0.tar, broken one.jpg (000000003), undecodable image"
    assert line in done.output and "1 shard; 3 samples" in done.output
    (shard,) = json.loads(out.read_text())["shards"]
    assert [(bad["key"], bad["name"]) for bad in shard["bad"]] == [("000000003", "broken one.jpg")]
    assert invoke("data", "stats", packed, "--out", page).exit_code == 0
    html = page.read_text()
    assert "Ferien am Meer &amp; &lt;Düne&gt;.jpg" in html and NAMES["000000002"] in html
    assert html.count("<figcaption>") == 2 and html.count("<div dir=auto>") == 2
    assert html.replace("<details><summary>...</summary>", "").count(LONG.strip()) == 2


def test_the_table_of_a_curation_names_the_files(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "entries.txt").write_text("cat\n")
    report = tmp_path / "report.html"
    done = invoke(
        *("data", "curate", packed, "metadata=none", "dedup.exact=true", "--report", report)
    )
    assert done.exit_code == 0, done.output
    assert "Ferien am Meer" in done.output and "000000001" not in done.output
    assert "Ferien am Meer &amp; &lt;Düne&gt;.jpg" in report.read_text()


def test_a_single_value_is_one_thin_bar_at_its_value() -> None:
    _, (axis,) = subplots(1, (3, 2))
    _histogram(axis, {128: 40})
    (bar,) = axis.patches
    left, right = axis.get_xlim()
    assert bar.get_width() < (right - left) / 4 and bar.get_height() == 40
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["128"]
    _, (axis,) = subplots(1, (3, 2))
    _histogram(axis, {1: 2, 3: 5})
    assert [bar.get_height() for bar in axis.patches] == [2, 0, 5]


def test_bars_have_lengths_names_and_counts() -> None:
    drawn = bars("Tags", "frequent", [("<海>" * 30, 8), ("b", 2)])
    assert "&lt;海&gt;" * 30 in drawn and "<海>" not in drawn
    assert "width:100.0%" in drawn and "width:25.0%" in drawn and bars("Tags", "", []) == ""


def test_columns_of_texts_wrap_and_numbers_do_not() -> None:
    table = ResultTable("t", ("name", "n", "text"), [("a", "1", "b" * 41), ("c", "2", "short")])
    page = table.html()
    assert page.count("<td class=text dir=auto>") == 2 and "<th class=text dir=auto>text" in page
    assert "<td>1</td>" in page and "<td>a</td>" in page
    assert folded("a" * 600) == "a" * 600
    assert (
        folded("&" * 601).replace("<details><summary>...</summary>", "").startswith("&amp;" * 601)
    )
    assert (count(1, "shard"), count(2000, "shard")) == ("1 shard", "2,000 shards")
