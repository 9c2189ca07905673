"""`pack`: a user's files as shards, on pictures and clips made here."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packing import (
    clip,
    meta_of,
    packed,
    picture,
    skipped_in,
    write,
)

from data_pipelines.ingest.pack import PackConfig, PackReport, pack
from data_pipelines.ingest.user_data import list_files
from xray.errors import ConfigError, DataError

# --- inputs ------------------------------------------------------------------------------------


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    photo, odd, film = picture(), picture(seed=1), clip()
    source = write(
        tmp_path / "in",
        {
            "b/photo.v2.JPEG": photo,
            "b/photo.v2.txt": "\ufeffa cat\n\n  two cats \n",
            "b/photo.v2.json": json.dumps({"width": 7, "sha256": "", "key": "mine", "tags": ["x"]}),
            "a.jpg": odd,
            "film.mp4": film,
            "film.json": json.dumps({"description": "a film"}),
            ".hidden.jpg": photo,
            ".cache/x.jpg": photo,
            "notes.md": "no media",
        },
    )
    (source / "z.jpg").symlink_to(source / "a.jpg")
    report, samples = packed(source, tmp_path / "out")
    assert report == PackReport(shards=1, samples=4, skipped={}, reused=0, unread=("notes.md",))
    assert list(samples) == ["000000000", "000000001", "000000002", "000000003"]
    first, second, third, linked = samples.values()
    assert first.keys() == {"jpg", "json"} and first["jpg"] == odd == linked["jpg"]
    assert second["jpeg"] == photo and second["txt"] == b"a cat"
    assert meta_of(second) == {
        "original_name": "b/photo.v2.JPEG",
        "width": 40,  # not the user's
        "height": 20,
        "sha256": hashlib.sha256(photo).hexdigest(),
        "caption": "a cat",
        "captions": ["a cat", "two cats"],
        "tags": ["x"],
        "key": "000000001",  # not the user's
    }
    assert third["mp4"] == film and third["txt"] == b"a film"
    facts = {"width": 64, "height": 48, "num_frames": 12, "fps": 10.0, "duration": 1.2}
    assert meta_of(third).items() >= {**facts, "caption": "a film"}.items()


def test_an_imagefolder_with_splits(tmp_path: Path) -> None:
    rows = "file_name,label,hashtags,text,caption,zip\n1.jpg,3,#a #b,t,,007\n./sub/2.jpg,,#c,,c,1\n"
    source = write(
        tmp_path / "in",
        {
            "test/metadata.jsonl": json.dumps({"file_name": "1.jpg", "title": "T"}),
            "test/1.jpg": picture(),
            "train/metadata.csv": "\ufeff" + rows,
            "train/metadata.jsonl": "not read: there is a csv",
            "train/1.jpg": picture(),
            "train/sub/2.jpg": picture(),
            "train/3.jpg": picture(),
        },
    )
    report, samples = packed(source, tmp_path / "out")
    assert report.samples == 3 and report.skipped == {"not in metadata": 1}
    test, one, two = map(meta_of, samples.values())
    assert test["original_name"] == "test/1.jpg" and test["caption"] == "T"
    assert one["original_name"] == "train/1.jpg" and two["original_name"] == "train/sub/2.jpg"
    assert one["label"] == 3 and two["label"] == ""
    assert one["hashtags"] == "#a #b" and one["zip"] == "007"  # not a column of numbers
    assert [files["txt"] for files in samples.values()] == [b"T", b"t", b"c"]
    assert skipped_in(tmp_path / "out")[0]["file"] == "train/3.jpg"


def test_class_folders_give_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {f"{c}/1.jpg": picture() for c in ("dog", "cat", "eel")})
    labels = [item.meta for item in list_files(str(source))]
    assert labels == [{"label_name": n, "label": i} for i, n in enumerate(("cat", "dog", "eel"))]
    report, _ = packed(source, tmp_path / "out")
    assert report.classes == 3 and report.outside == ()
    write(source, {"0.jpg": picture(), "cat/deep/2.jpg": picture()})
    report, samples = packed(source, tmp_path / "strays")
    assert report.classes == 3 and report.outside == ("0.jpg", "cat/deep/2.jpg")
    found = [meta_of(files).get("label_name") for files in samples.values()]
    assert found == [None, "cat", None, "dog", "eel"]
    write(source, {"cat/1.txt": b"a cat"})  # makes it a folder of captions
    assert not any(item.meta for item in list_files(str(source)))


def test_rows_that_differ_in_the_caption_alone_are_one_sample(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": picture(), "b.jpg": picture(), "c.mp4": b""})
    table = tmp_path / "list.csv"
    table.write_text(
        "path,caption,start\na.jpg,one,1\nb.jpg,x,1\na.jpg,two,1\na.jpg,one,1\n"
        "c.mp4,first,0\nc.mp4,then,5\n"
    )
    a, b, first, then = list_files(str(table))
    assert a.describe()[0] == ["one", "two"] and b.describe()[0] == ["x"]
    assert [item.meta["start"] for item in (first, then)] == [0, 5]  # not of the same moment


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows), "utf-8")
    else:
        cut = "\t" if path.suffix == ".tsv" else ","
        lines = [cut.join(rows[0]), *(cut.join(f'"{v}"' for v in row.values()) for row in rows)]
        path.write_text("\ufeff" + "\r\n".join(lines), "utf-8")
    return path


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_list_of_files(tmp_path: Path, ending: str) -> None:
    write(tmp_path, {"in/a.jpg": picture(), "in/sub/b.jpg": picture(), "else/c.jpg": picture()})
    names = [str(tmp_path / "in/a.jpg"), "sub/b.jpg", "../else/c.jpg"]
    texts = ["héllo, ç", "tab\tin it", "third"]
    rows = [
        {"url": "http://x", "image_path": name, "description": text, "score": i}
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    source = write_list(tmp_path / "in" / f"list{ending}", rows)
    report, samples = packed(source, tmp_path / "out")
    assert report.samples == 3
    assert [files["txt"].decode() for files in samples.values()] == texts
    metas = [meta_of(files) for files in samples.values()]
    assert [meta["original_name"] for meta in metas] == ["a.jpg", "sub/b.jpg", "../else/c.jpg"]
    assert [(meta["score"], meta["url"]) for meta in metas] == [(i, "http://x") for i in range(3)]
    assert "image_path" not in metas[0]


def test_several_captions_of_a_row(tmp_path: Path) -> None:
    rows = [{"file": "a.jpg", "caption": None, "captions": ["one", "two"], "file_name": "b.jpg"}]
    write(tmp_path, {"b.jpg": picture()})  # file_name comes before file
    _, samples = packed(write_list(tmp_path / "list.jsonl", rows), tmp_path / "out")
    files = samples["000000000"]
    assert files["txt"] == b"one" and meta_of(files)["captions"] == ["one", "two"]
    write(tmp_path, {"list.csv": "path,text,n\nb.jpg,42,42\n"})
    assert list_files(str(tmp_path / "list.csv"))[0].describe() == (["42"], {"text": "42", "n": 42})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "l.csv",
            "picture,text\na,x",
            "l.csv has no column of files: its columns are pic.*",
        ),
        ("l.csv", "path,text\na.jpg,x,y", r"l.csv line 2: more cells"),
        ("l.csv", 'path,text\na.jpg,"x\nb.jpg,y', r"l.csv line 3"),
        ("l.tsv", b"path\ttext\na.jpg\t\xff\xfe", "l.tsv is not UTF-8"),
        ("l.jsonl", '{"path": "a.jpg"}\n{"path": ', "l.jsonl line 2 is not json"),
        ("l.jsonl", '["a.jpg"]', "l.jsonl line 1 is not a json object"),
        ("l.jsonl", '{"image": {"bytes": ""}}', "row 1: column 'image' must hold .* of type dict"),
        ("l.parquet", "not parquet", "l.parquet cannot be read as parquet"),
        ("l.txt", "a.jpg", "l.txt: xray data pack takes a folder .*, not a .txt file of one text"),
        ("l.tar", "", "not .tar shards: use shards as they are, as data.sources.NAME.shards=.*tar"),
        ("l.xyz", "", "l.xyz is of unknown kind: xray data pack takes a folder of pictures"),
        ("l.csv", "path,caption\n", "l.csv has no rows"),
        (
            "in/metadata.csv",
            "a,b\nc,d",
            "metadata.csv has no column of files: .* are a, b",
        ),
        ("in/0/00000.tar", "", "in contains .tar shards below it, such as 0/00000.tar"),
    ],
)
def test_a_wrong_input_is_named(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    write(tmp_path, {name: content})
    source = tmp_path / ("in" if name.startswith("in/") else name)
    with pytest.raises(DataError, match=message) as caught:
        pack(source, tmp_path / "out", PackConfig())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    write(tmp_path, {"l.parquet": "x"})
    with pytest.raises(DataError, match=r"l\.parquet needs pyarrow: pip install pyarrow"):
        list_files(str(tmp_path / "l.parquet"))


def test_inputs_that_cannot_be_packed(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": picture(), "file": "x"})
    out = tmp_path / "out"
    with pytest.raises(DataError, match="nowhere does not exist"):
        pack(tmp_path / "nowhere", out, PackConfig())
    with pytest.raises(ConfigError, match="is inside"):
        pack(source, source / "packed", PackConfig())
    with pytest.raises(ConfigError, match="file is a file"):
        pack(source, source / "file", PackConfig())
    with pytest.raises(ConfigError, match="per_shard=10001: use 1 to 10000"):
        pack(source, out, PackConfig(per_shard=10_001))
    with pytest.raises(DataError, match=r"contains neither \.tar shards nor pictures or clips"):
        pack(write(tmp_path / "empty", {"a.md": ""}), out, PackConfig())


# --- what is left out --------------------------------------------------------------------------


def test_broken_files_are_left_out_and_listed(tmp_path: Path) -> None:
    good = picture((64, 64))
    files: dict[str, bytes | str] = {f"{i}.jpg": good for i in range(8)}
    files |= {"1.jpg": good[: len(good) // 2], "2.mp4": b"no clip", "3.json": "[1]", "4.heic": "x"}
    files |= {"6.jpg": "", "6.txt": "a caption saves no broken picture", "7.jpg": b"x"}
    source, out = write(tmp_path / "in", files), tmp_path / "out"
    (source / "0.jpg").unlink()
    (source / "0.jpg").symlink_to(source / "gone.jpg")
    report, samples = packed(source, out, per_shard=4)
    # 0.jpg 1.jpg 2.jpg 2.mp4 | 3.jpg 4.heic 4.jpg 5.jpg | 6.jpg 7.jpg
    assert list(samples) == ["000000002", "000010002", "000010003"]
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["00000.tar", "00001.tar"]
    causes = {"missing file": 1, "undecodable image": 3, "undecodable video": 1}
    causes |= {"broken json": 1, "unsupported ending": 1}
    assert report == PackReport(2, 3, causes, 0)
    listed = skipped_in(out)
    assert [record["file"] for record in listed] == [
        *("0.jpg", "1.jpg", "2.mp4", "3.jpg", "4.heic", "6.jpg", "7.jpg"),
    ]
    assert listed[0] == {
        "key": "000000000",
        "file": "0.jpg",
        "cause": "missing file",
        "detail": "No such file or directory",
    }
    assert not list(out.glob("pack_skipped.*.jsonl"))
    seen: list[tuple[int, int]] = []
    again = pack(source, out, PackConfig(per_shard=4), lambda *now: seen.append(now))
    assert again == PackReport(2, 3, causes, 2)
    assert seen == [(10, 10)]  # nor is the third shard tried again


def test_nothing_usable(tmp_path: Path) -> None:
    write(tmp_path, {"l.csv": "path\na.jpg\n\nb.jpg\n"})
    with pytest.raises(DataError, match=r"nothing in .*l.csv can be used, e.g. .*: missing file"):
        pack(tmp_path / "l.csv", tmp_path / "out", PackConfig())
    assert len(skipped_in(tmp_path / "out")) == 2
    write(tmp_path, {"l.csv": "path\nc.jpg\n", "c.jpg": picture()})  # corrected: begins anew
    assert pack(tmp_path / "l.csv", tmp_path / "out", PackConfig()).skipped == {}
