"""Fixture shared by the tests of the stages: short runs of the clip stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import QUICK


@pytest.fixture(scope="session")
def clip_run(trained: Callable[..., Path]) -> Callable[..., Path]:
    """Train the clip stage for four steps, once per set of overrides; return the run's folder."""
    return lambda *overrides: trained("clip", *QUICK, *overrides).parent
