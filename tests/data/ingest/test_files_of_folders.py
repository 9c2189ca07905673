"""Folders as people have them: links, clutter, every ending; each media file is used or counted."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from clips import clip
from in_process import invoke
from PIL import Image
from shards import photo, write_tar
from torchvision.datasets import ImageFolder

from data_pipelines.checks.check import check
from data_pipelines.ingest.labelled import open_labelled
from data_pipelines.ingest.listing import list_folder
from data_pipelines.ingest.pack import PackConfig, pack
from data_pipelines.ingest.plain_files import FileSource, Request
from data_pipelines.ingest.table_columns import TableKeys
from data_pipelines.ingest.user_data import list_files, open_data
from data_pipelines.shards.source import Source, make_cache
from data_pipelines.shards.tar_index import index_shard
from data_pipelines.text.captions import captions_of
from xray.config import DataConfig
from xray.errors import BadSample, ConfigError, DataError
from xray.evaluation.class_labels import check_labels
from xray.evaluation.feature_extraction import labels_of

ROOT = Path(__file__).resolve().parents[3]


def made(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    return root


def names_in(folder: Path) -> list[str]:
    return [item.name for item in list_folder(str(folder), TableKeys())]


# --- links -------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_at_any_depth(tmp_path: Path) -> None:
    made(tmp_path / "disk", "2021/a.jpg", "2021/deep/b.jpg", "2022/c.jpg")
    root = made(tmp_path / "in", "own/d.jpg")
    (root / "own" / "old").symlink_to(tmp_path / "disk" / "2021")
    (tmp_path / "disk" / "2021" / "next").symlink_to("../2022")
    expected = ["own/d.jpg", *(f"own/old/{n}" for n in ("a.jpg", "deep/b.jpg", "next/c.jpg"))]
    assert names_in(root) == expected
    report = pack(root, tmp_path / "out", PackConfig())
    assert report.samples == 4 and report.skipped == {}
    (root / "own" / "gone").symlink_to(tmp_path / "nowhere")  # not media: counted
    assert pack(root, tmp_path / "out2", PackConfig()).unread == ("own/gone",)


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    folders = [tmp_path / "in" / f"{n:02d}" for n in range(12)]
    for folder in folders:
        made(folder, "x.jpg")
    for one, other in itertools.permutations(folders, 2):
        (one / f"to{other.name}").symlink_to(other)
    found = names_in(tmp_path / "in")
    assert {f"{n:02d}/x.jpg" for n in range(12)} <= set(found)
    assert len(found) < 12**3 and len(found) == len(set(found))
    a, b = made(tmp_path / "a", "a.jpg"), made(tmp_path / "b", "b.jpg")
    (a / "b").symlink_to(b)
    (b / "a").symlink_to(a)
    (a / "a").symlink_to("a")  # to itself
    assert names_in(a) == ["a.jpg", "b/b.jpg"]


def test_linked_folders_of_classes_are_torchvisions(tmp_path: Path) -> None:
    made(tmp_path / "disk", "ant/1.jpg", "ant/more/2.jpg", "bee/3.jpg", "extra/4.jpg")
    root = tmp_path / "set"
    root.mkdir()
    for name in ("ant", "bee"):
        (root / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "bee" / "linked").symlink_to(tmp_path / "disk" / "extra")
    source, theirs = open_labelled("set", str(root), "image"), ImageFolder(root)
    assert isinstance(source, FileSource)
    mine = {str(item.path): item.meta["label"] for item in source.items}
    assert mine == dict(theirs.samples) and len(mine) == 4


# --- what systems leave behind -----------------------------------------------------------------


def test_clutter_is_skipped(tmp_path: Path) -> None:
    root = made(tmp_path / "set", "ant/1.jpg", "bee/2.jpg")
    clutter = ("._1.jpg", "ant/._1.jpg", "@eaDir/1.jpg", "ant/@eaDir/1.jpg/thumb.jpg")
    made(root, *clutter, "__MACOSX/ant/1.jpg", "__MACOSX/1.jpg", "bee/.DS_Store", ".Trashes/1.jpg")
    assert names_in(root) == ["ant/1.jpg", "bee/2.jpg"]
    source = open_labelled("set", str(root), "image")
    assert source.classes == ("ant", "bee") and labels_of(source).tolist() == [0, 1]
    report = pack(root, tmp_path / "out", PackConfig())
    assert (report.samples, report.classes, report.unread) == (2, 2, ())


# --- endings -----------------------------------------------------------------------------------

ENDINGS = (
    *[
        "jfif",
        "jpe",
        "tga",
        "ppm",
        "j2k",
        "dng",
        "cr2",
        "psd",
        "ts",
        "m2ts",
        "vob",
        "m2v",
        "3g2",
        "asf",
    ],
    *[
        "heic",
        "jp2",
        "svg",
        "wmv",
        "flv",
        "mts",
        "nef",
        "arw",
        "webm",
        "mpg",
        "mpe",
        "qt",
        "JPG",
        "Mp4",
        "pgm",
        "m4v",
        "hdr",
        "exr",
        "mxf",
    ],
)


def test_every_media_file_is_used_or_counted(tmp_path: Path) -> None:
    film = clip()
    root = made(tmp_path / "in", *(f"{number}.{e}" for number, e in enumerate(ENDINGS)))
    for number, ending in enumerate(ENDINGS):
        if ending.lower() in ("webm", "mpg", "mpe", "qt", "mp4", "m4v"):
            (root / f"{number}.{ending}").write_bytes(film)
    report = pack(root, tmp_path / "out", PackConfig())
    assert report.samples + sum(report.skipped.values()) == len(ENDINGS) and not report.unread
    assert report.skipped.keys() == {"unsupported ending"}
    index = index_shard(tmp_path / "out" / "00000.tar")
    read = [json.loads(index.read(n)["json"])["original_name"] for n in range(len(index))]
    used = {name.partition(".")[2] for name in read}
    assert used == {"jfif", "jpe", "JPG", "webm", "mpg", "mpe", "qt", "Mp4", "m4v"}
    assert set(index.extensions) == {"jpg", "json", "m4v", "mov", "mp4", "mpg", "webm"}
    opened = open_data(str(root), Request("s", "image"))
    assert isinstance(opened, FileSource) and len(opened) + opened.others == len(ENDINGS)
    assert len(opened) == 3 and all(opened.read(*place)["jpg"] for place in opened.places())


def test_an_evaluation_says_which_files_it_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = made(tmp_path / "set", "ant/1.jpg", "bee/2.jpg")
    assert len(open_labelled("eval.knn.test", str(root), "image")) == 2 and not caplog.text
    made(root, "ant/3.heic", "bee/4.mp4", "ant/5.heic", "stray.jpg")
    assert len(open_labelled("eval.knn.test", str(root), "image")) == 2
    assert f"eval.knn.test={root}: not used as image: 2 .heic, 1 .mp4, 1 .jpg (e.g. " in caplog.text


def test_files_that_no_row_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = made(tmp_path / "set", "a.jpg", "b.jpg", "c.gif")
    (root / "metadata.csv").write_text("file_name,text\na.jpg,x\n")
    assert len(open_data(str(root), Request("s"))) == 1
    assert f"{root}: no row of its metadata names 1 .jpg, 1 .gif (e.g. b.jpg)" in caplog.text


def test_a_folder_of_clips_beside_pictures_is_no_class(tmp_path: Path) -> None:
    root = made(tmp_path / "in", "a.jpg", "clips/1.mp4", "clips/2.mp4")
    assert not any(item.meta for item in list_folder(str(root), TableKeys()))
    made(root, "ant/1.jpg", "bee/2.jpg")
    labels = {
        item.name: item.meta.get("label_name") for item in list_folder(str(root), TableKeys())
    }
    assert labels == {
        "a.jpg": None,
        "clips/1.mp4": None,
        "clips/2.mp4": None,
        "ant/1.jpg": "ant",
        "bee/2.jpg": "bee",
    }
    made(root, "run/1.mp4", "swim/1.mp4")  # folders that divide the clips are their classes
    assert {
        i.meta.get("label_name") for i in list_folder(str(root), TableKeys()) if i.name[-1] == "4"
    } == {*("clips", "run", "swim")}


# --- labels ------------------------------------------------------------------------------------


def labelled(folder: Path, facts: list[dict[str, object]]) -> Source:
    files: dict[str, bytes] = {}
    for number, own in enumerate(facts):
        files |= {f"{number}.jpg": photo(number), f"{number}.json": json.dumps(own).encode()}
    folder.mkdir()
    write_tar(folder / "0.tar", files)
    return open_labelled("set", str(folder), "image")


def test_whole_floats_are_class_numbers(tmp_path: Path) -> None:
    made(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    rows = [("a.jpg", 1.0), ("b.jpg", 0.0), ("c.jpg", 12.0)]
    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{n},{i}\n" for n, i in rows))
    lines = [json.dumps({"path": name, "label": number}) for name, number in rows]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    for name in ("l.csv", "l.jsonl"):
        source = open_labelled("set", str(tmp_path / name), "image")
        assert labels_of(source).tolist() == [1, 0, 12] and source.classes == ()
    shards = labelled(tmp_path / "shards", [{"label": number} for _, number in rows])
    assert labels_of(shards).tolist() == [1, 0, 12]
    halves = labelled(tmp_path / "halves", [{"label": 0.5}, {"label": 1.5}])
    with pytest.raises(DataError, match=r"2 of 2 have none: .* a whole number from 0 or a name"):
        check_labels(labels_of(halves), "set")


def test_the_first_sample_need_not_have_a_label(tmp_path: Path) -> None:
    names = labelled(tmp_path / "names", [{}, {"label": None}, {"label": "bee"}, {"label": "ant"}])
    assert names.classes == ("ant", "bee") and labels_of(names).tolist() == [-1, -1, 1, 0]
    numbers = labelled(tmp_path / "numbers", [{"caption": "x"}, {"label": 3}, {"label": 2}])
    assert numbers.classes == () and labels_of(numbers).tolist() == [-1, 3, 2]
    with pytest.raises(DataError, match="the class of 2 is a number, and others have names"):
        labelled(tmp_path / "mixed", [{}, {"label": "ant"}, {"label": 1}])


# --- tables ------------------------------------------------------------------------------------


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_of(path: Path, rows: list[dict[str, object]], rows_of_group: int = 2) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=rows_of_group)
    return path


def test_pictures_inside_a_parquet_are_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = [png("red"), photo(1), photo(2), png("blue"), photo(4)]
    paths = ["cat.png", None, "same.jpg", "same.jpg", ""]
    rows = [
        {
            "image": {"bytes": body, "path": path},
            "label": n % 2,
            "mask": b"\xff\xd8",
            "text": str(n),
        }
        for n, (body, path) in enumerate(zip(bodies, paths, strict=True))
    ]
    table = parquet_of(tmp_path / "train.parquet", rows)
    report = pack(table, tmp_path / "out", PackConfig(per_shard=3))
    assert (report.samples, report.shards, report.skipped) == (5, 2, {})
    assert "train.parquet: columns of bytes are left out: mask" in caplog.text
    found = []
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        index = index_shard(tar)
        found += [index.read(member) for member in range(len(index))]
    assert [files.get("png") or files.get("jpg") for files in found] == bodies
    metas = [json.loads(files["json"]) for files in found]
    names = ["1/cat.png", "2.jpg", "3/same.jpg", "4/same.jpg", "5.jpg"]
    assert [meta["original_name"] for meta in metas] == [f"train.parquet/{name}" for name in names]
    assert all(b"xff" not in files["json"] for files in found)
    assert [files["txt"].decode() for files in found] == list("01234")
    source = open_labelled("set", str(table), "image")
    assert labels_of(source).tolist() == [0, 1, 0, 1, 0]
    read = [source.read(*place) for place in source.places()]
    assert [files.get("png") or files.get("jpg") for files in read] == bodies
    assert captions_of(read[3]) == ["3"]
    config = DataConfig()
    checked = check(str(table), make_cache(config), config, 1)
    assert not checked.broken and checked.shards[0].images.usable == 5


def test_other_columns_of_files(tmp_path: Path) -> None:
    made(tmp_path, "a.jpg")
    plain = parquet_of(tmp_path / "plain.parquet", [{"image": png("red"), "n": 1}])
    assert [item.name for item in list_files(str(plain))] == ["plain.parquet/1.png"]
    assert list_files(str(plain))[0].read() == png("red")
    named = parquet_of(tmp_path / "named.parquet", [{"img": {"bytes": photo(3)}, "n": 1}])
    assert list_files(str(named))[0].read() == photo(3)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    cells = arrow.array([{"bytes": None, "path": "a.jpg"}], kind)
    parquet.write_table(arrow.table({"image": cells}), tmp_path / "paths.parquet")
    (only,) = list_files(str(tmp_path / "paths.parquet"))
    assert only.path == tmp_path / "a.jpg" and only.read() == photo(0)
    rows: list[dict[str, object]]
    rows = [{"image": {"bytes": photo(1), "path": "1.jpg"}}, {"image": None}]
    first, empty = list_files(str(parquet_of(tmp_path / "null.parquet", rows)))
    assert first.read() == photo(1)
    with pytest.raises(BadSample, match="missing file: row 2: the cell is empty"):
        empty.read()
    nothing = parquet_of(tmp_path / "none.parquet", [{"mask": b"x", "n": 1}])
    with pytest.raises(DataError, match=r"no column of files: its columns are n:"):
        list_files(str(nothing))
    rows = [{"file_name": "a.jpg", "label": 1.0}, {"file_name": "a.jpg", "label": float("nan")}]
    metas = [i.meta["label"] for i in list_files(str(parquet_of(tmp_path / "f.parquet", rows)))]
    assert metas == [1, None]


@pytest.mark.parametrize("delimiter", [";", "\t", ","])
def test_the_delimiter_of_a_csv_is_found(tmp_path: Path, delimiter: str) -> None:
    made(tmp_path, "a.jpg")
    lines = (delimiter.join(cells) for cells in (["File", "caption"], ["a.jpg", '"x; y, z\t!"']))
    (tmp_path / "l.csv").write_text("\n".join(lines))
    (item,) = list_files(str(tmp_path / "l.csv"))
    assert item.name == "a.jpg" and item.describe()[0] == ["x; y, z\t!"]
    (tmp_path / "l.csv").write_text(f"picture{delimiter}caption\na{delimiter}x\n")
    with pytest.raises(DataError, match=r"no column of files: its columns are picture, caption"):
        list_files(str(tmp_path / "l.csv"))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    import csv

    made(tmp_path, "a.jpg")
    text, limit = "long " * 40_000, csv.field_size_limit()
    (tmp_path / "l.csv").write_text(f'path,caption\na.jpg,"{text}"\n')
    assert list_files(str(tmp_path / "l.csv"))[0].describe()[0] == [text.strip()]
    assert csv.field_size_limit() == limit


# --- two processes -----------------------------------------------------------------------------


def test_a_second_packing_into_a_folder_is_refused(tmp_path: Path) -> None:
    root, out = made(tmp_path / "in", *(f"{n}.jpg" for n in range(6))), tmp_path / "out"
    other = made(tmp_path / "other", "x.jpg")
    code = "import sys; from xray.commands.main import app; app(['data', 'pack', *sys.argv[1:]])"
    seen: list[subprocess.CompletedProcess[str]] = []

    def second(done: int, total: int) -> None:
        if seen or not done:  # at the first shard
            return
        (out / ".packing.00099.tar.1").write_bytes(b"half")  # as of a worker of this packing
        for source in (other, root):
            command = [sys.executable, "-c", code, str(source), str(out)]
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            seen.append(run)
        assert (out / ".packing.00099.tar.1").is_file()

    report = pack(root, out, PackConfig(per_shard=2, workers=1), second)
    assert report.samples == 6 and report.shards == 3 and not (out / "lock").exists()
    for run in seen:
        assert run.returncode == 2 and f"{out} is written to by another process" in run.stderr
    assert len(seen) == 2 and not (out / "00099.tar").exists()
    pack(root, out, PackConfig(per_shard=2))  # it is free again
    with pytest.raises(ConfigError, match="contains another packing"):
        pack(other, out, PackConfig(per_shard=2))


def test_the_command_says_so_too(tmp_path: Path) -> None:
    root = made(tmp_path / "in", "a.jpg", "b.dng")
    told = invoke("data", "pack", root, tmp_path / "out").output
    assert "left out: unsupported ending: 1; listed in" in told
