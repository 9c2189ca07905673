"""Survey of a user's data: its sources, their sizes, and the captions, tags and classes they have.

DATA is a folder or pattern of shards, a folder of such folders (images/, clips/), a folder of
pictures and clips, or a list of them. Folders named val, test, ... are for evaluation, with all
that they contain.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from data_pipelines.decode.decoders import open_clip, read_clip
from data_pipelines.decode.images import open_image, upright_size
from data_pipelines.ingest.endings import MEDIA, ending_of
from data_pipelines.ingest.labelled import class_of
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.split_names import is_held_out
from data_pipelines.ingest.user_data import open_data
from data_pipelines.ingest.walk import walk
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.shard_list import tars_in
from data_pipelines.shards.source import Source
from data_pipelines.shards.tar_index import TEXT_FILES, Modality, media_extensions
from data_pipelines.tags.reader import TagReader
from data_pipelines.text.captions import captions_of, metadata_of
from xray.errors import BadSample, DataError

MOST_READ = 200  # samples of a source whose texts are read
MOST_OPENED = 16  # samples of a source whose pictures or clips are opened
MOST_FOLDERS = 8  # of plain files beside val/ that each become a source
LABELS = ("label_name", "label")
CLASS = "cls"  # a file with the number of a class
NAMES: Mapping[Modality, str] = {"image": "images", "video": "clips"}


@dataclass(frozen=True)
class Found:
    """Samples of one modality in one folder; the shares are of the samples that were read."""

    name: str  # in data.sources
    shards: str  # below data.root; "." is data.root itself
    modality: Modality
    samples: int
    side: int  # median of the shorter sides in pixels, 0 = not known
    captioned: float  # share with captions
    captions: float  # mean number of captions of those
    tagged: float  # share with hashtags
    labelled: float  # share with the name or the number of a class
    label: str = ""  # json field of the name, if there is one
    classes: frozenset[str] = frozenset()  # names, or numbers, of the classes that were read


@dataclass(frozen=True)
class Survey:
    """Sources of a user's data to train on, and those held out for evaluation."""

    root: str
    training: list[Found]
    held_out: list[Found]

    def total(self, modality: Modality) -> int:
        """Return the number of training samples of a modality."""
        return sum(found.samples for found in self.training if found.modality == modality)


def described(found: Found) -> str:
    """Describe a source in a line."""
    words = "pictures" if found.modality == "image" else "clips"
    parts = [f"{found.samples:,} {words}"]
    if found.side:
        parts.append(f"{found.side} px on the shorter side")
    if found.captioned:
        parts.append(f"{found.captions:.1f} captions each ({found.captioned:.0%} have some)")
    if found.tagged:
        parts.append(f"{found.tagged:.0%} have hashtags")
    if found.labelled:
        parts.append(f"{found.labelled:.0%} have a class")
    return ", ".join(parts)


def survey(data: str) -> Survey:
    """Look at data; raises DataError if there is nothing to train on."""
    root = data if is_remote(data) else os.path.abspath(os.path.expanduser(data))
    places = _folders_of_shards(root) or _plain_splits(root) or ["."]
    found = [found for path in places for found in _look(root, path)]
    found.sort(key=lambda own: own.modality)  # pictures first
    found = _with_own_names(found)
    training = [own for own in found if not is_held_out(own.shards)]
    if not training:
        raise DataError(f"{data} has no pictures or clips to train on")
    return Survey(root, training, [own for own in found if is_held_out(own.shards)])


def _with_own_names(found: list[Found]) -> list[Found]:
    """Number the sources that have the same name, such as those of set-a and set_a."""
    names = set[str]()
    for number, own in enumerate(found):
        name, count = own.name, 1
        while name in names:
            count += 1
            name = f"{own.name}_{count}"
        names.add(name)
        found[number] = replace(own, name=name)
    return found


def _folders_of_shards(root: str) -> list[str]:
    """List the folders of shards up to two levels below a folder, as paths below it."""
    if not os.path.isdir(root):
        return []
    listed = []
    first = [name for name in sorted(os.listdir(root)) if not name.startswith(".")]
    inner = [
        f"{name}/{below}"
        for name in first
        if os.path.isdir(os.path.join(root, name))
        for below in sorted(os.listdir(os.path.join(root, name)))
        if not below.startswith(".")
    ]
    own = ["."] if tars_in(root) else []
    for path in sorted([*first, *inner]):
        folder = os.path.join(root, path)
        if os.path.isdir(folder) and tars_in(folder):
            listed.append(path)
    return own + listed


