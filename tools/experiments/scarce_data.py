"""Photos of which few have captions and all have noisy hashtags, made from captioned photos.

    python -m tools.experiments.scarce_data DATA/captions_train OUT
    python -m tools.experiments.scarce_data DATA/captions_train OUT --held-out 1090

OUT/captioned/N         N photos with all their captions and no hashtags; those of a smaller N are
                        among those of a larger one
OUT/tagged/noise_P      all photos, with hashtags, as a list and as one text (tag_text), and no
                        captions
OUT/held_out            with --held-out N: the last N photos with their captions, in no other folder

The hashtags of a photo are the words of one of its captions. A share of them is dropped, because
people leave out hashtags, and P % of the others are replaced by a tag drawn by frequency, because
hashtags are often wrong. The choices depend on the key of the photo only.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds

from data_pipelines.shards.source import open_source
from data_pipelines.tags.reader import TagReader
from data_pipelines.text.captions import captions_of

CAPTIONED = (450, 900, 3600)
NOISES = (0, 20, 40)
DROPPED = 0.2
PER_SHARD = 1000
SHUFFLE, TAGS = 0, 1  # purposes of a photo's random numbers


@dataclass
class Photo:
    """A photo with its captions, and the words of one of them."""

    key: str
    picture: bytes
    captions: list[str]
    words: list[str]

    def random(self, purpose: int) -> np.random.Generator:
        """Return the random numbers of a photo for a purpose."""
        return np.random.default_rng([zlib.crc32(self.key.encode()), purpose])


def read_photos(shards: Path) -> Iterator[Photo]:
    """Read the photos of a folder of shards in order."""
    source, reader = open_source("photos", str(shards.resolve()), "image"), TagReader("", {})
    for shard in range(len(source.manifest)):
        for member in source.members(shard).tolist():
            files = source.read(shard, member)
            photo = Photo(source.index(shard).key(member), files["jpg"], captions_of(files), [])
            caption = photo.random(TAGS).choice(photo.captions)
            photo.words = reader.tags_of({"txt": caption.encode()}, "caption_words")
            yield photo


def hashtags(photo: Photo, noise: float, counts: Counter[str]) -> list[str]:
    """Drop a share of the words of a photo and replace others by words drawn by frequency.

    noise: share of the kept words to replace. The words that are kept do not depend on it.
    """
    rng = photo.random(TAGS)
    rng.choice(photo.captions)  # the draw of read_photos comes first
    kept = [word for word in photo.words if rng.random() >= DROPPED]
    names, shares = list(counts), np.array(list(counts.values())) / counts.total()
    others = rng.choice(names, len(kept), p=shares).tolist()
    wrong = rng.random(len(kept)) < noise
    pairs = zip(kept, others, wrong, strict=True)
    return list(dict.fromkeys(other if replace else word for word, other, replace in pairs))


def write(folder: Path, rows: Iterator[tuple[Photo, dict[str, Any]]]) -> None:
    """Write photos with their metadata as shards."""
    folder.mkdir(parents=True)
    pattern = str(folder / "%05d.tar")
    with wds.ShardWriter(pattern, maxcount=PER_SHARD, verbose=0, encoder=False) as shards:
        for photo, content in rows:
            text = json.dumps(content).encode()
            shards.write({"__key__": photo.key, "jpg": photo.picture, "json": text})


def captioned(photos: list[Photo]) -> Iterator[tuple[Photo, dict[str, Any]]]:
    """Yield photos with their captions."""
    yield from ((photo, {"captions": photo.captions}) for photo in photos)


def main() -> None:
    """Write the folders and print what they hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", type=int, default=0, help="number of photos to hold out")
    parser.add_argument("--captioned", type=int, nargs="*", default=CAPTIONED)
    given = parser.parse_args()
    photos = list(read_photos(given.shards))
    if given.held_out:
        write(given.out / "held_out", captioned(photos[-given.held_out :]))
        photos = photos[: -given.held_out]
    shuffled = sorted(photos, key=lambda photo: photo.random(SHUFFLE).random())
    for name, number in [*((str(n), n) for n in given.captioned), ("all", len(photos))]:
        write(given.out / "captioned" / name, captioned(shuffled[:number]))
    counts = Counter(word for photo in photos for word in photo.words)
    print(f"{len(photos):,} photos, {len(counts):,} words")
    for percent in NOISES:
        rows = [(photo, hashtags(photo, percent / 100, counts)) for photo in photos]
        tags = ((photo, {"hashtags": own, "tag_text": " ".join(own)}) for photo, own in rows)
        write(given.out / "tagged" / f"noise_{percent}", tags)
        mean = np.mean([len(own) for _, own in rows])
        right = np.mean([len(set(own) & set(photo.words)) for photo, own in rows]) / mean
        bare = sum(not own for _, own in rows)
        print(
            f"noise_{percent}: {mean:.1f} hashtags per photo, {right:.0%} of them words of the "
            f"caption; {bare:,} photos have none"
        )


if __name__ == "__main__":
    main()
