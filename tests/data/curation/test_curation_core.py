"""Curation's parts: matching, balanced sampling and metadata, against plain loops."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from shards import photo, write_tar

from data_pipelines.curation import phrase_matcher as matching
from data_pipelines.curation.balance import (
    Matches,
    balance,
    count_entries,
    draw,
    tail_share,
    take_rows,
    threshold_for,
)
from data_pipelines.curation.filters import within_cap
from data_pipelines.curation.metadata import (
    NgramConfig,
    NgramCounts,
    build_metadata,
    count_ngrams,
    make_metadata,
    read_metadata,
    write_metadata,
)
from data_pipelines.curation.phrase_matcher import PhraseMatcher
from data_pipelines.shards.source import open_source
from xray.errors import ConfigError

# matching -------------------------------------------------------------------------------------


def random_texts(number: int, rng: random.Random, words: Sequence[str]) -> list[str]:
    glue = [" "] * 12 + ["  ", ", ", " .", "-", "\t", "\n", "\r\n", "\u00a0", "?!", "` "]
    return [
        "".join(rng.choice(words) + rng.choice(glue) for _ in range(rng.randrange(12)))
        for _ in range(number)
    ]


def spaced_by_hand(text: str) -> str:
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    return re.sub(r"\s", " ", f" {text} ")


def test_matchers_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    words = [*["dog", "cat", "hot", "red", "car", "a", "b", "dd"], "dog's", "Über", "ß", "U.S."]
    entries = list(dict.fromkeys([e.strip(" \t\n") for e in random_texts(400, rng, words)]))
    entries = [e for e in entries if e] + ["dog", "U.S.", "a  b", "long" * 9, "long" * 9 + "er"]
    texts = [*random_texts(800, rng, [*words, "long" * 9, "long" * 9 + "er"]), "", "dog"]
    needles = [spaced_by_hand(entry) for entry in entries]
    first = [needles.index(needle) for needle in needles]
    truth = [
        sorted({first[i] for i, needle in enumerate(needles) if needle in text})
        for text in map(spaced_by_hand, texts)
    ]
    assert sum(map(len, truth)) > 2000
    matcher = PhraseMatcher(entries)
    for chunk in (matching.CHUNK, 40):
        monkeypatch.setattr(matching, "CHUNK", chunk)
        found, ends = matcher.find(texts)
        assert [row.tolist() for row in np.split(found, ends[:-1])] == truth


def test_scripts_without_spaces_match_anywhere() -> None:
    matcher = PhraseMatcher(["東京", "東京タワー", "京都", "in"])
    found, ends = matcher.find(["私は東京タワーに行く", "in京都、東京。", "東 京", "東京-in"])
    assert [row.tolist() for row in np.split(found, ends[:-1])] == [[0, 1], [0, 2, 3], [0], [0]]
    found, ends = matcher.find(["東京\u3000京都", "in\u00a0a\r\nroom"])  # white space of any kind
    assert [row.tolist() for row in np.split(found, ends[:-1])] == [[0, 2], [3]]


# balance --------------------------------------------------------------------------------------


def zipf_pool(samples: int, entries: int) -> Matches:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, samples)
    per_text = rng.integers(1, 6, int(sizes.sum()))
    ids = np.minimum(rng.zipf(1.3, int(per_text.sum())) - 1, entries - 1).astype(np.int32)
    hashes = rng.integers(-(2**63), 2**63, samples)
    texts = np.concatenate([np.arange(size) for size in sizes]).astype(np.int32)
    return Matches(hashes, np.cumsum(sizes), texts, np.cumsum(per_text), ids)


def test_texts_are_kept_with_their_probability() -> None:
    matches = zipf_pool(30_000, 500)
    counts = count_entries([matches], 500)
    in_python = Counter(matches.entries.tolist())
    assert counts.tolist() == [in_python[entry] for entry in range(500)]
    drawn = balance(counts, [slice(0, 500)], 100.0)
    rows = [set(row.tolist()) for row in np.split(matches.entries, matches.entry_ends[:-1])]
    p = np.array([1 - math.prod(1 - min(1, 100 / in_python[e]) for e in row) for row in rows])
    seen = np.mean([draw(matches, drawn.rates, seed) for seed in range(4)], axis=0)
    for low, high in ((0, 0.01), (0.01, 0.1), (0.1, 0.5), (0.5, 1)):
        some = (p >= low) & (p < high)
        expected, sigma = p[some].sum(), np.sqrt((p * (1 - p))[some].sum() / 4)
        assert some.sum() > 300 and abs(seen[some].sum() - expected) < 4 * sigma
    assert (seen[p == 1] == 1).all()


def test_draws_are_of_the_sample_and_nothing_else() -> None:
    matches = zipf_pool(300, 50)
    rates = np.linspace(0, 0.6, 50)
    whole = draw(matches, rates, 7)
    mask = np.random.default_rng(1).random(len(whole)) < 0.5
    assert np.array_equal(draw(matches.only(mask), rates, 7), whole[mask])
    assert not np.array_equal(draw(matches, rates, 8), whole)

    def mixed(x: int) -> int:  # splitmix64, in python's integers
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    base = int(np.random.SeedSequence([7]).generate_state(1, np.uint64)[0])
    key, starts = mixed((base + golden) % 2**64), [0, *matches.entry_ends.tolist()]
    for row, sample in enumerate(matches.sample_of[:200].tolist()):
        own = int(matches.hashes[sample]) % 2**64 ^ key
        of_text = mixed((own + (int(matches.texts[row]) + 1) * golden) % 2**64)
        entries = matches.entries[starts[row] : starts[row + 1]].tolist()
        lets = [
            (mixed((of_text + (e + 1) * golden) % 2**64) >> 11) / 2**53 < rates[e] for e in entries
        ]
        assert whole[row] == any(lets)


def test_thresholds_of_languages() -> None:
    # English: counts below t = 50 are 10 + 20 + 30 of 200 matches: a tail of 0.3.
    english, other = np.array([10, 140, 20, 30]), np.array([0, 8, 1, 70, 3, 18])
    assert tail_share(english, 50) == 0.3
    # 1, 3, 8, 18, 70 of 100: cumulated .01, .04, .12, .30, 1.
    assert threshold_for(other, 0.3) == 18
    assert threshold_for(other, 0.2) == 8 and threshold_for(other, 0.22) == 18
    counts = np.concatenate([english, other])
    drawn = balance(counts, [slice(0, 4), slice(4, 10)], 50, reference=0)
    assert drawn.thresholds == (50, 18)
    np.testing.assert_allclose(drawn.rates, [1, 50 / 140, 1, 1, 1, 1, 1, 18 / 70, 1, 1])
    assert balance(counts, [slice(0, 4), slice(4, 10)], 50).thresholds == (50, 50)


def test_rows_and_caps_equal_loops() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, 30)
    values, ends = rng.integers(0, 99, int(sizes.sum())), np.cumsum(sizes)
    rows = np.split(values, ends[:-1])
    wanted = rng.integers(0, 30, 20)
    found, found_ends = take_rows(values, ends, wanted)
    assert [r.tolist() for r in np.split(found, found_ends[:-1])] == [
        rows[i].tolist() for i in wanted
    ]
    groups, order = rng.integers(-5, 5, 200), rng.permutation(200)
    mask = within_cap(groups, order, 7)
    for group in range(-5, 5):
        own = np.flatnonzero(groups == group)
        assert set(own[mask[own]]) == set(sorted(own, key=lambda i: order[i])[:7])


# metadata -------------------------------------------------------------------------------------


def test_metadata_files(tmp_path: Path) -> None:
    path = tmp_path / "entries.txt"
    path.write_bytes("\ufeffDog\r\n dog \n\n#1\nhot dog\nDog\n".encode())
    assert read_metadata(str(path)).lists == (("", ("Dog", "dog", "#1", "hot dog")),)
    folded = read_metadata(str(path), casefold=True)
    assert folded.lists == (("", ("dog", "#1", "hot dog")),)
    assert folded.find(["A Hot DOG"], 0)[0].tolist() == [0, 2]
    both = make_metadata({"en": ["dog"], "de": ["Hund", "Hütte"]})
    write_metadata(both, tmp_path / "both.json")
    assert read_metadata(str(tmp_path / "both.json")).digest == both.digest
    assert both.entry(2) == ("de", "Hütte") and both.find(["Hund Hütte"], 1)[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\n \n", "no entries"),
        ("a.txt", b"ok\ncaf\xe9\n", r"not UTF-8 \(line 2\)"),
        ("a.json", b'{"en": ["dog"], "de": []}', "of language 'de' have no entries"),
        ("a.json", b'{"en": "dog"}', "neither a list"),
        ("a.json", b"[dog]", "not json"),
        ("gone.txt", None, "cannot be read"),
    ],
)
def test_mistakes_in_metadata(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as error:
        read_metadata(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_metadata_are_built_from_the_pool(tmp_path: Path) -> None:
    texts = ["hot dog", "hot dog, hot", "a dog", "a hot dog .", "a a 1"]
    write_tar(
        tmp_path / "0.tar", {"1.jpg": photo(1), "1.json": json.dumps({"captions": texts}).encode()}
    )
    counts = count_ngrams(open_source("pool", str(tmp_path), "image"))
    by_hand = NgramCounts(
        Counter({"hot": 4, "dog": 4, "a": 4, "1": 1}),
        Counter(
            {("hot", "dog"): 3, ("a", "dog"): 1, ("a", "hot"): 1, ("a", "a"): 1, ("a", "1"): 1}
        ),
    )
    assert counts == by_hand
    # log2 p(hot dog) / (p(hot) p(dog)) = log2 (3 / 7) / (4 / 13)^2 = 2.18; of (a, 1) 2.53.
    made = build_metadata([["cat", "dog"]], counts, NgramConfig(1, 2.1, 10, 10))
    assert made.lists[0][1] == ("cat", "dog", "a", "hot", "1", "hot dog", "a 1")
    assert NgramCounts.entries(counts, NgramConfig(3, 2.5)) == ["a", "dog", "hot"]
    assert NgramCounts.entries(counts, NgramConfig(1, 2.1, 1, 1)) == ["a", "hot dog"]
