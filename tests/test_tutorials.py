"""The commands of the tutorial about photos, as a user types them, on a few small photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import invoke
from test_readme import DOCS, blocks, commands

from data_pipelines.shards.tar_index import index_shard

# A run of seconds: the settings that are added to the tutorial's own.
SHORT = (
    *(f"{stage}.train.samples=8" for stage in ("mae", "hashtag", "text", "clip")),
    *("data.blocks=[{source: images, samples: 4}]", "hashtag.min_count=1", "data.workers=0"),
    "text.data.blocks=[{source: images, samples: 4}]",
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
    write_photos(demo, tmp_path / "photos", range(32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = page("photos").partition("## Next steps")[0]
    calls = list(commands(text))
    assert [call[0] for call in calls] == ["init", "run", "search", "init", "data"]
    for call in (calls[4], *calls[:3]):
        extra = SHORT if call[0] == "run" else ()
        done = invoke(*call, *extra)
        assert done.exit_code == 0, (call, done.output, done.stderr)
    assert len(list(Path("photos_shards/val").glob("*.tar"))) == 1
    results = json.loads(Path("runs/mine/results.json").read_text("utf-8"))
    assert results["retrieval"]["images"] == 6 and "overlap" not in results
    assert "text to image R@1" in Path("runs/mine/report.html").read_text("utf-8")
    assert Path("stats.html").is_file() and Path("found.html").is_file()


def test_the_recipes_of_the_tutorial_about_pretrained_weights(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(demo, tmp_path / "photos", range(32))
    monkeypatch.chdir(tmp_path)
    (recipe,) = blocks(page("adapt"), "yaml")
    Path("adapt_mine.yaml").write_text(recipe, "utf-8")
    planned = [call for call in commands(page("adapt")) if call[0] in ("init", "run")]
    assert [call[0] for call in planned] == ["init", *["run"] * 5]
    for call in planned:
        plan = call[0] == "run" and "--plan" not in call
        done = invoke(*call, *(["--plan"] if plan else []))
        assert done.exit_code == 0 and "clip" in done.output, (call, done.output, done.stderr)


def page(name: str) -> str:
    return (DOCS / "tutorials" / f"{name}.md").read_text("utf-8")