def _plain_splits(root: str) -> list[str]:
    """List the folders of plain files beside a folder val, as paths below root; [] without one.

    They are in root itself, or in its folders (images/train, images/val). Raises DataError for
    files beside val that are in too many folders to become a source each, or in none.
    """
    if not os.path.isdir(root):
        return []
    media = [name.split("/") for name in walk(Path(root)) if ending_of(name) in MEDIA]
    for depth in (1, 2):
        folders = {"/".join(parts[:depth]) for parts in media if len(parts) > depth}
        held = sorted(folder for folder in folders if is_held_out(folder))
        if held and (len(folders - {*held}) > MOST_FOLDERS or min(map(len, media)) <= depth):
            raise DataError(
                f"{root} has {held[0]}/, which is for evaluation, and other files beside it: move "
                "those to train/, or give xray init a folder without val/ and test/"
            )
        if held:
            return sorted(folders)
    return []


def _look(root: str, shards: str) -> Iterator[Found]:
    """Yield what there is of each modality in a folder or list."""
    name = "" if shards == "." else re.sub(r"\W+", "_", shards)
    where = root if shards == "." else os.path.join(root, shards)
    sources: list[Source] = []
    failure: DataError | None = None
    for modality in NAMES:
        try:
            source = open_data(where, Request(name, modality), user="xray init")
        except DataError as error:
            failure = failure or error
            continue
        sources += [source] * bool(len(source))
    if failure is not None and not sources:
        raise failure
    for source in sources:
        kind = NAMES[source.modality]
        own = name or kind
        yield _described(source, f"{own}_{kind}" if name and len(sources) > 1 else own, shards)


def _described(source: Source, name: str, shards: str) -> Found:
    """Read the texts of some samples, spread over the shards, and open a few."""
    tags = TagReader("hashtags", {})
    labels, sides, classes = dict.fromkeys(LABELS, 0), list[int](), set[str]()
    read = counts = captions = tagged = numbered = 0
    media = media_extensions(source.modality, source.animations)
    for number, (shard, member) in enumerate(_spread(source)):
        wanted = (*TEXT_FILES, CLASS, *(media if number < MOST_OPENED else ()))
        try:
            files = source.read(shard, member, wanted)
        except BadSample:
            continue
        read += 1
        with suppress(BadSample):
            texts = captions_of(files)
            counts, captions = counts + 1, captions + len(texts)
        with suppress(BadSample):
            tagged += bool(tags.tags_of(files, "hashtags"))
            facts = metadata_of(files)
            for field in LABELS:
                labels[field] += isinstance(facts.get(field), str) and bool(facts[field])
        numbered += CLASS in files
        with suppress(BadSample):
            classes.add(class_of(files))
        sides += _side({ending: files[ending] for ending in media if ending in files})
    label = max(LABELS, key=lambda field: labels[field])
    labelled = max(labels[label], numbered)
    most = max(read, 1)
    return Found(
        name, shards, source.modality, len(source), round(median(sides)) if sides else 0,
        counts / most, captions / max(counts, 1), tagged / most, labelled / most,
        label if labels[label] else "", frozenset(classes - {""}),
    )  # fmt: skip


def _spread(source: Source) -> Iterator[tuple[int, int]]:
    """Yield up to MOST_READ (shard, member), from the beginning of up to 8 shards."""
    shards = len(source.manifest)
    chosen = sorted({round(k * (shards - 1) / 7) for k in range(8)})
    for shard in chosen:
        members = source.members(shard).tolist()
        step = max(1, len(members) * len(chosen) // MOST_READ)
        yield from ((shard, member) for member in members[::step])


def _side(media: Mapping[str, bytes]) -> list[int]:
    """Return the shorter side in pixels of a picture or clip; [] if it cannot be read."""
    for ending, data in media.items():
        with suppress(BadSample):
            if ending in media_extensions("image", "image"):
                return [min(upright_size(open_image(data)))]
            (frame,) = read_clip(open_clip(data), data, np.array([0]))
            return [min(frame.shape[:2])]
    return []
