"""The Python API: features equal those of evaluation, mistakes raise errors of one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import xray
from data_pipelines.shards.source import open_source
from xray.artifacts import encoders
from xray.artifacts.encoders import Encoder, Tagger, VisionEncoder
from xray.artifacts.manifest_config import data_config
from xray.errors import ArtifactError, ConfigError, DataError
from xray.evaluation import feature_extraction
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.feature_extraction import extract


@pytest.fixture(scope="module")
def clip(control: Path) -> xray.Model:
    return xray.load(control, device="cpu")


@pytest.fixture(scope="module")
def hashtag(tagger: Path) -> xray.Model:
    return xray.load(tagger.parent)  # the folder of a run works too


def files_of(demo: Path, source: str, ending: str, folder: Path) -> list[Path]:
    """Write the media of a source's shards to files, in order."""
    opened = open_source("s", source, "image" if ending == "jpg" else "video", str(demo))
    paths = []
    for number, (shard, member) in enumerate(opened.places()):
        paths.append(folder / f"{number}.{ending}")
        paths[-1].write_bytes(opened.read(shard, member, (ending,))[ending])
    return paths


def test_import_is_lazy_and_unknown_names_are_refused() -> None:
    code = (
        "import sys, xray\n"
        "assert not {'torch', 'timm', 'transformers', 'PIL'} & set(sys.modules)\n"
        "xray.load; assert 'torch' in sys.modules\n"
        "try: xray.loud\n"
        "except AttributeError as error: assert 'loud' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dir_shows_the_api_and_nothing_else() -> None:
    assert dir(xray) == ["Model", "__version__", "load"]
    assert all(getattr(xray, name) for name in dir(xray))


@pytest.mark.parametrize(("source", "ending"), [("heldout", "jpg"), ("clips", "mp4")])
def test_features_equal_those_of_evaluation(
    clip: xray.Model, hashtag: xray.Model, demo: Path, tmp_path: Path, source: str, ending: str
) -> None:
    paths = files_of(demo, source, ending, tmp_path)
    modality: Any = "image" if ending == "jpg" else "video"
    for model in (clip, hashtag):
        encoder = model.encoder
        assert isinstance(encoder, VisionEncoder)
        encode = encoder.encode_pixels if isinstance(encoder, Encoder) else encoder.features
        opened = open_source("s", source, modality, str(demo))
        expected = extract(opened, encode, data_config(model.artifact), batch_size=8).rows
        ask = model.encode_image if modality == "image" else model.encode_video
        features = ask([str(path) for path in paths], batch_size=8)
        assert torch.equal(features, expected) and features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(paths)))
        pixels = torch.stack([model.preprocess(path) for path in paths[:8]])
        assert torch.equal(ask(pixels), expected[:8])


def photograph(folder: Path, kind: str) -> Path:
    """Write a photo larger than the model's input, of a kind that decoders treat differently."""
    ramp = np.linspace(0, 255, 200 * 320 * 3).reshape(200, 320, 3)
    picture = Image.fromarray((ramp + 20 * np.sin(ramp)).clip(0, 255).astype(np.uint8))
    if kind == "png":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(folder / "a.png")
        return folder / "a.png"
    exif = Image.Exif()
    exif[274] = 6 if kind == "turned" else 1
    picture.convert("L" if kind == "gray" else "RGB").save(folder / "a.jpg", exif=exif, quality=95)
    return folder / "a.jpg"


@pytest.mark.parametrize("kind", ["jpg", "turned", "gray", "png"])
def test_an_image_opened_by_pillow_equals_its_file(
    clip: xray.Model, tmp_path: Path, kind: str
) -> None:
    path = photograph(tmp_path, kind)
    expected = clip.preprocess(path)
    assert expected.shape == (3, 32, 32) and expected.dtype == torch.uint8
    opened = Image.open(path)
    assert torch.equal(clip.preprocess(opened), expected)
    opened.load()  # preprocessing did not change the image
    ImageOps.exif_transpose(opened).save(tmp_path / "whole.png")
    assert torch.equal(clip.preprocess(opened), clip.preprocess(tmp_path / "whole.png"))
    image = clip.encode_image([opened.convert("RGB"), str(path)])
    assert image.shape == (2, 16)


