"""`xray compare`: several models on the same data, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import dist
from xray.commands.common import SETTING, EvalRecipe, check_model, checking, guarded
from xray.commands.evaluate import eval_settings
from xray.commands.help import examples
from xray.errors import ConfigError
from xray.files import write_in_place

if TYPE_CHECKING:
    from xray.evaluation.evaluator import Evaluator


@examples(
    (
        "xray compare runs/mine/clip downloads/siglip eval.retrieval.shards=/data/val",
        "your own model beside a released one, on your own data",
    ),
    (
        "xray compare runs/mine/clip models/clip --recipe quickstart --out all.json",
        "every suite of a recipe; the results are also written to a file",
    ),
)
@guarded
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [KEY=VALUE]...",
            help="Artifacts, or released weights as of xray import; then settings as of xray eval",
        ),
    ],
    suite: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Names, separated by commas (default: all with data)"),
    ] = "",
    recipe: EvalRecipe = "",
    out: Annotated[str, typer.Option(metavar="FILE.json", help="File of all results")] = "",
) -> None:
    """Evaluate each MODEL on the same data, and print one table with 95 % intervals.

    Released weights are imported into the user's cache. A model that cannot run a suite has an
    empty cell.
    """
    from xray.evaluation.suites import suite_named

    names = suite.split(",") if suite else []
    with checking():
        given = [item for item in models if SETTING.match(item)]
        named = [item for item in models if item not in given]
        config, root, workers, llm = eval_settings(given, recipe)
        if len(named) < 2:
            raise ConfigError("xray compare needs at least two models; xray eval takes one")
        if config.held_out:
            raise ConfigError(
                "eval.held_out=true gives each model data of its own: set eval.SUITE.shards"
            )
        for name in names:
            suite_named(name)
        for model in named:
            check_model(model)
    from xray.evaluation.comparison import comparison_table, notes_of, short_names
    from xray.evaluation.evaluator import Evaluator
    from xray.imports.cached import open_model

    device = dist.choose_device("auto")
    results: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    lines: dict[str, list[str]] = {}
    for name, model in zip(short_names(named), named, strict=True):
        artifact = open_model(model, llm)
        evaluator = Evaluator.open(artifact, config, root, workers, device)
        results[name], lines[name] = _run(evaluator, names)
        facts[name] = {"model": model, "artifact": artifact.digest, "results": results[name]}
        if out:  # each model at once: the next may take hours
            write_in_place(Path(out), json.dumps({"models": facts}, indent=1))
    table = comparison_table(results)
    table.notes += notes_of(lines)
    table.print()
    if out:
        print(f"written: {out}")


def _run(evaluator: Evaluator, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Run the suites that a model can run; returns lines about what it trained on, too."""
    from xray.evaluation.overlap import OVERLAP, overlap_lines
    from xray.evaluation.suites import suite_named

    able = [name for name in names if suite_named(name).needs <= evaluator.offers]
    results: dict[str, Any] = dict(evaluator.run(able if names else evaluator.default_suites()))
    overlap = evaluator.overlap(list(results))
    if overlap.shares:
        results[OVERLAP] = overlap.shares
    return results, [*overlap_lines(overlap.shares), *filter(None, [overlap.unknown])]
