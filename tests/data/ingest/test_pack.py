"""`pack`: a user's files as shards, on pictures and clips made here."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import film
from PIL import Image

from data_pipelines.decode.decoders import open_clip, read_clip
from data_pipelines.ingest.pack import PackConfig, PackReport, pack
from data_pipelines.ingest.recode import pack_clip, pack_picture
from data_pipelines.ingest.user_data import list_files
from data_pipelines.shards.tar_index import index_shard
from xray.errors import BadSample, ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
Samples = dict[str, dict[str, bytes]]


def picture(
    size: tuple[int, int] = (40, 20), form: str = "JPEG", seed: int = 0, **save: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (2, 2, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, form, **save)
    return buffer.getvalue()


@functools.cache
def clip(
    size: tuple[int, int] = (64, 48),
    times: tuple[int, ...] = tuple(range(0, 1200, 100)),
    form: str = "mp4",
    full_range: bool = False,
    sound: bool = False,
) -> bytes:
    """Twelve frames; each has its number as brightness, and a white upper left corner."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream("libx264", rate=10, options={"g": "250"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if full_range else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if full_range:
            stream.codec_context.color_range = 2
        if sound:
            container.mux(tone(container.add_stream("aac", rate=8000)))
        for number, milliseconds in enumerate(times):
            pixels = np.full((size[1], size[0], 3), 40 + 12 * number, np.uint8)
            pixels[: size[1] // 3, : size[0] // 3] = 255
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def tone(stream: Any) -> list[Any]:
    samples = np.zeros((1, 8000), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate = 8000
    return [*stream.encode(frame), *stream.encode()]


def frames_of(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def packed(source: Path, out: Path, **settings: int) -> tuple[PackReport, Samples]:
    report = pack(source, out, PackConfig(**settings))
    return report, samples_of(out)


def samples_of(out: Path) -> Samples:
    found = {}
    for path in sorted(out.glob("*.tar")):
        index = index_shard(path)
        found |= {str(key): index.read(i) for i, key in enumerate(index.keys)}
    return found


def meta_of(files: dict[str, bytes]) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(files["json"])
    return meta


def tree(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}


def skipped_in(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "pack_skipped.jsonl").read_text().splitlines()]


# --- inputs ------------------------------------------------------------------------------------


def test_a_folder_with_sidecars(tmp_path: Path) -> None:
    photo, odd, film = picture(), picture(seed=1), clip()
    source = write(
        tmp_path / "in",
        {
            "b/photo.v2.JPEG": photo,
            "b/photo.v2.txt": "\ufeffa cat\n\n  two cats \n",
            "b/photo.v2.json": json.dumps({"width": 7, "key": "mine", "tags": ["x"]}),
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
        "width": 7,  # the user's
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


# --- pictures ----------------------------------------------------------------------------------


def test_large_pictures_are_shrunk() -> None:
    data, ending, facts = pack_picture(picture((300, 200)), "jpeg", 100, 92)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size, ending) == ("JPEG", (150, 100), "jpeg")
    assert facts == {"width": 150, "height": 100}
    data, ending, _ = pack_picture(picture((300, 200), "PNG"), "png", 100, 92)
    assert (Image.open(io.BytesIO(data)).format, ending) == ("JPEG", "jpg")
    rough, _, _ = pack_picture(picture((300, 200)), "jpg", 100, 10)
    assert len(rough) < len(data)


def test_pictures_that_are_small_enough_keep_their_bytes() -> None:
    for form in ("JPEG", "PNG", "WEBP"):
        data = picture((300, 100), form)
        assert pack_picture(data, "x", 100, 92)[:2] == (data, "x")
        assert pack_picture(data, "x", 0, 92)[:2] == (data, "x")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (50, 50), color) for color in ("red", "green", "blue")]
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    assert pack_picture(moving.getvalue(), "gif", 20, 92)[0] == moving.getvalue()
    assert pack_picture(picture((50, 50), "GIF"), "gif", 20, 92)[1] == "jpg"


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (200, 100), "black")
    image.paste("white", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright: the corner goes to the right
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    data, _, facts = pack_picture(buffer.getvalue(), "jpg", 50, 92)
    upright = Image.open(io.BytesIO(data))
    assert upright.size == (50, 100) and not upright.getexif()
    assert facts == {"width": 50, "height": 100}
    assert upright.getpixel((45, 5)) > (200,) * 3 and upright.getpixel((5, 5)) < (50,) * 3
    kept, _, facts = pack_picture(buffer.getvalue(), "jpg", 0, 92)
    assert kept == buffer.getvalue() and facts == {"width": 100, "height": 200}


def test_alpha_and_depth_survive() -> None:
    image = Image.new("RGBA", (100, 60), (200, 10, 10, 0))
    image.paste((10, 200, 10, 255), (50, 0, 100, 60))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    data, ending, _ = pack_picture(buffer.getvalue(), "webp", 30, 92)
    small = Image.open(io.BytesIO(data))
    assert (small.format, small.mode, small.size, ending) == ("PNG", "RGBA", (50, 30), "png")
    assert small.getpixel((2, 15))[3] == 0 and small.getpixel((47, 15)) == (10, 200, 10, 255)
    deep = Image.fromarray(np.full((60, 100), 32768, np.uint16))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    data, _, _ = pack_picture(buffer.getvalue(), "png", 30, 92)
    assert abs(Image.open(io.BytesIO(data)).getpixel((5, 5))[0] - 128) < 3  # not cut off at 255


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.decode.image_limits.MAX_PIXELS", 799)
    with pytest.raises(BadSample, match="image too large: 40 x 20"):
        pack_picture(picture((40, 20)), "jpg", 0, 92)


# --- clips -------------------------------------------------------------------------------------


def numbers(data: bytes) -> list[int]:
    """Read the number that is encoded in each frame's brightness."""
    return [round((f.to_ndarray(format="gray")[-3, -3] - 16) / 219 * 255) for f in frames_of(data)]


def test_key_frames_are_where_they_are_asked_for(tmp_path: Path) -> None:
    source = clip(sound=True)
    assert [f.key_frame for f in frames_of(source)].count(True) == 1
    data, ending, facts = pack_clip(source, "mov", 0, gop=5, crf=20, folder=tmp_path)
    frames = frames_of(data)
    assert ending == "mp4" and data.index(b"moov") < data.index(b"mdat")
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 5, 10]
    assert [round(float(f.time), 3) for f in frames] == [i / 10 for i in range(12)]
    assert np.abs(np.subtract(numbers(data), numbers(source))).max() <= 3
    assert facts == {"width": 64, "height": 48, "num_frames": 12, "fps": 10.0, "duration": 1.2}
    with av.open(io.BytesIO(data)) as container:
        stream: Any = container.streams.video[0]
        assert [s.type for s in container.streams] == ["video"]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == 10
    again, _, _ = pack_clip(data, "mp4", 0, gop=3, crf=20, folder=tmp_path)
    keys = [i for i, frame in enumerate(frames_of(again)) if frame.key_frame]
    assert keys == [0, 3, 6, 9]  # and not where they were
    larger, _, _ = pack_clip(clip((256, 192)), "mp4", 0, 4, 40, tmp_path)
    assert b" threads=1 " in larger  # x264 notes it; on more threads the bytes would differ
    assert list(tmp_path.iterdir()) == []


