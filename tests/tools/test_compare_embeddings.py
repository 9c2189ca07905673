"""Tests of compare_embeddings: its fp32 recalls equal those of the retrieval suite."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train

from tools.experiments.compare_embeddings import VARIANTS, Pairs, join, main, recalls
from xray.evaluation.retrieval import retrieval
from xray.search.quantisation import shortened


def near_pairs() -> Pairs:
    """Draw 60 images, and three captions near each of them."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((60, 24))
    owner = np.repeat(np.arange(60), 3)
    captions = images[owner] + 1.5 * rng.standard_normal((180, 24))
    return Pairs(shortened(images, 24), shortened(captions, 24), owner)


@pytest.mark.parametrize("dim", [24, 8])
def test_fp32_recalls_equal_the_retrieval_suite(dim: int, tmp_path: Path) -> None:
    pairs = near_pairs()
    sides = (torch.from_numpy(shortened(x, dim)) for x in (pairs.images, pairs.captions))
    metrics = retrieval(*sides, torch.from_numpy(pairs.owner))
    directions = ("text_to_image", "image_to_text")
    expected = [metrics[f"{direction}_R@{k}"] for direction in directions for k in (1, 5, 10)]
    values = {variant[0]: recalls(pairs, dim, variant, tmp_path) for variant in VARIANTS}
    assert np.allclose(values["fp32"], expected, atol=1e-6) and 0.1 < expected[0] < 0.95
    assert np.allclose(values["int8"], expected, atol=0.05)
    fp32, binary = np.mean(values["fp32"]), np.mean(values["binary"])
    assert binary < np.mean(values["binary + query"]) < fp32 and binary < 0.95 * fp32
    assert np.mean(values["binary + fp32"]) > binary


def test_samples_that_lack_one_side_are_left_out() -> None:
    pairs = join(np.eye(3), ["a", "b", "c"], np.eye(4), ["c", "a", "x", "c"])
    assert np.array_equal(pairs.images, np.eye(3)[[0, 2]])
    assert np.array_equal(pairs.captions, np.eye(4)[[0, 1, 3]])
    assert pairs.owner.tolist() == [1, 0, 1]


def test_command_prints_and_writes_tables(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = train("clip", demo, tmp_path / "clip", "train.samples=12", "clip.matryoshka=[8]")
    more = ["--workers", "0", "--out", str(tmp_path / "x.json")]
    command = ["compare_embeddings.py", str(clip.path), str(demo / "heldout"), *more]
    monkeypatch.setattr(sys, "argv", command)
    main()
    rows = json.loads((tmp_path / "x.json").read_text())["tables"][0]["rows"]
    assert [row[:2] for row in rows] == [[dim, v[0]] for dim in ("16", "8") for v in VARIANTS]
    assert "| 16 | binary + fp32 | 2 + 64 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--dims", "17"])
    with pytest.raises(SystemExit, match="the artifact has 16 dimensions"):
        main()
