"""Run several commands in one process: `run_commands.py FOLDER < commands.json`.

commands.json: {name: [arguments of xray]}, or [FILE.py, arguments]. Writes FOLDER/NAME.out,
FOLDER/NAME.err and, after each command, FOLDER/codes.json with the exit codes so far. One process
imports torch and deepspeed once, which takes longer than most of these commands.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def run(arguments: list[str]) -> int:
    """Run `python -m xray ARGUMENTS` or a file in this process; returns its exit code."""
    try:
        if arguments[0].endswith(".py"):
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.argv = ["xray", *arguments]
            runpy.run_module("xray", run_name="__main__", alter_sys=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    folder = Path(sys.argv[1])
    codes: dict[str, int] = {}
    for name, arguments in json.load(sys.stdin).items():
        for number, ending in ((1, "out"), (2, "err")):
            with (folder / f"{name}.{ending}").open("wb") as file:
                os.dup2(file.fileno(), number)  # also what C libraries and child processes write
        codes[name] = run(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
