"""Table d of `bench_curation.py`: near-duplicates among random hashes, and dHash of real photos."""

from __future__ import annotations

import argparse
import io
import resource
import time

import numpy as np
from PIL import Image

from data_pipelines.curation.dedup import dhash, near_values, ones
from data_pipelines.shards.source import open_source
from tools.common.fresh_process import in_fresh_process
from tools.common.tables import Table


def near_among(number: int, distance: int) -> dict[str, float]:
    """Pairs among random hashes of which one in ten is a copy with `distance` bits changed."""
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
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = np.isin(originals, values[pairs]).mean()
    return {"found": float(found), "seconds": seconds, "bytes": 1024 * grown / number}


def duplicates(options: argparse.Namespace) -> list[Table]:
    """(d)"""
    rows = []
    for number in (options.hashes // 10, options.hashes):
        for distance in (1, 3):
            found = in_fresh_process(near_among, number, distance)
            cells = [f"{number:,}", str(distance), f"{found['found']:.2%}"]
            rows.append([*cells, f"{found['seconds']:.1f}", f"{found['bytes']:.0f}"])
    heads = ["hashes", "bits", "copies found (100%)", "s", "bytes per hash, at the peak"]
    title = "(d) Near pairs among random hashes, one in ten a copy with so many bits changed"
    tables = [Table(title, heads, rows)]
    return [*tables, looks(options)] if options.data.is_dir() else tables


def saved(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


def looks(options: argparse.Namespace) -> Table:
    """(d) dHash of real photos: of copies, and of photos that are not the same."""
    source = open_source("photos", str(options.data), "image")
    places = list(source.places())[: options.photos]
    media = [next(iter(source.read(*place, ("jpg",)).values())) for place in places]
    start = time.process_time()
    work = [dhash(Image.open(io.BytesIO(data)).convert("RGB")) for data in media]
    rate = len(media) / (time.process_time() - start)
    own = np.array(work, np.int64).view(np.uint64)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in media]
    edge = [
        (i.width // 50, i.height // 50, i.width * 49 // 50, i.height * 49 // 50) for i in images
    ]
    copies = {
        "JPEG, quality 50": [saved(image, 50) for image in images],
        "half the size": [image.resize((image.width // 2, image.height // 2)) for image in images],
        "2% cut off each edge": [i.crop(box) for i, box in zip(images, edge, strict=True)],
    }
    rows = []
    for name, changed in copies.items():
        hashes = np.array([dhash(image) for image in changed], np.int64).view(np.uint64)
        apart_by = ones(hashes ^ own)
        rows.append([name, *(f"{np.mean(apart_by <= most):.1%}" for most in (0, 1, 3))])
    closest = [ones(own[i + 1 :] ^ own[i]) for i in range(len(own) - 1)]
    others = np.concatenate(closest)
    rows.append(["pairs of other photos", *(f"{(others <= most).sum()}" for most in (0, 1, 3))])
    heads = [
        f"{len(media):,} photos; {rate:,.0f} hashes per s and core",
        "equal",
        "<= 1",
        "<= 3 bits",
    ]
    return Table(
        f"(d) dHash of photos against their copies, and {len(others):,} pairs", heads, rows
    )
