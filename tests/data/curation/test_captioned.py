"""`data.sources.NAME.keep=captioned`: a source without the samples that have no caption."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from in_process import invoke
from shards import jpeg, write_tar

from data_pipelines.checks.clean import find_derived
from data_pipelines.curation.captioned import CaptionedMembers, keep_captioned
from data_pipelines.curation.tables import kept_sources
from data_pipelines.shards.source import Source, open_source
from xray.config import DataConfig, SourceConfig
from xray.config.model import LlmConfig
from xray.errors import ConfigError
from xray.recipes.run import make_llm

SHARDS, EACH = 3, 8
FACTS = {
    1: {"caption": "a dog"},
    6: {"captions": ["", "a cat"]},
    9: {"captions": []},
    10: {"hashtags": ["#dog"]},
    12: {"caption": 5},  # broken
    15: {"alt": "a bird"},
    22: {"caption": "a cow", "hashtags": ["cow"]},
}
TXT = {4: "a horse", 5: " "}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(SHARDS):
        files: dict[str, bytes] = {}
        for number in range(shard * EACH, (shard + 1) * EACH):
            files[f"{number:04d}.jpg"] = jpeg()
            files[f"{number:04d}.json"] = json.dumps(FACTS.get(number, {})).encode()
            if number in TXT:
                files[f"{number:04d}.txt"] = TXT[number].encode()
        write_tar(folder / f"{shard}.tar", files)
    return folder


def numbers(source: Source) -> list[int]:
    return [int(source.index(shard).key(member)) for shard, member in source.places()]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 4, 6, 22]),
        ({"alt": 1.0}, [15]),
        ({"alt": 1.0, "caption": 3.0}, [1, 15, 22]),
        ({"joined(hashtags)": 1.0}, [10, 22]),
    ],
)
def test_only_samples_with_captions_are_kept(
    pool: Path,
    fields: dict[str, float],
    expected: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = DataConfig(workers=1)
    data.sources = {"photos": SourceConfig(keep="captioned", captions=fields), "b": SourceConfig()}
    sources = {name: open_source(name, str(pool), "image") for name in data.sources}
    with caplog.at_level(logging.INFO):
        kept = kept_sources(sources, data)
    assert kept["b"] is sources["b"]
    assert numbers(kept["photos"]) == expected and len(kept["photos"]) == len(expected)
    told = f"data.sources.photos.keep=captioned: {len(expected)} of 24 samples have captions"
    assert told in caplog.text
    assert kept["photos"].digest != sources["photos"].digest


def test_other_weights_of_the_same_fields_share_the_side_file(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source("photos", str(pool), "image")
    first = keep_captioned(source, {"alt": 1.0, "caption": 1.0})
    monkeypatch.setattr(CaptionedMembers, "__call__", None)  # not called again
    second = keep_captioned(source, {"alt": 2.0, "caption": 1.0})
    assert numbers(first) == numbers(second) and first.digest == second.digest
    assert {item.kind.name for item in find_derived(pool).derived} >= {"captioned"}


def test_no_captions_is_an_error_that_names_the_key(pool: Path) -> None:
    source = open_source("photos", str(pool), "image")
    for fields, key in (({"none": 1.0}, r"captions=\{'none': 1.0\}"), ({"a.b": 1.0}, "captions=")):
        with pytest.raises(ConfigError, match=rf"0 of 24 samples have captions.*photos\.{key}"):
            keep_captioned(source, fields)


def test_the_work_of_a_shard_can_be_sent_to_processes(pool: Path) -> None:
    work = CaptionedMembers(open_source("photos", str(pool), "image"), {})
    table = pickle.loads(pickle.dumps(work))(0)
    assert table["members"].tolist() == [1, 4, 6] and not np.any(table["copies"])


def test_a_stage_that_finds_no_captions_names_a_setting_that_helps(
    pool: Path, tmp_path: Path
) -> None:
    given = [
        *("train", "clip", f"out={tmp_path / 'run'}", f"data.root={pool}", "train.samples=16"),
        "data.sources={photos: {shards: .}}",
        "data.blocks=[{source: photos, samples: 4}]",
        *("data.resolution=32", "data.workers=0", "model.kwargs={embed_dim: 48, depth: 2}"),
    ]
    llm = [f"text.llm={tmp_path / 'llm'}"]
    make_llm(LlmConfig(str(tmp_path / "llm"), str(pool), 60, 32, 2, 2), "")
    failed = invoke(*given, *llm, "data.max_bad_fraction=0.99")
    assert failed.exit_code == 2 and "data.sources.photos.keep=captioned" in failed.stderr
    done = invoke(*given, *llm, "data.sources.photos.keep=captioned", f"out={tmp_path / 'second'}")
    assert done.exit_code == 0, done.stderr
