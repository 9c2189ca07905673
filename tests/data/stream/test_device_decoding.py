"""The stream with JPEGs that a device decodes: the samples, draws and replacements of the loader's.

The device is the CPU, on which torchvision decodes with libjpeg.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shards import photo, write_tar
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipelines.decode import device, transforms
from data_pipelines.shards.source import Sample, Source, open_source
from data_pipelines.stream import sampling
from data_pipelines.stream.loaded import Loaded
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.sampling import SamplePlan, StepSampler, StepShape, micro_batches
from xray.config import BlockConfig, DataConfig
from xray.errors import BadSample, DataError

CPU = torch.device("cpu")
DATA = DataConfig(crop_scale=[0.5, 1.0], color_jitter=[0.2, 0.2, 0.2, 0.0])
BROKEN = {"004": b"<html>", "011": b"", "017": photo(17)[:400]}  # their cause is in the header ...
PLANTED = "022"  # ... in the pixels, which the device is first to see ...
REFUSED = "31"  # ... or in what the transform reads besides, after the image
STEPS = range(6)


def broken_tables(media: bytes) -> bytes:
    """Break the Huffman tables of a JPEG, whose header and end stay as they are."""
    content = bytearray(media)
    place = content.index(b"\xff\xc4")
    content[place + 5 : place + 20] = b"\xff" * 15
    return bytes(content)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """40 images: photos of several sizes, every seventh a PNG, and five that cannot be used."""
    files = {}
    for number in range(40):
        key, media = f"{number:03d}", photo(number, (60 + number, 90 - number))
        if number % 7 == 6:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(media)).save(buffer, format="PNG")
            files[f"{key}.png"] = buffer.getvalue()
        else:
            media = broken_tables(media) if key == PLANTED else BROKEN.get(key, media)
            files[f"{key}.jpg"] = media
        files[f"{key}.txt"] = b"x" * (1 + number % 5)
    for shard in range(2):
        part = sorted(files)[shard * 40 : shard * 40 + 40]
        write_tar(tmp_path / f"{shard}.tar", {name: files[name] for name in part})
    return open_source("s", str(tmp_path), "image")


@pytest.fixture
def poor(tmp_path: Path) -> Source:
    """80 images, of which half cannot be used for three reasons; so stand-ins are often broken."""
    files = {}
    for number, kind in enumerate(np.random.default_rng(0).permutation(80) % 6):
        key, media = f"{number:03d}", photo(number)
        if kind == 0:
            media = b"<html>"
        elif kind == 1:
            media = broken_tables(media)
        elif kind == 2:
            key = f"{number:03d}{REFUSED}"
        elif kind == 3:
            buffer = io.BytesIO()
            Image.open(io.BytesIO(media)).save(buffer, format="PNG")
            media = buffer.getvalue()
        files[f"{key}.{'png' if kind == 3 else 'jpg'}"] = media
        files[f"{key}.txt"] = b"x" * (1 + number % 5)
    write_tar(tmp_path / "poor.tar", files)
    return open_source("s", str(tmp_path / "poor.tar"), "image")


def transform(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
    """Load the image, then read the caption, then draw: as stages do."""
    pixels = transforms.load_pixels(sample, DATA, rng)
    if sample.key.endswith(REFUSED):
        raise BadSample("no caption")
    return {
        "pixels": pixels,
        "key": torch.tensor(int(sample.key[:3])),
        "caption": torch.ones(len(sample.files["txt"]), dtype=torch.long),
        "noise": torch.tensor(-1.0 if rng is None else rng.random()),
    }


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("pixels", "key", "noise")}
    return {**batch, "caption": pad_sequence([row["caption"] for row in rows], True, 0)}


def read(
    source: Source,
    decoder: torch.device | None,
    workers: int = 0,
    seed: int | None = 1,
    views: int = 1,
    steps: range = STEPS,
) -> list[Loaded]:
    """Read steps of 12 samples in micro-batches of 6."""
    block = BlockConfig("s", 12)
    shape = StepShape(48, 1, micro_batches([block], [6], 0, 1))
    plans = {"s": SamplePlan(source, 2, 2, seed=0)}
    sampler = StepSampler([block], plans, lambda step: shape, steps, views=views)
    stream = iterate_steps(sampler, transform, collate, seed, workers, False, decoder)  # type: ignore[arg-type]
    return [item for step in stream for item in step]


def assert_like_the_loader(ours: list[Loaded], loader: list[Loaded]) -> None:
    """Compare samples, draws and replacements exactly, and pixels to 2 grey levels of a resize.

    A batch may be padded to the length of a sample that was replaced.
    """
    for one, other in zip(ours, loader, strict=True):
        assert one.bad == other.bad and not one.pictures
        assert one.batch.keys() == other.batch.keys()
        for key in ("key", "noise"):
            assert torch.equal(one.batch[key], other.batch[key]), key
        longest = other.batch["caption"].shape[1]
        assert torch.equal(one.batch["caption"][:, :longest], other.batch["caption"])
        assert not one.batch["caption"][:, longest:].any()
        difference = (one.batch["pixels"].int() - other.batch["pixels"].int()).abs()
        assert difference.max() <= 4 and difference.float().mean() < 0.05  # after the colours


def counted(items: list[Loaded], name: str) -> int:
    return sum(item.reading.get(name, (0, 0.0))[0] for item in items)


def test_chains_of_replacements_are_the_loaders(poor: Source) -> None:
    """A row may go through each kind of failure before its image is for the device, or a PNG."""
    ours, loader = (read(poor, decoder, steps=range(12)) for decoder in (CPU, None))
    assert_like_the_loader(ours, loader)
    assert sum(len(item.bad) for item in ours) > 100
    assert counted(ours, "device") > 10 and counted(ours, "fallback") > 10


@pytest.mark.parametrize("seed", [1, None])
def test_samples_draws_and_replacements_are_the_loaders(source: Source, seed: int | None) -> None:
    loader = read(source, None, seed=seed)
    ours = read(source, CPU, seed=seed)
    assert_like_the_loader(ours, loader)
    replaced = {entry.key for item in ours for entry in item.bad}
    assert replaced == {*BROKEN, PLANTED, f"0{REFUSED}"}
    pngs = sum((item.batch["key"] % 7 == 6).sum() for item in ours)
    # One more was loaded again: the stand-in of an image that the device could not decode.
    planted = sum(entry.key == PLANTED for item in ours for entry in item.bad)
    assert planted >= 1 and pngs >= 5
    assert counted(ours, "fallback") in range(int(pngs), int(pngs) + planted + 1)
    assert counted(ours, "device") + counted(ours, "fallback") == 6 * 12
    assert counted(loader, "device") == counted(loader, "fallback") == 0


def test_the_pixels_do_not_depend_on_workers_or_parts(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the step at which a run was resumed."""
    whole = read(source, CPU)
    for workers, part in ((0, 2), (2, 64), (2, 1)):
        monkeypatch.setattr(sampling, "PART", part)
        cut = read(source, CPU, workers, steps=STEPS[2:])
        for one, other in zip(cut, whole[4:], strict=True):
            assert one.bad == other.bad and one.batch.keys() == other.batch.keys()
            assert all(torch.equal(one.batch[key], other.batch[key]) for key in one.batch)
        assert counted(cut, "device") == counted(whole[4:], "device")


