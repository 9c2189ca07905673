"""Generated shapes of the quickstart on photos instead of plain backgrounds.

    python -m tools.experiments.cluttered_shapes DATA/captions_train DATA/captions_val OUT

OUT has the sets of the quickstart at 96 px. The background of each picture is half of its colour
and half of a random square of a photo, so that captions that name the colour stay true. Pictures
for training get photos of the first folder, those for evaluation photos of the second one. Clips
keep their plain backgrounds.
"""

from __future__ import annotations

import argparse
import io
import shutil
import zlib
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

from data_pipelines.decode.images import open_image
from data_pipelines.ingest.demo import DemoConfig, make_demo
from data_pipelines.shards.source import Source, open_source
from xray.files import replacing

PHOTO = 0.5  # share of the photo in the background
TRAINING = ("photos",)
EVALUATION = ("heldout", "gallery")


def square(photo: bytes, side: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of a photo, [side, side, 3] uint8: half its shorter side or more."""
    image = open_image(photo).convert("RGB")
    size = int(rng.uniform(0.5, 1.0) * min(image.size))
    left, top = (int(rng.integers(length - size + 1)) for length in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)).resize((side, side)))


def cluttered(picture: bytes, mask: bytes, photo: bytes, rng: np.random.Generator) -> bytes:
    """Blend the background of a picture, where its mask is 0, with a photo; return a JPEG."""
    pixels = np.asarray(open_image(picture).convert("RGB"), np.float32)
    ground = np.asarray(open_image(mask))[..., None] == 0
    blend = (1 - PHOTO) * pixels + PHOTO * square(photo, len(pixels), rng)
    buffer = io.BytesIO()
    image = Image.fromarray(np.where(ground, blend, pixels).round().astype(np.uint8))
    image.save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def rewrite(plain: Path, out: Path, photos: Source) -> None:
    """Write the shards of a set of pictures on photos; the choices depend on their keys only."""
    source, places = open_source(plain.name, str(plain), "image"), list(photos.places())
    out.mkdir(parents=True)
    for shard in range(len(source.manifest)):
        path = str(out / source.manifest.name(shard))
        with wds.TarWriter(path, encoder=False, mtime=0.0) as sink:
            for member in source.members(shard).tolist():
                key, files = source.index(shard).key(member), source.read(shard, member)
                rng = np.random.default_rng([zlib.crc32(plain.name.encode()), int(key)])
                photo = photos.read(*places[rng.integers(len(places))])["jpg"]
                files["jpg"] = cluttered(files["jpg"], files["mask.png"], photo, rng)
                sink.write({"__key__": key, **files})


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("training", type=Path, help="shards of photos")
    parser.add_argument("evaluation", type=Path, help="shards of other photos")
    parser.add_argument("out", type=Path)
    defaults = DemoConfig(side=96, frames=8, version=3)
    parser.add_argument("--photos", type=int, default=defaults.photos, help="pictures for training")
    parser.add_argument("--clips", type=int, default=defaults.clips)
    given = parser.parse_args()
    config = DemoConfig(**{**vars(defaults), "photos": given.photos, "clips": given.clips})
    with replacing(given.out, given.out.with_name(f".{given.out.name}.making")) as out:
        plain = out / "plain"
        make_demo(plain, config)
        for names, folder in ((TRAINING, given.training), (EVALUATION, given.evaluation)):
            photos = open_source("photos", str(folder.resolve()), "image")
            for name in names:
                rewrite(plain / name, out / name, photos)
        for kept in ("clips", "classes.txt", "demo.json"):
            (plain / kept).rename(out / kept)
        shutil.rmtree(plain)
    print(f"{given.out}: {', '.join(TRAINING + EVALUATION)} on photos, and clips as they were")


if __name__ == "__main__":
    main()
