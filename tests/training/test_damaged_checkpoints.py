"""Checkpoints of which a bit has changed on the disk."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
from in_process import invoke
from run_comparison import assert_same
from tiny import ALL_TOKENS, train

from xray.errors import ArtifactError
from xray.training.checkpoint import find_checkpoint, verify

SETTINGS = (ALL_TOKENS, "train.save_every=2", "train.keep_checkpoints=3")
WEIGHTS, INDEX = "portable/00000.safetensors", "portable/index.json"


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train("mae", demo, out, *SETTINGS)
    return out


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """The run in the state after its fourth step."""
    later = shutil.ignore_patterns("artifact", "step_00000006")
    return Path(shutil.copytree(whole, tmp_path / "run", ignore=later))


def last(run: Path) -> Path:
    return run / "checkpoints" / "step_00000004"


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Flip a bit of a file, as a faulty disk does, without a change of its size or times."""
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def of_tensor(path: Path, start: str) -> int:
    """Return the position of a byte in the middle of the first tensor whose name starts so."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8 : 8 + size])
    first, end = next(v["data_offsets"] for k, v in tensors.items() if k.startswith(start))
    return 8 + size + (first + end) // 2


def after(path: Path, text: str) -> int:
    """Return the position of the first byte after a text."""
    return path.read_bytes().index(text.encode()) + len(text)


FLIPS = {
    "weights": (WEIGHTS, lambda path: of_tensor(path, "weight/")),
    "first moments": (WEIGHTS, lambda path: of_tensor(path, "exp_avg/")),
    "second moments": (WEIGHTS, lambda path: of_tensor(path, "exp_avg_sq/")),
    "a tensor's name": (WEIGHTS, lambda path: after(path, '"weight/')),
    "buffers": ("portable/buffers.safetensors", lambda path: path.stat().st_size - 3),
    "steps": (INDEX, lambda path: after(path, '"steps": ')),
    "step": ("state.json", lambda path: after(path, '"step": ')),
    "samples": ("state.json", lambda path: after(path, '"samples": ')),
    "losses": ("state.json", lambda path: after(path, '"mean": ')),
    "hashes": ("COMPLETE", lambda path: path.stat().st_size // 2),
}


@pytest.mark.parametrize("what", FLIPS)
def test_a_flipped_bit_leads_to_the_checkpoint_before(
    begun: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = FLIPS[what]
    path = last(begun) / name
    flip(path, place(path))
    caplog.set_level(logging.INFO, logger="xray")
    found = find_checkpoint(begun / "checkpoints")
    assert found is not None and found.name == "step_00000002"
    (line,) = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
    assert f"checkpoint {last(begun)} is damaged: " in line and name.split("/")[-1] in line
    assert not (last(begun) / "COMPLETE").exists() and (last(begun) / "DAMAGED").is_file()
    caplog.clear()
    assert find_checkpoint(begun / "checkpoints") == found and "damaged" not in caplog.text


@pytest.mark.parametrize("what", ["weights", "steps", "step"])
def test_the_run_then_has_the_results_of_others(
    demo: Path, whole: Path, begun: Path, what: str
) -> None:
    name, place = FLIPS[what]
    flip(last(begun) / name, place(last(begun) / name))
    train("mae", demo, begun, *SETTINGS)
    assert_same(whole, begun, exact=True)
    verify(last(begun))  # it was written again
    assert not (last(begun) / "DAMAGED").exists()


def test_random_flips_are_found_or_harmless(begun: Path) -> None:
    draw = random.Random(0)
    files = sorted(path for path in last(begun).rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"COMPLETE", "state.json", "index.json"}
    found = 0
    for number in range(150):
        path = files[number % len(files)]
        content = path.read_bytes()
        if not content:  # no sample is in quarantine
            continue
        flip(path, draw.randrange(len(content)), draw.randrange(8))
        try:
            verify(last(begun))
        except ArtifactError:
            found += 1
        else:
            assert path.name == "COMPLETE", path  # white space
        path.write_bytes(content)
    verify(last(begun))
    assert found >= 110


@pytest.mark.parametrize("change", ["shorter", "removed", "a folder", "outside"])
def test_other_damage_is_found(begun: Path, change: str) -> None:
    path = last(begun) / "portable" / "00000.safetensors"
    content = path.read_bytes()
    path.unlink()
    if change == "shorter":
        path.write_bytes(content[:-100])
    elif change == "a folder":
        path.mkdir()
    elif change == "outside":
        path.write_bytes(content)
        hashes = last(begun) / "COMPLETE"
        hashes.write_text(hashes.read_text().replace("portable/", "../../portable/"))
    found = find_checkpoint(begun / "checkpoints")
    assert found is not None and found.name == "step_00000002"


def test_a_run_does_not_begin_again_if_all_are_damaged(demo: Path, begun: Path) -> None:
    for checkpoint in (begun / "checkpoints").iterdir():
        flip(checkpoint / "state.json", 20)
    for _ in range(2):
        with pytest.raises(
            ArtifactError, match=r"no checkpoint in .*/checkpoints is whole: .*0004"
        ):
            train("mae", demo, begun, *SETTINGS)
    assert not (begun / "artifact").exists()


def test_a_checkpoint_of_earlier_versions_has_no_hashes(
    demo: Path, whole: Path, begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(last(begun))
    (begun / "checkpoints" / "step_00000002" / "COMPLETE").write_text("")
    caplog.set_level(logging.INFO, logger="xray")
    train("mae", demo, begun, *SETTINGS)
    (line,) = [r.getMessage() for r in caplog.records if "no hashes" in r.getMessage()]
    assert "step_00000002" in line
    assert_same(whole, begun, exact=True)


def test_a_damaged_checkpoint_is_not_exported(begun: Path, tmp_path: Path) -> None:
    flip(last(begun) / WEIGHTS, of_tensor(last(begun) / WEIGHTS, "weight/"))
    done = invoke("export", f"{begun}@last", "--out", str(tmp_path / "out"))
    assert done.exit_code == 2 and "00000.safetensors does not have its sha256" in done.stderr
    assert not (tmp_path / "out").exists()
    done = invoke("export", f"{begun}@2", "--out", str(tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
