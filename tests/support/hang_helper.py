"""Run `xray ARGS...`, whose watchdog sees time pass 1000 times as fast once FILE exists.

usage: python hang_helper.py FILE ARGS...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

FASTER = 1000


class Clock:
    """Stands for `time` in the watchdog's module."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, file: Path) -> None:
        self.file = file
        self.since: float | None = None

    def monotonic(self) -> float:
        now = time.monotonic()
        if self.since is None and self.file.exists():
            self.since = now
        return now if self.since is None else now + FASTER * (now - self.since)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / FASTER)


if __name__ == "__main__":
    from xray.commands.main import main
    from xray.training import watchdog

    watchdog.time = Clock(Path(sys.argv.pop(1)))  # type: ignore[assignment]
    main()
