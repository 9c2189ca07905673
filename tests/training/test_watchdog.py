"""Watchdog: a rank that waits for others, also under NCCL, and NCCL's flight recorder."""

from __future__ import annotations

import json
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from child_process import ROOT
from tiny import ALL_TOKENS, train
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.distributed.flight_recorder.components.loader import read_dump

from xray import dist
from xray.agreement import Agreement
from xray.training import watchdog as module
from xray.training.loop import TrainingLoop
from xray.training.step_result import ReducedStep
from xray.training.telemetry import Intervals, Stragglers
from xray.training.watchdog import TRACE, WAITS, Watchdog, verdict

FACTS = {"host": "a", "pid": 7, "place": "forward and backward", "step": 11, "waits": True}


def rank_facts(folder: Path, rank: int, place: str, passes: int = 0) -> dict[str, Any]:
    """Return what the watchdog of a rank writes now."""
    watchdog = Watchdog(folder, 0)
    watchdog.passes = lambda: passes
    watchdog.at(place, 11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        watchdog._write()
    return dict(json.loads((folder / "stuck" / f"rank_{rank:05d}.json").read_text()))


def while_waiting(
    folder: Path,
    file: str,
    ranks: Sequence[int],
    wait: Callable[[], object],
    end: Callable[[], object],
) -> list[dict[str, Any]]:
    """Return what watchdogs of ranks write while this thread waits in a file; then end the wait."""
    known: list[dict[str, Any]] = []
    main = threading.main_thread().ident or 0

    def write() -> None:
        while not sys._current_frames()[main].f_code.co_filename.endswith(file):
            time.sleep(0.001)
        known.extend(rank_facts(folder, rank, "forward and backward") for rank in ranks)
        end()

    thread = threading.Thread(target=write)
    thread.start()
    wait()
    thread.join()
    return known


def test_the_rank_is_named_that_others_wait_for_in_a_read_of_the_device(tmp_path: Path) -> None:
    """Under NCCL, ranks 0 and 2 block where they read a value; rank 1 still loads its data."""
    lock = threading.Lock()
    lock.acquire()
    values: Any = SimpleNamespace(tolist=lock.acquire)  # of a collective that does not end
    first, last = while_waiting(
        tmp_path, "xray/dist.py", (0, 2), lambda: dist.to_host(values), lock.release
    )
    queue: SimpleQueue[int] = SimpleQueue()
    (middle,) = while_waiting(tmp_path, "test_watchdog.py", (1,), queue.get, lambda: queue.put(1))
    assert [facts["waits"] for facts in (first, middle, last)] == [True, False, True]
    middle["place"] = "waiting for data"
    expected = r"at step 12: rank 1 \(.+\) is in waiting for data, while the others wait for it"
    assert re.search(expected, verdict([first, middle, last], 3, 60.0, tmp_path))


def test_a_rank_that_waits_for_an_agreement_waits(tmp_path: Path) -> None:
    """Rank 0 writes a file, and this rank waits for it."""
    store = HashStore()
    agreement = Agreement(store, 1, 1, 2, dist.COLLECTIVE)
    (facts,) = while_waiting(
        tmp_path, "xray/agreement.py", (1,),
        lambda: agreement.reach(None), lambda: store.set("xray/agree/1/verdict", ""),
    )  # fmt: skip
    assert facts["waits"]


@pytest.mark.parametrize("slow", (0, 1, 2))
def test_all_wait_and_the_rank_with_the_fewest_forward_passes_is_named(slow: int) -> None:
    passes = [41 if rank == slow else 42 for rank in range(3)]
    known = [{**FACTS, "rank": rank, "passes": n} for rank, n in enumerate(passes)]
    expected = f"rank {slow} (a, process 7) is in forward and backward and has finished 41 forward"
    assert expected in verdict(known, 3, 60.0, Path("stuck"))
    equal = [{**facts, "passes": 42} for facts in known]
    assert "no rank stands out" in verdict(equal, 3, 60.0, Path("stuck"))


class Event:
    """Stands for a CUDA event: complete if the device has come so far."""

    reached = 0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.made += 1
        self.number = Event.made

    def query(self) -> bool:
        return self.number <= Event.reached

    def elapsed_time(self, end: Event) -> float:
        return float(end.number - self.number)


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_finished_forward_passes_are_those_of_the_device(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, value])
    tower = nn.Identity()
    stragglers = Stragglers(nn.ModuleDict({"image": tower}), torch.device(device))
    counts = []
    for step in range(3):
        stragglers.begin()
        tower(torch.zeros(1)), tower(torch.zeros(1))
        stragglers.end(0.0)
        tower(torch.zeros(1))  # of validation
        monkeypatch.setattr(Event, "reached", Event.made - (3 if device == "cuda" else 0))
        counts.append(stragglers.finished())
        if step == 1:
            monkeypatch.setattr(Event, "reached", Event.made)
            stragglers.compare()
            counts.append(stragglers.finished())
    assert counts == ([2, 4, 4, 6] if device == "cpu" else [1, 3, 4, 5])


