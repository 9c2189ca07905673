"""Counts reads of tensors by the host, and waits for the device, by their place in the code.

On CUDA such a read waits until the device has computed the value, and the device then waits for the
host. Reads inside operators count, which tracing of Python calls would miss.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
# Operators whose result, or the shape of it, depends on values.
READS = {
    "_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
REPORTED = "reported by torch"
PACKAGES = ("deepspeed", "transformers", "timm", "torch/optim", "torch/nn/utils")


class DeviceWaits(TorchDispatchMode):
    """Counter of the reads of tensors on a device, of blocking copies to it, and of waits.

    counts: number by "file:line operator". The file is the innermost one of this project, or else
    of a library in PACKAGES.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.counts = device, Counter[str]()
        self._stack = ExitStack()

    def __enter__(self) -> DeviceWaits:
        owners: list[Any] = [torch.cuda]
        if "deepspeed.accelerator" in sys.modules:
            owners.append(type(sys.modules["deepspeed.accelerator"].get_accelerator()))
        for owner in owners:
            wait = patch.object(owner, "synchronize", self._waiting(owner.synchronize))
            self._stack.enter_context(wait)
        if self.device.type == "cuda":  # reports reads by operators that do not dispatch
            self._stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            self._stack.enter_context(patch.object(warnings, "showwarning", self._warned))
            torch.cuda.set_sync_debug_mode("warn")
            self._stack.callback(torch.cuda.set_sync_debug_mode, "default")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        for key in list(self.counts):  # torch reports most of the reads that dispatch, too
            where, _, what = key.partition(" ")
            others = (k for k in self.counts if k != key and k.startswith(f"{where} "))
            if what == REPORTED and any(others):
                del self.counts[key]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = self._name_of_read(function, args, kwargs or {})
        if name:
            self.counts[f"{place()} {name}"] += 1
        return function(*args, **(kwargs or {}))

    def _name_of_read(self, function: Any, args: tuple[Any, ...], kwargs: Any) -> str:
        """Return the name of an operator that makes the host wait, "" for all others."""
        name = function._schema.name.removeprefix("aten::")
        tensors = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        here = any(tensor.device.type == self.device.type for tensor in tensors)
        if name in READS:
            return name if here else ""
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
            return f"{name} by a mask" if here and masks else ""
        if self.device.type == "cuda" and name in ("_to_copy", "copy_") and tensors:
            from_, to = (tensors[1], tensors[0]) if name == "copy_" else (tensors[0], None)
            target = to.device if to is not None else kwargs.get("device") or from_.device
            if torch.device(target).type == from_.device.type:
                return ""
            free = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
            if not free or (from_.device.type == "cpu" and not from_.is_pinned()):
                return f"copy {from_.device.type} to {torch.device(target).type}"
        return ""

    def _waiting(self, wait: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[f"{place()} synchronize"] += 1
            return wait(*args, **kwargs)

        return counted

    def _warned(self, message: Any, category: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.counts[f"{place()} {REPORTED}"] += 1


def place() -> str:
    """Return "file:line" of the innermost caller in this project or a library of PACKAGES."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == Path(__file__):
            continue
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
        inside = frame.filename.rpartition("site-packages/")[2]
        if inside.startswith(PACKAGES):
            return f"{inside}:{frame.lineno}"
    return "elsewhere"
