"""The folder that `pack` writes: equal bytes, stops, kills and other settings."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packing import (
    clip,
    picture,
    samples_of,
    tree,
    write,
)
from source_code import ROOT

from data_pipelines.ingest.pack import PackConfig, PackReport, pack
from data_pipelines.ingest.user_data import list_files
from xray.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures that take a while to shrink, two of them broken, and a clip."""
    files: dict[str, bytes | str] = {f"{i:02d}.jpg": picture((900, 800), seed=i) for i in range(35)}
    files |= {"03.jpg": b"", "20.jpg": b"x", "00.mp4": clip(), "07.txt": "seven"}
    return write(tmp_path_factory.mktemp("many"), files)


SETTINGS = {"per_shard": 3, "short_side": 40, "gop": 4}


@pytest.fixture(scope="module")
def whole(many: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    seen: list[tuple[int, int]] = []
    report = pack(many, out, PackConfig(**SETTINGS, workers=1), lambda *now: seen.append(now))
    assert report == PackReport(12, 34, {"undecodable image": 2}, 0)
    assert seen == [(done, 36) for done in range(0, 37, 3)]
    return tree(out)


def test_the_same_input_gives_the_same_bytes(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    pack(many, tmp_path / "out", PackConfig(**SETTINGS, workers=2))
    assert tree(tmp_path / "out") == whole
    first = samples_of(tmp_path / "out")
    assert list(first)[:4] == ["000000000", "000000001", "000000002", "000010000"]
    assert "000010001" not in first and first["000020002"]["txt"] == b"seven"


STOPPED = """
import os, signal, sys
from pathlib import Path
from data_pipelines.ingest.pack import PackConfig, pack

def stop(done, total):
    if done:
        {stop}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
pack(Path(sys.argv[1]), Path(sys.argv[2]), PackConfig({settings}, workers=2), stop)
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_a_stopped_packing_goes_on(
    many: Path, whole: dict[str, bytes], tmp_path: Path, how: str
) -> None:
    # Ctrl-C reaches the workers too; SIGKILL only the parent, whose workers must not stay behind:
    # they hold its output open, so run() would not come back.
    stop = "os.kill(os.getpid(), signal.SIGKILL)" if how == "SIGKILL" else "os.killpg(0, 2)"
    settings = ", ".join(f"{name}={value}" for name, value in SETTINGS.items())
    script, out = STOPPED.format(stop=stop, settings=settings), tmp_path / "out"
    command = [sys.executable, "-c", script, str(many), str(out)]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "start_new_session": True}
    stopped = subprocess.run(command, **options)
    assert stopped.returncode == (-9 if how == "SIGKILL" else -2), stopped.stderr
    tars = list(out.glob("*.tar"))
    assert 0 < len(tars) < 12
    assert all(path.read_bytes() == whole[path.name] for path in tars)
    unfinished = list(out.glob(".packing.*"))
    if how == "SIGINT":
        assert not unfinished
    (out / ".packing.00011.tar.1").write_bytes(b"half")
    report = pack(many, out, PackConfig(**SETTINGS))
    assert report == PackReport(12, 34, {"undecodable image": 2}, len(tars))
    assert tree(out) == whole


def test_a_shard_that_is_gone_is_written_again(
    many: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = write(tmp_path / "out", dict(whole))
    (out / "00001.tar").unlink()
    report = pack(many, out, PackConfig(**SETTINGS))
    assert report == PackReport(12, 34, {"undecodable image": 2}, 11)
    assert tree(out) == whole


def test_a_killed_worker_is_reported(many: Path, tmp_path: Path) -> None:
    def kill_workers(done: int, total: int) -> None:
        for worker in multiprocessing.active_children() if done else ():
            worker.kill()

    with pytest.raises(DataError, match="a worker process was killed"):
        pack(many, tmp_path / "out", PackConfig(**SETTINGS), kill_workers)
    assert not list((tmp_path / "out").glob(".packing.*"))


def test_another_packing_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", {"a.jpg": picture(), "a.txt": "a"}), tmp_path / "out"
    pack(source, out, PackConfig())
    before = tree(out)
    with pytest.raises(ConfigError, match=r"another packing \(per_shard: 1000 -> 500, gop: 0 -> 8"):
        pack(source, out, PackConfig(per_shard=500, gop=8))
    assert pack(source, out, PackConfig(workers=1)).reused == 1
    (source / "a.txt").write_text("another caption")
    with pytest.raises(ConfigError, match=r"another packing \(other files or metadata\)"):
        pack(source, out, PackConfig())
    assert tree(out) == before
    (out / "pack.json").unlink()
    with pytest.raises(
        ConfigError, match=r"contains \.tar files that xray data pack did not write"
    ):
        pack(source, out, PackConfig())


def test_the_stamp_sees_every_change(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.jpg": picture(), "l.jsonl": '{"path": "a.jpg", "x": 1}'})

    def stamps() -> str:
        return "".join(item.stamp() for item in list_files(str(source / "l.jsonl")))

    seen = [stamps()]
    (source / "l.jsonl").write_text('{"path": "a.jpg", "x": 2}')
    seen.append(stamps())
    os.utime(source / "a.jpg", ns=(0, time.time_ns() + 10**9))
    seen.append(stamps())
    (source / "a.jpg").unlink()
    assert len({*seen, stamps()}) == 4


def test_packing_does_without_torch() -> None:
    script = "import sys, data_pipelines.ingest.pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0
