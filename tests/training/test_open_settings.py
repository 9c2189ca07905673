"""Settings that a new run decides when it begins, and that older runs keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_checks import rewritten
from run_comparison import assert_same
from safetensors.torch import save_file
from tiny import SMALL, settings, train
from two_process import halfway

from stages.hashtag import HashtagStage
from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_decoder, vision_encoder
from xray.config import ModelConfig
from xray.config.data import IMAGENET
from xray.errors import ConfigError
from xray.models.backbone import VisionBackbone
from xray.models.normalisation import normalisation_of
from xray.training.run import Run
from xray.training.run_record import holds_another_run


def recorded(run: Path, section: str) -> dict[str, Any]:
    """Read a section of a run's record."""
    values: dict[str, Any] = json.loads((run / "run.json").read_text())["config"][section]
    return values


def made_older(run: Path, section: str, *keys: str) -> None:
    """Remove keys from a run's record and config, as in files of a version that lacked them."""
    record = json.loads((run / "run.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in keys:
        del record["config"][section][key], config[section][key]
    (run / "run.json").write_text(json.dumps(record))
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_new_run_has_the_positions_of_mae_and_an_older_one_its_own(
    demo: Path, tmp_path: Path
) -> None:
    new = train("mae", demo, tmp_path / "new", "train.samples=12").path
    assert recorded(tmp_path / "new", "model")["sincos"] == "columns"
    whole = tmp_path / "whole"
    train("mae", demo, whole, "model.sincos=rows")
    older = halfway(whole, tmp_path / "older")
    made_older(older, "model", "sincos")
    assert not holds_another_run(settings("mae", demo, older))
    assert holds_another_run(settings("mae", demo, older, "model.sincos=columns"))
    resumed = train("mae", demo, older)
    assert resumed.manifest["config"]["model"]["sincos"] == "rows"
    assert_same(whole, older, exact=True)
    # an artifact without the key has the positions of its time in the decoder
    config = json.loads(json.dumps(open_artifact(new).manifest["config"]))
    del config["model"]["sincos"]
    old = rewritten(new, tmp_path / "artifact", config, {}).path
    for path, first in ((new, False), (old, True)):
        artifact = open_artifact(path)
        decoder = restore_decoder(artifact, VisionEncoder(artifact).vision)
        assert decoder.rows_first is first


def test_a_mirrored_run_keeps_its_settings(demo: Path, tmp_path: Path) -> None:
    given = ("train.samples=36", f"train.mirror=file://{tmp_path}/bucket")
    train("mae", demo, tmp_path / "run", *given, "model.sincos=rows")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "bucket" / "mae" / "artifact")
    train("mae", demo, tmp_path / "run", *given)
    assert recorded(tmp_path / "run", "model")["sincos"] == "rows"


HALF = [0.5, 0.5, 0.5]
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    """A file of weights, alone in its folder."""
    torch.manual_seed(0)
    model = SMALL["model"]
    vit = VisionBackbone(ModelConfig(model["name"], model["kwargs"]), 32, 1)
    state = {name: tensor.contiguous() for name, tensor in vit.state_dict().items()}
    path = tmp_path / "weights" / "model.safetensors"
    path.parent.mkdir()
    save_file(state, path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"architecture": "x", "pretrained_cfg": {"mean": CLIP[0], "std": CLIP[1]}}),
        ("config.json", {"stage": "mae", "data": {"mean": CLIP[0], "std": CLIP[1]}}),
        ("preprocessor_config.json", {"image_mean": CLIP[0], "image_std": CLIP[1]}),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": CLIP[0], "std": CLIP[1]}}),
    ],
)
def test_mean_and_std_are_read_beside_a_file(
    name: str, content: dict[str, Any], tmp_path: Path
) -> None:
    for pretrained in (str(tmp_path / "model.safetensors"), f"local-dir:{tmp_path}"):
        config = ModelConfig(pretrained=pretrained)
        (tmp_path / name).unlink(missing_ok=True)
        assert normalisation_of(config) is None
        for broken in ("[]", "{", json.dumps({"mean": [1, 2], "std": "x"})):
            (tmp_path / name).write_text(broken)
            assert normalisation_of(config) is None
        (tmp_path / name).write_text(json.dumps(content))
        assert normalisation_of(config) == CLIP


def test_mean_and_std_of_released_weights_are_those_of_timm() -> None:
    for name, pretrained, expected in (
        ("vit_base_patch16_siglip_224", "timm", (HALF, HALF)),
        ("vit_base_patch16_clip_224.openai", "timm", CLIP),
        ("anything", "hf-hub:timm/vit_base_patch16_224.mae", IMAGENET),
        ("anything", "hf-hub:timm/vit_base_patch16_clip_224.openai", CLIP),
    ):
        found = normalisation_of(ModelConfig(name=name, pretrained=pretrained))
        assert found == expected, pretrained


