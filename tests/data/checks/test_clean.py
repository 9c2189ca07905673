"""`xray data clean` removes what xray derived from shards, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import invoke
from shards import two_shards

from data_pipelines.checks.clean import KINDS, find_derived
from data_pipelines.shards.side_files import HIDDEN
from data_pipelines.shards.source import open_source
from xray.errors import ConfigError

OLD = Path(__file__).parents[2] / "fixtures" / "9205be0" / "data"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Shards with indexes and a manifest in the hidden folder."""
    folder = two_shards(tmp_path / "photos")
    source = open_source("s", str(folder), "image")
    assert len(source) == 6
    return folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def cleaned(*arguments: object) -> str:
    done = invoke("data", "clean", *arguments)
    assert done.exit_code == 0, done.output
    return str(done.output)


def test_the_hidden_folder_is_removed_and_made_again(shards: Path) -> None:
    before, listed = names(shards), cleaned(shards, "--dry-run")
    assert names(shards) == before
    assert "3 files" in listed and "can be removed" in listed and "the next use" in listed
    assert "3 files" in cleaned(shards)
    assert [path.name for path in sorted(shards.iterdir())] == ["0.tar", "1.tar"]
    assert len(open_source("s", str(shards), "image")) == 6 and names(shards) == before


def test_old_places_are_cleaned_and_costly_files_are_kept_unless_all(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(OLD, data)
    others = [n for n in names(data) if not any(f".{kind}" in n for kind in KINDS)]
    assert {"demo.json", "classes.txt", "photos/00000.tar"} < set(others)
    text = cleaned(data)
    left = [name for name in names(data) if name not in others]
    costly = ("kept", "teacher", "embeddings", "scores", "caption-ids", "text-features")
    assert left and all(any(f".{kind}" in name for kind in costly) for name in left)
    assert {kind for kind in costly if any(f".{kind}" in name for name in left)} == set(costly)
    assert "kept: " in text and "--all" in text
    cleaned(data, "--all")
    assert names(data) == others


def test_files_of_users_are_never_removed(shards: Path) -> None:
    mine = {
        "0.tar.index": b"an index of another program",
        "0.tar.labels-0123456789ab": b"mine",
        "shards.manifest": b"{}",
        "notes.tmp": b"1",
        "lock": b"my own",
        "pack.json": b"{}",
        "pack_skipped.jsonl": b"",
        "tags.json": b"[]",
        ".hidden/0.tar.index": b"2",
        f"{HIDDEN}/notes.txt": b"3",
        f"{HIDDEN}/a.tar": b"4",
    }
    for name, content in mine.items():
        (shards / name).parent.mkdir(exist_ok=True)
        (shards / name).write_bytes(content)
    (shards / "1.tar.index").symlink_to(shards / "0.tar")
    text = cleaned(shards, "--all")
    assert names(shards) == sorted([*mine, "0.tar", "1.tar", "1.tar.index"])
    assert all((shards / name).read_bytes() == content for name, content in mine.items())
    assert f"not removed, because it is damaged or not by xray: {shards / '0.tar.index'}" in text


def test_what_killed_writers_left_is_removed(shards: Path) -> None:
    left = [
        f"0.tar.index.{'0' * 32}.tmp",
        f"{HIDDEN}/anything.{'f' * 32}.tmp",
        ".packing.00000.tar.123",
        "lock",
    ]
    for name in left:
        (shards / name).write_text("process 1 on host\n")
    (shards / "pack.json").write_text("{}")
    kinds = {item.kind.name: 0 for item in find_derived(shards).derived}
    assert set(kinds) == {"index", "manifest", "unfinished"}
    cleaned(shards)
    assert names(shards) == ["0.tar", "1.tar", "pack.json"]


LOCKS = {
    "lock": "from pathlib import Path; from xray.files import lock_folder\n"
    "f = lock_folder(Path(sys.argv[1]), 'written to')",
    "write": "import fcntl, os; h = os.open(sys.argv[1] + '/.xray', os.O_RDONLY)\n"
    "fcntl.flock(h, fcntl.LOCK_SH)",
    "read": "import mmap\nf = open(sys.argv[1] + '/.xray/0.tar.index', 'rb')\n"
    "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)",
}


@pytest.mark.parametrize("use", LOCKS)
def test_a_folder_in_use_is_refused(shards: Path, use: str) -> None:
    (shards / "pack.json").write_text("{}")
    before = [name for name in names(shards) if name != "lock"]
    wait = "sys.stdout.write('.'); sys.stdout.flush(); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{LOCKS[use]}\n{wait}", str(shards)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None and other.stdout.read(1) == b"."
        done = invoke("data", "clean", shards, "--all")
        assert done.exit_code == 2, done.output
        words = {"lock": "written to by another process", "write": "writes side files"}
        assert words.get(use, f"process {other.pid} reads") in done.output
        assert [name for name in names(shards) if name != "lock"] == before
    finally:
        other.communicate()
    cleaned(shards, "--all")
    assert names(shards) == ["0.tar", "1.tar", "pack.json"]


def test_a_users_empty_file_named_lock_stays(shards: Path) -> None:
    (shards / "lock").touch()
    cleaned(shards, "--all")
    assert names(shards) == ["0.tar", "1.tar", "lock"]


def test_the_lock_of_a_killed_split_is_removed(shards: Path) -> None:
    (shards / "lock").write_text("process 1 on host\n")
    (shards / "split.json").write_text("{}")
    cleaned(shards)
    assert names(shards) == ["0.tar", "1.tar", "split.json"]


def test_only_folders_are_cleaned(shards: Path) -> None:
    for path in (shards / "0.tar", shards / "none"):
        with pytest.raises(ConfigError, match="is not a folder"):
            find_derived(path)


def test_a_read_only_folder_names_the_cache(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards.chmod(0o555)
    try:
        text = cleaned(shards, "--dry-run")
        assert f"{shards} is read-only: its side files are in {tmp_path / 'cache'}" in text
    finally:
        shards.chmod(0o755)


def test_every_file_of_the_fixture_is_known() -> None:
    """Each side file that a command of 9205be0 wrote has a kind."""
    side = {str(p) for p in OLD.rglob("*.*") if ".tar." in p.name or p.name.startswith("shards")}
    found = find_derived(OLD)
    assert {str(item.path) for item in found.derived} == side and not found.unknown
