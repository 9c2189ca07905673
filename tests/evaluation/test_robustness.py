"""Corruptions against their formulas, and attacks against classifiers with a known optimum."""

from __future__ import annotations

import colorsys
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from shards import photo
from tiny import train

from xray.artifacts.encoders import Encoder
from xray.errors import ArtifactError
from xray.evaluation import corruptions
from xray.evaluation.attacks import _margin, fgsm, pgd, square
from xray.evaluation.corruptions import CORRUPTIONS, corrupt, disc, stretch

FRAMES = torch.from_numpy(
    np.stack([np.array(Image.open(io.BytesIO(photo(i, (40, 40))))) for i in range(2)])
).permute(0, 3, 1, 2)


def corrupted(name: str, severity: int, pixels: torch.Tensor = FRAMES, seed: int = 0) -> np.ndarray:
    return corrupt(name, severity, pixels, np.random.default_rng(seed)).numpy()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_grow_with_severity_and_depend_on_the_seed(name: str) -> None:
    error = [np.abs(corrupted(name, s) - FRAMES.numpy().astype(float)).mean() for s in (1, 3, 5)]
    assert 0 < error[0] < error[1] < error[2]
    assert (corrupted(name, 3) == corrupted(name, 3)).all()
    random = name.endswith("noise")
    assert (corrupted(name, 3) == corrupted(name, 3, seed=1)).all() != random


def test_noise_has_the_published_strength() -> None:
    gray = torch.full((1, 3, 200, 200), 128, dtype=torch.uint8)
    x = 128 / 255
    for severity, sd in enumerate((0.08, 0.12, 0.18), start=1):
        assert corrupted("gaussian_noise", severity, gray).std() / 255 == pytest.approx(
            sd, rel=0.02
        )
    for severity, photons in ((1, 60), (2, 25)):
        spread = corrupted("shot_noise", severity, gray).std() / 255
        assert spread == pytest.approx((x / photons) ** 0.5, rel=0.02)
    for severity, share in ((1, 0.03), (5, 0.27)):
        changed = corrupted("impulse_noise", severity, gray)
        assert (changed == 0).mean() == pytest.approx(share / 2, rel=0.05)
        assert (changed == 255).mean() == pytest.approx(share / 2, rel=0.05)


def test_defocus_averages_over_a_disc() -> None:
    for radius, sigma in corruptions.DEFOCUS:
        assert disc(radius, sigma).sum() == pytest.approx(1)
    sharp = disc(3, 0.1)  # a Gaussian of .1 pixels changes nothing
    assert (sharp > 1e-9).sum() == 29 and sharp.max() == pytest.approx(1 / 29)
    soft = Image.fromarray((disc(6, 0.01) * 255 / disc(6, 0.01).max()).astype(np.uint8))
    blurred = np.asarray(soft.filter(ImageFilter.GaussianBlur(0.5)), float)
    assert np.corrcoef(blurred.ravel(), disc(6, 0.5).ravel())[0, 1] > 0.995
    x = FRAMES[:1].double().numpy() / 255
    changed = corruptions.defocus_blur(x, 1, np.random.default_rng(0))
    offsets = [(i, j) for i in range(-3, 4) for j in range(-3, 4) if i * i + j * j <= 9]
    for c, row, column in ((0, 12, 20), (2, 30, 9)):
        mean = np.mean([x[0, c, row + i, column + j] for i, j in offsets])
        assert changed[0, c, row, column] == pytest.approx(mean)


def test_brightness_and_contrast_follow_their_formulas() -> None:
    x = FRAMES.numpy() / 255
    bright = corrupted("brightness", 2) / 255
    for row, column in ((0, 0), (7, 31), (39, 20)):
        h, s, v = colorsys.rgb_to_hsv(*x[1, :, row, column])
        expected = colorsys.hsv_to_rgb(h, s, min(1, v + 0.2))
        assert bright[1, :, row, column] == pytest.approx(expected, abs=1.01 / 255)
    mean = x.mean(axis=(2, 3), keepdims=True)
    assert corrupted("contrast", 4) / 255 == pytest.approx((x - mean) * 0.1 + mean, abs=1.01 / 255)
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert (corrupted("brightness", 5, black) == 127).all()


