"""What a model sees, as pictures: reconstructions and the tokens that token reduction keeps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from xray.artifact import Artifact
from xray.models.heads import Normalize
from xray.models.mae_decoder import make_mask, patchify, unpatchify
from xray.restore import Encoder, restore_decoder, restore_vision

SCALE = 96  # pixels per shown picture
GAP = 4


@torch.no_grad()
def reconstructions(artifact: Artifact, pixels: Tensor, seed: int = 0) -> np.ndarray:
    """A column per sample: masked, reconstructed, original; [B, T, 3, S, S] uint8 -> [H, W, 3].

    Under norm_pix_loss a patch is predicted up to its mean and variance; these are taken from the
    original to show it. Visible patches are shown as they are. A clip shows its middle frame.
    """
    config = artifact.manifest["config"]
    vision = restore_vision(artifact)
    decoder = restore_decoder(artifact, vision)
    normalize = Normalize(config["data"]["mean"], config["data"]["std"])
    x = normalize(pixels)
    B, T = x.shape[:2]
    slots, h, w = vision.token_grid(x)
    ratio = config["mae"]["video_mask_ratio" if T > 1 else "mask_ratio"]
    noise = torch.rand(B, h * w, generator=torch.Generator().manual_seed(seed))
    visible, mask, restore = make_mask(noise, slots, ratio)
    tokens = vision(x, visible=visible)
    predicted = decoder(tokens.cls, tokens.patches, restore, (slots, h, w))
    target = patchify(x, vision.patch_size, vision.tubelet)
    if config["mae"]["norm_pix_loss"]:
        deviation = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        predicted = predicted * deviation + target.mean(dim=-1, keepdim=True)
    removed = mask[..., None]
    rows = [target * (1 - removed), target * (1 - removed) + predicted * removed, target]
    shown = []
    for patches in rows:
        frames = unpatchify(patches, (slots, h, w), vision.patch_size)
        frame = frames[:, (frames.shape[1] - 1) // 2] * normalize.std + normalize.mean
        shown.append(frame)
    hidden = unpatchify(removed.expand_as(target), (slots, h, w), vision.patch_size)
    middle = hidden[:, (hidden.shape[1] - 1) // 2]
    shown[0] = shown[0] * (1 - middle) + 128 * middle
    return _sheet(torch.stack(shown))


@torch.no_grad()
def kept_tokens(encoder: Encoder, pixels: Tensor) -> np.ndarray:
    """A column per sample: the picture, then darkened what is fused away; a clip by tubelets."""
    vision = encoder.vision
    B, H, W = len(pixels), *pixels.shape[-2:]
    x = encoder.normalize(pixels)
    tokens = vision(x, encoder.keep_rate, track=True)
    slots, h, w = vision.token_grid(x)
    assert tokens.assign is not None
    inputs = torch.zeros(B, slots * h * w).scatter_add(
        1, tokens.assign, torch.ones(B, slots * h * w)
    )
    kept = (inputs.gather(1, tokens.assign) == 1).float()  # its token holds nothing else
    mask = F.interpolate(kept.reshape(B, slots, h, w), size=(H, W), mode="nearest")
    frames = pixels[:, :: vision.tubelet][:, :slots].float()
    shaded = frames * (0.25 + 0.75 * mask[:, :, None])
    return _sheet(torch.stack([frames, shaded], dim=1).flatten(1, 2).transpose(0, 1))


def _sheet(pictures: Tensor) -> np.ndarray:
    """[rows, columns, 3, H, W] -> one [H', W', 3] uint8 picture with gaps."""
    R, C = pictures.shape[:2]
    cells = F.interpolate(pictures.flatten(0, 1).float(), size=(SCALE, SCALE), mode="nearest")
    cells = F.pad(cells, (0, GAP, 0, GAP), value=255).reshape(R, C, 3, SCALE + GAP, SCALE + GAP)
    sheet = cells.permute(0, 3, 1, 4, 2).reshape(R * (SCALE + GAP), C * (SCALE + GAP), 3)
    return sheet.round().clamp(0, 255).byte().numpy()