def test_views_are_the_loaders(source: Source) -> None:
    ours, loader = (read(source, decoder, views=3) for decoder in (CPU, None))
    assert_like_the_loader(ours, loader)
    pixels = torch.cat([item.batch["pixels"] for item in ours[:2]])
    assert len(pixels.flatten(1).unique(dim=0)) == 12


def test_a_jpeg_that_only_the_device_cannot_decode_is_loaded_again(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample stays, with the pixels of the loader, and counts as a fallback."""
    loader, before = read(source, None), read(source, CPU)
    honest = device.decode_jpeg

    def fail(data: list[Tensor], *how: object, **more: object) -> list[Tensor]:
        if any(bytes(each.numpy()).startswith(photo(9, (69, 81))[:200]) for each in data):
            raise RuntimeError("Unsupported JPEG")
        return honest(data, *how, **more)

    monkeypatch.setattr(device, "decode_jpeg", fail)
    ours = read(source, CPU)
    assert_like_the_loader(ours, loader)
    chosen = [(item.batch["key"] == 9).nonzero() for item in ours]
    times = sum(len(rows) for rows in chosen)
    assert times and counted(ours, "fallback") == counted(before, "fallback") + times
    for item, other, rows in zip(ours, loader, chosen, strict=True):
        assert torch.equal(item.batch["pixels"][rows], other.batch["pixels"][rows])


def test_an_error_of_reading_a_sample_again_is_a_data_error(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        monkeypatch.setattr(Source, "read", lose)
        raise RuntimeError("Unsupported JPEG")

    def lose(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(device, "decode_jpeg", fail)
    with pytest.raises(DataError, match="the disk is gone"):
        read(source, CPU)


def test_clips_are_decoded_by_the_workers(demo: Path) -> None:
    clips = open_source("clips", "clips", "video", str(demo))
    block = BlockConfig("clips", 4)
    shape = StepShape(16, 2, micro_batches([block], [0], 0, 1))
    streams = []
    for decoder in (None, CPU):
        plans = {"clips": SamplePlan(clips, 2, 2, seed=0)}
        sampler = StepSampler([block], plans, lambda step: shape, range(2))

        def load(sample: Sample, rng: np.random.Generator | None) -> dict[str, Tensor]:
            return {"pixels": transforms.load_pixels(sample, DATA, rng)}

        def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {"pixels": torch.stack([row["pixels"] for row in rows])}

        stream = iterate_steps(sampler, load, stack, 1, 0, False, decoder)  # type: ignore[arg-type]
        streams.append([item for step in stream for item in step])
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one.batch["pixels"], other.batch["pixels"])
        assert not one.reading.keys() & {"device", "fallback"}
