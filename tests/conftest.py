"""Fixtures shared by all tests: a small demo data set, a tiny LLM, and short training runs."""

from __future__ import annotations

import functools
import gc
import http.server
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # models this small gain nothing from more threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Files whose tests share no fixture and take long: their tests run on any worker.
UNGROUPED = ("test_cli", "test_own_data")
# The files that take longest, in this order, so that no worker begins one when the others end.
FIRST = (
    *("test_resume", "test_zero_stage_matrix", "test_distributed", "test_evaluation_ranks"),
    *("test_chaos", "test_orphans", "test_ablation", "test_gpu_check", "test_shipped_recipes"),
    *("test_cli", "test_gradient_cache", "test_plan", "test_sharded_head", "test_launch"),
)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--gpu", action="store_true", help="let the tests use this machine's GPUs")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--gpu"):  # results of CPU and GPU differ in their last bits
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used; children inherit it


def pytest_xdist_auto_num_workers() -> int:
    """Return one more worker than cores: tests of child processes often wait."""
    return min(4, 1 + (os.cpu_count() or 1))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))
    for item in items:  # the tests of a file share fixtures, so one worker runs them all
        if item.path.stem not in UNGROUPED:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


def pytest_collection_finish() -> None:
    """Keep the libraries out of the garbage collections: each training makes two."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated shards, small: 96 photos, 24 clips, 24 held-out photos, and a tiny LLM."""
    from data_pipelines.ingest.demo import DemoConfig, make_demo
    from xray.config.model import LlmConfig
    from xray.recipes.run import make_llm

    root = tmp_path_factory.mktemp("demo") / "data"
    make_demo(root, DemoConfig(photos=96, clips=24, heldout=24, per_shard=32, side=32, frames=8))
    make_llm(LlmConfig(str(root / "llm"), "photos", 300, 32, 2, 4), str(root))
    return root


class Trained(Protocol):
    """Signature of the `trained` fixture."""

    def __call__(self, stage: str, *overrides: str, init_from: Iterable[Path] = ()) -> Path: ...


@pytest.fixture(scope="session")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a stage on the demo data, once per set of arguments, and return its artifact's folder.

    The run's folder is its parent. Tests share both: one that changes a file uses `tiny.copy_run`.
    """
    from tiny import train

    @functools.cache
    def run(stage: str, overrides: tuple[str, ...], parents: tuple[Path, ...]) -> Path:
        out = tmp_path_factory.mktemp(f"trained_{stage}")
        artifact: Path = train(stage, demo, out, *overrides, init_from=parents).path
        return artifact

    def artifact_of(stage: str, *overrides: str, init_from: Iterable[Path] = ()) -> Path:
        return run(stage, overrides, tuple(init_from))

    return artifact_of


@pytest.fixture(scope="session")
def control(demo: Path, trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip artifact of ten steps with CLIP's own text transformer and all tokens kept."""
    from tiny import ALL_TOKENS

    from xray.config.model import LlmConfig
    from xray.recipes.run import make_llm

    llm = tmp_path_factory.mktemp("control") / "llm"
    make_llm(LlmConfig(str(llm), "photos", 300, 32, 2, 4, "clip"), str(demo))
    text = ("text.tune=full", "text.attention=causal", "text.pooling=last", "text.lora_rank=0")
    own = (f"text.llm={llm}", "clip.text_head=linear", "license=apache-2.0")
    return trained("clip", ALL_TOKENS, "train.samples=120", *text, *own)


@pytest.fixture(scope="session")
def tagger(trained: Trained) -> Path:
    """A hashtag artifact of two steps with reduced tokens."""
    return trained("hashtag", "train.samples=24")


@pytest.fixture(scope="session")
def media(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photo.jpg, other.jpg and clip.mp4, taken from the demo's shards."""
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
    """A folder of real photos and clips; tests that need it are skipped if it is missing."""
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
