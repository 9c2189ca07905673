"""Stored sentence vectors of all captions of a source; each distinct caption is encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipelines.curation.balance import hash_texts
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.process_pool import Progress as Results
from data_pipelines.shards.sidecar import (
    Sidecar,
    finish_sidecar,
    open_whole,
    pack_rows,
    save_table,
    saved_table,
    write_sidecar,
)
from data_pipelines.shards.source import Source
from data_pipelines.text.captions import find_captions
from data_pipelines.text.feature_store import ROW_BITS, note_store, packed, store_facts, store_name
from xray.artifacts.language_model import Language
from xray.config import Features, TextConfig
from xray.config.identity import hash_json
from xray.errors import ConfigError, DataError
from xray.models.inference import autocast, one_behind
from xray.models.text_tower import TextTower
from xray.precompute.inference import Progress


@dataclass
class TextFeaturesConfig(TextConfig):
    """Text section, and how captions are read and vectors are stored."""

    features: Features = "bf16"
    captions: dict[str, float] = field(default_factory=dict)  # json fields, if not the default ones
    batch_size: int = 256
    workers: int = 2

    def validate(self) -> None:
        """Check all values; raises ConfigError that names the key to change."""
        super().validate()
        if self.features == "live":
            raise ConfigError("features=live stores nothing: use bf16, int8 or fp32")
        if self.batch_size < 1 or self.workers < 0:
            raise ConfigError("batch_size must be at least 1, and workers at least 0")


@dataclass(frozen=True)
class CaptionIds:
    """Caption ids by shard: 64 bits of a hash. Among 10^9 captions, a collision has probability
    1/40."""

    source: Source
    captions: dict[str, float]

    def __call__(self, shard: int) -> Columns:
        rows = [np.empty(0, np.int64)] * len(self.source.index(shard))
        for member, texts in self.texts(shard):
            rows[member] = hash_texts(texts)
        ids, ends = pack_rows(rows, np.int64)
        return {"ids": ids, "ends": ends}

    def texts(self, shard: int) -> Iterator[tuple[int, list[str]]]:
        """Yield (member, captions) of members that have any."""
        for member in range(len(self.source.index(shard))):  # all members, of any modality
            captions = find_captions(self.source, shard, member, self.captions)
            if captions:
                yield member, captions


@dataclass(frozen=True)
class Layout:
    """Shard and row of each caption's vector.

    places: [T] int64, shard << 32 | row, in the order of shards. first: [T] bool, first use of a
    caption. starts: [S + 1] offsets of the shards in both.
    """

    places: np.ndarray
    first: np.ndarray
    starts: np.ndarray

    @property
    def unique(self) -> int:
        return int(self.first.sum())

    def part(self, values: np.ndarray, shard: int) -> np.ndarray:
        return values[self.starts[shard] : self.starts[shard + 1]]


def lay_out(ids: Sidecar) -> Layout:
    """Assign each distinct caption a row of the first shard that has it; ~75 bytes per caption."""
    shards = range(len(ids.counts))
    tables = [np.asarray(ids.table(shard)["ids"]) for shard in shards]
    starts = np.cumsum([0, *(len(table) for table in tables)], dtype=np.int64)
    whole = np.concatenate([np.empty(0, np.int64), *tables])
    _, at, inverse = np.unique(whole, return_index=True, return_inverse=True)
    first = np.zeros(len(whole), bool)
    first[at] = True
    before = np.cumsum(first) - first  # distinct captions before this one
    shard = np.searchsorted(starts, at, side="right") - 1
    row = before[at] - before[starts[shard]] if len(at) else at
    return Layout(((shard << ROW_BITS) | row)[inverse], first, starts)


def write_text_features(
    source: Source,
    language: Language,
    config: TextFeaturesConfig,
    device: torch.device,
    progress: Progress | None = None,
    reading: Results | None = None,
) -> Sidecar:
    """Write the store of a source's captions, or open it; its facts count the distinct ones.

    Each shard is written when its captions are encoded, so a second call continues. Raises
    DataError if there is no caption.
    """
    assert config.features != "live"
    facts = store_facts(source, language.identity(), config.captions, config.features)
    name = store_name(facts)
    sidecar = open_whole(source, name)
    if sidecar is not None:
        return sidecar
    work = CaptionIds(source, config.captions)
    fields = hash_json(list(config.captions))
    of_ids = f"caption-ids-{fields[:12]}"
    ids = open_whole(source, of_ids) or write_sidecar(
        source, of_ids, work, {"kind": "caption-ids"}, config.workers, reading
    )
    layout = lay_out(ids)
    if not layout.unique:
        raise DataError(f"source {source.name!r} has no caption")
    tower = language.build().eval().to(device)
    todo = [s for s in range(len(ids.counts)) if saved_table(source, name, s) is None]
    done = layout.unique - sum(int(layout.part(layout.first, shard).sum()) for shard in todo)
    for shard in todo:
        texts = [text for _, own in work.texts(shard) for text in own]
        new = [texts[n] for n in np.flatnonzero(layout.part(layout.first, shard))]
        rows = [np.empty((0, tower.width), np.float32)]
        for vectors in _encoded(language, tower, new, config):
            rows.append(vectors)
            done += len(vectors)
            if progress is not None:
                progress(done, layout.unique)
        table = {"ends": ids.table(shard)["ends"], "places": layout.part(layout.places, shard)}
        table["vectors"], table["scales"] = packed(np.concatenate(rows), config.features)
        save_table(source, name, shard, table)
    whole = {**facts, "width": tower.width, "captions_stored": layout.unique}
    sidecar = finish_sidecar(source, name, whole)
    note_store(source, facts)
    return sidecar


@torch.no_grad()
def _encoded(
    language: Language, tower: TextTower, texts: Sequence[str], config: TextFeaturesConfig
) -> Iterator[np.ndarray]:
    """Yield sentence vectors [n, W] float32 in order; captions of similar length are batched."""
    device, size = next(tower.parameters()).device, config.batch_size
    for start in range(0, len(texts), 16 * size):
        part = texts[start : start + 16 * size]
        order = torch.tensor([len(text) for text in part]).argsort(stable=True)

        def batches(
            part: Sequence[str] = part, order: Tensor = order
        ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            for some in order.split(size):
                tokens = language.tokenizer([part[number] for number in some.tolist()])
                with autocast(device, config.precision):
                    rows = tower(**{key: value.to(device) for key, value in tokens.items()})
                yield some, {"rows": rows.float()}

        vectors = torch.empty(len(part), tower.width)
        for some, batch in one_behind(batches()):
            vectors[some] = batch["rows"]
        yield vectors.numpy()
