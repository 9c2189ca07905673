"""Full disks name the file and what to do; writers at the same time, and what killed ones left."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from child_process import ROOT, clean_environment

from data_pipelines.shards.columns import open_columns, save_columns
from xray.files import disk_is_full, making, naming_full_disk, replacing

# A limit on the size of files replaces a full disk.
FULL = """
import sys
from tools.faults.commands import fill_disk
from xray.commands.main import main
fill_disk(int(sys.argv.pop(1)))
main()
"""


def limited(bytes_: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL, str(bytes_), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=clean_environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
    )


@pytest.mark.parametrize("limit", [300, 20_000])  # the tokenizer; the weights
def test_tiny_llm_on_a_full_disk(limit: int, demo: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    sizes = ["vocab_size=300", "width=32", "depth=2", "heads=4"]
    given = ["data", "tiny-llm", llm, "--captions", demo / "photos", *sizes]
    done = limited(limit, *given)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert f"No space left on device: '{llm}': free space there" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tags", "check", "index"])
def test_commands_on_a_full_disk(kind: str, demo: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for tar in (demo / "photos").glob("*.tar"):
        (shards / tar.name).symlink_to(tar)
    out = {"tags": ["--out", tmp_path / "tags.json"], "check": ["--json", tmp_path / "all.json"]}
    done = limited(100, "data", kind, shards, "--workers", "1", *out.get(kind, []))
    assert done.returncode == 2, done
    last = done.stderr.splitlines()[-1]
    assert "No space left on device: '" in last and "': free space there, or" in last
    assert str(tmp_path) in last and "Traceback" not in done.stderr


def test_errors_of_a_full_disk_are_known_in_all_types() -> None:
    assert disk_is_full(OSError(errno.ENOSPC, "x")) and disk_is_full(OSError(errno.EDQUOT, "x"))
    assert disk_is_full(Exception("No space left on device (os error 28)"))
    assert not disk_is_full(OSError(errno.EACCES, "No space left on device"))
    with pytest.raises(OSError, match="'/x/y'") as caught, naming_full_disk(Path("/x/y")):
        raise RuntimeError("io: No space left on device (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="other"), naming_full_disk(Path("/x/y")):
        raise RuntimeError("other")


# two that write the same ------------------------------------------------------------------------

MAKE = """
import sys
from pathlib import Path
from data_pipelines.ingest.demo import DemoConfig, make_demo
from xray.config.model import LlmConfig
from xray.recipes.run import make_llm
root = Path(sys.argv[1])
make_demo(root, DemoConfig(photos=96, clips=4, heldout=8, per_shard=32, side=32, frames=4))
make_llm(LlmConfig(str(root / "llm"), "photos", 300, 32, 2, 4), str(root))
"""


def test_runs_that_generate_the_same_data_end_well(tmp_path: Path) -> None:
    root = tmp_path / "new" / "data"
    env = clean_environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", MAKE, str(root)]
    runs = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [run.communicate()[1].decode() for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], errors
    assert sorted(path.name for path in root.parent.iterdir()) == ["data"]
    names = {path.name for path in root.iterdir()}
    assert {"photos", "clips", "heldout", "demo.json", "llm"} <= names
    assert not any(name.startswith(".") or name.endswith(".tmp") for name in names)


def test_the_lock_of_a_made_folder_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with making(target):
        assert (tmp_path / ".made.lock").exists()
        target.touch()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_leftovers_of_killed_writers_are_removed_but_not_those_of_live_ones(
    tmp_path: Path,
) -> None:
    """A killed writer leaves NAME.UUID.tmp; a live one holds a shared lock on the folder."""
    left = tmp_path / f"a.index.{uuid.uuid4().hex}.tmp"
    others = [tmp_path / "mine.tmp", tmp_path / f"{uuid.uuid4().hex}.tmp.txt"]
    for path in (left, *others):
        path.write_text("x")
    columns = {"x": np.arange(3)}
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_SH)  # as a writer in another process
    save_columns(tmp_path / "b.index", columns, {})
    assert left.exists()
    os.close(folder)
    save_columns(tmp_path / "b.index", columns, {})
    assert not left.exists() and all(path.exists() for path in others)
    assert open_columns(tmp_path / "b.index")[0]["x"].tolist() == [0, 1, 2]


def test_replacing_names_the_target_of_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"weights'$"), replacing(tmp_path / "weights"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
