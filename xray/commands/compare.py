"""`xray compare`: several models on the same data, in one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import dist
from xray.commands.common import EvalRecipe, check_model, checking, guarded, is_setting
from xray.commands.evaluate import eval_settings, filled_sets
from xray.commands.help import examples
from xray.commands.named_sets import check_named, suites_with_data
from xray.errors import ConfigError
from xray.files import write_in_place, write_text

if TYPE_CHECKING:
    from xray.evaluation.evaluator import Evaluator
    from xray.evaluation.set_runs import SetResults


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
    empty cell. eval.held_out=true adds the samples that the sources of the first trained MODEL
    hold out.
    """
    from xray.evaluation.suites import suite_named

    names = suite.split(",") if suite else []
    with checking():
        given = [item for item in models if is_setting(item)]
        named = [item for item in models if item not in given]
        config, root, workers, llm = eval_settings(given, recipe)
        if len(named) < 2:
            raise ConfigError("xray compare needs at least two models; xray eval takes one")
        for name in names:
            suite_named(name)
        check_named(config, root)
        for model in named:
            check_model(model)
    from xray.artifacts.manifest_config import training_blocks
    from xray.evaluation.comparison import notes_of, short_names
    from xray.evaluation.evaluator import Evaluator
    from xray.evaluation.set_page import write_page
    from xray.evaluation.set_runs import EarlierFile, SetRun
    from xray.imports.cached import open_model

    device = dist.choose_device("auto")
    target, short = Path(out) if out else None, short_names(named)
    file = EarlierFile(target if config.sets else None)
    earlier = {name: file.sets("models", name) for name in short}
    written = Written(target, earlier)
    results: dict[str, Any] = {}
    of_sets: dict[str, SetResults] = {}
    lines: dict[str, list[str]] = {}
    opened = [open_model(model, llm) for model in named]  # all, before the first is evaluated
    offers = [artifact.offers for artifact in opened]
    trained = next(filter(training_blocks, opened), opened[0])
    config = filled_sets(config, trained, root)  # the same for all models
    for name, model, artifact in zip(short, named, opened, strict=True):
        evaluator = Evaluator.open(artifact, config, root, workers, device)
        facts = {"model": model, "artifact": artifact.digest, "results": {}}
        if config.sets:
            run = SetRun(evaluator, names, others=offers)
            of_sets[name] = run.evaluate(earlier[name], partial(written.save, name, facts))
            lines[name] = [run.unknown] if run.unknown else []
        if not config.sets or config.configured():
            results[name], lines[name] = _run(evaluator, names)
            facts["results"] = results[name]
        # each model at once: the next may take hours
        written.save(name, facts, of_sets.get(name, {}))
    _print(results, of_sets, notes_of(lines))
    if target is not None:
        if of_sets:
            write_page(target.with_suffix(".html"), of_sets, notes_of(lines))
            print(f"page: {target.with_suffix('.html')}")
        print(f"written: {out}")


def _print(
    results: Mapping[str, Any], of_sets: Mapping[str, SetResults], notes: Sequence[str]
) -> None:
    """Print the tables of the models, with notes below the last one."""
    from xray.evaluation.comparison import comparison_table
    from xray.evaluation.set_tables import compared_sets

    tables = [comparison_table(results)] if results else []
    tables += [compared_sets(of_sets)] if of_sets else []
    tables[-1].notes += notes
    for table in tables:
        table.print()


@dataclass
class Written:
    """The file of all results; `earlier` ones of sets stay until their model is evaluated."""

    target: Path | None
    earlier: dict[str, SetResults]
    models: dict[str, Any] = field(default_factory=dict)

    def save(self, name: str, facts: dict[str, Any], sets: SetResults) -> None:
        """Write the file with the results of one more model, or more results of one."""
        from xray.evaluation.set_runs import SETS, as_json
        from xray.evaluation.set_tables import summary

        own = {SETS: as_json(sets), **summary(sets)} if sets else {}
        self.models[name] = facts | own
        if self.target is None:
            return
        later = {
            model: {SETS: as_json(known)}
            for model, known in self.earlier.items()
            if known and model not in self.models
        }
        text = json.dumps({"models": self.models | later}, indent=1)
        (write_text if own or later else write_in_place)(self.target, text)


def _run(evaluator: Evaluator, names: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Run the suites that a model can run; returns lines about what it trained on, too."""
    from xray.evaluation.overlap import OVERLAP, overlap_lines
    from xray.evaluation.suites import suite_named

    asked = suites_with_data(evaluator, names) if evaluator.config.sets else names
    able = [name for name in asked if suite_named(name).needs <= evaluator.offers]
    if not names and not evaluator.config.sets:
        able = evaluator.default_suites()
    results: dict[str, Any] = dict(evaluator.run(able))
    overlap = evaluator.overlap(list(results))
    if overlap.shares:
        results[OVERLAP] = overlap.shares
    return results, [*overlap_lines(overlap.shares), *filter(None, [overlap.unknown])]
