"""Chaos test: kills, frozen processes, full disks, flipped bits and hostile files, at random.

    python tools/chaos.py --minutes 10

Prints how many attempts of each kind were made, and how many held: the command ended, without a
traceback or processes left behind, and the result was that of an undisturbed run, or an error in
one line. Exit code 1 if one did not hold. An ordinary user and root both may run it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.common.tables import Table
from tools.faults import damage, flips, kills, soak
from tools.faults.commands import Command, Outcome, train

Attempt = Callable[[Path, Path, random.Random], Outcome]
KINDS: dict[str, Attempt] = {
    "kill": kills.killed_run,
    "flip": flips.flipped_bit,
    "child": kills.killed_child,
    "disk": damage.full_disk,
    "frozen-children": kills.frozen_children,
    "hostile": damage.hostile_files,
    "frozen": kills.frozen_run,
    "rank": kills.lost_rank,
    "soak": soak.soak,
}
# Undisturbed runs, and the kinds whose results are compared with theirs.
RUNS = {
    "unkilled": (kills.STAGES, {"kill", "flip", "disk"}),
    "loaded": (kills.CHILDREN, {"child", "frozen-children", "frozen"}),
    "stored": (flips.STORED, {"flip"}),
}


def prepare(folder: Path, read_only: bool, kinds: Collection[str]) -> Path:
    """Make small data, and undisturbed results to compare with; returns the folder of the data."""
    from data_pipelines.ingest.demo import DemoConfig, make_demo

    data = folder / "data"
    sizes = DemoConfig(photos=96, clips=24, heldout=24, per_shard=32, side=32, frames=8)
    make_demo(data, sizes)
    llm = ("data", "tiny-llm", data / "llm", "--captions", data / "photos")
    must(Command(folder / "llm.log", *llm))
    damage.first_picture(data, folder)
    must(Command(folder / "index.log", "data", "index", data / "photos", "--checksum"))
    for name, (settings, compared) in RUNS.items():
        if compared & {*kinds}:
            must(train(folder / name, data, *settings))
    if "rank" in kinds:
        must(*kills.start_ranks(folder / "ranks", data))
    if read_only:  # with the side files of the runs, which are damaged, too
        for path in [*data.rglob("*"), data]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    if "flip" in kinds:
        prepare_flips(folder, data)
    return data


def prepare_flips(folder: Path, data: Path) -> None:
    """Make what is damaged by flipped bits: embeddings, and a run in the middle of a stage."""
    (folder / "embedded").mkdir()
    artifact = folder / "unkilled/mae/artifact"
    must(flips.embed(folder / "embedded", artifact, data))
    must(flips.search(folder / "embedded", artifact, folder / "picture.jpg"))
    shutil.copytree(folder / "unkilled", folder / "halfway")
    shutil.rmtree(folder / "halfway" / "clip")
    (folder / "halfway" / "results.json").unlink()
    stage = folder / "halfway" / "mae"
    shutil.rmtree(stage / "artifact")
    shutil.rmtree(max((stage / "checkpoints").glob("step_*")))


def must(*commands: Command) -> None:
    """Wait for undisturbed commands; raises SystemExit if one fails."""
    for running in commands:
        if fault := running.fault(running.wait(), (0,)):
            raise SystemExit(f"an undisturbed command fails: {fault}")


def main() -> None:
    """Attempt all kinds in turn until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--attempts", type=int, default=0, help="per kind, instead of --minutes")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read-only", action="store_true", help="nobody may write to the data")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument("--report", type=Path, nargs="+", help="only print these files' table")
    given = parser.parse_args()
    if given.report:
        report([outcome for path in given.report for outcome in read(path)])
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import xray.commands.main
    import xray.recipes.run
    import xray.training.trainer  # noqa: F401 - the forks need not import them

    outcomes: list[tuple[int, Outcome]] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        data = prepare(folder, given.read_only, given.only)
        end = time.monotonic() + 60 * given.minutes
        for number in itertools.count():
            name = given.only[number % len(given.only)]
            done = number >= given.attempts * len(given.only)
            if done if given.attempts else time.monotonic() > end:
                break
            seed = given.seed + number
            place = folder / str(number)
            place.mkdir()
            outcome = KINDS[name](place, data, random.Random(seed))
            outcomes.append((seed, outcome))
            if given.json:
                write(outcomes, given.json)
            if outcome.fault:
                print(f"{name}, seed {seed}: {outcome.kind}: {outcome.fault}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    report(outcomes)
    sys.exit(any(outcome.fault for _, outcome in outcomes))


def write(outcomes: list[tuple[int, Outcome]], path: Path) -> None:
    """Write all outcomes so far."""
    facts = [{"seed": seed, **vars(outcome)} for seed, outcome in outcomes]
    path.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")


def read(path: Path) -> list[tuple[int, Outcome]]:
    """Read the outcomes of an earlier test."""
    rows = json.loads(path.read_text("utf-8"))
    return [(row.pop("seed"), Outcome(**row)) for row in rows]


def report(outcomes: list[tuple[int, Outcome]]) -> None:
    """Print the table of kinds."""
    kinds = sorted({outcome.kind for _, outcome in outcomes})
    rows = []
    for name in [*kinds, "all"]:
        own = [outcome for _, outcome in outcomes if name in (outcome.kind, "all")]
        held = sum(not outcome.fault for outcome in own)
        rows.append([name, *map(str, (len(own), held, sum(each.injected for each in own)))])
    heads = ["kind", "attempts", "held", "faults injected"]
    print(Table("Attempts to break xray", heads, rows))


if __name__ == "__main__":
    main()
