"""data.decode: JPEGs decoded by the workers or by the device, recorded once and for all.

The device is the CPU. Users cannot choose that: tests let it pass for one that can decode.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from child_process import RECIPE, SUPPORT, torchrun
from in_process import invoke
from run_comparison import assert_same, assert_same_losses
from shards import photo, write_tar
from tiny import ALL_TOKENS, settings, train
from two_process import halfway

from xray.errors import ConfigError
from xray.training import run as run_module
from xray.training.metrics import read_metrics
from xray.training.run_record import holds_another_run

GPU, AUTO = "data.decode=gpu", "data.decode=auto"
REASON = "training runs on the CPU"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device pass for one that can decode."""
    monkeypatch.setattr(run_module, "cannot_decode", lambda device: "")


def recorded(out: Path) -> Any:
    """Return what a run's record, config and artifact say of data.decode."""
    record = json.loads((out / "run.json").read_text())["config"]["data"].get("decode", "absent")
    config = yaml.safe_load((out / "config.yaml").read_text())["data"]["decode"]
    artifact = json.loads((out / "artifact" / "manifest.json").read_text())["config"]
    assert artifact["data"]["decode"] == config
    assert record == ("absent" if config == "cpu" else config)
    return config


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("mae", ["data.resolution=[[0.0,16],[0.6,32]]", "data.flip=true"]),
        ("hashtag", ["data.views=2"]),
        ("clip", ["train.micro_batch=2", "text.bucket_by_length=true"]),  # a split block
    ],
)
def test_a_run_trains_on_the_pixels_of_the_device(
    demo: Path, tmp_path: Path, able: None, stage: str, more: list[str]
) -> None:
    """The losses are those of the loader's pixels, from which a few differ by a grey level."""
    given = (ALL_TOKENS, "train.samples=36", *more)
    train(stage, demo, tmp_path / "cpu", *given)
    train(stage, demo, tmp_path / "gpu", *given, GPU)
    loader, device = losses(tmp_path / "cpu"), losses(tmp_path / "gpu")
    assert device == pytest.approx(loader, rel=2e-2) and device != loader
    rows = read_metrics(tmp_path / "gpu" / "metrics.jsonl")
    assert [row["data/gpu_decoded"] for row in rows] == [1.0] * 3
    assert "data/gpu_decoded" not in read_metrics(tmp_path / "cpu" / "metrics.jsonl")[0]
    assert recorded(tmp_path / "gpu") == "gpu" and recorded(tmp_path / "cpu") == "cpu"


def test_a_resumed_run_continues_exactly_with_any_workers(
    demo: Path, tmp_path: Path, able: None
) -> None:
    val = ("data.sources.val={shards: heldout}", "data.validation=[{source: val, samples: 8}]")
    given = (GPU, *val, "train.validate_every=2", "data.color_jitter=[0.3,0.3,0.3,0.1]")
    train("mae", demo, tmp_path / "whole", *given)
    again = halfway(tmp_path / "whole", tmp_path / "again")
    train("mae", demo, again, *given, "data.workers=2")
    assert_same(tmp_path / "whole", again, exact=True)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "whole", again)]
    for one, other in zip(*rows, strict=True):
        assert one.get("val/loss") == other.get("val/loss")
    assert "val/loss" in rows[0][-1]


def test_bad_samples_are_counted_as_with_the_loader(tmp_path: Path, demo: Path, able: None) -> None:
    """Broken headers, a truncated JPEG, and pixels that only decoding shows to be broken."""
    files = {f"{i:03d}.jpg": photo(i) for i in range(24)}
    planted = bytearray(photo(5))
    place = planted.index(b"\xff\xc4")  # the Huffman tables
    planted[place + 5 : place + 20] = b"\xff" * 15
    files |= {"005.jpg": bytes(planted), "011.jpg": photo(11)[:-400], "017.jpg": b"<html>"}
    write_tar(tmp_path / "0.tar", files)
    given = (
        f"data.sources.photos.shards={tmp_path / '0.tar'}", "data.modalities=[image]",
        "train.samples=48", "data.max_bad_fraction=0.2",
    )  # fmt: skip
    artifacts = [train("mae", demo, tmp_path / name, *given, *more) for name, more in
                 (("cpu", []), ("gpu", [GPU]))]  # fmt: skip
    counts = [artifact.manifest["bad_samples"] for artifact in artifacts]
    assert counts[0] == counts[1] and counts[0]["undecodable image"] >= 6
    lists = [(tmp_path / name / "bad_samples.jsonl").read_text() for name in ("cpu", "gpu")]
    assert lists[0] == lists[1] and "005" in lists[0]


