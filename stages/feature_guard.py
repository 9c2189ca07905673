"""Detects features with few effective dimensions, from which the next stage learns slowly."""

from __future__ import annotations

from collections.abc import Mapping

from xray import dist
from xray.config import RunConfig
from xray.config.schedule import steps_of

RANK = "effective_rank"  # metric of a stage whose features a later stage starts from
LEAST = 4.0  # effective dimensions below which a warning is given
FROM = 0.5  # progress before which none is given
PATIENCE = 5  # consecutive checks below


class FeatureGuard:
    """Monitor of the effective rank of each block's features; warns once."""

    def __init__(self, config: RunConfig) -> None:
        # features of a micro-batch of B samples have at most B - 1 dimensions
        sizes = [size for _, size in steps_of(config.train.micro_batch) if size]
        if config.data.tokens_per_batch:  # sizes depend on the frames and the resolution
            sizes = [0]
        world = dist.world_size()
        self.sources = [
            block.source
            for block in config.blocks
            if min([block.samples // world, *sizes]) > 4 * LEAST
        ]
        self._checks = 0  # consecutive, below LEAST

    def check(self, values: Mapping[str, float], progress: float) -> list[str]:
        """Return the warning that is due at a progress, if any."""
        ranks = {source: values.get(f"{source}/{RANK}", LEAST) for source in self.sources}
        source, rank = min(ranks.items(), key=lambda item: item[1], default=("", LEAST))
        self._checks = self._checks + 1 if rank < LEAST and progress >= FROM else 0
        if self._checks < PATIENCE:
            return []
        self.sources = []
        return [
            f"the features of {source!r} have only {rank:.1f} effective dimensions: a later stage "
            "learns slowly from them. Lower optim.base_lr of this stage, or raise optim.warmup"
        ]
