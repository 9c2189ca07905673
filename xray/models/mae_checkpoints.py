"""Checkpoints as the authors of MAE and VideoMAE published them.

MAE (2111.06377) has timm's names, and those of its decoder begin with `decoder_`. VideoMAE
(2203.12602) has the same names, with the prefix `encoder.` before fine-tuning; its attention has
biases of queries and values only, and its fixed positions are not stored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from xray.config import ModelConfig
from xray.errors import ArtifactError, brief
from xray.models.mae_decoder import MaeDecoder
from xray.models.timm_vit import sincos_positions

log = logging.getLogger("xray")
NESTED = ("model", "module", "state_dict")  # keys of checkpoints that hold the weights
DECODER = {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "predict"}
# Parts of VideoMAE's pre-training that the backbone has no use for, and heads of fine-tuning.
UNUSED = re.compile(r"decoder\.|encoder_to_decoder\.|mask_token$|head\.")


class Published(NamedTuple):
    """Weights of MAE or VideoMAE by our names."""

    backbone: dict[str, Tensor]
    decoder: dict[str, Tensor]  # of MaeDecoder; {} if there is none
    sinusoid: bool = False  # the positions are VideoMAE's, which no file holds


def read_weights(path: Path, origin: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a torch file that holds tensors only.

    Raises ArtifactError for a file that cannot be read without running code in it.
    """
    if path.suffix not in (".pth", ".pt", ".bin"):
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own error types
            raise ArtifactError(f"{origin} is not a readable safetensors file: {error}") from error
    try:
        content: Any = torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types
        refused = type(error).__name__ == "UnpicklingError"  # torch's text is advice to load it all
        why = "it holds more than these, or is damaged" if refused else brief(error)
        raise ArtifactError(
            f"{origin} cannot be read as plain tensors ({why}): convert it to a .safetensors file "
            "where you trust it"
        ) from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise ArtifactError(f"{origin} holds no weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def published(state: Mapping[str, Tensor], origin: str) -> Published:
    """Map MAE's or VideoMAE's weights to ours; those of other layouts stay as they are.

    origin: source of the weights, for messages. Raises ArtifactError for positions of a decoder
    that are not MAE's.
    """
    if _is_videomae(state):
        return Published(_videomae(state), {}, sinusoid=True)
    backbone, decoder = dict(state), dict[str, Tensor]()
    if any(name.startswith("decoder_") for name in state):
        _check_positions(state, origin)
        for name, tensor in state.items():
            if name == "mask_token" or name.startswith("decoder_"):
                del backbone[name]
                if name != "decoder_pos_embed":
                    decoder[_decoder_name(name)] = tensor
    return Published(backbone, decoder)


def _decoder_name(name: str) -> str:
    part, _, rest = name.partition(".")
    part = DECODER.get(part, part.removeprefix("decoder_"))
    return f"{part}.{rest}" if rest else part


def _check_positions(state: Mapping[str, Tensor], origin: str) -> None:
    table = state.get("decoder_pos_embed")
    if table is None:
        return
    side = round((table.shape[1] - 1) ** 0.5)
    expected = sincos_positions((1, side, side), table.shape[2])
    found = table[0, 1:].float()
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
        raise ArtifactError(f"{origin}: its decoder_pos_embed is not the sine-cosine table of MAE")


def inflated_decoder(decoder: Mapping[str, Tensor], tubelet: int) -> dict[str, Tensor]:
    """Let a decoder of images predict each frame of a tubelet alike."""
    predict = {k: torch.cat([v] * tubelet) for k, v in decoder.items() if k.startswith("predict.")}
    return {**decoder, **predict}


def load_decoder(decoder: MaeDecoder, config: ModelConfig) -> None:
    """Load the MAE decoder of the file that `model.pretrained` names, if it has one.

    One of other sizes is left out, with a warning: a decoder may also be trained from scratch.
    """
    path, origin = Path(config.pretrained), f"model.pretrained={config.pretrained}"
    stored = published(read_weights(path, origin), origin).decoder if path.is_file() else {}
    if not stored:
        return
    weights = inflated_decoder(stored, config.tubelet)
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if decoder.rows_first or shapes != {k: v.shape for k, v in decoder.state_dict().items()}:
        log.warning(
            "the decoder in %s is not used, because it has other sizes: set mae.decoder_dim=%d, "
            "mae.decoder_depth=%d, model.sincos=columns and the number of its heads",
            origin, stored["mask_token"].shape[-1], sum(".norm1.weight" in k for k in stored),
        )  # fmt: skip
        return
    decoder.load_state_dict(weights)
    log.info("the decoder is loaded from %s", origin)


def _is_videomae(state: Mapping[str, Tensor]) -> bool:
    """Tell VideoMAE from EVA-02 and DINOv3, which have such biases beside a CLS token."""
    if "cls_token" in state or "pos_embed" in state:
        return False
    return any(name.endswith(".attn.q_bias") for name in state)


def _videomae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    own = {k: v for k, v in state.items() if not UNUSED.match(k)}
    own = {name.removeprefix("encoder."): tensor for name, tensor in own.items()}
    for name in [name for name in own if name.endswith(".attn.q_bias")]:
        queries, values = own.pop(name), own.pop(name.replace(".q_bias", ".v_bias"))
        bias = torch.cat([queries, torch.zeros_like(queries), values])
        own[name.replace(".q_bias", ".qkv.bias")] = bias
    return own


def sinusoid_table(tokens: int, width: int) -> Tensor:
    """Embed the numbers of all tokens of a clip as VideoMAE does, [n, D]: sine, cosine, ..."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def clip_table(grid: tuple[int, int, int], width: int) -> tuple[Tensor, Tensor]:
    """Return VideoMAE's positions of a grid (t, h, w) as the backbone holds them.

    They are those of the first time slot, [1, n, D], and what is added to them in each later one,
    [1, t - 1, n, D] (`model.clip_positions: tokens`).
    """
    t, h, w = grid
    table = sinusoid_table(t * h * w, width).unflatten(0, (t, h * w))
    return table[:1], (table[1:] - table[:1])[None]
