"""LoRA on the attention of the image tower: low-rank updates, merged into plain weights at export.

The language model's LoRA is peft's (text_tower.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.models.backbone import VisionBackbone


class LoraLinear(nn.Linear):
    """Linear layer with a low-rank update: W x + b + alpha / rank * B A x (LoRA, 2106.09685).

    It takes over W and b of `base` with their names; A and B are `lora_a` [rank, in] and `lora_b`
    [out, rank]. B starts as zeros, so that the output is that of `base`.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, "meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as torch starts a linear layer

    def forward(self, input: Tensor) -> Tensor:
        """Apply layer and update, [..., in] -> [..., out]."""
        low = F.linear(input, self.lora_a) * self.scale
        return F.linear(input, self.weight, self.bias) + F.linear(low, self.lora_b)


def add_lora(vision: VisionBackbone, rank: int, alpha: float) -> None:
    """Replace the linear layers of each block's attention by ones with LoRA, in place."""
    for block in vision.blocks.children():
        attention: nn.Module = block.get_submodule("attn")
        for name, layer in list(attention.named_children()):
            if type(layer) is nn.Linear:
                setattr(attention, name, LoraLinear(layer, rank, alpha))


def is_lora(name: str) -> bool:
    """Return True for the name of a LoRA matrix of the image tower."""
    return name.endswith((".lora_a", ".lora_b"))


def merged(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a module's state dict with its LoRA added to the weights: the state without LoRA."""
    plain = dict(state)
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLinear):
            a, b = plain.pop(f"{name}.lora_a"), plain.pop(f"{name}.lora_b")
            weight = plain[f"{name}.weight"]
            plain[f"{name}.weight"] = torch.addmm(weight, b, a, alpha=layer.scale)
    return plain
