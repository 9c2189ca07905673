"""Speed of the data stream against plain pipelines, at a million shards, and with broken samples.

(a) Images per second of xray's stream and of a plain pipeline (webdataset, PIL and torchvision, as
in open_clip), with equal numbers of workers. (b) Clips: the decode process against decord in this
process and against decoding every frame with PyAV; reading in the plan's order against the shards'
order. (c) The sample plan at a million shards and 4,096 ranks. (d) A soak test with samples that
are broken, hang the decoder or fill its memory.

Alternatives take turns in one run, and a ratio compares the best round of each. Every process has
one torch thread, like the loader's workers.

    python -m tools.benchmarks.bench_data [--tables abcd] [--rounds 5] [--data PHOTOS] \
        [--clips CLIPS]
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as tv

from data_pipelines.decode.decoders import FrameChoice
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.preparation import center_crop
from data_pipelines.decode.sandbox import ClipDecoder
from data_pipelines.decode.transforms import load_clip, load_pixels, media_of
from data_pipelines.shards.source import Sample, Source, open_source
from data_pipelines.stream.loaded import Fields
from data_pipelines.stream.loader import iterate_steps
from data_pipelines.stream.sampling import StepSampler, StepShape, make_plans, micro_batches
from tools.benchmarks.bench_plan import plan_at_scale
from tools.common.media import clip_of, jpeg_of, stack_rows, write_shards
from tools.common.tables import Table, print_tables
from tools.common.timing import hardware, interleaved, speedup
from tools.faults.soak import soak_table
from xray.config import BlockConfig, DataConfig
from xray.models.heads import Normalize

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE, BATCH, FRAMES = 224, 32, 8


@dataclasses.dataclass(frozen=True)
class Photos:
    """Case of table (a): photos of one size and their crops.

    Attributes:
        size: (width, height) in pixels.
        scale: range of the random crop's area, as a share of the photo.
        number: number of photos.
        batches: number of timed batches.
    """

    name: str
    size: tuple[int, int]
    scale: list[float]
    number: int
    batches: int
    target: str


PHOTOS = (
    Photos("CLIP's crops", (500, 375), [0.9, 1.0], 300, 12, ">= 2.2x"),
    Photos("MAE's crops", (1500, 1125), [0.2, 1.0], 64, 4, ""),
)


# images ---------------------------------------------------------------------------------------


def xray_stream(folder: Path, photos: Photos, workers: int) -> Generator[Tensor, None, None]:
    """Yield normalised batches as in a stage: sample plan, loader, then Normalize."""
    data = DataConfig(resolution=SIZE, crop_scale=photos.scale)
    blocks, sources = [BlockConfig("photos", BATCH)], open_source("photos", str(folder), "image")
    shape = StepShape(SIZE, 1, micro_batches(blocks, [0], 0, 1))
    plans = make_plans(blocks, {"photos": sources}, data, seed=0)
    sampler = StepSampler(blocks, plans, lambda step: shape, range(10**6))
    normalize = Normalize(*data.normalisation)

    def transform(sample: Sample, rng: np.random.Generator | None) -> Fields:
        return {"pixels": load_pixels(sample, data, rng)}

    for (loaded,) in iterate_steps(sampler, transform, stack_rows, 0, workers, pin=False):
        yield normalize(loaded.batch["pixels"])


def plain_stream(folder: Path, photos: Photos, workers: int) -> Generator[Tensor, None, None]:
    """Yield the same batches with webdataset, PIL and torchvision, as in open_clip."""
    data = DataConfig()
    transform = plain_transform(photos.scale, *data.normalisation)
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(100, initial=100)
        .decode("pilrgb")
        .rename(image="jpg")
        .map_dict(image=transform)
        .to_tuple("image")
        .batched(BATCH, partial=False)
    )
    prefetch = 4 if workers else None
    for (pixels,) in DataLoader(dataset, None, num_workers=workers, prefetch_factor=prefetch):
        yield pixels


def plain_transform(
    scale: list[float], mean: list[float], std: list[float]
) -> Callable[[Any], Tensor]:
    """Return torchvision's transform with random crop, flip and normalisation."""
    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(SIZE, tuple(scale), interpolation=bicubic)
    steps = [crop, tv.RandomHorizontalFlip(), tv.ToTensor(), tv.Normalize(mean, std)]
    return tv.Compose(steps)


def seconds_of(stream: Iterator[Tensor], warm: int, batches: int) -> float:
    """Time some batches of an endless stream, after `warm` batches of warm-up."""
    for _ in range(warm):
        next(stream)
    start = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return time.perf_counter() - start


