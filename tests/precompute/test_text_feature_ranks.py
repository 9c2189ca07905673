"""Text features that two processes write equal those of one process, byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from child_process import SUPPORT, torchrun
from shards import jpeg, write_tar

from data_pipelines.shards.source import open_source
from xray.artifacts.language_model import Language
from xray.precompute.config import TextFeaturesConfig
from xray.precompute.text_features import write_text_features

SHARDS = 5
CAPTIONS = [["everywhere", f"first of {n}", f"another one of {n}"] for n in range(SHARDS)]


def written(folder: Path) -> dict[str, bytes]:
    """The tables of a store, of all shards and of their summary."""
    return {path.name: path.read_bytes() for path in folder.rglob("*text-features-*")}


def test_two_processes_write_the_store_of_one(demo: Path, tmp_path: Path) -> None:
    """Each encodes every second shard. A failure of one ends both, and finished shards are kept."""
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    for folder in (one, out):
        folder.mkdir()
    for number, captions in enumerate(CAPTIONS):
        files = {"0.jpg": jpeg(), "0.json": json.dumps({"captions": captions}).encode()}
        write_tar(one / f"{number}.tar", files)
    shutil.copytree(one, two)
    llm = str(demo / "llm")
    config = TextFeaturesConfig(llm=llm, tune="none", workers=0, features="fp32")
    source = open_source("s", str(one), "image")
    store = write_text_features(source, Language(config), config, torch.device("cpu"))
    assert store.facts["captions_stored"] == 1 + 2 * SHARDS

    torchrun(str(SUPPORT / "text_feature_ranks.py"), llm, str(two), str(out))
    errors = [(out / f"error.{rank}").read_text() for rank in (0, 1)]
    assert errors == ["no space left on device"] * 2
    # rank 0 wrote shards 0, 2 and 4; of shards 1 and 3, each rank then encoded one
    encoded = [json.loads((out / f"encoded.{rank}").read_text()) for rank in (0, 1)]
    assert encoded == [CAPTIONS[1][1:], CAPTIONS[3][1:]]
    assert len(written(one)) == SHARDS + 1 and written(two) == written(one)
