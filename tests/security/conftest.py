"""Fixtures of the security tests: hostile pickles, and runs to hide them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_files import pickled


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A folder that exists only after a hostile pickle was loaded."""
    return tmp_path / "ran"


@pytest.fixture(params=["plain", "torch", "numpy"])
def hostile(request: pytest.FixtureRequest, ran: Path) -> bytes:
    """A hostile pickle as pickle, torch.save and np.save write it."""
    return pickled(ran, request.param)


@pytest.fixture(scope="session")
def artifacts(trained: Callable[..., Path], tagger: Path) -> dict[str, Path]:
    """Artifacts by stage. The text tower is fully tuned, so that they contain their own LLM."""
    short = "train.samples=12"
    text = trained("text", short, "text.tune=full", "text.lora_rank=0")
    clip = trained("clip", short, init_from=(tagger, text))
    return {"hashtag": tagger, "text": text, "clip": clip}
