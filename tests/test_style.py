"""The mechanical part of how we write: docstrings, names of this machine, file sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_code import ROOT, files

FOLDERS = ("xray", "stages", "data_pipelines", "tools", "tests")
NOT_FIRST = {"What", "Where", "Whether", "That", "Of", "How", "Which", "Whose", "As", "If"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(place, docstring) of everything in a file that has one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Documented) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}", text


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    begun = [
        f"{place}: {text.splitlines()[0]}"
        for path in files(folder)
        for place, text in docstrings(path)
        if text.split()[0] in NOT_FIRST
    ]
    assert not begun, "\n".join(begun)


@pytest.mark.parametrize("package", ("xray", "stages", "data_pipelines"))
def test_public_names_have_docstrings(package: str) -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in files(package)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, "\n".join(bare)
