"""Tests of MAE's masks, patch targets and decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import settings
from torch import Tensor

from stages.base import Batch, Parents
from stages.mae import MaeModule, MaeStage, masking
from xray.errors import ConfigError
from xray.models.mae_decoder import (
    MaeDecoder,
    Masking,
    make_mask,
    normalize_patches,
    patch_statistics,
    visible_tokens,
)
from xray.models.patch_embed import patchify


def test_visible_counts_equal_those_in_the_papers() -> None:
    assert visible_tokens(196, 0.75) == 49  # MAE
    assert 8 * visible_tokens(196, 0.9, tube=True) == 160  # VideoMAE, 8 time slots
    assert visible_tokens(1568, 0.9) == 156  # random over all tokens
    assert visible_tokens(4, 0.9) == visible_tokens(4, 0.9, tube=True) == 1


def test_masks_are_tubes_and_ids_restore_undoes_the_shuffle() -> None:
    noise = torch.rand(5, 16)
    visible, masked, restore = make_mask(noise, 4, slots=3)
    assert visible.shape == (5, 12) and masked.shape == (5, 36)
    every = torch.cat([visible, masked], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(48).expand(5, -1))
    mask = torch.zeros(5, 48).scatter(1, masked, 1.0)
    tubes = mask.reshape(5, 3, 16)
    assert torch.equal(tubes[:, 0], tubes[:, 1]) and torch.equal(tubes[:, 0], tubes[:, 2])
    # ids_restore maps visible patches to the first positions and removed ones to the others
    removed = torch.arange(48).expand(5, -1)[mask.bool()].reshape(5, 36)
    assert torch.equal(restore.gather(1, visible), torch.arange(12).expand(5, -1))
    assert torch.equal(
        restore.gather(1, removed).sort(1).values, torch.arange(12, 48).expand(5, -1)
    )


def test_masking_of_images_and_clips() -> None:
    tube, random = Masking(0.75, 0.9, "tube"), Masking(0.75, 0.9, "random")
    grid = (8, 14, 14)
    assert tube.noise_size(grid) == 196 and random.noise_size(grid) == 1568
    image = torch.rand(2, 196)
    for each in (tube, random):
        assert each.draw(image, (1, 14, 14), 1)[0].shape == (2, 49)
    assert tube.draw(image, grid, 16)[0].shape == (2, 160)
    visible, masked, restore = random.draw(torch.rand(2, 1568), grid, 16)
    assert visible.shape == (2, 156) and masked.shape == (2, 1568 - 156)
    mask = torch.zeros(2, 1568).scatter(1, masked, 1.0)
    assert len({int(m.sum()) for m in mask[0].reshape(8, 196)}) > 1  # slots differ
    order = torch.cat([visible, torch.full((2, 1568 - 156), -1)], dim=1)
    assert torch.equal(order.gather(1, restore) < 0, mask.bool())


@pytest.mark.parametrize("video", ["joint", "frames"])
def test_every_parameter_gets_a_gradient(video: str) -> None:
    """Clips with an odd number of frames: predictions and targets also have equal shapes."""
    config = settings("mae", Path("."), Path("."), f"model.video={video}")
    module = MaeStage(config).build(Parents())
    batch = {
        "pixels": torch.randint(0, 255, (2, 3, 3, 32, 32), dtype=torch.uint8),
        "mask_noise": torch.rand(2, 16),
    }
    features = module.features(batch, 0.0)
    masked = 14 * (3 if video == "frames" else 2)
    assert features["predictions"].shape == (2, masked, 384)
    assert features["targets"].shape == (2, masked, 192 if video == "frames" else 384)
    module(batch, 0.0).loss.backward()
    without = {name for name, p in module.named_parameters() if p.grad is None}
    assert not without


def whole_loss(module: MaeModule, batch: Batch) -> Tensor:
    """Compute MAE's loss from predictions and targets of all patches, images as repeated frames."""
    pixels, vision = module.normalize(batch["pixels"]), module.vision
    grid = vision.token_grid(pixels)
    drawn = masking(module.options).draw(batch["mask_noise"], grid, pixels.shape[1])
    visible, masked, restore = drawn
    tokens = vision(pixels, visible=visible)
    predictions = module.decoder(tokens.cls, tokens.patches, restore, grid)
    targets = patchify(vision.tubelets(pixels), vision.patch_size, vision.tubelet)
    if module.options.norm_pix_loss:
        variance, mean = torch.var_mean(targets, dim=-1, keepdim=True)
        targets = (targets - mean) / (variance + 1e-6).sqrt()
    mask = torch.zeros_like(restore, dtype=torch.float64).scatter(1, masked, 1.0)
    return ((predictions - targets).square().mean(dim=-1) * mask).sum() / mask.sum()


