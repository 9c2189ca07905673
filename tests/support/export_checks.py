"""Checks that the tests of exports share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from click.testing import Result

from data_pipelines.shards.source import open_source
from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.model_card import artifact_card
from xray.config import DataConfig
from xray.evaluation.feature_extraction import extract

SIDE = 32
TOLERANCE = 2e-6  # for features of unit length; the exporters refuse differences above 1e-5


def assert_refused(done: Result, words: str) -> None:
    assert done.exit_code == 2 and words in done.stderr, (done.stderr, done.exception)
    assert len(done.stderr.strip().splitlines()) == 1


def pixels_of(demo: Path, source: str = "heldout", modality: Any = "image") -> torch.Tensor:
    """Decode all samples of a source at SIDE px -> uint8 [B, T, 3, S, S]."""
    opened = open_source("s", source, modality, str(demo))
    data = DataConfig(resolution=SIDE, frames=4, workers=0)
    return extract(opened, lambda pixels: pixels, data).rows


def normalised(pixels: torch.Tensor, artifact: Artifact) -> torch.Tensor:
    """Normalise the first frames as the transforms of open_clip and timm do -> [B, 3, S, S]."""
    data = artifact.manifest["config"]["data"]
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels[:, 0].float() / 255 - mean) / std


def code_of(card: Path) -> str:
    """Read the Python block of a model card, with FOLDER replaced by the card's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return str(code).replace("FOLDER", str(card.parent))


def rewritten(
    path: Path,
    out: Path,
    config: dict[str, Any],
    parts: dict[str, dict[str, torch.Tensor]],
    **parents: Artifact,
) -> Artifact:
    """Write a copy of an artifact with another config and with the given parts replaced."""
    old = open_artifact(path)
    own = {name: old.load(name) for name in old.manifest["tensors"]} | parts
    left_out = ("schema", "parents", "tensors", "files", "versions", "git_commit")
    facts = {k: v for k, v in old.manifest.items() if k not in left_out} | {"config": config}
    files = {
        name: old.path / name for name in old.manifest["files"] if name[:4] in ("llm/", "voca")
    }
    write_artifact(out, own, files, facts, parents, artifact_card)
    return open_artifact(out)
