"""Runs evaluation suites on an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from xray import dist
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import TextEncoder, VisionEncoder, restore_encoder
from xray.errors import ConfigError
from xray.evaluation.checks import check_data, check_suites
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import Sets
from xray.evaluation.dealing import dismiss, serve
from xray.evaluation.overlap import Overlap, find_overlap
from xray.evaluation.splits import run_suite
from xray.evaluation.suite import Measures
from xray.evaluation.suites import SUITES, suite_named

T = TypeVar("T")
Results = Mapping[str, Measures]  # by suite


class Evaluator:
    """Runs suites on one encoder; features that several suites need are extracted once."""

    def __init__(
        self, encoder: VisionEncoder | TextEncoder, config: EvalConfig, root: str, workers: int
    ) -> None:
        config.validate()
        self.config = config
        encoder.precision = config.precision
        self.sets = Sets(encoder, config.filled(), root, workers)
        self.offers = encoder.artifact.offers
        self._checked = set[str]()  # suites whose data were checked

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        config: EvalConfig,
        root: str,
        workers: int,
        device: torch.device | None = None,
    ) -> Evaluator:
        """Load an artifact's encoder; device: None = the fastest."""
        encoder = restore_encoder(artifact).to(device or dist.choose_device("auto"))
        return cls(encoder, config, root, workers)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Call work on rank 0, while the other ranks encode their share for its suites.

        All ranks call it. Returns work's result on rank 0, None on the others. Raises an error of
        one rank on all.
        """
        if dist.world_size() == 1:
            return work()
        results: list[T] = []

        def part() -> None:
            if dist.is_main():
                results.append(work())
                dismiss(self.sets.encoder)
            else:
                serve(self.sets.encoder)

        self.sets.dealt = True
        try:
            dist.together(part, dist.PREPARATION, doing="evaluating")
        finally:
            self.sets.dealt = False
        return results[0] if results else None

    def run(self, names: Sequence[str]) -> Results:
        """Run suites and return their results; raises as `check`."""
        return dict(self.each(names))

    def each(self, names: Sequence[str]) -> Iterator[tuple[str, Measures]]:
        """Check all suites, then yield each with its results as soon as it has run."""
        self.check(names)
        for name in names:
            yield name, run_suite(suite_named(name), self.sets)

    def overlap(self, names: Sequence[str]) -> Overlap:
        """Compare these suites' data sets with what the artifact and its ancestors trained on."""
        return find_overlap(self.sets, [suite_named(name) for name in names])

    def check(self, names: Sequence[str]) -> None:
        """Check settings and data of suites; raises ConfigError, ArtifactError or DataError."""
        check_suites(names, self.sets.config, self.offers, self.sets.what, self.sets.data.root)
        for name in names:
            if name not in self._checked:
                check_data(suite_named(name), self.sets)
                self._checked.add(name)

    def default_suites(self) -> list[str]:
        """List the suites that have data and that the artifact can run; ConfigError for none."""
        suites = self.config.possible(self.offers)
        if not suites:
            configured = self.config.configured()
            data = f"the data are for {', '.join(configured)}"
            able = ", ".join(suite.name for suite in SUITES if suite.needs <= self.offers)
            raise ConfigError(
                f"{self.sets.what}: it can be asked for {able}; "
                f"{data if configured else 'there are no data: give --recipe'}"
            )
        return suites
