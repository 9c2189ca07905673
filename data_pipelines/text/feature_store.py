"""Store of text features: a vector for each caption of a source, by `xray data text-features`.

Equal captions share one vector, which is stored in the first shard that has the caption. The store
is a sidecar. The table of a shard has these vectors and, for each member, the positions of the
vectors of its captions. A position is `shard << 32 | row`.
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
from xray.errors import BadSample, ConfigError, DataError

Stored = Literal["fp32", "bf16", "int8"]
KIND = "text-features"
ROW_BITS = 32
# Settings of the text encoder that facts leave out: the values of older stores, which lack them.
USUAL = {"precision": "fp32", "pool_prompt": False, "pool_special": True, "padding": "longest"}


def store_facts(
    source: Source, identity: Mapping[str, Any], captions: Mapping[str, float], stored: Stored
) -> dict[str, Any]:
    """Return the settings that a store depends on: text encoder, captions, format and shards."""
    settings = {"captions": list(captions or FIELDS), "features": stored}
    return {**identity, **settings, "shards": source.manifest.digest}


def store_name(facts: Mapping[str, Any]) -> str:
    """Return the name of the sidecar of a store."""
    return f"{KIND}-{hash_json(dict(facts))[:12]}"


@dataclass(frozen=True)
class TextStore:
    """Stored vectors of the captions of a source, [W] each."""

    sidecar: Sidecar

    @property
    def width(self) -> int:
        """Number of dimensions W; raises DataError if the vectors have another."""
        width, vectors = self.sidecar.facts["width"], self.sidecar.table(0)["vectors"]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            path = self.sidecar.source.derived(self.sidecar.name)
            raise DataError(f"{path} has width={width}, its vectors have {vectors.shape[1:]}")
        return int(width)

    @property
    def digest(self) -> str:
        """Digest of all vectors."""
        return self.sidecar.digest

    def vectors(self, shard: int, member: int, captions: Sequence[int]) -> np.ndarray:
        """Return the vectors of captions of a member, [C, W] float32; raises DataError.

        Raises BadSample for captions that were not read when the store was made.
        """
        positions = self.sidecar.row(shard, member, "places")
        if max(captions) >= len(positions):
            raise BadSample("caption without a stored vector", self.sidecar.name)
        return np.stack([self._vector(int(positions[caption])) for caption in captions])

    def _vector(self, position: int) -> np.ndarray:
        shard, row = divmod(position, 1 << ROW_BITS)
        if shard < len(self.sidecar.counts):
            table = self.sidecar.table(shard)
            if row < len(table["vectors"]):
                vector = unpacked(table["vectors"][row], table["scales"][row : row + 1])
                if np.isfinite(vector).all():
                    return vector
        path = self.sidecar.source.derived(self.sidecar.name, shard)
        raise DataError(
            f"{path} is damaged: delete it, and run xray data text-features to write it again"
        )


def packed(vectors: np.ndarray, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """Convert vectors [U, W] float32 to the stored format: (values [U, W], scales [U] float32).

    int8 is scaled so that the largest absolute value of each row is 127.
    """
    scales = np.ones(len(vectors), np.float32)
    if stored == "fp32":
        return vectors.astype(np.float32), scales
    if stored == "int8":
        scales = np.maximum(np.abs(vectors).max(axis=1, initial=0.0), 1e-30) / 127
        return np.round(vectors / scales[:, None]).astype(np.int8), scales.astype(np.float32)
    bits = vectors.astype(np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # round to nearest bfloat16, ties to even
    return (rounded >> 16).astype(np.uint16), scales


def unpacked(vector: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Convert a stored vector [W] to float32."""
    if vector.dtype == np.uint16:
        return (vector.astype(np.uint32) << 16).view(np.float32)
    return vector.astype(np.float32) * scale


def open_store(source: Source, facts: Mapping[str, Any]) -> TextStore:
    """Open the store of a source with these settings; raises ConfigError if there is none."""
    sidecar = open_sidecar(source, store_name(facts))
    if sidecar is not None:
        return TextStore(sidecar)
    wanted = {**USUAL, **facts}
    stores = ({**USUAL, **other} for other in _all(source))
    others = [differences({key: store.get(key) for key in wanted}, wanted) for store in stores]
    reason = "it has none"
    if [] in others:
        reason = f"{source.derived(store_name(facts))} is missing"
    elif others:
        closest = min(others, key=len)
        more = f" (and {len(closest) - 1} more)" if len(closest) > 1 else ""
        reason = f"the most similar has {closest[0]}{more}"
    raise ConfigError(
        f"no stored text features of source {source.name!r} fit this run and its current shards: "
        f"{reason}; write them with xray data text-features and the same text settings, or set "
        "text.features=live"
    )


def has_store_of_other_model(source: Source, facts: Mapping[str, Any]) -> bool:
    """Check if another language model has a store that agrees in everything else."""
    others = (other for other in _all(source) if other.get("llm") != facts["llm"])
    return any(other | {"llm": ""} == {**facts, "llm": ""} for other in others)


def note_store(source: Source, facts: Mapping[str, Any]) -> None:
    """Add a store to the list of stores of a source; `open_store` compares with this list."""
    others = [other for other in _all(source) if other != facts]
    save_columns(source.derived(KIND), {}, {"stores": [*others, dict(facts)]})


def _all(source: Source) -> list[dict[str, Any]]:
    """Return the settings of all stores of a source."""
    return list(open_first(source.derived_at(KIND), {})[1].get("stores", []))
