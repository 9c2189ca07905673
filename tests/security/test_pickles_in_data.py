"""Pickles in and beside shards are never loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shards import jpeg, write_tar
from tiny import train

from data_pipelines.curation.tables import keep_listed
from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.sidecar import open_sidecar, write_sidecar
from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import captions_of
from data_pipelines.text.feature_store import open_store, store_facts, store_name
from xray.config import DataConfig, SourceConfig
from xray.errors import ArtifactError, BadSample, ConfigError, DataError


def test_a_vocabulary_that_is_a_pickle_is_refused(
    demo: Path, tmp_path: Path, ran: Path, hostile: bytes
) -> None:
    (tmp_path / "tags.json").write_bytes(hostile)
    with pytest.raises(ArtifactError, match=r"tags\.json"):
        train("hashtag", demo, tmp_path / "out", f"hashtag.vocabulary={tmp_path / 'tags.json'}")
    assert not ran.exists()


def test_files_beside_shards_that_are_pickles_are_refused(
    tmp_path: Path, ran: Path, hostile: bytes
) -> None:
    """Indexes and the manifest are made again; labels, teacher tags, keep-lists, features fail."""
    folder = tmp_path / "photos"
    folder.mkdir()
    write_tar(folder / "0.tar", {f"{i}.jpg": jpeg() for i in range(3)})
    source = open_source("photos", str(folder), "image")
    facts = store_facts(source, {"llm": "x"}, {}, "bf16")
    names = ["labels-x", "teacher-x", "kept-x", store_name(facts)]
    for name in names:
        write_sidecar(source, name, lambda shard: {"ids": np.arange(3), "ends": np.arange(3)}, {})
    made = sorted((folder / ".xray").iterdir())
    assert len(made) == 2 + 2 * len(names)
    for path in made:
        if path.name.startswith("0.tar."):  # files of a single shard
            path.write_bytes(hostile)
    assert len(open_source("photos", str(folder), "image")) == 3  # indexed anew
    for name in names:
        sidecar = open_sidecar(source, name)
        assert sidecar is not None
        with pytest.raises(DataError, match=rf"0\.tar\.{name} is missing, damaged"):
            sidecar.table(0)
    for path in made:
        path.write_bytes(hostile)
    source = open_source("photos", str(folder), "image")
    assert len(source) == 3 and all(open_sidecar(source, name) is None for name in names)
    with pytest.raises(ConfigError, match="no such keep-list"):
        keep_listed(source, SourceConfig(keep="kept-x"))
    with pytest.raises(ConfigError, match="no stored text features"):
        open_store(source, facts)
    assert not ran.exists()


def test_samples_that_are_pickles_are_bad_samples(
    tmp_path: Path, ran: Path, hostile: bytes
) -> None:
    """The decoders of webdataset would load some of these because of their extensions."""
    endings = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "ten", "tb", "cls", "json", "txt")
    samples = {f"00.{ending}": hostile for ending in ("jpg", *endings)}
    samples |= {f"01.{ending}": hostile for ending in ("mp4", "json")}
    samples |= {"02.jpg": jpeg(), "02.pkl": hostile, "02.pth": hostile, "02.txt": b"a picture"}
    folder = tmp_path / "photos"
    folder.mkdir()
    write_tar(folder / "0.tar", samples)
    source = open_source("photos", str(folder), "image")
    for shard, member in source.places():
        sample = source.sample(shard, member, 32, 1)
        if sample.key == "02":
            assert load_pixels(sample, DataConfig(), None).shape == (1, 3, 32, 32)
            assert captions_of(sample.files)[0] == "a picture"
        else:
            with pytest.raises(BadSample):
                load_pixels(sample, DataConfig(), None)
            with pytest.raises(BadSample):
                captions_of(sample.files)
    assert not ran.exists()
