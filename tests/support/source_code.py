"""Lists of the source files of the project, and their imports."""

from __future__ import annotations

import ast
from pathlib import Path

from child_process import ROOT as ROOT


def files(place: str) -> list[Path]:
    """List the Python files of a folder or module, by its path in the repository."""
    path = ROOT / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def imports(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
