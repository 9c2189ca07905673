"""Recall of compressed embeddings, against the search in files and scikit-learn's PCA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from in_process import invoke
from sklearn.decomposition import PCA

from tools.experiments import compare_embeddings as files
from xray.config.loading import build
from xray.errors import ConfigError
from xray.evaluation.compression import Pairs, compression
from xray.evaluation.config import EvalConfig
from xray.evaluation.suites.compression import COMPRESSION
from xray.search.pca import Pca
from xray.search.quantisation import Dtype, normalised, shortened

if TYPE_CHECKING:
    from conftest import Trained

N, D, DIM = 60, 24, 8
KEYS = [f"{way}_R@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def pairs() -> files.Pairs:
    """Images with features of different spread, and three captions near each."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.2, 1.5, D)  # the last features, which a prefix lacks, vary most
    images = spread * rng.standard_normal((N, D)) + 0.3
    owner = np.repeat(np.arange(N), 3)
    captions = images[owner] + spread * rng.standard_normal((3 * N, D))
    return files.Pairs(shortened(images, D), shortened(captions, D), owner)


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    rng = np.random.default_rng(1)
    return shortened(np.linspace(0.2, 1.5, D) * rng.standard_normal((300, D)) + 0.3, D)


@pytest.fixture(scope="module")
def measures(pairs: files.Pairs, train: np.ndarray) -> dict[str, float]:
    images, captions = (torch.from_numpy(rows) for rows in (pairs.images, pairs.captions))
    kind = torch.arange(len(captions))
    own = Pairs(images, captions, torch.from_numpy(pairs.owner), kind)
    return compression(own, [DIM], [], Pca.fit([train]))


@pytest.mark.parametrize(
    ("variant", "dim", "dtype"),
    [
        (f"full{D}_fp32", D, "fp32"),
        (f"full{D}_fp16", D, "fp16"),
        (f"full{D}_int8", D, "int8"),
        (f"full{D}_binary", D, "binary"),
        (f"prefix{DIM}_fp32", DIM, "fp32"),
        (f"prefix{DIM}_int8", DIM, "int8"),
    ],
)
def test_recalls_are_those_of_a_search_in_files(
    pairs: files.Pairs,
    measures: dict[str, float],
    tmp_path: Path,
    variant: str,
    dim: int,
    dtype: Dtype,
) -> None:
    """Binary rows: all are candidates that are compared with the unquantised query."""
    found = files.recalls(pairs, dim, ("", dtype, N if dtype == "binary" else 1, False), tmp_path)
    assert [measures[f"{key}/{variant}"] for key in KEYS] == pytest.approx(found, abs=1e-6)
    stored = np.load(tmp_path / f"{dtype}.npy")
    assert measures[f"bytes/{variant}"] == stored.nbytes / len(stored)


def test_recalls_after_pca_are_those_of_sklearn(
    pairs: files.Pairs, train: np.ndarray, measures: dict[str, float]
) -> None:
    judge = PCA(DIM, svd_solver="full").fit(train.astype(np.float64))
    images, captions = (
        normalised(judge.transform(rows.astype(np.float64)))
        for rows in (pairs.images, pairs.captions)
    )
    cosines = captions @ images.T
    for k in (1, 5, 10):
        best = np.argsort(-cosines, axis=1)[:, :k]
        by_text = (best == pairs.owner[:, None]).any(axis=1).mean()
        best = np.argsort(-cosines.T, axis=1)[:, :k]
        by_image = (pairs.owner[best] == np.arange(N)[:, None]).any(axis=1).mean()
        name = f"pca{DIM}_fp32"
        assert measures[f"text_to_image_R@{k}/{name}"] == pytest.approx(by_text, abs=1e-6)
        assert measures[f"image_to_text_R@{k}/{name}"] == pytest.approx(by_image, abs=1e-6)
    shown = "text_to_image_R@5"
    assert measures[f"{shown}/prefix{DIM}_fp32"] < measures[f"{shown}/pca{DIM}_fp32"]
    assert measures[f"{shown}/pca{DIM}_fp32"] < measures[f"{shown}/full{D}_fp32"]
    assert measures[f"bytes/pca{DIM}_int8"] == DIM and measures[f"bytes/pca{DIM}_binary"] == 1


