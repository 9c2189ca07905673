"""The settings that an error advises are valid in the command that prints it: they are run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from child_process import RECIPE
from clips import film
from in_process import invoke
from shards import photo, write_tar

from xray.errors import DataError
from xray.recipes.recipe import load_recipe
from xray.recipes.run import preflight
from xray.training.deepspeed_setup import init_distributed

SETTING = re.compile(r"(?<![\w.])([a-z_]+(?:\.[a-z_]+)*=[\w\[\].,]+)")
WORDS = {"caption": "a dog #runs"}


def advised(error: str) -> list[list[str]]:
    """Return the settings of each way out that an error names."""
    ways = [SETTING.findall(way) for way in error.rpartition(": ")[2].split(", or ")]
    return [way for way in ways if way and ("set " in error or "with " in error)]


def shards(folder: Path, facts: Mapping[str, object], clips: bool = False, count: int = 6) -> Path:
    folder.mkdir()
    files = {}
    for number in range(count):
        media = film(frames=4 + number) if clips else photo(number)
        files[f"{number}.{'mp4' if clips else 'jpg'}"] = media
        files[f"{number}.json"] = json.dumps(facts).encode()
    write_tar(folder / "0.tar", files)
    return folder


@pytest.mark.parametrize(
    ("facts", "settings", "what", "ways"),
    [
        (WORDS, [], r"none of the 6 samples of x has tags in the json field 'hashtags'", 2),
        ({"caption": "a dog"}, ["tags=caption_hashtags"], "has a #hashtag in its captions", 1),
        ({"hashtags": ["a"]}, ["tags=caption_words"], "has a caption, and tags=caption_words", 1),
        ({"label_name": "dog"}, ["tags=caption_words"], "has a caption, and tags=", 1),
        ({"label_name": "dog"}, [], "has tags in the json field 'hashtags'", 1),
        (WORDS, ["tags=hashtags", "field=other"], "in the json field 'other'", 2),
        ({"hashtags": ["a"]}, ["min_count=50"], r"\(6 of 6 have a tag\): set min_count=6", 1),
        ({"hashtags": ["tbt"]}, ["min_count=1"], r"have a tag\): set stop=none", 1),
    ],
)
def test_data_tags(
    tmp_path: Path, facts: Mapping[str, object], settings: Sequence[str], what: str, ways: int
) -> None:
    folder, out = shards(tmp_path / "x", facts), f"--out={tmp_path / 'v.json'}"
    refused = invoke("data", "tags", folder, out, *settings)
    assert refused.exit_code == 2 and re.search(what, refused.stderr), refused.stderr
    found = advised(refused.stderr)
    assert len(found) == ways, refused.stderr
    for way in found:
        keys = {setting.partition("=")[0] for setting in way}
        kept = [own for own in settings if own.partition("=")[0] not in keys]
        done = invoke("data", "tags", folder, out, *kept, *way)
        assert done.exit_code == 0, (way, done.stderr)


def checked(demo: Path, out: Path, *settings: str) -> None:
    recipe = load_recipe(RECIPE, [f"data.root={demo}", f"out={out}", *settings])
    init_distributed(torch.device("cpu"))
    preflight(recipe.runs, recipe.eval, recipe.root)


@pytest.mark.parametrize(
    ("facts", "stages", "settings", "what", "ways"),
    [
        (
            {"hashtags": ["dog"]}, "mae,hashtag",
            ["data.sources.clips.tags=caption_words"],
            "none of the 6 samples of clips has a caption, and data.sources.clips.tags=caption_wor",
            2,
        ),
        ({}, "mae,hashtag", [], "clips has tags in the json field 'hashtags'", 1),
        ({}, "mae,clip", [], "of source 'clips' has a caption .no caption.: pack them again", 1),
        (
            {"hashtags": ["dog"]}, "mae,hashtag",
            ["hashtag.min_count=999", "data.modalities=[image]"],
            r"no tag occurs in 999 samples of photos .*: set hashtag.min_count=", 1,
        ),
    ],
)  # fmt: skip
def test_recipes(
    demo: Path,
    tmp_path: Path,
    facts: Mapping[str, object],
    stages: str,
    settings: Sequence[str],
    what: str,
    ways: int,
) -> None:
    clips = shards(tmp_path / "clips", facts, clips=True)
    given = f"stages=[{stages}]", f"data.sources.clips.shards={clips}", *settings
    with pytest.raises(DataError, match=what) as caught:
        checked(demo, tmp_path / "run", *given)
    found = advised(str(caught.value))
    assert len(found) == ways, str(caught.value)
    for way in found:
        checked(demo, tmp_path / "run", *given, *way)


def test_a_missing_list_of_concepts(demo: Path, tmp_path: Path) -> None:
    refused = invoke("data", "tags", demo / "photos", "tags=concepts")
    assert refused.stderr.startswith("xray: concepts is not set: "), refused.stderr
    with pytest.raises(Exception, match=r"^hashtag.concepts is not set"):
        checked(demo, tmp_path / "run", "stages=[mae,hashtag]", "data.sources.photos.tags=concepts")
    (tmp_path / "list.txt").write_text("circle\nsquare\nstar\n")
    key = f"concepts={tmp_path / 'list.txt'}"
    out = f"--out={tmp_path / 'v.json'}"
    assert invoke("data", "tags", demo / "photos", "tags=concepts", key, out).exit_code == 0
    checked(
        demo, tmp_path / "run", "stages=[mae,hashtag]", f"hashtag.{key}",
        "data.sources.photos.tags=concepts",
    )  # fmt: skip
