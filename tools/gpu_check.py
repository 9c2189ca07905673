"""Check of training on a GPU: correctness, synchronisations, speed, memory, data.

    python tools/gpu_check.py [--device cuda|cpu] [--toy] [--only mfu,data] [--budget 400] [--out D]

Every section runs in a process of its own with a time limit, and appends a line to results.jsonl in
the output folder; log.txt has the full output. The exit status is 1 if a check failed, or if a
section crashed or reached its limit. `--device cpu --toy` runs the same code with toy models.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # of this process, and of its children
    sys.path.insert(0, ROOT)

from tools.common.tables import Table  # noqa: E402
from tools.gpu.child import Child, MissingPackageError  # noqa: E402
from tools.gpu.findings import Check, Section  # noqa: E402

# section -> seconds after which it is killed; in the order in which they run, most telling first
SECTIONS = {
    "environment": 40,
    "smoke": 70,
    "zero": 50,
    "stem": 20,
    "syncs": 40,
    "mfu": 150,
    "recompiles": 40,
    "memory": 50,
    "text": 50,
    "data": 110,
    "engine": 40,
    "quickstart": 70,
}
BUDGET = 400.0  # seconds in all for which these limits are meant; a larger budget raises them
LEAST = 5.0  # seconds that must remain for a section to begin


def run_sections(
    names: Sequence[str], device: str, toy: bool, budget: float, out: Path
) -> Iterator[Section]:
    """Run sections in order and yield their results; those beyond the budget are skipped."""
    end, log = time.monotonic() + budget, out / "log.txt"
    following: Child | None = None
    try:
        for number, name in enumerate(names):
            left = end - time.monotonic()
            if left < LEAST:
                yield Section(name, "skipped", notes=["the budget is used up"])
                continue
            child = following or Child(name, device, toy, log)
            rest = names[number + 1 : number + 2]
            following = Child(rest[0], device, toy, log) if rest else None
            limit = min(SECTIONS[name] * max(1.0, budget / BUDGET), left)
            print(f"[{budget - left:4.0f} s] {name}, at most {limit:.0f} s", flush=True)
            yield _run_child(child, limit)
    finally:
        if following is not None:
            following.end()


def _run_child(child: Child, limit: float) -> Section:
    result, start = Section(child.section), time.monotonic()
    try:
        for finding in child.findings(limit):
            result.add(finding)
            if isinstance(finding, Check) and not finding.ok:
                print(f"         {finding}", flush=True)
    except MissingPackageError as error:
        result.status = "skipped"
        result.notes.append(str(error))
    except TimeoutError as error:
        result.status = "timeout"
        result.notes.append(str(error))
    except Exception as error:
        result.status = "crashed"
        result.notes.append(str(error))
    finally:
        child.end()
    result.seconds = round(time.monotonic() - start, 1)
    for note in result.notes:
        print(f"         {note}", flush=True)
    return result


def table(results: Sequence[Section]) -> Table:
    """Summarise all sections, with the checks that failed."""
    rows = []
    for result in results:
        failed = [f"{c['name']}: {c['found']}" for c in result.checks if not c["ok"]]
        passed = f"{len(result.checks) - len(failed)} of {len(result.checks)}"
        remarks = "; ".join([*failed, *result.notes])
        rows.append([result.section, result.status, f"{result.seconds:.0f}", passed, remarks])
    return Table("gpu_check", ["section", "status", "seconds", "checks passed", "remarks"], rows)


def _chosen(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"no section {name!r}: {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names] if names else list(SECTIONS)


def main() -> None:
    """Run the sections, print the table, and exit with 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy models, for a test on a CPU")
    parser.add_argument("--only", type=_chosen, default="", help="sections, separated by commas")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, log.txt")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"

    def stop(*_: Any) -> None:
        raise SystemExit("stopped by a signal")

    signal.signal(signal.SIGTERM, stop)
    results: list[Section] = []
    given = options.only, options.device, options.toy, options.budget, options.out
    try:
        with (options.out / "results.jsonl").open("a", buffering=1, encoding="utf-8") as file:
            for result in run_sections(*given):
                results.append(result)
                file.write(json.dumps(asdict(result)) + "\n")
    finally:
        print(table(results), flush=True)
    passed = any(result.status == "passed" for result in results)
    sys.exit(not passed or any(result.failed for result in results))


if __name__ == "__main__":
    main()
