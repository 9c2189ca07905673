"""Sentence vectors of a source's captions, written once by `xray data text-features`.

A sidecar: per member, the places of its captions' vectors (shard << 32 | row); per shard, the
vectors of the captions that are met there first. Equal captions share one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipelines.shards.columns import open_first, save_columns
from data_pipelines.shards.sidecar import Sidecar, open_sidecar
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import FIELDS
from xray.config.identity import differences, hash_json
from xray.errors import ConfigError, DataError

Stored = Literal["fp32", "bf16", "int8"]
KIND = "text-features"
ROW_BITS = 32


def store_facts(
    source: Source, identity: Mapping[str, Any], captions: Mapping[str, float], stored: Stored
) -> dict[str, Any]:
    """All that a store depends on: shards, whose numbers are in it, language side and format."""
    own = {"captions": list(captions or FIELDS), "features": stored}
    return {**identity, **own, "shards": source.manifest.digest}


def store_name(facts: Mapping[str, Any]) -> str:
    """The sidecar's name."""
    return f"{KIND}-{hash_json(dict(facts))[:12]}"


@dataclass(frozen=True)
class TextStore:
    """The stored vectors of a source's captions, [W] each."""

    sidecar: Sidecar

    @property
    def width(self) -> int:
        return int(self.sidecar.facts["width"])

    @property
    def digest(self) -> str:
        return self.sidecar.digest

    def vectors(self, shard: int, member: int, captions: Sequence[int]) -> np.ndarray:
        """Of some of a member's captions by their numbers, [C, W] float32."""
        places = self.sidecar.row(shard, member, "places")
        return np.stack([self._vector(int(places[caption])) for caption in captions])

    def _vector(self, place: int) -> np.ndarray:
        where, row = divmod(place, 1 << ROW_BITS)
        if where < len(self.sidecar.counts):
            table = self.sidecar.table(where)
            if row < len(table["vectors"]):
                found = unpacked(table["vectors"][row], table["scales"][row : row + 1])
                if np.isfinite(found).all():
                    return found
        broken = self.sidecar.source.derived(self.sidecar.name, where)
        raise DataError(
            f"{broken} is damaged: delete it, and xray data text-features writes it again"
        )


def packed(vectors: np.ndarray, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """[U, W] float32 -> what is stored of it, and a scale per row (int8: the largest is 127)."""
    scales = np.ones(len(vectors), np.float32)
    if stored == "fp32":
        return vectors.astype(np.float32), scales
    if stored == "int8":
        scales = np.maximum(np.abs(vectors).max(axis=1, initial=0.0), 1e-30) / 127
        return np.round(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)
    bits = vectors.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to the nearest bfloat16, ties to even
    return (rounded >> 16).astype(np.uint16), scales


def unpacked(vector: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """A stored vector [W] as float32."""
    if vector.dtype == np.uint16:
        return (vector.astype(np.uint32) << 16).view(np.float32)
    return vector.astype(np.float32) * scale


def open_store(source: Source, facts: Mapping[str, Any]) -> TextStore:
    """A source's store; raises ConfigError that says what the nearest one differs in."""
    found = open_sidecar(source, store_name(facts))
    if found is not None:
        return TextStore(found)
    wanted = dict(facts)
    near = [
        differences({key: theirs.get(key) for key in wanted}, wanted) for theirs in _all(source)
    ]
    reason = "it has none"
    if [] in near:
        reason = f"{source.derived(store_name(facts))} is gone"
    elif near:
        closest = min(near, key=len)
        more = f" (and {len(closest) - 1} more)" if len(closest) > 1 else ""
        reason = f"the nearest has {closest[0]}{more}"
    raise ConfigError(
        f"no stored text features of source {source.name!r}, as its shards are now, fit this run: "
        f"{reason}; write them with xray data text-features and the same text settings, or set "
        "text.features=live"
    )


def note_store(source: Source, facts: Mapping[str, Any]) -> None:
    """Add a store to the list of a source's, from which a refusal takes its reason."""
    others = [theirs for theirs in _all(source) if theirs != facts]
    save_columns(source.derived(KIND), {}, {"stores": [*others, dict(facts)]})


def _all(source: Source) -> list[dict[str, Any]]:
    """The facts of all stores of a source's shards."""
    return list(open_first(source.derived_at(KIND), {})[1].get("stores", []))
