"""Checks one shard, or a part of a list of plain files: reads every sample as training would.

Nothing is written: an index that does not match its tar is reported, not renewed. Worker processes
import this module, so it must not import torch.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.checks.check_index import Recorded, compare
from data_pipelines.decode.decoders import FrameChoice
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.sandbox import clip_decoder
from data_pipelines.ingest.listing import Item
from data_pipelines.ingest.plain_files import read_item
from data_pipelines.shards.remote import ShardCache, is_remote
from data_pipelines.shards.tar_contents import (
    BROKEN_LINK,
    SAME_NAME,
    SPARSE,
    SPECIAL,
    SYSTEM,
    TarContents,
    read_tar,
    split_name,
)
from data_pipelines.shards.tar_index import (
    ShardIndex,
    index_of,
    media_extensions,
)
from data_pipelines.tags.reader import TagReader
from data_pipelines.text.captions import NO_CAPTION, Caption, read_captions
from data_pipelines.text.names import original_name
from xray.config import DataConfig
from xray.errors import BadSample, DataError
from xray.files import printable

FRAMES = 5  # read per clip, including first, middle and last
FIRST_TO_LAST = (0.0, 0.25, 0.5, 0.75, 0.9999)  # one in each fifth of the clip
BAD_KEPT = 1000  # findings listed per shard; all are counted
NAMES_KEPT, NAMES_LIMIT = 100_000, 1_000_000  # above the limit, keep the most frequent
TAGS = TagReader("hashtags", {})
ADVICE = {  # on members that are left out
    SPARSE: "pack it again without the option --sparse of tar",
    SPECIAL: "only files, folders and links are read",
    BROKEN_LINK: "pack it again with the option --dereference of tar",
}
THUMBNAILS, SIDE = 48, 128  # on the contact sheet; longer side in pixels


@dataclass(frozen=True)
class Bad:
    """Defect of one sample."""

    shard: str
    key: str
    cause: str
    detail: str
    name: str = ""  # original file name, if known


@dataclass
class Media:
    """Counts of one modality: samples, those that decode, and those that also have a caption."""

    samples: int = 0
    usable: int = 0
    captioned: int = 0


@dataclass(frozen=True)
class Range:
    """Minimum, mean and maximum of a number; zeros if there was none."""

    least: float = 0
    mean: float = 0
    most: float = 0


@dataclass
class ShardCheck:
    """Content of one shard; only `error` is set for a tar that cannot be read."""

    path: str
    error: str = ""
    samples: int = 0
    bytes: int = 0
    digest: str = ""  # over keys, endings and sizes, as in the index
    matches_index: bool | None = None  # None: it has no index yet
    matches_sha256: bool | None = None  # None: no sha256 is recorded
    images: Media = field(default_factory=Media)
    clips: Media = field(default_factory=Media)
    width: Range = Range()
    height: Range = Range()
    seconds: float = 0.0  # of all clips
    without_caption: int = 0
    first_without_caption: str = ""  # its key
    first_without_caption_name: str = ""  # its original file name, if known
    duplicates: int = 0  # keys that occur more than once
    system_files: int = 0  # hidden ones included; left out
    causes: dict[str, int] = field(default_factory=dict)  # cause -> findings
    bad: list[Bad] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class Thumbnail:
    """Thumbnail of an image or of a clip's middle frame. The sheet shows the lowest ranks.

    name: for people, "" = the key. link: URL of the whole picture, "" = none. detail: more text.
    """

    rank: str
    shard: str
    key: str
    caption: str
    png: str  # base64
    name: str = ""
    link: str = ""
    detail: str = ""


@dataclass
class Stats:
    """Histograms, value -> count."""

    # width, height, aspect, seconds, frames, words, captions; and language, hashtag, extension
    numbers: dict[str, dict[float, int]] = field(default_factory=dict)
    names: dict[str, dict[str, int]] = field(default_factory=dict)
    sheet: list[Thumbnail] = field(default_factory=list)

    def number(self, name: str, value: float, count: int = 1) -> None:
        """Count a number."""
        histogram = self.numbers.setdefault(name, {})
        histogram[value] = histogram.get(value, 0) + count

    def name(self, name: str, value: str, count: int = 1) -> None:
        """Count a name."""
        histogram = self.names.setdefault(name, {})
        histogram[value] = histogram.get(value, 0) + count
        if len(histogram) > NAMES_LIMIT:
            self.names[name] = dict(Counter(histogram).most_common(NAMES_KEPT))

    def range(self, name: str) -> Range:
        """Return minimum, mean and maximum of a number."""
        histogram = self.numbers.get(name)
        if not histogram:
            return Range()
        mean = sum(value * n for value, n in histogram.items()) / sum(histogram.values())
        return Range(min(histogram), mean, max(histogram))

    def add(self, other: Stats) -> None:
        """Add the counts of `other`, and merge the thumbnails by rank."""
        for name, numbers in other.numbers.items():
            for value, count in numbers.items():
                self.number(name, value, count)
        for name, names in other.names.items():
            for text, count in names.items():
                self.name(name, text, count)
        self.sheet = sorted(self.sheet + other.sheet)[:THUMBNAILS]


def check_shard(
    path: str, manifest: Recorded | None, cache: ShardCache, config: DataConfig
) -> tuple[ShardCheck, Stats]:
    """Check one tar; errors are recorded in its row of the report."""
    reader = _ShardReader(path, config)
    local = path
    try:
        local = str(cache.fetch(path)) if is_remote(path) else path
        status, contents = Path(local).stat(), read_tar(Path(local))
        index = index_of(Path(local), contents, status, "")
        reader.row.samples, reader.row.bytes = len(index), index.facts["size"]
        reader.row.digest = index.facts["digest"]
        compared = compare(path, index, manifest, cache)
        reader.row.matches_index, reader.row.matches_sha256 = compared.index, compared.sha256
        reader.row.error = compared.error
        reader.note_left_out(contents)
        reader.read_all(index, contents)
    except (DataError, OSError) as error:
        reader.row.error = printable(str(error).replace(local, path))
    return reader.finished()


def check_files(name: str, items: Sequence[Item], config: DataConfig) -> tuple[ShardCheck, Stats]:
    """Check some files of a folder or a list; they become one row of the report."""
    reader = _ShardReader(name, config)
    reader.row.samples = len(items)
    for item in items:
        key = printable(item.name)
        try:
            if not item.listed:
                raise BadSample("not in metadata", "no row for this file")
            files = read_item(item)
        except BadSample as error:
            reader.note(key, error)
            continue
        reader.row.bytes += sum(map(len, files.values()))
        reader.read_sample(key, files)
    return reader.finished()


class _ShardReader:
    """Reader of a shard's samples that counts and records defects."""

    def __init__(self, path: str, config: DataConfig) -> None:
        self.row, self.stats, self.config = ShardCheck(printable(path)), Stats(), config

    def read_all(self, index: ShardIndex, contents: TarContents) -> None:
        """Read every sample, and find duplicate keys."""
        for member, key in enumerate(contents.keys):
            try:
                files = index.read(member, tar=index.path)
            except BadSample as error:
                self.note(printable(key), error)
                continue
            self.read_sample(printable(key), files)
        copies = Counter(contents.keys)
        replaced = Counter(map(split_name, contents.left_out.get(SAME_NAME, ())))
        most: Counter[str] = Counter()
        for (key, _), count in replaced.items():
            most[key] = max(most[key], count)
        copies += most
        for key in sorted(key for key, count in copies.items() if count > 1):
            self.row.duplicates += 1
            self.note(printable(key), BadSample("duplicate key", f"{copies[key]} times"))

    def note_left_out(self, contents: TarContents) -> None:
        """Count the files of systems, and note the members that are in no sample."""
        self.row.system_files = len(contents.left_out.get(SYSTEM, ()))
        for cause, advice in ADVICE.items():
            for name in contents.left_out.get(cause, ()):
                self.note(printable(name), BadSample(cause, advice))

    def read_sample(self, key: str, files: dict[str, bytes]) -> None:
        captions = self.read_texts(key, files)
        images = [e for e in media_extensions("image", "image") if e in files]
        clips = [e for e in media_extensions("video", "image") if e in files]
        if not images and not clips:
            self.note(key, BadSample("no media", f"only {', '.join(files)}"), files)
        row = self.row
        kinds = ((images, row.images, self.read_image), (clips, row.clips, self.read_clip))
        for found, media, load in kinds:
            if not found:
                continue
            media.samples += 1
            try:
                if len(found) > 1:
                    raise BadSample("no media", f"several of one modality: {', '.join(found)}")
                image = load(files[found[0]])
            except BadSample as error:
                self.note(key, error, files)
                continue
            media.usable += 1
            media.captioned += bool(captions)
            self.stats.name("extension", found[0])
            self.show(key, captions, image, files)

    def read_texts(self, key: str, files: dict[str, bytes]) -> list[Caption]:
        """Return the captions; count them and the tags."""
        try:
            tags = TAGS.tags_of(files, "hashtags")
            captions = read_captions(files)
        except BadSample as error:
            if error.cause != NO_CAPTION:
                self.note(key, error, files)
                return []
            captions = []
        for tag in tags:
            self.stats.name("hashtag", printable(tag))
        self.stats.number("captions", len(captions))
        for caption in captions:
            self.stats.number("words", len(caption.text.split()))
            if caption.language:
                self.stats.name("language", printable(caption.language))
        if not captions:
            if not self.row.without_caption:
                self.row.first_without_caption = key
                self.row.first_without_caption_name = original_name(files)
            self.row.without_caption += 1
        return captions

    def read_image(self, data: bytes) -> Image.Image:
        image = decode_image(data)
        self.count_size(image.width, image.height)
        return image

    def read_clip(self, data: bytes) -> Image.Image:
        """Decode frames from the first to the last; return the middle one."""
        choice = FrameChoice(FRAMES, offsets=FIRST_TO_LAST)
        clip = clip_decoder(self.config).decode(data, choice)
        self.count_size(clip.pixels.shape[2], clip.pixels.shape[1])
        seconds = clip.total / clip.fps if clip.fps > 0 else 0.0
        self.row.seconds += seconds
        self.stats.number("seconds", round(seconds, 1))
        self.stats.number("frames", clip.total)
        return Image.fromarray(clip.pixels[FRAMES // 2])

    def count_size(self, width: int, height: int) -> None:
        self.stats.number("width", width)
        self.stats.number("height", height)
        self.stats.number("aspect", round(width / height, 2))

    def show(
        self, key: str, captions: list[Caption], image: Image.Image, files: Mapping[str, bytes]
    ) -> None:
        """Keep a sample for the contact sheet if its hash is among the lowest."""
        name = self.row.path.rpartition("/")[2]  # independent of the shards' folder
        rank = hashlib.sha256(f"{name}/{key}".encode("utf-8", "surrogateescape")).hexdigest()
        sheet = self.stats.sheet
        if len(sheet) == THUMBNAILS and rank > sheet[-1].rank:
            return
        image.thumbnail((SIDE, SIDE))
        caption = printable(captions[0].text) if captions else ""
        png = png_of(np.asarray(image))
        shown = Thumbnail(rank, self.row.path, key, caption, png, original_name(files))
        bisect.insort(sheet, shown)
        del sheet[THUMBNAILS:]

    def note(self, key: str, error: BadSample, files: Mapping[str, bytes] | None = None) -> None:
        """Record a defect of a sample; files: of the sample, if they were read."""
        self.row.causes[error.cause] = self.row.causes.get(error.cause, 0) + 1
        if len(self.row.bad) < BAD_KEPT:
            name = original_name(files or {})
            detail = printable(error.detail)
            self.row.bad.append(Bad(self.row.path, key, error.cause, detail, name))

    def finished(self) -> tuple[ShardCheck, Stats]:
        self.row.width, self.row.height = self.stats.range("width"), self.stats.range("height")
        return self.row, self.stats


def png_of(pixels: np.ndarray) -> str:
    """Return [H, W, 3] uint8 as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
