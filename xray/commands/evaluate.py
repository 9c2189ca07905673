"""`xray eval`: one artifact, any suites, and where the results go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray.commands.common import Overrides, guarded
from xray.errors import ConfigError

if TYPE_CHECKING:
    from xray.evaluation.suites import Results, Suite


@guarded
def evaluate(
    artifact: Annotated[str, typer.Argument(help="An artifact: a folder, or a URL")],
    overrides: Overrides = None,
    suite: Annotated[
        str, typer.Option(help="Names with commas between (default: all with data of their own)")
    ] = "",
    recipe: Annotated[str, typer.Option(help="Take the sets from this recipe's eval")] = "",
    keep_rates: Annotated[
        str, typer.Option(help="1,.9,.7,.5: accuracy against speed, without retraining")
    ] = "",
    out: Annotated[
        str, typer.Option(help="A .json file for results, plots beside; or a folder")
    ] = "",
) -> None:
    """Evaluate ARTIFACT: each measure with its 95 % interval, beside chance.

    Suites: zero_shot, retrieval, video_retrieval, captions, knn, linear_probe, attentive_probe,
    finetune, robustness, tags. Their sets are eval.SUITE.shards, or .train and .test: shards, a
    folder of folders named after classes, or a .csv with path and label or caption.
    """
    from xray.artifacts.artifact import open_artifact
    from xray.evaluation.results_table import result_table
    from xray.evaluation.suites import prepared

    config, root, workers, llm = _settings(overrides or [], recipe)
    rates = _rates(keep_rates)
    suites = suite.split(",") if suite else None
    opened = open_artifact(artifact, llm)
    target = _target(out)
    if rates:
        _over_rates(prepared(opened, config, root, workers), rates, suites, target)
        return
    ready = prepared(opened, config, root, workers)
    results: Results = {}
    try:  # each as it is had: the next may take hours, or fail
        for name, measures in ready.each(suites or ready.asked()):
            results[name] = measures
            if target is not None:
                target.write_text(json.dumps(results, indent=1))
    finally:
        if results:
            result_table(results).print()
    if target is not None:
        print(f"written: {target}")
        if "robustness" in results:
            from xray.evaluation.plots import plot_robustness

            plot_robustness(results["robustness"], target.with_suffix(".robustness.png"))


def _settings(overrides: list[str], recipe: str) -> tuple[Any, str, int, str]:
    """The config, data root and workers of the sets, and the folder of the LLM."""
    from xray.config.loading import build, parse_overrides
    from xray.evaluation.config import EvalConfig

    given = parse_overrides(overrides)
    sections = [key for key, value in given.items() if isinstance(value, dict)]
    unknown = [key for key in given if key not in ("eval", "data", "text") or key not in sections]
    data = given.get("data", {})
    unknown = unknown or [f"text.{key}" for key in given.get("text", {}) if key != "llm"]
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
    root = data.get("root", root)
    return config, root, workers, given.get("text", {}).get("llm", "")


def _rates(text: str) -> list[float]:
    try:
        rates = [float(item) for item in text.split(",") if item]
    except ValueError as error:
        raise ConfigError(f"--keep-rates {text}: write numbers such as 1,.9,.7,.5") from error
    if any(not 0 < rate <= 1 for rate in rates):
        raise ConfigError(f"--keep-rates {text}: each must be in (0, 1]")
    return rates


def _over_rates(
    suite: Suite, rates: list[float], suites: list[str] | None, target: Path | None
) -> None:
    from xray.evaluation.keep_rates import NOT_OF_RATES, keep_rate_table, over_keep_rates
    from xray.evaluation.plots import plot_keep_rates

    suite.check(suites or [])
    names = [name for name in suites or suite.asked() if name not in NOT_OF_RATES]
    if not names or len(names) < len(suites or []):
        raise ConfigError(
            f"--keep-rates compares none of {', '.join(NOT_OF_RATES)}: --suite knn, say"
        )
    found = over_keep_rates(suite, rates, names)
    keep_rate_table(found).print()
    if target is not None:
        _write(target, found)
        plot_keep_rates(found, target.with_suffix(".png"))


def _target(out: str) -> Path | None:
    """The .json to write, in a folder that is there; `results.json` of a folder."""
    if not out:
        return None
    path = Path(out) if out.endswith(".json") else Path(out) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, results: Results) -> None:
    path.write_text(json.dumps(results, indent=1))
    print(f"written: {path}")
