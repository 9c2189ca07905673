"""Images of kept tokens and MAE reconstructions, and the command that draws them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import invoke
from PIL import Image

from data_pipelines.shards.tar_index import index_shard
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_decoder
from xray.artifacts.manifest_config import decoder_config
from xray.visualize.explain import SIDE, kept_tokens, reconstructions


@pytest.fixture(scope="module")
def mae(trained: Callable[..., Path]) -> Artifact:
    return open_artifact(trained("mae", "train.samples=24"))


@pytest.fixture(scope="module")
def hashtag(tagger: Path) -> Artifact:
    return open_artifact(tagger)


@pytest.fixture(scope="module")
def files(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Paths of two photos and a clip, taken from the demo's shards."""
    folder, paths = tmp_path_factory.mktemp("media"), []
    for source, ending, count in (("photos", "jpg", 2), ("clips", "mp4", 1)):
        shard = index_shard(next((demo / source).glob("*.tar")))
        for member in range(count):
            path = folder / f"{source}{member}.{ending}"
            path.write_bytes(shard.read(member, (ending,))[ending])
            paths.append(str(path))
    return paths


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape, dtype=torch.uint8)


def same_patches(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compare two batches [B, 3, 32, 32] patch by patch (8 px) -> bool [B, 16]."""
    equal = (a.round() == b.round()).all(1).float()
    return torch.nn.functional.avg_pool2d(equal[:, None], 8).flatten(1) == 1


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize(
    ("reduction", "fuse"),
    [("evit", True), ("evit", False), ("random", True), ("random", False), ("tome", True)],
)
def test_kept_tokens_are_bright(hashtag: Artifact, reduction: str, fuse: bool, frames: int) -> None:
    encoder = VisionEncoder(hashtag)
    encoder.vision.reduction, encoder.vision.fuse = reduction, fuse
    encoder.choose(0.6)
    sheet = kept_tokens(encoder, noise(3, frames, 3, 32, 32))
    tokens = 16 * max(1, frames // 2)
    counts = [encoder.vision.token_counts(tokens, 0.6)[at] for at in encoder.vision.reduce_at]
    assert sheet.rows == [f"input\n{tokens} tokens"] + [
        f"block {at}\n{left} tokens"
        for at, left in zip(encoder.vision.reduce_at, counts, strict=True)
    ]
    for cells, left in zip(sheet.cells[1:], counts, strict=True):
        bright = same_patches(cells, sheet.cells[0]).reshape(3, tokens).sum(1)
        if reduction == "tome":  # merged tokens show their mean
            assert (bright < left).all()
        elif not fuse:
            assert (bright == left).all()
        else:  # except the fused token, if it was kept with others
            assert (bright <= left - 1).all() and (bright >= left - 3).all()


def test_visible_patches_are_shown_unchanged(mae: Artifact) -> None:
    pixels = noise(2, 4, 3, 32, 32)
    encoder = VisionEncoder(mae)
    decoder, options = restore_decoder(mae, encoder.vision), decoder_config(mae)
    masked, filled, original = reconstructions(encoder, decoder, options, pixels).cells
    assert torch.equal(original.round().byte(), pixels[:, ::2].flatten(0, 1))
    seen = same_patches(masked, original)
    assert (seen.sum(1) == 2).all()  # 90 % of the 16 tubes are masked
    assert torch.equal(same_patches(filled, original), seen)
    hidden = masked.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3).permute(0, 2, 1, 3, 4)[~seen]
    assert (hidden == 128).all()


def test_the_command_writes_an_image_and_a_page(
    mae: Artifact, hashtag: Artifact, files: list[str], tmp_path: Path
) -> None:
    done = invoke("show", str(hashtag.path), *files, "--out", str(tmp_path / "kept.png"))
    assert done.exit_code == 0, done.stderr
    drawn = np.array(Image.open(tmp_path / "kept.png"))
    assert drawn.shape[0] > 8 * SIDE * 0.8 and len(np.unique(drawn)) > 100
    page = tmp_path / "mae.html"
    done = invoke("show", str(mae.path), *files, "--out", str(page), "--keep-rate", "0.5")
    assert done.exit_code == 0, done.stderr
    text = page.read_text()
    # Two kinds of image, each for the photos and for the clip.
    assert text.count("data:image/png;base64,") == 4
    assert "MAE reconstructions, clip" in text and "keep rate 0.5" in text


def test_mistakes_give_an_error_of_one_line(
    mae: Artifact, files: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(files[0]).read_bytes()[:300])
    full = str(mae.path)
    cases = {
        "no such file": [full, "missing.jpg"],
        f"{tmp_path} is a folder: name images": [full, str(tmp_path)],
        "broken.jpg: undecodable image": [full, str(broken)],
        "must end in one of .jpg": [full, __file__],
        "must end in .png or .html": [full, files[0], "--out", "x.gif"],
        "is not an artifact": ["nowhere", files[0]],
    }
    for message, arguments in cases.items():
        done = invoke("show", *arguments)
        assert done.exit_code == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
