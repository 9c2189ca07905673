"""`xray data metadata` and `curate` as their user runs them, and a run on what they keep."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from in_process import invoke
from tiny import settings

from data_pipelines.curation.tables import keep_listed
from data_pipelines.shards.source import Source, open_source
from data_pipelines.text.captions import read_captions
from stages import stage_class
from xray.config import SourceConfig
from xray.errors import BadSample, ConfigError


def run(*command: object, expect: int = 0) -> str:
    result = invoke(*command)
    assert result.exit_code == expect, result.output
    return result.output


@pytest.fixture(scope="module")
def curated(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with the results, the keep-list's name, and what was printed."""
    out = tmp_path_factory.mktemp("curated")
    lists = out / "shapes.txt"
    lists.write_text("circle\nsquare\nwhite background\nunicorn\n")
    command = ("data", "metadata", demo / "photos", "min_count=20", "min_pmi=3", "--list", lists)
    assert re.search(r"\d+ entries, 4 of them given", run(*command, "--out", out / "m.txt"))
    text = run(
        "data", "curate", demo / "photos", f"metadata={lists}", "t=10", "filters.min_words=4",
        f"dedup.evaluation={{val: {demo}/heldout}}", "--report", out / "page.html",
        "--json", out / "report.json", "--out", out / "shards",
    )  # fmt: skip
    found = re.search(r"keep=(kept-[0-9a-f]+)", text)
    assert found is not None, text
    return out, found[1], text


def test_what_is_kept_is_reported(demo: Path, curated: tuple[Path, str, str]) -> None:
    out, name, text = curated
    report = json.loads((out / "report.json").read_text())
    assert report["read"][0] == 96 and 10 <= report["kept"][0] < 60
    assert [row["entry"] for row in report["top"]][:2] != [] and "balance" in text
    before = {row["entry"]: row["before"] for row in report["top"] + report["tail"]}
    assert "unicorn" not in before and before["circle"] > 0 < before["white background"]
    page = (out / "page.html").read_text()
    assert "data:image/png" in page and "Kept" in page and "circle" in page
    written = open_source("new", str(out / "shards"), "image")
    assert len(written) == report["kept"][0]
    kept = keep_listed(open_source("photos", str(demo / "photos"), "image"), keeping(name))
    assert len(kept) == report["kept"][0]


def keeping(name: str, captions: dict[str, float] | None = None) -> SourceConfig:
    return SourceConfig(keep=name, captions=captions or {})


def keys(source: Source) -> list[str]:
    return [source.index(shard).key(member) for shard, member in source.places()]


def test_a_run_reads_what_is_kept(
    demo: Path, curated: tuple[Path, str, str], tmp_path: Path
) -> None:
    from data_pipelines.ingest.user_data import open_sources
    from stages.base import Parents

    _, name, _ = curated
    config = settings("hashtag", demo, tmp_path, "data.modalities=[image]")
    source = open_sources(config.data, ["photos"])["photos"]
    kept = keep_listed(source, keeping(name))
    with pytest.raises(ConfigError, match=r"photos.captions=\{'alt': 1\}, but the texts"):
        keep_listed(source, keeping(name, {"alt": 1}))
    assert set(keys(kept)) < set(keys(source)) and kept.digest != source.digest
    prepared = stage_class("hashtag")(config).prepare({"photos": kept}, Parents())["photos"]
    assert set(keys(prepared)) == set(keys(kept))
    for slot in range(len(kept.members(0))):
        sample = kept.sample(0, kept.member(0, slot), 32, 1, slot)
        assert sample.texts
        texts = [read_captions(sample.files)[number].text for number in sample.texts]
        assert all(any(word in text for word in ("circle", "square", "white")) for text in texts)


def test_the_text_stage_pairs_kept_captions_only(demo: Path, tmp_path: Path) -> None:
    from stages.base import Parents

    stage = stage_class("text")(settings("text", demo, tmp_path))
    stage.prepare({}, Parents())
    sample = open_source("photos", str(demo / "photos"), "image").sample(0, 0, 32, 1)
    captions = [caption.text for caption in read_captions(sample.files)]
    kept = dataclasses.replace(sample, texts=(0, len(captions) - 1))
    expected = stage.language.tokenizer([captions[0], captions[-1]])["input_ids"].tolist()
    assert len(captions) > 2 and expected[0] != expected[1]
    for seed in range(8):
        found = stage.transform(kept, np.random.default_rng(seed))["input_ids"].tolist()
        assert sorted(found) == sorted(expected)
    with pytest.raises(BadSample, match="one caption, where two are needed"):
        stage.transform(dataclasses.replace(sample, texts=(0,)), None)


def test_mistakes_say_what_to_change(demo: Path, tmp_path: Path) -> None:
    source = open_source("photos", str(demo / "photos"), "image")
    with pytest.raises(ConfigError, match=r"data.sources.photos.keep=gone: its shards have no"):
        keep_listed(source, keeping("gone"))
    none = tmp_path / "none.txt"
    none.write_text("unicorn\n")
    for given in ((), (f"metadata={none}",), ("metadata=gone.txt",), ("metdata=x",)):
        run("data", "curate", demo / "photos", *given, expect=2)
    for out, says in ((demo / "photos", "is the pool itself"), (demo / "clips", "other shards")):
        command = ("data", "curate", demo / "photos", "metadata=none", "--out", out)
        assert says in " ".join(run(*command, expect=2).split())
    with pytest.raises(ConfigError, match=r"unknown key 'data.sources.photos.kept'.*\.keep'"):
        settings("hashtag", demo, tmp_path, "data.sources.photos.kept=x")
    with pytest.raises(ConfigError, match=r"unknown key 'sample'.*'samples'"):
        settings("hashtag", demo, tmp_path, "data.blocks=[{source: photos, sample: 1}]")
