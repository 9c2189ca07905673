"""A user's own files become a trained model: pack, check, train."""

from __future__ import annotations

from pathlib import Path

from child_process import RECIPE
from in_process import invoke
from shards import photo


def test_a_folder_of_photos_becomes_a_model(demo: Path, tmp_path: Path) -> None:
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
