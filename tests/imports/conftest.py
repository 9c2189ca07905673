"""Fixtures of the import tests: a few photos, and the artifact of released weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from in_process import invoke
from released import SIDE, Released, of_open_clip

from data_pipelines.ingest.demo import DemoConfig, make_demo

PHOTOS = 8
KINDS = ("clip", "siglip")


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("few") / "data"
    make_demo(root, DemoConfig(photos=PHOTOS, clips=2, heldout=8, per_shard=8, side=SIDE, frames=4))
    return root


@pytest.fixture(scope="session", params=KINDS)
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    return of_open_clip(tmp_path_factory.mktemp("released") / "folder", request.param)


@pytest.fixture(scope="session")
def imported(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "artifact"
    done = invoke("import", released.folder, "--out", out, "--license", "mit")
    assert done.exit_code == 0, done.output
    assert "offers joint, vision" in done.stdout and "licence: mit" in done.stdout
    return out
