"""The mechanical part of how we write: docstrings, names of this machine, file sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_code import ROOT, files

# `w` is not the mode of a text file; click writes help in memory.
OTHER_OPENS = ("av.open", "tarfile.open", "formatter.write_text")
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


def opens_text_without_encoding(call: ast.Call) -> bool:
    """True for a call that reads or writes text in the encoding of the locale."""
    method = isinstance(call.func, ast.Attribute)
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if name in ("read_text", "write_text"):  # the function of xray.files has no encoding
        return method and len(call.args) < (1 if name == "read_text" else 2)
    given = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
    modes = [mode for mode in given if isinstance(mode, str) and set(mode) <= set("rwaxbt+")]
    if name != "open" or any("b" in mode for mode in modes):
        return False
    return bool(modes) if method and call.args else True


@pytest.mark.parametrize("folder", ("xray", "stages", "data_pipelines", "tools"))
def test_text_files_have_an_encoding(folder: str) -> None:
    """In an ASCII locale, a text without it cannot be written."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files(folder)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and opens_text_without_encoding(node)
        and ast.unparse(node.func) not in OTHER_OPENS
    ]
    assert not found, "\n".join(found)