def enlarged(source: Source, photos: Photos) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield photos of a source, resized to `photos.size` and encoded as JPEG."""
    places = list(source.places())[: photos.number]
    for number, place in enumerate(places):
        media = media_of(source.sample(*place, SIZE, 1))
        image = decode_image(media)
        data = jpeg_of(image.resize(photos.size, Image.Resampling.BICUBIC))
        yield f"{number:05d}", {"jpg": data}


def images(options: argparse.Namespace) -> list[Table]:
    """Make table (a): images per second."""
    source, rows = open_source("photos", str(options.data), "image"), []
    for photos in PHOTOS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "photos"
            write_shards(folder, enlarged(source, photos), photos.number // 4)
            kilobytes = sum(p.stat().st_size for p in folder.glob("*.tar")) / photos.number / 1e3
            for workers in (0, 1, 2):
                seconds: dict[str, list[float]] = {"xray": [], "plain": []}
                for _ in range(options.rounds):
                    for name, make_stream in (("xray", xray_stream), ("plain", plain_stream)):
                        stream = make_stream(folder, photos, workers)
                        seconds[name].append(seconds_of(stream, 1 + workers, photos.batches))
                        stream.close()  # stops its workers before the other stream starts
                rates = [photos.batches * BATCH / min(times) for times in seconds.values()]
                size = f"{photos.size[0]} x {photos.size[1]}, {kilobytes:.0f} kB"
                ratio = f"{speedup(seconds, 'xray', 'plain'):.2f}x"
                cells = [str(workers), *(f"{rate:.0f}" for rate in rates), ratio, photos.target]
                rows.append([size, f"{photos.name}, {photos.scale}", *cells])
    heads = ["photos", "crops", "workers", "xray, images/s", "plain, images/s", "ratio", "target"]
    return [Table("(a) Images to normalised batches of 224 px", heads, rows)]


# clips ----------------------------------------------------------------------------------------


def every_frame(data: bytes) -> np.ndarray:
    """Decode all frames of a clip with PyAV, [T, H, W, 3] uint8."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def enlarged_clip(data: bytes, size: tuple[int, int], frames: int) -> bytes:
    """Resize a clip and play it forwards and backwards until it has `frames` frames."""
    forwards = [Image.fromarray(frame).resize(size) for frame in every_frame(data)]
    cycle = forwards + forwards[::-1]
    return clip_of((cycle[number % len(cycle)] for number in range(frames)), size)


CHOICE = FrameChoice(FRAMES)


def by_process(decoder: ClipDecoder, clips: list[bytes]) -> None:
    """Decode the chosen frames in the decode process, as xray does."""
    for data in clips:
        decoder.decode(data, CHOICE)


def decord_frames(data: bytes) -> np.ndarray:
    """Decode the chosen frames with decord in this process."""
    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(CHOICE.indices(len(reader), reader.get_avg_fps())).asnumpy()


def by_decord(clips: list[bytes]) -> None:
    """Decode the chosen frames of all clips with decord."""
    for data in clips:
        decord_frames(data)


def by_pyav(clips: list[bytes]) -> None:
    """Decode every frame of all clips with PyAV and choose some."""
    for data in clips:
        frames = every_frame(data)
        frames[CHOICE.indices(len(frames), 30.0)]


def xray_pixels(clips: list[bytes]) -> None:
    """Load cropped and resized clips with xray's load_clip."""
    for data in clips:
        sample = Sample({"mp4": data}, "clips", "video", "", SIZE, FRAMES)
        load_clip(data, center_crop, sample, DataConfig(), None)


def decord_pixels(clips: list[bytes]) -> None:
    """Decode full frames with decord, then crop and resize them with torchvision."""
    bicubic = tv.InterpolationMode.BICUBIC
    for data in clips:
        frames = torch.from_numpy(decord_frames(data)).permute(0, 3, 1, 2)
        left, top, w, h = center_crop(frames.shape[3], frames.shape[2])
        tv.functional.resized_crop(frames, top, left, h, w, [SIZE, SIZE], bicubic, antialias=True)


