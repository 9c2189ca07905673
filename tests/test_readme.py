"""What the README shows is true."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from xray.commands.main import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def code_with(words: str) -> str:
    """The one Python block that has these words."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if words in c]
    return str(code)


def test_the_model_of_the_readme_runs(
    control: Path, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(media, tmp_path, dirs_exist_ok=True)
    shutil.copytree(control, tmp_path / "runs" / "quickstart" / "clip")
    monkeypatch.chdir(tmp_path)
    code, names = code_with("xray.load"), dict[str, Any]()
    assert len(code.strip().splitlines()) <= 12
    exec(code, names)
    assert names["images"].shape == names["texts"].shape == (2, 16)
    assert names["clips"].shape == names["features"].shape == (1, 16)
    assert names["pixels"].shape == (3, 32, 32)
    assert not torch.equal(names["features"], names["images"][:1])  # of fewer tokens


def test_the_backbone_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    exec(code_with("VisionBackbone"), names)
    tokens = names["tokens"]
    assert tokens.cls.shape == (1, 384) and tokens.patches.shape == (1, 497, 384)
    assert [a.shape for a in tokens.assign] == [(1, 1440)] * 3
    assert tokens.dense().shape == (1, 1440, 384) and names["vit"].reduce_at == [3, 6, 9]


def test_files_the_readme_names_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).is_file(), link


def test_commands_of_the_readme_exist() -> None:
    commands = set(re.findall(r"^(?:torchrun .* -m )?xray (\w+)", README, re.MULTILINE))
    assert {"run", "train", "show", "eval", "lineage"} <= commands
    for command in commands:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command
