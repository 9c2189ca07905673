"""Table of parameter names in two libraries, read in both directions.

An entry is (ours, theirs) or (ours, theirs, form). A name is of a tensor or of a module, for which
its weight and bias are meant; `*` is the number of a block. Several names, separated by spaces, are
tensors that the other side holds as one, in this order along the first dimension; `kv*2` takes two
shares of it. Forms of a tensor:

    1, 11   ours has one or two leading dimensions of size 1 more: [1, N, D] for [N, D]
    t       ours is the transpose: [E, D] for [D, E]
    patch   ours is a kernel for pixels, theirs a matrix: [D, 3, p, p] for [D, p * p * 3]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

LEAVES = ("", ".weight", ".bias")


class Entry(NamedTuple):
    """Names of the same weights on both sides, and the form of ours."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: str = ""


class Renamed(NamedTuple):
    """Renamed tensors, the names that the table does not have, and those beside which one lacks."""

    state: dict[str, Tensor]
    unknown: list[str]
    missing: list[str]  # of several that the other side holds as one


class Names:
    """Names of a family's parameters. ignored: regular expression of theirs that have no use."""

    def __init__(self, *entries: tuple[str, ...], ignored: str = "") -> None:
        self.entries = [
            Entry(tuple(ours.split()), tuple(theirs.split()), *form)
            for ours, theirs, *form in entries
        ]
        self.ignored = re.compile(ignored or r"(?!)")

    def to_ours(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename another library's tensors to ours."""
        left = {name: tensor for name, tensor in state.items() if not self.ignored.match(name)}
        entries = [(own.theirs, own.ours, own.form) for own in self.entries]
        return _rename(left, entries, forward=True)

    def to_theirs(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename our tensors to another library's."""
        entries = [(own.ours, own.theirs, own.form) for own in self.entries]
        return _rename(dict(state), entries, forward=False)

    def theirs(self, name: str, prefix: str = "") -> str:
        """Return another library's name of our tensor, ours if the table does not have it.

        prefix: of theirs. Several of theirs that are one of ours are joined by " + ".
        """
        for entry in self.entries:
            for own in entry.ours:
                pattern = re.escape(_plain(own)).replace(r"\*", r"(\d+)")
                match = re.fullmatch(rf"{pattern}({'|'.join(map(re.escape, LEAVES))})", name)
                if match:
                    leaf, block = match.groups()[-1], match.groups()[0]
                    found = [_plain(other).replace("*", block) for other in entry.theirs]
                    return " + ".join(f"{prefix}{other}{leaf}" for other in found)
        return name


def _rename(
    left: dict[str, Tensor],
    entries: Iterable[tuple[tuple[str, ...], tuple[str, ...], str]],
    forward: bool,
) -> Renamed:
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    for source, target, form in entries:
        for old, new in _pairs(left, source, target):
            if lacking := [name for name in old if name not in left]:
                missing += lacking
                continue
            tensors = [left.pop(name) for name in old]
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            shaped = _formed(joined, form) if forward else _unformed(joined, form)
            parts = [shaped]
            if len(new) > 1:  # copies: tensors of a file share no memory
                parts = [part.clone() for part in shaped.split(_sizes(len(shaped), target))]
            state |= zip(new, parts, strict=True)
    return Renamed(state, sorted(left), missing)


def _pairs(
    state: Mapping[str, Tensor], source: tuple[str, ...], target: tuple[str, ...]
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield (old names, new names) of every block and leaf of which `state` has an old name."""
    old, new = ([_plain(name) for name in names] for names in (source, target))
    for block in _blocks(state, old[0]):
        for leaf in LEAVES:
            there = [name.replace("*", block) + leaf for name in old]
            if any(name in state for name in there):
                yield there, [name.replace("*", block) + leaf for name in new]


def _blocks(state: Mapping[str, Tensor], name: str) -> list[str]:
    """List the numbers that stand for `*` in a name; one empty number for a name without it."""
    before, star, _ = name.partition("*")
    if not star:
        return [""]
    numbers = (key[len(before) :].partition(".")[0] for key in state if key.startswith(before))
    return sorted({number for number in numbers if number.isdigit()}, key=int)


def _plain(name: str) -> str:
    """Remove the number of shares from a name."""
    return re.sub(r"\*\d$", "", name)


def _sizes(total: int, names: tuple[str, ...]) -> list[int]:
    shares = [int(name[-1]) if re.search(r"\*\d$", name) else 1 for name in names]
    return [total * share // sum(shares) for share in shares]


def _formed(tensor: Tensor, form: str) -> Tensor:
    """Bring their tensor to our shape."""
    if form == "t":
        return tensor.t()
    if form == "patch":
        if tensor.ndim != 2:  # the bias
            return tensor
        side = math.isqrt(tensor.shape[1] // 3)
        return tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    return tensor.reshape(*(1,) * len(form), *tensor.shape)


def _unformed(tensor: Tensor, form: str) -> Tensor:
    """Bring our tensor to their shape."""
    if form == "t":
        return tensor.t()
    if form == "patch":
        return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor
    return tensor.reshape(tensor.shape[len(form) :])
