"""The photos of the experiment with few captions: who has captions, and how noisy hashtags are."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards import jpeg, write_tar

from tools.experiments.scarce_data import DROPPED, main

WORDS = [f"{first}{second}og" for first in "bcdfghjklm" for second in "aeiou"]
PHOTOS, HELD_OUT = 240, 40
PICTURE = jpeg()


def content(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the metadata of all samples of a folder of shards, by key."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            members = [(member.name, shard.extractfile(member)) for member in shard]
            read = {name: file.read() for name, file in members if file}
        keys = [name.removesuffix(".json") for name in read if name.endswith(".json")]
        assert all(read[f"{key}.jpg"] == PICTURE for key in keys)
        found |= {key: json.loads(read[f"{key}.json"]) for key in keys}
    return found


@pytest.fixture(scope="module")
def captions() -> dict[str, list[str]]:
    """Two captions of five other words for each photo."""
    rng = np.random.default_rng(0)
    draws = (rng.choice(WORDS, 10, replace=False) for _ in range(PHOTOS))
    return {f"{n:04d}": [" ".join(d[:5]), " ".join(d[5:])] for n, d in enumerate(draws)}


@pytest.fixture(scope="module")
def scarce(captions: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scarce")
    files: dict[str, bytes] = {}
    for key, own in captions.items():
        files[f"{key}.jpg"] = PICTURE
        files[f"{key}.json"] = json.dumps({"captions": own}).encode()
    write_tar(folder / "photos" / "0.tar", files)
    given = [str(folder / "photos"), str(folder / "out"), "--captioned", "20", "60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["scarce_data", *given, "--held-out", str(HELD_OUT)])
        main()
    return folder / "out"


def test_captions_are_nested_and_held_out_photos_are_nowhere_else(
    scarce: Path, captions: dict[str, list[str]]
) -> None:
    names = ("20", "60", "all")
    few, more, all_photos = (content(scarce / "captioned" / name) for name in names)
    assert list(map(len, (few, more, all_photos))) == [20, 60, PHOTOS - HELD_OUT]
    assert set(few) < set(more) < set(all_photos)
    held_out = content(scarce / "held_out")
    assert set(held_out) == {*captions} - {*all_photos} == {*list(captions)[-HELD_OUT:]}
    every = [*few.items(), *held_out.items()]
    assert all(own == {"captions": captions[key]} for key, own in every)


def test_hashtags_are_words_of_one_caption_with_the_stated_shares(
    scarce: Path, captions: dict[str, list[str]]
) -> None:
    clean = content(scarce / "tagged/noise_0")
    assert len(clean) == PHOTOS - HELD_OUT
    chosen = []
    for key, own in clean.items():
        assert own == {"hashtags": own["hashtags"], "tag_text": " ".join(own["hashtags"])}
        options = [caption.split() for caption in captions[key]]
        chosen.append(next(words for words in options if set(own["hashtags"]) <= set(words)))
    kept = sum(len(own["hashtags"]) for own in clean.values()) / sum(map(len, chosen))
    assert kept == pytest.approx(1 - DROPPED, abs=0.05)
    for percent in (20, 40):
        noisy = content(scarce / f"tagged/noise_{percent}")
        pairs = [(noisy[key]["hashtags"], own["hashtags"]) for key, own in clean.items()]
        stays = sum(len(set(one) & set(two)) for one, two in pairs)
        share = stays / sum(len(two) for _, two in pairs)
        # a random tag is one of the four others with probability 4/50
        assert share == pytest.approx(1 - percent / 100 * (1 - 0.08), abs=0.05)
