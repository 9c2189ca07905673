"""The shared vision backbone: timm's VisionTransformer for images and clips, with token reduction.

Parameter names are timm's. Added are: the stem over tubelets (an image takes its temporal sum),
`pos_temporal` (clip positions after the first), a CLS token where timm's model has none, and
`frame_query` (attention pooling over frames).

B batch, T frames, t time slots, h x w patch grid, n = t*h*w patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention, resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xray.config import ModelConfig
from xray.errors import ConfigError
from xray.models.patch_embed import Geometry, TubeletEmbed, whole_tubelets
from xray.models.timm_vit import create_timm
from xray.models.token_reduction import (
    KeepRate,
    Spec,
    TokenState,
    kept_tokens,
    reduce_tokens,
    size_bias,
)
from xray.models.weight_init import start_positions, start_weights
from xray.models.weight_loading import load_pretrained, resample_time


class Tokens(NamedTuple):
    """The backbone's output: a tuple, which ZeRO-3 looks into.

    cls [B, D]; patches [B, m, D]; assign, after each block that reduced: the patch token that each
    of the n input tokens lies in, [B, n] long, -1 if it was dropped; None unless tracked.
    """

    cls: Tensor
    patches: Tensor
    assign: tuple[Tensor, ...] | None = None

    def dense(self) -> Tensor:
        """A feature for every input token, [B, n, D]: its token's; zero if it was dropped.

        Raises ValueError when the call was not made with `track=True`.
        """
        if self.assign is None:
            raise ValueError("dense() needs to know where tokens went: call with track=True")
        if not self.assign:
            return self.patches
        place = self.assign[-1][..., None].expand(-1, -1, self.patches.shape[-1])
        return self.patches.gather(1, place.clamp(min=0)) * (place >= 0)


class VisionBackbone(nn.Module):
    """A timm VisionTransformer for images and clips, with a CLS token.

    Args:
        config: the model section; `ModelConfig(name="vit_base_patch16_224")` is enough.
        resolution: side or (height, width) of the position table's picture, in pixels.
        frames: frames of the position table's clip.

    Other sizes are met by interpolation. Raises ConfigError for a model of other blocks.
    """

    def __init__(
        self, config: ModelConfig, resolution: int | tuple[int, int] = 224, frames: int = 16
    ) -> None:
        super().__init__()
        config.validate()
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        vit = create_timm(config, size)
        if not config.pretrained:
            if "weight_init" not in config.kwargs:
                start_weights(vit)
            start_positions(vit)
        self.embed_dim: int = vit.embed_dim
        self.patch_size: tuple[int, int] = vit.patch_embed.patch_size
        self.tubelet = config.tubelet
        self.video = config.video
        self.geometry = Geometry(self.patch_size, 1 if config.video == "frames" else config.tubelet)
        slots, *_ = self.geometry.grid(frames, *size)  # raises for sides that do not fit
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.cls_added = vit.cls_token is None
        # positions cover none of the prefix tokens, or all that timm's model has
        self.position_prefix: int = 0 if vit.no_embed_class else vit.num_prefix_tokens
        self.num_prefix_tokens: int = vit.num_prefix_tokens + self.cls_added
        self.grad_checkpointing = config.grad_checkpointing

        self.cls_token: nn.Parameter = (
            nn.Parameter(0.02 * torch.randn(1, 1, vit.embed_dim))
            if vit.cls_token is None
            else vit.cls_token
        )
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.pos_drop = vit.pos_drop
        self.patch_embed = TubeletEmbed(vit.patch_embed.proj, vit.patch_embed.norm, config.tubelet)
        self.pos_temporal = self.frame_query = None
        if self.video == "joint" and slots > 1:
            self.pos_temporal = nn.Parameter(torch.empty(1, slots - 1, vit.embed_dim))
            nn.init.trunc_normal_(self.pos_temporal, std=0.02)
        if self.video == "frames" and config.frame_pool == "attention":
            self.frame_query = nn.Parameter(torch.zeros(vit.embed_dim))  # starts as the mean
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm
        self.fc_norm = vit.fc_norm  # timm's name for the final norm of models that pool first

        self.reduction = config.reduce
        self.fuse = config.fuse
        depth = len(self.blocks)
        default = [depth // 4, depth // 2, 3 * depth // 4]
        self.reduce_at = sorted(set(default)) if config.reduce_at is None else config.reduce_at
        if any(not 0 <= i < depth for i in self.reduce_at):
            raise ConfigError(f"model.reduce_at={self.reduce_at} must be blocks 0 to {depth - 1}")
        if sorted(set(self.reduce_at)) != self.reduce_at:
            raise ConfigError(f"model.reduce_at={self.reduce_at} must rise: keep_rates follow it")
        if config.keep_rates is not None and self.reduction != "none":
            self.rates(config.keep_rates)  # as many as blocks
        load_pretrained(self, config)

    def forward(
        self,
        pixels: Tensor,
        keep_rate: KeepRate = 1.0,
        visible: Tensor | None = None,
        track: bool = False,
    ) -> Tokens:
        """All tokens after the final norm.

        Args:
            pixels: [B, T, 3, H, W], normalised; T = 1 for images. An odd frame out is repeated to
                fill its tubelet.
            keep_rate: share of patch tokens kept at each block of `reduce_at`, or one per block.
                It is the call's: `config.keep_rate` is what a stage's schedule ends at.
            visible: [B, m] patch tokens to encode (masked auto-encoding), or None for all. With
                `video: frames` the same number of each frame, frame by frame.
            track: also return `assign`.

        With `video: frames` the CLS tokens of the frames are pooled and their patch tokens follow
        each other, as do their places in `assign`.
        """
        if self.video == "joint":
            return self._encode(pixels, keep_rate, visible, track)
        B, T = pixels.shape[:2]
        frames = pixels.flatten(0, 1)[:, None]
        if visible is not None:
            _, h, w = self.token_grid(frames)
            visible = visible.reshape(B * T, -1) % (h * w)
        cls, patches, assign = self._encode(frames, keep_rate, visible, track)
        if assign:
            frame = torch.arange(T, device=pixels.device).repeat(B)[:, None]
            counts = self.token_counts(assign[0].shape[1], keep_rate)
            left = [counts[at] for at in self.rates(keep_rate)]
            assign = tuple(
                (a + frame * n * (a >= 0)).reshape(B, -1) for a, n in zip(assign, left, strict=True)
            )
        patches = patches.reshape(B, -1, self.embed_dim)
        return Tokens(self._pool(cls.unflatten(0, (B, T))), patches, assign)

    def _encode(
        self, pixels: Tensor, keep_rate: KeepRate, visible: Tensor | None, track: bool
    ) -> Tokens:
        x = self.embed(pixels)
        P = self.num_prefix_tokens
        if visible is not None:
            kept = x[:, P:].gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([x[:, :P], kept], dim=1)
        x = self.norm_pre(x)
        rates = self.rates(keep_rate)
        state = TokenState(assign=() if track else None)
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            rate = rates.get(number, 1.0)
            if self.grad_checkpointing and self.training:
                x, state = checkpoint(self._block, block, x, state, rate, use_reentrant=False)
            else:
                x, state = self._block(block, x, state, rate)
        x = self.fc_norm(self.norm(x))
        return Tokens(x[:, 0], x[:, P:], state.assign)

    def rates(self, keep_rate: KeepRate) -> dict[int, float]:
        """Block number -> the keep rate below 1 there; raises ConfigError for impossible ones."""
        if isinstance(keep_rate, float | int | str):  # a str is refused below
            keep_rate = [keep_rate] * len(self.reduce_at)
        rates: list[Any] = list(keep_rate)
        if len(rates) != len(self.reduce_at):
            raise ConfigError(
                f"{len(rates)} keep rates for {len(self.reduce_at)} reducing blocks "
                f"{self.reduce_at}: give model.keep_rates one per block of model.reduce_at"
            )
        if not all(isinstance(rate, float | int) and 0 < rate <= 1 for rate in rates):
            raise ConfigError(f"keep rates {rates} must be numbers in (0, 1]")
        if self.reduction == "none" and any(rate < 1 for rate in rates):
            raise ConfigError("model.reduce=none keeps every token: set it to evit, or keep_rate 1")
        return {at: rate for at, rate in zip(self.reduce_at, rates, strict=True) if rate < 1}

    def token_counts(self, tokens: int, keep_rate: KeepRate = 1.0) -> list[int]:
        """Patch tokens that leave each block, for `tokens` that enter the first."""
        counts, rates = [], self.rates(keep_rate)
        for number in range(len(self.blocks)):
            kept = kept_tokens(tokens, rates.get(number, 1.0))
            if kept < tokens:
                tokens = kept + self.fuse
            counts.append(tokens)
        return counts

    def _block(
        self, block: Block, x: Tensor, state: TokenState, rate: float
    ) -> tuple[Tensor, TokenState]:
        """timm's block; below rate 1 the tokens are reduced between attention and MLP."""
        if rate == 1 and state.sizes is None:
            return block(x), state
        attention: Any = block.attn
        attended, q, k = attend(attention, block.norm1(x), size_bias(state, x.dtype))
        x = x + block.drop_path1(block.ls1(attended))
        if rate < 1:
            kept = kept_tokens(x.shape[1] - self.num_prefix_tokens, rate)
            spec = Spec(kept, self.fuse, self.num_prefix_tokens, self.training)
            x, state = reduce_tokens(self.reduction, x, q, k, state, spec)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), state

    def _pool(self, cls: Tensor) -> Tensor:
        """The frames' CLS tokens, [B, T, D] -> [B, D]: their mean, or weighted by attention."""
        if self.frame_query is None:
            return cls.mean(dim=1)
        weights = ((cls * self.frame_query).sum(-1) * cls.shape[-1] ** -0.5).softmax(dim=1)
        return (weights[..., None] * cls).sum(dim=1)

    # the geometry of tokens -------------------------------------------------------------------

    @property
    def patch_values(self) -> int:
        """Pixel values of one token: tubelet * p * p * 3."""
        return self.tubelet * self.patch_size[0] * self.patch_size[1] * 3

    def tubelets(self, pixels: Tensor) -> Tensor:
        """The frames the tokens stand for, [B, T, 3, H, W] -> [B, t*tubelet, 3, H, W]."""
        if self.video == "frames":
            return pixels.repeat_interleave(self.tubelet, dim=1)
        return whole_tubelets(pixels, self.tubelet)

    def token_grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """(t, h, w) of the patch tokens of [B, T, 3, H, W]; t = 1 for an image.

        Raises ConfigError for sides that are not whole patches.
        """
        return self.geometry.grid(pixels.shape[1], *pixels.shape[-2:])

    def embed(self, pixels: Tensor) -> Tensor:
        """Stem, positions and prefix tokens: [B, P + n, D], patch tokens t-major."""
        slots, h, w = self.token_grid(pixels)
        if pixels.shape[1] > 1:
            pixels = whole_tubelets(pixels, self.tubelet)
        table = resample_abs_pos_embed(
            self.pos_embed,
            new_size=[h, w],
            old_size=list(self.grid),
            num_prefix_tokens=self.position_prefix,
        )
        spatial = table[:, self.position_prefix :]
        x = self.patch_embed(pixels)
        if slots > 1 and self.pos_temporal is not None:
            time = resample_time(self.pos_temporal, slots)
            x = x + (spatial[:, None] + time[:, :, None]).flatten(1, 2)
        else:
            x = x + spatial.repeat(1, slots, 1)
        prefix = (
            self.cls_token
            if self.reg_token is None
            else torch.cat([self.cls_token, self.reg_token], dim=1)
        )
        if self.position_prefix:  # an added CLS has no row, and comes first
            rows = F.pad(table[:, : self.position_prefix], (0, 0, int(self.cls_added), 0))
            prefix = prefix + rows
        if slots == 1 and self.training and self.pos_temporal is not None:
            # ZeRO reduces only the gradients of the micro-batch that ends a step: an image must
            # touch what a clip before it touched. Adding 0 is exact.
            prefix = prefix + 0 * self.pos_temporal.sum()
        return self.pos_drop(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))

    # timm's surface ---------------------------------------------------------------------------

    def forward_features(self, pixels: Tensor, keep_rate: KeepRate = 1.0) -> Tensor:
        """[B, T, 3, H, W] -> [B, 1 + m, D], CLS first."""
        tokens = self(pixels, keep_rate)
        return torch.cat([tokens.cls[:, None], tokens.patches], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"cls_token", "reg_token", "pos_embed", "pos_temporal", "frame_query"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: the stem, then each block, then the final norm."""
        stem = r"^cls_token|^reg_token|^pos_embed|^pos_temporal|^patch_embed|^norm_pre"
        top = r"^norm|^fc_norm|^frame_query"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (top, (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable


def attend(attn: Attention, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """timm's attention by SDPA, with its queries and keys: [B, N, D], 2 x [B, H, N, d].

    bias: added to the logits, [B, 1, 1, N], or None.
    """
    B, N, _ = x.shape
    qkv = attn.qkv(x).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, N, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = attn.norm(out.transpose(1, 2).reshape(B, N, -1))
    return attn.proj_drop(attn.proj(out)), q, k
