"""Random choice of several captions per sample."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from clip_runs import TWO
from shards import photo, write_tar
from tiny import settings

from data_pipelines.shards.source import open_source
from data_pipelines.text.captions import Caption, choose_captions
from stages.base import Parents
from stages.clip import ClipStage


def test_a_sample_draws_different_captions_of_its_own(demo: Path, tmp_path: Path) -> None:
    texts = [
        ["a red circle", "a small star", "a large ring"],
        ["a blue cross"],
        ["a green square", "a picture of a pink star on the left"],
    ]
    files: dict[str, bytes] = {}
    for number, captions in enumerate(texts):
        files[f"{number}.jpg"] = photo(number)
        files[f"{number}.json"] = json.dumps({"captions": captions}).encode()
    write_tar(tmp_path / "0.tar", files)
    stage = ClipStage(
        settings("clip", demo, tmp_path, TWO, f"data.sources.photos.shards={tmp_path}")
    )
    source = open_source("photos", str(tmp_path), "image")
    stage.prepare({"photos": source}, Parents())
    seen: Counter[tuple[str, ...]] = Counter()
    for seed in (None, *range(30)):
        rng = None if seed is None else np.random.default_rng(seed)
        batch = stage.collate([stage.transform(source.sample(0, m, 32, 4), rng) for m in range(3)])
        assert batch["input_ids"].shape[:2] == (3, 2)
        for own, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
            decode = stage.language.tokenizer.tokenizer.decode
            drawn = [decode(i[m.bool()]).strip() for i, m in zip(ids, mask, strict=True)]
            assert set(drawn) <= set(own) and len(set(drawn)) == min(2, len(own))
            seen[tuple(drawn)] += seed is not None
            assert seed is not None or drawn == (own * 2)[:2]  # without randomness, the first
    assert len(seen) == 6 + 1 + 2  # all pairs, in both orders


def test_no_caption_repeats_before_all_were_drawn() -> None:
    captions = [Caption(str(n), weight, "", n) for n, weight in enumerate((5.0, 1.0, 0.2, 2.0))]
    for seed in range(50):
        drawn = [c.number for c in choose_captions(captions, np.random.default_rng(seed), 11)]
        assert len(drawn) == 11
        for start in (0, 4, 8):
            group = drawn[start : start + 4]
            assert len(set(group)) == len(group)
    one = choose_captions(captions[:1], np.random.default_rng(0), 3)
    assert [c.number for c in one] == [0, 0, 0]
    assert [c.number for c in choose_captions(captions, None, 6)] == [0, 1, 2, 3, 0, 1]


def test_captions_are_drawn_by_weight() -> None:
    weights, times = [4.0, 2.0, 1.0, 1.0], 4000
    captions = [Caption(str(n), weight, "", n) for n, weight in enumerate(weights)]
    p = [weight / sum(weights) for weight in weights]
    rng = np.random.default_rng(1)
    pairs = Counter(
        frozenset(c.number for c in choose_captions(captions, rng, 2)) for _ in range(times)
    )
    expected = {
        frozenset((i, j)): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        for i in range(4)
        for j in range(i)
    }
    assert sum(expected.values()) == pytest.approx(1) and pairs.keys() == expected.keys()
    chi = sum((pairs[k] - times * v) ** 2 / (times * v) for k, v in expected.items())
    assert chi < 20.5  # chi-square with 5 degrees of freedom, p = 0.001
    for seed in range(200):  # one caption takes one draw, as it always has
        mine, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        expected_number = theirs.choice(4, p=np.array(weights) / sum(weights))
        assert choose_captions(captions, mine)[0].number == expected_number
        assert mine.random() == theirs.random()
