"""`xray eval`: evaluate an artifact, print the results and write them to a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from xray import dist
from xray.commands.common import (
    EvalRecipe,
    ModelName,
    Overrides,
    check_model,
    checking,
    connected_device,
    guarded,
)
from xray.commands.help import examples
from xray.commands.named_sets import check_named, evaluate_named, suites_with_data
from xray.errors import ConfigError
from xray.files import write_in_place, write_text

if TYPE_CHECKING:
    from xray.artifacts.artifact import Artifact
    from xray.evaluation.config import EvalConfig
    from xray.evaluation.evaluator import Evaluator
    from xray.evaluation.suite import Measures

log = logging.getLogger("xray")


@examples(
    (
        "xray eval runs/small/clip/artifact eval.retrieval.shards=/data/val",
        "retrieval between the pictures and the captions of /data/val",
    ),
    (
        "xray eval runs/small/clip/artifact eval.zero_shot.shards=/data/pets",
        "zero-shot classification of /data/pets/CLASS/*.jpg",
    ),
    (
        "xray eval runs/quickstart/clip/artifact --recipe quickstart --out results",
        "every suite of a recipe; also writes results/results.json",
    ),
    (
        "xray eval runs/quickstart/clip/artifact --recipe quickstart --keep-rates 1,.7",
        "accuracy against speed, without retraining",
    ),
    (
        "xray eval runs/a/clip --recipe mine.yaml --keep-rates 1,.7 --reduce evit,tome",
        "the same for several methods of token reduction",
    ),
    (
        "xray eval runs/small/clip/artifact eval.sets=/data/benchmarks --out results",
        "every data set in a folder, or in a .yaml file: one table, results.json and results.html",
    ),
)
@guarded
def evaluate(
    artifact: ModelName,
    overrides: Overrides = None,
    suite: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Names, separated by commas (default: all that have data of their own)",
        ),
    ] = "",
    recipe: EvalRecipe = "",
    keep_rates: Annotated[
        str,
        typer.Option(
            metavar="RATES", help="1,.9,.7,.5: accuracy against speed, without retraining"
        ),
    ] = "",
    reduce: Annotated[
        str,
        typer.Option(
            metavar="METHODS",
            help="evit,tome,random: compare these methods of token reduction at the --keep-rates",
        ),
    ] = "",
    out: Annotated[
        str,
        typer.Option(metavar="PATH", help="A .json file of results, plots beside; or a folder"),
    ] = "",
) -> None:
    """Evaluate ARTIFACT: each measure with its 95 % interval, beside chance.

    `xray config eval` prints the suites and their settings. Data sets are eval.SUITE.shards, or
    .train and .test: shards, a folder with a folder per class, or a .csv file with the columns
    path and label or caption. eval.held_out=true adds the samples that the artifact's sources hold
    out (xray data pack val=, xray data split). eval.sets evaluates many data sets, each
    with a name; after an interruption, the same command continues. With torchrun, each process
    encodes a part of every data set; rank 0 writes the results.
    """
    from xray.evaluation.suites import suite_named

    names = suite.split(",") if suite else []
    with checking():
        config, root, workers, llm = eval_settings(overrides or [], recipe)
        rates = _rates(keep_rates)
        methods = _methods(reduce, rates)
        for name in names:
            suite_named(name)
        check_named(config, root, rates)
        check_model(artifact)
    from xray.evaluation.evaluator import Evaluator
    from xray.imports.cached import open_model

    device = connected_device()

    def opening() -> Evaluator:
        opened = open_model(artifact, llm)
        return Evaluator.open(opened, filled_sets(config, opened, root), root, workers, device)

    def work() -> None:
        target = _target(out)
        if rates:
            _over_rates(evaluator, rates, methods, names, target)
        else:
            _all_suites(evaluator, names, target)

    evaluator = dist.main_first(opening, "opening the artifact")
    evaluator.lead(work)


def filled_sets(config: EvalConfig, artifact: Artifact, root: str) -> EvalConfig:
    """Fill the data sets of eval.held_out with those that the artifact's sources hold out."""
    if not config.held_out:
        return config
    from xray.evaluation.held_out import trained_sources, with_held_out

    filled, lines = with_held_out(config, *trained_sources(artifact, root))
    for line in lines:
        log.info("%s", line)
    return filled