def clips(options: argparse.Namespace) -> list[Table]:
    """Make tables (b): decoding clips, and reading samples."""
    source = open_source("clips", str(options.clips), "video")
    places = list(source.places())[:: max(1, len(source) // 16)][:16]
    real = [media_of(source.sample(*place, SIZE, FRAMES)) for place in places]
    cases = {
        "320 x 240, 90 frames": [enlarged_clip(real[0], (320, 240), 90)],
        "1280 x 720, 120 frames": [enlarged_clip(real[0], (1280, 720), 120)],
        f"{len(real)} real clips": real,
    }
    decoder, rows = ClipDecoder(30.0, 2.0), []
    for name, media in cases.items():
        runs = {
            "xray": partial(by_process, decoder, media),
            "decord": partial(by_decord, media),
            "pyav": partial(by_pyav, media),
            "xray pixels": partial(xray_pixels, media),
            "decord pixels": partial(decord_pixels, media),
        }
        seconds = interleaved(runs, 3 * options.rounds)
        times = {run: 1e3 * min(seconds[run]) / len(media) for run in runs}
        time_ratio = times["xray"] / times["decord"]
        cells = [f"{times[run]:.1f}" for run in ("xray", "decord", "pyav")]
        cells += [f"{time_ratio:.2f}", f"{speedup(seconds, 'xray', 'pyav'):.2f}x"]
        cells += [f"{times[run]:.1f}" for run in ("xray pixels", "decord pixels")]
        rows.append([name, *cells, f"{speedup(seconds, 'xray pixels', 'decord pixels'):.2f}x"])
    decoder.close()
    heads = ["clip", "xray, ms", "decord, ms", "PyAV, all frames, ms"]
    heads += ["time, xray / decord (target <= 1.1)", "speed, xray / PyAV (target >= 2x)"]
    heads += ["load_clip at 224, ms", "decord + torchvision, ms"]
    heads += ["speed, load_clip / decord + torchvision"]
    title = f"(b) {FRAMES} frames of a clip, one decoding thread each"
    return [Table(title, heads, rows), reading(options)]


def reading(options: argparse.Namespace) -> Table:
    """Time reading 2,000 samples in the plan's order and in the shards' order."""
    source = open_source("photos", str(options.data), "image")
    (plan,) = make_plans(
        [BlockConfig("photos", BATCH)], {"photos": source}, DataConfig(), 0
    ).values()
    number = min(2000, len(source) // BATCH * BATCH)
    steps = [plan.positions(step, BATCH) for step in range(-(-number // BATCH))]
    shards, slots = plan.locate(np.concatenate(steps)[:number])
    planned = [
        (s, source.member(s, m)) for s, m in zip(shards.tolist(), slots.tolist(), strict=True)
    ]

    def read(places: list[tuple[int, int]]) -> None:
        for shard, member in places:
            source.sample(shard, member, SIZE, 1)

    runs = {"planned": partial(read, planned), "sorted": partial(read, sorted(planned))}
    seconds = interleaved(runs, 3 * options.rounds)
    times = [f"{1e6 * min(seconds[name]) / number:.0f}" for name in runs]
    ratio = 1 / speedup(seconds, "planned", "sorted")
    orders = ["plan order, us per sample", "shard order, us per sample"]
    heads = ["samples", *orders, "ratio", "target"]
    rows = [[f"{number:,} of {len(source.manifest)} shards", *times, f"{ratio:.2f}", "<= 1.1"]]
    return Table("(b) Reading the bytes of samples, local shards, warm page cache", heads, rows)


TABLES: dict[str, Callable[[argparse.Namespace], list[Table]]] = {
    "a": images,
    "b": clips,
    "c": lambda options: plan_at_scale(options.files),
    "d": lambda options: [soak_table(options.reads)],
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", default="abcd", help="any of abcd")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--data", type=Path, default=SHARED / "captions_train", help="shards of photos"
    )
    parser.add_argument(
        "--clips", type=Path, default=SHARED / "actions_train", help="shards of clips"
    )
    parser.add_argument(
        "--files", type=int, default=100_000, help="empty shards of table c; 0 = none"
    )
    parser.add_argument("--reads", type=int, default=50_000, help="samples of table d")
    parser.add_argument("--json", type=Path, help="also write the tables to this JSON file")
    options = parser.parse_args()
    needed = [options.data] * ("a" in options.tables or "b" in options.tables)
    needed += [options.clips] * ("b" in options.tables)
    for folder in needed:
        if not folder.is_dir():
            print(f"{folder} is not a folder of shards: set --data PHOTOS and --clips CLIPS")
            sys.exit(2)
    if unknown := set(options.tables) - set(TABLES):
        parser.error(f"--tables: unknown table {', '.join(sorted(unknown))}: use any of abcd")
    machine = hardware("cpu")
    print(machine, flush=True)
    torch.set_num_threads(1)
    tables = (table for name in options.tables for table in TABLES[name](options))
    print_tables(tables, machine, options.json)


if __name__ == "__main__":
    main()
