"""Text tower: a transformers language model whose hidden states are pooled to one vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.llm_folder import load_llm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALWAYS_MASKED = "sdpa_always_masked"  # attention implementation of the LLM, see `_always_mask`


class TextTower(nn.Module):
    """Language model, optionally with LoRA, whose pooled hidden states encode a caption.

    weights: load the folder's weights; without them, `load_changes` must provide all. Raises
    ConfigError if the model does not support `config.attention` or `config.max_length`.
    """

    def __init__(self, config: TextConfig, folder: Path, weights: bool = True) -> None:
        super().__init__()
        if config.tune == "lora" and not config.lora_rank:
            raise ConfigError("text.tune=lora needs text.lora_rank of at least 1")
        self.llm = load_llm(folder, config.attention, weights, DTYPES[config.dtype])
        if any(parameter.is_meta for parameter in self.llm.parameters()):
            pass  # a model on the meta device cannot run, so its attention cannot be tested
        elif config.attention == "bidirectional":
            check_bidirectional(self.llm)
        elif _attends_to_later_tokens(self.llm):
            raise ConfigError(
                f"{type(self.llm).__name__} has bidirectional attention: set "
                "text.attention=bidirectional"
            )
        _always_mask(self.llm)  # after the tests, which a mask would let a causal model pass
        self.width = _width(self.llm)
        _check_length(self.llm, config.max_length)
        self.pooling = config.pooling
        self.pooler = LatentPooler(self.width, config.latents) if self.pooling == "latent" else None
        self.tunes_base = config.tune == "full"
        if config.lora_rank and config.tune != "full":
            _add_lora(self.llm, config)
        for name, parameter in self.named_parameters():
            trained = config.tune == "full" or (config.tune == "lora" and is_added(name))
            parameter.requires_grad_(trained)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that have an embedding."""
        llm: Any = self.llm
        return int(llm.get_input_embeddings().num_embeddings)

    @property
    def layers(self) -> list[nn.Module]:
        """Transformer layers of the LLM: its outermost list of modules."""
        lists = (list(m) for m in self.llm.modules() if isinstance(m, nn.ModuleList))
        return next(lists, [])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pooled_mask: Tensor) -> Tensor:
        """Encode captions into sentence vectors, each input [..., L] -> [..., width].

        pooled_mask: 1 for the tokens to pool, which leave out padding and the prompt.
        """
        mask, pooled = attention_mask.flatten(0, -2), pooled_mask.flatten(0, -2)
        output = self.llm(input_ids=input_ids.flatten(0, -2), attention_mask=mask)
        return self._pool(output.last_hidden_state, pooled).unflatten(0, input_ids.shape[:-1])

    def _pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Pool hidden states [N, L, D] over the tokens in mask [N, L], -> [N, D].

        With mean and latent pooling, a row without such tokens gives zeros.
        """
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = (positions * mask).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=mask.device), last]
        if self.pooler is not None:
            hidden = self.pooler(hidden)
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def changes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the entries of the tower's state that its base folder does not have."""
        return {name: t for name, t in state.items() if self.tunes_base or is_added(name)}

    def load_changes(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Load the entries that `changes` returned; origin: their source, for the ArtifactError."""
        current = self.state_dict()
        wrong = [k for k in state if k not in current or current[k].shape != state[k].shape]
        missing = [k for k in current if is_added(k) and k not in state]
        if wrong or missing:
            raise ArtifactError(
                f"{origin} does not fit the LLM: {(wrong or missing)[0]} differs; use the "
                "text.llm, text.lora_rank and text.pooling that it was trained with"
            )
        self.tunes_base = self.tunes_base or any(not is_added(k) for k in state)
        self.load_state_dict(dict(state), strict=False)


class LatentPooler(nn.Module):
    """Latent attention of NV-Embed (2405.17428), applied to hidden states before the mean.

    Tokens attend to learned latents, then pass an MLP; both are residual.
    """

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(0.02 * torch.randn(latents, width))
        heads = max(h for h in (8, 4, 2, 1) if width % h == 0)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform hidden states, [N, L, D] -> [N, L, D]."""
        hidden = hidden.to(self.latents.dtype)
        latents = self.latents.expand(len(hidden), -1, -1)
        hidden = hidden + self.attention(hidden, latents, latents, need_weights=False)[0]
        return hidden + self.mlp(hidden)


def merge_lora(llm: nn.Module) -> nn.Module:
    """Merge the LoRA weights into the base weights in fp32, in place, and return the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, m) for name, m in llm.named_modules() if isinstance(m, BaseTunerLayer)]
    if layers:
        llm.float()
    for name, layer in layers:
        layer.merge()
        above, _, child = name.rpartition(".")
        setattr(llm.get_submodule(above), child, layer.get_base_layer())
    return llm


def is_added(name: str) -> bool:
    """Return True if a tower's parameter is not part of the base model."""
    return ".lora_" in name or name.startswith("pooler.")


def check_bidirectional(llm: nn.Module) -> None:
    """Raise ConfigError unless a later token changes earlier hidden states, padded or not."""
    if not _attends_to_later_tokens(llm):
        raise ConfigError(
            f"the attention of {type(llm).__name__} stays causal with is_causal=False: set "
            "text.llm to a model that supports it (Llama, Qwen, Gemma, Mistral, Phi, an encoder), "
            "or set text.attention=causal and text.pooling=last"
        )


@torch.no_grad()
def _attends_to_later_tokens(llm: nn.Module) -> bool:
    """Test if a later token changes earlier hidden states, with padding and without."""
    was_training = llm.training
    llm.eval()
    ids = torch.arange(3, 11)[None]
    other = ids.clone()
    other[0, 5] = 12
    changed = []
    for mask in (torch.ones_like(ids), (torch.arange(8) < 7).long()[None]):
        a, b = (llm(input_ids=x, attention_mask=mask).last_hidden_state for x in (ids, other))
        changed.append(not torch.allclose(a[:, :4], b[:, :4], atol=1e-7))
    llm.train(was_training)
    return all(changed)


@torch.no_grad()
def _width(llm: nn.Module) -> int:
    ids = torch.arange(3, 5)[None]
    # Without a mask, transformers reads the values of the positions: the meta device has none.
    states = llm(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return int(states.shape[-1])


def longest_text(llm: Any) -> int | None:
    """Return the number of tokens that a language model can read, None if it does not say."""
    limit: int | None = getattr(llm.config, "max_position_embeddings", None)
    for name, module in llm.named_modules():  # RoBERTa's positions start after the padding index
        if (
            name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
            and limit is not None
        ):
            limit -= module.padding_idx + 1
    return limit


def _check_length(llm: Any, max_length: int) -> None:
    limit = longest_text(llm)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"text.max_length={max_length} is more than the {limit} tokens that "
            f"{type(llm).__name__} can read: set text.max_length={limit} or less"
        )


def _always_mask(llm: Any) -> None:
    """Make the LLM build its attention mask also for captions without padding.

    To find out if it could leave out the mask, transformers reads the padding mask's values in
    every forward pass, for which the host waits until a GPU has caught up.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def always(*sizes: Any, **options: Any) -> Tensor | None:
        no_skip = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor | None = sdpa_mask(*sizes, **{**options, **no_skip})
        return mask

    if llm.config._attn_implementation == "sdpa" and llm._can_set_attn_implementation():
        AttentionInterface.register(ALWAYS_MASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(ALWAYS_MASKED, always)
        llm.set_attn_implementation(ALWAYS_MASKED)


def _add_lora(llm: nn.Module, config: TextConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) or "all-linear",
    )
    try:
        inject_adapter_in_model(settings, llm)
    except ValueError as error:
        raise ConfigError(f"text.lora_targets={config.lora_targets}: {error}") from error
    for name, parameter in llm.named_parameters():
        if is_added(name):
            parameter.data = parameter.data.float()  # fp32 also if the base model is bf16
