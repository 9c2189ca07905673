"""Agreement of all ranks through the key-value store of the process group, without a collective.

Keys: `xray/agree/7/3` has the failure of rank 3 in the seventh agreement, or nothing;
`xray/agree/7/verdict` the failure of the lowest rank, which rank 0 writes; `xray/host/3` the host
of rank 3. The number of requests grows linearly with that of the ranks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from xray import errors
from xray.errors import TrainingError, XrayError

if TYPE_CHECKING:
    from torch.distributed import Store

NOTICE = 10.0  # seconds of waiting before the first line; each wait until the next one is doubled
LONGEST = 600.0  # seconds between two lines
PAUSE = 1.0  # maximum seconds between two reads of the store
NAMED = 5  # missing ranks in a line


def reason(rank: int, error: BaseException) -> str:
    """Return why a rank has stopped, for the messages of the others."""
    return f"rank {rank} has stopped: {type(error).__name__}: {errors.brief(error)}"


@contextmanager
def announced(who: str, line: str, hint: str) -> Iterator[None]:
    """Print a line in growing intervals, with the seconds so far, while the block waits."""
    done = threading.Event()

    def speak() -> None:
        waited, notice = 0.0, NOTICE
        while not done.wait(notice - waited):
            waited = notice
            print(f"{who}: {line}, {waited:.0f} s so far ({hint})", file=sys.stderr, flush=True)
            notice += min(notice, LONGEST)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def announce(store: Store, rank: int) -> None:
    """Publish the host and process of this rank, for the messages of other ranks."""
    store.set(f"xray/host/{rank}", f"{socket.gethostname()}, process {os.getpid()}")


def is_lost_connection(error: RuntimeError) -> bool:
    """Return True for the error of a collective whose other ranks have ended or are unreachable."""
    # gloo raises a plain RuntimeError; NCCL's error and the store's have types of torch.
    of_nccl = type(error).__name__ in ("DistBackendError", "DistNetworkError")
    return of_nccl or "gloo/transport" in str(error)


@dataclass(frozen=True)
class Agreement:
    """One agreement; every rank makes its agreements in the same order, with the same numbers."""

    store: Store
    number: int
    rank: int
    world: int
    patience: timedelta  # limit of waiting
    doing: str = ""  # work of the ranks that are waited for, for messages
    speaks: bool = True  # print the ranks that this rank waits for

    def reach(self, failure: XrayError | None) -> XrayError | None:
        """Return the failure of the lowest rank that has one, the same on all ranks.

        Raises TrainingError if the store is gone, or if a rank does not arrive in time.
        """
        from torch.distributed import DistNetworkError

        try:
            self.store.set(self._key(self.rank), _encode(failure, self.rank))
            verdict = self._collect() if self.rank == 0 else self._follow()
        except DistNetworkError:
            raise TrainingError(
                f"rank {self.rank} has lost the connection to the store of the process group: "
                "rank 0 or its launcher has exited or cannot be reached; see its messages"
            ) from None
        if not verdict:
            return None
        facts = json.loads(verdict)
        if facts["gone"]:
            raise TrainingError(facts["text"])
        if facts["rank"] == self.rank and failure is not None:
            return failure.on_all_ranks()
        error: XrayError = getattr(errors, facts["kind"])(facts["text"])
        return error.on_all_ranks()

    def stop(self, error: BaseException) -> None:
        """Announce to the other ranks that this one ends and does not wait for them."""
        from torch.distributed import DistError

        stopped = TrainingError(reason(self.rank, error))
        key = self._verdict(self.number) if self.rank == 0 else self._key(self.rank)
        try:
            self.store.set(key, _encode(stopped, self.rank, gone=True))
        except DistError:  # then the other ranks notice by themselves
            return

    def _collect(self) -> bytes:
        """Wait for all ranks and write the verdict, as rank 0."""
        others = range(1, self.world)
        missing = self._wait([self._key(rank) for rank in others], others)
        if missing:
            verdict = _encode(self._late(missing), 0, gone=True).encode()
        else:
            failures = self.store.multi_get([self._key(rank) for rank in range(self.world)])
            verdict = next(filter(None, failures), b"")
        self.store.set(self._verdict(self.number), verdict.decode())
        # Every rank that is here has read the verdict before.
        self.store.delete_key(self._verdict(self.number - 1))
        self.store.delete_key(self._key(0, self.number - 1))
        return verdict

    def _follow(self) -> bytes:
        """Wait for rank 0's verdict and remove the key of this rank."""
        verdict = self._verdict(self.number)
        if missing := self._wait([verdict], [0]):
            raise self._late(missing)
        found: bytes = self.store.get(verdict)
        self.store.delete_key(self._key(self.rank))
        return found

    def _wait(self, keys: list[str], awaited: Sequence[int]) -> list[int]:
        """Wait for keys, and print who is missing; returns the ranks that do not arrive in time.

        It polls, because `Store.wait` defers signals, and warns at each timeout.
        """
        began, notice = time.monotonic(), NOTICE
        while not self.store.check(keys):
            waited = time.monotonic() - began
            late = waited >= self.patience.total_seconds()
            if late or waited >= notice:
                missing = [r for r in awaited if not self.store.check([self._key(r)])]
                if late and missing:
                    return missing
                if waited >= notice:
                    self._print(missing, waited)
                    notice += min(notice, LONGEST)
            time.sleep(min(PAUSE, 0.001 + waited / 10))
        return []

    def _print(self, missing: Sequence[int], waited: float) -> None:
        if not missing or not self.speaks:  # if rank 0 is not missing, it prints them
            return
        who = "xray" if self.rank == 0 else f"xray, rank {self.rank}"
        work = f": {self.doing}" if self.doing else ""
        line = f"waiting for {self._names(missing)}, {waited:.0f} s so far{work}"
        print(f"{who}: {line}", file=sys.stderr, flush=True)

    def _late(self, missing: Sequence[int]) -> TrainingError:
        work = f" ({self.doing})" if self.doing else ""
        return TrainingError(
            f"{self._names(missing)} did not arrive within {self.patience}{work}: it is dead, "
            "frozen or far behind; see its messages; the same command starts again"
        )

    def _names(self, missing: Sequence[int]) -> str:
        names = []
        for rank in missing[:NAMED]:
            host = f"xray/host/{rank}"
            known = self.store.get(host).decode() if self.store.check([host]) else "host unknown"
            names.append(f"rank {rank} ({known})")
        more = len(missing) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")

    def _key(self, rank: int, number: int | None = None) -> str:
        return f"xray/agree/{self.number if number is None else number}/{rank}"

    @staticmethod
    def _verdict(number: int) -> str:
        return f"xray/agree/{number}/verdict"


def _encode(failure: XrayError | None, rank: int, gone: bool = False) -> str:
    """Return a failure as JSON, or an empty text; gone: a rank is not there to raise it."""
    if failure is None:
        return ""
    kind = next(c.__name__ for c in type(failure).__mro__ if c.__module__ == errors.__name__)
    return json.dumps({"rank": rank, "kind": kind, "text": str(failure), "gone": gone})