READS = ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy")


@contextmanager
def recorded_reads(patch: pytest.MonkeyPatch, seen: set[str]) -> Iterator[None]:
    """Record the places of our code that read values of tensors during the passes of a step."""

    def wrapped(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            frame: FrameType | None = sys._getframe(1)
            assert frame is not None
            file = frame.f_code.co_filename
            if file.startswith(str(ROOT)) and not file.startswith(str(ROOT / "tests")):
                seen.add(f"{Path(file).relative_to(ROOT)}:{frame.f_code.co_name}")
            return original(self, *args)

        return read

    with patch.context() as inner:
        for name in READS:
            inner.setattr(Tensor, name, wrapped(name))
        yield


def test_a_step_reads_values_only_where_the_watchdog_sees_a_wait(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device, each of these reads waits for the collectives before it."""
    seen: set[str] = set()
    steps = 0
    places = (TrainingLoop, "_run_passes"), (TrainingLoop, "_update"), (ReducedStep, "read")
    for owner, name in places:
        original = getattr(owner, name)

        def watched(*args: Any, original: Any = original) -> Any:
            nonlocal steps
            steps += 1
            with recorded_reads(monkeypatch, seen):
                return original(*args)

        monkeypatch.setattr(owner, name, watched)
    for stage in ("mae", "hashtag", "clip"):
        zero = f"zero.stage={int(stage == 'hashtag')}"
        train(stage, demo, tmp_path / stage, ALL_TOKENS, zero)
    assert steps > 12 and "xray/dist.py:to_host" in seen
    assert not [place for place in seen if not any(part in place for part in WAITS)]


def test_a_run_ends_although_the_store_is_held_by_a_frozen_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of a frozen rank's store never returns, so another thread measures the time."""
    asked, ended = threading.Event(), SimpleQueue[str]()

    def never() -> str | None:
        asked.set()
        threading.Event().wait()
        return None

    monkeypatch.setattr(dist, "reported_failure", never)
    monkeypatch.setattr(Watchdog, "_end", lambda self: ended.put("ended"))
    watchdog = Watchdog(tmp_path, patience=0.01)
    assert asked.wait(60)
    assert ended.get(timeout=60) == "ended"
    watchdog.close()


def test_nccls_flight_recorder_is_written_beside_the_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder of gloo, which a CPU has, stands for that of NCCL."""
    recorder = torch._C._distributed_c10d
    monkeypatch.setattr(recorder, "_dump_nccl_trace", recorder._dump_fr_trace)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    rank_facts(tmp_path, 3, "saving")
    path = tmp_path / "stuck" / f"{TRACE}00003"
    assert read_dump(TRACE, str(path))["rank"] == 3  # torch's reader of such files
    assert "entries" in pickle.loads(path.read_bytes())
    monkeypatch.setenv("RANK", "3")
    Watchdog(tmp_path, 0)._clear()
    assert not list((tmp_path / "stuck").iterdir())
    for backend in ("gloo", "fake"):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda backend=backend: backend)
        rank_facts(tmp_path, 3, "saving")
        assert not path.exists()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("trouble", ("raises", "hangs", "missing"))
def test_a_flight_recorder_in_trouble_does_not_keep_the_run(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def dump() -> bytes:
        if trouble == "raises":
            raise RuntimeError("no recorder")
        release.wait()
        return b""

    namespace = (
        SimpleNamespace() if trouble == "missing" else SimpleNamespace(_dump_nccl_trace=dump)
    )
    monkeypatch.setattr(torch._C, "_distributed_c10d", namespace)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(module, "GRACE", 0.01)
    assert rank_facts(tmp_path, 0, "saving")["place"] == "saving"
    release.set()


def test_waiting_for_data_is_the_time_in_which_a_gpu_has_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA it is known one step late: the device has not passed the events of a new step."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", 0)
    intervals = Intervals(torch.device("cuda"))
    found = []
    for _ in range(3):
        intervals.begin()
        Event(enable_timing=True).record()  # one more moment passes in the interval
        intervals.end()
        monkeypatch.setattr(Event, "reached", Event.made - 1)
        found.append(1000 * intervals.take())
    monkeypatch.setattr(Event, "reached", Event.made)
    found.append(1000 * intervals.take())
    assert found == [0.0, 2.0, 2.0, 2.0] and intervals.take() == 0.0