def _all_suites(evaluator: Evaluator, names: list[str], target: Path | None) -> None:
    from xray.evaluation.overlap import OVERLAP
    from xray.evaluation.suites import result_table, suite_named
    from xray.models.inference import recorded

    results: dict[str, Measures] = {}
    named: dict[str, Any] = {}  # results of eval.sets
    if evaluator.config.sets:
        suites = suites_with_data(evaluator, names)
    else:
        suites = names or evaluator.default_suites()

    def write() -> None:
        if target is not None:
            facts = recorded(evaluator.config.precision)
            text = json.dumps({**facts, **results, **named}, indent=1)
            # whole, because the next run takes the finished sets from the file
            (write_text if named else write_in_place)(target, text)

    if evaluator.config.sets:
        evaluator.check(suites)
        evaluate_named(evaluator, names, named, write, target)
    try:  # write each result at once: the next suite may take hours, or fail
        for name, measures in evaluator.each(suites):
            results[name] = measures
            write()
        overlap = evaluator.overlap(suites)
        if overlap.shares:
            results[OVERLAP] = overlap.shares
            write()
    finally:
        if results:
            result_table(results).print()
    if overlap.unknown:
        print(overlap.unknown)
    if target is not None:
        print(f"written: {target}")
        for name in suites:
            if plot := suite_named(name).plot:
                plot(results[name], target.with_suffix(f".{name}.png"))


def eval_settings(overrides: list[str], recipe: str) -> tuple[EvalConfig, str, int, str]:
    """Read the config, the root and the workers of the data, and the folder of the LLM."""
    from xray.config.loading import build, parse_overrides
    from xray.evaluation.config import EvalConfig
    from xray.recipes.recipe import kind_of_key

    given = parse_overrides(overrides, kind_of_key)
    sections = [key for key, value in given.items() if isinstance(value, dict)]
    unknown = [key for key in given if key not in ("eval", "data", "text") or key not in sections]
    data, text = given.get("data", {}), given.get("text", {})
    unknown = unknown or [f"text.{key}" for key in text if key != "llm"]
    unknown = unknown or [f"data.{key}" for key in data if key not in ("root", "workers")]
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r}: use eval.SUITE.KEY=, data.root=, data.workers=, text.llm="
        )
    workers = data.get("workers", 2)
    if not isinstance(workers, int) or workers < 0:
        raise ConfigError(f"data.workers={workers} must be a whole number, 0 or more")
    root, config = "", build(EvalConfig, given.get("eval", {}), section="eval.")
    if recipe:
        from xray.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, overrides)
        root, config, workers = loaded.root, loaded.eval, loaded.workers
    return config, data.get("root", root), workers, text.get("llm", "")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(item) for item in text.split(",") if item]
    except ValueError as error:
        raise ConfigError(f"--keep-rates {text}: write numbers such as 1,.9,.7,.5") from error
    if any(not 0 < rate <= 1 for rate in rates):
        raise ConfigError(f"--keep-rates {text}: each must be in (0, 1]")
    return rates


def _methods(text: str, rates: list[float]) -> list[Any]:
    from xray.config.model import Reduction

    known = get_args(Reduction)[1:]  # without none
    methods = [*dict.fromkeys(item.strip() for item in text.split(",") if item.strip())]
    if methods and not rates:
        raise ConfigError(f"--reduce {text}: add --keep-rates 1,.9,.7,.5")
    if unknown := [name for name in methods if name not in known]:
        raise ConfigError(f"--reduce {unknown[0]}: use some of {', '.join(known)}")
    return methods


def _over_rates(
    evaluator: Evaluator,
    rates: list[float],
    methods: list[Any],
    names: list[str],
    target: Path | None,
) -> None:
    from xray.evaluation import keep_rates
    from xray.evaluation.suites import suite_named

    evaluator.check(names)
    names = names or [n for n in evaluator.default_suites() if suite_named(n).compared]
    keep_rates.check_comparable(names)
    if methods:
        by_method = keep_rates.over_methods(evaluator, methods, rates, names)
        keep_rates.method_table(by_method).print()
        _write(by_method, keep_rates.plot_methods, target)
    else:
        by_rate = keep_rates.over_keep_rates(evaluator, rates, names)
        keep_rates.keep_rate_table(by_rate).print()
        _write(by_rate, keep_rates.plot_keep_rates, target)


def _write(found: Any, plot: Callable[[Any, Path], None], target: Path | None) -> None:
    if target is not None:
        write_in_place(target, json.dumps(found, indent=1))
        print(f"written: {target}")
        plot(found, target.with_suffix(".png"))


def _target(out: str) -> Path | None:
    """Return the .json file to write, `results.json` in a folder; creates its folder."""
    if not out:
        return None
    path = Path(out) if out.endswith(".json") else Path(out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
