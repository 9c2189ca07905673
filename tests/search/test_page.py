"""Hits of a search: names, full paths and links of files, and of samples in tars."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shards import jpeg, write_tar

from xray.search.embedding_file import Names
from xray.search.page import Media, hits_table, write_page

NAME = "Ferien am Meer " + "x" * 150 + ".jpg"
CAPTION = "海辺の犬" * 200


def facts(where: object, kind: str, modality: str = "image") -> dict[str, object]:
    source = {"where": str(where), "kind": kind, "digest": ""}
    artifact = {"stage": "clip", "digest": "0" * 64}
    sizes = {"rows": 1, "dtype": "fp32", "dim": 8, "modality": modality}
    return {"source": source, "artifact": artifact, **sizes}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    record = json.dumps({"original_name": NAME, "caption": CAPTION}).encode()
    (tmp_path / "shards").mkdir()
    files = {"000000007.jpg": jpeg(), "000000007.json": record, "000000008.jpg": jpeg()}
    return write_tar(tmp_path / "shards" / "0.tar", files)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/0.tar"])
def test_samples_in_tars_have_their_file_names(tar: Path, tmp_path: Path, pattern: str) -> None:
    media = Media(facts(f"{tar.parent}{pattern}", "shards"))
    hits = media.hits(Names(["000000007", "000000008"], ["0.tar", "0.tar"], None), [0.5, 0.25])
    table = hits_table("sea", hits)
    assert list(table.columns) == ["rank", "score", "key", "name", "path"]
    assert table.rows[0] == ["1", "0.5000", "000000007", NAME, str(tar)]
    assert table.rows[1][2:4] == ["000000008", "000000008"]
    assert write_page(tmp_path / "page.html", "sea", hits, media) == []
    page = (tmp_path / "page.html").read_text()
    assert f"1. 0.500 · {NAME}" in page and f"<small>{tar}:000000007</small>" in page
    assert page.replace("<details><summary>...</summary>", "").count(CAPTION) == 1
    assert "<a href" not in page and page.count("data:image/png") == 2


def test_files_are_linked_by_their_full_path(tmp_path: Path) -> None:
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "a & b.jpg").write_bytes(jpeg())
    media = Media(facts(folder, "files"))
    hits = media.hits(Names(["a & b", "gone"], ["a & b.jpg", "gone.jpg"], None), [0.5, 0.25])
    table = hits_table("sea", hits)
    assert list(table.columns) == ["rank", "score", "path"]
    assert table.rows[0] == ["1", "0.5000", f"{folder}/a & b.jpg"]
    (missing,) = write_page(tmp_path / "page.html", "sea", hits, media)
    assert missing.startswith("gone: ")
    page = (tmp_path / "page.html").read_text()
    link = f'<a href="{(folder / "a & b.jpg").as_uri()}">'.replace("&", "&amp;")
    assert link in page and "my%20photos/a%20" in link
    assert f"<small>{folder}/a &amp; b.jpg</small>" in page


def test_paths_of_other_peoples_files_are_not_opened(tar: Path) -> None:
    names = Names(["000000007"], ["../shards/0.tar"], None)
    (hit,) = Media(facts(tar.parent, "shards")).hits(names, [0.5])
    assert hit.name == "000000007"
    (hit,) = Media(facts("http://host/x", "shards")).hits(Names(["k"], ["0.tar"], None), [0.5])
    assert (hit.name, hit.where, hit.link) == ("k", "http://host/x/0.tar", "")


def test_texts_have_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    media = Media(facts(tmp_path / "t.txt", "files", "text"))
    hits = media.hits(Names(["2"], ["t.txt"], ["two"]), [0.5])
    table = hits_table("sea", hits)
    assert list(table.columns) == ["rank", "score", "key", "text", "path"]
    assert table.rows[0] == ["1", "0.5000", "2", "two", str(tmp_path / "t.txt")]
    assert write_page(tmp_path / "page.html", "sea", hits, media) == []
    assert "data:image/png" not in (tmp_path / "page.html").read_text()
