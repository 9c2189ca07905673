"""`xray doctor` where all is well, and where something is broken, missing or full."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from child_process import clean_environment, xray

from xray.doctor.checks import (
    cgroup_cores,
    compiler,
    disk,
    guarded,
    launchers,
    network,
    shared_memory,
)
from xray.doctor.libraries import Finding, Package, imports


def test_a_whole_computer(tmp_path: Path) -> None:
    done = xray("doctor", "--json", "--out", str(tmp_path / "runs" / "a"))
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["ok"] and report["host"] == socket.gethostname()
    found = {row["what"]: row for row in report["findings"]}
    assert {"xray", "python", "torch", "deepspeed", "gloo", "wandb", "bf16", "ports"} <= set(found)
    assert found["gloo"]["found"] == "works"
    assert found["pictures"]["found"].endswith("(64, 64)")
    assert found["clips by PyAV"]["found"] == "an mp4 of 12 frames: (64, 64, 3)"
    assert found["decode process"]["found"] == "works: (4, 64, 64, 3)"
    assert found["started by"]["found"] == "plain python, process 0 of 1"
    assert found[f"disk at {tmp_path}"]["found"].endswith("GB free, writable")
    assert not list(tmp_path.iterdir())


def test_broken_libraries_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that fail, that end the process, that are not there; those after them are tried."""
    for name, text in {
        "raises": "raise ImportError('libx.so.9: cannot open\\n shared object file')",
        "leaves": "import sys; sys.exit(0)",
        "crashes": "import os; os.kill(os.getpid(), 11)",
        "needs": "import a_library_that_is_not_there",
        "fine": "__version__ = '1.2'",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ("raises", "leaves", "crashes", "needs", "fine", "folder", "absent")
    found = imports([Package(name, "no such thing", name) for name in names])
    assert [finding.state for finding in found] == ["missing"] * 4 + ["ok"] + ["missing"] * 2
    texts = [finding.found for finding in found]
    assert texts[0] == "ImportError: libx.so.9: cannot open shared object file"
    assert texts[1] == "SystemExit: 0" and texts[2] == "its import ends the process (-11)"
    assert "a_library_that_is_not_there" in texts[3]
    assert texts[4:] == ["1.2", "not installed", "not installed"]
    assert found[0].lacks == "no such thing: pip install raises"
    (needed,) = imports([Package("raises")])
    assert needed.state == "broken" and needed.lacks == "nothing works: pip install raises"


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["numpy>=99", "pillow>=10"])
    old, fine = imports([Package("numpy"), Package("PIL")])
    assert old.state == "broken" and old.lacks == ">=99 is needed: pip install numpy --upgrade"
    assert fine.state == "ok"


@pytest.mark.slow
def test_a_broken_computer_ends_with_1(tmp_path: Path) -> None:
    """PyAV cannot be imported in this environment; everything else is still checked."""
    (tmp_path / "av.py").write_text("raise ImportError('libavcodec.so: cannot open')")
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-m", "xray", "doctor", "--out", "/proc/nowhere"],
        capture_output=True,
        text=True,
        env=clean_environment(PYTHONPATH=paths, COLUMNS="200"),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == "broken: av, clips, decode process, disk at /proc"
    assert "libavcodec.so: cannot open" in done.stdout and "nothing works" in done.stdout


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (finding,) = disk(Path("/proc/runs"))
    assert finding.state == "broken" and finding.what == "disk at /proc"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "from pathlib import Path; from xray.doctor.checks import disk;"
        "print(*disk(Path(sys.argv[1])))"
    )  # no file may grow beyond 1000 bytes, as on a full disk
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert "state='broken'" in done.stdout and "choose another out=" in done.stdout, done.stderr
    (finding,) = shared_memory(tmp_path / "shm")
    assert finding.state == "missing" and "data.workers=0" in finding.lacks


def test_a_check_that_fails_is_a_row() -> None:
    def check():  # type: ignore[no-untyped-def]
        yield Finding("one", "there")
        raise RuntimeError("a driver\nof another age")

    one, two = guarded("devices", check)
    assert one.state == "ok"
    assert two == Finding("devices", "RuntimeError: a driver", "", "broken")


def test_what_it_is_started_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    started, tools = launchers()
    assert started.found.startswith("torchrun, process ") and "torchrun" in tools.found
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    _, name = network()
    assert name.state == "missing" and "GLOO_SOCKET_IFNAME to one of " in name.lacks
    monkeypatch.setenv("PATH", "")
    (none,) = compiler()
    assert none.state == "missing" and "torch.compile" in none.lacks


@pytest.mark.parametrize(
    ("text", "cores"),
    [("150000 100000\n", 1.5), ("max 100000\n", None), ("", None), ("odd", None)],
)
def test_cores_of_a_container(tmp_path: Path, text: str, cores: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_cores(tmp_path / "cpu.max") == cores
    assert cgroup_cores(tmp_path / "none") is None
