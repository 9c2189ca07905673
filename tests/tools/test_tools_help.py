"""Tests that every tool prints its help."""

from __future__ import annotations

import importlib
import sys

import pytest
from source_code import ROOT, files

TOOLS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in files("tools")
    if '__name__ == "__main__"' in path.read_text()
]


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_prints_its_help(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(tool).main()
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_there_are_tools() -> None:
    assert len(TOOLS) > 10
