"""Report of an ablation whose runs finished in several folders, such as some seeds on each machine.

Reads the ablation.json of each folder. A run in several of them counts as in the last. The settings
and the paths of data and LLM have to be equal in all folders.

    python -m tools.experiments.join_results my_ablation.yaml runs/first runs/second \
        --settings data.root=DATA seeds=[0,1,2] out=runs/joined
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages import STAGES
from xray.ablations.comparison import Outcome, chance_name
from xray.ablations.cost import flops_of
from xray.ablations.report import write_comparison
from xray.ablations.trials import Ablation, load_ablation
from xray.errors import ConfigError, XrayError
from xray.records import read_record


def outcomes(facts: Mapping[str, Any]) -> Iterator[Outcome]:
    """Yield the outcomes of the runs in ablation.json, with the chance levels of its metrics."""
    chance = {chance_name(metric): level for metric, level in facts["chance"].items()}
    for run in facts["runs"]:
        values = {name: v for name, v in run.items() if "." in name and v is not None}
        samples = {stage: n for stage in STAGES if (n := run[f"samples_{stage}"]) is not None}
        yield Outcome(run["arm"], run["seed"], {**chance, **values}, samples, {"": run["seconds"]})


def check_settings(ablation: Ablation, facts: Mapping[str, Any], name: str) -> None:
    """Raise ConfigError for a run that the ablation lacks, and for other settings.

    The stage runs of an arm are named by a hash of their settings, and listed for the first seed.
    """
    trials = {(trial.arm, trial.seed): trial for trial in ablation.trials}
    first = facts["seeds"][0]
    runs = {(run["arm"], run["seed"]) for run in facts["runs"]}
    for arm, seed in sorted(runs | {(arm, first) for arm, _ in runs}):
        if (arm, seed) not in trials:
            raise ConfigError(f"{name}: {ablation.config.name} has no run of {arm}, seed {seed}")
        if seed == first and trials[arm, seed].keys != facts["arms"][arm]["stages"]:
            raise ConfigError(f"{name}: {arm} has other settings, or other paths of data and LLM")


def joined(ablation: Ablation, folders: Sequence[Path]) -> list[Outcome]:
    """Return the outcomes of all folders in the order of the ablation's trials."""
    found: dict[tuple[str, int], Outcome] = {}
    for folder in folders:
        facts = read_record(folder / "ablation.json", dict[str, Any], ConfigError)
        check_settings(ablation, facts, str(folder))
        found |= {(outcome.arm, outcome.seed): outcome for outcome in outcomes(facts)}
    order = [(trial.arm, trial.seed) for trial in ablation.trials]
    return [found[key] for key in order if key in found]


def main() -> None:
    """Write the report and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ablation", help="name or yaml file")
    parser.add_argument("folders", type=Path, nargs="+", help="folders with ablation.json")
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE, as of xray ablate")
    given = parser.parse_args()
    try:
        ablation = load_ablation(given.ablation, given.settings)
        results = joined(ablation, given.folders)
        ablation.out.mkdir(parents=True, exist_ok=True)
        flops = flops_of(ablation, ablation.out / "flops.json")
        tables, path = write_comparison(ablation, results, flops)
    except XrayError as error:
        sys.exit(f"{parser.prog}: {error}")
    for table in tables:
        table.print()
    print(f"report: {path}")


if __name__ == "__main__":
    main()
