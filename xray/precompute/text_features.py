"""Stored sentence vectors of all captions of a source; each distinct caption is encoded once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from data_pipelines.text.feature_store import (
    ROW_BITS,
    Stored,
    has_store_of_other_model,
    note_store,
    packed,
    store_facts,
    store_name,
)
from xray import dist
from xray.artifacts.language_model import Language
from xray.config.identity import hash_json
from xray.errors import DataError
from xray.models.inference import autocast, one_behind
from xray.models.text_tower import TextTower
from xray.precompute.config import TextFeaturesConfig
from xray.progress import Progress

log = logging.getLogger("xray")


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

    All ranks call it: of n ranks each encodes every nth shard that is missing. Each shard is
    written when its captions are encoded, so a second call continues. Raises DataError if there is
    no caption, and an error of one rank on all.
    """
    job = _Job(source, language, config, device, progress, reading)
    missing = dist.main_first(lambda: job.missing() if dist.is_main() else [])
    if missing and has_store_of_other_model(source, job.facts):
        log.warning(
            "the captions of %s are stored for other weights or another tokenizer than those of "
            "%s; they are encoded again. If you did not change this folder, it is damaged",
            source.name,
            language.folder,
        )
    if missing := dist.broadcast_object(missing):
        dist.main_first(lambda: job.layout)
        mine = missing[dist.rank() :: dist.world_size()]
        dist.together(lambda: job.encode(mine), dist.PREPARATION)
    return dist.main_first(job.complete)  # of hosts without a common folder, each has its own store


@dataclass(frozen=True)
class _Job:
    """Store of a source's captions, while it is written."""

    source: Source
    language: Language
    config: TextFeaturesConfig
    device: torch.device
    progress: Progress | None
    reading: Results | None

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The settings that the store depends on."""
        identity = self.language.identity()
        return store_facts(self.source, identity, self.config.captions, self.stored)

    @property
    def stored(self) -> Stored:
        assert self.config.features != "live"
        return self.config.features

    @property
    def name(self) -> str:
        return store_name(self.facts)

    @functools.cached_property
    def captions(self) -> CaptionIds:
        return CaptionIds(self.source, self.config.captions)

    @functools.cached_property
    def ids(self) -> Sidecar:
        """The ids of all captions, which are written if they are missing."""
        name = f"caption-ids-{hash_json(list(self.config.captions))[:12]}"
        work, facts, workers = self.captions, {"kind": "caption-ids"}, self.config.workers
        return open_whole(self.source, name) or write_sidecar(
            self.source, name, work, facts, workers, self.reading
        )

    @functools.cached_property
    def layout(self) -> Layout:
        layout = lay_out(self.ids)
        if not layout.unique:
            raise DataError(f"source {self.source.name!r} has no caption")
        return layout

    def missing(self) -> list[int]:
        """List the shards without a table."""
        if open_whole(self.source, self.name) is not None:
            return []
        shards = range(len(self.source.manifest))
        return [s for s in shards if saved_table(self.source, self.name, s) is None]

    def encode(self, shards: Sequence[int]) -> None:
        """Encode the captions that these shards are the first to have, and write their tables."""
        if not shards:
            return
        layout, tower = self.layout, self.language.build().eval().to(self.device)
        done = layout.unique - sum(int(layout.part(layout.first, s).sum()) for s in shards)
        for shard in shards:
            texts = [text for _, own in self.captions.texts(shard) for text in own]
            new = [texts[n] for n in np.flatnonzero(layout.part(layout.first, shard))]
            rows = [np.empty((0, tower.width), np.float32)]
            for vectors in _encoded(self.language, tower, new, self.config):
                rows.append(vectors)
                done += len(vectors)
                if self.progress is not None:
                    self.progress(done, layout.unique)
            places = layout.part(layout.places, shard)
            table = {"ends": self.ids.table(shard)["ends"], "places": places}
            table["vectors"], table["scales"] = packed(np.concatenate(rows), self.stored)
            save_table(self.source, self.name, shard, table)

    def complete(self) -> Sidecar:
        """Open the store; write what is missing on this host, its summary at last."""
        sidecar = open_whole(self.source, self.name)
        if sidecar is None:
            self.encode(self.missing())
            table = Sidecar(self.source, self.name, {}, {}).table(0)
            width, unique = table["vectors"].shape[1], self.layout.unique
            facts = {**self.facts, "width": width, "captions_stored": unique}
            sidecar = finish_sidecar(self.source, self.name, facts)
            note_store(self.source, self.facts)
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
