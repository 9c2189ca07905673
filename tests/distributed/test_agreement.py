"""Agreement of ranks through a store: many ranks as threads, missing and dead ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from xray import agreement, dist
from xray.agreement import Agreement, announce
from xray.errors import ConfigError, DataError, TrainingError, XrayError

RANKS = 64
LONG = timedelta(days=2)


class CountingStore:
    """HashStore that counts the requests of all ranks."""

    def __init__(self) -> None:
        self.store, self.requests = HashStore(), Counter[str]()

    def __getattr__(self, name: str) -> Any:
        if name != "check":  # polls, whose number depends on time
            self.requests[name] += 1
        return getattr(self.store, name)


class Clock:
    """Stands for `time`: each sleep moves it on, and calls what the test wants to happen then."""

    def __init__(self, then: Callable[[float], None] = lambda now: None) -> None:
        self.now, self.then = 0.0, then

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then(self.now)


def outcome(store: Any, rank: int, world: int, number: int, failure: XrayError | None) -> str:
    """Return what a rank gets from an agreement, with the type of the error."""
    error = Agreement(store, number, rank, world, LONG).reach(failure)
    return f"{type(error).__name__}: {error}, {error.agreed}" if error is not None else ""


def everyone(store: Any, world: int, number: int, failures: dict[int, XrayError]) -> list[str]:
    """Return the outcomes of all ranks, which are threads."""
    with ThreadPoolExecutor(world) as pool:
        ranks = [
            pool.submit(outcome, store, rank, world, number, failures.get(rank))
            for rank in range(world)
        ]
        return [each.result() for each in ranks]


@pytest.mark.parametrize("kind", (HashStore, TCPStore))
def test_many_ranks_agree_and_leave_no_keys(kind: type) -> None:
    store = HashStore() if kind is HashStore else TCPStore("127.0.0.1", 0, None, True)
    empty = store.num_keys()
    for number in range(1, 6):
        assert everyone(store, RANKS, number, {}) == [""] * RANKS
    failures: dict[int, XrayError] = {40: ConfigError("late"), 17: DataError("no ümlaut {}")}
    told = everyone(store, RANKS, 6, failures)
    assert set(told) == {"DataError: no ümlaut {}, True"}
    assert everyone(store, RANKS, 7, {}) == [""] * RANKS
    assert store.num_keys() - empty <= 2  # the verdict and rank 0's key of the last agreement


def test_the_requests_grow_linearly_with_the_ranks() -> None:
    counts = []
    for world in (8, 64):
        store = CountingStore()
        everyone(store, world, 1, {})
        counts.append(sum(store.requests.values()))
    assert counts[1] <= 8 * counts[0] and counts[1] <= 5 * 64


def test_a_failure_of_a_subclass_has_the_type_of_its_base() -> None:
    class OwnError(DataError):
        """An error that only this module knows."""

    told = everyone(HashStore(), 2, 1, {1: OwnError("broken")})
    assert told == ["DataError: broken, True", "OwnError: broken, True"]


def test_rank_0_names_the_missing_rank_after_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks 1 and 2 are there, rank 3 comes after 100 s of a clock that the test moves."""
    store = HashStore()

    def arrive(now: float) -> None:
        if now > 100:
            store.set("xray/agree/1/3", "")

    monkeypatch.setattr(agreement, "time", Clock(arrive))
    announce(store, 3)
    for rank in (1, 2):
        store.set(f"xray/agree/1/{rank}", "")
    error = Agreement(store, 1, 0, 4, LONG, "preparing the data").reach(None)
    lines = capsys.readouterr().err.splitlines()
    assert error is None and len(lines) == 4  # after 10, 20, 40 and 80 s
    own = store.get("xray/host/3").decode()
    told = rf"xray: waiting for rank 3 \({own}\), 1[0-2] s so far: preparing the data"
    assert re.fullmatch(told, lines[0]) and f"({own}), 8" in lines[3]


def test_a_line_names_few_of_many_missing_ranks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement, "time", Clock())
    with pytest.raises(TrainingError, match=r"rank 5 \(host unknown\) and 1018 more did not"):
        Agreement(HashStore(), 1, 0, 1024, timedelta(seconds=30)).reach(None)
    assert re.search(r" and 1018 more, 2\d s so far", capsys.readouterr().err)


