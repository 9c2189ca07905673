from __future__ import annotations

import torch

from xray.models.mae_decoder import (
    MaeDecoder,
    make_mask,
    normalize_patches,
    patchify,
    sincos_positions,
    unpatchify,
    visible_tokens,
)


def test_visible_counts_of_the_papers() -> None:
    assert visible_tokens(196, 0.75) == 49  # MAE
    assert 8 * visible_tokens(196, 0.9) == 160  # VideoMAE, 8 time slots
    assert visible_tokens(4, 0.9) == 1


def test_masks_restore_and_tubes() -> None:
    noise = torch.rand(5, 16)
    visible, mask, restore = make_mask(noise, 3, 0.75)
    assert visible.shape == (5, 12) and mask.sum(1).eq(36).all()
    assert mask.gather(1, visible).eq(0).all()
    tubes = mask.reshape(5, 3, 16)
    assert torch.equal(tubes[:, 0], tubes[:, 1]) and torch.equal(tubes[:, 0], tubes[:, 2])
    # visible then removed, gathered by ids_restore, is the order of the patches
    removed = torch.arange(48).expand(5, -1)[mask.bool()].reshape(5, 36)
    place = restore[:, :].gather(1, visible)
    assert torch.equal(place, torch.arange(12).expand(5, -1))
    assert torch.equal(
        restore.gather(1, removed).sort(1).values, torch.arange(12, 48).expand(5, -1)
    )


def test_mask_depends_on_its_own_noise_only() -> None:
    noise = torch.rand(4, 16)
    whole = make_mask(noise, 2, 0.75)
    alone = make_mask(noise[2:3], 2, 0.75)
    assert all(torch.equal(a[2:3], b) for a, b in zip(whole, alone, strict=True))


def test_patchify_by_hand_and_back() -> None:
    clip = torch.rand(2, 4, 3, 16, 24)
    patches = patchify(clip, (8, 8), 2)
    assert patches.shape == (2, 2 * 2 * 3, 2 * 8 * 8 * 3)
    by_hand = clip[1, 2:4, :, 8:16, 16:24].permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(patches[1, 6 + 3 + 2], by_hand)
    assert torch.equal(unpatchify(patches, (2, 2, 3), (8, 8)), clip)
    image = clip[:, :1]
    assert torch.equal(
        patchify(image, (8, 8), 2), patchify(image.expand(-1, 2, -1, -1, -1), (8, 8), 2)
    )


def test_targets_have_zero_mean_and_unit_variance() -> None:
    target = normalize_patches(torch.rand(2, 5, 384) * 40 + 3)
    assert target.mean(-1).abs().max() < 1e-4
    assert (target.var(-1) - 1).abs().max() < 1e-3


def test_decoder_positions_agree_for_image_and_first_slot() -> None:
    image, clip = sincos_positions((1, 4, 4), 32), sincos_positions((3, 4, 4), 32)
    assert torch.equal(image, clip[:16])
    assert len({tuple(row.tolist()) for row in clip}) == 48


def test_decoder_sees_only_what_is_visible() -> None:
    torch.manual_seed(0)
    decoder = MaeDecoder(8, 24, 16, 1, 2).eval()
    visible, _, restore = make_mask(torch.rand(2, 16), 1, 0.75)
    tokens = torch.randn(2, 4, 8)
    out = decoder(torch.randn(2, 8), tokens, restore, (1, 4, 4))
    assert out.shape == (2, 16, 24) and visible.shape == (2, 4)
    # shuffling the visible tokens together with ids_restore changes nothing
    order = torch.tensor([2, 0, 3, 1])
    inverse = order.argsort()
    moved = torch.where(restore < 4, inverse[restore.clamp(max=3)], restore)
    cls = torch.randn(2, 8)
    a, b = (
        decoder(cls, t, r, (1, 4, 4)) for t, r in ((tokens, restore), (tokens[:, order], moved))
    )
    assert torch.allclose(a, b, atol=1e-6)
