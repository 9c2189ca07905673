"""Length of a run before it begins: its sources at hand, its passes over them, and advice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from data_pipelines.curation.tables import keep_listed
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import open_data
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source
from xray.config import RunConfig
from xray.errors import DataError

MOST_PASSES = 1000  # over a source; more is probably a mistake in the recipe
AT_HAND = ("shards", "folder", "list")  # kinds of data that are counted
ENOUGH_PASSES = 100  # advised instead


def sources_at_hand(config: RunConfig) -> dict[str, Source]:
    """Open the sources of a run's blocks that are on this computer; the others are left out.

    Plain files, which a run packs first, are opened as they are. Not collective.
    """
    found: dict[str, Source] = {}
    for block in config.blocks:
        own = config.data.sources[block.source]
        where = resolve(own.shards, config.data.root)
        if not is_remote(where):
            request = Request(block.source, own.modality, own.animations)
            with suppress(DataError):
                source = open_data(where, request, AT_HAND, "training")
                given = own, config.data.root, config.data.workers
                found[block.source] = keep_listed(source, *given)
    return found


def sizes_of(sources: Mapping[str, Source]) -> dict[str, int]:
    """Return the number of samples of each source."""
    return {name: len(source) for name, source in sources.items()}


def length_advice(config: RunConfig, sizes: Mapping[str, int], section: str = "") -> list[str]:
    """Return warnings of a length that does not fit the data, each with a setting to change.

    sizes: samples of the sources at hand. section: prefix of the stage's keys, such as `mae.`.
    """
    if config.train.epochs is not None:
        return []
    passes = config.passes(sizes, config.steps)
    if len(passes) < len(config.blocks):  # the longest pass may be over a source not at hand
        return []
    least = min(passes, key=lambda name: passes[name])
    if passes[least] < 1:
        return [
            f"{config.stage}: sees only {passes[least]:.0%} of the {sizes[least]:,} samples of "
            f"{least}: set {section}train.epochs=1"
        ]
    if passes[least] > MOST_PASSES:
        return [
            f"{config.stage}: sees every sample at least {passes[least]:,.0f} times: set "
            f"{section}train.epochs={ENOUGH_PASSES}"
        ]
    lines = []
    for block in config.blocks:
        if passes[block.source] > MOST_PASSES:
            fewer = int(block.samples * passes[least] / passes[block.source])
            lines.append(
                f"{config.stage}: sees each of the {sizes[block.source]:,} samples of "
                f"{block.source} {passes[block.source]:,.0f} times, but {least} "
                f"{passes[least]:,.0f} times: lower its samples in {section}data.blocks from "
                f"{block.samples} to about {max(1, fewer)}"
            )
    return lines
