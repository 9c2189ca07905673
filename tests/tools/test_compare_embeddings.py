"""tools/compare_embeddings.py: its recalls are those of the evaluation, where nothing is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train

from tools.experiments.compare_embeddings import WAYS, Pairs, joined, main, recalls
from xray.evaluation.retrieval import retrieval
from xray.search.embedding_file import shortened


def near_pairs() -> Pairs:
    """Captions that lie around their pictures, three of each."""
    rng = np.random.default_rng(0)
    pictures = rng.standard_normal((60, 24))
    owner = np.repeat(np.arange(60), 3)
    captions = pictures[owner] + 1.5 * rng.standard_normal((180, 24))
    return Pairs(shortened(pictures, 24), shortened(captions, 24), owner)


@pytest.mark.parametrize("dim", [24, 8])
def test_fp32_is_what_the_evaluation_finds(dim: int, tmp_path: Path) -> None:
    pairs = near_pairs()
    sides = (torch.from_numpy(shortened(x, dim)) for x in (pairs.pictures, pairs.captions))
    expected = retrieval(*sides, torch.from_numpy(pairs.owner))
    wanted = [
        expected[f"{w}_R@{k}"] for w in ("text_to_image", "image_to_text") for k in (1, 5, 10)
    ]
    found = {way[0]: recalls(pairs, dim, way, tmp_path) for way in WAYS}
    assert np.allclose(found["fp32"], wanted, atol=1e-6) and 0.1 < wanted[0] < 0.95
    assert np.allclose(found["int8"], wanted, atol=0.05)
    whole, bits = np.mean(found["fp32"]), np.mean(found["binary"])
    assert bits < np.mean(found["binary + query"]) < whole and bits < 0.95 * whole
    assert np.mean(found["binary + fp32"]) > bits


def test_samples_that_lack_one_side_are_left_out() -> None:
    pairs = joined(np.eye(3), ["a", "b", "c"], np.eye(4), ["c", "a", "x", "c"])
    assert np.array_equal(pairs.pictures, np.eye(3)[[0, 2]])
    assert np.array_equal(pairs.captions, np.eye(4)[[0, 1, 3]]) and pairs.owner.tolist() == [
        1,
        0,
        1,
    ]


def test_the_command_prints_and_writes(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = train("clip", demo, tmp_path / "clip", "train.samples=12", "clip.matryoshka=[8]")
    more = ["--workers", "0", "--out", str(tmp_path / "x.json")]
    command = ["compare_embeddings.py", str(clip.path), str(demo / "heldout"), *more]
    monkeypatch.setattr(sys, "argv", command)
    main()
    rows = json.loads((tmp_path / "x.json").read_text())["tables"][0]["rows"]
    assert [row[:2] for row in rows] == [[dim, way[0]] for dim in ("16", "8") for way in WAYS]
    assert "| 16 | binary + fp32 | 2 + 64 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--dims", "17"])
    with pytest.raises(SystemExit, match="the artifact has 16 dimensions"):
        main()
