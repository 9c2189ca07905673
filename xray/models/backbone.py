"""The shared vision backbone: timm's VisionTransformer for images and clips, with token reduction.

Parameter names are timm's. Two things are added: the stem is a Conv3d over tubelets (an image takes
its temporal sum), and `pos_temporal` holds the clip positions after the first.

B batch, T frames, t tubelets, h x w patch grid, n = t*h*w patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xray.config import ModelConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.reduce import REDUCTIONS

log = logging.getLogger("xray")


class TubeletConv(nn.Conv3d):
    """The stem. [B, T, 3, H, W] -> [B, n, D]; an image (T = 1) is its own repeated frame.

    A repeated frame meets the sum of the temporal kernels, so an image costs one 2-d convolution,
    and with kernels inflated by averaging gives exactly what timm's stem gives.
    """

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1] == 1:
            folded = self.weight.sum(dim=2)
            patches = F.conv2d(pixels[:, 0], folded, self.bias, self.stride[1:])
            return patches.flatten(2).transpose(1, 2)
        return super().forward(pixels.transpose(1, 2)).flatten(2).transpose(1, 2)


class TubeletEmbed(nn.Module):
    """timm's `patch_embed` with a tubelet stem."""

    def __init__(self, width: int, tubelet: int, patch: tuple[int, int], bias: bool) -> None:
        super().__init__()
        size = (tubelet, *patch)
        self.proj = TubeletConv(3, width, kernel_size=size, stride=size, bias=bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels)


class Tokens(NamedTuple):
    """The backbone's output: a tuple, which ZeRO-3 looks into. assign: input token -> patch."""

    cls: Tensor  # [B, D]
    patches: Tensor  # [B, m, D]
    assign: Tensor | None = None  # [B, n]


