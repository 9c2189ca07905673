"""Training fed from shards of generated JPEGs, and the loader alone, with either `data.decode`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from data_pipelines.decode.device import (
    PendingJpeg,
    Pictures,
    beside_computation,
    cannot_decode,
    decode,
)
from data_pipelines.decode.preparation import center_crop
from data_pipelines.stream.loaded import Loaded
from stages.mae import MaeStage
from stages.mae_config import MaeConfig
from tools.common.media import clip_of, jpeg_of, moving_picture, write_shards
from tools.gpu.findings import Check, Finding, Note, Number, Scale
from tools.gpu.mfu import MODELS
from tools.gpu.stage_steps import TOY
from xray.config.loading import load_config, merge
from xray.doctor.checks import guarded

SIZES = ((500, 375), (1500, 1125))
VIDEO = (320, 240)
SIDE = 224
CPU = torch.device("cpu")
NEAR = 4.0  # mean difference in grey levels: decoders enlarge the chroma in different ways


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Measure the loader, a training that it feeds, clips, and both again on decoding devices."""
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = _make_shards(root, scale)
        yield from _loader(root, scale)
        yield from _training(root, device, scale, "cpu")
        yield from _clips(root, scale)
        reason = cannot_decode(device)
        if reason and not scale.toy:
            yield Note(f"data.decode=gpu: {reason}")
            return
        for size, made in images.items():
            yield from _decoding(made, size, device, scale)
            yield from _device_loader(root, size, device, scale)
        if not reason:
            yield from _training(root, device, scale, "gpu")


