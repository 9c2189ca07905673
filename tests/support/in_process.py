"""Helper that runs xray commands in this process, where a new process is not what is tested."""

from __future__ import annotations

import logging
import sys

from click.testing import Result
from typer.testing import CliRunner

from xray.commands.main import app


class CurrentStderr(logging.StreamHandler):
    """Handler that writes log lines to what `sys.stderr` is when they are written."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def invoke(*arguments: object) -> Result:
    """Run an xray command in this process: without the seconds of imports of a new one.

    pytest's handlers keep the command from installing its own handler, so this one stands for it.
    """
    log, handler = logging.getLogger("xray"), CurrentStderr()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
