"""Fixtures of the tests of stages on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def llm_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny LLM, as the settings of small runs expect it."""
    from xray.models.tiny_llm import build_tiny_llm

    root = tmp_path_factory.mktemp("gpu")
    build_tiny_llm(["a dog", "a cat"], root / "llm", 300, 32, 2, 2, "qwen3")
    return root
