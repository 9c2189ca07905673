"""Embeddings in files and search over them, against numpy over all rows."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process import invoke

from xray.errors import ConfigError, DataError
from xray.search import embedding_file as file_format
from xray.search.embedding_file import (
    Embeddings,
    Names,
    is_embedding_file,
    open_embeddings,
    write_embeddings,
)
from xray.search.exact import check_same_rows, search
from xray.search.quantisation import calibrate, quantise, restored, shortened

N, D = 700, 40
KINDS = list(itertools.product(("fp32", "fp16", "int8", "binary"), (".parquet", ".npy")))


def random_rows(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Normalised; dimensions of different spread, none of them around zero."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dim)) * rng.uniform(0.2, 2, dim) + rng.normal(0, 0.3, dim)
    return shortened(rows, dim)


def saved(
    path: Path, rows: np.ndarray, dtype: str, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> Embeddings:
    """Rows in a file of many groups, written in blocks of other sizes."""
    monkeypatch.setattr(file_format, "GROUP", 128)
    facts = {"rows": len(rows), "dim": rows.shape[1], "dtype": dtype, "modality": "image"}
    facts |= {"artifact": {"digest": "a"}, "source": {"digest": "b"}, "keep_rate": None, **more}
    if dtype == "int8":
        scale, offset = calibrate(rows.min(axis=0), rows.max(axis=0))
        facts |= {"scale": scale.tolist(), "offset": offset.tolist()}
    blocks = [
        (
            rows[at : at + 90],
            Names([f"k{i}" for i in range(at, min(at + 90, len(rows)))], ["p"] * n),
        )
        for at, n in ((at, min(90, len(rows) - at)) for at in range(0, len(rows), 90))
    ]
    write_embeddings(path, facts, iter(blocks))
    return open_embeddings(path)


def cosines(found: Embeddings, stored: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[Q, N] in double precision, from what is stored."""
    if found.facts["dtype"] != "binary":
        return queries.astype(np.float64) @ restored(stored, found.facts).astype(np.float64).T
    signs = [np.unpackbits(x, axis=1, count=D) for x in (quantise(queries, found.facts), stored)]
    return 1 - 2 * (signs[0][:, None] != signs[1][None]).mean(axis=2)


@pytest.mark.parametrize(("dtype", "ending"), KINDS)
def test_search_is_exact(
    dtype: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = random_rows(N, D), random_rows(5, D, seed=1)
    found = saved(tmp_path / f"x{ending}", rows, dtype, monkeypatch)
    stored = np.concatenate(list(found.chunks()))
    assert len(found) == N and np.array_equal(stored, quantise(rows, found.facts))
    expected = cosines(found, stored, queries)
    hits = search(found, queries, 12, oversample=1)
    order = np.argsort(-expected, axis=1, kind="stable")[:, :12]
    assert np.array_equal(hits.rows, order)
    assert np.allclose(hits.scores, np.take_along_axis(expected, order, 1), atol=1e-6)
    picked = np.array([N - 1, 0, 130, 129])
    assert np.array_equal(found.take(picked), stored[picked])
    assert found.names(picked.tolist()).keys == [f"k{row}" for row in picked]
    assert search(found, queries, 2 * N).rows.shape == (5, N)


def test_rows_are_stored_as_they_should_be() -> None:
    rows = random_rows(N, D)
    assert np.array_equal(quantise(rows, {"dtype": "fp32"}), rows)
    assert np.abs(quantise(rows, {"dtype": "fp16"}) - rows).max() <= 2**-12
    signs = restored(quantise(rows, {"dtype": "binary"}), {"dtype": "binary", "dim": D})
    assert np.array_equal(signs > 0, rows > 0)
    assert np.allclose(np.linalg.norm(signs, axis=1), 1)


def test_int8_is_within_half_a_step() -> None:
    rows = random_rows(N, D)
    rows[:, 3] = 0.25  # a dimension that says nothing
    scale, offset = calibrate(rows.min(axis=0), rows.max(axis=0))
    facts = {"dtype": "int8", "scale": scale.tolist(), "offset": offset.tolist()}
    stored = quantise(rows, facts)
    assert stored.dtype == np.int8 and stored.min() == -128 and stored.max() == 127
    error = np.abs(restored(stored, facts) - rows)
    assert (error <= scale / 2 * 1.001 + 1e-7).all() and np.allclose(error[:, 3], 0, atol=1e-6)
    spread = rows.max(axis=0) - rows.min(axis=0)
    assert np.allclose(np.delete(scale, 3), np.delete(spread, 3) / 255, rtol=1e-6)


def test_equally_near_signs_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.repeat(random_rows(4, D), 100, axis=0)
    found = saved(tmp_path / "x.npy", rows, "binary", monkeypatch)
    hits = search(found, rows[250:251], 5, oversample=1)
    assert hits.rows.tolist() == [[200, 201, 202, 203, 204]] and (hits.scores == 1).all()


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_candidates_are_compared_again(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, queries = random_rows(N, D), random_rows(20, D, seed=2)
    bits = saved(tmp_path / f"bits{ending}", rows, "binary", monkeypatch)
    whole = saved(tmp_path / f"whole{ending}", rows, "fp32", monkeypatch)
    exact = np.argsort(-(queries @ rows.T), axis=1)[:, :5]
    near = search(bits, queries, 40, oversample=1).rows  # of these 8 x 5 the best are taken
    signs = restored(np.concatenate(list(bits.chunks())), bits.facts)
    for other, values in ((None, signs), (whole, rows)):
        hits = search(bits, queries, 5, 8, other)
        for query, candidates, found in zip(queries, near, hits.rows, strict=True):
            best = candidates[np.argsort(-(values[candidates] @ query), kind="stable")[:5]]
            assert found.tolist() == best.tolist()

    def right(*how: Any) -> float:
        found = search(bits, queries, 5, *how).rows
        return np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)])

    assert right(1) < right(8) < right(8, whole)
    assert np.array_equal(search(bits, queries, 5, N, whole).rows, exact)