def test_what_is_kept_is_the_ratio_of_recalls(measures: dict[str, float]) -> None:
    for key in KEYS[1:3]:
        whole, part = measures[f"{key}/full{D}_fp32"], measures[f"{key}/pca{DIM}_binary"]
        kept = measures[f"{key}_kept/pca{DIM}_binary"]
        assert kept == pytest.approx(part / whole) and 0 < kept < 1
        ends = (
            measures[f"{key}_kept_low/pca{DIM}_binary"],
            measures[f"{key}_kept_high/pca{DIM}_binary"],
        )
        assert 0 < ends[0] < kept < ends[1]
        same = [measures[f"{key}_kept{end}/full{D}_fp16"] for end in ("_low", "", "_high")]
        assert max(same) - min(same) < ends[1] - ends[0]
    assert not any(key.startswith(f"{KEYS[0]}_kept/full{D}_fp32") for key in measures)


def test_data_sets_are_those_of_retrieval() -> None:
    lender = {"shards": "a", "same": "caption", "captions": {"mine": 1.0}}
    own = build(EvalConfig, {"retrieval": lender, "compression": {"train": "b", "dims": [4]}})
    filled = own.filled().of(COMPRESSION)
    assert (filled.shards, filled.train, filled.dims) == ("a", "b", [4])
    assert (filled.same, filled.captions) == ("caption", {"mine": 1.0})
    assert own.configured() == ["retrieval"]
    same = build(EvalConfig, {"retrieval": {"shards": "a"}, "compression": {"same": "caption"}})
    assert same.filled().of(COMPRESSION).same == "caption"  # its own setting stays
    with pytest.raises(ConfigError, match="languages: all captions"):
        build(EvalConfig, {"compression": {"languages": ["en"]}}).validate()


def test_the_command_compares_all_variants(
    trained: Trained, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    artifact = trained("clip", "train.samples=24")
    out = tmp_path / "r.json"
    asked = ["eval", artifact, f"data.root={demo}", "eval.retrieval.shards=heldout", "--out", out]
    done = invoke(*asked, "--suite", "retrieval,compression", "eval.compression.train=photos")
    assert done.exit_code == 0, done.stderr
    results = json.loads(out.read_text())
    whole, own = results["retrieval"], results["compression"]
    for key in KEYS:
        for end in ("", "_low", "_high"):
            assert own[f"{key}{end}/full16_fp32"] == whole[f"{key}{end}"]
        assert own[f"chance_{key}"] == whole[f"chance_{key}"]
    told = " ".join(done.stdout.split())
    for shown in (
        "R@10, PCA 8 int8",
        "R@10, prefix 4 binary",
        "R@10, all 16 fp16",
        "64 bytes, 24 pictures",
    ):
        assert shown in told, told
    assert (tmp_path / "r.compression.png").read_bytes().startswith(b"\x89PNG")
    done = invoke(*asked, "--suite", "compression", "eval.compression.dims=[4]")
    variants = {key.partition("/")[2] for key in json.loads(out.read_text())["compression"]}
    assert "prefix4_int8" in variants and not any("pca" in name for name in variants)
    for setting, message in (
        ("eval.compression.dims=[16]", "eval.compression.dims=[16]: the artifact has 16 dim"),
        ("eval.compression.dims=[0]", "eval.compression.dims=[0]: give numbers of dimensions"),
        ("eval.compression.train=nowhere", "eval.compression.train=nowhere: there is no"),
    ):
        done = invoke(*asked, "--suite", "compression", setting)
        assert done.exit_code == 2 and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
