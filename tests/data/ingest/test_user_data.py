"""Every kind of data through every command that takes data, in process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from in_process import invoke
from shards import photo, write_tar

from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.listing import list_folder
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.user_data import KINDS, kind_of, open_corpus, open_data, open_sources
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.tags.vocabulary import Vocabulary
from data_pipelines.text.captions import captions_of
from xray.commands.common import open_shards
from xray.config import DataConfig
from xray.config.data import SourceConfig
from xray.errors import DataError, XrayError

CAPTIONS = ["a red square #red", "a blue circle #blue", "a green star #green"]
FORMS = {  # a form of data -> its kind
    "shards": "shards",
    "shards/0.tar": "shards",
    "shards/*.tar": "shards",
    "shards/{0..0}.tar": "shards",
    "file://shards": "shards",
    "folder": "folder",
    "classes": "folder",
    "imagefolder": "folder",
    "list.csv": "list",
    "list.tsv": "list",
    "list.jsonl": "list",
    "list.parquet": "list",
    "folder/0.jpg": "file",
    "lines.txt": "text",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three photos with their captions in every form."""
    root = tmp_path_factory.mktemp("made")
    for name in ("shards", "folder", "imagefolder"):
        (root / name).mkdir()
    files, rows = {}, []
    for number, caption in enumerate(CAPTIONS):
        picture, label = photo(number), ("ant", "bee", "bee")[number]
        meta = {"caption": caption, "label": label, "hashtags": [caption.split("#")[1]]}
        files |= {f"{number}.jpg": picture, f"{number}.json": json.dumps(meta).encode()}
        (root / "folder" / f"{number}.jpg").write_bytes(picture)
        (root / "folder" / f"{number}.json").write_text(json.dumps(meta))
        (root / "classes" / label).mkdir(parents=True, exist_ok=True)
        (root / "classes" / label / f"{number}.jpg").write_bytes(picture)
        (root / "imagefolder" / f"{number}.jpg").write_bytes(picture)
        rows.append({"file_name": f"folder/{number}.jpg", **meta, "hashtags": meta["hashtags"][0]})
    write_tar(root / "shards" / "0.tar", files)
    for ending, cut in (("csv", ","), ("tsv", "\t")):
        lines = [cut.join(rows[0]), *(cut.join(map(str, row.values())) for row in rows)]
        (root / f"list.{ending}").write_text("\n".join(lines) + "\n")
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [{**row, "file_name": str(row["file_name"]).removeprefix("folder/")} for row in rows]
    metadata = "".join(json.dumps(row) + "\n" for row in own)
    (root / "imagefolder" / "metadata.jsonl").write_text(metadata)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), root / "list.parquet")
    (root / "lines.txt").write_text("\n".join(CAPTIONS) + "\n")
    return root


def at(root: Path, form: str) -> str:
    scheme, _, name = form.rpartition("://")
    return f"{scheme}://{root / name}" if scheme else str(root / form)


def run(*arguments: object) -> str:
    done = invoke(*arguments)
    if done.exit_code == 2:
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        raise DataError(done.stderr.strip().removeprefix("xray: "))
    assert done.exit_code in (0, 1), done.output
    return done.output


# Each opens data as a command does and returns how many samples it met.


def train(where: str, out: Path) -> int:
    data = DataConfig(sources={"s": SourceConfig(where)}, cache=str(out / "cache"))
    return len(open_sources(data, ["s"])["s"])


def evaluate(where: str, out: Path) -> int:
    return len(open_labelled("eval.knn.test", where, "image"))


def embed(where: str, out: Path) -> int:
    return int(open_corpus([where]).source.counts.sum())


def precompute(where: str, out: Path) -> int:
    return len(open_shards(where, "", "xray data scores"))


def index(where: str, out: Path) -> int:
    return int(run("data", "index", where).split(" images")[0].split()[-1])


def pack(where: str, out: Path) -> int:
    return int(run("data", "pack", where, out / "packed").split(" samples")[0].split()[-1])


def check(where: str, out: Path) -> int:
    run("data", "check", where, "--json", out / "check.json")
    shards = json.loads((out / "check.json").read_text())["shards"]
    assert not any(shard["causes"] for shard in shards)
    if any(shard["error"] for shard in shards):
        raise DataError(shards[0]["error"])
    return sum(shard["images"]["usable"] for shard in shards)


def stats(where: str, out: Path) -> int:
    told = run("data", "stats", where, "--out", out / "stats.html")
    if "1 broken shard" in told:
        return check(where, out)  # which says why
    return int(told.split(" of ")[0].split()[-1])


