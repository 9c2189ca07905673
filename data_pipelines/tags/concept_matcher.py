"""Concepts looked for in a text, all at once, and where words begin and end."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable

import ahocorasick
import regex

PUNCTUATION = ",.;:?!`"  # what MetaCLIP surrounds with spaces
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in " \n")
_SPACED = str.maketrans({c: f" {c} " for c in PUNCTUATION} | dict.fromkeys(f"{SPACES}\n", " "))
# Scripts that do not put spaces between words: any place in them may be a word's edge.
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
)
# Between two characters, one of such a script
BETWEEN_WORDS = regex.compile(rf"(?<=\S)(?={UNSPACED.pattern})|(?<={UNSPACED.pattern})(?=\S)")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]")


class ConceptMatcher:
    """Concepts in captions: NFKC, casefolded, at word boundaries; any place is one in scripts
    without spaces. Of overlapping matches all count ("hot dog" is a "dog", too)."""

    def __init__(self, concepts: Iterable[str]) -> None:
        self.concepts = list(dict.fromkeys(filter(None, map(folded, concepts))))
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for number, text in enumerate(self.concepts):
            self._automaton.add_word(text, number)
        self._automaton.make_automaton()

    def find(self, text: str) -> list[str]:
        """The concepts in a text in order of their ends, each once."""
        if not self.concepts:
            return []  # an automaton of nothing cannot be asked
        text = folded(text)
        found: dict[str, None] = {}
        for end, number in self._automaton.iter(text):
            concept = self.concepts[number]
            if is_edge(text, end - len(concept) + 1) and is_edge(text, end + 1):
                found[concept] = None
        return list(found)


def spaced(text: str) -> str:
    """A text with spaces at both ends, around punctuation, and for any other white space."""
    return f" {text.translate(_SPACED)} "


def folded(text: str) -> str:
    """A text without differences of case, width and spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_edge(text: str, place: int) -> bool:
    """Whether a word may begin or end between the characters before and at a place."""
    if place <= 0 or place >= len(text):
        return True
    before, after = text[place - 1], text[place]
    if not (_is_word(before) and _is_word(after)):
        return not _is_mark(after)  # a mark belongs to what it stands on
    return _is_unspaced(before) or _is_unspaced(after)


def words_of(text: str) -> list[str]:
    """What spaces separate, and each character of a script without spaces."""
    return (text if text.isascii() else BETWEEN_WORDS.sub(" ", text)).split()


@functools.lru_cache(maxsize=100_000)
def _is_word(character: str) -> bool:
    return _WORD.match(character) is not None


@functools.lru_cache(maxsize=100_000)
def _is_unspaced(character: str) -> bool:
    return UNSPACED.match(character) is not None


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
