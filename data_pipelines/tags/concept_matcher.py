"""Search for many concepts in one pass over a text (Aho-Corasick), and word boundaries."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable

import ahocorasick
import regex

PUNCTUATION = ",.;:?!`"  # MetaCLIP puts spaces around these in texts
SPACES = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in " \n")
_SPACED = str.maketrans({c: f" {c} " for c in PUNCTUATION} | dict.fromkeys(f"{SPACES}\n", " "))
# Scripts without spaces between words: a word may begin or end between any two characters.
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
)
# Position between two characters, at least one of which belongs to such a script.
BETWEEN_WORDS = regex.compile(rf"(?<=\S)(?={UNSPACED.pattern})|(?<={UNSPACED.pattern})(?=\S)")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}_]")


class ConceptMatcher:
    """Matcher of concepts in captions.

    Texts are compared after NFKC normalisation and casefolding. A match must begin and end at word
    boundaries; in scripts without spaces, every position is a word boundary. Overlapping
    matches are all found: "hot dog" also matches "dog".
    """

    def __init__(self, concepts: Iterable[str]) -> None:
        self.concepts = list(dict.fromkeys(filter(None, map(folded, concepts))))
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for number, text in enumerate(self.concepts):
            self._automaton.add_word(text, number)
        self._automaton.make_automaton()

    def find(self, text: str) -> list[str]:
        """Return the concepts in a text without repeats, in the order in which they end."""
        if not self.concepts:
            return []  # an empty automaton raises an error
        text = folded(text)
        matches: dict[str, None] = {}
        for end, number in self._automaton.iter(text):
            concept = self.concepts[number]
            if is_word_boundary(text, end - len(concept) + 1) and is_word_boundary(text, end + 1):
                matches[concept] = None
        return list(matches)


def spaced(text: str) -> str:
    """Put spaces around a text and around punctuation; other white space becomes spaces."""
    return f" {text.translate(_SPACED)} "


def folded(text: str) -> str:
    """Normalise case, character width (NFKC) and spacing of a text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_word_boundary(text: str, position: int) -> bool:
    """Check if there is a word boundary just before the character at a position."""
    if position <= 0 or position >= len(text):
        return True
    before, after = text[position - 1], text[position]
    if not (_is_word(before) and _is_word(after)):
        return not _is_mark(after)  # a combining mark belongs to the character before it
    return _is_unspaced(before) or _is_unspaced(after)


def words_of(text: str) -> list[str]:
    """Split a text at spaces; each character of a script without spaces is a word."""
    return (text if text.isascii() else BETWEEN_WORDS.sub(" ", text)).split()


@functools.lru_cache(maxsize=100_000)
def _is_word(character: str) -> bool:
    return _WORD.match(character) is not None


@functools.lru_cache(maxsize=100_000)
def _is_unspaced(character: str) -> bool:
    return UNSPACED.match(character) is not None


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")
