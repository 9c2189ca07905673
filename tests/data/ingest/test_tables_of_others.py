"""Tables as other people and data sets write them: columns, delimiters, folders, caption files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from in_process import invoke
from shards import photo

from data_pipelines.ingest.pack import RECORD, PackConfig, pack
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.user_data import kind_of, list_files, open_data
from xray.errors import ConfigError, DataError

SENTENCES = ["A dog runs .", 'A man says "stop" , and smiles', "Two cats ; one | bowl"]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def photos(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(number))


def read(where: Path, **keys: str) -> dict[str, list[str]]:
    """Return the captions of a table's files, by name."""
    items = list_files(str(where), keys=TableKeys(**keys))
    assert all(item.path.is_file() for item in items), items
    return {item.name: item.describe()[0] for item in items}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "Filename;Caption\na.jpg;x\nb.jpg;y\n"),
        ("a.csv", "IMAGE_NAME|caption\na.jpg|x\nb.jpg|y\n"),
        ("a.tsv", "url\ttext\na.jpg\tx\nb.jpg\ty\n"),
        ("a.csv", "id,img,Text\n1,a.jpg,x\n2,b.jpg,y\n"),
        ("a.csv", "url,file_name,caption\nhttp://x/1.jpg,a.jpg,x\nhttp://x/2.jpg,b.jpg,y\n"),
        ("a.jsonl", '{"photo": "a.jpg", "text": "x"}\n{"photo": "b.jpg", "text": "y"}\n'),
        ("a.json", '[{"photo": "a.jpg", "text": "x"}, {"photo": "b.jpg", "text": "y"}]'),
    ],
)
def test_the_column_of_files_is_found(tmp_path: Path, name: str, text: str) -> None:
    photos(tmp_path, "a.jpg", "b.jpg")
    assert read(write(tmp_path / name, text)) == {"a.jpg": ["x"], "b.jpg": ["y"]}


def test_keys_name_columns_delimiter_and_folder(tmp_path: Path) -> None:
    photos(tmp_path / "elsewhere", "a.jpg", "small/a.jpg", "b.jpg", "small/b.jpg")
    rows = "big^small^Title^words\na.jpg^small/a.jpg^t^x\nb.jpg^small/b.jpg^u^\n"
    table = write(tmp_path / "lists" / "l.csv", rows)
    keys = {"delimiter": "^", "root": str(tmp_path / "elsewhere")}
    with pytest.raises(DataError, match=r"several columns of files \(big, small\).*image_key="):
        read(table, **keys)
    assert read(table, image_key="Big", **keys) == {"a.jpg": ["t"], "b.jpg": ["u"]}
    found = read(table, image_key="small", caption_key="Words", **keys)
    assert found == {"small/a.jpg": ["x"], "small/b.jpg": []}  # no title instead of its caption
    with pytest.raises(ConfigError, match=r"image_key=bg: .* no such column.*'big'.*; it has big"):
        read(table, image_key="bg", **keys)
    with pytest.raises(ConfigError, match=r"caption_key=x: .* no such column"):
        read(table, image_key="big", caption_key="x", **keys)
    with pytest.raises(ConfigError, match="delimiter=ab: give one character"):
        read(table, delimiter="ab")
    with pytest.raises(ConfigError, match="root=/nope is not a folder"):
        read(table, root="/nope")
    with pytest.raises(
        ConfigError, match=r"image_key=a is for a table of files, and .* is a folder"
    ):
        list_files(str(tmp_path / "elsewhere"), keys=TableKeys(image_key="a"))
    assert read(write(tmp_path / "elsewhere" / "t.txt", "p@q\na.jpg@x\n"), delimiter="@")
    tabs = write(tmp_path / "elsewhere" / "tabs.csv", "file,x\tcaption\na.jpg\tx\n")
    assert read(tabs, delimiter="tab", image_key="file,x") == {"a.jpg": ["x"]}


