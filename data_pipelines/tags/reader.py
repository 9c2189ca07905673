"""Reader of tags: extracts the tags of a sample and normalises their spelling.

The canonical form of a tag is NFKC, casefolded, without the leading '#'. The `tags` setting of a
source selects the origin of its tags. Files of aliases, stop words and concepts have one entry per
line.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import regex

from data_pipelines.tags.concept_matcher import UNSPACED, ConceptMatcher
from data_pipelines.text.captions import captions_of, metadata_of
from data_pipelines.text.hashtags import listed_hashtags
from xray.config.identity import hash_json
from xray.errors import ConfigError
from xray.files import lines_of, read_text

Origin = Literal["hashtags", "caption_hashtags", "caption_words", "concepts"]

# English words without visual meaning, for tags from caption words only.
_STOP = """
a about above across after against all along also among an and another any are around as at away
back be been before behind being below beside between both but by can close coming down during each
few five for four from front get gets getting go goes going had has have having he her herself him
himself his in inside into is it its itself just large left like little look looking looks made make
makes making many more most near new next no not of off on one onto or other out outside over own
part past right set several she side small some something stand standing stands such take taken
takes taking that the their them there these they this those three through to together top towards
toward two under up using very was way wearing wears what when where which while who with within
without area big
"""
STOP_WORDS = frozenset(_STOP.split())
# Hashtags without visual meaning: about the post, its author or its audience.
_NOT_VISUAL = """
tbt throwback throwbackthursday flashbackfriday fbf ootd potd instagood instagram instadaily
instalike instamood instapic instaphoto igers ig igdaily insta love like likes like4like likeforlike
l4l likeforfollow follow followme follow4follow followforfollow f4f followback tagsforlikes tflers
photooftheday picoftheday pictureoftheday photo photos pic pics picture photography
photographer photogram amazing awesome beautiful best bestoftheday cool cute fun funny good happy
happiness life lifestyle mood motivation nice new now repost regram viral trending explore
explorepage foryou foryoupage fyp fy reels reel tiktok youtube video videos
weekend monday tuesday wednesday thursday friday saturday sunday mondaymotivation today
nofilter filter vsco vscocam canon nikon iphone giveaway sale ad sponsored promo linkinbio comment
share dm
"""
NOT_VISUAL = frozenset(_NOT_VISUAL.split())
WORD = regex.compile(r"[\p{L}\p{M}]+")
# A hashtag is a # and a run of letters, digits, marks, _, joiners and emoji. The # may not follow a
# letter, digit, & or /, so that parts of URLs do not match; a character of a script without spaces
# is allowed. "#a#b" are two tags. A run without letters and emoji, such as "#1", is not a tag.
HASHTAG = regex.compile(
    rf"(?:(?<![\p{{L}}\p{{M}}\p{{N}}_&/])|(?<={UNSPACED.pattern}))"
    r"(?:[#\uff03]([\p{L}\p{M}\p{N}_\p{Extended_Pictographic}\u200c\u200d\ufe0f"
    r"\p{Emoji_Modifier}\p{Regional_Indicator}]+))+"
)
EMOJI_SELECTOR = "\ufe0f"  # makes the character before it an emoji; often omitted
LETTER_OR_EMOJI = regex.compile(r"[\p{L}\p{Extended_Pictographic}\p{Regional_Indicator}]")


@dataclass
class TagRules:
    """Rules that turn tags into a vocabulary."""

    field: str = "hashtags"  # JSON field for `tags: hashtags`: a list, or a text with spaces
    concepts: str = ""  # file for `tags: concepts`: one concept per line, aliases after tabs
    aliases: str = ""  # file: one tag per line, aliases after tabs
    stop: str = ""  # file of tags to leave out; "" = a built-in list of non-visual tags; "none"
    plurals: bool = False  # merge English plurals into their singular, if it occurs too
    min_count: int = 5  # smallest number of samples with a tag that is kept
    max_size: int = 100_000  # keep at most this number of tags, the most frequent ones

    def validate(self, section: str = "hashtag") -> None:
        """Check the values; raises ConfigError naming the key to change."""
        if self.min_count < 1 or self.max_size < 1:
            prefix = f"{section}." if section else ""
            raise ConfigError(f"{prefix}min_count and {prefix}max_size must be at least 1")


def canonical(tag: str) -> str:
    """Return the canonical spelling of a tag."""
    plain = unicodedata.normalize("NFKC", tag).replace(EMOJI_SELECTOR, "")
    return plain.strip().lstrip("#").strip().casefold()


@dataclass
class TagReader:
    """Reader of the tags of samples."""

    field: str  # JSON field of hashtags
    aliases: Mapping[str, str]  # alias -> tag
    concepts: Iterable[str] = ()  # all spellings that `tags: concepts` searches for in captions

    def tags_of(
        self, files: dict[str, bytes], origin: Origin, fields: Mapping[str, float] | None = None
    ) -> list[str]:
        """Read the tags of a sample, each once, in order of appearance; raises BadSample.

        fields: JSON fields of the captions with weights (`read_captions`).
        """
        if origin == "hashtags":
            raw = listed_hashtags(metadata_of(files).get(self.field))
        else:
            captions = captions_of(files, fields)
            find = {
                "caption_hashtags": hashtags_in,
                "caption_words": words_in,
                "concepts": self._concepts_in,
            }[origin]
            raw = [tag for caption in captions for tag in find(caption)]
        tags = (self.aliases.get(tag, tag) for tag in map(canonical, raw))
        return [tag for tag in dict.fromkeys(tags) if tag]

    @property
    def facts(self) -> dict[str, str]:
        """Settings of this reader, for cache keys."""
        lists = [sorted(self.aliases.items()), sorted(self.concepts)]
        return {"field": self.field, "lists": hash_json(lists)}

    def _concepts_in(self, caption: str) -> list[str]:
        return self._matcher.find(caption)

    @functools.cached_property
    def _matcher(self) -> ConceptMatcher:
        return ConceptMatcher(self.concepts)  # built on first use, because it may be large


def hashtags_in(caption: str) -> list[str]:
    """Find the hashtags in a caption, without the #."""
    tags = [tag for match in HASHTAG.finditer(caption) for tag in match.captures(1)]
    return [tag for tag in tags if LETTER_OR_EMOJI.search(tag)]


