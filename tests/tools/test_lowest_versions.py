"""The lower bounds of setup.cfg, as `make test-lowest` installs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from source_code import ROOT

from tools.lowest_versions import lowest

TOOL = ROOT / "tools" / "lowest_versions.py"


def test_every_requirement_has_its_bound() -> None:
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, check=True)
    pins = {r.name: r.specifier for r in map(Requirement, done.stdout.split())}
    assert {"torch", "transformers", "fsspec", "pytest", "onnxscript"} <= pins.keys()
    declared = [
        Requirement(line)
        for line in map(str.strip, (ROOT / "setup.cfg").read_text().splitlines())
        if ">=" in line and not line.startswith(("#", "python_requires"))
    ]
    for requirement in declared:
        assert [s.operator for s in requirement.specifier if s.operator != "<"] == [">="]
        if (specifier := pins.get(requirement.name)) is not None:
            (pin,) = specifier
            assert pin.operator == "==" and requirement.specifier.contains(pin.version)
            (bound,) = (s for s in requirement.specifier if s.operator == ">=")
            assert Version(pin.version) == Version(bound.version)
    assert {r.name for r in declared} - pins.keys() == {"ray", "wandb"}  # in no test


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("torch", "no lower bound"),
        ("torch<3", "no lower bound"),
        ("numpy>=1.0", "two lower bounds"),
    ],
)
def test_a_requirement_that_cannot_be_tried(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "setup.cfg"
    text = (ROOT / "setup.cfg").read_text()
    file.write_text(text.replace("install_requires =\n", f"install_requires =\n    {line}\n"))
    with pytest.raises(ValueError, match=message):
        lowest(file)
