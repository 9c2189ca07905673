"""Released weights that are opened by name: imported once, also by commands that run together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from released import of_backbone, of_sentences

from xray.imports import cached


def test_two_that_open_the_same_weights_share_one_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = of_backbone(tmp_path / "released", "ViTModel").folder
    both, make_folder = threading.Barrier(2, timeout=60), cached.make_folder

    def make_together(*args: object) -> None:  # both have seen that there is no import yet
        make_folder(*args)  # type: ignore[arg-type]
        both.wait()

    monkeypatch.setattr(cached, "make_folder", make_together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(cached.open_model, [str(folder)] * 2)
    assert first.path == second.path and first.digest == second.digest
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def test_encoders_that_differ_in_pooling_have_imports_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders = [of_sentences(tmp_path / name, name).folder for name in ("cls", "mean")]
    one, other = (cached.open_model(str(folder)).manifest for folder in folders)
    assert one["config"]["text"]["pooling"] == "cls" != other["config"]["text"]["pooling"]
