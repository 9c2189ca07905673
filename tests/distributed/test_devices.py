"""Devices: tf32 is off on a GPU, and the tests see no GPU unless they are asked to."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from child_process import clean_environment

from xray import dist


@pytest.mark.parametrize("wanted", ["cuda", "auto"])
def test_tf32_is_off_on_a_gpu(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert dist.choose_device(wanted).type == "cuda"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_tests_and_their_child_processes_see_no_gpu(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--gpu"):
        pytest.skip("asked for by --gpu")
    show = "import os, torch; print(repr(os.environ['CUDA_VISIBLE_DEVICES']), "
    show += "torch.cuda.is_available())"
    child = [sys.executable, "-c", show]
    done = subprocess.run(child, capture_output=True, text=True, env=clean_environment())
    assert done.stdout.split() == ["''", "False"], done.stderr
    assert not torch.cuda.is_available()
