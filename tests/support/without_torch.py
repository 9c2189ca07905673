"""Runs commands that must fail before torch, timm, transformers or deepspeed are imported.

usage: without_torch.py COMMANDS, a json list of lists of arguments; prints a json list of
[exit code, stderr]. An import of one of these libraries is an error that names it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

HEAVY = ("torch", "torchvision", "timm", "transformers", "deepspeed")


class Refusal:
    """Finder that refuses to import the heavy libraries."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> Any:
        if name.split(".")[0] in HEAVY:
            raise AssertionError(f"{name} is imported")
        return None


def main() -> None:
    sys.meta_path.insert(0, Refusal())
    from typer.testing import CliRunner

    from xray.commands.main import app

    results = []
    for arguments in json.loads(sys.argv[1]):
        done = CliRunner().invoke(app, arguments)
        crash = "" if isinstance(done.exception, SystemExit) else repr(done.exception)
        results.append([done.exit_code, done.stderr + crash])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
