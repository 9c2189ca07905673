"""Crops, choice of frames, augmentation, captions and mixup."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shards import photo

from data_pipelines.decode import transforms
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.transforms import augment, choose_frames, load_image, load_pixels
from data_pipelines.shards.source import Sample, open_source
from data_pipelines.text.captions import captions_of, choose_captions, read_captions
from xray.config import DataConfig
from xray.errors import BadSample
from xray.models.mixup import mix


def sample(files: dict[str, bytes], modality: str, size: int = 16, frames: int = 4) -> Sample:
    """Make a sample with these files."""
    return Sample(files, "s", modality, "k", size, frames)  # type: ignore[arg-type]


def test_pixels_have_the_stated_shape_and_are_seeded(demo: Path) -> None:
    data = DataConfig(color_jitter=[0.4, 0.4, 0.4, 0.1], rand_augment=[2, 9], erase=0.5)
    for name, modality, frames in (("photos", "image", 1), ("clips", "video", 4)):
        files = open_source(name, name, modality, str(demo)).read(0, 0)  # type: ignore[arg-type]
        state = torch.get_rng_state()
        a, b, c = (
            load_pixels(sample(files, modality), data, np.random.default_rng(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(torch.get_rng_state(), state)  # torch's generator is not changed
        assert a.shape == (frames, 3, 16, 16) and a.dtype == torch.uint8
        assert torch.equal(a, b) and not torch.equal(a, c)
        still = load_pixels(sample(files, modality), data, None)
        assert torch.equal(still, load_pixels(sample(files, modality), data, None))


@pytest.mark.parametrize(
    "setting",
    [
        {"flip": True},
        {"color_jitter": [0.4, 0.4, 0.4, 0.1]},
        {"rand_augment": [2, 15]},
        {"erase": 1.0},
    ],
)
def test_augmentation_is_the_same_for_all_frames(setting: dict[str, object]) -> None:
    data = dataclasses.replace(DataConfig(flip=False), **setting)  # type: ignore[arg-type]
    frame = torch.from_numpy(np.array(decode_image(photo(3, (32, 32))))).permute(2, 0, 1)
    changed = 0
    for seed in range(8):
        result = augment(frame.expand(5, 3, 32, 32), data, np.random.default_rng(seed))
        assert all(torch.equal(other, result[0]) for other in result[1:])
        changed += not torch.equal(result[0], frame)
    assert changed >= 2
    plain = augment(frame[None], DataConfig(flip=False), np.random.default_rng(0))
    assert torch.equal(plain[0], frame)


def test_the_centre_crop_of_an_image() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    assert transforms.center_crop(60, 20) == (20, 0, 20, 20)
    middle = load_image(buffer.getvalue(), transforms.center_crop, 10)
    # the outer columns are mixed with black by the resize
    assert middle.shape == (1, 3, 10, 10) and (middle[..., 1:-1] == 255).all()


@pytest.mark.parametrize("size", [224, 96, 40])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_every_jpeg_decoder_gives_the_same_image(size: int, orientation: int) -> None:
    """torchvision at full size, Pillow at a DCT scale, EXIF rotations: against plain Pillow."""
    source = Image.open(io.BytesIO(photo(5, (400, 300), 95)))
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    source.save(buffer, format="JPEG", quality=95, exif=exif)
    upright = decode_image(buffer.getvalue())
    box = (40, 20, 200, 240)
    loaded = load_image(buffer.getvalue(), lambda width, height: box, size)
    left, top, w, h = box
    region = (left, top, left + w, top + h)
    expected = upright.resize((size, size), Image.Resampling.BICUBIC, box=region)
    difference = loaded[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)
    assert np.abs(difference).mean() < 2.5


def test_frames_are_chosen_as_configured() -> None:
    rng = np.random.default_rng(0)

    def picked(data: DataConfig, frames: int, total: int = 40, seeded: bool = True) -> np.ndarray:
        return choose_frames(frames, data, rng if seeded else None).indices(total, 10.0)

    data = DataConfig()
    assert picked(data, 4, seeded=False).tolist() == [5, 15, 25, 35]
    assert picked(data, 4, 1, seeded=False).tolist() == [0, 0, 0, 0]
    for _ in range(50):
        assert [p // 10 for p in picked(data, 4)] == [0, 1, 2, 3]

    strided = DataConfig(frame_sampling="strided", frame_rate=5.0)
    assert picked(strided, 4, seeded=False).tolist() == [16, 18, 20, 22]
    starts = set()
    for _ in range(200):
        indices = picked(strided, 4)
        assert np.diff(indices).tolist() == [2, 2, 2] and indices[-1] < 40
        starts.add(int(indices[0]))
    assert len(starts) > 20
    assert picked(strided, 4, 5).tolist() == [0, 2, 4, 4]

    segment = DataConfig(frame_sampling="segment", segment_seconds=1.0)
    for _ in range(200):
        indices = picked(segment, 5)
        assert (np.diff(indices) >= 0).all() and indices[-1] - indices[0] <= 10
    assert picked(segment, 5, seeded=False).tolist() == [16, 18, 20, 22, 24]


def test_captions() -> None:
    files = {"json": b'{"captions": ["A dog .", " "]}'}
    assert captions_of(files) == ["A dog ."]
    assert captions_of({"json": b'{"captions": [" "], "caption": "A cat"}'}) == ["A cat"]
    numeric = {"json": b'{"caption": 5}'}
    with pytest.raises(BadSample, match="broken caption"):
        captions_of(numeric)
    with pytest.raises(BadSample, match="no caption"):
        captions_of({"txt": b"  "})
    with pytest.raises(BadSample, match="broken json"):
        captions_of({"json": b"{"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"hashtags": ["#Dog", "beach", 2024]}', ["Dog beach 2024"]),
        ('{"hashtags": "#dog  \uff03beach #"}', ["dog beach"]),
        ('{"hashtags": "#dog, #beach#sea"}', ["dog beach sea"]),
        ('{"hashtags": ["new  york", null, [], 2024, "#"]}', ["new york 2024"]),
        ('{"hashtags": ["dog"], "caption": "A cat"}', ["A cat", "dog"]),
        ('{"hashtags": [], "caption": "A cat"}', ["A cat"]),
        ('{"hashtags": null, "caption": "A cat"}', ["A cat"]),
    ],
)
def test_tags_are_joined_to_a_caption(content: str, expected: list[str]) -> None:
    fields = {"caption": 1.0, "joined(hashtags)": 1.0}
    assert captions_of({"json": content.encode()}, fields) == expected
    nested = {"json": b'{"post": ' + content.encode() + b"}"}
    assert captions_of(nested, {"post.caption": 1, "joined(post.hashtags)": 1}) == expected


def test_broken_tags_are_not_joined() -> None:
    for content, cause in (
        (b'{"hashtags": {"dog": 1}}', "broken hashtags"),
        (b'{"hashtags": [["dog"]]}', "no caption"),
        (b"{}", "no caption"),
    ):
        with pytest.raises(BadSample, match=cause):
            captions_of({"json": content}, {"joined(hashtags)": 1})


def test_captions_are_drawn_by_weight() -> None:
    content = (
        '{"captions": ["a", "b"], "lang": "en", "synthetic": '
        '[{"text": "c", "weight": 3, "language": "de"}, "d"], "unused": "e"}'
    )
    files = {"json": content.encode(), "txt": b"t"}
    assert captions_of({"json": b'{"captions": ["a"], "curation": {"captions": ["b"]}}'}) == ["b"]
    assert captions_of({"json": b'{"captions": ["a"], "curation": "by hand"}'}) == ["a"]
    nested = {"json": b'{"a": {"b": {"c": "x"}, "b.d": "y"}}'}
    assert captions_of(nested, {"a.b.c": 1, "a.b.d": 1}) == ["x", "y"]
    captions = read_captions(files, {"captions": 1, "synthetic": 2, "missing": 9, "txt": 1})
    weights = {c.text: (c.weight, c.language) for c in captions}
    assert weights == {
        "a": (0.5, "en"),
        "b": (0.5, "en"),
        "c": (1.5, "de"),
        "d": (0.5, "en"),
        "t": (1.0, "en"),
    }
    rng = np.random.default_rng(0)
    drawn = [choose_captions(captions, rng)[0].text for _ in range(4000)]
    for text, (weight, _) in weights.items():
        assert drawn.count(text) / 4000 == pytest.approx(weight / 4, abs=0.03)
    assert choose_captions(captions, None)[0].text == "a"


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0.0), (0.0, 1.0)])
def test_mixing_keeps_the_stated_share(mixup: float, cutmix: float) -> None:
    """The pixels of sample i are all i, so the mean gives its share in the mixture."""
    pixels = torch.arange(4.0).reshape(4, 1, 1, 1, 1).expand(4, 2, 3, 20, 20)
    torch.manual_seed(0)
    shares = set()
    for _ in range(20):
        mixed, share = mix(pixels, mixup, cutmix)
        means = mixed.mean(dim=(1, 2, 3, 4))
        expected = share * torch.arange(4.0) + (1 - share) * torch.tensor([3.0, 0, 1, 2])
        assert torch.allclose(means, expected, atol=1e-5)
        assert torch.equal(mixed[:, 0], mixed[:, 1])  # all frames are mixed in the same way
        if cutmix:
            assert ((mixed == pixels) | (mixed == pixels.roll(1, 0))).all()
        shares.add(float(share))
    assert len(shares) > 10