def test_keys_are_recorded_and_older_records_have_their_defaults(tmp_path: Path) -> None:
    photos(tmp_path / "pictures", "a.jpg", "b.jpg")
    table = write(tmp_path / "l.csv", "image,caption,other\na.jpg,x,y\nb.jpg,,\n")
    out, root = tmp_path / "out", str(tmp_path / "pictures")
    report = pack(table, out, PackConfig(root=root, caption_key="other"))
    assert (report.samples, report.empty) == (2, 1)
    record = json.loads((out / RECORD).read_text())
    assert record["config"]["caption_key"] == "other" and record["config"]["root"] == root
    with pytest.raises(ConfigError, match=r"another packing.*caption_key: other -> caption"):
        pack(table, out, PackConfig(root=root, caption_key="caption"))
    old = tmp_path / "old"
    pack(tmp_path / "pictures", old, PackConfig())
    record = json.loads((old / RECORD).read_text())
    for key in vars(TableKeys()):
        del record["config"][key]
    (old / RECORD).write_text(json.dumps(record))
    assert pack(tmp_path / "pictures", old, PackConfig()).reused == 1


def test_files_in_a_folder_beside_the_table_are_found(tmp_path: Path) -> None:
    photos(tmp_path / "Images", "a.jpg", "b.jpg")
    table = write(tmp_path / "captions.txt", "image,caption\na.jpg,x\nb.jpg,y\n")
    assert read(table) == {"Images/a.jpg": ["x"], "Images/b.jpg": ["y"]}
    source = open_data(str(table), Request("own"))
    assert source.place == str(tmp_path) and len(source) == 2  # type: ignore[attr-defined]
    (tmp_path / "Images").rename(tmp_path.parent / "away")
    with pytest.raises(DataError, match=r"missing file .*; if the files are .* with root="):
        pack(table, tmp_path / "out", PackConfig())


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("captions.txt", ["image,caption", *(f"{n},{text}" for n, text in enumerate(SENTENCES))]),
        (
            "captions.txt",
            ["image,caption", *(f'{n},"{t.replace(chr(34), 2 * chr(34))}"' for n, t in
                                enumerate(SENTENCES))],
        ),
        (
            "results.csv",
            ["image_name| comment_number| comment", *(f"{n}| 0| {t}" for n, t in
                                                      enumerate(SENTENCES))],
        ),
        (
            "captions.txt",
            ["image|comment_number|comment", *(f"{n}|0|{t}" for n, t in enumerate(SENTENCES))],
        ),
        ("Flickr8k.token.txt", [f"{n}#0\t{text}" for n, text in enumerate(SENTENCES)]),
        ("results_20130124.token", [f"{n}#0\t{text}" for n, text in enumerate(SENTENCES)]),
    ],
)  # fmt: skip
def test_flickrs_caption_files_are_read_as_they_are(
    tmp_path: Path, name: str, lines: list[str]
) -> None:
    photos(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    lines = [re.sub(r"^([012])", r"\1.jpg", line) for line in lines]
    table = write(tmp_path / name, "\n".join(lines) + "\n")
    assert kind_of(str(table)) == "list"
    assert read(table) == {f"{n}.jpg": [text] for n, text in enumerate(SENTENCES)}


def test_several_comments_are_captions_of_one_picture(tmp_path: Path) -> None:
    photos(tmp_path, "0.jpg", "1.jpg")
    rows = ["0.jpg| 0| one", "0.jpg| 1| two", "1.jpg| 0   a row without its last delimiter"]
    table = write(tmp_path / "r.csv", "\n".join(["image_name| comment_number| comment", *rows]))
    report = pack(table, tmp_path / "out", PackConfig())
    assert (report.samples, report.empty) == (2, 1)
    assert read(table) == {"0.jpg": ["one", "two"], "1.jpg": []}
    numbered = write(tmp_path / "t.txt", "0.jpg#0\tone\n0.jpg#1\ttwo\n1.jpg#0\tthree\n")
    assert read(numbered) == {"0.jpg": ["one", "two"], "1.jpg": ["three"]}
    with pytest.raises(DataError, match="line 2: expected a picture, # and a number"):
        read(write(tmp_path / "t.txt", "0.jpg#0\tone\n1.jpg two\n"))


def test_a_text_file_stays_one(tmp_path: Path) -> None:
    for text in ("image caption\na.jpg,x\n", "a,image,caption\n", "a dog\n", "\n", "see a#1\tx"):
        table = write(tmp_path / "t.txt", text)
        assert kind_of(str(table)) == "text", text
        with pytest.raises(DataError, match=r"not a .txt file of one text per line"):
            list_files(str(table))


@pytest.mark.parametrize("filepath", ["val2014", ""])
def test_karpathys_json_is_read_as_it_is(tmp_path: Path, filepath: str) -> None:
    photos(tmp_path / filepath, "0.jpg", "1.jpg")
    images: list[dict[str, Any]] = [
        {
            "filename": f"{n}.jpg", "imgid": n, "split": "train", "sentids": [n],
            "sentences": [{"tokens": ["a"], "raw": f"{word} {n}", "sentid": n} for word in "ab"],
            **({"filepath": filepath, "cocoid": n} if filepath else {}),
        }
        for n in range(2)
    ]  # fmt: skip
    images[1]["sentences"] = []
    table = write(tmp_path / "dataset_x.json", json.dumps({"images": images, "dataset": "x"}))
    prefix = f"{filepath}/" if filepath else ""
    assert read(table) == {f"{prefix}0.jpg": ["a 0", "b 0"], f"{prefix}1.jpg": []}
    report = pack(table, tmp_path / "out", PackConfig())
    assert (report.samples, report.empty) == (2, 1)
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        facts = json.load(tar.extractfile("000000000.json"))  # type: ignore[arg-type]
    assert facts["captions"] == ["a 0", "b 0"] and facts["split"] == "train"


def test_cocos_annotations_are_read_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path / "val2014", "0.jpg", "1.jpg")
    content = {
        "images": [{"id": 7 + n, "file_name": f"{n}.jpg", "coco_url": "http://x"} for n in (0, 1)],
        "annotations": [{"id": n, "image_id": 7, "caption": f"{n} \n"} for n in (0, 1)],
    }
    table = write(tmp_path / "captions_val2014.json", json.dumps(content))
    assert read(table) == {"val2014/0.jpg": ["0", "1"], "val2014/1.jpg": []}


