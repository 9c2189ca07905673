"""Table d of `bench_curation.py`: near-duplicates of random hashes, and dHash on real photos."""

from __future__ import annotations

import argparse
import io
import resource
import time

import numpy as np
from PIL import Image

from data_pipelines.decode.images import decode_image
from data_pipelines.decode.near_duplicates import dhash, near_values
from data_pipelines.shards.source import open_source
from tools.common.fresh_process import in_fresh_process
from tools.common.tables import Table


def near_among(number: int, distance: int) -> dict[str, float]:
    """Search pairs among random hashes, one in ten a copy with `distance` bits changed.

    Returns the share of copies found, seconds and bytes per hash. Call it in a fresh process.
    """
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**64, number, np.uint64)
    copies = number // 10
    values[:copies] = values[-copies:]
    first = rng.integers(0, 64, copies, np.uint64)
    for step in range(distance):
        values[:copies] ^= np.uint64(1) << (first + np.uint64(21 * step)) % np.uint64(64)
    originals = values[-copies:].copy()
    values.sort()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    pairs = near_values(values, distance)
    seconds = time.perf_counter() - start
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    recall = np.isin(originals, values[pairs]).mean()
    return {"recall": float(recall), "seconds": seconds, "bytes": 1024 * growth / number}


def duplicates(options: argparse.Namespace) -> list[Table]:
    """Make tables (d)."""
    rows = []
    for number in (options.hashes // 10, options.hashes):
        for distance in (1, 3):
            result = in_fresh_process(near_among, number, distance)
            cells = [f"{number:,}", str(distance), f"{result['recall']:.2%}"]
            rows.append([*cells, f"{result['seconds']:.1f}", f"{result['bytes']:.0f}"])
    heads = ["hashes", "changed bits", "copies found (target 100%)", "s", "peak bytes per hash"]
    title = "(d) Near pairs among random hashes, one in ten a copy with some bits changed"
    tables = [Table(title, heads, rows)]
    return [*tables, photo_hashes(options)] if options.data.is_dir() else tables


def jpeg_copy(image: Image.Image, quality: int) -> Image.Image:
    """Encode an image as JPEG and decode it."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return decode_image(buffer.getvalue())


def photo_hashes(options: argparse.Namespace) -> Table:
    """Compare dHashes of photos with those of changed copies and of other photos."""
    source = open_source("photos", str(options.data), "image")
    places = list(source.places())[: options.photos]
    media = [next(iter(source.read(*place, ("jpg",)).values())) for place in places]
    start = time.process_time()
    results = [dhash(decode_image(data)) for data in media]
    rate = len(media) / (time.process_time() - start)
    originals = np.array(results, np.int64).view(np.uint64)
    images = [decode_image(data) for data in media]
    boxes = [
        (i.width // 50, i.height // 50, i.width * 49 // 50, i.height * 49 // 50) for i in images
    ]
    copies = {
        "JPEG, quality 50": [jpeg_copy(image, 50) for image in images],
        "half the size": [image.resize((image.width // 2, image.height // 2)) for image in images],
        "2% cut off each edge": [i.crop(box) for i, box in zip(images, boxes, strict=True)],
    }
    rows = []
    for name, changed in copies.items():
        hashes = np.array([dhash(image) for image in changed], np.int64).view(np.uint64)
        distances = np.bitwise_count(hashes ^ originals)
        rows.append([name, *(f"{np.mean(distances <= limit):.1%}" for limit in (0, 1, 3))])
    pairs = [np.bitwise_count(originals[i + 1 :] ^ originals[i]) for i in range(len(originals) - 1)]
    others = np.concatenate(pairs)
    rows.append(["different photos", *(f"{(others <= limit).sum()}" for limit in (0, 1, 3))])
    heads = [
        f"{len(media):,} photos; {rate:,.0f} hashes per s and core",
        "equal",
        "<= 1 bit",
        "<= 3 bits",
    ]
    title = f"(d) dHash: share of copies within a distance, and number of {len(others):,} pairs of "
    return Table(f"{title}different photos", heads, rows)
