"""Settings that a config leaves open, and that a new run decides when it begins."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from xray import dist
from xray.config import RunConfig

C = TypeVar("C", bound=RunConfig)


def decided(config: C) -> C:
    """Return the config with all settings decided, as on rank 0. Collective.

    Rank 0 knows the run that a mirror holds, whose settings the config has already.
    """
    sincos = "rows" if config.model.rows_first else "columns"
    sincos = dist.broadcast_object(sincos)
    return replace(config, model=replace(config.model, sincos=sincos))
