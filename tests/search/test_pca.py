"""PCA of embeddings: equal to scikit-learn's, stored in the file, and applied to queries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from in_process import invoke
from sklearn.decomposition import PCA

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import Encoder, restore_encoder
from xray.errors import DataError
from xray.search.embedding_file import Names, open_embeddings, write_embeddings
from xray.search.pca import Pca, shaped
from xray.search.quantisation import normalised, restored, shortened

if TYPE_CHECKING:
    from conftest import Trained

N, D = 400, 20


def rows(count: int = N, seed: int = 0) -> np.ndarray:
    """Draw normalised rows whose mean is not 0 and whose directions vary differently."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, D)) * np.geomspace(0.05, 2, D)
    return shortened(mixed @ np.linalg.qr(rng.standard_normal((D, D)))[0] + 0.4, D)


def same_up_to_sign(one: np.ndarray, other: np.ndarray) -> bool:
    return np.allclose(np.abs((one * other).sum(axis=1)), 1, atol=1e-6)


@pytest.mark.parametrize("count", [N, D // 2])
def test_components_are_those_of_sklearn(count: int) -> None:
    """With fewer rows than features, too."""
    train = rows(count)
    judge = PCA(svd_solver="full").fit(train.astype(np.float64))
    pca = Pca.fit(np.array_split(train, 7))
    kept = min(D, count - 1)
    assert pca.components.shape == (kept, D) and pca.samples == count
    assert np.allclose(pca.mean, judge.mean_, atol=1e-6)
    assert np.allclose(pca.variance, judge.explained_variance_[:kept], atol=1e-6)
    assert same_up_to_sign(pca.components, judge.components_[:kept])
    assert pca.total == pytest.approx(judge.explained_variance_.sum(), abs=1e-6)
    part, other = pca.first(5), rows(50, seed=0)
    signs = np.sign((part.components * judge.components_[:5]).sum(axis=1))
    expected = normalised(judge.transform(other.astype(np.float64))[:, :5] * signs)
    assert np.allclose(part.project(other), expected, atol=1e-5)
    largest = np.abs(part.components).argmax(axis=1)
    assert (part.components[np.arange(5), largest] > 0).all()
    share = judge.explained_variance_ratio_[:5].sum()
    assert part.facts()["variance_kept"] == pytest.approx(share, abs=1e-6)


def test_the_facts_hold_all_of_it() -> None:
    pca = Pca.fit([rows()]).first(6)
    facts = {"width": D, "dim": 6, "pca": json.loads(json.dumps(pca.facts()))}
    again = Pca.of(facts)
    assert again is not None and again.facts() == pca.facts()
    assert np.array_equal(shaped(rows(9), facts), pca.project(rows(9)))
    assert np.array_equal(shaped(rows(9), {"dim": 6}), shortened(rows(9), 6))
    with pytest.raises(ValueError, match="1 embeddings have no principal components"):
        Pca.fit([rows(1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensors": "AAAA"}, "its pca cannot be read"),
        ({"tensors": "no base64!"}, "sound embedding file"),
        ({"samples": None}, "its pca cannot be read"),
        (None, "does not project 20 features to 6"),
    ],
)
def test_a_file_with_a_damaged_projection_is_refused(
    tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    pca = Pca.fit([rows()]).first(6 if change else 5)
    facts = {"rows": 3, "dim": 6, "width": D, "dtype": "fp32", "modality": "image"}
    facts |= {"artifact": {}, "source": {}, "keep_rate": None}
    facts["pca"] = {**pca.facts(), **(change or {})}
    block = np.zeros((3, 6), np.float32), Names(["a"] * 3, ["b"] * 3)
    write_embeddings(tmp_path / "x.parquet", facts, [block])
    with pytest.raises(DataError, match=message):
        open_embeddings(tmp_path / "x.parquet")


def test_embeddings_and_queries_are_projected_by_the_same(
    trained: Trained, demo: Path, tmp_path: Path
) -> None:
    artifact, other = trained("clip", "train.samples=24"), trained("mae", "train.samples=24")

    def embed(source: str, name: str, *more: object, expect: int = 0, by: Path = artifact) -> str:
        arguments = "embed", by, demo / source, "--out", tmp_path / name, "--workers", 0, *more
        done = invoke(*arguments)
        assert done.exit_code == expect, done.output
        return " ".join(done.output.split())

    def stored(name: str) -> np.ndarray:
        found = open_embeddings(tmp_path / name)
        return restored(np.concatenate(list(found.chunks())), found.facts)

    embed("photos", "train.npy")
    embed("heldout", "whole.npy")
    own = "--pca", tmp_path / "train.npy", "--dim", 6
    told = embed("heldout", "small.parquet", *own)
    facts = open_embeddings(tmp_path / "small.parquet").facts
    judge = PCA(6, svd_solver="full").fit(stored("train.npy").astype(np.float64))
    assert f"PCA of 96 embeddings in {tmp_path / 'train.npy'} keeps" in told
    assert f"{100 * judge.explained_variance_ratio_.sum():.1f} % of their variance" in told
    pca = Pca.of(facts)
    assert pca is not None and same_up_to_sign(pca.components, judge.components_)
    assert np.allclose(stored("small.parquet"), pca.project(stored("whole.npy")), atol=1e-5)
    assert "warning" not in told and "pca" not in open_embeddings(tmp_path / "whole.npy").facts

    embed("heldout", "small.npy", "--pca", tmp_path / "small.parquet", "--texts", "--dtype", "int8")
    again = open_embeddings(tmp_path / "small.npy").facts
    assert again["pca"] == facts["pca"] and again["modality"] == "text" and again["dim"] == 6

    encoder = restore_encoder(open_artifact(str(artifact)))
    assert isinstance(encoder, Encoder)
    scores = stored("small.parquet") @ pca.project(encoder.encode_text(["a red circle"]).numpy())[0]
    done = invoke("search", tmp_path / "small.parquet", "a red circle", "--top", 3)
    best = np.argsort(-scores)[:3]
    keys = open_embeddings(tmp_path / "small.parquet").names(best.tolist()).keys
    assert done.exit_code == 0 and re.findall(r"\d{9}", done.output) == keys
    assert f"{scores[best[0]]:.4f}" in done.output

    assert "1 parts were there" in embed("heldout", "small.parquet", *own)
    embed("heldout", "cut.npy", "--dim", 6)
    for source, name, more, says in (
        ("heldout", "small.parquet", ("--dim", 6), "contains other embeddings (pca: "),
        ("heldout", "cut.npy", own, "contains other embeddings (pca: None -> "),
        ("heldout", "x.npy", ("--pca", tmp_path / "gone.npy"), "gone.npy does not exist"),
        ("heldout", "x.npy", ("--pca", tmp_path / "cut.npy"), "of 6 of 16 features in fp32"),
        ("heldout", "x.npy", (*own[:2], "--dim", 17), "gives 16 components"),
        ("heldout", "x.npy", ("--pca", tmp_path / "small.npy", "--dim", 7), "gives 6 components"),
    ):
        assert says in embed(source, name, *more, expect=2), says
    assert "was made by artifact" in embed("heldout", "x.npy", *own, expect=2, by=other)
    done = invoke("search", tmp_path / "small.parquet", "a dog", "--rescore", tmp_path / "cut.npy")
    assert done.exit_code == 2 and "other rows (pca: None, not" in done.output
