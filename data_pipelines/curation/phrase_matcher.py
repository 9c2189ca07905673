"""All the phrases in many texts at once: a trie of words in a hash table, walked in numpy.

Matching with spacing finds " phrase " in a text that has spaces around punctuation. So a phrase is
a run of words, of what lies between neighbouring spaces: each word of the texts is looked up once,
and from each that begins a phrase the trie is followed, from all places in step. Words are compared
byte by byte: the result is exact. An Aho-Corasick automaton waits for memory at each
character, this at each word and for many words at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines.stream.shuffle import GOLDEN, mixed
from data_pipelines.tags.concept_matcher import BETWEEN_WORDS, PUNCTUATION, SPACES

CHUNK = 1 << 19  # characters of text that are looked at together: some MB of arrays
SPACE, NEWLINE = 32, 10
# The first k of 8 bytes that were read as one little-endian number.
FIRST = np.array([(1 << 8 * k) - 1 for k in range(9)], np.uint64)


class PhraseMatcher:
    """Which of many phrases are in texts, as MetaCLIP matches its metadata (arXiv 2309.16671).

    A phrase is in a text where " phrase " is in it, once both have spaces around punctuation, for
    any other white space, and around each character of a script that has no spaces. Case counts. A
    phrase's number is its place; of equal phrases, the first. None may be empty.
    """

    def __init__(self, phrases: Sequence[str]) -> None:
        self._text = text = _Lines(phrases)
        hashes, self._places, words = np.unique(
            text.hashes(), return_index=True, return_inverse=True
        )
        self._words = _HashTable(hashes)
        assert (self._known(text) == words).all(), "two words share a hash"
        # Nodes of the trie: the words, then what steps (node, next word) lead to.
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
        self._none = len(phrases)  # the number of what only begins phrases
        self._phrase = np.full(count, self._none, np.int32)
        for nodes, lines in ended:
            np.minimum.at(self._phrase, nodes, lines.astype(np.int32))
        self._goes_on = np.zeros(count, bool)
        self._goes_on[np.concatenate(steps) // np.uint64(len(hashes))] = True

    def find(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the phrases in each text as (numbers [M] int32, ends [n] int64).

        Ascending and once per text; text i has those from ends[i - 1] to ends[i].
        """
        counts, found = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for chunk in _chunks(texts):
            lines, phrases = self._find(_Lines(chunk))
            counts.append(np.bincount(lines, minlength=len(chunk)))
            found.append(phrases)
        return np.concatenate(found).astype(np.int32), np.cumsum(np.concatenate(counts))

    def _find(self, text: _Lines) -> tuple[np.ndarray, np.ndarray]:
        """(line, phrase) of all matches, ascending."""
        words = self._known(text)
        last = np.flatnonzero(words >= 0)  # words that a run ends with
        nodes, found = words[last], [np.empty(0, np.int64)]
        while len(last):
            phrases = self._phrase[nodes]
            hit = phrases < self._none
            found.append(text.lines[last[hit]] * self._none + phrases[hit])
            on = self._goes_on[nodes]
            last, nodes = last[on] + 1, nodes[on]  # behind a line's last word is the line's end
            on = words[last] >= 0
            last, nodes = last[on], nodes[on]
            rows = self._steps.rows(self._step(nodes, words[last]))
            on = rows >= 0
            last, nodes = last[on], rows[on] + self._first_step
        pairs = np.sort(np.concatenate(found))
        return np.divmod(pairs[np.diff(pairs, prepend=-1) > 0], self._none)

    def _known(self, text: _Lines) -> np.ndarray:
        """The number of each word of a text, -1 = no phrase has it: [n] int32."""
        words = self._words.rows(text.hashes())
        some = np.flatnonzero(words >= 0)
        places = self._places[words[some]]
        starts, begins = text.starts[some], self._text.starts[places]
        sizes = text.ends[some] - starts
        same = sizes == self._text.ends[places] - begins
        same &= _equal(text, starts, self._text, begins, sizes)
        words[some[~same]] = -1
        return words

    def _step(self, nodes: np.ndarray, words: np.ndarray) -> np.ndarray:
        return nodes.astype(np.uint64) * np.uint64(len(self._places)) + words.astype(np.uint64)


