"""Whether the sets of an evaluation are there, found before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence

from data_pipelines.manifest import find_shards, resolve
from data_pipelines.remote import is_remote
from xray.errors import ConfigError
from xray.evaluation.config import EvalConfig


def check_sets(config: EvalConfig, suites: Sequence[str], root: str) -> None:
    """Raise ConfigError or DataError where a set that these suites read is not there."""
    for key, pattern in config.sets(suites):
        where = resolve(pattern, root)
        if is_remote(where) or os.path.exists(where):
            continue
        if not any(c in where for c in "*?[{"):
            raise ConfigError(f"eval.{key}={pattern}: there is no {where}")
        find_shards(where)
