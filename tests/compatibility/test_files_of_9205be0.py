"""Files written by commit 9205be0 open, resume, evaluate and export as they did then.

tests/fixtures/9205be0/README.md says what the files are. The tests know the command line, the
public API and the files only: they import no module of xray, because modules may move.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands_of_9205be0 import (
    FIXTURE,
    HELPERS,
    LLM,
    NAMES,
    READING,
    RECORD,
    ROUNDED,
    SAME_MACHINE,
    STAGES,
    TRAINING,
    Done,
    run_in_copy,
)
from older_results import (
    as_then,
    assert_close,
    assert_contains,
    assert_same_rows,
    assert_same_weights,
    rows_of,
)
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A copy after the commands that train nothing."""
    return run_in_copy(tmp_path_factory.mktemp("reading") / "fixture", READING, moved=False)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A copy after the commands that train, resume or refuse to."""
    return run_in_copy(tmp_path_factory.mktemp("training") / "fixture", TRAINING, moved=True)


def embeddings_of(path: Path) -> tuple[list[str], np.ndarray]:
    """Keys and rows of a .parquet file of float32 embeddings."""
    table = pq.read_table(path)
    rows = [np.frombuffer(row, np.float32) for row in table["embedding"].to_pylist()]
    return table["key"].to_pylist(), np.stack(rows)


# the fixture itself ------------------------------------------------------------------------------


def test_the_fixture_names_no_place_of_a_machine() -> None:
    files = [path for path in FIXTURE.rglob("*") if path.is_file()]
    assert len(files) > 200
    for path in files:
        found = re.search(rb"/(root|home|tmp|work|Users)/", path.read_bytes())
        assert found is None, f"{path} holds {found}"


# artifacts ---------------------------------------------------------------------------------------


def test_artifacts_encode_and_tag_as_recorded(reading: Done) -> None:
    reading.check("features")
    found = load_file(reading.folder / "out" / "features.safetensors")
    recorded = load_file(FIXTURE / "features.safetensors")
    assert found.keys() == recorded.keys() and len(recorded) == 8
    for name, rows in recorded.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=1e-5)
        assert rows.norm(dim=1).allclose(torch.ones(len(rows)))
    tags = reading.json("out/found_tags.json")
    for stage, pictures in RECORD["tags"].items():
        for one, two in zip(tags[stage], pictures, strict=True):
            assert dict(one) == pytest.approx(dict(two), abs=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_lineage_verifies_every_file(reading: Done, stage: str) -> None:
    reading.check(f"lineage_{stage}")
    chain = json.loads((reading.folder / "out" / f"lineage_{stage}.out").read_text())
    ancestors = {"mae": [], "hashtag": ["mae"], "text": [], "clip": ["hashtag", "mae", "text"]}
    assert [link["stage"] for link in chain] == [stage, *ancestors[stage]]
    manifest = (FIXTURE / "runs" / "full" / stage / "artifact" / "manifest.json").read_bytes()
    assert chain[0]["manifest"] == hashlib.sha256(manifest).hexdigest()
    assert chain[0]["files"].keys() == json.loads(manifest)["files"].keys()
    assert set(chain[0]["files"].values()) == {"ok"}
    assert [link["where"] for link in chain[1:]] == ["gone"] * (len(chain) - 1)
    assert all(link["sound"] and link["config_hash"] for link in chain)


@pytest.mark.parametrize("name", ["clip", "hashtag", "keep_rates"])
def test_evaluation_gives_the_recorded_numbers(reading: Done, name: str) -> None:
    reading.check(f"eval_{name}")
    found, recorded = (
        reading.json(f"out/{name}.json"),
        json.loads((FIXTURE / "results" / f"{name}.json").read_text()),
    )
    for results in (found, recorded):  # the speed of this machine
        for suite in results.values():
            for key in suite.keys() & {"samples_per_s", "speed"}:
                assert suite.pop(key) > 0
    assert_close(as_then(found), recorded, tolerance=0.13)  # one of the 8 samples


@pytest.mark.parametrize("name", ["step", "ema", "safetensors"])
def test_exports_hold_the_recorded_tensors(reading: Done, name: str) -> None:
    reading.check(f"export_{name}")
    found = HELPERS["digests"](reading.folder / "out" / f"export_{name}")
    recorded = RECORD["exports"][name]
    assert {key: value[:2] for key, value in found.items()} == {
        key: value[:2] for key, value in recorded.items()
    }
    if SAME_MACHINE or name != "safetensors":  # the latter merges LoRA, which rounds
        assert found == recorded


def test_a_bundle_is_replayed(reading: Done) -> None:
    reading.check("replay")
    assert "step 2, loss: nan then, nan now" in reading.text("replay")


# data --------------------------------------------------------------------------------------------


def test_shards_are_sound_and_their_side_files_are_used_as_they_are(reading: Done) -> None:
    side = ("index", "teacher", "teacher_clip", "embeddings", "scores", "curate", "check")
    reading.check(*side)
    assert "24 images, 0 clips" in reading.text("index")
    for key, name in (("teacher", "hashtag.teacher"), ("scores", "filters.scores")):
        assert f"{name}={NAMES[key]}" in reading.text(key)
    assert f"data.sources.NAME.keep={NAMES['keep']}" in reading.text("curate")
    for path in (written := reading.changed("data/")):  # by xray data index, which adds checksums
        table, facts = columns_of(reading.folder / path)
        old_table, old_facts = columns_of(FIXTURE / path)
        assert table.keys() == old_table.keys(), path
        assert all(np.array_equal(table[name], old_table[name]) for name in table), path
        added = {"checksum", "left_out"} if path.endswith(".index") else {"checksum"}
        assert facts.keys() - old_facts.keys() == added, path
        assert old_facts.items() <= facts.items(), path
    assert {Path(path).suffix for path in written} <= {".index", ".manifest"}


def columns_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the columns and the facts of an index or a manifest."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(  # noqa: SIM118
            file.metadata()["facts"]
        )


def test_vocabulary_metadata_and_keep_list_are_chosen_again(reading: Done) -> None:
    reading.check("tags", "metadata", "curate")
    for name in ("tags.json", "curation.json"):
        assert reading.json(f"out/{name}") == json.loads((FIXTURE / name).read_text()), name
    metadata = (reading.folder / "out" / "metadata.txt").read_text()
    assert metadata == (FIXTURE / "metadata.txt").read_text()


# embeddings --------------------------------------------------------------------------------------


def test_embedding_files_are_continued_or_refused(reading: Done) -> None:
    reading.check("embed", "embed_int8", "embed_texts")
    for name in ("embed", "embed_int8", "embed_texts"):
        assert re.search(r"(\d+) of \1 parts were there", reading.text(name)), name
    reading.check("embed_other", code=2)
    assert "contains other embeddings (artifact" in reading.text("embed_other", "err")
    assert reading.changed("embeddings/") == set()


def test_new_embeddings_equal_old_ones(reading: Done) -> None:
    reading.check("embed_new")
    keys, rows = embeddings_of(FIXTURE / "embeddings" / "photos.parquet")
    found_keys, found = embeddings_of(reading.folder / "out" / "photos.parquet")
    assert found_keys == keys and len(keys) == 24
    np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-5)
    old, new = (
        pq.read_schema(path / "photos.parquet")
        for path in (FIXTURE / "embeddings", reading.folder / "out")
    )
    assert old.names == new.names and old.types == new.types
    facts = [json.loads(schema.metadata[b"xray"]) for schema in (old, new)]
    for fact in facts:
        del fact["artifact"]["where"], fact["source"]["where"]
    assert facts[0] == facts[1]


@pytest.mark.parametrize("name", ["search", "search_int8"])
def test_search_finds_the_nearest_rows(reading: Done, name: str) -> None:
    reading.check(name)
    keys, rows = embeddings_of(FIXTURE / "embeddings" / "photos.parquet")
    query = load_file(FIXTURE / "features.safetensors")["clip/text"][0].numpy()
    found = re.findall(r"(0\.\d{4}) │ (\d{9})", reading.text(name))
    if name == "search_int8":  # holds the first 8 dimensions, rounded
        rows, query = rows[:, :8], query[:8] / np.linalg.norm(query[:8])
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    scores = dict(zip(keys, rows @ query, strict=True))
    best = sorted(scores.values(), reverse=True)[:3]
    assert len(found) == 3
    for (score, key), expected in zip(found, best, strict=True):
        tolerance = 2e-2 if name == "search_int8" else 1e-4
        assert float(score) == pytest.approx(scores[key], abs=tolerance)
        assert float(score) == pytest.approx(expected, abs=tolerance)


# runs --------------------------------------------------------------------------------------------


def test_a_finished_recipe_is_not_trained_again(training: Done) -> None:
    training.check("finished")
    for stage in STAGES:
        assert f"stage {stage} is finished" in training.text("finished", "err")
    assert not (FIXTURE / "runs" / "full" / "report.html").exists()
    assert "Results" in (training.folder / "runs" / "full" / "report.html").read_text()
    assert training.changed(*(f"runs/full/{stage}/" for stage in STAGES)) == set()
    found, recorded = (
        json.loads((folder / "runs" / "full" / "results.json").read_text())
        for folder in (training.folder, FIXTURE)
    )
    assert_close(as_then(found), recorded, tolerance=0.13)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("refused_recipe", "config.mae.mask_ratio: 0.75 -> 0.5"),
        ("refused_resume", "config.hashtag.loss: 'bce' -> 'softmax'"),
        ("refused_data", "config.data.sources.photos.shards: 'photos' -> 'gallery'"),
    ],
)
def test_a_run_with_other_settings_is_refused(training: Done, name: str, key: str) -> None:
    training.check(name, code=2)
    assert "contains another run" in training.text(name, "err") and key in training.text(
        name, "err"
    )


@pytest.mark.parametrize("stage", ["mae", "hashtag", "clip"])
def test_an_unfinished_run_ends_like_an_uninterrupted_one(training: Done, stage: str) -> None:
    training.check(f"resume_{stage}")
    assert "step_00000004" in training.text(f"resume_{stage}", "err")
    run = training.folder / "runs" / "unfinished" / stage
    whole = FIXTURE / "runs" / ("full" if stage == "mae" else "uninterrupted") / stage
    exact = SAME_MACHINE and stage not in ROUNDED
    assert_same_weights(run / "artifact", whole / "artifact", exact)
    rows, cut = rows_of(run), rows_of(FIXTURE / "runs" / "unfinished" / stage)
    assert [row["step"] for row in cut] == [1, 2, 3, 4, 5]
    assert rows[:4] == cut[:4]
    assert_same_rows(rows, rows_of(whole), exact)


def test_a_run_that_is_begun_again_gives_the_same(training: Done) -> None:
    training.check("again")
    for stage in STAGES:
        run, old = (f / stage for f in (training.folder / "runs/again", FIXTURE / "runs/full"))
        exact = SAME_MACHINE and stage == "text"  # hashtag and clip start from mae's weights
        assert_same_rows(rows_of(run), rows_of(old), exact)
        assert_same_weights(run / "artifact", old / "artifact", exact)
        record, recorded = (json.loads((path / "run.json").read_text()) for path in (run, old))
        for facts in (record, recorded):  # manifests hold paths, versions and times
            facts["parents"] = sorted(facts["parents"])
            facts["inputs"].pop("artifact", None)
        assert_contains(record, recorded, stage)


@pytest.mark.parametrize("run", ["unfinished/mae", "unfinished/hashtag", "unfinished/clip"])
def test_configs_of_resumed_runs_keep_their_values(training: Done, run: str) -> None:
    found, recorded = (
        yaml.safe_load((folder / "runs" / run / "config.yaml").read_text())
        for folder in (training.folder, FIXTURE)
    )
    if run.endswith("clip"):  # where the LLM is now
        assert Path(found["text"].pop("llm")).resolve() == (training.folder / LLM).resolve()
        del recorded["text"]["llm"]
    assert len(recorded) > 10
    assert_contains(found, recorded, run)


def test_recipes_resolve_to_the_recorded_configs(reading: Done) -> None:
    reading.check("config")
    found = yaml.safe_load((reading.folder / "out" / "config.out").read_text())
    for stage in STAGES:
        path = FIXTURE / "runs" / "full" / stage / "config.yaml"
        recorded = yaml.safe_load(path.read_text())
        del recorded["data"]["mean"], recorded["data"]["std"]  # decided when a run begins
        if stage == "clip":  # the stage completes them from the text artifact
            recorded["text"] = {k: recorded["text"][k] for k in ("llm", "features", "tune")}
        if stage == "text":  # and from the LLM
            assert recorded["text"].pop("pooling") == "mean"
        assert_contains(found[stage], recorded, stage)


def test_an_old_artifact_starts_a_new_stage(training: Done) -> None:
    training.check("init_from")
    manifest = training.json("runs/next/artifact/manifest.json")
    old = (FIXTURE / "runs" / "full" / "hashtag" / "artifact" / "manifest.json").read_bytes()
    parent = manifest["parents"]["vision"]
    assert parent["manifest"] == hashlib.sha256(old).hexdigest() and manifest["step"] == 2
    lineage = {Path(name).stem for name in manifest["files"] if name.startswith("lineage/")}
    assert lineage == {parent["manifest"], json.loads(old)["parents"]["vision"]["manifest"]}
    assert parent["path"] == str((training.folder / "runs/full/hashtag/artifact").resolve())


def test_an_unfinished_run_is_reported(reading: Done) -> None:
    reading.check("report")
    page = (reading.folder / "runs" / "unfinished" / "clip" / "report.html").read_text()
    assert "<h2>Training</h2>" in page and page.count("<img") >= 4 and "4 x 32 px" in page


def test_an_ablation_trains_nothing_and_compares_the_same(training: Done) -> None:
    training.check("ablate")
    written = training.changed("runs/ablation/stages/", "runs/ablation/runs/")
    assert {Path(path).name for path in written} <= {"recipe.yaml"}
    for path in written:
        assert (training.folder / path).read_text() == (FIXTURE / path).read_text()
    folders = training.folder / "runs" / "ablation", FIXTURE / "runs" / "ablation"
    assert (folders[0] / "report.html").is_file() and not (folders[1] / "report.html").exists()
    for name in ("table.csv", "runs.csv"):
        found, recorded = (list(csv.reader((folder / name).open())) for folder in folders)
        assert len(recorded) >= 3 and found == recorded, name
    found, recorded = (json.loads((f / "ablation.json").read_text()) for f in folders)
    assert_contains(found, recorded, "ablation.json")
