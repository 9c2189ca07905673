"""An artifact and data sets that several tests of evaluation read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from named_data import (
    COLOURS,
    captions,
    labels,
    of_class,
    wds,
)
from shards import photo

from data_pipelines.shards.source import open_source
from xray.evaluation import feature_extraction

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(scope="module")
def clip(trained: Trained) -> Path:
    return trained("clip", "train.samples=24")


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sets in CLIP_benchmark's layout, class folders and a list."""
    root = tmp_path_factory.mktemp("benchmarks")
    wds(root / "wds_cifar10_test", of_class, seed=1)
    wds(root / "wds_mnist", of_class, ("test", "train"), seed=2)
    wds(root / "flickr30k", captions, names=False, kind="retrieval", seed=3)
    wds(root / "voc2007_multilabel", labels, kind="multilabel", seed=4)
    for number, name in enumerate(COLOURS):
        for i in range(2):
            path = root / "folders" / name.replace(" ", "_") / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo(5000 + 10 * number + i))
    listed = root / "listed"
    listed.mkdir()
    rows = [("path", "caption")] + [(f"{i}.jpg", f"photo {i}") for i in range(4)]
    for i in range(4):
        (listed / f"{i}.jpg").write_bytes(photo(6000 + i))
    with (listed / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the pictures that are decoded in this process, in order."""
    seen = list[str]()
    original = feature_extraction.load_pixels

    def counted(sample: Any, *given: Any) -> torch.Tensor:
        seen.append(f"{sample.source}/{sample.key}")
        return original(sample, *given)

    monkeypatch.setattr(feature_extraction, "load_pixels", counted)
    return seen


@pytest.fixture(scope="session")
def folder(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the held-out photos to a folder per class, and tables of them beside."""
    root = tmp_path_factory.mktemp("plain")
    names = (demo / "classes.txt").read_text().split("\n")
    source = open_source("heldout", str(demo / "heldout"), "image")
    labels, captions, grounds = [("path", "label")], [("path", "caption")], [("path", "label")]
    for number, place in enumerate(source.places()):
        files = source.read(*place)
        own = names[feature_extraction.label_of(files)]
        path = root / "set" / own.replace(" ", "_") / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files["jpg"])
        labels.append((str(path.relative_to(root)), own))
        texts = json.loads(files["json"])["captions"]
        captions += [(str(path.relative_to(root)), text) for text in texts]
        grounds.append((str(path.relative_to(root)), texts[0].split()[-2]))
    source, clips = open_source("clips", str(demo / "clips"), "video"), [("path", "label")]
    for number, place in enumerate(source.places()):
        files = source.read(*place)
        (root / f"{number}.mp4").write_bytes(files["mp4"])
        clips.append((f"{number}.mp4", json.loads(files["json"])["caption"].split()[-2]))
    tables = {
        "labels.csv": labels,
        "captions.csv": captions,
        "grounds.csv": grounds,
        "clips.csv": clips,
    }
    for name, rows in tables.items():
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return root
