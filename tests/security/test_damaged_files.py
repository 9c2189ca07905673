"""Damage of every kind in every kind of file that xray reads gives an error of xray's own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipelines.shards.sidecar import open_sidecar, open_whole
from data_pipelines.shards.source import open_source
from data_pipelines.tags.vocabulary import Vocabulary
from xray.artifacts.artifact import open_artifact
from xray.artifacts.lineage import lineage
from xray.config.loading import read_yaml
from xray.errors import XrayError
from xray.models.llm_folder import own_pooling
from xray.recipes.report import find_recipe, stored_results
from xray.search.embedding_file import open_embeddings
from xray.training.checkpoint import read_state
from xray.training.metrics import read_metrics
from xray.training.portable_state import read_buffers, read_weights
from xray.training.replay import read_bundle

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "9205be0"
BUNDLE = "runs/broken/bundles/step_00000001"
CLIP = "runs/full/clip/artifact"
Reader = Callable[[Path], object]


def _shards(root: Path) -> object:
    source = open_source("photos", str(root / "data/photos"), "image")
    keys = [source.index(shard).keys for shard in range(len(source.manifest))]
    return keys, [source.read(shard, 0) for shard in range(len(source.manifest))]


def _tables(root: Path) -> object:
    source = open_source("photos", str(root / "data/photos"), "image")
    names = {path.name.split(".", 1)[1] for path in (root / "data/photos").glob("shards-*.*-*")}
    for name in sorted(names):
        open_whole(source, name)
        sidecar = open_sidecar(source, name)
        if sidecar is not None:
            [sidecar.table(shard) for shard in range(len(source.manifest))]
    return names


def _embeddings(path: Path) -> object:
    found = open_embeddings(path)
    rows = np.arange(len(found))
    return list(found.chunks()), found.take(rows), found.names(rows)


def _from(read: Callable[[Path], object], name: str) -> tuple[str, Reader]:
    return name, lambda root: read(root / name)


READERS: dict[str, Reader] = dict(
    [
        (f"{BUNDLE}/state.json", lambda root: read_state(root / BUNDLE)),
        (f"{BUNDLE}/quarantine.jsonl", lambda root: read_state(root / BUNDLE)),
        (f"{BUNDLE}/bundle.json", lambda root: read_bundle(root / BUNDLE)),
        (f"{BUNDLE}/portable/index.json", lambda root: read_weights(root / BUNDLE)),
        (f"{BUNDLE}/portable/00000.safetensors", lambda root: read_weights(root / BUNDLE)),
        (f"{BUNDLE}/portable/buffers.safetensors", lambda root: read_buffers(root / BUNDLE)),
        _from(read_metrics, "runs/broken/metrics.jsonl"),
        (f"{CLIP}/manifest.json", lambda root: (lineage(root / CLIP), open_artifact(root / CLIP))),
        (f"{CLIP}/llm/config.json", lambda root: own_pooling(root / CLIP / "llm")),
        ("runs/full/report.json", lambda root: find_recipe(root / "runs/full")),
        _from(stored_results, "runs/full/results.json"),
        ("runs/full/clip/config.yaml", lambda root: find_recipe(root / "runs/full")),
        _from(Vocabulary.load, "tags.json"),
        _from(read_yaml, "recipe.yaml"),
        _from(_embeddings, "embeddings/photos.npy"),
        _from(_embeddings, "embeddings/photos.parquet"),
        ("data/photos/00000.tar", _shards),
        ("data/photos/00000.tar.index", _shards),
        ("data/photos/shards.manifest", _shards),
        ("data/photos/00000.tar.texts-5507b194c6a4", _tables),
        ("data/photos/shards-9ac20ee9.texts-5507b194c6a4", _tables),
        ("data/photos/shards-9ac20ee9.text-features", _tables),
    ]
)
JSON = [name for name in READERS if name.endswith((".json", ".jsonl"))]

wrong = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
    st.just([]), st.just({}), st.just(10**30), st.just([[1]]), st.just({"": 0}),
)  # fmt: skip
whole = st.sampled_from(
    [
        b"", b"\0", b"[]", b"{}", b"null", b"7", b'"x"', b"[[]]", b"\xff\xfe{}", b"\xff" * 40,
        b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b'{"a": ' + b"9" * 5_000 + b"}",
        b'"\\ud800"',
    ]
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON document with another value at a path; it is removed for ...."""
    if not path:
        return None if new is ... else new
    result = copy.deepcopy(value)
    owner = result
    for key in path[:-1]:
        owner = owner[key]
    if new is ...:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return result


@st.composite
def damages(draw: st.DrawFn, name: str) -> bytes:
    """Draw damaged contents of a file: another whole, cut, with other bytes, or other JSON."""
    sound = (FIXTURE / name).read_bytes()
    kinds = ["whole", "cut", "bytes", *["json"] * 3 * (name in JSON)]
    kind = draw(st.sampled_from(kinds))
    if kind == "whole":
        return draw(whole)
    if kind == "cut":
        return sound[: draw(st.integers(0, len(sound)))]
    if kind == "bytes":
        start = draw(st.integers(0, len(sound)))
        new = draw(st.binary(min_size=1, max_size=12))
        return sound[:start] + new + sound[start + len(new) :]
    lines = sound.splitlines() if name.endswith(".jsonl") else [sound]
    document = json.loads(draw(st.sampled_from(lines or [b"{}"])))
    path = draw(st.sampled_from(list(places(document))))
    return json.dumps(replaced(document, path, draw(st.one_of(st.just(...), wrong)))).encode()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of an older run's files of all kinds."""
    root = tmp_path_factory.mktemp("damaged") / "files"
    shutil.copytree(FIXTURE, root)
    return root


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    sound = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_by_name(
    files: Path, name: str, data: st.DataObject
) -> None:
    with damaged(files / name, data.draw(damages(name))):
        try:
            READERS[name](files)
        except XrayError as error:
            assert str(error).strip(), "an error without a text"