@pytest.mark.parametrize("video", ["joint", "frames"])
@pytest.mark.parametrize("frames", [1, 3, 4])
@pytest.mark.parametrize("normalized", ["true", "false"])
def test_loss_of_masked_patches_equals_that_of_all(
    video: str, frames: int, normalized: str
) -> None:
    more = f"model.video={video}", f"mae.norm_pix_loss={normalized}"
    torch.manual_seed(0)
    module = MaeStage(settings("mae", Path("."), Path("."), *more)).build(Parents()).double()
    pixels = torch.randint(0, 255, (2, frames, 3, 32, 32), dtype=torch.uint8)
    batch = {"pixels": pixels, "mask_noise": torch.rand(2, 16, dtype=torch.float64)}
    module.normalize.register_forward_hook(lambda *args: args[2].double())
    losses, grads = [], []
    for loss in (module(batch, 0.0).loss, whole_loss(module, batch)):
        module.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads.append({k: p.grad for k, p in module.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-9, atol=1e-12), name


def test_random_masks_require_joint_attention() -> None:
    with pytest.raises(ConfigError, match=r"set mae.video_mask=tube"):
        settings("mae", Path("."), Path("."), "model.video=frames", "mae.video_mask=random")


def test_mask_of_a_sample_depends_on_its_noise_only() -> None:
    noise = torch.rand(4, 16)
    batch = make_mask(noise, 4, 2)
    single = make_mask(noise[2:3], 4, 2)
    assert all(torch.equal(a[2:3], b) for a, b in zip(batch, single, strict=True))


def test_targets_have_zero_mean_and_unit_variance() -> None:
    target = normalize_patches(torch.rand(2, 5, 384) * 40 + 3)
    assert target.mean(-1).abs().max() < 1e-4
    assert (target.var(-1) - 1).abs().max() < 1e-3


def test_targets_per_channel_are_those_of_videomae() -> None:
    """Each colour of a tubelet has its own mean and variance (2203.12602, its code)."""
    torch.manual_seed(0)
    tubelets = torch.rand(2, 5, 2, 8, 8, 3, dtype=torch.float64)
    patches = tubelets.flatten(2)
    colours = tubelets.flatten(2, 4)  # [2, 5, pixels, 3]
    expected = (colours - colours.mean(2, True)) / (colours.std(2, keepdim=True) + 1e-6)
    found = normalize_patches(patches, per_channel=True)
    assert torch.allclose(found, expected.flatten(2), rtol=1e-12, atol=0)
    assert not torch.allclose(found, normalize_patches(patches), atol=0.1)
    # an image stands for equal frames of a tubelet
    image = tubelets[:, :, :1].flatten(2)
    doubled = tubelets[:, :, :1].expand(-1, -1, 2, -1, -1, -1).flatten(2)
    for per_channel in (False, True):
        one, two = (
            normalize_patches(image, 2, per_channel),
            normalize_patches(doubled, 1, per_channel),
        )
        assert torch.allclose(one.repeat(1, 1, 2), two, rtol=1e-12, atol=0)


def test_reconstructions_invert_the_normalisation_of_each_kind() -> None:
    torch.manual_seed(0)
    patches = torch.rand(2, 5, 48)
    for per_channel in (False, True):
        mean, deviation = patch_statistics(patches, per_channel=per_channel)
        target = normalize_patches(patches, per_channel=per_channel)
        assert torch.allclose(target * deviation + mean, patches, atol=1e-6)
    assert len(patch_statistics(patches, per_channel=True)[0][0, 0].unique()) == 3


def test_a_flat_patch_has_a_target_of_zeros() -> None:
    for per_channel in (False, True):
        target = normalize_patches(torch.full((1, 2, 12), 0.3), per_channel=per_channel)
        assert target.abs().max() < 1e-3


def test_decoder_is_invariant_to_the_order_of_visible_tokens() -> None:
    torch.manual_seed(0)
    decoder = MaeDecoder(8, 24, 16, 1, 2).eval()
    visible, _, restore = make_mask(torch.rand(2, 16), 4)
    tokens = torch.randn(2, 4, 8)
    out = decoder(torch.randn(2, 8), tokens, restore, (1, 4, 4))
    assert out.shape == (2, 16, 24) and visible.shape == (2, 4)
    # shuffling the visible tokens together with ids_restore leaves the output unchanged
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    moved = torch.where(restore < 4, inverse[restore.clamp(max=3)], restore)
    cls = torch.randn(2, 8)
    a, b = (
        decoder(cls, t, r, (1, 4, 4)) for t, r in ((tokens, restore), (tokens[:, order], moved))
    )
    assert torch.allclose(a, b, atol=1e-6)
