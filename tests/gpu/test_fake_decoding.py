"""Decoding on fake CUDA tensors: no mix of devices, and few copies that the host waits for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import problems
from shards import photo
from torch import Tensor

from data_pipelines.decode import device
from data_pipelines.decode.device import PendingJpeg, Pictures, decode
from data_pipelines.decode.preparation import center_crop
from data_pipelines.decode.transforms import draw_augmentation
from xray.config import DataConfig

CUDA = torch.device("cuda", 0)
# Per chunk of images: their sizes and flips, and their rows.
COPIES = ["copy cpu -> cuda in data_pipelines/decode/device.py:_cropped_and_resized",
          "copy cpu -> cuda in data_pipelines/decode/device.py:decode"]  # fmt: skip


def found(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decode six images in one chunk, of which one is broken; list the problems."""
    data = DataConfig(color_jitter=[0.4, 0.0, 0.0, 0.0])
    images = [PendingJpeg() for _ in range(6)]
    rows = []
    for seed, image in enumerate(images):
        augmentation = draw_augmentation(data, np.random.default_rng(seed))
        empty = image.take(photo(seed), lambda w, h, a=augmentation: (center_crop(w, h), a), 32)  # type: ignore[misc]
        assert empty is not None
        rows.append({"pixels": empty})
    part, whole = Pictures.taken_from(rows, images), torch.stack([row["pixels"] for row in rows])
    calls: list[int] = []

    def decoded(data: list[Tensor], *_: object, **__: object) -> list[Tensor]:
        calls.append(len(data))
        if len(calls) in (1, 4):
            raise RuntimeError("broken")
        return [torch.empty(3, 48, 64, dtype=torch.uint8, device=CUDA) for _ in data]

    waits: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waits.append("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append("device"))
    monkeypatch.setattr(device, "decode_jpeg", decoded)

    def work() -> None:
        pixels, failed = decode([part], whole, CUDA)
        assert failed == [2] and pixels.device == CUDA and pixels.shape == whole.shape

    reported = problems(work)
    # nvJPEG writes on a stream of its own: each call waits for what may still use its memory
    assert calls == [6, 1, 1, 1, 1, 1, 1]
    assert waits == ["stream", "device", *["stream"] * 3, "device", *["stream"] * 3]
    return [each.rpartition(", line")[0] or each for each in reported]


def test_decoding_mixes_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(found(monkeypatch)) == COPIES


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mix = torch.ones(3, 1, 1, dtype=torch.uint8)
    monkeypatch.setattr(device, "_upright", lambda image, orientation: image + mix)
    assert any("devices" in each or "DeviceMismatch" in each for each in found(monkeypatch))