def test_the_film_is_packed_and_not_its_cover(tmp_path: Path) -> None:
    assert pack_clip(film(cover=True), "mp4", 0, 0, 20, tmp_path)[2]["num_frames"] == 24
    data, _, facts = pack_clip(film(cover=True), "mp4", 0, gop=8, crf=20, folder=tmp_path)
    frames = frames_of(data)
    assert len(frames) == 24 and {(f.width, f.height) for f in frames} == {(384, 256)}
    assert (facts["width"], facts["height"], facts["num_frames"]) == (384, 256, 24)
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams) == 1
    with pytest.raises(BadSample, match="undecodable video: no video stream"):
        pack_clip(film(cover=True, frames=0), "mp4", 0, 0, 20, tmp_path)


@pytest.mark.parametrize(
    ("pixel", "turned", "size"),
    [
        (Fraction(4, 3), False, (512, 256)),
        (Fraction(1, 2), False, (384, 512)),
        (Fraction(4, 3), True, (256, 512)),
    ],
)
def test_packing_keeps_the_shape_of_clips_whose_pixels_are_not_square(
    pixel: Fraction, turned: bool, size: tuple[int, int], tmp_path: Path
) -> None:
    source = film(pixel, turned=turned)
    for short_side, gop, scale in ((0, 0, 1), (0, 8, 1), (min(size) // 2, 4, 2)):
        data, _, facts = pack_clip(source, "mp4", short_side, gop, 20, tmp_path)
        shape = size[0] // scale, size[1] // scale
        assert (facts["width"], facts["height"]) == shape
        (frame,) = read_clip(open_clip(data), data, np.array([3]))
        assert frame.shape[1::-1] == shape


def test_a_full_disk_is_not_the_clips_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipelines.ingest.recode._encode", fail)
    with pytest.raises(OSError, match="No space left"):
        pack_clip(clip(), "mp4", 0, 4, 20, tmp_path)


def test_a_clip_is_shrunk_to_even_sizes(tmp_path: Path) -> None:
    data, _, facts = pack_clip(clip((90, 50)), "mp4", 25, 0, 20, tmp_path)
    assert {(f.width, f.height) for f in frames_of(data)} == {(44, 24)}
    assert (facts["width"], facts["height"], facts["num_frames"]) == (44, 24, 12)
    small = clip((64, 48))
    assert pack_clip(small, "mov", 48, 0, 20, tmp_path)[:2] == (small, "mov")
    coarse, _, _ = pack_clip(small, "mov", 0, 4, 51, tmp_path)
    assert len(coarse) < len(pack_clip(small, "mov", 0, 4, 0, tmp_path)[0])


def test_a_variable_rate_is_kept(tmp_path: Path) -> None:
    times = (500, 540, 580, 700, 740, 1000, 1040, 1080, 1120, 1160, 1200, 1500)
    data, _, facts = pack_clip(clip(times=times, form="matroska"), "mkv", 0, 4, 20, tmp_path)
    shown = [round(1000 * float(frame.time)) for frame in frames_of(data)]
    assert shown == [t - times[0] for t in times]
    assert facts["num_frames"] == 12 and facts["duration"] >= 1.0


def test_full_range_is_not_washed_out(tmp_path: Path) -> None:
    source = clip(full_range=True)
    data, _, _ = pack_clip(source, "mp4", 0, 4, 5, tmp_path)
    before, after = (frames_of(d)[0].to_ndarray(format="rgb24") for d in (source, data))
    assert np.abs(before[[2, -3], [2, -3]].astype(int) - after[[2, -3], [2, -3]]).max() <= 4


def test_a_phones_rotation_is_applied(tmp_path: Path) -> None:
    data = bytearray(clip((64, 48)))
    matrix = data.index(b"tkhd") + 44
    turn = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = turn  # a quarter clockwise, as for a clip filmed upright
    _, _, facts = pack_clip(bytes(data), "mp4", 0, 0, 20, tmp_path)
    assert (facts["width"], facts["height"]) == (48, 64)
    upright, _, facts = pack_clip(bytes(data), "mp4", 24, 4, 20, tmp_path)
    assert (facts["width"], facts["height"], facts["num_frames"]) == (24, 32, 12)
    frame = frames_of(upright)[3]
    assert frame.rotation == 0
    pixels = frame.to_ndarray(format="gray")
    assert pixels.shape == (32, 24)
    corners = pixels[[2, 2, -3, -3], [2, -3, 2, -3]] > 200
    assert corners.tolist() == [False, True, False, False]  # upper left is upper right now


def test_a_clip_that_breaks_off(tmp_path: Path) -> None:
    data = clip((64, 48))
    noise = bytearray(data)
    start = data.index(b"mdat") + 4
    noise[start:] = bytes(len(data) - start)
    for broken in (data[:100], bytes(noise), picture(form="PNG")[:60]):
        with pytest.raises(BadSample) as caught:
            pack_clip(broken, "mp4", 0, 4, 20, tmp_path)
        assert caught.value.cause == "undecodable video"
    assert list(tmp_path.iterdir()) == []


# --- the folder --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures that take a while to shrink, two of them broken, and a clip."""
    files: dict[str, bytes | str] = {f"{i:02d}.jpg": picture((900, 800), seed=i) for i in range(35)}
    files |= {"03.jpg": b"", "20.jpg": b"x", "00.mp4": clip(), "07.txt": "seven"}
    return write(tmp_path_factory.mktemp("many"), files)


SETTINGS = {"per_shard": 3, "short_side": 40, "gop": 4}


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    seen: list[tuple[int, int]] = []
    report = pack(many, out, PackConfig(**SETTINGS, workers=1), lambda *now: seen.append(now))
    assert report == PackReport(12, 34, {"undecodable image": 2}, 0)
    assert seen == [(done, 36) for done in range(0, 37, 3)]
    return tree(out)


def test_the_same_input_gives_the_same_bytes(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pack(many, tmp_path / "out", PackConfig(**SETTINGS, workers=2))
    assert tree(tmp_path / "out") == whole
    first = samples_of(tmp_path / "out")
    assert list(first)[:4] == ["000000000", "000000001", "000000002", "000010000"]
    assert "000010001" not in first and first["000020002"]["txt"] == b"seven"


STOPPED = """
import os, signal, sys
from pathlib import Path
from data_pipelines.ingest.pack import PackConfig, pack

def stop(done, total):
    if done:
        {stop}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
pack(Path(sys.argv[1]), Path(sys.argv[2]), PackConfig({settings}, workers=2), stop)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_stopped_packing_goes_on(
    many: Path, whole: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    # Ctrl-C reaches the workers too; SIGKILL only the parent, whose workers must not stay behind:
    # they hold its output open, so run() would not come back.
    stop = "os.kill(os.getpid(), signal.SIGKILL)" if how == "SIGKILL" else "os.killpg(0, 2)"
    settings = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    script, out = STOPPED.format(stop=stop, settings=settings), tmp_path / "out"
    command = [sys.executable, "-c", script, str(many), str(out)]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "start_new_session": True}
    stopped = subprocess.run(command, **options)
    assert stopped.returncode == (-9 if how == "SIGKILL" else -2), stopped.stderr
    tars = list(out.glob("*.tar"))
    assert 0 < len(tars) < 12
    assert all(path.read_bytes() == whole[path.name] for path in tars)
    unfinished = list(out.glob(".packing.*"))
    if how == "SIGINT":
        assert not unfinished
    (out / ".packing.00011.tar.1").write_bytes(b"half")
    report = pack(many, out, PackConfig(**SETTINGS))
    assert report == PackReport(12, 34, {"undecodable image": 2}, len(tars))
    assert tree(out) == whole


def test_a_shard_that_is_gone_is_written_again(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = write(tmp_path / "out", dict(whole))
    (out / "00001.tar").unlink()
    report = pack(many, out, PackConfig(**SETTINGS))
    assert report == PackReport(12, 34, {"undecodable image": 2}, 11)
    assert tree(out) == whole


def test_a_killed_worker_is_reported(many: Path, tmp_path: Path) -> None:
    def kill_workers(done: int, total: int) -> None:
        for worker in multiprocessing.active_children() if done else ():
            worker.kill()

    with pytest.raises(DataError, match="a worker process was killed"):
        pack(many, tmp_path / "out", PackConfig(**SETTINGS), kill_workers)
    assert not list((tmp_path / "out").glob(".packing.*"))


def test_another_packing_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", {"a.jpg": picture(), "a.txt": "a"}), tmp_path / "out"
    pack(source, out, PackConfig())
    before = tree(out)
    with pytest.raises(ConfigError, match=r"another packing \(per_shard: 1000 -> 500, gop: 0 -> 8"):
        pack(source, out, PackConfig(per_shard=500, gop=8))
    assert pack(source, out, PackConfig(workers=1)).reused == 1
    (source / "a.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"another packing \(other files or metadata\)"):
        pack(source, out, PackConfig())
    assert tree(out) == before
    (out / "pack.json").unlink()
    with pytest.raises(
        ConfigError, match=r"contains \.tar files that xray data pack did not write"
    ):
        pack(source, out, PackConfig())


def test_the_stamp_sees_every_change(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.jpg": picture(), "l.jsonl": '{"path": "a.jpg", "x": 1}'})

    def stamps() -> str:
        return "".join(item.stamp() for item in list_files(str(source / "l.jsonl")))

    seen = [stamps()]
    (source / "l.jsonl").write_text('{"path": "a.jpg", "x": 2}')
    seen.append(stamps())
    os.utime(source / "a.jpg", ns=(0, time.time_ns() + 10**9))
    seen.append(stamps())
    (source / "a.jpg").unlink()
    assert len({*seen, stamps()}) == 4


def test_packing_does_without_torch() -> None:
    script = "import sys, data_pipelines.ingest.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
