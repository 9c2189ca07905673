"""`xray run` (a recipe) and `xray train` (one stage)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import dist
from xray.commands.common import Overrides, guarded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from xray.artifacts.artifact import Artifact
    from xray.recipes.recipe import Recipe


@guarded
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a .yaml file")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the stages, then stop")] = False,
) -> None:
    """Train the stages of RECIPE in order, skip the finished ones, evaluate, write a report."""
    from xray.recipes.plan_table import plan_table
    from xray.recipes.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    table = plan_table(loaded)  # on every rank: it raises for models that cannot be built
    if dist.is_main():
        table.print()
    if plan:
        return
    from xray.recipes.run import run_recipe

    artifacts = run_recipe(loaded)
    if dist.is_main():
        _finish(loaded, artifacts)


@guarded
def train(
    stage: Annotated[str, typer.Argument(help="mae, hashtag, text or clip")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE.yaml|KEY=VALUE]...", help="Config files and settings"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Take this stage's settings from a recipe")] = "",
    model: Annotated[str, typer.Option(help="A shipped model, same as model=NAME")] = "",
    init_from: Annotated[list[str] | None, typer.Option(help="An artifact: folder or URL")] = None,
    out: Annotated[str, typer.Option(help="Folder of the run (default: runs/STAGE)")] = "",
    resume: Annotated[str, typer.Option(help="Folder of a run to continue, with its config")] = "",
) -> None:
    """Train one stage. After an interruption, run the same command again: it continues."""
    from stages import stage_class
    from xray.config import loading as cfg

    stage_type = stage_class(stage)
    items = settings or []
    files = [item for item in items if item.endswith((".yaml", ".yml")) and "=" not in item]
    values = [item for item in items if item not in files]
    overrides = cfg.parse_overrides(([f"model={model}"] if model else []) + values)
    if resume:
        files = [str(Path(resume) / "config.yaml"), *files]
        out = out or resume
    layers: list[Any] = []
    loaded = None
    if recipe:
        from xray.recipes.recipe import stage_from_recipe

        layer, loaded = stage_from_recipe(stage, recipe, values)
        layers.append(layer)
    config = cfg.load_config(
        stage_type.Config, stage, *layers, *map(cfg.read_yaml, files), overrides
    )
    config.out = out or config.out or f"runs/{stage}"
    config.init_from = init_from or config.init_from
    config.validate()
    device = dist.choose_device(config.train.device)
    from xray.recipes.prepare import prepare
    from xray.training.engine import init_distributed
    from xray.training.trainer import train_stage

    init_distributed(device)
    if loaded is not None:
        prepare(loaded)
    artifact = train_stage(stage_type, config, device)
    if dist.is_main():
        print(f"artifact: {artifact.path}")


def _finish(recipe: Recipe, artifacts: list[Artifact]) -> None:
    """Evaluate the artifacts, print the results, write results.json and report.html."""
    from xray.evaluation.evaluator import Evaluator
    from xray.evaluation.suites import result_table
    from xray.recipes.report import write_run_report
    from xray.reports.tables import ResultTable

    table: ResultTable | None = None
    asked = recipe.eval.in_recipe({artifact.stage: artifact.offers for artifact in artifacts})
    results: dict[str, Mapping[str, float]] = {}
    for artifact in artifacts:
        if suites := asked[artifact.stage]:
            run = artifact, recipe.eval, recipe.root, recipe.workers
            results |= Evaluator.open(*run).run(suites)
    if results:
        table = result_table(results)
        (recipe.out / "results.json").write_text(json.dumps(results, indent=1))
        table.print()
    path = write_run_report(recipe, artifacts, table)
    print(f"report: {path}")
