"""Captions beside files and in tables: encodings, spellings, forms; nothing is lost in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke
from packing import write
from shards import photo

from data_pipelines.curation.metadata import read_metadata
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import list_files, open_data
from data_pipelines.shards.tar_index import index_shard
from data_pipelines.tags.reader import read_list
from data_pipelines.text.captions import captions_of
from xray.errors import BadSample, ConfigError, DataError

TEXT = "Žluťoučký kůň\n日本の猫 🐈"
UNMARKED = "no encoding says what it is"


def packed(source: Path, out: Path) -> dict[str, dict[str, bytes]]:
    """Pack, and return the files of each sample by the name of its picture."""
    pack(source, out, PackConfig())
    samples = {}
    for tar in out.glob("*.tar"):
        index = index_shard(tar)
        for member in range(len(index)):
            files = index.read(member)
            samples[json.loads(files["json"])["original_name"]] = files
    return samples


def skipped(out: Path) -> dict[str, tuple[str, str]]:
    lines = (out / "pack_skipped.jsonl").read_text().splitlines()
    return {row["file"]: (row["cause"], row["detail"]) for row in map(json.loads, lines)}


def marked(text: str, encoding: str) -> bytes:
    return f"\ufeff{text}".encode(encoding)


@pytest.mark.parametrize(
    "facts",
    [
        {"caption": "of json", "captions": ["more", "of json"]},
        {"captions": {"en": ["of json"], "de": ["aus json"]}},
    ],
)
def test_a_text_file_goes_before_metadata_in_files_and_shards(
    tmp_path: Path, facts: dict[str, Any]
) -> None:
    files = {"a.jpg": photo(0), "a.json": json.dumps(facts), "b.jpg": photo(1)}
    source = write(tmp_path / "in", {**files, "a.txt": "one\ntwo", "b.json": files["a.json"]})
    samples = packed(source, tmp_path / "out")
    plain = open_data(str(source), Request("s", "image"))
    assert captions_of(samples["a.jpg"]) == captions_of(plain.read(0, 0)) == ["one", "two"]
    assert captions_of(samples["b.jpg"]) == captions_of(plain.read(0, 1))


MARKED = ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")


@pytest.mark.parametrize("encoding", MARKED)
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    facts = json.dumps({"source": "můj", "captions": TEXT.split("\n")}, ensure_ascii=False)
    source = write(
        tmp_path / "in",
        {
            "a.jpg": photo(0),
            "a.txt": marked(TEXT, encoding),
            "b.jpg": photo(1),
            "b.json": marked(facts, encoding),
        },
    )
    samples = packed(source, tmp_path / "out")
    for files in samples.values():
        assert files["txt"].decode() == "Žluťoučký kůň"
        assert captions_of(files) == TEXT.split("\n")
    assert json.loads(samples["b.jpg"]["json"])["source"] == "můj"
    for ending, cut in (("csv", ","), ("tsv", "\t")):
        rows = f"file_name{cut}caption\na.jpg{cut}kůň\n"
        write(source, {f"l.{ending}": marked(rows, encoding)})
        assert list_files(str(source / f"l.{ending}"))[0].describe()[0] == ["kůň"]
    write(source, {"l.jsonl": marked('{"path": "a.jpg", "caption": "kůň"}\n', encoding)})
    assert list_files(str(source / "l.jsonl"))[0].describe()[0] == ["kůň"]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("café Žižkov", "cp1250"),
        ("窗台上的猫", "gb18030"),
        ("窓辺の猫", "shift_jis"),
        (UNMARKED, "utf-16-le"),
    ],
)
def test_text_of_an_unknown_encoding_is_left_out_by_name(
    tmp_path: Path, text: str, encoding: str
) -> None:
    source = write(tmp_path / "in", {f"{name}.jpg": photo(n) for n, name in enumerate("abc")})
    write(source, {"a.txt": f"fine\n{text}".encode(encoding), "b.txt": "plain"})
    write(source, {"c.json": json.dumps({"caption": text}, ensure_ascii=False).encode(encoding)})
    samples = packed(source, tmp_path / "out")
    assert list(samples) == ["b.jpg"]
    for name, sidecar in (("a.jpg", "a.txt"), ("c.jpg", "c.json")):
        cause, detail = skipped(tmp_path / "out")[name]
        assert cause == "not UTF-8" and detail.startswith(f"{sidecar} is not UTF-8")
        assert "iconv -f ENCODING -t UTF-8" in detail
    # a folder that is read as it is names the sample in the same way
    source_of_files = open_data(str(source), Request("s", "image"))
    with pytest.raises(BadSample, match=r"not UTF-8.*line|NUL"):
        captions_of(source_of_files.read(0, 0))
    write(source, {"l.csv": f"file_name,caption\na.jpg,{text}\n".encode(encoding)})
    with pytest.raises(DataError, match=r"l\.csv is not UTF-8.*iconv"):
        list_files(str(source / "l.csv"))


def test_a_txt_in_a_shard_that_is_not_utf8_is_a_bad_sample() -> None:
    assert captions_of({"txt": marked("a cat", "utf-16-le")}) == ["a cat"]
    with pytest.raises(BadSample, match="the txt file is not UTF-8"):
        captions_of({"txt": "café".encode("cp1252")})


def test_lists_of_names_may_be_utf16(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(marked("mořský koník\r\ntygr\u2028x\r\n", "utf-16-le"))
    assert read_list(str(path), "hashtag.concepts") == (("mořský koník",), ("tygr\u2028x",))
    assert len(read_metadata(str(path)).lists[0][1]) == 2
    path.write_bytes("mořský koník".encode("cp1250"))
    with pytest.raises(ConfigError, match=r"hashtag\.stop=.*names\.txt is not UTF-8 \(line 1\)"):
        read_list(str(path), "hashtag.stop")


@pytest.mark.parametrize("encoding", MARKED)
def test_a_file_of_texts(tmp_path: Path, encoding: str) -> None:
    # U+0A0A and U+010A have bytes of 10, which are no line ends
    lines = ["first Ċ ਊ", "second\u2028still", "third"]
    path = tmp_path / "lines.txt"
    path.write_bytes(marked("\r\n".join(lines), encoding))
    source = open_data(str(path), Request("s"))
    assert [source.read(*place)["txt"].decode() for place in source.places()] == lines


def test_captions_end_at_line_ends_only(tmp_path: Path) -> None:
    captions = ["one\u2028still one", "two\x0bstill\x0ctwo", "three\x85still \x1cthree"]
    text = f"{captions[0]}\r\n{captions[1]}\n\n{captions[2]}"
    source = write(tmp_path / "in", {"a.jpg": photo(0), "a.txt": text})
    samples = packed(source, tmp_path / "out")
    assert captions_of(samples["a.jpg"]) == captions


def test_every_spelling_of_a_sidecar_is_read(tmp_path: Path) -> None:
    facts = json.dumps({"Caption": "of json", "score": 3})
    sidecars = {
        "a.caption": "of caption",
        "b.TXT": "of TXT",
        "c.jpg.txt": "of c.jpg.txt",
        "d.jpg.json": facts,
        "e.JSON": facts,
        "F.JPG.Txt": "of F.JPG.Txt",
        "g.txt": "the usual one",
    }
    files: dict[str, bytes | str] = {f"{name}.jpg": photo(n) for n, name in enumerate("abcdeg")}
    files |= {"F.JPG": photo(9), "g.caption": "another", "g.jpg.txt": "a third"}
    source = write(tmp_path / "in", files | sidecars)
    samples = packed(source, tmp_path / "out")
    found = {name: captions_of(own)[0] for name, own in samples.items()}
    assert found == {
        "a.jpg": "of caption",
        "b.jpg": "of TXT",
        "c.jpg": "of c.jpg.txt",
        "d.jpg": "of json",
        "e.jpg": "of json",
        "F.JPG": "of F.JPG.Txt",
        "g.jpg": "the usual one",
    }
    assert json.loads(samples["d.jpg"]["json"])["score"] == 3
    report = pack(source, tmp_path / "out", PackConfig())
    assert report.unread == ("g.caption", "g.jpg.txt")


def test_the_name_of_the_file_is_no_caption(tmp_path: Path) -> None:
    facts = {"title": "a.jpg", "description": "", "photoTakenTime": {"timestamp": "1"}}
    source = write(tmp_path / "in", {"a.jpg": photo(0), "a.jpg.json": json.dumps(facts)})
    assert "txt" not in packed(source, tmp_path / "out")["a.jpg"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["Caption", "TEXT", " Title "])
def test_columns_may_have_capitals(tmp_path: Path, ending: str, column: str) -> None:
    write(tmp_path, {"a.jpg": photo(0)})
    row = {"File_Name": "a.jpg", column: "42", "LABEL": 3}
    path = tmp_path / f"l.{ending}"
    if ending == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist([row]), path)
    elif ending == "jsonl":
        path.write_text(json.dumps(row))
    else:
        path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())))
    files = packed(path, tmp_path / "out")["a.jpg"]
    assert files["txt"] == b"42" and json.loads(files["json"])["label"] == 3


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ({"raw": "a cat", "tokens": ["a", "cat"]}, ["a cat"]),
        ([{"raw": "a cat"}, {"raw": " two "}], ["a cat", "two"]),
        ({"raw": ["a cat", "two"], "sentid": [1, 2]}, ["a cat", "two"]),
        ([{"caption": "a cat", "id": 1}], ["a cat"]),
        ({"text": "a cat", "weight": 2}, ["a cat"]),
        ([None, "a cat", "", {"raw": None}], ["a cat"]),
        (None, []),
        ([None], []),
        (float("nan"), []),
    ],
)
@pytest.mark.parametrize("column", ["caption", "captions", "text"])
def test_forms_of_captions(tmp_path: Path, column: str, value: Any, captions: list[str]) -> None:
    rows = [{"path": "a.jpg", column: value}, {"path": "b.jpg", "text": "else"}]
    write(tmp_path, {"a.jpg": photo(0), "b.jpg": photo(1)})
    write(tmp_path, {"l.jsonl": "\n".join(map(json.dumps, rows))})
    files = packed(tmp_path / "l.jsonl", tmp_path / "out")["a.jpg"]
    assert files.get("txt", b"").decode() == "".join(captions[:1])
    if captions:
        assert captions_of(files) == captions
    else:
        with pytest.raises(BadSample, match="no caption"):
            captions_of(files)
    read = open_data(str(tmp_path / "l.jsonl"), Request("s")).read(0, 0)
    assert captions == [] or captions_of(read) == captions


def test_weights_of_captions_are_kept(tmp_path: Path) -> None:
    given = [{"text": "a cat", "weight": 3.0, "language": "en"}, {"text": "kočka"}]
    source = write(tmp_path / "in", {"a.jpg": photo(0), "a.json": json.dumps({"captions": given})})
    assert json.loads(packed(source, tmp_path / "out")["a.jpg"]["json"])["captions"] == given
    read = open_data(str(source), Request("s")).read(0, 0)
    assert json.loads(read["json"])["captions"] == given


@pytest.mark.parametrize("value", [7, [["x"], 7], True, {"words": 3}, "a\0b"])
def test_a_caption_that_is_no_text_is_named(tmp_path: Path, value: Any) -> None:
    source = write(tmp_path / "in", {"a.jpg": photo(0), "b.jpg": photo(1), "b.txt": "b"})
    write(source, {"a.json": json.dumps({"caption": value})})
    assert list(packed(source, tmp_path / "out")) == ["b.jpg"]
    assert skipped(tmp_path / "out")["a.jpg"][0] == "broken caption"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.csv", "path,caption,caption\na.jpg,one,two\n", "column 'caption' occurs twice"),
        ("l.tsv", "path\tid\tpath\na.jpg\t1\tb.jpg\n", "column 'path' occurs twice"),
        (
            "l.jsonl",
            '{"path": "a.jpg", "text": "x", "text": "y"}',
            "line 1 is .*'text' occurs twice",
        ),
    ],
)
def test_a_column_that_occurs_twice_is_refused(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    write(tmp_path, {"a.jpg": photo(0), name: content})
    with pytest.raises(DataError, match=says):
        list_files(str(tmp_path / name))


def test_a_parquet_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table([["a.jpg"], ["x"], ["y"]], names=["path", "text", "text"])
    parquet.write_table(table, tmp_path / "l.parquet")
    with pytest.raises(DataError, match="column 'text' occurs twice"):
        list_files(str(tmp_path / "l.parquet"))


def test_a_json_key_that_occurs_twice_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": photo(0), "b.jpg": photo(1)})
    write(source, {"a.json": '{"caption": "x", "caption": "y"}', "b.txt": "b"})
    assert list(packed(source, tmp_path / "out")) == ["b.jpg"]
    assert "'caption' occurs twice" in skipped(tmp_path / "out")["a.jpg"][1]


def test_packing_counts_captions_and_names_what_nobody_read(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{n}.jpg": photo(n) for n in range(4)}
    files |= {"0.txt": "zero", "1.json": '{"caption": ["one", "uno"]}', "2.json": '{"id": 2}'}
    files |= {"3.xmp": "x", "deep/4.xmp": "x", "README": "x", "spare.txt": "of no picture"}
    source, out = write(tmp_path / "in", files), tmp_path / "out"
    for _ in range(2):  # also when all shards are there
        told = invoke("data", "pack", source, out).output
        assert "captions: 2 of 4 samples have captions\n" in told
        assert "not read: 2 .xmp, 1 without ending, 1 .txt (e.g. 3.xmp)\n" in told
    rows = "path,Label\n0.jpg,1\n1.jpg,2\n"
    told = invoke("data", "pack", write(source, {"l.csv": rows}) / "l.csv", tmp_path / "two").output
    assert "0 of 2 samples have captions; they are read from a.txt beside a.jpg, or the" in told
    assert "not read: " in told and "2 .jpg" in told and "2 .txt" in told


def test_packing_a_whole_folder_says_nothing_was_left(tmp_path: Path) -> None:
    source = write(tmp_path / "in", {"a.jpg": photo(0), "a.txt": "a", ".DS_Store": "x"})
    told = invoke("data", "pack", source, tmp_path / "out").output
    assert "captions: 1 of 1 samples have captions" in told and "not read" not in told