def tags(where: str, out: Path) -> int:
    path = out / "tags.json"
    run(
        "data", "tags", where, "tags=caption_hashtags", "min_count=1", "--out", path, "--workers", 1
    )
    assert set(Vocabulary.load(path).tags) <= {"red", "blue", "green"}
    return sum(Vocabulary.load(path).counts)


def metadata(where: str, out: Path) -> int:
    path = out / "metadata.txt"
    run("data", "metadata", where, "min_count=1", "--out", path, "--workers", 1)
    return sum(colour in path.read_text().split() for colour in ("red", "blue", "green"))


def curate(where: str, out: Path) -> int:
    told = run(
        "data", "curate", where, "metadata=none", "--report", out / "x.html", "--json", out / "x"
    )
    assert "keep-list" in told
    return int(json.loads((out / "x").read_text())["kept"][0])


Command = Callable[[str, Path], int]
TAKES: dict[Command, tuple[str, ...]] = {
    train: ("shards",),
    precompute: ("shards",),
    index: ("shards",),
    curate: ("shards",),
    pack: ("folder", "list"),
    evaluate: ("shards", "folder", "list"),
    check: ("shards", "folder", "list"),
    stats: ("shards", "folder", "list"),
    tags: ("shards", "folder", "list", "file", "text"),
    metadata: ("shards", "folder", "list", "file", "text"),
    embed: ("shards", "folder", "list", "file", "text"),
}
NO_CAPTIONS = ("classes", "folder/0.jpg")
COMMANDS = pytest.mark.parametrize("command", TAKES, ids=lambda command: command.__name__)


@COMMANDS
@pytest.mark.parametrize("form", FORMS)
def test_a_command_takes_a_kind_or_says_what_it_takes(
    made: Path, tmp_path: Path, command: Command, form: str
) -> None:
    where, kind = at(made, form), FORMS[form]
    if kind in TAKES[command]:
        if command in (tags, metadata) and form in NO_CAPTIONS:
            return  # nothing to count
        assert command(where, tmp_path) == (1 if form.endswith(".jpg") else 3)
        return
    with pytest.raises(XrayError) as caught:
        command(where, tmp_path)
    says = str(caught.value)
    taken = " or ".join(KINDS[name].what for name in TAKES[command])
    assert f"{where}: " in says and f" takes {taken}, not {KINDS[kind].what}" in says
    if "shards" in TAKES[command] and kind in ("folder", "list"):
        assert f"Make shards: xray data pack {where} " in says