def _make_shards(root: Path, scale: Scale) -> dict[tuple[int, int], list[bytes]]:
    """Write shards of JPEGs of each size, and of clips; returns the JPEGs. Few are distinct."""
    images = {}
    for size in SIZES:
        different = 2 if scale.toy else 32
        made = [jpeg_of(moving_picture(seed, size, 1)[0]) for seed in range(different)]
        images[size] = made
        number = 32 if scale.toy else 4000 if size == SIZES[0] else 1000
        files = ((f"{n:05d}", {"jpg": made[n % different]}) for n in range(number))
        write_shards(root / f"images_{size[0]}", files, number // 4)
    made = [clip_of(moving_picture(seed, VIDEO, 30), VIDEO) for seed in range(2)]
    number = 8 if scale.toy else 256
    clips = ((f"{n:05d}", {"mp4": made[n % 2]}) for n in range(number))
    write_shards(root / "clips_240", clips, number // 4)
    return images


def _config(root: Path, source: str, batch: int, steps: int, scale: Scale, **train: Any) -> Any:
    """Return the settings of a mae run over one source."""
    video = source.startswith("clips")
    settings: dict[str, Any] = {
        "data": {
            "root": str(root),
            "resolution": 32 if scale.toy else SIDE,
            "frames": 4 if scale.toy else 16,
            "crop_scale": [0.2, 1.0],
            "sources": {source: {"shards": source, "modality": "video" if video else "image"}},
            "blocks": [{"source": source, "samples": batch}],
        },
        "train": {
            "precision": "bf16",
            "samples": batch * steps,
            "tensorboard": False,
            "save_every": 0,
            **train,
        },
        "out": str(root / f"run_{source}"),
    }
    base: dict[str, Any] = {"model": TOY["model"] if scale.toy else {"name": MODELS["B/16"]}}
    config = load_config(MaeConfig, "mae", merge(base, settings))
    config.validate()
    return config


def _loader(root: Path, scale: Scale) -> Iterator[Finding]:
    """Read micro-batches with different numbers of workers, and nothing else."""
    cores = len(os.sched_getaffinity(0))
    counts = (1,) if scale.toy else tuple(n for n in (4, 8, 14) if n <= cores)
    for size in SIZES:
        for workers in counts:
            seconds, samples = _timed(root, f"images_{size[0]}", workers, scale)
            title = f"loader, {size[0]} x {size[1]}, {workers} workers, images/s"
            yield Number(title, round(samples / seconds, 1))


def _timed(
    root: Path, source: str, workers: int, scale: Scale, decoder: torch.device | None = None
) -> tuple[float, int]:
    """Return (seconds, samples) of the stream of a mae run, after its first batches.

    decoder: device that decodes JPEGs; None = the workers do.
    """
    first, steps = workers, 2 + (workers if scale.toy else 4 * workers)
    stream, batch = _stream(root, source, workers, first + steps, scale, decoder)
    for _ in range(first):
        next(stream)
    _settle(decoder)
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    _settle(decoder)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds, steps * batch


def _stream(
    root: Path,
    source: str,
    workers: int,
    steps: int,
    scale: Scale,
    decoder: torch.device | None = None,
) -> tuple[Generator[list[Loaded]], int]:
    """Return the stream of a mae run, and the samples of a step."""
    from xray.training.run import Run
    from xray.training.step_data import training_stream

    batch = 4 if scale.toy else 16 if source.startswith("clips") else 64
    config = _config(root, source, batch, steps, scale)
    config.data.workers = workers
    config.data.decode = "cpu" if decoder is None else "gpu"
    run = Run.open(MaeStage, config)
    run.build()
    return training_stream(run.stage, config, run.plans, range(steps), decoder or CPU), batch


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _training(
    root: Path, device: torch.device, scale: Scale, decode: Literal["cpu", "gpu"]
) -> Iterator[Finding]:
    """Train the mae stage from the shards, and report its rate and its wait for data."""
    from xray.training.trainer import train_stage

    source = f"images_{SIZES[0][0]}"
    batch, steps = (8, 4) if scale.toy else (256, 60)
    config = _config(root, source, batch, steps, scale, log_every=2 if scale.toy else 20)
    config.data.workers = 1 if scale.toy else max(1, len(os.sched_getaffinity(0)) - 2)
    config.data.decode, config.out = decode, f"{config.out}_{decode}"
    title = "fed training" if decode == "cpu" else "fed training, data.decode=gpu"
    train_stage(MaeStage, config, device)
    lines = (Path(config.out) / "metrics.jsonl").read_text("utf-8").splitlines()
    last = json.loads(lines[-1])
    yield Check(f"{title}, steps", last["step"] == steps, last["step"], str(steps))
    for name in ("samples/s", "data/wait", "data/gpu_decoded", "mfu", "memory/gb"):
        if name in last:
            yield Number(f"{title}, {name}", last[name])
    yield Number(f"{title}, workers", config.data.workers)


def _clips(root: Path, scale: Scale) -> Iterator[Finding]:
    """Read clips through the decode process."""
    from xray.doctor.checks import clips

    for found in guarded("clips", clips):
        if found.state == "ok":
            yield Number(found.what, found.found)
        else:
            yield Note(f"{found.what}: {found.found}. {found.lacks}")
    workers = 1 if scale.toy else min(8, len(os.sched_getaffinity(0)))
    seconds, samples = _timed(root, "clips_240", workers, scale)
    yield Number(f"clips of {VIDEO[0]} x {VIDEO[1]}, {workers} workers, clips/s", samples / seconds)


def _decoding(
    made: list[bytes], size: tuple[int, int], device: torch.device, scale: Scale
) -> Iterator[Finding]:
    """Decode JPEGs on the device, crop and resize them there, without a loader."""
    jpegs = [PendingJpeg() for _ in range(4 if scale.toy else 256)]
    rows = []
    for number, jpeg in enumerate(jpegs):
        media = made[number % len(made)]
        empty = jpeg.take(media, lambda width, height: (center_crop(width, height), None), SIDE)
        assert empty is not None
        rows.append({"pixels": empty})
    part = Pictures.taken_from(rows, jpegs)
    whole = torch.stack([row["pixels"] for row in rows])
    rounds = 1 if scale.toy else 4
    with beside_computation(device):
        _, failed = decode([part], whole, device)
        _settle(device)
        start = time.perf_counter()
        for _ in range(rounds):
            decode([part], whole, device)
        _settle(device)
    name = f"decoding on {device.type}, {size[0]} x {size[1]}"
    rate = rounds * len(rows) / (time.perf_counter() - start)
    yield Number(f"{name}, images/s", round(rate, 1))
    yield Check(f"{name}, failures", not failed, len(failed), "0")


def _device_loader(
    root: Path, size: tuple[int, int], device: torch.device, scale: Scale
) -> Iterator[Finding]:
    """Read micro-batches whose JPEGs the device decodes, and compare the pixels."""
    source, cores = f"images_{size[0]}", len(os.sched_getaffinity(0))
    name = f"data.decode=gpu on {device.type}, {size[0]} x {size[1]}"
    for workers in (1,) if scale.toy else tuple(n for n in (2, 8) if n <= cores):
        seconds, samples = _timed(root, source, workers, scale, device)
        yield Number(f"{name}, {workers} workers, images/s", round(samples / seconds, 1))
    pixels = {}
    for key, decoder in (("device", device), ("libjpeg", CPU), ("loader", None)):
        stream, _ = _stream(root, source, 1, 4, scale, decoder)
        items = [item for step in stream for item in step]
        if key == "device":
            fallback = sum(item.reading["fallback"][0] for item in items)
            yield Check(f"{name}, images left to the CPU", fallback == 0, fallback, "0")
        pixels[key] = torch.cat([item.batch["pixels"].cpu() for item in items]).int()
    for key, title in (("libjpeg", "libjpeg"), ("loader", "data.decode=cpu, with DCT scales")):
        difference = (pixels["device"] - pixels[key]).abs()
        mean, most = round(float(difference.float().mean()), 3), int(difference.max())
        yield Number(f"{name}, largest difference to {title}", most)
        if key == "libjpeg":
            near = f"at most {NEAR} grey levels"
            yield Check(f"{name}, mean difference to {title}", mean <= NEAR, mean, near)
        else:
            yield Number(f"{name}, mean difference to {title}", mean)