class _Lines:
    """Texts as lines of bytes with a space at both ends and around punctuation.

    starts, ends, lines: of the words, of what lies between neighbouring spaces, be it nothing; the
    newline behind a line is one. line_begins, line_ends: without the spaces at a line's ends.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        whole = " \n ".join(texts)
        if whole.count("\n") >= len(texts):
            whole = " \n ".join([text.replace("\n", " ") for text in texts])
        for space in SPACES:
            whole = whole.replace(space, " ")
        if not whole.isascii():
            whole = BETWEEN_WORDS.sub(" ", whole)  # any place is a word's edge
        for mark in PUNCTUATION:
            whole = whole.replace(mark, f" {mark} ")
        content = f" {whole} \n ".encode("utf-8", "surrogatepass")
        codes = np.frombuffer(content, np.uint8)
        # The 8 bytes at each place, as a number
        self.eights = np.ndarray(len(content), "<u8", content + bytes(8), strides=(1,))
        newlines = np.flatnonzero(codes == NEWLINE)
        self.line_begins = np.concatenate([[0], newlines[:-1] + 1]) + 1
        self.line_ends = newlines - 1
        spaces = np.flatnonzero(codes == SPACE)
        self.starts, self.ends = spaces[:-1] + 1, spaces[1:]
        self.lines = np.cumsum(codes[self.starts] == NEWLINE)

    def hashes(self) -> np.ndarray:
        """A hash of each word, [n] uint64."""
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
    """Places of distinct uint64 keys in a list: open addressing, at most half full."""

    def __init__(self, keys: np.ndarray) -> None:
        bits = (2 * len(keys) + 1).bit_length()
        self._keys, self._shift = keys, np.uint64(64 - bits)
        self._slots = np.full(1 << bits, -1, np.int32)
        self._probes = 0  # the longest way to a slot
        rows = np.arange(len(keys), dtype=np.int32)
        while len(rows):
            slots = self._slot(keys[rows], self._probes)
            free = self._slots[slots] < 0
            self._slots[slots[free]] = rows[free]  # of several that want one slot, one stays
            rows = rows[self._slots[slots] != rows]
            self._probes += 1

    def _slot(self, keys: np.ndarray, probe: int) -> np.ndarray:
        slots = ((keys * GOLDEN) >> self._shift).astype(np.int64)
        return (slots + probe) & (len(self._slots) - 1)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Each key's place in the list, -1 = it is not there: [n] int32."""
        found = np.full(len(keys), -1, np.int32)
        left = np.arange(len(keys))
        for probe in range(self._probes):
            rows = self._slots[self._slot(keys[left], probe)]
            taken = rows >= 0  # a free slot ends the way
            left, rows = left[taken], rows[taken]
            same = self._keys[rows] == keys[left]
            found[left[same]] = rows[same]
            left = left[~same]
            if not len(left):
                break
        return found


def _equal(
    a: _Lines, a_starts: np.ndarray, b: _Lines, b_starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Which runs of bytes of a and b are the same, [n] bool."""
    result = np.ones(len(sizes), bool)
    left, offset = np.flatnonzero(sizes), 0
    while len(left):
        rest = sizes[left] - offset
        differ = a.eights[a_starts[left] + offset] ^ b.eights[b_starts[left] + offset]
        result[left] = same = differ & FIRST[np.minimum(rest, 8)] == 0
        left, offset = left[same & (rest > 8)], offset + 8
    return result


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts in runs of about CHUNK characters, at least one each."""
    ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
    begin = 0
    while begin < len(texts):
        before = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, before + CHUNK)))
        yield texts[begin:end]
        begin = end