def test_a_run_takes_mean_and_std_from_its_weights(
    demo: Path, tmp_path: Path, tower: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ("train.samples=24", f"model.pretrained={tower}")
    # a file alone: those of timm's weights of the model
    train("mae", demo, tmp_path / "alone", *given)
    assert recorded(tmp_path / "alone", "data")["mean"] == HALF
    assert "no file beside" in caplog.text and "vit_tiny_patch16_224" in caplog.text
    imagenet = (f"data.mean={IMAGENET[0]}", f"data.std={IMAGENET[1]}")
    older = tmp_path / "older"  # as a version that did not look at the weights
    train("mae", demo, older, *given, *imagenet)
    facts = {"pretrained_cfg": {"mean": CLIP[0], "std": CLIP[1]}}
    (tower.parent / "config.json").write_text(json.dumps(facts))
    artifact = train("mae", demo, tmp_path / "run", *given)
    assert [recorded(tmp_path / "run", "data")[key] for key in ("mean", "std")] == list(CLIP)
    encoder = vision_encoder(artifact)
    assert encoder.normalize.mean.flatten().tolist() == pytest.approx([255 * x for x in CLIP[0]])
    with pytest.raises(
        ConfigError, match=r"data.mean=\[0.485.* are not those of model.pretrained="
    ) as error:
        train("mae", demo, tmp_path / "refused", *given, *imagenet)
    assert "\n" not in str(error.value) and not (tmp_path / "refused").exists()
    # a run that exists keeps what it has, however it is asked
    for settings_now in ((), imagenet):
        shutil.rmtree(older / "artifact")
        assert not holds_another_run(settings("mae", demo, older, *given, *settings_now))
        train("mae", demo, older, *given, *settings_now)
        assert recorded(older, "data")["mean"] == IMAGENET[0]
    # and a stage that starts from an artifact takes the artifact's
    parent = [artifact.path]
    child = train("hashtag", demo, tmp_path / "child", "train.samples=24", init_from=parent)
    assert child.manifest["config"]["data"]["mean"] == CLIP[0]
    caplog.clear()
    train("hashtag", demo, tmp_path / "other", "train.samples=24", *imagenet, init_from=parent)
    assert f"are not those of {artifact.path}" in caplog.text


def test_without_weights_mean_and_std_are_those_of_imagenet(demo: Path, tmp_path: Path) -> None:
    train("text", demo, tmp_path / "run", "model.pretrained=timm", "train.samples=24")
    data = recorded(tmp_path / "run", "data")
    assert (data["mean"], data["std"]) == IMAGENET
    with pytest.raises(ConfigError, match="must have three numbers each, std above 0"):
        settings("mae", demo, tmp_path, "data.std=[0, 0, 0]")


def test_a_stage_prepares_pictures_as_its_parent(demo: Path, tmp_path: Path) -> None:
    own = ("data.resize=squash", "data.interpolation=bilinear", "train.samples=12")
    parent = [train("mae", demo, tmp_path / "parent", *own).path]
    for name, given, expected in (
        ("child", (), ("squash", "bilinear", 1.0)),
        ("changed", ("data.crop_pct=0.9",), ("squash", "bilinear", 0.9)),
        ("other", ("data.resize=crop",), ("crop", "bicubic", 1.0)),
    ):
        config = settings("hashtag", demo, tmp_path / name, *given)
        config.init_from = [str(path) for path in parent]
        run = Run.open(HashtagStage, config)
        run.settle(torch.device("cpu"))
        data = run.record["config"]["data"]
        keys = {"resize": "crop", "interpolation": "bicubic", "crop_pct": 1.0}
        assert tuple(data.get(key, usual) for key, usual in keys.items()) == expected
    # the same command finds its run again, also one whose parent set what has a usual value
    share = [train("mae", demo, tmp_path / "share", *own, "data.crop_pct=0.9").path]
    for number, given in enumerate((parent, share)):
        out = tmp_path / f"again{number}"
        made = [train("hashtag", demo, out, "train.samples=12", init_from=given) for _ in "12"]
        assert made[0].digest == made[1].digest
        again = settings("hashtag", demo, out, "train.samples=12")
        again.init_from = [str(path) for path in given]
        assert not holds_another_run(again)
    # a run without the key cropped, and goes on
    older = halfway(tmp_path / "parent", tmp_path / "older")
    made_older(older, "data", "resize", "interpolation")
    assert not holds_another_run(settings("mae", demo, older, "train.samples=12"))
    assert holds_another_run(settings("mae", demo, older, *own))
