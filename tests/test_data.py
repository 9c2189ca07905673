"""Shards, decoding, transforms, tags and captions, on files made here."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines import decode, hashtags, transforms
from data_pipelines import demo as demo_data
from data_pipelines.captions import captions_of
from data_pipelines.decode import BadSample
from data_pipelines.shards import Sample, find_shards, index_shard, open_source
from xray.config import DataConfig
from xray.errors import DataError


def jpeg(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format="JPEG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_index_reads_what_is_in_the_tar(tmp_path: Path) -> None:
    files = {"a.jpg": jpeg(), "a.txt": b"one", "b.c.jpg": b"x", "b.txt": b"two"}
    path = write_tar(tmp_path / "0.tar", files)
    for _ in range(2):  # built, then from its cache
        index = index_shard(path)
        assert index.keys.tolist() == ["a", "b"]
        assert index.read(0) == {"jpg": files["a.jpg"], "txt": b"one"}
        assert index.read(1) == {"c.jpg": b"x", "txt": b"two"}
    assert (tmp_path / "0.tar.index.npz").is_file()
    write_tar(path, {"z.jpg": jpeg(), "z.txt": b"three"})
    assert index_shard(path).keys.tolist() == ["z"]  # rebuilt when the tar changes


def test_a_read_only_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = write_tar(folder / "0.tar", {"a.jpg": jpeg()})
    folder.chmod(0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(index_shard(path)) == 1
    assert [p.name for p in folder.iterdir()] == ["0.tar"]
    folder.chmod(0o755)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.tar does not exist"):
        open_source("s", "missing.tar", "image", str(tmp_path))
    with pytest.raises(DataError, match=r"no \.tar shards"):
        find_shards("*.tar", str(tmp_path))
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.tar is empty"):
        index_shard(empty)
    whole = write_tar(tmp_path / "cut.tar", {f"{i}.jpg": jpeg() for i in range(20)})
    whole.write_bytes(whole.read_bytes()[:9000])
    with pytest.raises(DataError, match=r"cut.tar is truncated"):
        index_shard(whole)
    write_tar(tmp_path / "text.tar", {"a.txt": b"only text"})
    with pytest.raises(DataError, match="has no image files, only txt"):
        open_source("s", "text.tar", "image", str(tmp_path))


def test_find_shards(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"{i:05d}.tar", {"a.jpg": jpeg()})
    names = [p.name for p in find_shards(str(tmp_path))]
    assert names == ["00000.tar", "00001.tar", "00002.tar"]
    assert [p.name for p in find_shards("*1.tar", str(tmp_path))] == ["00001.tar"]
    assert [p.name for p in find_shards("{00000..00001}.tar", str(tmp_path))] == names[:2]


def test_image_modes_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "CMYK", "I;16", "1", "LA"):
        buffer = io.BytesIO()
        form = "JPEG" if mode == "CMYK" else "PNG"
        Image.new(mode, (8, 6)).save(buffer, format=form)
        image = decode.decode_image(buffer.getvalue())
        assert image.mode == "RGB" and image.size == (8, 6)
    with pytest.raises(BadSample, match="undecodable image"):
        decode.decode_image(jpeg()[:200])


def sample(files: dict[str, bytes], modality: str, size: int = 16, frames: int = 4) -> Sample:
    return Sample(files, "s", modality, "k", size, frames)


def test_pixels_have_the_stated_shape_and_are_seeded(demo: Path) -> None:
    data = DataConfig()
    for name, modality, frames in (("photos", "image", 1), ("clips", "video", 4)):
        source = open_source(name, name, modality, str(demo))
        files = source.shards[0].read(0)
        a, b, c = (
            transforms.load_pixels(sample(files, modality), data, np.random.default_rng(seed))
            for seed in (1, 1, 2)
        )
        assert a.shape == (frames, 3, 16, 16) and a.dtype == torch.uint8
        assert torch.equal(a, b) and not torch.equal(a, c)
        still = transforms.load_pixels(sample(files, modality), data, None)
        assert torch.equal(still, transforms.load_pixels(sample(files, modality), data, None))


def test_center_crop_is_the_middle_of_the_picture() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    image = Image.fromarray(pixels)
    box = transforms.center_crop(*image.size)
    assert box == (20, 0, 20, 20)
    assert (transforms.resize_image(image, box, 10)[..., 1:-1] == 255).all()  # but for the seams


def test_frames_are_spread_over_the_clip() -> None:
    assert transforms.pick_frames(8, 4, None).tolist() == [1, 3, 5, 7]
    assert transforms.pick_frames(1, 4, None).tolist() == [0, 0, 0, 0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        picked = transforms.pick_frames(30, 3, rng)
        assert [p // 10 for p in picked] == [0, 1, 2]


def test_decord_and_pyav_agree() -> None:
    scene = demo_data.Scene("red", "star", "white", "large", "in the middle", "up")
    data = demo_data._clip(scene, demo_data.DemoConfig(side=64), np.random.default_rng(0))
    pick = lambda total: np.array([0, 3, total - 1])  # noqa: E731
    first, second = decode._decode_decord(data, pick), decode._decode_av(data, pick)
    assert first.shape == second.shape
    assert np.abs(first.astype(int) - second.astype(int)).max() <= 2


def test_captions_and_tags() -> None:
    files = {"json": '{"captions": ["A dog .", " "], "hashtags": ["#Dog", "ﬁsh", "#dog"]}'.encode()}
    assert captions_of(files) == ["A dog ."]
    assert hashtags.tags_of(files, "hashtags") == ["dog", "fish"]
    assert hashtags.tags_of({"txt": b"Two dogs run on the grass"}, "caption_words") == [
        "dogs",
        "run",
        "grass",
    ]
    spaced = {"json": b'{"hashtags": "#cat #dog", "caption": 5}'}
    assert hashtags.tags_of(spaced, "hashtags") == ["cat", "dog"]
    with pytest.raises(BadSample, match="broken caption"):
        captions_of(spaced)
    with pytest.raises(BadSample, match="no caption"):
        captions_of({"txt": b"  "})
    with pytest.raises(BadSample, match="broken json"):
        captions_of({"json": b"{"})


def test_vocabulary_counts_and_keeps_tagged(demo: Path, tmp_path: Path) -> None:
    source = open_source("photos", "photos", "image", str(demo))
    tags = hashtags.read_tags(source, "hashtags")
    vocabulary = hashtags.build_vocabulary({"photos": tags}, min_count=2, max_size=5)
    flat = [tag for rows in tags for row in rows for tag in row]
    assert vocabulary.counts == tuple(flat.count(tag) for tag in vocabulary.tags)
    assert list(vocabulary.counts) == sorted(vocabulary.counts, reverse=True)
    only = hashtags.Vocabulary(("circle",), (1,))
    kept = hashtags.keep_tagged(source, tags, only)
    assert len(kept) == flat.count("circle") and kept.digest != source.digest
    vocabulary.save(tmp_path / "v.json")
    assert hashtags.Vocabulary.load(tmp_path / "v.json") == vocabulary
    with pytest.raises(DataError, match="no tag occurs 999 times"):
        hashtags.build_vocabulary({"photos": tags}, 999, 5)


def test_awkward_real_files(shared_data: Path) -> None:
    """What the manifest says decodes, decodes; what it says is broken is a BadSample."""
    for row in csv.DictReader((shared_data / "awkward" / "MANIFEST.csv").open()):
        path = shared_data / "awkward" / row["file"]
        content = path.read_bytes()
        try:
            if row["file"].startswith("images/"):
                decode.decode_image(content)
            else:
                decode.decode_clip(content, lambda total: transforms.pick_frames(total, 4, None))
            outcome = "decodes"
        except BadSample:
            outcome = "rejected"
        if row["expected"] in ("decodes", "rejected"):
            assert outcome == row["expected"], row["file"]
