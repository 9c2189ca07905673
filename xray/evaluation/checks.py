"""Checks of suites before the first one encodes anything: their settings, needs and data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from data_pipelines.ingest.labelled import place_of
from data_pipelines.shards.remote import is_remote
from xray.errors import ArtifactError, ConfigError
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import ModelToComeError, Sets, check_sets
from xray.evaluation.overlap import tested
from xray.evaluation.splits import by_split
from xray.evaluation.suite import LabelledConfig, Suite
from xray.evaluation.suites import suite_named


def check_suites(
    names: Sequence[str], config: EvalConfig, offers: frozenset[str], what: str, root: str
) -> None:
    """Raise ConfigError for an unknown suite or missing data, ArtifactError for a suite that needs
    what the artifact does not offer.

    config: `filled`. what: the artifact, for errors.
    """
    configured = config.configured()
    for name in names:
        suite = suite_named(name)
        if not suite.needs <= offers:
            raise ArtifactError(
                f"{what}: suite {name} needs an artifact that offers "
                f"{', '.join(sorted(suite.needs))}, this one offers {', '.join(sorted(offers))}"
            )
        if name not in configured and not any(s.name in configured for s in suite.reads):
            raise ConfigError(f"suite {name} has no data: set eval.{suite.data_keys()}")
    check_sets(config, names, root)


def check_before_training(names: Collection[str], config: EvalConfig, root: str) -> None:
    """Raise the errors of suites' data that need no model; does not read remote data."""
    sets = Sets(None, config.filled(), root, 0)
    for name in sorted(names):
        places = [place_of(f"eval.{key}", own, root) for key, own in sets.config.data_sets([name])]
        if not any(map(is_remote, places)):
            with suppress(ModelToComeError):
                check_data(suite_named(name), sets)


def check_data(suite: Suite[Any], sets: Sets) -> None:
    """Raise the errors of a suite's data that are known without decoding pictures."""
    for _ in tested(sets, [suite]):
        pass  # opening is the check
    whole = sets.config
    for name, part in suite.sections(whole.of(suite)).items():
        if isinstance(part, LabelledConfig) and part.has_data():
            sets.check_classes(name, part)
    if suite.check is None:
        return
    try:
        for config in by_split(suite, sets).values() or [whole]:
            sets.config = config
            suite.check(sets, config.of(suite))
    finally:
        sets.config = whole
