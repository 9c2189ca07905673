"""The wheel and the source distribution: contents, metadata, and the commands of the wheel."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from source_code import ROOT

from xray.version import __version__

PACKAGES = ("xray", "stages", "data_pipelines", "configs")
BUILD = """
import sys
from setuptools.build_meta import build_sdist, build_wheel

out = sys.argv[1]  # which a build changes
build_sdist(out)
build_wheel(out)
"""


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built without network."""
    tree, out = tmp_path_factory.mktemp("build") / "xray", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "fixtures")
    top = {"runs", "data", "build", "dist"}
    shutil.copytree(
        ROOT,
        tree,
        ignore=lambda folder, names: {
            *ignored(folder, names),
            *(top if Path(folder) == ROOT else ()),
        },
    )
    (tree / "configs" / "notes.txt").write_text("a stray file")
    (tree / "xray" / "left.pyc").write_bytes(b"a stray file")
    subprocess.run([sys.executable, "-c", BUILD, out], cwd=tree, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(name))


def sources() -> set[str]:
    """The files that a user needs: every module, each yaml file and the marker of types."""
    kinds = {".py", ".yaml", ".typed"}
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in files if path.suffix in kinds}


def test_the_wheel_has_all_modules_and_recipes_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (entry,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "xray = xray.__main__:main" in file.read(entry).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == sources() and "configs/recipe/quickstart.yaml" in inside
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_source_distribution_has_what_a_build_needs_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    inside = {name for name in names if not name.startswith("xray_trainer.egg-info/")}
    build = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "PKG-INFO"}
    assert inside == sources() | build | {"README.md", "CHANGELOG.md", "LICENSE"}


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "xray-trainer" and metadata["Version"] == __version__
    assert metadata["License"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert metadata["Summary"] and "CLIP" in metadata["Keywords"]
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2602.16918"]
    versions = re.findall(r":: (3\.\d+)$", "\n".join(metadata.get_all("Classifier", [])), re.M)
    assert metadata["Requires-Python"] == f">={versions[0]}"
    assert versions == [f"3.{10 + number}" for number in range(len(versions))]
    extras = [extra.replace("_", "-") for extra in metadata.get_all("Provides-Extra", [])]
    assert sorted(extras) == ["dev", "docs", "onnx", "open-clip", "ray", "wandb"]
    needed = [line.replace("_", "-") for line in metadata.get_all("Requires-Dist", [])]
    assert any(line.startswith("torch>=") for line in needed)
    for extra in extras:
        assert any(re.search(rf"extra == ['\"]{extra}['\"]", line) for line in needed), extra


def test_the_description_renders_on_pypi(metadata: Message, dist: Path) -> None:
    text = str(metadata.get_payload())
    readme = (ROOT / "README.md").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "```mermaid" in readme and "mermaid" not in text
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert "| measure | result % [95 % CI] |" in text and "```python\nimport xray" in text
    check = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_links_lead_to_the_repository_once_it_is_named() -> None:
    names: dict[str, object] = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text(), names)
    page, source_url = names["page"], names["source_url"]
    config = (
        "[metadata]\nproject_urls =\n    Paper = https://a.b/c\n    Source = https://d.e/xray/\n"
    )
    source = source_url(config)  # type: ignore[operator]
    assert source == "https://d.e/xray"
    text = "[a](docs/a.md#b) [c](https://f.g) [d](#e)\n```mermaid\nx\n```\n\n![e](docs/f.png)"
    blob, raw = f"{source}/blob/main/docs", f"{source}/raw/main/docs"
    expected = f"[a]({blob}/a.md#b) [c](https://f.g) [d](#e)\n![e]({raw}/f.png)"
    assert page(text, source) == expected  # type: ignore[operator]
    assert page(text, "") == "a [c](https://f.g) [d](#e)\ne"  # type: ignore[operator]


def test_an_installed_wheel_runs_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """The libraries come from this environment through a .pth file, which ignores a checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--quiet", wheel], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    xray = str(python.with_name("xray"))
    where = run(str(python), "-c", "import xray, configs; print(xray.__file__, configs.__file__)")
    assert where.count(str(site)) == 2
    assert run(xray, "--version") == f"{__version__}\n"
    plan = run(xray, "run", "quickstart", "--plan")
    assert all(stage in plan for stage in ("mae", "hashtag", "text", "clip"))
    assert list(folder.iterdir()) == []  # a plan writes nothing