def test_texts_are_encoded_like_the_text_tower(clip: xray.Model) -> None:
    texts = ["a red circle", "a blue square", "a green star on white"]
    features = clip.encode_text(texts)
    encoder: Any = clip.encoder
    with torch.no_grad():
        tokens = encoder.tokenizer(texts)
        expected = encoder.text(**tokens) @ encoder.text_adapter.weight.t()
    torch.testing.assert_close(features, F.normalize(expected, dim=-1))
    torch.testing.assert_close(clip.encode_text(texts[1]), features[1:2])


def test_texts_of_many_lengths_are_encoded_with_little_padding(
    clip: xray.Model, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are sorted before they are batched. Rows are in the given order, in both callers."""
    encoder: Any = clip.encoder
    monkeypatch.setattr(encoders, "TEXTS", 4)
    monkeypatch.setattr(feature_extraction, "TEXTS", 4)
    texts = ["red " * n for n in (1, 9, 2, 1, 1, 9, 3, 1, 9, 2, 1, 9)]
    alone = torch.cat([encoder.encode_text([text]) for text in texts])
    shapes: list[tuple[int, ...]] = []
    watched = encoder.text.register_forward_pre_hook(
        lambda tower, _, tokens: shapes.append(tuple(tokens["input_ids"].shape)), with_kwargs=True
    )
    rows = clip.encode_text(texts)
    of_evaluation = Sets(encoder, EvalConfig(), str(demo), 0).encode_texts(texts)
    watched.remove()
    torch.testing.assert_close(rows, alone)
    torch.testing.assert_close(of_evaluation, alone)
    lengths = sorted(encoder.tokenizer.lengths(texts), reverse=True)
    assert shapes == 2 * [(4, lengths[0]), (4, lengths[4]), (4, lengths[8])]
    assert lengths[0] > lengths[4] > lengths[8]


def test_the_caller_can_set_the_keep_rate(tagger: Path, media: Path) -> None:
    usual, whole = xray.load(tagger), xray.load(tagger, keep_rate=1.0)
    encoder: Any = usual.encoder
    assert encoder.keep_rate == 0.7
    picture = media / "photo.jpg"
    a, b = usual.encode_image(picture), whole.encode_image(picture)
    assert not torch.equal(a, b)
    encoder.keep_rate = 1.0
    assert torch.equal(usual.encode_image(picture), b)


def test_tags_of_a_head_are_ranked(hashtag: xray.Model, media: Path) -> None:
    paths = [media / "photo.jpg", media / "clip.mp4", media / "other.jpg"]
    tagged = hashtag.tag(paths, top=len(hashtag.tags))
    assert isinstance(hashtag.encoder, Tagger)
    for path, row in zip(paths, tagged, strict=True):
        pixels = hashtag.preprocess(path)
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        expected = hashtag.encoder.probabilities(pixels[None])[0]
        values = [value for _, value in row]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        for name, value in row:
            assert value == pytest.approx(expected[hashtag.tags.index(name)].item(), abs=1e-6)
    assert [len(row) for row in hashtag.tag(paths[0], top=2)] == [2]
    pixels = [hashtag.preprocess(path) for path in paths]
    assert hashtag.tag(pixels, top=len(hashtag.tags)) == tagged


def test_tags_by_prompts_have_softmax_probabilities(clip: xray.Model, media: Path) -> None:
    names, picture = ["red circle", "blue square", "green star"], media / "photo.jpg"
    (tagged,) = clip.tag(picture, tags=names, template="the {} of today")
    image = clip.encode_image(picture)[0]
    texts = clip.encode_text([f"the {name} of today" for name in names])
    head = clip.artifact.load("head")["logit_scale"].exp()
    expected = dict(zip(names, (head * texts @ image).softmax(0).tolist(), strict=True))
    assert dict(tagged) == pytest.approx(expected, abs=1e-5)
    assert [name for name, _ in tagged] == sorted(expected, key=lambda n: -expected[n])


def test_an_artifact_is_loaded_from_a_url(
    control: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory = fsspec.filesystem("memory")
    memory.put(str(control), "/api/clip", recursive=True)
    model = xray.load("memory://api/clip")
    picture = media / "photo.jpg"
    assert torch.equal(model.encode_image(picture), xray.load(control).encode_image(picture))
    assert "memory://" in repr(model)


MISTAKES: list[tuple[type[Exception], str, Callable[[xray.Model, xray.Model, Path], object]]] = [
    (ArtifactError, "hashtag: encode_text needs a clip", lambda c, h, m: h.encode_text("a")),
    (ArtifactError, "tags needs a hashtag artifact", lambda c, h, m: c.tags),
    (ConfigError, "tags=\\[...\\]", lambda c, h, m: c.tag(m / "photo.jpg")),
    (ConfigError, "has fixed tags", lambda c, h, m: h.tag(m / "photo.jpg", tags=["a"])),
    (ConfigError, "needs {} in", lambda c, h, m: c.tag(m / "photo.jpg", ["a"], template="a")),
    (ConfigError, "top=0", lambda c, h, m: h.tag(m / "photo.jpg", top=0)),
    (ConfigError, "batch_size=0", lambda c, h, m: h.encode_image(m / "photo.jpg", batch_size=0)),
    (DataError, "give .tensor. for", lambda c, h, m: h.tag(h.preprocess(m / "clip.mp4"))),
    (DataError, "no pixels", lambda c, h, m: c.encode_image(Image.new("RGB", (0, 3)))),
    (DataError, "is a clip: use encode_video", lambda c, h, m: c.encode_image(m / "clip.mp4")),
    (DataError, "not a clip: use encode_image", lambda c, h, m: c.encode_video([m / "photo.jpg"])),
    (DataError, "no such file", lambda c, h, m: c.encode_image("gone.jpg")),
    (DataError, "neither an image nor a video", lambda c, h, m: c.encode_image("a.txt")),
    (DataError, "uint8 pixels from", lambda c, h, m: c.encode_image(torch.ones(3, 32, 32))),
    (DataError, "was given a int", lambda c, h, m: c.encode_image(3)),  # type: ignore[arg-type]
    (DataError, "was given nothing", lambda c, h, m: c.encode_image([])),
    (DataError, "at least one", lambda c, h, m: c.encode_text([])),
    (ConfigError, "device='tpu'", lambda c, h, m: xray.load(c.artifact.path, device="tpu")),
    (ConfigError, "keep rates", lambda c, h, m: xray.load(c.artifact.path, keep_rate=0.0)),
    (ConfigError, "must be numbers", lambda c, h, m: xray.load(c.artifact.path, keep_rate="0.5")),  # type: ignore[arg-type]
    (ArtifactError, "is not an artifact", lambda c, h, m: xray.load(m)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "words", "ask"), MISTAKES, ids=[words for _, words, _ in MISTAKES]
)
def test_a_mistake_raises_a_typed_error_of_one_line(
    kind: type[Exception], words: str, ask: Callable[..., object],
    clip: xray.Model, hashtag: xray.Model, media: Path,
) -> None:  # fmt: skip
    with pytest.raises(kind, match=words) as caught:
        ask(clip, hashtag, media)
    assert "\n" not in str(caught.value)


def test_a_broken_image_is_named(clip: xray.Model, media: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes((media / "photo.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match=r"broken\.jpg: undecodable image"):
        clip.encode_image([str(broken)])


def test_tag_names_may_come_from_a_generator(clip: xray.Model, media: Path) -> None:
    names = ["a", "b"]
    once = clip.tag(media / "photo.jpg", (name for name in names))
    assert once == clip.tag(media / "photo.jpg", names) and len(once[0]) == 2
    assert clip.encode_text(["\ud800"]).shape == (1, 16)
