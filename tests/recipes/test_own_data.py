"""A user's own files become a trained model: pack, check, train."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from child_process import RECIPE
from in_process import invoke
from shards import photo


def test_a_folder_of_photos_becomes_a_model(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    (mine / "holiday").mkdir(parents=True)
    for i in range(40):
        folder = mine / "holiday" if i % 2 else mine
        (folder / f"IMG {i}.JPG").write_bytes(photo(i, (90, 70)))
        (folder / f"IMG {i}.txt").write_text(f"picture number {i}\nanother text about {i}\n")
    (mine / "broken.jpg").write_bytes(photo(1)[:300])
    shards = tmp_path / "shards"
    packed = invoke("data", "pack", str(mine), str(shards), "short_side=48", "per_shard=15")
    assert packed.exit_code == 0, packed.stderr
    assert "40 samples in 3 shards" in packed.stdout and "undecodable image: 1" in packed.stdout
    again = invoke("data", "pack", str(mine), str(shards), "short_side=48", "per_shard=15")
    assert "3 of them already there" in again.stdout, again.stdout
    checked = invoke("data", "check", str(shards))
    assert checked.exit_code == 0, checked.stdout + checked.stderr
    run = invoke(
        "run", RECIPE, "stages=[mae,text,clip]", f"data.root={demo}", f"out={tmp_path / 'run'}",
        "data.modalities=[image]", f"data.sources.photos.shards={shards}",
    )  # fmt: skip
    assert run.exit_code == 0, run.stderr
    assert (tmp_path / "run" / "clip" / "artifact" / "manifest.json").is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = [line for line in run.stdout.splitlines() if line.startswith("next: xray")]
    search, show, _ = (shlex.split(line.removeprefix("next: xray"), comments=True) for line in told)
    found = invoke(*search)
    assert found.exit_code == 0, found.stderr
    assert f"{shards}: embedded 40 samples once" in found.stdout and "IMG " in found.stdout
    assert "a dog" in Path("found.html").read_text()
    assert "embedded" not in invoke(*search).stdout  # the second time
    picture = str(mine / "IMG 0.JPG")
    shown = invoke(*(picture if word == "PICTURE" else word for word in show))
    assert shown.exit_code == 0 and Path("show.png").is_file(), shown.stderr


def test_a_run_is_evaluated_on_the_samples_that_its_sources_hold_out(
    demo: Path, tmp_path: Path
) -> None:
    mine, shards = tmp_path / "mine", tmp_path / "shards"
    mine.mkdir()
    for i in range(40):
        (mine / f"IMG {i}.jpg").write_bytes(photo(i, (90, 70)))
        (mine / f"IMG {i}.txt").write_text(f"picture number {i}\nanother text about {i}\n")
    packed = invoke("data", "pack", str(mine), str(shards), "val=0.15")
    assert "6 samples held out for validation" in packed.stdout
    recipe = yaml.safe_load(Path(RECIPE).read_text())
    recipe["eval"] = {"held_out": True}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    settings = f"data.root={demo}", f"out={tmp_path / 'run'}", "data.modalities=[image]"
    source = f"data.sources.photos={{shards: {shards}, tags: caption_words}}"
    run = invoke("run", str(tmp_path / "mine.yaml"), "stages=[hashtag,clip]", *settings, source)
    assert run.exit_code == 0, run.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"retrieval", "tags"} and results["retrieval"]["images"] == 6
    assert results["retrieval"]["texts"] == 12 and "overlap" not in run.stdout
    assert "text to image R@1" in run.stdout and "photos mAP" in run.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Images retrieved for captions" in page and "text to image R@1" in page
    artifact = tmp_path / "run" / "clip" / "artifact"
    again = invoke("eval", artifact, "eval.held_out=true", "--suite=retrieval", f"--out={tmp_path}")
    assert again.exit_code == 0, again.stderr
    assert json.loads((tmp_path / "results.json").read_text())["retrieval"] == results["retrieval"]
    models = tmp_path / "run/hashtag/artifact", artifact
    both = invoke("compare", *models, "eval.held_out=true", f"--out={tmp_path / 'both.json'}")
    assert both.exit_code == 0, both.stderr
    of_tags, of_clip = (
        model["results"]
        for model in json.loads((tmp_path / "both.json").read_text())["models"].values()
    )
    assert of_clip["retrieval"] == results["retrieval"] and "retrieval" not in of_tags
    assert of_tags["tags"] == results["tags"]


def test_img2dataset_and_video2dataset_shards_train_unchanged(
    demo: Path, shared_data: Path, tmp_path: Path
) -> None:
    images, clips = shared_data / "captions_val", shared_data / "actions_val"
    for folder in (images, clips):
        checked = invoke("data", "check", str(folder))
        assert checked.exit_code == 0, checked.stdout + checked.stderr
    run = invoke(
        "run", RECIPE, "stages=[mae,hashtag]", f"data.root={demo}", f"out={tmp_path / 'run'}",
        f"data.sources.photos.shards={images}", "data.sources.photos.tags=caption_words",
        f"data.sources.clips.shards={clips}",
    )  # fmt: skip
    assert run.exit_code == 0, run.stderr
    assert (tmp_path / "run" / "hashtag" / "artifact" / "manifest.json").is_file()
