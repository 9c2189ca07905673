"""Split files of HMDB51 and UCF101 as they are distributed: which clips train, and which test.

HMDB51    CLASS_test_split1.txt, for each class: `NAME.avi 1`; 1 = train, 2 = test, 0 = not used
UCF101    trainlist01.txt: `CLASS/NAME.avi 1`, with the class; testlist01.txt: `CLASS/NAME.avi`

Clips are matched by class folder and name, whatever their ending: many copies were encoded again.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_pipelines.ingest.clip_lists import tell_missing
from data_pipelines.ingest.plain_files import FileSource
from data_pipelines.ingest.table_columns import LABELS, Row
from data_pipelines.shards.source import ChosenSlots, Source
from xray.errors import DataError
from xray.files import decode_text, lines_of
from xray.words import count

log = logging.getLogger("xray")
HMDB = re.compile(r"(?P<label>.+)_test_split(?P<split>\d+)\.txt")
UCF = re.compile(r"(?P<part>train|test)list(?P<split>\d+)\.txt")
USES = {"0": "", "1": "train", "2": "test"}  # of a clip, in HMDB51's files
WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")  # where a word begins in a class name of UCF101
Clips = dict[str, str]  # CLASS/NAME -> train or test
Pair = tuple[Source, Source]  # training, test


@dataclass(frozen=True)
class SplitFiles:
    """Clips of each split by the file that names them. joined: class names have no spaces."""

    by_split: Mapping[int, Mapping[str, Clips]]
    joined: bool


def read_splits(where: str) -> SplitFiles:
    """Read the split files in a folder; raises DataError with file and line."""
    found: dict[int, dict[str, Clips]] = defaultdict(dict)
    try:
        names = sorted(os.listdir(where))
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error
    hmdb = [match for name in names if (match := HMDB.fullmatch(name))]
    ucf = [match for name in names if (match := UCF.fullmatch(name))]
    for match in hmdb or ucf:
        path = Path(where) / match[0]
        lines = _of_hmdb(path, match["label"]) if hmdb else _of_ucf(path, match["part"])
        found[int(match["split"])][match[0]] = dict(lines)
    if not found:
        raise DataError(
            f"{where} has no split files: neither CLASS_test_split1.txt, as of HMDB51, nor "
            "trainlist01.txt and testlist01.txt, as of UCF101"
        )
    return SplitFiles(dict(sorted(found.items())), not hmdb)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines_of(text), start=1):
        if line.strip():
            yield number, line.strip()


def _of_hmdb(path: Path, label: str) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        name, _, use = line.rpartition(" ")
        if not name or use not in USES:
            raise DataError(f"{path} line {number}: expected the name of a clip, and 0, 1 or 2")
        if USES[use]:
            yield f"{label}/{_stem(name.strip())}", USES[use]


def _of_ucf(path: Path, part: str) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        name = re.sub(r"\s+\d+$", "", line)
        if name.count("/") != 1:
            raise DataError(f"{path} line {number}: expected CLASS/NAME.avi")
        yield _stem(name), part


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def open_splits(what: str, source: Source, where: str) -> tuple[Source, dict[int, Pair]]:
    """Divide the clips of class folders by split files: {split: (training, test)}.

    Returns also all clips that the files list, of which these are parts. what: key of the files,
    for messages. Clips that are listed but missing are counted in one line, and so are those that
    no split uses. Raises DataError for files that cannot be read, that name no clip of the folder,
    or that leave nothing to train on or to test.
    """
    if not isinstance(source, FileSource):
        raise DataError(f"{what} divides a folder of class folders of clips, not shards")
    try:
        files = read_splits(where)
    except DataError as error:
        raise DataError(f"{what}: {error}") from error
    there = {_key(item.name): number for number, item in enumerate(source.items)}
    uses = {
        split: _uses(f"{what}, split {split}", by_file, there.keys(), source.place)
        for split, by_file in files.by_split.items()
    }
    listed = dict.fromkeys(clip for own in uses.values() for clip in own)
    tell_missing(what, sorted(listed.keys() - there.keys()), len(listed))
    if unused := len(there.keys() - listed.keys()):
        log.info("%s: %s of %s in no split", what, count(unused, "clip"), source.place)
    used = sorted(there[clip] for clip in listed if clip in there)
    named = _with_words(source) if files.joined else source
    whole = named.with_slots(ChosenSlots(named, np.array(used)))
    order = {number: place for place, number in enumerate(used)}
    places = {clip: order[there[clip]] for clip in listed if clip in there}
    pairs = {}
    for split, own in uses.items():
        parts = []
        for part in ("train", "test"):
            numbers = [places[clip] for clip, use in own.items() if use == part and clip in places]
            if not numbers:
                raise DataError(f"{what}: split {split} has no {part} clips in {source.place}")
            parts.append(whole.with_slots(ChosenSlots(whole, np.unique(numbers))))
        pairs[split] = parts[0], parts[1]
    return whole, pairs


def _uses(what: str, by_file: Mapping[str, Clips], there: Set[str], place: str) -> Clips:
    """Join the files of a split; raises DataError for one without a clip, and for a clip twice."""
    uses: Clips = {}
    for name, clips in by_file.items():
        if there.isdisjoint(clips):
            raise DataError(f"{what}: {name} names no clip of {place}")
        if twice := min(uses.keys() & clips.keys(), default=""):
            raise DataError(f"{what}: {name} lists {twice}, which another file lists, too")
        uses |= clips
    return uses


def _key(name: str) -> str:
    """Return CLASS/NAME of a file in a class folder, which may have folders inside."""
    return f"{name.partition('/')[0]}/{_stem(posixpath.basename(name))}"


def _with_words(source: FileSource) -> FileSource:
    """Return class folders whose class names have spaces: ApplyEyeMakeup is Apply Eye Makeup."""

    def words(name: str) -> str:
        return WORDS.sub(" ", name)

    def named(meta: Row) -> Row:
        return meta | {key: words(meta[key]) for key in LABELS if isinstance(meta.get(key), str)}

    items = tuple(replace(item, meta=named(item.meta)) for item in source.items)
    return replace(source, items=items, classes=tuple(map(words, source.classes)))
