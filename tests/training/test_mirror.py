"""Runs that continue from their mirror at a URL."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import pytest
from run_comparison import assert_same
from tiny import ALL_TOKENS, train

from xray.artifacts.artifact import open_artifact
from xray.errors import ArtifactError, ConfigError
from xray.training.checkpoint import complete_checkpoints

OF_THE_MACHINE = ("bad_samples.jsonl", "lock")  # files that are not mirrored


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """A run, its mirror and the setting of its URL."""
    out, there = tmp_path / "run", tmp_path / "bucket"
    train("mae", demo, out, ALL_TOKENS, f"train.mirror=file://{there}")
    return out, there / "mae", f"train.mirror=file://{there}"


def complete(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run / "checkpoints")]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tb" not in path.parts and path.name not in OF_THE_MACHINE
    }


def test_the_mirror_equals_the_run(copied: tuple[Path, Path, str]) -> None:
    out, there, _ = copied
    assert files(out) == files(there)
    assert complete(there) == ["step_00000003", "step_00000006"]


def test_a_run_continues_from_its_mirror_alone(
    demo: Path, tmp_path: Path, copied: tuple[Path, Path, str]
) -> None:
    out, there, url = copied
    begun = tmp_path / "begun"
    shutil.move(out, begun)
    assert train("mae", demo, out, ALL_TOKENS, url).digest == open_artifact(begun).digest
    # a finished run is fetched, not trained again
    assert files(out).items() <= files(begun).items() and len(complete(out)) == 1
    for name in ("artifact/manifest.json", "checkpoints/step_00000006/COMPLETE"):
        (there / name).unlink()  # as if the machine had been lost during a copy
    shutil.rmtree(out)
    train("mae", demo, out, ALL_TOKENS, url)
    assert not (out / "checkpoints" / "tmp-step_00000006").exists()
    assert_same(begun, out, exact=True)
    assert files(out).items() <= files(there).items() and len(complete(out)) == 2


def test_a_mirror_of_another_run_is_refused(
    demo: Path, tmp_path: Path, copied: tuple[Path, Path, str]
) -> None:
    message = (
        r"file://.*bucket/mae contains another run: config.mae.mask_ratio: 0.75 -> 0.5; choose"
    )
    with pytest.raises(ConfigError, match=rf"{message} another train.mirror="):
        train("mae", demo, tmp_path / "other", ALL_TOKENS, copied[2], "mae.mask_ratio=0.5")
    assert not (tmp_path / "other").exists()


def test_a_begun_run_refuses_the_mirror_of_another(
    demo: Path, tmp_path: Path, copied: tuple[Path, Path, str]
) -> None:
    out, before = tmp_path / "other", files(copied[1])
    train("mae", demo, out, ALL_TOKENS, "mae.mask_ratio=0.5")
    with pytest.raises(ConfigError, match="bucket/mae contains another run"):
        train("mae", demo, out, ALL_TOKENS, copied[2], "mae.mask_ratio=0.5")
    assert files(copied[1]) == before


def test_the_same_command_copies_a_missing_artifact(
    demo: Path, copied: tuple[Path, Path, str]
) -> None:
    """The machine was lost after the artifact was written and before it was copied."""
    out, there, url = copied
    shutil.rmtree(there / "artifact")
    train("mae", demo, out, ALL_TOKENS, url)
    assert files(out) == files(there)


def test_a_mirror_cannot_name_files_outside_the_run(demo: Path, tmp_path: Path) -> None:
    """Keys of an object store may contain ".."; paths in a folder cannot."""
    bucket = fsspec.filesystem("memory")
    url = "train.mirror=memory://outside"
    train("mae", demo, tmp_path / "a" / "b" / "run", ALL_TOKENS, url)
    step = "/outside/mae/checkpoints/step_00000006"
    bucket.pipe_file(f"{step}/../../../evil.txt", b"")
    with pytest.raises(ArtifactError, match=r"names a file outside of it: \.\./\.\./\.\./evil"):
        train("mae", demo, tmp_path / "c" / "d" / "run", ALL_TOKENS, url)
    assert not [*tmp_path.rglob("evil.txt")]


def test_a_lost_mirror_does_not_end_a_run(
    demo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    caplog.set_level("WARNING", logger="xray")
    url = f"train.mirror=file://{tmp_path}/file"
    artifact = train("mae", demo, tmp_path / "run", ALL_TOKENS, url)
    assert artifact.path.is_dir()
    assert (
        "file/mae is not up to date: " in caplog.text
        and "retried at the next checkpoint" in caplog.text
    )
