"""The Dockerfiles: what they copy exists and installs xray, and they run as a plain user.

No image is built here. These tests read the files.
"""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest
from source_code import ROOT

FILES = sorted((ROOT / "tools" / "docker").glob("Dockerfile.*"))
IMAGES = [path for path in FILES if path.suffix in (".cpu", ".cuda")]
each_image = pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.suffix[1:])


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, without comments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)]


def copied(path: Path) -> set[str]:
    """The files and folders of the repository that an image gets."""
    rows = [rest.split() for name, rest in instructions(path) if name == "COPY"]
    return {item for row in rows if not row[0].startswith("--from") for item in row[:-1]}


def test_there_is_one_for_the_cpu_and_one_for_cuda() -> None:
    assert [path.suffix for path in IMAGES] == [".cpu", ".cuda"]


@each_image
def test_files_exist_and_are_all_that_an_installation_needs(path: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    packages = config["options.packages.find"]["include"].replace("*", "").split()
    build = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert copied(path) == {*packages, *build}
    assert all((ROOT / name).exists() for name in copied(path))
    ignored = path.with_name(f"{path.name}.dockerignore").read_text().split()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line[0] == "!"} == copied(path)


@each_image
def test_the_base_is_pinned_and_the_user_is_not_root(path: Path) -> None:
    rows = instructions(path)
    bases = {rest.split()[0] for name, rest in rows if name == "FROM"}
    assert len(bases) == 1 and re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases.pop())
    last = [name for name, _ in rows].index("FROM", 1)
    names = [name for name, _ in rows[last:]]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name == "RUN")
    assert [rest for name, rest in rows if name == "USER"] == ["xray"]
    assert json.loads(dict(rows)["ENTRYPOINT"]) == ["xray"]


@each_image
def test_torch_is_installed_as_setup_cfg_asks_before_xray(path: Path) -> None:
    installs = [rest for name, rest in instructions(path) if name == "RUN" and "pip " in rest]
    setup = (ROOT / "setup.cfg").read_text()
    needed = re.findall(r'"((?:torch|torchvision)>=[\d.]+)"', installs[0])
    assert len(needed) == 2 and all(f"    {line}\n" in setup for line in needed)
    assert ("whl/cpu" in installs[0]) == (path.suffix == ".cpu")
    assert installs[1:] == ["pip install ."]