class VisionBackbone(nn.Module):
    """A timm VisionTransformer for images and clips with a CLS token.

    Args:
        config: the model section.
        resolution: side of the position table's picture, in pixels.
        frames: frames of the position table's clip.

    Raises ConfigError for a timm model that is not a standard VisionTransformer with a CLS token.
    """

    def __init__(self, config: ModelConfig, resolution: int, frames: int) -> None:
        super().__init__()
        vit = _create_timm(config, resolution)
        patch = vit.patch_embed.patch_size
        if resolution % patch[0] or resolution % patch[1]:
            raise ConfigError(
                f"data.resolution={resolution} is not a multiple of the patch size {patch[0]}: "
                f"use {max(1, resolution // patch[0]) * patch[0]}"
            )
        self.embed_dim: int = vit.embed_dim
        self.patch_size: tuple[int, int] = patch
        self.tubelet = config.tubelet
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self.no_embed_class: bool = vit.no_embed_class
        self.grad_checkpointing = config.grad_checkpointing

        assert vit.cls_token is not None
        self.cls_token = vit.cls_token
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.patch_embed = TubeletEmbed(
            vit.embed_dim, config.tubelet, patch, vit.patch_embed.proj.bias is not None
        )
        slots = max(1, frames // config.tubelet)
        self.pos_temporal = nn.Parameter(torch.zeros(1, slots - 1, vit.embed_dim))
        nn.init.trunc_normal_(self.pos_temporal, std=0.02)
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        inflated = inflate(vit.patch_embed.proj.weight.data, config.tubelet)
        self.patch_embed.proj.weight.data.copy_(inflated)
        if self.patch_embed.proj.bias is not None:
            self.patch_embed.proj.bias.data.copy_(vit.patch_embed.proj.bias.data)

        self.reduce = REDUCTIONS.get(config.reduce)
        depth = len(self.blocks)
        default = [depth // 4, depth // 2, 3 * depth // 4]
        self.reduce_at = sorted(set(default if config.reduce_at is None else config.reduce_at))
        if any(not 0 <= i < depth for i in self.reduce_at):
            raise ConfigError(f"model.reduce_at={self.reduce_at} must be blocks 0 to {depth - 1}")
        if config.pretrained and config.pretrained != "timm":
            load_timm_file(self, Path(config.pretrained))

    def forward(
        self,
        pixels: Tensor,
        keep_rate: float = 1.0,
        visible: Tensor | None = None,
        track: bool = False,
    ) -> Tokens:
        """All tokens after the final norm.

        Args:
            pixels: [B, T, 3, H, W], normalised; T = 1 for images.
            keep_rate: share of patch tokens kept at each block of `reduce_at`.
            visible: [B, m] patch tokens to encode (masked auto-encoding), or None for all.
            track: also return `assign`.
        """
        x = self.embed(pixels)
        if visible is not None:
            kept = x[:, self.num_prefix_tokens :].gather(
                1, visible[..., None].expand(-1, -1, x.shape[-1])
            )
            x = torch.cat([x[:, : self.num_prefix_tokens], kept], dim=1)
        x = self.norm_pre(x)
        P = self.num_prefix_tokens
        assign = None
        if track:
            assign = torch.arange(x.shape[1] - P, device=x.device).expand(x.shape[0], -1)
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            reducing = self.reduce is not None and keep_rate < 1 and number in self.reduce_at
            step = self._reduce_block if reducing else _plain_block
            if self.grad_checkpointing and self.training:
                x, assign = checkpoint(step, block, x, assign, keep_rate, use_reentrant=False)
            else:
                x, assign = step(block, x, assign, keep_rate)
        x = self.norm(x)
        return Tokens(x[:, 0], x[:, P:], assign)

    @property
    def patch_values(self) -> int:
        """Pixel values of one token: tubelet * p * p * 3."""
        return self.tubelet * self.patch_size[0] * self.patch_size[1] * 3

    def token_grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """(t, h, w) of the patch tokens of [B, T, 3, H, W]; t = 1 for an image."""
        T, H, W = pixels.shape[1], *pixels.shape[-2:]
        return max(1, T // self.tubelet), H // self.patch_size[0], W // self.patch_size[1]

    def embed(self, pixels: Tensor) -> Tensor:
        """Stem, positions and prefix tokens: [B, P + n, D], patch tokens t-major."""
        B, T = pixels.shape[:2]
        if T > 1 and T % self.tubelet:
            raise ConfigError(f"{T} frames are not a multiple of the tubelet's {self.tubelet}")
        x = self.patch_embed(pixels)
        slots, *grid = self.token_grid(pixels)
        prefix, spatial = self._spatial_positions((grid[0], grid[1]))
        if slots > 1:
            positions = spatial[:, None] + self._temporal_positions(slots)[:, :, None]
            x = x + positions.flatten(1, 2)
        else:
            x = x + spatial
        heads = [self.cls_token.expand(B, -1, -1)]
        if self.reg_token is not None:
            heads.append(self.reg_token.expand(B, -1, -1))
        tokens = torch.cat(heads, dim=1)
        if prefix is not None:
            tokens = tokens + prefix
        if slots == 1 and self.training and self.pos_temporal.numel():
            # ZeRO reduces only the gradients of the micro-batch that ends a step: an image must
            # touch what a clip before it touched. Adding 0 is exact.
            tokens = tokens + 0 * self.pos_temporal.sum()
        return torch.cat([tokens, x], dim=1)

    def _spatial_positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        """(positions of the prefix tokens or None, [1, h*w, D] of the patches)."""
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        table = resample_abs_pos_embed(
            self.pos_embed, new_size=list(grid), old_size=list(self.grid), num_prefix_tokens=prefix
        )
        return (table[:, :prefix] if prefix else None), table[:, prefix:]

    def _temporal_positions(self, slots: int) -> Tensor:
        """[1, t, D]; the first is zero, so that an image and a clip's first tubelet agree."""
        table = F.pad(self.pos_temporal, (0, 0, 1, 0))
        if slots == table.shape[1]:
            return table
        resized = F.interpolate(
            table.transpose(1, 2), size=slots, mode="linear", align_corners=True
        )
        return resized.transpose(1, 2)

    def _reduce_block(
        self, block: Block, x: Tensor, assign: Tensor | None, keep_rate: float
    ) -> tuple[Tensor, Tensor | None]:
        assert self.reduce is not None
        attention: Any = block.attn
        attended, q, k = attend(attention, block.norm1(x))
        x = x + block.drop_path1(block.ls1(attended))
        x, assign = self.reduce(x, q, k, keep_rate, self.num_prefix_tokens, assign)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), assign

    # timm's surface ---------------------------------------------------------------------------

    def forward_features(self, pixels: Tensor, keep_rate: float = 1.0) -> Tensor:
        """[B, T, 3, H, W] -> [B, 1 + m, D], CLS first."""
        tokens = self(pixels, keep_rate)
        return torch.cat([tokens.cls[:, None], tokens.patches], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"cls_token", "reg_token", "pos_embed", "pos_temporal"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then each block, then the final norm."""
        stem = r"^cls_token|^reg_token|^pos_embed|^pos_temporal|^patch_embed|^norm_pre"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def _plain_block(
    block: Block, x: Tensor, assign: Tensor | None, keep_rate: float
) -> tuple[Tensor, Tensor | None]:
    return block(x), assign


def attend(attn: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """timm's attention by SDPA, with its queries and keys: [B, N, D], 2 x [B, H, N, d]."""
    B, N, _ = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    out = attn.norm(out.transpose(1, 2).reshape(B, N, -1))
    return attn.proj_drop(attn.proj(out)), q, k


def inflate(kernel: Tensor, tubelet: int) -> Tensor:
    """[D, 3, p, p] -> [D, 3, tubelet, p, p] by averaging: a still clip gives what an image does."""
    return (kernel / tubelet)[:, :, None].expand(-1, -1, tubelet, -1, -1).contiguous()


def load_timm_file(backbone: VisionBackbone, path: Path) -> None:
    """Load plain timm weights (safetensors), adapting stem and position table."""
    try:
        state = load_file(path)
    except Exception as error:
        raise ArtifactError(
            f"model.pretrained={path} is no readable safetensors: {error}"
        ) from error
    stem = state.get("patch_embed.proj.weight")
    if stem is not None and stem.ndim == 4:
        state["patch_embed.proj.weight"] = inflate(stem, backbone.tubelet)
    state = {key: value for key, value in state.items() if not key.startswith(("head", "fc_norm"))}
    state.setdefault("pos_temporal", torch.zeros_like(backbone.pos_temporal))
    load_adapted(backbone, state, str(path))


def load_adapted(backbone: VisionBackbone, state: Mapping[str, Tensor], origin: str) -> None:
    """Load a backbone's weights strictly by name, resizing only the position tables.

    Raises ArtifactError naming what differs.
    """
    state = dict(state)
    own = backbone.state_dict()
    prefix = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
    if "pos_embed" in state and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], new_size=list(backbone.grid), num_prefix_tokens=prefix
        )
        log.info("%s: position embedding resized to %s", origin, backbone.grid)
    if "pos_temporal" in state and state["pos_temporal"].shape != own["pos_temporal"].shape:
        table = F.pad(state["pos_temporal"], (0, 0, 1, 0)).transpose(1, 2)
        slots = own["pos_temporal"].shape[1] + 1
        resized = F.interpolate(table, size=slots, mode="linear", align_corners=True)
        state["pos_temporal"] = resized.transpose(1, 2)[:, 1:]
        log.info("%s: temporal positions resized to %d", origin, slots)
    problems = [f"lacks {key}" for key in own if key not in state]
    problems += [f"has an unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)}, the model's {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(
            f"{origin} is of another model: {problems[0]}{more}; "
            "set model.name and model.kwargs to what it was trained with"
        )
    backbone.load_state_dict(state)


def _create_timm(config: ModelConfig, resolution: int) -> VisionTransformer:
    try:
        vit = timm.create_model(
            config.name,
            pretrained=config.pretrained == "timm",
            num_classes=0,
            img_size=resolution,
            drop_path_rate=config.drop_path,
            **config.kwargs,
        )
    except Exception as error:  # timm raises many kinds for a bad name or keyword
        raise ConfigError(
            f"timm cannot build model.name={config.name} with model.kwargs={config.kwargs}: {error}"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ConfigError(f"model.name={config.name} is a {type(vit).__name__}, no plain ViT")
    if vit.cls_token is None:
        raise ConfigError(f"model.name={config.name} has no CLS token, which token reduction needs")
    if vit.pos_embed is None:
        raise ConfigError(f"model.name={config.name} has no learned position table")
    for block in vit.blocks:
        gated = getattr(block.attn, "gate", None) is not None
        if type(block) is not Block or type(block.attn) is not Attention or gated:
            raise ConfigError(
                f"model.name={config.name} has blocks of kind {type(block).__name__} / "
                f"{type(block.attn).__name__}: only timm's standard Block and Attention will do"
            )
    return vit