def words_in(caption: str) -> list[str]:
    """Find the words of a caption that may have a visual meaning."""
    words = map(canonical, WORD.findall(caption))
    return [word for word in words if len(word) > 2 and word not in STOP_WORDS]


def singulars(tag: str) -> list[str]:
    """Return possible singulars of an English tag; the caller uses one that occurs as a tag."""
    if len(tag) < 4 or not tag.endswith("s") or tag.endswith(("ss", "us", "is")) or tag == "news":
        return []
    candidates = [tag[:-1]]
    if tag.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        candidates.append(tag[:-2])
    if tag.endswith("ies"):
        candidates.append(tag[:-3] + "y")
    if tag.endswith("ves"):
        candidates += [tag[:-3] + "f", tag[:-3] + "fe"]
    return candidates


@functools.lru_cache(maxsize=8)
def read_list(path: str, key: str) -> tuple[tuple[str, ...], ...]:
    """Read a file: one tag per line, aliases after tabs, "# " comments; raises ConfigError."""
    rows = []
    for entry in lines_of(read_text(path, key)):
        names = tuple(filter(None, map(canonical, entry.split("\t"))))
        if names and not entry.startswith("# "):
            rows.append(names)
    if not rows:
        raise ConfigError(f"{key}={path} is empty: write one tag per line")
    return tuple(rows)


def aliases_in(rows: tuple[tuple[str, ...], ...], key: str) -> dict[str, str]:
    """Return alias -> tag for the rows of a file; raises ConfigError if two tags share an alias."""
    tag_of: dict[str, str] = {}
    names = {row[0] for row in rows}
    for name, *aliases in rows:
        for alias in aliases:
            if alias in names and alias != name:
                raise ConfigError(
                    f"{key}: {alias!r} is an alias of {name!r} and has its own line: remove one"
                )
            if tag_of.setdefault(alias, name) != name:
                raise ConfigError(
                    f"{key}: {alias!r} is an alias of {tag_of[alias]!r} and {name!r}: keep one"
                )
    return {alias: name for alias, name in tag_of.items() if alias != name}


def stop_list(path: str) -> frozenset[str]:
    """Return the tags to leave out of a vocabulary: from a file, the built-in list, or none."""
    if path == "none":
        return frozenset()
    if not path:
        return NOT_VISUAL
    return frozenset(name for row in read_list(path, "stop") for name in row)


@dataclass
class TagsConfig(TagRules):
    """Settings of `xray data tags`: the origin of tags, and the rules of the vocabulary."""

    tags: Origin = "hashtags"  # origin of the tags, as in data.sources
    captions: dict[str, float] = field(default_factory=dict)  # JSON field -> weight; {} = default
