"""Settings that a new run decides when it begins, and that older runs keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from export_checks import rewritten
from run_comparison import assert_same
from tiny import settings, train
from two_process import halfway

from xray.artifacts.artifact import open_artifact
from xray.artifacts.encoders import VisionEncoder, restore_decoder
from xray.training.run import holds_another_run


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
