"""Signals on which a run saves and stops."""

from __future__ import annotations

import logging
import signal
from types import FrameType

log = logging.getLogger("xray")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Context that handles SIGNALS by setting `received`; a second interrupt stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._interrupted = False

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            log.info("stops after this step and saves it; interrupt again to stop at once")
        self.received = True
