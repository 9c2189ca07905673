"""Speed of `xray embed` and `xray search` against their bounds.

    python -m tools.benchmarks.bench_embed [--tables ab] [--rows 1000000] [--dim 512] \
        [--endings npy,parquet]
        [--model vit_base_patch16_224] [--samples 64] [--batch 16] [--workers 1] [--rounds 3]
        [--processor-time] [--out FILE.json]

(a) The job of `xray embed` against the encoder's forward pass on pixels in memory, in turns. (b) A
search over random rows of each dtype, without opening the file and encoding the query, against the
time to read as many bytes from memory.

If other work shares the cores, use OMP_NUM_THREADS=1 and --processor-time, which measures the CPU
time of this process and its children.
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

from data_pipelines.ingest.user_data import open_corpus
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved, speedup
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import VisionEncoder
from xray.dist import choose_device
from xray.models import ModelConfig, VisionBackbone
from xray.models.heads import Normalize
from xray.search.config import EmbedConfig
from xray.search.embed import embed
from xray.search.embedding_file import Block, Names, open_embeddings, write_embeddings
from xray.search.exact import search
from xray.search.quantisation import STORED, calibrate, shortened

SIZE = (500, 375)  # pixels of a photo
BLOCK = 16_384
DTYPES = ("fp32", "fp16", "int8", "binary")


def processor_time() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# embedding ------------------------------------------------------------------------------------


def photos(folder: Path, count: int) -> Path:
    """Write a shard of JPEGs of smooth noise, whose size is like that of photos."""
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
    """Encoder with random weights, on which the speed does not depend."""

    def __init__(self, name: str) -> None:
        torch.nn.Module.__init__(self)
        manifest = {"stage": "mae", "config": {"data": {"resolution": 224, "frames": 1}}}
        self.artifact = Artifact(Path(name), manifest, "random", name)
        self.keep_rate = 1.0
        self.vision = VisionBackbone(ModelConfig(name=name, pretrained=""), 224, 2)
        self.normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.eval()


def throughput(options: argparse.Namespace, clock: Callable[[], float], device: str) -> Table:
    """Make table (a): throughput of embedding."""
    encoder = RandomEncoder(options.model).to(device)
    batch = torch.randint(0, 256, (options.batch, 1, 3, 224, 224), dtype=torch.uint8).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "shards").mkdir()
        corpus = open_corpus([str(photos(folder / "shards", options.samples))])
        config = EmbedConfig(batch_size=options.batch, workers=options.workers)

        @torch.inference_mode()
        def forward_only() -> None:
            for _ in range(options.samples // options.batch):
                encoder.features(batch)

        def job() -> None:
            out = folder / "x.parquet"
            out.unlink(missing_ok=True)
            embed(encoder, corpus, config, out)

        runs = {"forward only": forward_only, "xray embed": job}
        seconds = interleaved(runs, options.rounds, clock)
    rows = []
    for name, times in seconds.items():
        ratio = f"{speedup(seconds, name, 'forward only'):.2f}x"
        rounds = ", ".join(f"{second:.2f}" for second in times)
        rate = f"{options.samples / min(times):.1f}"
        rows.append([name, rounds, rate, ratio, ">= 0.95x" if name == "xray embed" else ""])
    heads = [
        "measured",
        "s per round",
        "images per s, best round",
        "speed / forward only",
        "target",
    ]
    return Table(
        f"(a) {options.samples} JPEGs of {SIZE[0]} x {SIZE[1]} through {options.model} at 224 px, "
        f"batch {options.batch}, fp32, {options.workers} workers",
        heads,
        rows,
    )


# search ---------------------------------------------------------------------------------------


def random_blocks(count: int, dim: int) -> Iterator[Block]:
    """Yield random normalised rows with names, in blocks."""
    rng = np.random.default_rng(0)
    for start in range(0, count, BLOCK):
        numbers = range(start, min(start + BLOCK, count))
        rows = shortened(rng.standard_normal((len(numbers), dim), np.float32), dim)
        yield rows, Names([f"{number:09d}" for number in numbers], ["00000.tar"] * len(rows))


def bandwidth(clock: Callable[[], float]) -> float:
    """Measure the bytes per second at which a sum reads memory, best of five."""
    values = torch.ones(1 << 28, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        start = clock()
        values.sum()
        best = min(best, clock() - start)
    return values.numel() * 4 / best


def searches(options: argparse.Namespace, clock: Callable[[], float]) -> Table:
    """Make table (b): time of a search."""
    bytes_per_second = bandwidth(clock)
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
                    limit = np.full(options.dim, 5 / np.sqrt(options.dim), np.float32)
                    scale, offset = calibrate(-limit, limit)
                    facts |= {"scale": scale.tolist(), "offset": offset.tolist()}
                blocks = random_blocks(options.rows, options.dim)
                more = {"modality": "image", "artifact": {}, "source": {}, "keep_rate": None}
                write_embeddings(path, {**facts, **more}, blocks)
                opened = open_embeddings(path)
                seconds = []
                for _ in range(options.rounds + 1):
                    start = clock()
                    search(opened, query, 10)
                    seconds.append(clock() - start)
            width = options.dim / 8 if dtype == "binary" else options.dim
            size = options.rows * width * np.dtype(STORED[dtype]).itemsize
            best = min(seconds[1:])
            bound = size / bytes_per_second
            cells = [dtype, f".{ending}", f"{size / 1e6:,.0f}", f"{bound:.3f}", f"{best:.3f}"]
            rows.append([*cells, f"{best / bound:.1f}x", "< 1 s"])
    heads = ["dtype", "file", "MB", "lower bound, s", "best, s", "best / lower bound", "target"]
    title = f"(b) top 10 of {options.rows:,} rows of {options.dim} dimensions, one query, best of "
    title += f"{options.rounds}; lower bound: the time to read the bytes at "
    title += f"{bytes_per_second / 1e9:.1f} GB/s, the speed of a sum over memory"
    return Table(title, heads, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", default="ab", help="any of ab")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of table b")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of table b")
    parser.add_argument("--endings", default="npy,parquet", help="file types of table b")
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm model of table a")
    parser.add_argument("--samples", type=int, default=64, help="images of table a")
    parser.add_argument("--batch", type=int, default=16, help="batch size of table a")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of table a")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--processor-time", action="store_true", help="measure CPU time, on a shared machine"
    )
    parser.add_argument("--out", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    clock = processor_time if options.processor_time else time.perf_counter
    device = choose_device("auto").type
    machine = hardware(device) + ("; processor time" if options.processor_time else "")
    print(machine)
    # a search starts no children, so the finer clock of this process suffices
    search_clock = time.process_time if options.processor_time else clock
    functions = {
        "a": lambda: throughput(options, clock, device),
        "b": lambda: searches(options, search_clock),
    }
    print_tables((functions[letter]() for letter in options.tables), machine, options.out)


if __name__ == "__main__":
    main()
