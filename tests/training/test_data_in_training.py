"""Data of a training run: quarantine, token budget, mixing, and metrics of the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hostile_decoder
import pytest
from clips import clip
from shards import write_tar
from tiny import settings, train

from data_pipelines.decode import transforms
from data_pipelines.stream import quarantine
from stages import stage_class
from xray.errors import ConfigError, DataError
from xray.training.metrics import read_metrics
from xray.training.step_data import step_shape


def test_the_quarantine_is_part_of_a_checkpoint(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i:03d}.mp4": clip(48, 4) for i in range(8)}
    files["003.mp4"] = hostile_decoder.HANG
    write_tar(tmp_path / "0.tar", files)
    decoder = hostile_decoder.Decoder(2.0)
    monkeypatch.setattr(transforms, "clip_decoder", lambda data: decoder)
    config = (
        f"data.sources.clips.shards={tmp_path / '0.tar'}", "data.modalities=[video]",
        "train.samples=32", "train.save_every=4", "data.max_bad_fraction=0.1",
    )  # fmt: skip
    artifact = train("mae", demo, tmp_path / "run", *config)
    (entry,) = quarantine.load(
        tmp_path / "run" / "checkpoints" / "step_00000008" / "quarantine.jsonl"
    )
    assert (entry.source, entry.shard, entry.key) == ("clips", "0.tar", "003")
    assert artifact.manifest["bad_samples"] == {
        "video decode timed out": 1,
        "in quarantine": 3,  # over four epochs
    }
    listed = [
        json.loads(line)
        for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    ]
    assert [row["key"] for row in listed] == ["003"] * 4

    # From the checkpoint of step 4 on, the clip is known and is not tried again.
    shutil.rmtree(tmp_path / "run" / "artifact")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    opened: list[bytes] = []
    real = decoder.decode
    monkeypatch.setattr(decoder, "decode", lambda d, *how: opened.append(d[:4]) or real(d, *how))
    again = train("mae", demo, tmp_path / "run", *config)
    assert len(opened) > 10 and hostile_decoder.HANG not in opened
    assert again.manifest["bad_samples"] == artifact.manifest["bad_samples"]
    assert again.manifest["files"] == artifact.manifest["files"]
    decoder.close()


def test_too_many_bad_samples_raise_and_name_the_worst_shards(demo: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "good.tar", {f"a{i}.mp4": clip(48, 4) for i in range(6)})
    write_tar(tmp_path / "poor.tar", {f"b{i}.mp4": b"junk" for i in range(6)})
    with pytest.raises(DataError, match=r"undecodable video.*poor.tar"):
        train(
            "mae", demo, tmp_path / "run", f"data.sources.clips.shards={tmp_path}/*.tar",
            "data.modalities=[video]", "train.samples=64", "data.max_bad_fraction=0.005",
        )  # fmt: skip


def test_a_token_budget_equalizes_the_cost_of_micro_batches(demo: Path, tmp_path: Path) -> None:
    """An image has 4 x 4 tokens, a clip 2 x 4 x 4: a forward takes twice as many images."""
    config = settings("hashtag", demo, tmp_path, "data.tokens_per_batch=64")
    cut = step_shape(stage_class("hashtag")(config), config.blocks, 0.5).micro
    sizes = [(micro.source, micro.stop - micro.start) for micro in cut]
    assert sizes == [("photos", 4)] * 2 + [("clips", 2)] * 2
    config = settings("hashtag", demo, tmp_path, "data.weigh_blocks_by=tokens")
    scales = {
        m.source: m.scale
        for m in step_shape(stage_class("hashtag")(config), config.blocks, 0.5).micro
    }
    # 8 images of 16 tokens and 4 clips of 32 have equally many: one forward for each block
    assert scales == {"photos": 1.0, "clips": 1.0}
    with pytest.raises(ConfigError, match="both set the size"):
        settings("hashtag", demo, tmp_path, "data.tokens_per_batch=64", "train.micro_batch=2")


def test_a_token_budget_gives_the_loss_of_whole_blocks(demo: Path, tmp_path: Path) -> None:
    plain = train("hashtag", demo, tmp_path / "a", "train.samples=36")
    cut = train("hashtag", demo, tmp_path / "b", "train.samples=36", "data.tokens_per_batch=64")
    assert plain.manifest["config_hash"] == cut.manifest["config_hash"]
    losses = [plain.manifest["metrics"]["loss"], cut.manifest["metrics"]["loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_logs_metrics_of_its_data(demo: Path, tmp_path: Path) -> None:
    train("mae", demo, tmp_path / "run", "data.workers=1")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(0 <= row["data/wait"] <= 1 for row in rows)
    assert all(row["data/image_ms"] > 0 and row["data/video_ms"] > 0 for row in rows)
    assert rows[-1]["photos/epochs"] == pytest.approx(6 * 8 / 96)
    assert rows[-1]["clips/epochs"] == pytest.approx(6 * 4 / 24)


def test_hashtag_trains_on_mixed_images(demo: Path, tmp_path: Path) -> None:
    more = ("hashtag.mixup=0.8", "hashtag.cutmix=1.0", "train.samples=36")
    one, two = (train("hashtag", demo, tmp_path / name, *more) for name in "ab")
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in "ab"]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]  # seeded
    assert one.manifest["files"] == two.manifest["files"]
    plain = train("hashtag", demo, tmp_path / "c", "train.samples=36")
    assert plain.manifest["metrics"]["loss"] != one.manifest["metrics"]["loss"]
    with pytest.raises(ConfigError, match=r"hashtag.mixup=-1"):
        settings("hashtag", demo, tmp_path, "hashtag.mixup=-1")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.color_jitter=[0.1,0.1]", "must be .brightness"),
        ("data.color_jitter=[0,0,0,0.7]", "hue at most 0.5"),
        ("data.rand_augment=[2,40]", r"magnitude in \[0, 30\]"),
        ("data.erase=2", r"must be in \[0, 1\]"),
        ("data.frame_rate=0", "must be above 0"),
        ("data.sources.photos.captions={a: -1}", "every weight must be above 0"),
    ],
)
def test_wrong_settings_name_the_key(
    demo: Path, tmp_path: Path, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings("mae", demo, tmp_path, setting)