def test_a_prefix_is_normalised_again() -> None:
    rows = random_rows(N, D)
    part = shortened(rows, 8)
    assert part.shape == (N, 8) and np.allclose(np.linalg.norm(part, axis=1), 1, atol=1e-6)
    assert np.allclose(part * np.linalg.norm(rows[:, :8], axis=1)[:, None], rows[:, :8], atol=1e-6)


def test_files_that_are_none_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = random_rows(50, D)
    one = saved(tmp_path / "one.npy", rows, "fp32", monkeypatch)
    other = saved(tmp_path / "other.npy", rows, "fp32", monkeypatch, keep_rate=0.5)
    with pytest.raises(ConfigError, match=r"other rows \(keep_rate: 0.5, not None\)"):
        check_same_rows(one, other)
    texts = saved(tmp_path / "texts.npy", rows, "fp32", monkeypatch, captions={"synthetic": 1})
    with pytest.raises(ConfigError, match=r"other rows \(captions: "):
        check_same_rows(one, texts)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "others.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    np.save(tmp_path / "alone.npy", rows)
    np.save(tmp_path / "other.npy", rows[:20])  # its names are of 50
    for name in ("others.parquet", "broken.parquet", "alone.npy", "other.npy", "gone.npy", "x.txt"):
        with pytest.raises(DataError, match=name):
            open_embeddings(tmp_path / name)
    saved(tmp_path / "one.parquet", rows, "fp32", monkeypatch)
    for name in ("one.parquet", "one.npy", "broken.parquet", "gone.parquet"):
        assert is_embedding_file(tmp_path / name)
    assert not is_embedding_file(tmp_path / "others.parquet")  # a list of files
    told = invoke("search", tmp_path / "others.parquet", "a dog")
    assert told.exit_code == 2 and "give the artifact that is to embed it" in told.stderr


def test_rows_are_there_when_their_names_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two files leaves nothing that is taken for a whole one."""
    replace, moved = os.replace, []

    def once(source: Path, target: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "x.npy", random_rows(50, D), "fp32", monkeypatch)
    assert moved == [tmp_path / "x.npy.json"] and not (tmp_path / "x.npy").exists()


@pytest.mark.parametrize("ending", [".parquet", ".npy"])
def test_a_flipped_bit_is_found_or_harmless(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bit of some bytes of the file, and of the names beside a .npy."""
    path = tmp_path / f"x{ending}"
    saved(path, random_rows(N, D), "int8", monkeypatch)

    def content() -> tuple[bytes, Names, Any]:
        found = open_embeddings(path)
        every = np.arange(N)
        taken = found.take(every)
        assert (taken == np.concatenate(list(found.chunks()))).all()
        return taken.tobytes(), found.names(every.tolist()), found.facts

    whole, found = content(), 0
    for file in sorted(tmp_path.iterdir()):
        sound = file.read_bytes()
        for place in np.random.default_rng(0).integers(0, 8 * len(sound), 150).tolist():
            flipped = bytearray(sound)
            flipped[place // 8] ^= 1 << place % 8
            file.write_bytes(flipped)
            try:
                assert content() == whole, f"bit {place} of {file.name}"
            except DataError as error:
                found += 1
                assert path.name in str(error)
        file.write_bytes(sound)
    assert found > 100


def test_files_of_older_versions_have_no_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.npy"
    rows = saved(path, random_rows(N, D), "fp32", monkeypatch).take(np.arange(N))
    names = tmp_path / "x.npy.json"
    content = json.loads(names.read_text())
    names.write_text(json.dumps({key: content[key] for key in ("xray", "rows")}))
    caplog.set_level("WARNING", "xray")
    older = open_embeddings(path)
    assert (older.take(np.arange(N)) == rows).all() and len(list(older.chunks())) == 6
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: an older version wrote it without checksums")
