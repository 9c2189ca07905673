"""The shared vision backbone: timm's VisionTransformer or Eva for images and clips, with token
reduction.

Parameter names are timm's. The backbone adds a stem over tubelets (for an image, its kernels are
summed over time), `pos_temporal` (positions of the time slots after the first), a CLS token if
timm's model has none and `model.pool` is cls, and `frame_query` (attention pooling over frames).

Shapes: B batch, T frames, t time slots, h x w patch grid, n = t*h*w patch tokens, P prefix tokens,
D width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xray.config import ModelConfig
from xray.config.model import Checkpointing
from xray.errors import ConfigError
from xray.models.block import RotaryBlock, run_block
from xray.models.patch_embed import Geometry, TubeletEmbed, whole_tubelets
from xray.models.pooling import AttentionPooling, pool_tokens, pooling_head
from xray.models.rotary import Rotary
from xray.models.timm_vit import create_timm, pools_prefix
from xray.models.token_reduction import KeepRate, Spec, TokenState, kept_tokens
from xray.models.weight_loading import load_pretrained, resample_clip


class Tokens(NamedTuple):
    """Output of the backbone. It is a tuple because ZeRO 3 searches tuples for tensors.

    Attributes:
        cls: pooled feature, [B, D]: the CLS token, or what `model.pool` puts in its place.
        patches: features of the m remaining patch tokens, [B, m, D].
        assign: one tensor per reducing block, [B, n] long: the index of the patch token that holds
            each input token after the block, or -1 if it was dropped. None without `track=True`.
    """

    cls: Tensor
    patches: Tensor
    assign: tuple[Tensor, ...] | None = None

    def dense(self) -> Tensor:
        """Return one feature per input token, [B, n, D].

        An input token has the feature of the token that it was merged into, or zeros if it was
        dropped. Raises ValueError if the backbone was called without `track=True`.
        """
        if self.assign is None:
            raise ValueError("dense() needs `assign`: call the backbone with track=True")
        if not self.assign:
            return self.patches
        index = self.assign[-1][..., None].expand(-1, -1, self.patches.shape[-1])
        return self.patches.gather(1, index.clamp(min=0)) * (index >= 0)


class VisionBackbone(nn.Module):
    """VisionTransformer or Eva of timm for images and clips.

    config: the model section; `ModelConfig(name="vit_base_patch16_224")` is enough. resolution (in
    pixels: a side, or (height, width)), frames: size of the position table, which is interpolated
    for other inputs. Raises ConfigError for a timm model of another class or of other blocks.
    """

    def __init__(
        self, config: ModelConfig, resolution: int | tuple[int, int] = 224, frames: int = 16
    ) -> None:
        super().__init__()
        config.validate()
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        vit = create_timm(config, size)
        self.embed_dim: int = vit.embed_dim
        self.patch_size: tuple[int, int] = vit.patch_embed.patch_size
        self.tubelet = config.tubelet
        self.video = config.video
        self.geometry = Geometry(self.patch_size, 1 if config.video == "frames" else config.tubelet)
        slots, *_ = self.geometry.grid(frames, *size)  # raises if a side does not fit
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.pool = config.pool
        self.cls_added = vit.cls_token is None and config.pool == "cls"
        self.rows_first = config.rows_first
        self.antialias = config.resize_positions == "antialias"  # of a resized position table
        # the position table has rows for all prefix tokens of timm's model, or for none
        self.position_prefix: int = 0 if vit.no_embed_class else vit.num_prefix_tokens
        self.num_prefix_tokens: int = vit.num_prefix_tokens + self.cls_added
        # number of prefix tokens that are not pooled (model.pool=map and mean)
        self.pooled_from = 0 if pools_prefix(vit) else self.num_prefix_tokens
        self.grad_checkpointing = config.grad_checkpointing

        self.cls_token: nn.Parameter | None = vit.cls_token
        if self.cls_added:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, vit.embed_dim))
        self.reg_token = vit.reg_token
        self.pos_embed = vit.pos_embed
        self.pos_drop = vit.pos_drop
        self.patch_embed = TubeletEmbed(vit.patch_embed.proj, vit.patch_embed.norm, config.tubelet)
        self.pos_temporal = self.frame_query = None
        if self.video == "joint" and slots > 1:
            each = [math.prod(self.grid)] if config.clip_positions == "tokens" else []
            self.pos_temporal = nn.Parameter(torch.empty(1, slots - 1, *each, vit.embed_dim))
            nn.init.trunc_normal_(self.pos_temporal, std=0.02)
        if self.video == "frames" and config.frame_pool == "attention":
            # with a zero query, attention pooling equals the mean at the start of training
            self.frame_query = nn.Parameter(torch.zeros(vit.embed_dim))
        self.rotary = None if getattr(vit, "rope", None) is None else Rotary.of(vit.rope)
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.eva = isinstance(vit, Eva)
        if self.eva:
            blocks: Any = vit.blocks
            self.blocks = nn.ModuleList(RotaryBlock(block) for block in blocks)
        self.norm = vit.norm
        self.fc_norm = vit.fc_norm  # in timm models that pool before the final norm
        self.attn_pool = AttentionPooling.of(vit.attn_pool) if self.pool == "map" else None

        self.reduction = config.reduce
        self.proportional = config.proportional_attention
        self.run_block = run_block  # compiled by xray.models.compilation
        self.fuse = config.fuse
        depth = len(self.blocks)
        default = [depth // 4, depth // 2, 3 * depth // 4]
        self.reduce_at = sorted(set(default)) if config.reduce_at is None else config.reduce_at
        if any(not 0 <= i < depth for i in self.reduce_at):
            raise ConfigError(
                f"model.reduce_at={self.reduce_at} must be numbers from 0 to {depth - 1}"
            )
        if sorted(set(self.reduce_at)) != self.reduce_at:
            raise ConfigError(
                f"model.reduce_at={self.reduce_at} must be in increasing order without repetition: "
                "model.keep_rates follows the same order"
            )
        if config.keep_rates is not None and self.reduction != "none":
            self.rates(config.keep_rates)  # raises unless there is one rate per reducing block
        load_pretrained(self, config)

    def forward(
        self,
        pixels: Tensor,
        keep_rate: KeepRate = 1.0,
        visible: Tensor | None = None,
        track: bool = False,
    ) -> Tokens:
        """Encode images or clips and return all tokens after the final norm.

        Args:
            pixels: [B, T, 3, H, W], normalised; T = 1 for images. The last frame is repeated to
                complete the last tubelet.
            keep_rate: share of patch tokens kept at each block of `reduce_at`, or one share per
                block. `config.keep_rate` has no effect here: it is the target of the schedule.
            visible: [B, m] indices of the patch tokens to encode (masked auto-encoding), or None
                for all. With `video: frames`, the indices are sorted by frame and each frame has
                the same number of them.
            track: also return `assign`.

        With `video: frames`, the features of the frames are pooled into one. The patch tokens of
        all frames are concatenated in time order, and `assign` indexes the concatenated tokens.
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
            remaining = [counts[at] for at in self.rates(keep_rate)]
            assign = tuple(
                (a + frame * n * (a >= 0)).reshape(B, -1)
                for a, n in zip(assign, remaining, strict=True)
            )
        patches = patches.reshape(B, -1, self.embed_dim)
        return Tokens(self._pool_frames(cls.unflatten(0, (B, T))), patches, assign)

    def _encode(
        self, pixels: Tensor, keep_rate: KeepRate, visible: Tensor | None, track: bool
    ) -> Tokens:
        x = self.norm_pre(self.embed(pixels, visible))
        P = self.num_prefix_tokens
        rates = self.rates(keep_rate)
        rotation = None if self.rotary is None else self._rotation(pixels, visible)
        state = TokenState(
            assign=() if track else None, proportional=self.proportional, rotation=rotation
        )
        head = pooling_head(self) if rates and self.reduction != "tome" else None
        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            spec = None
            if number in rates:
                kept = kept_tokens(x.shape[1] - P, rates[number])
                spec = Spec(self.reduction, kept, self.fuse, P, self.training, self.pool, head)
            if self.grad_checkpointing is True and self.training:
                x, state = checkpoint(self._block, block, x, state, spec, use_reentrant=False)
            else:
                x, state = self._block(block, x, state, spec)
        if self.pool != "cls":
            return Tokens(*pool_tokens(self, x, state), state.assign)
        x = self.fc_norm(self.norm(x))
        return Tokens(x[:, 0], x[:, P:], state.assign)

    def rates(self, keep_rate: KeepRate) -> dict[int, float]:
        """Map each reducing block's number to its keep rate, for rates below 1.

        Raises ConfigError for rates outside (0, 1] and for a wrong number of rates.
        """
        if isinstance(keep_rate, float | int | str):  # a str is rejected below
            keep_rate = [keep_rate] * len(self.reduce_at)
        rates: list[Any] = list(keep_rate)
        if len(rates) != len(self.reduce_at):
            raise ConfigError(
                f"{len(rates)} keep rates for {len(self.reduce_at)} reducing blocks "
                f"{self.reduce_at}: set model.keep_rates to one rate per block of model.reduce_at"
            )
        if not all(isinstance(rate, float | int) and 0 < rate <= 1 for rate in rates):
            raise ConfigError(f"keep rates {rates} must be numbers in (0, 1]")
        if self.reduction == "none" and any(rate < 1 for rate in rates):
            raise ConfigError(
                f"model.reduce=none keeps every token, but the keep rates are {rates}: "
                "set model.reduce=evit, or model.keep_rate=1"
            )
        return {at: rate for at, rate in zip(self.reduce_at, rates, strict=True) if rate < 1}

    def token_counts(self, tokens: int, keep_rate: KeepRate = 1.0) -> list[int]:
        """Return the number of patch tokens after each block, for `tokens` before the first."""
        counts, rates = [], self.rates(keep_rate)
        for number in range(len(self.blocks)):
            kept = kept_tokens(tokens, rates.get(number, 1.0))
            if kept < tokens:
                tokens = kept + self.fuse
            counts.append(tokens)
        return counts

    def _block(
        self, block: Block | RotaryBlock, x: Tensor, state: TokenState, spec: Spec | None
    ) -> tuple[Tensor, TokenState]:
        """Run a block, with token reduction if there is a spec."""
        recompute = self.grad_checkpointing == "mlp" and self.training
        plain = spec is None and state.sizes is None and not recompute
        if plain and isinstance(block, Block):
            return block(x), state
        return self.run_block(block, x, state, spec, recompute)

    def _pool_frames(self, cls: Tensor) -> Tensor:
        """Pool the frames' features, [B, T, D] -> [B, D], by mean or by attention."""
        if self.frame_query is None:
            return cls.mean(dim=1)
        weights = ((cls * self.frame_query).sum(-1) * cls.shape[-1] ** -0.5).softmax(dim=1)
        return (weights[..., None] * cls).sum(dim=1)

    # token geometry ---------------------------------------------------------------------------

    @property
    def patch_values(self) -> int:
        """Number of pixel values per patch token: tubelet * p * p * 3."""
        return self.tubelet * self.patch_size[0] * self.patch_size[1] * 3

    def tubelets(self, pixels: Tensor) -> Tensor:
        """Repeat frames so that each token is one tubelet, [B, T, ...] -> [B, t*tubelet, ...]."""
        if self.video == "frames":
            return pixels.repeat_interleave(self.tubelet, dim=1)
        return whole_tubelets(pixels, self.tubelet)

    def token_grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """Return the patch grid (t, h, w) of pixels [B, T, 3, H, W]; t = 1 for an image.

        Raises ConfigError if a side is not a multiple of the patch size.
        """
        return self.geometry.grid(pixels.shape[1], *pixels.shape[-2:])

    def _rotation(self, pixels: Tensor, visible: Tensor | None) -> Tensor:
        """Return the rotary positions of the patch tokens, the same ones in each time slot."""
        assert self.rotary is not None
        slots, h, w = self.token_grid(pixels)
        rotation = self.rotary.rotation(h, w, pixels.device)
        if visible is not None:
            return F.embedding(visible % (h * w), rotation)
        return rotation.repeat(slots, 1)[None]

    def embed(self, pixels: Tensor, visible: Tensor | None = None) -> Tensor:
        """Apply stem and positions and prepend prefix tokens: [B, P + n, D], time slot by slot.

        visible: [B, m], the patches to embed, for [B, P + m, D]; None for all.
        """
        slots, h, w = self.token_grid(pixels)
        if pixels.shape[1] > 1:
            pixels = whole_tubelets(pixels, self.tubelet)
        x = self.patch_embed(pixels, visible)
        rows, positions = self._positions(slots, h, w)
        if positions is not None:
            x = x + (positions if visible is None else F.embedding(visible, positions[0]))
        prefix = x[:1, :0] if self.cls_token is None else self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        if rows is not None:  # an added CLS token comes first and has no position: pad with 0
            prefix = prefix + F.pad(rows, (0, 0, int(self.cls_added), 0))
        if slots == 1 and self.training and self.pos_temporal is not None:
            # ZeRO reduces the gradients of the step's last micro-batch only. If that one holds
            # images, it must still use the parameters that clips before it used. Adding 0 is exact.
            prefix = prefix + 0 * self.pos_temporal.sum()
        return self.pos_drop(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1))

    def _positions(self, slots: int, h: int, w: int) -> tuple[Tensor | None, Tensor | None]:
        """Return the learned positions of the prefix tokens and patches: [1, P, D], [1, n, D].

        None stands for tokens that have no learned positions.
        """
        time = None
        if slots > 1 and self.pos_temporal is not None:
            time = resample_clip(self.pos_temporal, slots, self.grid, (h, w), self.antialias)
        if self.pos_embed is None:
            return None, None if time is None else time.expand(-1, -1, h * w, -1).flatten(1, 2)
        table = resample_abs_pos_embed(
            self.pos_embed,
            new_size=[h, w],
            old_size=list(self.grid),
            num_prefix_tokens=self.position_prefix,
            antialias=self.antialias,
        )
        spatial = table[:, self.position_prefix :]
        if time is None:
            positions = spatial.repeat(1, slots, 1)
        else:
            positions = (spatial[:, None] + time).flatten(1, 2)
        return table[:, : self.position_prefix] if self.position_prefix else None, positions

    # timm's interface -------------------------------------------------------------------------

    def forward_features(self, pixels: Tensor, keep_rate: KeepRate = 1.0) -> Tensor:
        """Encode pixels into one tensor, [B, T, 3, H, W] -> [B, 1 + m, D], feature first."""
        tokens = self(pixels, keep_rate)
        return torch.cat([tokens.cls[:, None], tokens.patches], dim=1)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay."""
        learned = {"cls_token", "reg_token", "pos_embed", "pos_temporal", "frame_query"}
        return learned | {"attn_pool.latent"}

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """Enable or disable activation checkpointing of the blocks, or of their MLPs only."""
        self.grad_checkpointing = enable
