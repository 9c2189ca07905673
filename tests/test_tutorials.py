"""The commands of the tutorial about photos, as a user types them, on a few small photos."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from in_process import invoke
from test_readme import DOCS, blocks, commands

from data_pipelines.shards.tar_index import index_shard

# A run of seconds: the settings that are added to the tutorial's own.
SHORT = (
    *("mae.train.samples=8", "hashtag.train.samples=8", "clip.train.samples=8"),
    *("data.blocks=[{source: images, samples: 4}]", "hashtag.min_count=1", "data.workers=0"),
    "clip.captions=1",
)


def write_photos(demo: Path, folder: Path, numbers: range) -> None:
    """Write photos with captions beside them, as a user has them."""
    folder.mkdir()
    shard = index_shard(min((demo / "photos").glob("*.tar")))
    for number in numbers:
        files = shard.read(number, ("jpg", "txt"))
        for ending, content in files.items():
            (folder / f"photo {number}.{ending}").write_bytes(content)


def test_the_tutorial_about_photos(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(demo, tmp_path / "photos", range(8))
    write_photos(demo, tmp_path / "photos_val", range(8, 12))
    monkeypatch.chdir(tmp_path)
    calls = list(commands("\n".join(re.findall(r"```\n.*?```", page("photos"), re.DOTALL))))
    assert [call[0] for call in calls].count("run") == 2
    for call in calls:
        extra = SHORT if call[0] == "run" else ()
        done = invoke(*call, *extra)
        assert done.exit_code == 0, (call, done.output, done.stderr)
    assert "text to image R@1" in Path("runs/small/report.html").read_text("utf-8")
    assert Path("stats.html").is_file() and Path("found.html").is_file()


def test_the_recipe_of_the_tutorial_about_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks(page("adapt"), "yaml")
    Path("adapt.yaml").write_text(recipe, "utf-8")
    planned = [call for call in commands(page("adapt")) if call[0] == "run"]
    assert len(planned) >= 3
    for call in planned:
        done = invoke(*call, *(() if "--plan" in call else ("--plan",)))
        assert done.exit_code == 0 and "clip" in done.output, (call, done.output, done.stderr)


def page(name: str) -> str:
    return (DOCS / "tutorials" / f"{name}.md").read_text("utf-8")
