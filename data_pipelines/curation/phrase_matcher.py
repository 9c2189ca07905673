"""Phrase matcher: finds many phrases in many texts, by a trie of words that numpy walks.

MetaCLIP searches for " phrase " in a text with spaces around punctuation. So a phrase is a sequence
of words, and a word is the text between two neighbouring spaces. Each word of a text is looked up
once in a hash table. Then the trie is followed from all positions of the text at the same time, one
word per step. Words are also compared byte by byte, so the result is exact.

Phrases with punctuation differ from MetaCLIP, which puts spaces around the punctuation of texts and
not of its entries. There, an entry such as "st. louis" matches no text, because each text then has
"st .  louis". Here, phrases and texts are normalised alike, so that it matches "in st. louis".

It is faster than an Aho-Corasick automaton, which waits for memory at each character. This matcher
waits only once per word, and for many words at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.stream.shuffle import GOLDEN, mixed
from data_pipelines.tags.concept_matcher import BETWEEN_WORDS, PUNCTUATION, SPACES

CHUNK = 1 << 19  # characters of text to process together, with some MB of arrays
SPACE, NEWLINE = 32, 10
# Mask of the first k of 8 bytes, read as a little-endian number.
FIRST = np.array([(1 << 8 * k) - 1 for k in range(9)], np.uint64)


class PhraseMatcher:
    """Matcher of many phrases in texts.

    Phrases without punctuation match as the metadata of MetaCLIP (2309.16671).

    First, phrases and texts are normalised: spaces are put around punctuation and around each
    character of a script without spaces, and other white space becomes a space. Then a text
    contains a phrase if it contains " phrase ". Case is not ignored. The number of a phrase is its
    position. Equal phrases have the number of the first one. No phrase may be empty.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self._text = text = _Lines(phrases)
        hashes, self._firsts, words = np.unique(
            text.hashes(), return_index=True, return_inverse=True
        )
        self._words = _HashTable(hashes)
        assert (self._word_numbers(text) == words).all(), "two words share a hash"
        # Nodes of the trie: first the words, then the target of each step (node, next word).
        word, size = np.searchsorted(text.starts, text.line_begins), 1
        lines, nodes = np.arange(len(phrases)), words[word]
        steps, ended, count = [], [], len(hashes)
        while len(lines):
            ends = text.ends[word + size - 1] == text.line_ends[lines]
            ended.append((nodes[ends], lines[ends]))
            word, lines, nodes, size = word[~ends], lines[~ends], nodes[~ends], size + 1
            taken, nodes = np.unique(self._step(nodes, words[word + size - 1]), return_inverse=True)
            steps.append(taken)
            nodes, count = nodes + count, count + len(taken)
        self._steps, self._first_step = _HashTable(np.concatenate(steps)), len(hashes)
        self._none = len(phrases)  # value of `_phrase` at nodes where no phrase ends
        self._phrase = np.full(count, self._none, np.int32)
        for nodes, lines in ended:
            np.minimum.at(self._phrase, nodes, lines.astype(np.int32))
        self._has_steps = np.zeros(count, bool)
        self._has_steps[np.concatenate(steps) // np.uint64(len(hashes))] = True

    def find(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find the phrases in each text: (phrase numbers [M] int32, ends [n] int64).

        Text i has the numbers from ends[i - 1] to ends[i], ascending and unique.
        """
        counts, matches = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for chunk in _chunks(texts):
            lines, phrases = self._find(_Lines(chunk))
            counts.append(np.bincount(lines, minlength=len(chunk)))
            matches.append(phrases)
        return np.concatenate(matches).astype(np.int32), np.cumsum(np.concatenate(counts))

    def _find(self, text: _Lines) -> tuple[np.ndarray, np.ndarray]:
        """Return (line, phrase) of all matches, ascending."""
        words = self._word_numbers(text)
        last = np.flatnonzero(words >= 0)  # last word of each partial match
        nodes, matches = words[last], [np.empty(0, np.int64)]
        while len(last):
            phrases = self._phrase[nodes]
            complete = phrases < self._none
            matches.append(text.lines[last[complete]] * self._none + phrases[complete])
            alive = self._has_steps[nodes]
            last, nodes = last[alive] + 1, nodes[alive]  # the last word of a line is its newline
            alive = words[last] >= 0
            last, nodes = last[alive], nodes[alive]
            rows = self._steps.rows(self._step(nodes, words[last]))
            alive = rows >= 0
            last, nodes = last[alive], rows[alive] + self._first_step
        pairs = np.sort(np.concatenate(matches))
        return np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], self._none)

    def _word_numbers(self, text: _Lines) -> np.ndarray:
        """Return the number of each word of a text, -1 = in no phrase: [n] int32."""
        words = self._words.rows(text.hashes())
        hashed = np.flatnonzero(words >= 0)
        firsts = self._firsts[words[hashed]]
        starts, first_starts = text.starts[hashed], self._text.starts[firsts]
        sizes = text.ends[hashed] - starts
        same = sizes == self._text.ends[firsts] - first_starts
        same &= _equal(text, starts, self._text, first_starts, sizes)
        words[hashed[~same]] = -1
        return words

    def _step(self, nodes: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Return the hash key of the step from each node by each word."""
        return nodes.astype(np.uint64) * np.uint64(len(self._firsts)) + words.astype(np.uint64)


class _Lines:
    """Normalised texts as lines of bytes, with a space at both ends of each line.

    starts, ends, lines: start, end and line number of each word. A word is the (possibly empty)
    text between two neighbouring spaces. The newline after each line is also a word. line_begins,
    line_ends: start and end of each line without the spaces at its ends.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        whole = " \n ".join(texts)
        if whole.count("\n") >= len(texts):
            whole = " \n ".join([text.replace("\n", " ") for text in texts])
        for space in SPACES:
            whole = whole.replace(space, " ")
        if not whole.isascii():
            whole = BETWEEN_WORDS.sub(" ", whole)  # in scripts without spaces, add them
        for mark in PUNCTUATION:
            whole = whole.replace(mark, f" {mark} ")
        content = f" {whole} \n ".encode("utf-8", "surrogatepass")
        codes = np.frombuffer(content, np.uint8)
        # The 8 bytes that start at each position, as one number; the rows overlap in memory.
        self.eights = np.ndarray(len(content), "<u8", content + bytes(8), strides=(1,))
        newlines = np.flatnonzero(codes == NEWLINE)
        self.line_begins = np.concatenate([[0], newlines[:-1] + 1]) + 1
        self.line_ends = newlines - 1
        spaces = np.flatnonzero(codes == SPACE)
        self.starts, self.ends = spaces[:-1] + 1, spaces[1:]
        self.lines = np.cumsum(codes[self.starts] == NEWLINE)

    def hashes(self) -> np.ndarray:
        """Hash each word, [n] uint64."""
        sizes = self.ends - self.starts
        result = sizes.astype(np.uint64) * GOLDEN
        left, offset = np.arange(len(sizes)), 0
        while len(left):
            rest = sizes[left] - offset
            eight = self.eights[self.starts[left] + offset] & FIRST[np.minimum(rest, 8)]
            result[left] = mixed(result[left] ^ eight)
            left, offset = left[rest > 8], offset + 8
        return result


class _HashTable:
    """Hash table from distinct uint64 keys to their positions; open addressing, half full."""

    def __init__(self, keys: np.ndarray) -> None:
        bits = (2 * len(keys) + 1).bit_length()
        self._keys, self._shift = keys, np.uint64(64 - bits)
        self._slots = np.full(1 << bits, -1, np.int32)
        self._probes = 0  # largest number of probes that a key needs
        rows = np.arange(len(keys), dtype=np.int32)
        while len(rows):
            slots = self._slot(keys[rows], self._probes)
            free = self._slots[slots] < 0
            self._slots[slots[free]] = rows[free]  # of several keys with the same slot, one wins
            rows = rows[self._slots[slots] != rows]
            self._probes += 1

    def _slot(self, keys: np.ndarray, probe: int) -> np.ndarray:
        slots = ((keys * GOLDEN) >> self._shift).astype(np.int64)
        return (slots + probe) & (len(self._slots) - 1)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Return the position of each key, -1 = not in the table: [n] int32."""
        result = np.full(len(keys), -1, np.int32)
        left = np.arange(len(keys))
        for probe in range(self._probes):
            rows = self._slots[self._slot(keys[left], probe)]
            taken = rows >= 0  # a free slot means that the key is not in the table
            left, rows = left[taken], rows[taken]
            same = self._keys[rows] == keys[left]
            result[left[same]] = rows[same]
            left = left[~same]
            if not len(left):
                break
        return result


def _equal(
    a: _Lines, a_starts: np.ndarray, b: _Lines, b_starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Compare runs of bytes of a and b, [n] bool."""
    result = np.ones(len(sizes), bool)
    left, offset = np.flatnonzero(sizes), 0
    while len(left):
        rest = sizes[left] - offset
        differ = a.eights[a_starts[left] + offset] ^ b.eights[b_starts[left] + offset]
        result[left] = same = differ & FIRST[np.minimum(rest, 8)] == 0
        left, offset = left[same & (rest > 8)], offset + 8
    return result


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut texts into chunks of about CHUNK characters and at least one text."""
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    begin = 0
    while begin < len(texts):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + CHUNK)))
        yield texts[begin:end]
        begin = end
