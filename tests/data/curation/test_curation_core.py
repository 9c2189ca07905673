"""Parts of curation: matching, balanced sampling and metadata, compared with simple loops."""

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

from data_pipelines.curation import phrase_matcher
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
from data_pipelines.text.stop_words import LANGUAGES, stop_words
from xray.errors import ConfigError

# matching -------------------------------------------------------------------------------------


def random_texts(number: int, rng: random.Random, words: Sequence[str]) -> list[str]:
    """Make texts of up to 11 words with spaces and punctuation of many kinds between them."""
    separators = [" "] * 12 + ["  ", ", ", " .", "-", "\t", "\n", "\r\n", "\u00a0", "?!", "` "]
    return [
        "".join(rng.choice(words) + rng.choice(separators) for _ in range(rng.randrange(12)))
        for _ in range(number)
    ]


def add_spaces(text: str) -> str:
    """Put spaces around punctuation and at both ends; the simple version."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    return re.sub(r"\s", " ", f" {text} ")


def test_matchers_equal_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    words = [*["dog", "cat", "hot", "red", "car", "a", "b", "dd"], "dog's", "Über", "ß", "U.S."]
    entries = list(dict.fromkeys([e.strip(" \t\n") for e in random_texts(400, rng, words)]))
    entries = [e for e in entries if e] + ["dog", "U.S.", "a  b", "long" * 9, "long" * 9 + "er"]
    texts = [*random_texts(800, rng, [*words, "long" * 9, "long" * 9 + "er"]), "", "dog"]
    padded = [add_spaces(entry) for entry in entries]
    first = [padded.index(entry) for entry in padded]
    expected = [
        sorted({first[i] for i, entry in enumerate(padded) if entry in text})
        for text in map(add_spaces, texts)
    ]
    assert sum(map(len, expected)) > 2000
    matcher = PhraseMatcher(entries)
    for chunk in (phrase_matcher.CHUNK, 40):
        monkeypatch.setattr(phrase_matcher, "CHUNK", chunk)
        matches, ends = matcher.find(texts)
        assert [row.tolist() for row in np.split(matches, ends[:-1])] == expected


def test_entries_with_punctuation_match_unlike_metaclips() -> None:
    """MetaCLIP puts spaces around the punctuation of texts, and not of entries: none matches."""
    entries, text = ["st. louis", "U.S.", "arch"], "The arch in st. louis, U.S."
    assert [e for e in entries if f" {e} " in add_spaces(text)] == ["arch"]
    assert PhraseMatcher(entries).find([text])[0].tolist() == [0, 1, 2]


def test_scripts_without_spaces_match_at_any_position() -> None:
    matcher = PhraseMatcher(["東京", "東京タワー", "京都", "in"])
    matches, ends = matcher.find(["私は東京タワーに行く", "in京都、東京。", "東 京", "東京-in"])
    assert [row.tolist() for row in np.split(matches, ends[:-1])] == [[0, 1], [0, 2, 3], [0], [0]]
    matches, ends = matcher.find(["東京\u3000京都", "in\u00a0a\r\nroom"])  # other white space
    assert [row.tolist() for row in np.split(matches, ends[:-1])] == [[0, 2], [3]]


# balance --------------------------------------------------------------------------------------


def zipf_pool(samples: int, entries: int) -> Matches:
    """Draw matches of samples with one to three texts and Zipf-distributed entries."""
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
    expected_counts = Counter(matches.entries.tolist())
    assert counts.tolist() == [expected_counts[entry] for entry in range(500)]
    drawn = balance(counts, [slice(0, 500)], 100.0)
    rows = [set(row.tolist()) for row in np.split(matches.entries, matches.entry_ends[:-1])]
    drop = [math.prod(1 - min(1, 100 / expected_counts[e]) for e in row) for row in rows]
    p = 1 - np.array(drop)
    rate = np.mean([draw(matches, drawn.rates, seed) for seed in range(4)], axis=0)
    for low, high in ((0, 0.01), (0.01, 0.1), (0.1, 0.5), (0.5, 1)):
        bucket = (p >= low) & (p < high)
        expected, sigma = p[bucket].sum(), np.sqrt((p * (1 - p))[bucket].sum() / 4)
        assert bucket.sum() > 300 and abs(rate[bucket].sum() - expected) < 4 * sigma
    assert (rate[p == 1] == 1).all()


def test_draws_depend_only_on_seed_sample_text_and_entry() -> None:
    matches = zipf_pool(300, 50)
    rates = np.linspace(0, 0.6, 50)
    whole = draw(matches, rates, 7)
    mask = np.random.default_rng(1).random(len(whole)) < 0.5
    assert np.array_equal(draw(matches.only(mask), rates, 7), whole[mask])
    assert not np.array_equal(draw(matches, rates, 8), whole)

    def mixed(x: int) -> int:  # splitmix64 with Python integers
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    base = int(np.random.SeedSequence([7]).generate_state(1, np.uint64)[0])
    key, starts = mixed((base + golden) % 2**64), [0, *matches.entry_ends.tolist()]
    for row, sample in enumerate(matches.sample_of[:200].tolist()):
        sample_key = int(matches.hashes[sample]) % 2**64 ^ key
        text_key = mixed((sample_key + (int(matches.texts[row]) + 1) * golden) % 2**64)
        entries = matches.entries[starts[row] : starts[row + 1]].tolist()
        passed = [
            (mixed((text_key + (e + 1) * golden) % 2**64) >> 11) / 2**53 < rates[e] for e in entries
        ]
        assert whole[row] == any(passed)


def test_thresholds_of_languages() -> None:
    # English: entries with counts below t = 50 have 10 + 20 + 30 of 200 matches, a share of 0.3.
    english, other = np.array([10, 140, 20, 30]), np.array([0, 8, 1, 70, 3, 18])
    assert tail_share(english, 50) == 0.3
    # 1, 3, 8, 18, 70 of 100 matches: the cumulated shares are .01, .04, .12, .30, 1.
    assert threshold_for(other, 0.3) == 18
    assert threshold_for(other, 0.2) == 8 and threshold_for(other, 0.22) == 18
    counts = np.concatenate([english, other])
    drawn = balance(counts, [slice(0, 4), slice(4, 10)], 50, reference=0)
    assert drawn.thresholds == (50, 18)
    np.testing.assert_allclose(drawn.rates, [1, 50 / 140, 1, 1, 1, 1, 1, 18 / 70, 1, 1])
    assert balance(counts, [slice(0, 4), slice(4, 10)], 50).thresholds == (50, 50)


def test_take_rows_and_within_cap_equal_simple_loops() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, 30)
    values, ends = rng.integers(0, 99, int(sizes.sum())), np.cumsum(sizes)
    rows = np.split(values, ends[:-1])
    selected = rng.integers(0, 30, 20)
    result, result_ends = take_rows(values, ends, selected)
    assert [r.tolist() for r in np.split(result, result_ends[:-1])] == [
        rows[i].tolist() for i in selected
    ]
    groups, order = rng.integers(-5, 5, 200), rng.permutation(200)
    mask = within_cap(groups, order, 7)
    for group in range(-5, 5):
        members = np.flatnonzero(groups == group)
        assert set(members[mask[members]]) == set(sorted(members, key=lambda i: order[i])[:7])


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
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "no entries"),
        ("a.txt", b"ok\ncaf\xe9\n", r"not UTF-8 \(line 2\)"),
        ("a.json", b'{"en": ["dog"], "de": []}', "of language 'de' have no entries"),
        ("a.json", b'{"en": "dog"}', "neither a list"),
        ("a.json", b"[dog]", "not JSON"),
        ("gone.txt", None, "cannot be read"),
    ],
)
def test_errors_in_metadata(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_metadata(str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)


def test_metadata_are_built_from_the_pool(tmp_path: Path) -> None:
    texts = ["hot dog", "hot dog, hot", "a dog", "a hot dog .", "a a 1"]
    write_tar(
        tmp_path / "0.tar", {"1.jpg": photo(1), "1.json": json.dumps({"captions": texts}).encode()}
    )
    counts = count_ngrams(open_source("pool", str(tmp_path), "image"))
    expected = NgramCounts(
        Counter({"hot": 4, "dog": 4, "a": 4, "1": 1}),
        Counter(
            {("hot", "dog"): 3, ("a", "dog"): 1, ("a", "hot"): 1, ("a", "a"): 1, ("a", "1"): 1}
        ),
    )
    assert counts == expected
    # PMI of (hot, dog): log2 (3 / 7) / (4 / 13)^2 = 2.18; of (a, 1): 2.53.
    made = build_metadata([["cat", "dog"]], counts, NgramConfig(1, 2.1, 10, 10))
    assert made.lists[0][1] == ("cat", "dog", "a", "hot", "1", "hot dog", "a 1")
    assert NgramCounts.entries(counts, NgramConfig(3, 2.5)) == ["a", "dog", "hot"]
    assert NgramCounts.entries(counts, NgramConfig(1, 2.1, 1, 1)) == ["a", "hot dog"]


def test_stop_words_are_no_entries_nor_parts_of_pairs(tmp_path: Path) -> None:
    counts = NgramCounts()
    for text in ("A dog on the beach", "ein Hund am Strand", "the beach", "hot dog", "Straße 1"):
        counts.add(text)

    def entries(*stop: str) -> set[str]:
        config = NgramConfig(min_count=1, min_pmi=0, stop_words=list(stop))
        return set(NgramCounts.entries(counts, config))

    assert {"A", "the", "ein", "the beach", "dog on", "hot dog"} <= entries()
    assert entries() - entries("en") == {"A", "on", "the", "am", "A dog", "dog on", "on the",
                                         "the beach", "Hund am", "am Strand"}  # fmt: skip
    assert {"the", "the beach"} <= entries("de") and not {"ein", "am", "ein Hund"} & entries("de")
    own = tmp_path / "own.txt"
    own.write_text("STRASSE\nhot\n")
    assert entries() - entries("de", str(own)) >= {"ein", "Straße", "Straße 1", "hot", "hot dog"}
    for name, message in (("english", "there are lists for de, en, "), ("gone.txt", "gone.txt")):
        with pytest.raises(ConfigError, match=message):
            stop_words([name])


def test_lists_of_stop_words_are_lists_of_words() -> None:
    for language in LANGUAGES:
        words = stop_words([language])
        assert 50 < len(words) < 200 and all(map(str.isalpha, words))
        assert all(word == word.casefold() for word in words)
