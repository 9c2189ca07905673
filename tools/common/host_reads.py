"""Counter of the operations that make the host wait for a GPU.

On the CPU it counts what would wait if all tensors were on a GPU. On CUDA, real or fake, it also
counts copies between host and device that block. `.cpu()`, `.tolist()` and `.numpy()` of a CPU
tensor call no operator: only CUDA tensors show them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
# Operators whose result, or its shape, depends on values.
READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select"),
    *("bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive"),
    "repeat_interleave.Tensor",
}
VALUES = "a tensor of Python values"


class HostRead(NamedTuple):
    """An operation that waits, and the innermost line of this project that caused it."""

    operation: str
    place: str  # file:function
    line: int


class HostReads(TorchDispatchMode):
    """Counter of host reads of tensors on one type of device, while it is entered."""

    packages: tuple[str, ...] = ()  # libraries in which a place is looked for, too

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: Counter[HostRead] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        operation = self._waits(name, args, kwargs or {})
        if operation:
            self.found[HostRead(operation, *caller(self.packages))] += 1
        return func(*args, **(kwargs or {}))

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Name the operation if it makes the host wait for the device, otherwise return ""."""
        if name in READS:
            return name if self._on(args[0]) else ""
        if name == "lift_fresh" and self.device == "cpu":
            return VALUES  # on CUDA it is the copy that waits
        if name in ("index.Tensor", "index_put_", "index_put", "_index_put_impl_"):
            return self._index(args)
        if name in ("_to_copy", "copy_"):
            return self._copy(name, args, kwargs)
        return ""

    def _index(self, args: Sequence[Any]) -> str:
        indices = [index for index in args[1] if index is not None]
        fills = len(args) > 2 and args[2].numel() == 1 and len(indices) == 1  # is masked_fill
        if not self._on(args[0]) or fills:
            return ""
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "index with a mask"
        return "" if all(self._on(index) for index in indices) else "index from the host"

    def _copy(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        source = args[1] if name == "copy_" else args[0]
        to = args[0].device if name == "copy_" else kwargs.get("device") or source.device
        ends = {source.device.type, torch.device(to).type}
        if ends != {"cpu", self.device} or self.device == "cpu":
            return ""
        waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        # a copy from memory that is not pinned goes through a buffer that the host fills
        waits = waits or (source.device.type == "cpu" and not is_pinned(source))
        return f"copy {source.device.type} -> {torch.device(to).type}" if waits else ""

    def _on(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device.type == self.device


def is_pinned(tensor: Tensor) -> bool:
    """Return True for a tensor in pinned memory, or a fake one with the attribute `pinned`."""
    return bool(getattr(tensor, "pinned", False)) or tensor.is_pinned()


def caller(packages: tuple[str, ...] = ()) -> tuple[str, int]:
    """Find the innermost function of this project outside the counter: file:function, and line.

    packages: libraries whose functions count as well, by the start of their paths.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        library = file.rpartition("site-packages/")[2]
        ours = library == file and Path(file).is_relative_to(ROOT)
        if ours and not isinstance(frame.f_locals.get("self"), HostReads):
            return f"{Path(file).relative_to(ROOT)}:{function}", frame.f_lineno
        if library != file and library.startswith(packages):
            return f"{library}:{function}", frame.f_lineno
        frame = frame.f_back
    return "outside this project", 0
