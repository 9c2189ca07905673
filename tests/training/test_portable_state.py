"""Checkpoints that any world size and ZeRO stage can load."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_comparison import assert_same
from safetensors.torch import load_file
from tiny import ALL_TOKENS, train
from two_process import halfway

from stages.mae import MaeStage
from xray.commands.common import guarded
from xray.errors import ArtifactError
from xray.training import portable_state as portable
from xray.training.metrics import Sinks


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that trains six steps of a stage with some settings, once for each."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(*asked: str) -> Path:
        if asked not in made:
            made[asked] = tmp_path_factory.mktemp("whole") / "run"
            train(asked[0], demo, made[asked], *asked[1:])
        return made[asked]

    return folder


CHANGES = [
    pytest.param(a, b, marks=[pytest.mark.slow] if 2 in (a, b) and (a, b) != (2, 2) else [])
    for a in range(4)
    for b in range(4)
]


@pytest.mark.parametrize("stage", ["mae", "clip"])
@pytest.mark.parametrize(("first", "second"), CHANGES)
def test_a_run_resumes_in_any_zero_stage(
    demo: Path, tmp_path: Path, whole: Callable[..., Path], stage: str, first: int, second: int
) -> None:
    begun = whole(stage, ALL_TOKENS, f"zero.stage={first}")
    out = halfway(begun, tmp_path / "run")
    train(stage, demo, out, ALL_TOKENS, f"zero.stage={second}")
    assert_same(begun, out, exact=first == second)


def test_lion_has_one_moment(demo: Path, tmp_path: Path, whole: Callable[..., Path]) -> None:
    lion = ("optim.name=lion", "optim.base_lr=0.002")
    begun = whole("mae", ALL_TOKENS, *lion)
    for zero in (0, 3):
        out = halfway(begun, tmp_path / str(zero))
        train("mae", demo, out, ALL_TOKENS, *lion, f"zero.stage={zero}")
        assert_same(begun, out, exact=zero == 0)


def test_a_state_of_many_files_is_equal(
    demo: Path, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "FILE_BYTES", 50_000)
        train("mae", demo, tmp_path / "run", ALL_TOKENS, "zero.stage=1")
    (state,) = (tmp_path / "run" / "checkpoints").glob("step_00000003/portable")
    files = sorted(state.glob("0*.safetensors"))
    assert len(files) > 5
    whole_run = whole("mae", ALL_TOKENS, "zero.stage=1")
    one = whole_run / "checkpoints" / "step_00000003" / "portable" / "00000.safetensors"
    together: dict[str, torch.Tensor] = {}
    for file in files:
        together |= load_file(file)
    alone = load_file(one)
    assert alone.keys() == together.keys()
    assert all(torch.equal(together[name], value) for name, value in alone.items())
    out = halfway(tmp_path / "run", tmp_path / "again")
    train("mae", demo, out, ALL_TOKENS, "zero.stage=1")
    assert_same(whole_run, out, exact=True)


@contextmanager
def no_room(limit: int = 0) -> Iterator[None]:
    """Limit the size of files in bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def assert_goes_on_from_the_third(demo: Path, out: Path, whole: Callable[..., Path]) -> None:
    """Check that a run whose second checkpoint failed ends, when repeated, like an unbroken one."""
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_00000003"]
    train("mae", demo, out, ALL_TOKENS)
    assert_same(whole("mae", ALL_TOKENS), out, exact=True)


@pytest.mark.parametrize("file", ["00000.safetensors", "index.json", "state.json"])
def test_a_full_disk_keeps_earlier_checkpoints(
    demo: Path, tmp_path: Path, whole: Callable[..., Path], file: str
) -> None:
    """A limit on file size replaces a full disk: a write beyond it fails in the same way."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        if file.endswith("safetensors"):
            saved = []
            save_tensors = portable.save_tensors

            def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
                saved.append(path)
                if len(saved) <= 2:  # the two files of the first checkpoint
                    return save_tensors(path, tensors)
                with no_room(4096):
                    save_tensors(path, tensors)

            patch.setattr(portable, "save_tensors", full)
        else:
            write = Path.write_text

            def none_left(self: Path, *given: object, **more: object) -> int:
                if self.name == file and "step_00000006" in str(self):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(self, *given, **more)  # type: ignore[arg-type]

            patch.setattr(Path, "write_text", none_left)
        with pytest.raises(
            ArtifactError, match=r"step_00000006 cannot be written: .*earlier checkpoints"
        ):
            train("mae", demo, out, ALL_TOKENS)
    assert_goes_on_from_the_third(demo, out, whole)


def test_a_read_only_disk_keeps_earlier_checkpoints(
    demo: Path, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    out, make = tmp_path / "run", Path.mkdir

    def read_only(self: Path, *given: Any, **more: Any) -> None:
        if "step_00000006" in self.name:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        make(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        with pytest.raises(ArtifactError, match=r"step_00000006 cannot be written: .*Read-only"):
            train("mae", demo, out, ALL_TOKENS)
    assert_goes_on_from_the_third(demo, out, whole)


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Error line of a run that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        guarded(train)("mae", *arguments)
    errors = capsys.readouterr().err.splitlines()
    return next(line for line in errors if line.startswith("xray: "))


BOARDLESS = "train.tensorboard=false"  # its thread would fail, too, and raise in a later test


def test_other_disk_faults_are_reported_in_one_line(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that cannot be created, metrics on a full disk, a folder removed during training."""
    assert "'/sys/run'" in said(capsys, demo, Path("/sys/run"))
    out = tmp_path / "full"
    with pytest.MonkeyPatch.context() as patch:
        write = Sinks.write

        def full(self: Sinks, *given: Any) -> None:
            with no_room():
                write(self, *given)

        patch.setattr(Sinks, "write", full)
        line = said(capsys, demo, out, BOARDLESS)
        assert "metrics.jsonl cannot be written: [Errno 27] File too large" in line
    out = tmp_path / "removed"
    with pytest.MonkeyPatch.context() as patch:
        after_step = MaeStage.after_step

        def remove(self: MaeStage, *given: Any) -> None:
            after_step(self, *given)
            shutil.rmtree(out, ignore_errors=True)

        patch.setattr(MaeStage, "after_step", remove)
        line = said(capsys, demo, out, BOARDLESS)  # for a checkpoint, or for the metrics before it
        assert str(out) in line and "cannot be written" in line
    assert not out.exists()


def test_a_state_of_another_model_or_optimizer_is_refused(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train("mae", demo, out, ALL_TOKENS)
    (index,) = (out / "checkpoints").glob("step_00000006/portable/index.json")
    (index.parents[1] / "COMPLETE").write_text("")  # without hashes
    facts = json.loads(index.read_text())
    outside = {"../00000.safetensors": facts["files"]["00000.safetensors"]}
    for change, message in (
        ({"slots": ["exp_avg"]}, r"of another model or optimizer: .*exp_avg"),
        ({"version": 9}, "has version 9"),
        ({"files": {"00000.safetensors": ["x"]}}, "of another model or optimizer: parameter"),
        ({"files": outside}, r"names a file outside of it: ../00000.safetensors"),
    ):
        index.write_text(json.dumps({**facts, **change}))
        shutil.rmtree(out / "artifact", ignore_errors=True)
        with pytest.raises(ArtifactError, match=message):
            train("mae", demo, out, ALL_TOKENS)
