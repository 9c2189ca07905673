"""Page-locked host memory, to which a GPU copies values while it computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

from xray.errors import ConfigError, brief


class HostBuffer:
    """Page-locked host memory for a number of fp32 values, used again after each `clear`.

    Raises ConfigError if the memory cannot be locked.
    """

    def __init__(self, values: int, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._copied: torch.cuda.Event | None = None
        self._used = 0
        try:
            self._memory = torch.empty(max(1, values), dtype=torch.float32)
            pin_memory(self._memory.data_ptr(), self._memory.nbytes)
        except RuntimeError as error:
            raise ConfigError(
                f"train.save_in_background needs {4e-9 * values:.3g} GB of page-locked host memory "
                f"for this process: {brief(error)}; set train.save_in_background=false"
            ) from error

    def clear(self) -> None:
        """Give up the copies that were made."""
        self._used = 0

    def keep(self, value: Tensor) -> Tensor:
        """Start to copy a value; the copy is complete after `wait`, at once for one on the host."""
        kept = self._memory[self._used : self._used + value.numel()].view(value.shape)
        self._used += value.numel()
        if not value.is_cuda:
            return kept.copy_(value)
        self.wait()  # so that no more than two values are on the device
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            kept.copy_(value, non_blocking=True)
        value.record_stream(self._stream)
        self._copied = self._stream.record_event()
        return kept

    def wait(self) -> None:
        """Wait for the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Release the memory."""
        self.wait()
        unpin_memory(self._memory.data_ptr())
