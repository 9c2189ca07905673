"""Tags from captions and JSON, and the vocabulary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tagged import with_tags

from data_pipelines.shards.source import Source
from data_pipelines.tags.concept_matcher import ConceptMatcher, folded, is_word_boundary
from data_pipelines.tags.reader import TagReader, TagRules, hashtags_in, singulars
from data_pipelines.tags.vocabulary import Vocabulary, build_vocabulary, count_tags
from xray.errors import ArtifactError, BadSample, ConfigError, DataError


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("Nice #Dog and #sunset_2024!", ["Dog", "sunset_2024"]),
        ("#a#b, \uff03c", ["a", "b", "c"]),
        ("see http://x.org/#top or mail&#39;s #ok", ["ok"]),
        ("we are #1 and #2nd", ["2nd"]),
        ("word#notatag #", []),
        ("かわいい#犬 สวย#แมว", ["犬", "แมว"]),
        ("#क\u200cख", ["क\u200cख"]),
        ("#東京タワー と #हिन्दी और #ไทย", ["東京タワー", "हिन्दी", "ไทย"]),
        ("#❤️ #🇩🇪 #dog🐶 #👨‍👩‍👧", ["❤️", "🇩🇪", "dog🐶", "👨‍👩‍👧"]),
    ],
)
def test_hashtags_in_all_scripts(caption: str, tags: list[str]) -> None:
    assert hashtags_in(caption) == tags


def test_tags_are_canonical_and_unique() -> None:
    files = {"json": '{"captions": ["#A dog"], "hashtags": ["#Dog", "ﬁsh", "#dog", 7]}'.encode()}
    reader = TagReader("hashtags", {"fish": "goldfish"}, ["DOG"])
    assert reader.tags_of(files, "hashtags") == ["dog", "goldfish", "7"]
    assert reader.tags_of(files, "caption_hashtags") == ["a"]
    assert reader.tags_of(files, "caption_words") == ["dog"]
    assert reader.tags_of(files, "concepts") == ["dog"]
    for text in ("#cat #dog", "#cat, #dog", "#cat#dog", "cat; dog", "\uff03cat\uff03dog"):
        listed = {"json": json.dumps({"hashtags": text}).encode()}
        assert reader.tags_of(listed, "hashtags") == ["cat", "dog"]
    kept = {"json": b'{"hashtags": "c# rock,paper a-b"}'}
    assert reader.tags_of(kept, "hashtags") == ["c#", "rock,paper", "a-b"]
    assert TagReader("tags", {}).tags_of({"json": b'{"tags": ["x"]}'}, "hashtags") == ["x"]
    with pytest.raises(BadSample, match="broken hashtags"):
        reader.tags_of({"json": b'{"hashtags": {"a": 1}}'}, "hashtags")
    two = {"txt": b"Two dogs run on the grass"}
    assert reader.tags_of(two, "caption_words") == ["dogs", "run", "grass"]


def test_concept_matches_equal_a_simple_search() -> None:
    rng = np.random.default_rng(0)
    letters = list("ab c-é東京")
    words = ["".join(rng.choice(letters, rng.integers(1, 5))) for _ in range(60)]
    matcher = ConceptMatcher(words)
    for _ in range(400):
        text = folded("".join(rng.choice(letters, 20)))
        expected = {
            concept
            for concept in matcher.concepts
            for start in range(len(text))
            if text.startswith(concept, start)
            and is_word_boundary(text, start)
            and is_word_boundary(text, start + len(concept))
        }
        assert set(matcher.find(text)) == expected


def test_concepts_match_whole_words() -> None:
    matcher = ConceptMatcher(["hot dog", "dog", "cat", "東京", "ß"])
    assert matcher.find("HOT  Dogs, hot dog; concatenate") == ["hot dog", "dog"]
    assert matcher.find("大東京タワー") == ["東京"]
    assert matcher.find("a dog-house, cat's") == ["dog", "cat"]
    assert matcher.find("doǵ") == []  # a combining mark belongs to its letter
    assert ConceptMatcher([]).find("dog") == []


def test_a_vocabulary_is_counted_merged_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["dog", "dogs"], ["dogs"], ["puppy"], ["tbt", "cat"], ["cat"], ["bus"], ["rare"]] * 2
    source = with_tags(tmp_path / "s", [*rows, ["once"], []])
    aliases = tmp_path / "aliases.txt"
    aliases.write_text("dog\tpuppy\tpup\n")
    rules = TagRules(aliases=str(aliases), plurals=True, min_count=2, max_size=3)
    counts = count_tags(source, "hashtags", rules)
    assert (counts.samples, counts.tagged) == (16, 15)
    vocabulary, dropped = build_vocabulary(counts, rules, "photos")
    # dog: 2 samples with dog and dogs, 2 with dogs, 2 with the alias; each sample counts once.
    assert vocabulary.tags == ("dog", "cat", "bus")
    assert vocabulary.counts == (6, 4, 2)
    assert vocabulary.aliases == (("dogs", "pup", "puppy"), (), ())
    assert vocabulary.encode(["pup", "dogs", "bus", "what"]) == [0, 2]
    assert {reason: tags.first for reason, tags in dropped.items()} == {
        "in the stop list": [("tbt", 2)],
        "beyond the 3 most frequent": [("rare", 2)],
        "in fewer than 2 samples": [("once", 1)],
    }
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json") == vocabulary
    again = with_tags(tmp_path / "again", [*rows, ["once"], []])
    assert count_tags(again, "hashtags", rules, workers=2) == counts
    with monkeypatch.context() as patch:  # saved counts are used, so no sample is read
        patch.setattr(Source, "read", None)
        assert count_tags(source, "hashtags", rules) == counts
        with pytest.raises(TypeError):
            count_tags(source, "hashtags", replace(rules, field="tags"))
    with pytest.raises(DataError, match=r"no tag occurs in 99 samples of photos \(15 of 16"):
        build_vocabulary(counts, TagRules(min_count=99), "photos")


def test_singulars() -> None:
    assert "puppy" in singulars("puppies") and "box" in singulars("boxes")
    assert "knife" in singulars("knives") and "dish" in singulars("dishes")
    assert singulars("glass") == singulars("bus") == singulars("news") == singulars("as") == []


def test_errors_in_tag_files(tmp_path: Path) -> None:
    source = with_tags(tmp_path / "s", [["a"]])
    latin, empty, twice = (tmp_path / name for name in ("latin.txt", "empty.txt", "twice.txt"))
    latin.write_bytes("dog\ncafé\n".encode("latin-1"))
    empty.write_text("\n")
    twice.write_text("dog\tpet\ncat\tpet\n")
    for rules, message in (
        (TagRules(aliases=str(latin)), r"latin.txt is not UTF-8 \(line 2\)"),
        (TagRules(concepts=str(empty)), r"concepts=.*empty.txt is empty"),
        (TagRules(aliases=str(twice)), "'pet' is an alias of 'dog' and 'cat'"),
        (TagRules(aliases="gone.txt"), "aliases=gone.txt cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            count_tags(source, "hashtags", rules)
    with pytest.raises(ConfigError, match="concepts is not set"):
        count_tags(source, "concepts", TagRules())


def test_errors_in_vocabulary_files(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        Vocabulary.load(path)
    Vocabulary(("dog", "cat"), (2, 1)).save(path)
    text = path.read_text()
    for content, message in (
        (text.replace("cat", "cow").encode(), "was changed"),
        (text.replace("cat", "café").encode("latin-1"), "is not UTF-8"),
        (b'{"tags": [], "sha256": ""}', "is empty"),
        (b"[]", "is not a vocabulary"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=message):
            Vocabulary.load(path)