def test_jpeg_and_pixelate_equal_pillow() -> None:
    frame = Image.fromarray(FRAMES[0].permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    frame.save(buffer, "JPEG", quality=10)
    assert (
        corrupted("jpeg_compression", 4)[0] == np.array(Image.open(buffer)).transpose(2, 0, 1)
    ).all()
    blocks = corrupted(
        "pixelate", 3, torch.arange(0, 240, 6, dtype=torch.uint8).expand(1, 3, 40, 40)
    )
    assert len(np.unique(blocks[0, 0, 0])) == 16  # 40 x .4


def test_aspect_stretches_the_centre() -> None:
    circle = (torch.cartesian_prod(torch.arange(-20, 20), torch.arange(-20, 20)) ** 2).sum(1) < 49
    pixels = 255 * circle.view(1, 1, 40, 40).expand(1, 3, 40, 40).byte()
    for ratio, (height, width) in ((2.0, (14, 28)), (0.5, (28, 14))):
        changed = stretch(ratio, pixels, np.random.default_rng(0))[0, 0] > 127
        assert changed.any(1).sum().item() == pytest.approx(height, abs=2)
        assert changed.any(0).sum().item() == pytest.approx(width, abs=2)


class Linear:
    """A classifier of two classes by w . x."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.w = torch.randn(3 * 8 * 8, generator=generator).double()
        self.x = 0.5 + 0.2 * (torch.rand(12, 1, 3, 8, 8, generator=generator).double() - 0.5)
        self.labels = (self(self.x)[:, 1] > 0).long()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        score = (x - 0.5).flatten(1) @ self.w
        return torch.stack([-score, score], dim=1)


def test_gradient_attacks_reach_the_optimum_of_a_linear_model() -> None:
    """Moving every pixel by eps against the sign of w lowers the margin by 2 eps |w|_1."""
    model, eps = Linear(), 0.01
    lowest = _margin(model(model.x), model.labels) - 2 * eps * model.w.abs().sum()
    one = fgsm(model, model.x, model.labels, eps)
    many = pgd(model, model.x, model.labels, eps, 5, torch.Generator().manual_seed(0))
    for changed in (one, many):
        assert (changed - model.x).abs().max() <= eps + 1e-12
        assert torch.allclose(_margin(model(changed), model.labels), lowest)


def test_the_black_box_lowers_margins_within_eps() -> None:
    model, eps = Linear(), 0.02
    generator = torch.Generator().manual_seed(0)
    changed = square(model, model.x, model.labels, eps, 200, generator)
    assert (changed - model.x).abs().max() <= eps + 1e-12
    clean, attacked = (_margin(model(x), model.labels) for x in (model.x, changed))
    assert (attacked < clean).all() and (attacked < 0).float().mean() > 0.5
    assert (attacked >= clean - 2 * eps * model.w.abs().sum() - 1e-9).all()


def test_the_black_box_does_not_change_misclassified_samples() -> None:
    model = Linear()
    wrong = 1 - model.labels
    changed = square(model, model.x, wrong, 0.1, 20, torch.Generator().manual_seed(0))
    assert torch.equal(changed, model.x)


def test_an_attack_without_a_gradient_is_refused() -> None:
    model = Linear()
    with pytest.raises(ArtifactError, match="no gradient reaches the pixels"):
        fgsm(lambda x: model(x.detach()), model.x, model.labels, 0.01)


def test_the_gradient_through_token_selection_equals_finite_differences(
    demo: Path, tmp_path: Path
) -> None:
    """With a trained clip artifact at keep rate 0.7; the input pixels are not changed."""
    encoder = Encoder(train("clip", demo, tmp_path / "clip", "train.samples=12")).double()
    assert encoder.keep_rate == 0.7
    torch.manual_seed(0)
    x = torch.rand(1, 1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    weights = F.normalize(torch.randn(16, dtype=torch.float64), dim=0)

    def score(x: torch.Tensor) -> torch.Tensor:
        tokens = encoder.cls(255 * x)
        return encoder.joint(tokens).double()[0] @ weights

    before = x.detach().clone()
    (gradient,) = torch.autograd.grad(score(x), x)
    assert torch.equal(x, before)
    direction = torch.randn_like(x)
    step = 1e-3
    with torch.no_grad():
        difference = (score(x + step * direction) - score(x - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=2e-2)
