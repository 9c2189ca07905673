"""Hub names without a network: one request, then the cache, then an error with a way out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

CODE = """
import torch
from stages.clip_teacher import load_teacher
from xray.config import ModelConfig
from xray.errors import ConfigError
from xray.models.llm_folder import find_llm
from xray.models.weight_loading import _from_timm

timm = ModelConfig(name="vit_tiny_patch16_224", pretrained="timm")
for ask in (
    lambda: find_llm("someone/no-such-llm"),
    lambda: _from_timm(timm),
    lambda: load_teacher("open_clip:ViT-B-32:laion2b_s34b_b79k", torch.device("cpu")),
):
    try: ask()
    except ConfigError as error: print(error)
"""
SILENT, ANSWER = b"", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Hub:
    """A hub that closes each connection, after an answer or without one, and counts them."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.asked = answer, list[str]()
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:  # closed at the end of the test
                return
            with connection:
                self.asked.append(connection.recv(1 << 16).split(b"\r\n")[0].decode())
                connection.sendall(self.answer)


@pytest.fixture
def ask(tmp_path: os.PathLike[str]) -> Iterator:
    hubs = []

    def run(answer: bytes, **env: str) -> tuple[list[str], list[str]]:
        hub = Hub(answer)
        hubs.append(hub)
        proxies = {name for name in os.environ if name.lower().endswith("_proxy")}
        inherited = {key: value for key, value in os.environ.items() if key not in proxies}
        inherited |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=inherited | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), hub.asked

    yield run
    for hub in hubs:
        hub.socket.close()


def test_a_hub_that_does_not_answer_is_asked_once(ask) -> None:
    lines, asked = ask(SILENT)
    assert asked == ["HEAD / HTTP/1.1"] * 3  # one for each name
    for line, advice in zip(
        lines,
        (
            "run `hf download someone/no-such-llm --local-dir FOLDER` on a machine with a network, "
            "and set text.llm to that folder",
            "download its model.safetensors, and set model.pretrained to that file",
            "download its weights, and set clip.teacher=open_clip:ViT-B-32:FILE",
        ),
        strict=True,
    ):
        assert "not in the cache, and http://127.0.0.1:" in line and line.endswith(advice)


def test_offline_mode_asks_nothing(ask) -> None:
    lines, asked = ask(SILENT, HF_HUB_OFFLINE="1")
    assert asked == [] and len(lines) == 3
    assert all("not in the cache, and HF_HUB_OFFLINE is set: " in line for line in lines)


def test_a_hub_that_answers_is_asked_for_the_model(ask) -> None:
    lines, asked = ask(ANSWER)
    assert "someone/no-such-llm" in " ".join(asked)
    assert len(lines) == 3 and not any("does not answer" in line for line in lines)
