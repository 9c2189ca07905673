"""Duplicates and leaks, compared with loops over all pairs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pools import config, dropped, kept, pool
from shards import jpeg, photo, write_tar

from data_pipelines.curation import dedup
from data_pipelines.curation.curate import curate
from data_pipelines.curation.dedup import mark_duplicates, similar_pairs
from data_pipelines.decode import near_duplicates
from data_pipelines.decode.decoders import AvClip
from data_pipelines.decode.near_duplicates import (
    components,
    dhash,
    groups_of,
    is_near,
    near_values,
)
from data_pipelines.ingest import demo
from data_pipelines.shards.sidecar import write_sidecar
from data_pipelines.shards.source import open_source


def clustered(number: int, rng: np.random.Generator) -> np.ndarray:
    """Make hashes (int64) of which many differ in a few bits."""
    seeds = rng.integers(-(2**63), 2**63, number)
    hashes = [seeds]
    for flips in range(1, 6):
        bits = [np.int64(1) << rng.integers(0, 63, number) for _ in range(flips)]
        hashes.append(seeds ^ np.bitwise_xor.reduce(bits))
    return np.concatenate([*hashes, seeds[:5]])


def hamming(a: int, b: int) -> int:
    """Return the Hamming distance of two 64-bit numbers."""
    return ((a ^ b) % 2**64).bit_count()


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
def test_all_near_hashes_are_found(distance: int) -> None:
    hashes = clustered(40, np.random.default_rng(0))
    values = np.unique(hashes.view(np.uint64))
    expected = {
        (i, j)
        for i, a in enumerate(values.tolist())
        for j, b in enumerate(values.tolist())
        if i < j and hamming(a, b) <= distance
    }
    assert {tuple(pair) for pair in near_values(values, distance).tolist()} == expected
    assert len(expected) > 40 * distance - 1
    groups, numbers = groups_of(hashes, distance), hashes.tolist()
    for i, a in enumerate(numbers):  # near hashes are in one group
        assert all(
            groups[i] == groups[j] for j, b in enumerate(numbers) if hamming(a, b) <= distance
        )
    others = clustered(10, np.random.default_rng(0))[7:31]
    near = [any(hamming(a, b) <= distance for b in others.tolist()) for a in numbers]
    assert is_near(hashes, others, distance).tolist() == near


def test_more_bands_find_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.unique(clustered(2000, np.random.default_rng(0)).view(np.uint64))
    expected = near_values(values, 3)  # 4 bands of 16 bits
    monkeypatch.setattr(
        near_duplicates, "LOG2_BUCKET", -24
    )  # as many bands as for 2^24 times the values
    assert np.array_equal(near_values(values, 3), expected) and len(expected) > 2000


def test_components_equal_a_simple_loop() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 200, (120, 2))
    group = list(range(200))
    for a, b in pairs.tolist() * 200:
        group[a] = group[b] = min(group[a], group[b])
    assert components(200, pairs).tolist() == group
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    assert not components(1000, rng.permutation(chain)).any()
    assert components(3, np.empty((0, 2), np.int64)).tolist() == [0, 1, 2]


def test_the_smallest_key_is_kept() -> None:
    keys = ["d", "b", "c", "a", "b", "z"]
    duplicate = mark_duplicates(np.array([7, 7, 7, 2, 7, 2]), keys.__getitem__)
    assert duplicate.tolist() == [True, False, True, False, True, True]


def rows_with_copies(rng: np.random.Generator, number: int, size: int) -> np.ndarray:
    """Make embeddings, a noisy copy of each, and two rows of zeros."""
    x = rng.standard_normal((number, size))
    return np.concatenate([x, x + 0.1 * rng.standard_normal(x.shape), np.zeros((2, size))])


def test_similar_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows_with_copies(np.random.default_rng(0), 1200, 24)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    expected = {(i, j) for i, j in np.argwhere(unit @ unit.T > 0.95).tolist() if i < j}
    pairs = similar_pairs(lambda rows: x[rows], len(x), 0.95)
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(expected) >= 1200
    monkeypatch.setattr(dedup, "EXACT_BELOW", 100)
    pairs = similar_pairs(lambda rows: x[rows], len(x), 0.95)
    within_clusters = {tuple(sorted(pair)) for pair in pairs.tolist()}
    assert within_clusters <= expected and len(within_clusters) > 0.9 * len(expected)


def test_dhash_is_robust_to_resizing_and_compression() -> None:
    hashes = [dhash(Image.open(io.BytesIO(photo(seed)))) for seed in range(60)]
    for seed, original in enumerate(hashes):
        copies = [photo(seed, quality=70), photo(seed, size=(128, 96))]
        assert all(hamming(dhash(Image.open(io.BytesIO(copy))), original) <= 3 for copy in copies)
    distances = [hamming(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 10
    assert dhash(Image.new("RGB", (40, 30), "red")) == 0  # no gradients
    ramp = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8), (80, 1)))
    assert dhash(ramp) == -1 and dhash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0


def dog(key: str, media: bytes, **more: Any) -> dict[str, Any]:
    """Make a row with the caption "dog"."""
    return {"key": key, "caption": "dog", "media": media, **more}


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    shards = [
        [dog("c", photo(1)), dog("b", photo(2)), dog("f", jpeg()), dog("g", jpeg((1, 2, 3)))],
        [dog("a", photo(1)), dog("d", photo(1, quality=70)), dog("e", b"no picture")],
    ]
    source = pool(tmp_path / "pool", shards)
    curated = curate(source, config(tmp_path, ["dog"], dedup={"exact": True}))
    assert sorted(kept(curated)) == list("abdefg") and dropped(curated) == {
        "exact duplicate": (1, 1)
    }
    perceptual = {"perceptual": True, "distance": 3}
    curated = curate(source, config(tmp_path, ["dog"], dedup=perceptual))
    assert sorted(kept(curated)) == list("abfg")  # images without gradients are not compared
    assert dropped(curated) == {"undecodable": (1, 1), "perceptual duplicate": (2, 2)}
    steps = {step.name: step.keys for step in curated.report.steps}
    assert sorted(steps["perceptual duplicate"]) == ["c", "d"] and steps["undecodable"] == ["e"]
    recorded = [
        [dog(row["key"], row["media"], sha256="ab" * 32) for row in rows] for rows in shards
    ]
    recorded[1][2]["sha256"] = "no digits"
    source = pool(tmp_path / "recorded", recorded)
    by_json = {"exact": True, "sha256": "json"}
    assert sorted(kept(curate(source, config(tmp_path, ["dog"], dedup=by_json)))) == ["a", "e"]


def test_similar_samples_are_dropped(tmp_path: Path) -> None:
    source = pool(tmp_path / "pool", [[dog(k, b"") for k in "bca"], [dog(k, b"") for k in "de"]])
    x = np.array([[1, 0], [0, 1], [1, 0.1], [-1, 0]], np.float32)  # of b, c, a, d
    write_sidecar(
        source,
        "vectors",
        lambda shard: {
            "members": np.array([[0, 1, 2], [0]][shard], np.int32),
            "embeddings": [x[:3], x[3:]][shard],
        },
        {},
    )
    curated = curate(source, config(tmp_path, ["dog"], dedup={"embeddings": "vectors"}))
    assert sorted(kept(curated)) == list("acde") and dropped(curated) == {
        "embedding duplicate": (1, 1)
    }


def test_leaks_are_dropped_and_counted_by_set(tmp_path: Path) -> None:
    pool(tmp_path / "val", [[dog("1", photo(1)), dog("2", photo(2))], [dog("3", b"not one")]])
    pool(tmp_path / "test", [[dog("1", photo(1)), dog("9", photo(9))]])
    rows = [dog("a", photo(1)), dog("b", photo(2, quality=70)), dog("c", photo(3)), dog("d", b"?")]
    source = pool(tmp_path / "pool", [rows])
    sets = {name: str(tmp_path / name) for name in ("val", "test")}
    dedup = {"evaluation": sets, "distance": 3}
    curated = curate(source, config(tmp_path, ["dog"], dedup=dedup))
    assert list(kept(curated)) == ["c"]
    assert dropped(curated) == {"undecodable": (1, 1), "in an evaluation set": (2, 2)}
    leaks = {"val": {"exact": 1, "perceptual": 2}, "test": {"exact": 1, "perceptual": 1}}
    assert curated.report.leaks == leaks
    again = curate(source, config(tmp_path, ["dog"], dedup=dedup))
    assert again.report.leaks == leaks and again.report.steps == curated.report.steps


def test_clips_are_compared_by_their_middle_frame(tmp_path: Path) -> None:
    def clip(move: str, number: int) -> bytes:
        scene = demo.Scene("red", "star", "white", "large", "in the middle", move)
        size = demo.DemoConfig(side=64, frames=9)
        return demo._clip(scene, size, np.random.default_rng(number))

    media = [clip("up", 0), clip("up", 0), clip("down", 1), b"no clip"]
    write_tar(tmp_path / "0.tar", {f"{number}.mp4": data for number, data in enumerate(media)})
    table = dedup.MediaHasher(open_source("clips", str(tmp_path), "video"))(0)
    exact, dhashes = table["exact"].tolist(), table["perceptual"].tolist()
    assert exact[0] == exact[1] != exact[2] and dhashes[0] == dhashes[1] != dhashes[2]
    assert table["broken"].tolist() == [0, 0, 0, 1]
    for data, expected in zip(media[:3], dhashes, strict=False):
        (frame,) = AvClip(data).read(np.array([4]), 0)
        assert expected != 0 and hamming(dhash(Image.fromarray(frame)), expected) <= 2
