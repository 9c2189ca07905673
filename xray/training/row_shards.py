"""Parameters whose rows are divided over ranks: each rank trains its own, and no other has them.

A module names them in `sharded`. They are whole again in checkpoints and artifacts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor, nn

from xray import dist


def sharded_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's sharded parameters, by name, before they are divided.

    With one process, or for fewer rows than processes, a parameter stays whole.
    """
    names, world = getattr(module, "sharded", ()), dist.world_size()
    parameters = ((name, p) for name, p in module.named_parameters() if name in names)
    return {name: p.shape for name, p in parameters if 1 < world <= len(p)}


def keep_own_rows(module: nn.Module, names: Iterable[str]) -> None:
    """Remove the rows of other ranks from a module's parameters of these names."""
    for name in names:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data[dist.rows_of(dist.rank(), len(parameter))].clone()


def first_value(shape: torch.Size) -> int:
    """Return the offset of this rank's rows in the flattened parameter of a shape."""
    return dist.rows_of(dist.rank(), shape[0]).start * shape[1:].numel()


def all_rows(own: Tensor, shape: torch.Size) -> Tensor:
    """Return the rows of all ranks on the CPU; collective.

    The device holds the rows of one other rank at a time.
    """
    whole = torch.empty(shape, dtype=own.dtype)
    for number in range(dist.world_size()):
        place = dist.rows_of(number, shape[0])
        part = own.contiguous()
        if number != dist.rank():
            part = own.new_empty(place.stop - place.start, *shape[1:])
        torch.distributed.broadcast(part, src=number)
        whole[place] = part.cpu()
    return whole
