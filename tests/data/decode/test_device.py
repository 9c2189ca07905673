"""JPEGs decoded as a GPU decodes them, on the CPU: against the loader's own decoding."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shards import photo
from torch import Tensor
from torchvision.transforms import v2

from data_pipelines.decode import device
from data_pipelines.decode.device import PendingJpeg, Pictures, cannot_decode, decode
from data_pipelines.decode.transforms import load_pixels, random_crop
from data_pipelines.shards.source import Sample, open_source
from xray.config import DataConfig
from xray.errors import BadSample

CPU = torch.device("cpu")
PLAIN = DataConfig(crop_scale=[0.4, 1.0])


def sample(media: bytes, side: int = 48, extension: str = "jpg") -> Sample:
    return Sample({extension: media}, "s", "image", "k", side, 1)


def pending(
    one: Sample, data: DataConfig, rng: np.random.Generator | None
) -> tuple[dict[str, Tensor], PendingJpeg]:
    """Load a sample whose image the device may decode."""
    image = PendingJpeg()
    return {"pixels": load_pixels(replace(one, deferred=image), data, rng)}, image


def both(
    samples: Sequence[Sample], data: DataConfig = PLAIN, seeded: bool = True
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the pixels [B, 3, S, S] of the loader and of the device, and its failures."""
    generators = [
        [np.random.default_rng(i) if seeded else None for i, _ in enumerate(samples)]
        for _ in range(2)
    ]
    expected = [load_pixels(s, data, rng) for s, rng in zip(samples, generators[0], strict=True)]
    loaded = [pending(s, data, rng) for s, rng in zip(samples, generators[1], strict=True)]
    for one, other in zip(*generators, strict=True):  # what a stage draws afterwards is equal
        assert (one and one.bit_generator.state) == (other and other.bit_generator.state)
    rows = [row for row, _ in loaded]
    part = Pictures.taken_from(rows, [image for _, image in loaded])
    empty = torch.stack([row["pixels"] for row in rows])
    assert empty.is_meta and empty.shape == torch.stack(expected).shape
    pixels, failed = decode([part], empty, CPU)
    return torch.cat(expected), pixels[:, 0], failed


def assert_close(one: Tensor, other: Tensor, mean: float = 0.02, most: int = 2) -> None:
    difference = (one.int() - other.int()).abs()
    assert difference.float().mean() < mean and difference.max() <= most


@pytest.mark.parametrize("side", [72, 112, 224])
def test_real_photos_have_the_pixels_of_the_loader(shared_data: Path, side: int) -> None:
    """Crops that the loader does not decode at a smaller scale, with flips."""
    for name in ("captions_val", "classes_val/val"):
        source = open_source("s", str(shared_data / name), "image")
        places = list(source.places())[:100]
        loader, decoded, failed = both([source.sample(*place, side, 1) for place in places])
        assert not failed
        assert_close(loader, decoded)


def test_a_validation_has_the_centre_crop() -> None:
    loader, decoded, _ = both([sample(photo(1, (90, 70)))], seeded=False)
    assert_close(loader, decoded)


@pytest.mark.parametrize(
    "setting", [{"color_jitter": [0.4, 0.4, 0.4, 0.1]}, {"rand_augment": [2, 9]}, {"erase": 1.0}]
)
def test_augmentation_has_the_same_draws(setting: dict[str, list[float]]) -> None:
    """Some operations of RandAugment amplify a difference of one grey level."""
    data = replace(PLAIN, **setting)  # type: ignore[arg-type]
    loader, decoded, _ = both([sample(photo(seed, (70, 60))) for seed in range(24)], data)
    plain, _, _ = both([sample(photo(seed, (70, 60))) for seed in range(24)])
    assert (plain != loader).flatten(1).any(dim=1).sum() > 12
    difference = (loader.int() - decoded.int()).abs().float().mean(dim=(1, 2, 3))
    assert difference.median() < 0.1 and difference.max() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo(5, (80, 60)))).save(buffer, format="JPEG", exif=exif)
    loader, decoded, _ = both([sample(buffer.getvalue()) for _ in range(6)])
    assert_close(loader, decoded)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "JPEG", **options})  # type: ignore[arg-type]
    return buffer.getvalue()


