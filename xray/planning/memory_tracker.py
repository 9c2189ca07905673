"""Counts bytes of live tensors and FLOPs while code runs on fake tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# The CPU's attention has the FLOPs of the GPU's; torch counts it from 2.15 on.
FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    **flop_registry,
}


class LiveBytes(TorchDispatchMode):
    """Counts bytes from allocation to release, by the kind of allocation.

    Fake tensors have no values: `item()` gives 0, and a mask that selects rows is assumed to select
    as many rows as it has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"  # of the next allocations
        self.live: dict[str, int] = {}  # bytes by kind
        self.peak: dict[str, int] = {}  # `live` when its sum was highest
        self.bare: dict[str, int] = {}  # the same without gradients
        self.flops = 0  # as torch counts them: 2 per multiply-add
        self._sizes: dict[int, tuple[str, int]] = {}

    def reset(self) -> None:
        """Begin a new peak and a new count of FLOPs."""
        self.flops = 0
        self.peak, self.bare = dict(self.live), _without_gradients(self.live)

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, or move it to a kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            if kind is None:
                return
            self._drop(key)
        else:
            weakref.finalize(storage, self._free, key)
        self._sizes[key] = kind or self.kind, storage.nbytes()
        self.live[kind or self.kind] = self.live.get(kind or self.kind, 0) + storage.nbytes()
        if sum(self.live.values()) > sum(self.peak.values()):
            self.peak = dict(self.live)
        bare = _without_gradients(self.live)
        if sum(bare.values()) > sum(self.bare.values()):
            self.bare = bare

    def _free(self, key: int) -> None:
        if key in self._sizes:
            self._drop(key)

    def _drop(self, key: int) -> None:
        kind, size = self._sizes.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is aten._local_scalar_dense.default:
            return 0
        if function is aten.index.Tensor and _is_mask(args[1]):
            result = args[0].new_empty(len(args[1][0]), *args[0].shape[args[1][0].ndim :])
        else:
            result = function(*args, **(kwargs or {}))
        count = FLOPS.get(function._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        tree_map_only(Tensor, self.add, result)
        return result


def _without_gradients(live: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in live.items() if kind != "gradients"}


def _is_mask(indices: Any) -> bool:
    return indices[0] is not None and indices[0].dtype == torch.bool


def materialize(module: nn.Module) -> None:
    """Replace a module's meta tensors by uninitialised CPU tensors, or fake ones under
    FakeTensorMode."""
    made: dict[int, Tensor] = {}

    def like(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            is_parameter = isinstance(old, nn.Parameter)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if is_parameter else new
        return made[id(old)]

    for part in module.modules():
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for tensors in places:
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = like(value)
