"""Training fed from shards of generated JPEGs, the loader alone, and decoding on the GPU."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.mae import MaeConfig, MaeStage
from tools.common.media import clip_of, jpeg_of, moving_picture, write_shards
from tools.gpu.findings import Check, Finding, Note, Number, Scale
from tools.gpu.mfu import MODELS
from tools.gpu.stage_steps import TOY
from xray.config.loading import load_config, merge
from xray.doctor.checks import guarded

SIZES = ((500, 375), (1500, 1125))
VIDEO = (320, 240)
SIDE = 224


def run(device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Measure the loader, a training that it feeds, clips, and JPEG decoding on the device."""
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = _make_shards(root, scale)
        yield from _loader(root, scale)
        yield from _training(root, device, scale)
        yield from _clips(root, scale)
        yield from _decoding(images, device, scale)


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
            seconds, samples = _read(root, f"images_{size[0]}", workers, scale)
            title = f"loader, {size[0]} x {size[1]}, {workers} workers, images/s"
            yield Number(title, round(samples / seconds, 1))


def _read(root: Path, source: str, workers: int, scale: Scale) -> tuple[float, int]:
    """Return (seconds, samples) of the stream of a mae run, after its first batches."""
    from xray.training.run import Run
    from xray.training.step_data import training_stream

    batch = 4 if scale.toy else 16 if source.startswith("clips") else 64
    first, steps = workers, 2 + (workers if scale.toy else 4 * workers)
    config = _config(root, source, batch, first + steps, scale)
    config.data.workers = workers
    run = Run.open(MaeStage, config)
    run.build()
    stream = training_stream(run.stage, config, run.plans, range(first + steps), pin=False)
    for _ in range(first):
        next(stream)
    start = time.perf_counter()
    for _ in range(steps):
        next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds, steps * batch


def _training(root: Path, device: torch.device, scale: Scale) -> Iterator[Finding]:
    """Train the mae stage from the shards, and report its rate and its wait for data."""
    from xray.training.trainer import train_stage

    source = f"images_{SIZES[0][0]}"
    batch, steps = (8, 4) if scale.toy else (256, 60)
    config = _config(root, source, batch, steps, scale, log_every=2 if scale.toy else 20)
    config.data.workers = 1 if scale.toy else max(1, len(os.sched_getaffinity(0)) - 2)
    train_stage(MaeStage, config, device)
    lines = (Path(config.out) / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    yield Check("fed training, steps", last["step"] == steps, last["step"], str(steps))
    for name in ("samples/s", "data/wait", "mfu", "memory/gb"):
        if name in last:
            yield Number(f"fed training, {name}", last[name])
    yield Number("fed training, workers", config.data.workers)


def _clips(root: Path, scale: Scale) -> Iterator[Finding]:
    """Read clips through the decode process."""
    from xray.doctor.checks import clips

    for found in guarded("clips", clips):
        if found.state == "ok":
            yield Number(found.what, found.found)
        else:
            yield Note(f"{found.what}: {found.found}. {found.lacks}")
    workers = 1 if scale.toy else min(8, len(os.sched_getaffinity(0)))
    seconds, samples = _read(root, "clips_240", workers, scale)
    yield Number(f"clips of {VIDEO[0]} x {VIDEO[1]}, {workers} workers, clips/s", samples / seconds)


def _decoding(
    images: dict[tuple[int, int], list[bytes]], device: torch.device, scale: Scale
) -> Iterator[Finding]:
    """Decode JPEGs with torchvision on the device, and resize them there."""
    try:
        from torchvision.io import decode_jpeg
    except ImportError as error:
        yield Note(f"JPEG decoding on the device: {error}")
        return
    for size, made in images.items():
        data = [torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in made]
        data *= 1 if scale.toy else 256 // len(data)

        def decode(data: list[Tensor] = data) -> Tensor:
            decoded = torch.stack(decode_jpeg(data, device=device)).float()
            return F.interpolate(decoded, (SIDE, SIDE), mode="bicubic", antialias=True)

        try:
            decode()
        except RuntimeError as error:
            yield Note(f"JPEG decoding on {device.type}: {str(error).splitlines()[0][:200]}")
            return
        start = time.perf_counter()
        rounds = 1 if scale.toy else 4
        pixels = [decode() for _ in range(rounds)][-1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rate = rounds * len(data) / (time.perf_counter() - start)
        yield Number(f"decoding on {device.type}, {size[0]} x {size[1]}, images/s", round(rate, 1))
        ok = list(pixels.shape) == [len(data), 3, SIDE, SIDE]
        name = f"decoding on {device.type}, {size[0]} x {size[1]}, shape"
        yield Check(name, ok, list(pixels.shape), "a batch of 224 px")