@pytest.mark.parametrize("text", ["3", '{"a": 1}', "[1]", '{"images": 2}', "{", "[" * 100_000])
def test_another_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"l\.json is not (json|a list of objects)"):
        list_files(str(write(tmp_path / "l.json", text)))
    broken = {"images": [{"filename": "a.jpg", "sentences": []}, {"sentences": []}]}
    with pytest.raises(DataError, match="has no filename or no list of sentences"):
        list_files(str(write(tmp_path / "k.json", json.dumps(broken))))


@pytest.mark.parametrize("column", ["url", "URL", "image", "image_url"])
def test_urls_are_refused_with_a_way_to_download_them(tmp_path: Path, column: str) -> None:
    table = write(tmp_path / "l.csv", f"{column},caption\nhttps://x.org/a.jpg?s=1,x\n,y\n")
    with pytest.raises(DataError, match=r"has URLs.*img2dataset") as caught:
        list_files(str(table))
    words = shlex.split(str(caught.value).partition("xray reads: ")[2])
    assert words[0] == "img2dataset" and words[words.index("--url_col") + 1] == column
    assert words[words.index("--caption_col") + 1] == "caption"
    assert os.path.dirname(words[words.index("--output_folder") + 1]) == str(tmp_path)


def test_the_command_packs_with_the_settings_that_its_errors_name(tmp_path: Path) -> None:
    photos(tmp_path / "p", "a.jpg", "b.jpg")
    text = "Name;Words\np/a;one\np/b;\n"
    table = write(tmp_path / "l.csv", text)
    refused = invoke("data", "pack", table, tmp_path / "out")
    assert refused.exit_code == 2 and "image_key=..." in refused.stderr
    assert "as in xray data pack" in refused.stderr
    command = refused.stderr.partition("as in xray ")[2].split()
    write(table, text.replace("p/a", "p/a.jpg").replace("p/b", "p/b.jpg"))
    made = invoke(*command[:-1], "image_key=Name", "caption_key=Words")
    assert made.exit_code == 0, made.stderr
    assert "1 of 2 samples have captions" in made.stdout
    assert "empty captions: 1 row of" in made.stdout


def test_files_without_captions_are_told_where_to_have_them(tmp_path: Path) -> None:
    photos(tmp_path / "p", "a.jpg", "b.jpg")
    table = write(tmp_path / "p" / "labels.csv", "file,words\na.jpg,one\nb.jpg,two\n")
    made = invoke("data", "pack", tmp_path / "p", tmp_path / "out")
    command = made.stdout.partition("delete ")[2].partition("and pack the table: xray ")[2]
    assert command.split()[:3] == ["data", "pack", str(table)], made.stdout
    shutil.rmtree(tmp_path / "out")
    again = invoke(*command.split("\n")[0].split())
    assert "caption_key=: there are words" in again.stdout, again.stdout + again.stderr
    named = invoke("data", "pack", table, tmp_path / "named", "caption_key=words")
    assert "2 of 2 samples have captions" in named.stdout, named.stderr
