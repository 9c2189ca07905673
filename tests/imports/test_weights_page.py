"""The commands of docs/weights.md, as a user types them, with small released weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process import invoke
from released import of_transformers
from shards import photo
from test_readme import DOCS, blocks, commands

# Settings of seconds, added to the page's own.
SHORT = ("data.blocks=[{source: images, samples: 4}]", "data.workers=0", "data.root=mine")


def test_the_page_about_weights(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = of_transformers(tmp_path / "source", "SiglipModel").folder
    shutil.copytree(few / "photos", "mine/images")
    shutil.copytree(few / "heldout", "val")
    for number in range(6):
        pet = Path("pets", "cat" if number % 2 else "dog", f"{number}.jpg")
        pet.parent.mkdir(parents=True, exist_ok=True)
        pet.write_bytes(photo(number))
    block = blocks((DOCS / "weights.md").read_text("utf-8"), "")[0]
    calls = list(commands(f"```\n{block}```\n"))
    order = ["import", "search", "compare", "train", "merge", "export", "push"]
    assert [call[0] for call in calls] == order
    for call in calls[:-1]:  # the hub has tests of its own
        own = [str(source) if word.startswith("google/") else word for word in call]
        own = [word.replace("/data/val", "val").replace("/data/pets", "pets") for word in own]
        own = [word.replace("0:1:.1", "0:1:.5") for word in own]
        own = [str(few / "photos") if word == "photos" else word for word in own]
        own = ["models/siglip" if word == "runs/mine/clip" else word for word in own]
        own += {"train": SHORT, "compare": ("--suite", "retrieval")}.get(call[0], ())
        if call[0] == "compare":
            shutil.copytree("models/siglip", "models/other")
            own[own.index("models/siglip", 2)] = "models/other"
        done = invoke(*own)
        assert done.exit_code == 0, (own, done.output, done.stderr)
    assert Path("exported/config.json").is_file() and Path("merged/merge.html").is_file()
