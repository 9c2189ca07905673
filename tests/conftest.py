"""Shared fixtures: a small demo data set, a tiny LLM, and real data where they are."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # models this small gain nothing from more threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
APART = ("test_cli", "test_own_data")
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # a file's tests share what it sets up; those of a few are long and apart
        if item.path.stem not in APART:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated shards, small: 96 photos, 24 clips, 24 held-out photos, and a tiny LLM."""
    from data_pipelines.ingest.demo import DemoConfig, make_demo
    from xray.config.prepare import LlmConfig
    from xray.recipes.prepare import make_llm

    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo(root, DemoConfig(photos=96, clips=24, heldout=24, per_shard=32, side=32, frames=8))
    make_llm(LlmConfig(str(root / "llm"), "photos", 300, 32, 2, 4), str(root))
    return root


@pytest.fixture(scope="session")
def control(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip artifact with CLIP's own text transformer and all tokens kept, of ten steps."""
    from tiny import ALL_TOKENS, train

    from xray.config.prepare import LlmConfig
    from xray.recipes.prepare import make_llm

    root = tmp_path_factory.mktemp("control")
    make_llm(LlmConfig(str(root / "llm"), "photos", 300, 32, 2, 4, "clip"), str(demo))
    text = ("text.tune=full", "text.attention=causal", "text.pooling=last", "text.lora_rank=0")
    own = (f"text.llm={root / 'llm'}", "clip.text_head=linear", "license=apache-2.0")
    train("clip", demo, root / "run", ALL_TOKENS, "train.samples=120", *text, *own)
    return root / "run" / "artifact"


@pytest.fixture(scope="session")
def tagger(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hashtag artifact with reduced tokens, of two steps."""
    from tiny import train

    root = tmp_path_factory.mktemp("tagger")
    train("hashtag", demo, root / "run", "train.samples=24")
    return root / "run" / "artifact"


@pytest.fixture(scope="session")
def media(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photo.jpg, other.jpg and clip.mp4 out of the demo's shards."""
    from data_pipelines.shards.tar_index import index_shard

    folder = tmp_path_factory.mktemp("media")
    names = {
        "photo": ("photos", 0, "jpg"),
        "other": ("photos", 1, "jpg"),
        "clip": ("clips", 0, "mp4"),
    }
    for name, (source, member, ending) in names.items():
        shard = index_shard(min((demo / source).glob("*.tar")))
        (folder / f"{name}.{ending}").write_bytes(shard.read(member, (ending,))[ending])
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photos and clips; tests that need them are skipped where there are none."""
    if not SHARED.is_dir():
        pytest.skip("needs the real data set beside the checkout (../shared/data)")
    return SHARED


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A folder served over HTTP: (its URL, the folder, the requests seen)."""
    folder, seen = tmp_path / "served", list[str]()
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            seen.append(f"{self.command} {self.path}")

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", folder, seen
        running.shutdown()