def without_segment(media: bytes, marker: bytes) -> bytes:
    """Remove a segment of a JPEG."""
    place = media.index(marker)
    return media[:place] + media[place + 2 + int.from_bytes(media[place + 2 : place + 4], "big") :]


def test_gray_and_progressive_jpegs_are_for_the_device() -> None:
    image = Image.open(io.BytesIO(photo(5, (80, 60))))
    for media in (encoded(image.convert("L")), encoded(image, progressive=True, subsampling=0)):
        _, pending_jpeg = pending(sample(media), PLAIN, None)
        assert pending_jpeg.jpeg is not None
        loader, decoded, _ = both([sample(media)])
        assert_close(loader, decoded)


def test_other_images_are_decoded_by_the_worker() -> None:
    """PNG, CMYK, colours that are not YCbCr, and a JPEG whose end is missing or not at the end."""
    image = Image.open(io.BytesIO(photo(5, (80, 60))))
    others = {
        "png": encoded(image, format="PNG"),
        "cmyk": encoded(image.convert("CMYK")),
        "rgb": (rgb := encoded(image, keep_rgb=True, subsampling=0)),
        "rgb by its components": without_segment(rgb, b"\xff\xee"),
        "trailer": encoded(image) + b"more",
    }
    whole = sample(encoded(image))
    for name, media in others.items():
        one = sample(media, extension="png" if name == "png" else "jpg")
        row, pending_jpeg = pending(one, PLAIN, np.random.default_rng(0))
        assert pending_jpeg.jpeg is None and not row["pixels"].is_meta, name
        loader, decoded, failed = both([whole, one, whole, one, one])
        assert not failed
        assert torch.equal(loader[[1, 3, 4]], decoded[[1, 3, 4]])
        assert_close(loader, decoded)
    with pytest.raises(BadSample, match="undecodable image"):
        pending(sample(encoded(image)[:-300]), PLAIN, None)


