"""gpu_check on a CPU with toy models: all sections run, and planted faults are found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from source_code import ROOT
from torch import Tensor

from stages.mae import MaeModule
from tools import gpu_check
from tools.gpu import child, mfu, smoke, syncs
from tools.gpu.findings import Check, Note, Scale, Section
from xray.models.heads import Normalize

PATIENT = 6000.0  # seconds; it also raises the limits of the sections, for a busy machine


def check_device(section: str) -> list[Check]:
    """Run a section in this process and return its checks."""
    findings = child.run(section, "cpu", Scale(toy=True))
    return [finding for finding in findings if isinstance(finding, Check)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    """The finished process of all sections, and the lines that it wrote."""
    out = tmp_path_factory.mktemp("gpu_check")
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cpu", "--toy"]
    command += ["--budget", str(PATIENT), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = (out / "results.jsonl").read_text().splitlines()
    return done, [json.loads(line) for line in lines]


def test_all_sections_run(whole: tuple[Any, list[dict[str, Any]]]) -> None:
    done, lines = whole
    assert [line["section"] for line in lines] == list(gpu_check.SECTIONS), done.stderr
    for line in lines:
        assert line["status"] == "passed", line
        assert f"| {line['section']} | {line['status']} |" in done.stdout
    assert done.returncode == 0, done.stderr


def test_lines_have_the_schema(whole: tuple[Any, list[dict[str, Any]]]) -> None:
    keys = {field.name for field in dataclasses.fields(Section)}
    for line in whole[1]:
        assert line.keys() == keys
        assert line["checks"] and line["seconds"] > 0
        for check in line["checks"]:
            assert check.keys() == {"name", "ok", "found", "want"} and isinstance(check["ok"], bool)
        names = [check["name"] for check in line["checks"]]
        assert len(names) == len(set(names))
    numbers = {line["section"]: line["numbers"] for line in whole[1]}
    for case in ("mae B/16 eager", "mae B/16 compiled", "clip B/16 eager, keep rate 0.5"):
        assert numbers["mfu"][f"{case}, images/s"] > 0
        assert numbers["mfu"][f"{case}, kernels per step"] > 100
    for case in ("eager", "compiled"):
        assert numbers["mfu"][f"open_clip B/16 {case}, images/s"] > 0
    assert numbers["mfu"]["speed of a clip step, xray over open_clip"] > 0


def test_a_planted_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = MaeModule.loss_from_features

    def reading(self: MaeModule, features: dict[str, Tensor]) -> Any:
        output = plain(self, features)
        assert output.loss.item() > 0  # the host waits for the device
        return output

    monkeypatch.setattr(syncs, "CASES", {"mae": ("mae", [])})
    name = "mae, reads beyond the accepted ones"
    before = {check.name: check for check in check_device("syncs")}
    assert before[name].ok
    monkeypatch.setattr(MaeModule, "loss_from_features", reading)
    after = {check.name: check for check in check_device("syncs")}
    (place,) = after[name].found
    assert not after[name].ok and place.startswith("tests/tools/test_gpu_check.py:")


def test_a_planted_mix_of_devices_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = ("clip, stored text", "clip, gradient cache")
    monkeypatch.setattr(smoke, "VARIANTS", {name: smoke.VARIANTS[name] for name in variants})
    assert all(check.ok for check in check_device("smoke"))
    plain = Normalize.forward

    def mixing(self: Normalize, pixels: Tensor) -> Tensor:
        return plain(self, pixels) + torch.ones(pixels.shape, device="meta")

    monkeypatch.setattr(Normalize, "forward", mixing)
    checks = check_device("smoke")
    assert len(checks) == 5 and not any(check.ok for check in checks)
    assert all("device" in check.found for check in checks), checks


def test_a_killed_section_loses_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_check.SECTIONS, "smoke", 1e-6)
    names = ["smoke", "stem"]
    results = list(gpu_check.run_sections(names, "cpu", True, PATIENT, tmp_path))
    assert [result.status for result in results] == ["timeout", "passed"]
    assert [result.failed for result in results] == [True, False]
    (skipped,) = gpu_check.run_sections(["stem"], "cpu", True, 0.0, tmp_path)
    assert skipped.status == "skipped" and "budget" in skipped.notes[0]


def test_a_missing_package_costs_its_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.delitem(sys.modules, "tools.common.clip_pair", raising=False)
    notes = list(mfu._open_clip("open_clip", torch.device("cpu"), Scale(toy=True), False))
    assert notes == [Note("open_clip: needs the package open_clip")]


class Pipe:
    """End of a pipe that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def recv(self) -> float:
        """Return the section's seconds."""
        return 1e6

    def send(self, value: Any) -> None:
        """Keep a value."""
        self.sent.append(value)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            ModuleNotFoundError("no", name="decord"),
            child.MissingPackageError,
            "needs the package decord",
        ),
        (ModuleNotFoundError("no xray", name="xray.x"), child.CrashError, "no xray"),
        (ValueError("of a kind"), child.CrashError, "ValueError at test_gpu_check.py"),
    ],
)
def test_errors_of_a_section_are_sent(
    error: Exception, kind: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Check]:
        yield Check("first", True, 1, "1")
        raise error

    pipe: Any = Pipe()
    monkeypatch.setattr(child, "run", broken)
    child.work("zero", "cpu", True, pipe)
    check, last = pipe.sent
    assert check == Check("first", True, 1, "1")
    assert type(last) is kind and text in str(last)
