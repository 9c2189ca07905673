"""`xray ablate`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from xray import dist
from xray.commands.common import Overrides, guarded
from xray.commands.help import examples
from xray.errors import ConfigError, Preempted

log = logging.getLogger("xray")


@examples(
    ("xray ablate stages --plan", "arms, seeds, samples and FLOPs, without training"),
    ("xray ablate losses seeds=[0,1,2] jobs=2", "three seeds, two runs at a time"),
    (
        "xray ablate token_reduction base=real_small data.root=/data/mine",
        "a shipped ablation with another recipe and your own data",
    ),
)
@guarded
def ablate(
    file: Annotated[str, typer.Argument(help="A shipped ablation's name, or a .yaml file")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the runs, then stop")] = False,
) -> None:
    """Train the arms of FILE with every seed, shared stages once, and compare them.

    base=RECIPE, seeds=[0,1], jobs=2, baseline=, metrics=[...], out= and arms.NAME.KEY= are settings
    of the ablation; any other KEY=VALUE is set in the recipe of every arm. After an interruption,
    run the same command again: it continues. Exit code 1 if a run failed.
    """
    from xray.ablations.trials import load_ablation, write_recipes

    if dist.world_size() > 1:
        raise ConfigError("xray ablate starts its own processes: run it without a launcher")
    given = overrides or []
    ablation = load_ablation(file, given)
    from xray.ablations.comparison import check_metrics, outcomes_of
    from xray.ablations.cost import flops_of, plan_of
    from xray.ablations.jobs import Jobs, exclusive
    from xray.ablations.older import mixed_defaults
    from xray.ablations.report import write_comparison
    from xray.recipes.own_data import recipe_settings
    from xray.recipes.run import check_evaluation, prepare

    if packed := recipe_settings(ablation.trials[0].recipe, write=not plan):
        ablation = load_ablation(file, [*given, *packed])
    for line in mixed_defaults(ablation):
        log.warning("%s", line)
    if plan:
        plan_of(ablation, flops_of(ablation, None)).print()
        return
    with exclusive(ablation.out) as lock:
        write_recipes(ablation)
        checked = set[str]()  # most arms have the same evaluation
        for recipe in (trial.recipe for trial in ablation.trials[: len(ablation.arms)]):
            prepare(recipe)
            own = repr((recipe.eval, recipe.root, [run.stage for run in recipe.runs]))
            if own not in checked:
                check_evaluation(recipe.runs, recipe.eval, recipe.root)
            checked.add(own)
        flops = flops_of(ablation, ablation.out / "flops.json")
        plan_of(ablation, flops).print()
        jobs = Jobs(ablation.out, ablation.config.jobs, lock)
        try:
            failures = jobs.run(ablation.trials)
        except Preempted:
            if finished := outcomes_of(ablation):
                _, path = write_comparison(ablation, finished, flops, jobs.failures)
                print(f"report of the finished runs: {path}")
            raise
        for failure in failures:
            trial = failure.trial
            print(
                f"xray: {trial.arm}, seed {trial.seed} failed with exit code {failure.code}: "
                f"{failure.line} ({trial.folder}/log.txt)",
                file=sys.stderr,
            )
        outcomes = outcomes_of(ablation)
        tables, path = write_comparison(ablation, outcomes, flops, failures)
    for table in tables:
        table.print()
    print(f"report: {path}")
    if failures:
        raise SystemExit(1)
    check_metrics(ablation, outcomes)
