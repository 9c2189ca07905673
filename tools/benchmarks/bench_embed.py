"""How fast `xray embed` and `xray search` are, against what bounds them.

    python -m tools.benchmarks.bench_embed [--tables ab] [--rows 1000000] [--dim 512] \
        [--endings npy,parquet]
        [--model vit_base_patch16_224] [--samples 64] [--batch 16] [--workers 1] [--rounds 3]
        [--processor-time] [--out FILE.json]

(a) the job of `xray embed` against the encoder's forward pass on pixels that lie in memory, in
turns; (b) a search over random rows of each dtype, file open and encoding apart, against the time
that this machine takes to read as many bytes of memory. --processor-time: of this process and its
children instead of the wall's, where other work shares the cores (with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipelines.ingest.corpus import open_corpus
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved, speedup
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import VisionEncoder
from xray.dist import choose_device
from xray.models import ModelConfig, VisionBackbone
from xray.models.heads import Normalize
from xray.search.embed import EmbedConfig, embed
from xray.search.embedding_file import (
    STORED,
    Block,
    Names,
    calibrate,
    open_embeddings,
    shortened,
    write_embeddings,
)
from xray.search.exact import search

SIZE = (500, 375)  # pixels of a photo
BLOCK = 16_384
DTYPES = ("fp32", "fp16", "int8", "binary")


def processor_time() -> float:
    """Seconds of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# (a) ------------------------------------------------------------------------------------------


def photos(folder: Path, count: int) -> Path:
    """JPEGs with something to see at every scale, as a shard."""
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize(SIZE, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = buffer.tell()
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


class RandomEncoder(VisionEncoder):
    """A backbone of random weights, as an artifact's is restored: speed does not depend on them."""

    def __init__(self, name: str) -> None:
        torch.nn.Module.__init__(self)
        manifest = {"stage": "mae", "config": {"data": {"resolution": 224, "frames": 1}}}
        self.artifact = Artifact(Path(name), manifest, "random", name)
        self.keep_rate = 1.0
        self.vision = VisionBackbone(ModelConfig(name=name, pretrained=""), 224, 2)
        self.normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.eval()


def throughput(options: argparse.Namespace, clock: Callable[[], float], device: str) -> Table:
    """(a)"""
    encoder = RandomEncoder(options.model).to(device)
    batch = torch.randint(0, 256, (options.batch, 1, 3, 224, 224), dtype=torch.uint8).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        corpus = open_corpus([str(photos(folder / "shards", options.samples))])
        config = EmbedConfig(batch_size=options.batch, workers=options.workers)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(options.samples // options.batch):
                encoder.features(batch)

        def job() -> None:
            out = folder / "x.parquet"
            out.unlink(missing_ok=True)
            embed(encoder, corpus, config, out)

        seconds = interleaved({"bare forward": bare, "xray embed": job}, options.rounds, clock)
    rows = []
    for what, found in seconds.items():
        share = f"{speedup(seconds, what, 'bare forward'):.2f}x"
        each = ", ".join(f"{second:.2f}" for second in found)
        rate = f"{options.samples / min(found):.1f}"
        rows.append([what, each, rate, share, ">= 0.95x" if what == "xray embed" else ""])
    heads = ["what", "s of each round", "images per s, at best", "of the bare pass", "target"]
    return Table(
        f"(a) {options.samples} JPEGs of {SIZE[0]} x {SIZE[1]} through {options.model} at 224, "
        f"batch {options.batch}, fp32, {options.workers} workers",
        heads,
        rows,
    )


# (b) ------------------------------------------------------------------------------------------


def random_blocks(count: int, dim: int) -> Iterator[Block]:
    """Rows on the sphere."""
    rng = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        numbers = range(start, min(start + BLOCK, count))
        rows = shortened(rng.standard_normal((len(numbers), dim), np.float32), dim)
        yield rows, Names([f"{number:09d}" for number in numbers], ["00000.tar"] * len(rows))


def bandwidth(clock: Callable[[], float]) -> float:
    """Bytes per second that a sum reads of memory, at best of five."""
    values = torch.ones(1 << 28, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        start = clock()
        values.sum()
        best = min(best, clock() - start)
    return values.numel() * 4 / best


def searches(options: argparse.Namespace, clock: Callable[[], float]) -> Table:
    """(b)"""
    reads = bandwidth(clock)
    query = shortened(
        np.random.default_rng(1).standard_normal((1, options.dim), np.float32), 1 << 20
    )
    rows = []
    for dtype in DTYPES:
        for ending in options.endings.split(","):
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / f"x.{ending}"
                facts = {"rows": options.rows, "dim": options.dim, "dtype": dtype}
                if dtype == "int8":
                    most = np.full(options.dim, 5 / np.sqrt(options.dim), np.float32)
                    scale, offset = calibrate(-most, most)
                    facts |= {"scale": scale.tolist(), "offset": offset.tolist()}
                blocks = random_blocks(options.rows, options.dim)
                write_embeddings(path, {**facts, "modality": "image"}, blocks)
                opened = open_embeddings(path)
                seconds = []
                for _ in range(options.rounds + 1):
                    start = clock()
                    search(opened, query, 10)
                    seconds.append(clock() - start)
            width = options.dim / 8 if dtype == "binary" else options.dim
            size = options.rows * width * np.dtype(STORED[dtype]).itemsize
            best = min(seconds[1:])
            floor = size / reads
            cells = [dtype, f".{ending}", f"{size / 1e6:,.0f}", f"{floor:.3f}", f"{best:.3f}"]
            rows.append([*cells, f"{best / floor:.1f}x", "< 1 s"])
    heads = ["dtype", "file", "MB", "floor, s", "best, s", "of the floor", "target"]
    title = f"(b) top 10 of {options.rows:,} rows of {options.dim} dimensions, one query, best of "
    title += (
        f"{options.rounds}; floor: the bytes at the {reads / 1e9:.1f} GB/s of a sum over memory"
    )
    return Table(title, heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", default="ab")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--endings", default="npy,parquet")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clock = processor_time if options.processor_time else time.perf_counter
    device = choose_device("auto").type
    told = hardware(device) + ("; processor time" if options.processor_time else "")
    print(told)
    alone = (
        time.process_time if options.processor_time else clock
    )  # finer: a search has no children
    kinds = {"a": lambda: throughput(options, clock, device), "b": lambda: searches(options, alone)}
    print_tables((kinds[letter]() for letter in options.tables), told, options.out)


if __name__ == "__main__":
    main()
