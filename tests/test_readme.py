"""What the README shows is true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from xray.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_python_of_the_readme_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
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