def test_the_command_of_the_error_makes_shards_that_work(made: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my photos"
    mine.symlink_to(made / "folder")
    with pytest.raises(DataError, match="Make shards: xray data pack") as caught:
        train(str(mine), tmp_path)
    arguments = shlex.split(str(caught.value).split("Make shards: xray ")[1])
    run(*arguments)
    assert train(arguments[-1], tmp_path) == 3


def broken(root: Path) -> dict[str, str]:
    """Data that nothing can use -> the error that every command gives."""
    (root / "empty").mkdir()
    (root / "notes").mkdir()
    (root / "notes" / "a.md").write_text("no picture")
    (root / "a.xyz").write_text("?")
    (root / "bad.parquet").write_bytes(b"no parquet")
    (root / "bad.csv").write_bytes(b"path,label\na.jpg,\xff\xfe\n")
    (root / "none.csv").write_text("path,label\n")
    (root / "deep" / "in").mkdir(parents=True)
    write_tar(root / "deep" / "in" / "0.tar", {"0.jpg": photo(0)})
    (root / "cut.tar").write_bytes((root / "deep" / "in" / "0.tar").read_bytes()[:700])
    (root / "zero.tar").write_bytes(b"")
    return {
        "gone": "gone does not exist",
        "gone.csv": "gone.csv does not exist",
        "gone.tar": "gone.tar does not exist",
        "gone*.tar": "no .tar shards at ",
        "empty": "empty contains neither .tar shards nor pictures or clips",
        "notes": "notes contains neither .tar shards nor pictures or clips",
        "a.xyz": "a.xyz is of unknown kind: ",
        "bad.parquet": "bad.parquet cannot be read as parquet",
        "bad.csv": "bad.csv is not UTF-8 (line 2): convert it",
        "none.csv": "none.csv has no rows",
        "deep": "deep contains .tar shards below it, such as in/0.tar",
        "cut.tar": "cut.tar is truncated, damaged or not a tar",
        "zero.tar": "zero.tar is empty (0 bytes)",
        "http://localhost:1/list.csv": "only .tar shards are read from a URL",
    }


@COMMANDS
def test_data_that_cannot_be_used_gives_the_same_error_everywhere(
    tmp_path: Path, command: Command
) -> None:
    for name, says in broken(tmp_path).items():
        if ".tar" in name and command is pack and name != "gone.tar":
            continue  # it takes no shards, whole or not
        with pytest.raises(XrayError) as caught:
            command(name if "://" in name else str(tmp_path / name), tmp_path)
        assert says in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_all_kinds_give_the_same_samples(made: Path) -> None:
    forms = ("shards", "folder", "imagefolder", "list.csv", "list.jsonl", "list.parquet")
    opened = {form: open_data(at(made, form), Request("s", "image")) for form in forms}
    expected = [(photo(number), [caption]) for number, caption in enumerate(CAPTIONS)]
    for form, source in opened.items():
        read = [source.read(*place) for place in source.places()]
        assert [(files["jpg"], captions_of(files)) for files in read] == expected, form
        labels = [json.loads(files["json"])["label"] for files in read]
        assert labels == ["ant", "bee", "bee"], form
    lines: Source = open_data(at(made, "lines.txt"), Request("s"))
    texts = [captions_of(lines.read(*place, TEXT_FILES))[0] for place in lines.places()]
    assert texts == CAPTIONS
    assert len({source.digest for source in opened.values()}) >= 3


def test_hidden_tars_are_no_shards(made: Path, tmp_path: Path) -> None:
    """MacOS leaves files such as `._0.tar` beside 0.tar."""
    (tmp_path / "0.jpg").write_bytes(photo(0))
    (tmp_path / "._0.tar").write_bytes(b"no tar")
    assert kind_of(str(tmp_path)) == "folder"
    assert len(open_data(str(tmp_path), Request("s"))) == 1
    (tmp_path / "0.tar").write_bytes((made / "shards" / "0.tar").read_bytes())
    assert kind_of(str(tmp_path)) == "shards"
    assert open_data(str(tmp_path), Request("s")).manifest.names == ["0.tar"]


def test_class_folders_may_be_links_and_hidden_files_are_skipped(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "set" / name).symlink_to(made / "classes" / name)
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "set" / ".cache" / "x.jpg").write_bytes(photo(0))
    source = open_labelled("set", str(tmp_path / "set"), "image")
    assert source.classes == ("ant", "bee") and len(source) == 3


def test_a_link_to_its_own_folder_or_above_lists_no_file_twice(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(photo(0))
    (folder / "itself").symlink_to(".")
    (folder / "above").symlink_to(tmp_path)
    assert [item.name for item in list_folder(str(folder), TableKeys())] == ["a.jpg"]
    above = tmp_path / "link"
    above.symlink_to(folder)  # the folder itself may be given as a link
    assert [item.name for item in list_folder(str(above), TableKeys())] == ["a.jpg"]


def test_evaluation_reads_captions_beside_files(made: Path) -> None:
    for form in ("folder", "imagefolder", "list.tsv", "list.parquet"):
        source = open_labelled("set", at(made, form), "image")
        assert source.classes == ("ant", "bee"), form
        assert [source.read(*p)["cls"] for p in source.places()] == [b"0", b"1", b"1"], form
        assert captions_of(source.read(0, 2)) == [CAPTIONS[2]], form


def test_rows_of_a_file_are_one_evaluation_sample(made: Path, tmp_path: Path) -> None:
    table = tmp_path / "list.jsonl"
    rows = [{"path": str(made / "folder/0.jpg"), "id": n, "caption": f"text {n}"} for n in range(3)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_labelled("set", str(table), "image")
    assert len(source) == 1 and captions_of(source.read(0, 0)) == ["text 0", "text 1", "text 2"]
    assert np.array_equal(open_data(str(table), Request("s")).counts, [3])  # else rows are samples


def test_real_photos_from_a_list(shared_data: Path, tmp_path: Path) -> None:
    shards = open_data(str(shared_data / "captions_val"), Request("s", "image"))
    rows = []
    for number, place in zip(range(40), shards.places(), strict=False):
        files = shards.read(*place)
        (tmp_path / f"{number}.jpg").write_bytes(files["jpg"])
        captions = json.loads(files["json"])["captions"]
        rows += [{"path": f"{number}.jpg", "caption": caption} for caption in captions]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(rows) == 200 and evaluate(str(tmp_path / "l.jsonl"), tmp_path) == 40
    assert check(str(tmp_path / "l.jsonl"), tmp_path) == 40