def test_a_jpeg_that_the_device_cannot_decode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that fails is repeated for each image; a wrong size is a failure, too."""
    good, bad, odd = photo(1), bytearray(photo(2)), photo(3, (40, 48))
    place = bad.index(b"\xff\xc4")  # the Huffman tables
    bad[place + 5 : place + 20] = b"\xff" * 15
    samples = [sample(media) for media in (good, bytes(bad), odd, good)]
    rows, images = zip(*(pending(one, PLAIN, None) for one in samples), strict=True)
    empty = torch.stack([row["pixels"] for row in rows])
    pixels, failed = decode([Pictures.taken_from(list(rows), images)], empty, CPU)
    assert failed == [1]
    assert torch.equal(pixels[0], pixels[3])
    assert_close(pixels[2], load_pixels(samples[2], PLAIN, None))
    honest = device.decode_jpeg

    def smaller(data: list[Tensor], *how: object, **more: object) -> list[Tensor]:
        decoded = honest(data, *how, **more)
        return [x[:, :-1] if x.shape[1] == 48 and x.shape[2] == 40 else x for x in decoded]

    monkeypatch.setattr(device, "decode_jpeg", smaller)
    _, failed = decode([Pictures.taken_from(list(rows), images)], empty, CPU)
    assert failed == [1, 2]


def test_lack_of_memory_is_no_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "decode_jpeg", fail)
    with pytest.raises(torch.OutOfMemoryError):
        both([sample(photo(1))])


def test_the_pixels_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(64, 48), (48, 64), (200, 150), (60, 200), (31, 30), (400, 300)]
    samples = [sample(photo(seed, sizes[seed % 6])) for seed in range(18)]
    _, whole, _ = both(samples)
    chunks: list[int] = []
    honest = device._cropped_and_resized
    monkeypatch.setattr(
        device, "_cropped_and_resized", lambda *a: chunks.append(len(a[1])) or honest(*a)
    )
    monkeypatch.setattr(device, "CHUNK", 60_000)
    _, cut, _ = both(samples)
    assert torch.equal(whole, cut) and len(chunks) > 4 and sum(chunks) == 18
    assert max(chunks) > 1


def test_views_share_the_bytes_and_the_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = sample(photo(1)), sample(photo(2))
    loaded = [pending(s, PLAIN, np.random.default_rng(i)) for i, s in enumerate([one, one, other])]
    rows = [row for row, _ in loaded]
    part = Pictures.taken_from(rows, [image for _, image in loaded])
    assert len(part.data) == len(one.files["jpg"]) + len(other.files["jpg"])
    counts: list[int] = []
    honest = device.decode_jpeg
    monkeypatch.setattr(
        device,
        "decode_jpeg",
        lambda data, *a, **k: counts.append(len(data)) or honest(data, *a, **k),
    )
    pixels, _ = decode([part], torch.stack([row["pixels"] for row in rows]), CPU)
    assert counts == [2]
    for number, view in enumerate([one, one, other]):
        assert_close(pixels[number], load_pixels(view, PLAIN, np.random.default_rng(number)))


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (48, 48), (47, 49), (13, 7), (301, 2000)])
def test_the_resize_is_torchvisions(size: tuple[int, int]) -> None:
    """Random pixels of any size, enlarged and reduced, with and without a flip."""
    width, height = size
    noise = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    expected = v2.functional.resize(noise, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)
    rng = np.random.default_rng(0)
    left, top, w, h = random_crop(width, height, [0.4, 1.0], rng)
    cropped = v2.functional.resize(
        noise[:, top : top + h, left : left + w],
        [48, 48], v2.InterpolationMode.BICUBIC, antialias=True,
    )  # fmt: skip
    policy = ((0.0,) * 4, (0, 9), 0.0)
    flipped = device.Augmentation(True, policy, None)
    jobs = [
        device._Job(0, (0, 0), noise, device.Jpeg(size, 1, (0, 0, width, height), 48, None)),
        device._Job(1, (0, 0), noise, device.Jpeg(size, 1, (left, top, w, h), 48, flipped)),
    ]
    whole, crop = device._cropped_and_resized([noise, noise], jobs)
    assert_close(whole, expected, mean=0.06, most=2)
    assert_close(crop.flip(-1), cropped, mean=0.06, most=2)


def test_real_files_with_unusual_content(shared_data: Path) -> None:
    """Each file has the pixels of the loader, or its error."""
    outcomes = {"device": 0, "loader": 0, "bad": 0}
    for row in csv.DictReader((shared_data / "awkward" / "MANIFEST.csv").open()):
        path = shared_data / "awkward" / row["file"]
        if not row["file"].startswith("images/") or path.suffix not in (".jpg", ".png", ".webp"):
            continue
        one = sample(path.read_bytes(), 640, path.suffix[1:])  # no DCT scale is small enough
        try:
            expected = load_pixels(one, PLAIN, None)
        except BadSample as error:
            outcomes["bad"] += 1
            try:
                fields, image = pending(one, PLAIN, None)
            except BadSample as again:
                assert again.cause == error.cause
                continue
            part = Pictures.taken_from([fields], [image])
            assert decode([part], fields["pixels"][None], CPU)[1] == [0], row["file"]
            continue
        fields, image = pending(one, PLAIN, None)
        outcomes["loader" if image.jpeg is None else "device"] += 1
        part = Pictures.taken_from([fields], [image])
        pixels, failed = decode([part], fields["pixels"][None], CPU)
        assert not failed, row["file"]
        assert_close(pixels[0], expected)
    assert outcomes["device"] >= 8 and outcomes["loader"] >= 15 and outcomes["bad"] >= 4, outcomes


def test_a_cpu_is_no_decoder_for_users() -> None:
    assert cannot_decode(CPU) == "training runs on the CPU"
