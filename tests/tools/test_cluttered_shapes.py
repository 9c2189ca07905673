"""Generated shapes on photos: the shapes stay, the backgrounds change, training and test differ."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shards import write_tar

from data_pipelines.ingest.demo import GROUNDS, DemoConfig, make_demo
from tools.experiments.cluttered_shapes import PHOTO, main

COLOURS = {"training": (250, 10, 10), "evaluation": (10, 10, 250)}  # of plain "photos"


def files_of(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            found |= {m.name: file.read() for m in shard if (file := shard.extractfile(m))}
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sets with plain backgrounds, and those on photos of one colour."""
    root = tmp_path_factory.mktemp("shapes")
    for name, colour in COLOURS.items():
        buffer = io.BytesIO()
        Image.new("RGB", (120, 80), colour).save(buffer, format="JPEG", quality=95)
        write_tar(root / name / "0.tar", {"0.jpg": buffer.getvalue()})
    given = [str(root / "training"), str(root / "evaluation"), str(root / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cluttered_shapes", *given, "--photos", "12", "--clips", "2"])
        main()
    make_demo(root / "plain", DemoConfig(photos=12, clips=2, side=96, frames=8, version=3))
    return root / "plain", root / "out"


@pytest.mark.parametrize(
    ("name", "photos"),
    [("photos", "training"), ("heldout", "evaluation"), ("gallery", "evaluation")],
)
def test_only_the_background_changes(folders: tuple[Path, Path], name: str, photos: str) -> None:
    plain, out = (files_of(folder / name) for folder in folders)
    assert plain.keys() == out.keys()
    assert {k: v for k, v in plain.items() if not k.endswith(".jpg")} == {
        k: v for k, v in out.items() if not k.endswith(".jpg")
    }
    for key in [name.removesuffix(".jpg") for name in plain if name.endswith(".jpg")]:
        before, after = (
            np.asarray(Image.open(io.BytesIO(own[f"{key}.jpg"])), np.float32)
            for own in (plain, out)
        )
        shape = np.asarray(Image.open(io.BytesIO(plain[f"{key}.mask.png"]))) > 0
        assert np.abs(after - before)[shape].mean() < 12  # JPEG
        caption = json.loads(plain[f"{key}.json"])["caption"]
        ground = next(np.array(GROUNDS[own]) for own in GROUNDS if f"{own} background" in caption)
        expected = (1 - PHOTO) * ground + PHOTO * np.array(COLOURS[photos])
        assert np.abs(after[~shape].mean(axis=0) - expected).max() < 6


def test_clips_and_classes_are_kept_and_nothing_else(folders: tuple[Path, Path]) -> None:
    plain, out = folders
    assert files_of(plain / "clips") == files_of(out / "clips")
    assert {path.name for path in out.iterdir()} == {path.name for path in plain.iterdir()}
    make_demo(out, DemoConfig(photos=12, clips=2, side=96, frames=8, version=3))  # accepts them
