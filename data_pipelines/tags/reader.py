"""Tags of a sample: where they are found, and how they are spelled.

Canonical form: NFKC, casefold, without the leading '#'. Where a source's tags come from is its
`tags` setting; files of aliases, stop words and concepts are lists, one entry per line.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import regex

from data_pipelines.shards.bad_sample import BadSample
from data_pipelines.shards.utf8 import read_utf8
from data_pipelines.tags.concept_matcher import UNSPACED, ConceptMatcher
from data_pipelines.text.captions import captions_of, metadata_of
from xray.config.identity import hash_json
from xray.errors import ConfigError

Origin = Literal["hashtags", "caption_hashtags", "caption_words", "concepts"]

# English words that say nothing a picture could show; caption words only.
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
# Hashtags that say nothing a picture could show: about the post, its author or its audience.
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
# A run of letters, digits, marks, _, joiners and emoji after a # that no word or slash precedes (so
# not in a URL), but for one of a script without spaces; "#a#b" are two. What holds no letter and no
# emoji, as "#1", is none.
HASHTAG = regex.compile(
    rf"(?:(?<![\p{{L}}\p{{M}}\p{{N}}_&/])|(?<={UNSPACED.pattern}))"
    r"(?:[#\uff03]([\p{L}\p{M}\p{N}_\p{Extended_Pictographic}\u200c\u200d\ufe0f"
    r"\p{Emoji_Modifier}\p{Regional_Indicator}]+))+"
)
COLOURED = "\ufe0f"  # behind a character that is to be shown as an emoji; often left out
MEANS_SOMETHING = regex.compile(r"[\p{L}\p{Extended_Pictographic}\p{Regional_Indicator}]")


@dataclass
class TagRules:
    """How tags become a vocabulary."""

    field: str = "hashtags"  # json field of `tags: hashtags`: a list, or a text with spaces
    concepts: str = ""  # file for `tags: concepts`: one concept per line, its aliases after tabs
    aliases: str = ""  # file: one tag per line, its aliases after tabs
    stop: str = ""  # file of tags to leave out; "" = a list of non-visual ones, "none" = none
    plurals: bool = False  # English plurals become the singular, where that occurs too
    min_count: int = 5  # samples that a tag must occur in
    max_size: int = 100_000  # tags, the most frequent ones

    def validate(self, section: str = "hashtag") -> None:
        """Raises ConfigError naming the key to change."""
        if self.min_count < 1 or self.max_size < 1:
            at = f"{section}." if section else ""
            raise ConfigError(f"{at}min_count and {at}max_size must be at least 1")


def canonical(tag: str) -> str:
    """One spelling per tag."""
    plain = unicodedata.normalize("NFKC", tag).replace(COLOURED, "")
    return plain.strip().lstrip("#").strip().casefold()


class TagReader:
    """Finds the tags of samples.

    aliases: alias -> tag. concepts: what `tags: concepts` looks for, all spellings.
    """

    def __init__(
        self, field: str, aliases: Mapping[str, str], concepts: Iterable[str] = ()
    ) -> None:
        self.field, self.aliases, self.concepts = field, aliases, concepts

    def tags_of(
        self, files: dict[str, bytes], origin: Origin, fields: Mapping[str, float] | None = None
    ) -> list[str]:
        """A sample's tags in order of appearance, each once; raises BadSample.

        fields: where its captions are (`read_captions`).
        """
        if origin == "hashtags":
            found = self._listed(files)
        else:
            captions = captions_of(files, fields)
            find = {
                "caption_hashtags": hashtags_in,
                "caption_words": words_in,
                "concepts": self._concepts_in,
            }[origin]
            found = [tag for caption in captions for tag in find(caption)]
        tags = (self.aliases.get(tag, tag) for tag in map(canonical, found))
        return [tag for tag in dict.fromkeys(tags) if tag]

    @property
    def facts(self) -> dict[str, str]:
        """What tells readers apart."""
        lists = [sorted(self.aliases.items()), sorted(self.concepts)]
        return {"field": self.field, "lists": hash_json(lists)}

    def _listed(self, files: dict[str, bytes]) -> list[str]:
        found = metadata_of(files).get(self.field) or []
        found = found.split() if isinstance(found, str) else found
        if not isinstance(found, list):
            raise BadSample("broken hashtags", f"{type(found).__name__}, not a list")
        return [str(tag) for tag in found if isinstance(tag, str | int)]

    def _concepts_in(self, caption: str) -> list[str]:
        return self._matcher.find(caption)

    @functools.cached_property
    def _matcher(self) -> ConceptMatcher:
        return ConceptMatcher(self.concepts)  # not before it is asked for: it may be large


def hashtags_in(caption: str) -> list[str]:
    """The #tags of a caption, without the #."""
    tags = [tag for match in HASHTAG.finditer(caption) for tag in match.captures(1)]
    return [tag for tag in tags if MEANS_SOMETHING.search(tag)]


def words_in(caption: str) -> list[str]:
    """The words of a caption that may be seen in a picture."""
    words = map(canonical, WORD.findall(caption))
    return [word for word in words if len(word) > 2 and word not in STOP_WORDS]


def singulars(tag: str) -> list[str]:
    """What an English tag may be the plural of; whether it is, is for the data to say."""
    if len(tag) < 4 or not tag.endswith("s") or tag.endswith(("ss", "us", "is")) or tag == "news":
        return []
    found = [tag[:-1]]
    if tag.endswith(("ches", "shes", "sses", "xes", "zes", "oes")):
        found.append(tag[:-2])
    if tag.endswith("ies"):
        found.append(tag[:-3] + "y")
    if tag.endswith("ves"):
        found += [tag[:-3] + "f", tag[:-3] + "fe"]
    return found


@functools.lru_cache(maxsize=8)
def read_list(path: str, key: str) -> tuple[tuple[str, ...], ...]:
    """Lines of a file, each a tag and its aliases after tabs; raises ConfigError."""
    rows = []
    for entry in read_utf8(path, key).splitlines():
        names = tuple(filter(None, map(canonical, entry.split("\t"))))
        if names and not entry.startswith("# "):
            rows.append(names)
    if not rows:
        raise ConfigError(f"{key}={path} is empty: one tag per line")
    return tuple(rows)


def aliases_in(rows: tuple[tuple[str, ...], ...], key: str) -> dict[str, str]:
    """Alias -> tag; raises ConfigError for an alias of two tags."""
    found: dict[str, str] = {}
    names = {row[0] for row in rows}
    for name, *aliases in rows:
        for alias in aliases:
            if alias in names and alias != name:
                raise ConfigError(f"{key}: {alias!r} is an alias of {name!r} and a tag of its own")
            if found.setdefault(alias, name) != name:
                raise ConfigError(f"{key}: {alias!r} is an alias of {found[alias]!r} and {name!r}")
    return {alias: name for alias, name in found.items() if alias != name}


def stop_list(path: str) -> frozenset[str]:
    """Tags that are left out of a vocabulary."""
    if path == "none":
        return frozenset()
    if not path:
        return NOT_VISUAL
    return frozenset(name for row in read_list(path, "stop") for name in row)


@dataclass
class TagsConfig(TagRules):
    """Where tags are found, and how they become a vocabulary."""

    tags: Origin = "hashtags"
    captions: dict[str, float] = field(default_factory=dict)  # their json fields, if not the usual
