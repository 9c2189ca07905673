"""Share of a picture's object that is kept, against plain loops over pixels and tokens."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import invoke
from PIL import Image
from shards import write_tar
from tiny import train

from data_pipelines.ingest.demo import DemoConfig, make_demo
from data_pipelines.shards.source import Sample, open_source
from xray.artifacts.artifact import Artifact
from xray.artifacts.encoders import VisionEncoder
from xray.artifacts.manifest_config import data_config
from xray.config import DataConfig
from xray.errors import DataError
from xray.evaluation.token_selection import KeptShares, areas, box_of
from xray.models.token_reduction import kept_alone

RATES = (0.7, 0.5)


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated sets whose photos have boxes."""
    root = tmp_path_factory.mktemp("boxed") / "data"
    make_demo(root, DemoConfig(photos=32, clips=8, heldout=20, side=32, frames=4, version=2))
    return root


@pytest.fixture(scope="module")
def tagger(boxed: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("hashtag")
    return train("hashtag", boxed, out, "train.samples=24", "hashtag.min_count=1")


def picture(width: int, height: int, box: object) -> Sample:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "JPEG")
    files = {"jpg": buffer.getvalue(), "json": json.dumps({"object_box": box}).encode()}
    return Sample(files, "photos", "image", "a", 32, 1)


def test_the_area_of_each_patch_in_a_box_is_that_of_its_pixels() -> None:
    fine, grid = 120, (3, 4)
    boxes = torch.tensor([[0.25, 1 / 3, 0.75, 0.9], [0.1, 0.0, 0.2, 1.0], [0.5, 0.5, 0.5, 0.5]])
    for box, own in zip(boxes.tolist(), areas(boxes, grid), strict=True):
        left, top, right, bottom = (round(fine * x) for x in box)
        pixels = np.zeros((fine, fine))
        pixels[top:bottom, left:right] = 1 / fine**2
        patches = pixels.reshape(3, fine // 3, 4, fine // 4).sum(axis=(1, 3))
        assert np.allclose(own.reshape(grid), patches, atol=1e-6)


def test_a_box_follows_the_shown_part() -> None:
    def shown(sample: Sample, **settings: Any) -> tuple[float, ...]:
        return box_of(sample, "object_box", DataConfig(**settings))

    wide = picture(40, 20, [0.25, 0, 0.75, 0.5])
    assert shown(wide) == shown(wide, resize="shortest") == (0, 0, 1, 0.5)
    assert shown(wide, resize="squash") == (0.25, 0, 0.75, 0.5)
    assert shown(wide, crop_pct=0.5) == (0, 0, 1, 0.5)
    left, top, right, bottom = shown(picture(20, 40, [0.5, 0.1, 1, 0.5]))
    assert (left, top, right, bottom) == (0.5, 0, 1, 0.5)
    assert all(np.isnan(shown(picture(20, 20, None))))
    for broken in ([1, 2, 30, 40], [0.5, 0.1], "box", {"left": 0}):
        with pytest.raises(DataError, match=r"a: json field object_box=.* must be \[left, top"):
            shown(picture(20, 20, broken))


def test_shares_are_those_of_plain_loops(boxed: Path, tagger: Artifact) -> None:
    encoder = VisionEncoder(tagger)
    source = open_source("heldout", str(boxed / "heldout"), "image")
    data = data_config(tagger)
    task = KeptShares(source, data, 8, box="object_box", rates=RATES)
    batches = list(task.encode(encoder, range(len(task))))
    objects = torch.cat([batch["object"] for batch in batches])
    tokens = torch.cat([batch["tokens"] for batch in batches])
    assert objects.shape == tokens.shape == (20, 2)
    row = 0
    for batch in task.load(range(len(task))):
        for pixels, box in zip(batch["pixels"], batch["box"], strict=True):
            x = encoder.normalize(pixels[None])
            _, h, w = encoder.vision.token_grid(x)
            for column, rate in enumerate(RATES):
                assigned = encoder.vision(x, rate, track=True).assign[-1][0].tolist()
                alone = [place >= 0 and assigned.count(place) == 1 for place in assigned]
                parts = areas(box[None], (h, w))[0].tolist()
                kept = sum(part for part, own in zip(parts, alone, strict=True) if own)
                assert objects[row, column].item() == pytest.approx(kept / sum(parts), abs=1e-5)
                assert tokens[row, column].item() == pytest.approx(sum(alone) / (h * w))
            row += 1


def test_a_token_that_was_merged_fused_or_dropped_is_not_kept() -> None:
    assign = torch.tensor([[0, 1, 2, 2, -1], [2, 2, 2, 0, 1]])
    assert kept_alone(assign).tolist() == [
        [True, True, False, False, False],
        [False, False, False, True, True],
    ]


def test_the_suite_gives_both_shares_at_each_keep_rate(
    boxed: Path, tagger: Artifact, tmp_path: Path
) -> None:
    arguments = ["--suite", "token_selection", "eval.token_selection.shards=heldout"]
    done = invoke(
        "eval", tagger.path, *arguments, f"data.root={boxed}", "--out", str(tmp_path / "r.json")
    )
    assert done.exit_code == 0, done.stderr
    measures = json.loads((tmp_path / "r.json").read_text())["token_selection"]
    assert measures["images"] == 20
    for rate in RATES:
        name = f"object_kept@{rate}"
        assert 0 <= measures[f"{name}_low"] <= measures[name] <= measures[f"{name}_high"] <= 1
    assert measures["chance_object_kept@0.7"] > measures["chance_object_kept@0.5"] > 0
    assert "object kept at keep rate 0.5" in " ".join(done.stdout.split())
    for setting, code, message in (
        ("eval.token_selection.box=other", 0, "has a box in json field other"),
        ("eval.token_selection.keep_rates=[0]", 2, "keep_rates=[0.0] must be numbers in (0, 1]"),
    ):
        done = invoke("eval", tagger.path, *arguments, setting, f"data.root={boxed}")
        assert done.exit_code == code and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_model_that_keeps_all_tokens_keeps_the_whole_object(boxed: Path, tmp_path: Path) -> None:
    settings = "train.samples=12", "hashtag.min_count=1", "model.reduce=none"
    artifact = train("hashtag", boxed, tmp_path / "run", *settings)
    arguments = "eval.token_selection.shards=heldout", f"data.root={boxed}"
    done = invoke("eval", artifact.path, *arguments, "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.stderr
    measures = json.loads((tmp_path / "r.json").read_text())["token_selection"]
    assert measures["object_kept@1"] == measures["chance_object_kept@1"] == 1


def test_pictures_without_a_box_are_left_out(tagger: Artifact, tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for number, box in enumerate(([0.2, 0.2, 0.6, 0.6], None)):
        sample = picture(32, 32, box)
        files |= {f"{number}.{ending}": content for ending, content in sample.files.items()}
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "0.tar", files)
    setting = f"eval.token_selection.shards={tmp_path / 'set'}"
    done = invoke("eval", tagger.path, setting, "--out", str(tmp_path / "r.json"))
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["token_selection"]["images"] == 1
