"""Pictures of formats for which Pillow would start another program are refused everywhere."""

from __future__ import annotations

import ast
import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image
from shards import jpeg, photo, write_tar
from source_code import ROOT, files

from data_pipelines.checks.check import check
from data_pipelines.decode.images import decode_image
from data_pipelines.decode.transforms import read_media, read_picture
from data_pipelines.ingest.recode import pack_picture
from data_pipelines.ingest.user_data import open_corpus
from data_pipelines.shards.source import make_cache
from xray.config import DataConfig
from xray.errors import DataError
from xray.search.page import _pixels_of

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n{} loop\n%%EOF\n"
OPENS = "data_pipelines/decode/images.py"


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists only after Pillow has started Ghostscript."""
    program, mark = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n: > {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(subprocess.CalledProcessError):  # Pillow itself starts it
        Image.open(io.BytesIO(EPS)).load()
    assert mark.is_file()
    mark.unlink()
    return mark


READERS: dict[str, Callable[[Path], object]] = {
    "decode": lambda path: decode_image(path.read_bytes()),
    "pack": lambda path: pack_picture(path.read_bytes(), "jpg", 0, 92),
    "shrink": lambda path: pack_picture(path.read_bytes(), "jpg", 10, 92),
    "file": lambda path: read_media(path, DataConfig()),
    "opened": lambda path: read_picture(Image.open(path), DataConfig()),
    "page": lambda path: _pixels_of(open_corpus([str(path)]), 0, 0),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_picture_starts_no_program(reader: str, tmp_path: Path, started: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(EPS)
    with pytest.raises(DataError, match=r"undecodable image: not a JPEG, PNG, .* or PPM file"):
        READERS[reader](path)
    assert not started.exists()


def test_check_names_the_picture(tmp_path: Path, started: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": jpeg(), "b.jpg": EPS, "c.jpg": photo(0)})
    config = DataConfig(cache=str(tmp_path / "cache"))
    (row,) = check(str(tmp_path / "*.tar"), make_cache(config), config, 1).shards
    bad = [(found.key, found.cause) for found in row.bad if found.cause != "no caption"]
    assert bad == [("b", "undecodable image")]
    assert not started.exists()


def opens_pictures(source: str) -> bool:
    """Check if a source file opens pictures by Pillow, or by a library that does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ("PIL.Image", "PIL.ImageFile"):
            return True
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value).split(".")[-1]
            if (owner, node.attr) in {("Image", "open"), ("ImageFile", "Parser")}:
                return True
            if (owner, node.attr) == ("io", "read_image"):
                return True
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name in {"imread", "default_loader", "pil_loader", "ImageFolder"}:
            return True
    return False


def test_pictures_are_opened_in_one_place() -> None:
    found = [
        str(path.relative_to(ROOT))
        for folder in ("xray", "stages", "data_pipelines", "tools")
        for path in files(folder)
        if opens_pictures(path.read_text())
    ]
    assert found == [OPENS]
    assert (ROOT / OPENS).read_text().count("Image.open(") == 1


@pytest.mark.parametrize(
    "line",
    ["Image.open(x)", "PIL.Image.open(x)", "from PIL.Image import open", "f = Image.open",
     "ImageFile.Parser()", "plt.imread(x)", "torchvision.io.read_image(x)", "ImageFolder(x)"],
)  # fmt: skip
def test_other_ways_to_open_a_picture_are_detected(line: str) -> None:
    assert opens_pictures(line)
