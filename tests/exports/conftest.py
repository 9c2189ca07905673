"""Fixture of the export tests: an export that several files read."""

from __future__ import annotations

from pathlib import Path

import pytest

from xray.artifacts.artifact import open_artifact
from xray.exports.convert import convert


@pytest.fixture(scope="session")
def open_clip_export(control: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip export of a clip artifact; both of its towers fit open_clip."""
    out = tmp_path_factory.mktemp("exports") / "open_clip"
    convert(open_artifact(control), "open_clip", out)
    return out
