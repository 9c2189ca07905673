"""Weighted means of parts of artifacts, read and written one tensor at a time."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from xray.artifacts.artifact import Artifact
from xray.artifacts.shards import header_bytes
from xray.errors import ArtifactError
from xray.files import usual_mode

Members = Sequence[tuple[Artifact, float]]  # artifacts with their weights, which are above 0
LORA = re.compile(r"\.lora_(?:embedding_)?([AB])\b")  # a factor: A [r, in] or B [out, r]
BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}


class MixedPart:
    """Weighted mean of one part of several artifacts, computed while it is written.

    Equal parts, and a member of weight 1, are copied bit for bit. The mean of LoRA updates, which
    are products B A, is not the product of the factors' means: it is a LoRA with the factors of all
    members, of a rank that is the sum of theirs (`ranks` times as high).
    """

    def __init__(self, name: str, members: Members) -> None:
        self.name = name
        equal = len({artifact.manifest["files"][self.file] for artifact, _ in members}) == 1
        self.members = [(members[0][0], 1.0)] if equal else list(members)
        self.described: Mapping[str, Any] = members[0][0].manifest["tensors"][name]

    @property
    def file(self) -> str:
        """Name of the part's file."""
        return f"{self.name}.safetensors"

    @property
    def ranks(self) -> int:
        """Factor of the rank of a LoRA in this part."""
        return len(self.members) if any(map(LORA.search, self.described)) else 1

    def save(self, path: Path) -> None:
        """Write the part's file; at most two tensors of each member are in memory."""
        if len(self.members) == 1:
            shutil.copyfile(self.members[0][0].file(self.file), path)
            return
        # the order in which safetensors writes: wide types first
        names = sorted(self.described, key=lambda name: (-self._bytes(name), name))
        with usual_mode(path), path.open("wb") as file:
            file.write(self._header(names))
            for name in names:
                file.write(raw(mixed(name, [*self._tensors(name)])))

    def _bytes(self, name: str) -> int:
        kind = self.described[name]["dtype"]
        if kind not in BYTES:
            raise ArtifactError(f"{self.file}: {name} is stored as {kind}, which cannot be merged")
        return BYTES[kind]

    def _header(self, names: Sequence[str]) -> bytes:
        """Return the length and the header of a safetensors file."""
        header = dict[str, Any]()
        end = 0
        for name in names:
            shape, start = self._shape(name), end
            end += math.prod(shape) * self._bytes(name)
            kind = self.described[name]["dtype"]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        return header_bytes(header)

    def _shape(self, name: str) -> list[int]:
        shape = list(self.described[name]["shape"])
        factor = LORA.search(name)
        if factor is not None:
            shape["AB".index(factor[1])] *= self.ranks
        return shape

    def _tensors(self, name: str) -> Iterator[tuple[Tensor, float]]:
        """Yield a tensor of each member; its file is mapped only as long as the tensor is used."""
        for artifact, weight in self.members:
            with safe_open(artifact.file(self.file), framework="pt") as file:
                yield file.get_tensor(name), weight


def mixed(name: str, tensors: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Compute the weighted mean of a tensor in fp32, or put the factors of a LoRA side by side.

    Raises ArtifactError for numbers that have no mean (integers, booleans) and differ.
    """
    first = tensors[0][0]
    factor = LORA.search(name)
    if factor is not None and factor[1] == "A":
        return torch.cat([tensor for tensor, _ in tensors], dim=0)
    if factor is not None:
        return torch.cat([_scaled(tensor, weight) for tensor, weight in tensors], dim=1)
    if all(torch.equal(tensor, first) for tensor, _ in tensors[1:]):
        return first
    if not first.is_floating_point():
        raise ArtifactError(f"{name} holds {first.dtype}, and differs: it cannot be averaged")
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
    for tensor, weight in tensors:
        total.add_(tensor, alpha=weight)
    return total.to(first.dtype)


def _scaled(tensor: Tensor, weight: float) -> Tensor:
    return (tensor.float() * weight).to(tensor.dtype)


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, not copied if it is contiguous."""
    values: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
