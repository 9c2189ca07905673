"""Artifacts to merge: a trained one, and others whose weights differ from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_checks import rewritten

from xray.artifacts.artifact import Artifact, open_artifact

Varied = Callable[..., Artifact]


@pytest.fixture(scope="session")
def base(control: Path) -> Artifact:
    """A clip artifact whose text tower is trained, too."""
    return open_artifact(control)


@pytest.fixture(scope="session")
def varied(base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Varied:
    """Write a child of an artifact with noise in its weights, and changes in its config."""

    def vary(
        seed: int, noise: float = 0.02, of: Artifact = base, **config: dict[str, Any]
    ) -> Artifact:
        draw = torch.Generator().manual_seed(seed)
        parts = {
            part: {
                name: tensor + noise * torch.randn(tensor.shape, generator=draw)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in of.load(part).items()
            }
            for part in of.manifest["tensors"]
        }
        own = of.manifest["config"]
        changed = {**own, **{name: {**own[name], **keys} for name, keys in config.items()}}
        out = tmp_path_factory.mktemp("varied") / "artifact"
        return rewritten(of.path, out, changed, parts, vision=of)

    return vary
