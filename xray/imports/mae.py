"""Single files in the layouts of MAE and VideoMAE, .safetensors or a .pth of tensors only.

They have no config: the sizes are read from the tensors, the rest is that of the papers' models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from xray.config import DataConfig, ModelConfig
from xray.config.data import IMAGENET
from xray.errors import ArtifactError
from xray.imports.parts import PLAIN_VIT, STEM, Family, Imported, State, Vision, vit
from xray.imports.source import Source
from xray.models.mae_checkpoints import clip_table, published, read_weights

HEADS = {1280: 16}  # by width; 64 channels a head otherwise
SIDE, FRAMES = 224, 16  # of VideoMAE, whose files do not say them
UNUSED = ("head.", "fc_norm.")  # of a fine-tuned MAE


def read(source: Source, folder: Path) -> Imported:
    """Read the backbone; the decoder is left out (the mae stage reads it: model.pretrained)."""
    path = source.folder / source.file
    origin = f"{source} (a file is read as one of MAE or VideoMAE)"
    found = published(read_weights(path, origin), origin)
    state = {k: v.float() for k, v in found.backbone.items() if not k.startswith(UNUSED)}
    if STEM not in state or "blocks.0.mlp.fc1.weight" not in state:
        raise ArtifactError(f"{origin} has neither layout: give the folder with its config.json")
    model = _model(state, found.sinusoid)
    patch = state[STEM].shape[-1]
    mean_std: dict[str, Any] = dict(zip(("mean", "std"), IMAGENET, strict=True))
    if not found.sinusoid:
        if "pos_embed" not in state:
            raise ArtifactError(f"{origin} has no pos_embed: give the folder with its config.json")
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
        data = DataConfig(resolution=side, resize="shortest", crop_pct=0.875, **mean_std)
        return Imported("MAE's authors", Vision(model, data, state))
    grid = (FRAMES // model.tubelet, SIDE // patch, SIDE // patch)
    first, later = clip_table(grid, len(state[STEM]))
    state |= {"pos_embed": first, "pos_temporal": later}
    data = DataConfig(
        resolution=SIDE, frames=FRAMES, resize="shortest", interpolation="bilinear", **mean_std
    )
    return Imported("VideoMAE's authors", Vision(model, data, state, clips=True))


def _model(state: State, clips: bool) -> ModelConfig:
    """Return the settings of a ViT by the sizes of its tensors."""
    width, hidden = len(state[STEM]), len(state["blocks.0.mlp.fc1.weight"])
    sizes: dict[str, Any] = {
        "patch_size": state[STEM].shape[-1],
        "embed_dim": width,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        "num_heads": HEADS.get(width, max(1, width // 64)),
        "mlp_ratio": hidden / width,
    }
    model = vit(PLAIN_VIT, 1e-6, "mean" if clips else "cls", **sizes)
    if clips:
        model.kwargs |= {"class_token": False, "fc_norm": False}
        model.tubelet, model.clip_positions = state[STEM].shape[2], "tokens"
    return model


FAMILY = Family("a file of MAE or VideoMAE", lambda source: bool(source.file), read)
