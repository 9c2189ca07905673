"""The notebook of the first ten minutes runs from its first cell to its last, on tiny sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_code import ROOT

NOTEBOOK = ROOT / "tools" / "notebooks" / "first_ten_minutes.ipynb"


def cells() -> list[dict[str, Any]]:
    """The code cells."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def with_sizes(source: str, **sizes: int) -> str:
    """The cell of parameters with other numbers."""
    for name, value in sizes.items():
        source, count = re.subn(rf"^{name} = \d+", f"{name} = {value}", source, flags=re.MULTILINE)
        assert count == 1, name
    return source


def test_outputs_are_not_committed() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells())


def test_all_cells_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tmp_path / "bin" / "xray"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m xray "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    names: dict[str, Any] = {}
    printed = ""
    for number, cell in enumerate(cells()):
        source = "".join(cell["source"])
        if cell["metadata"].get("tags") == ["parameters"]:
            source = with_sizes(source, DRAWN=120, SAMPLES=96)
        if source.startswith("%%bash\n"):
            script = ["bash", "-e", "-c", source.removeprefix("%%bash\n")]
            done = subprocess.run(script, capture_output=True, text=True)
            assert done.returncode == 0, f"cell {number}: {done.stderr}"
            printed += done.stdout
        else:
            exec(compile(source, f"cell {number}", "exec"), names)
    printed += capsys.readouterr().out
    for words in (
        "120 pictures with captions",
        "108 samples in",
        "text to image R@1",
        "found.html",
    ):
        assert words in printed, printed
    assert {"found.html", "val.parquet", "runs"} <= {path.name for path in Path().iterdir()}
    assert names["images"].shape == names["texts"].shape == (3, 128)