def test_the_other_ranks_wait_for_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank names rank 0 until it arrives; then rank 0 prints the ranks that all wait for."""
    store = HashStore()

    def act(now: float) -> None:
        if now > 30:
            store.set("xray/agree/1/0", "")
        if now > 10_000:
            store.set("xray/agree/1/verdict", "")

    monkeypatch.setattr(agreement, "time", Clock(act))
    waits = Agreement(store, 1, 1, 2, timedelta(seconds=3600), "opening the data")
    assert waits.reach(None) is None  # its patience is for rank 0's arrival
    lines = capsys.readouterr().err.splitlines()
    named = "xray, rank 1: waiting for rank 0 (host unknown)"
    assert [line[: len(named)] for line in lines] == [named] * 2
    assert re.search(r" 2\d s so far: opening the data", lines[1])


def test_a_rank_that_never_comes_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store, patience = HashStore(), timedelta(seconds=60)
    monkeypatch.setattr(agreement, "time", Clock())
    store.set("xray/agree/1/1", "")
    with pytest.raises(TrainingError, match=r"rank 2 .+ did not arrive within 0:01:00") as raised:
        Agreement(store, 1, 0, 3, patience).reach(None)
    assert not raised.value.agreed  # rank 2 raises nothing
    with pytest.raises(TrainingError, match=r"rank 2 .+ did not arrive within 0:01:00"):
        Agreement(store, 1, 1, 3, patience).reach(None)
    with pytest.raises(TrainingError, match=r"rank 0 .+ did not arrive"):
        Agreement(store, 2, 1, 3, patience).reach(None)


@pytest.mark.parametrize("broken", (0, 1))
def test_a_bug_on_one_rank_ends_the_others(broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank that stops raises its own error; the other rank's error names it."""
    store = HashStore()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(broken))
    monkeypatch.setattr(dist, "_store", lambda: store)
    monkeypatch.setattr(dist, "_NUMBERS", iter([1]))
    monkeypatch.setattr(agreement, "time", Clock())
    with pytest.raises(ZeroDivisionError):
        dist.together(lambda: 1 // 0)
    with pytest.raises(TrainingError, match=f"rank {broken} has stopped: ZeroDivisionError: int"):
        Agreement(store, 1, 1 - broken, 2, timedelta(seconds=60)).reach(None)


def test_an_agreement_inside_work_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its error nor the end of a rank is agreed upon again, where no rank would answer."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(agreement, "time", Clock())
    for stopped in (False, True):
        store = HashStore()
        monkeypatch.setattr(dist, "_store", lambda store=store: store)
        numbers = iter([1, 2])
        monkeypatch.setattr(dist, "_NUMBERS", numbers)
        other = Agreement(store, 1, 1, 2, LONG)
        if stopped:
            other.stop(ZeroDivisionError("bug"))
        told = "rank 1 has stopped: ZeroDivisionError: bug" if stopped else "broken"
        failure = None if stopped else DataError("broken")
        if not stopped:
            store.set("xray/agree/1/1", "")
        with pytest.raises(XrayError, match=f"^{told}$") as raised:
            dist.together(lambda failure=failure: dist.agree(failure))
        assert raised.value.agreed != stopped and next(numbers) == 2


SERVER = """
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
print(store.port, flush=True)
input()
"""


def test_a_lost_store_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        store = TCPStore("127.0.0.1", int(server.stdout.readline()), None, False)
        monkeypatch.setattr(agreement, "time", Clock(lambda now: server.kill()))
        with pytest.raises(TrainingError, match="rank 1 has lost the connection to the store"):
            Agreement(store, 1, 1, 2, LONG).reach(None)


def test_one_rank_agrees_without_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dist, "_store", lambda: pytest.fail("one rank needs no store"))
    dist.join()
    assert dist.main_first(lambda: 7) == 7
    with pytest.raises(DataError, match="full") as raised:
        dist.together(lambda: open("/proc/self/full/disk"))  # noqa: SIM115
    assert raised.value.agreed