def test_auto_decides_once(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("train.samples=36", AUTO)
    for decode, now, later in (("cpu", REASON, ""), ("gpu", "", REASON)):
        monkeypatch.setattr(run_module, "cannot_decode", lambda device, now=now: now)
        out = tmp_path / decode
        train("mae", demo, out, *given)
        assert recorded(out) == decode
        assert not holds_another_run(settings("mae", demo, out, *given))
        other = "cpu" if decode == "gpu" else "gpu"
        changed = settings("mae", demo, out, "train.samples=36", f"data.decode={other}")
        assert holds_another_run(changed)
        with pytest.raises(ConfigError, match=f"contains another run.*{decode}' -> '{other}"):
            train("mae", demo, out, "train.samples=36", f"data.decode={other}")
        # Another machine, or a repaired one, changes nothing.
        shutil.rmtree(out / "artifact")
        shutil.rmtree(out / "checkpoints")
        monkeypatch.setattr(run_module, "cannot_decode", lambda device, later=later: later)
        if decode == "cpu":
            train("mae", demo, out, *given)
            assert recorded(out) == "cpu"
        else:
            with pytest.raises(ConfigError, match=f"data.decode=gpu: {REASON}"):
                train("mae", demo, out, *given)


def test_auto_keeps_the_decision_of_a_mirrored_run(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("train.samples=36", AUTO, f"train.mirror=file://{tmp_path}/bucket")
    train("mae", demo, tmp_path / "run", *given)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "bucket" / "mae" / "artifact")
    monkeypatch.setattr(run_module, "cannot_decode", lambda device: "")
    train("mae", demo, tmp_path / "run", *given)
    assert recorded(tmp_path / "run") == "cpu"


def test_an_older_run_without_the_setting_keeps_its_workers(
    demo: Path, tmp_path: Path, able: None
) -> None:
    """A record of an older version lacks the key, and so does that of a run with `cpu`."""
    out = tmp_path / "run"
    train("mae", demo, out)
    assert '"decode"' not in (out / "run.json").read_text()
    again = halfway(out, tmp_path / "again")
    config = yaml.safe_load((again / "config.yaml").read_text())
    del config["data"]["decode"]
    (again / "config.yaml").write_text(yaml.safe_dump(config))
    train("mae", demo, again, AUTO)
    assert recorded(again) == "cpu"
    assert_same(out, again, exact=True)
    assert "data/gpu_decoded" not in read_metrics(again / "metrics.jsonl")[-1]


def test_a_device_that_cannot_decode_is_one_clear_error(demo: Path, tmp_path: Path) -> None:
    """Before the first stage of a recipe, and before anything is written."""
    out = tmp_path / "run"
    given = ("--recipe", RECIPE, f"data.root={demo}", "--out", out, GPU)
    for command in (("run", RECIPE, f"data.root={demo}", f"out={out}", GPU),
                    ("run", RECIPE, f"data.root={demo}", f"out={out}", f"clip.{GPU}"),
                    ("train", "mae", *given)):  # fmt: skip
        done = invoke(*command)
        assert done.exit_code == 2 and not out.exists()
        said = [line for line in done.stderr.splitlines() if line.startswith("xray: ")]
        assert said == [f"xray: data.decode=gpu: {REASON}; set data.decode to cpu"]
    wrong = invoke("train", "mae", "--recipe", RECIPE, f"data.root={demo}", "data.decode=nvjpeg")
    assert wrong.exit_code == 2 and "data.decode" in wrong.stderr


def test_two_processes_decode_on_their_devices(demo: Path, tmp_path: Path, able: None) -> None:
    """Like one process. `auto` needs the devices of all, and `gpu` fails on all."""
    torchrun(str(SUPPORT / "decode_ranks.py"), str(demo), str(tmp_path))
    train("mae", demo, tmp_path / "one", ALL_TOKENS, GPU)
    assert_same_losses(tmp_path / "one", tmp_path / "two", 6)
    rows = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["data/gpu_decoded"] for row in rows] == [1.0] * 6
    assert recorded(tmp_path / "auto") == "cpu"
    errors = [(tmp_path / f"refused.{rank}").read_text() for rank in (0, 1)]
    assert errors == ["data.decode=gpu: it has no decoder; set data.decode to cpu"] * 2
