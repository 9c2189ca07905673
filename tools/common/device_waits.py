"""Counter of everything that makes the host wait for a device in a step of training.

Besides the operators that `HostReads` counts, these are waits for the whole device, and on CUDA the
reads of operators that do not dispatch, which torch reports.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from tools.common.host_reads import VALUES, HostRead, HostReads, caller

REPORTED = "reported by torch"
SYNCHRONIZE = "synchronize"
PACKAGES = ("deepspeed", "transformers", "timm", "torch/optim", "torch/nn/utils")


class DeviceWaits(HostReads):
    """Counter of the reads of tensors on a device, of blocking copies to it, and of waits.

    The place of each is in this project, or else in a library of PACKAGES.
    """

    packages = PACKAGES

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self._stack = ExitStack()

    @property
    def counts(self) -> Counter[str]:
        """Number by "file:line operation"."""
        counts = Counter[str]()
        for read, number in self.found.items():
            where = f"{read.place.partition(':')[0]}:{read.line} "
            others = (r for r in self.found if r[1:] == read[1:] and r.operation != REPORTED)
            # torch reports most of the reads that dispatch, too
            if read.operation != REPORTED or not any(others):
                counts[where + read.operation] += number
        return counts

    def __enter__(self) -> DeviceWaits:
        owners: list[Any] = [torch.cuda]
        if "deepspeed.accelerator" in sys.modules:
            owners.append(type(sys.modules["deepspeed.accelerator"].get_accelerator()))
        for owner in owners:
            wait = patch.object(owner, "synchronize", self._waiting(owner.synchronize))
            self._stack.enter_context(wait)
        if self.device == "cuda":
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

    def _waits(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        operation = super()._waits(name, args, kwargs)
        return "" if operation == VALUES else operation  # on a CPU, some tensors belong to the host

    def _waiting(self, wait: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._count(SYNCHRONIZE)
            return wait(*args, **kwargs)

        return counted

    def _warned(self, message: Any, category: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self._count(REPORTED)

    def _count(self, operation: str) -> None:
        self.found[HostRead(operation, *caller(self.packages))] += 1
