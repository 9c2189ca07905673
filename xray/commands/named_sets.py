"""Data sets of eval.sets in the commands `xray eval` and `xray compare`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xray.errors import ConfigError

if TYPE_CHECKING:
    from xray.evaluation.config import EvalConfig
    from xray.evaluation.evaluator import Evaluator
    from xray.evaluation.set_runs import SetResults


def check_named(config: EvalConfig, root: str, rates: Sequence[float] = ()) -> None:
    """Check what can be checked of eval.sets before a model is loaded; raises ConfigError."""
    if config.sets:
        from xray.evaluation.named_sets import check_entries

        if rates:
            raise ConfigError("--keep-rates takes eval.SUITE.KEY=, not eval.sets")
        check_entries(config, root)


def suites_with_data(evaluator: Evaluator, names: Sequence[str]) -> list[str]:
    """List the suites to run beside eval.sets: those of `names`, () = all, with data of their own.

    Without names, they are those that the artifact can run.
    """
    from xray.evaluation.suites import suite_named

    if not names:
        return evaluator.config.possible(evaluator.offers)
    configured = evaluator.sets.config.configured()
    readers = {name: (name, *(own.name for own in suite_named(name).reads)) for name in names}
    return [name for name in names if any(own in configured for own in readers[name])]


def evaluate_named(
    evaluator: Evaluator,
    names: Sequence[str],
    written: dict[str, Any],
    write: Callable[[], None],
    target: Path | None,
) -> None:
    """Evaluate eval.sets, print the table, and write the page beside the file of results.

    written: gets the results as JSON values, and then `write` is called, after each set. Results
    of other suites that the file has of the same artifact stay in it.
    """
    from xray.evaluation.comparison import short_names
    from xray.evaluation.set_page import write_page
    from xray.evaluation.set_runs import SETS, EarlierFile, SetRun, as_json, merged
    from xray.evaluation.set_tables import set_table, summary

    results: SetResults = {}
    every: SetResults = {}  # with those that stay
    file = EarlierFile(target)
    known = file.sets()
    written["artifact"] = evaluator.sets.encoder.artifact.digest
    kept = _of_other_suites(evaluator, names, known, file.content)

    def save(found: SetResults) -> None:
        results.clear()
        results.update({name: own for name, own in found.items() if own})
        every.clear()
        every.update(merged(kept, results))
        written.update({SETS: as_json(every)}, **summary(every))
        write()

    run = SetRun(evaluator, names)
    try:
        save(run.evaluate(known, save))
    finally:  # an error in one set leaves the results of the others
        if results:
            set_table(results).print()
    if run.unknown:
        print(run.unknown)
    if target is not None:
        page, model = target.with_suffix(".html"), str(evaluator.sets.encoder.artifact.path)
        notes = [run.unknown] if run.unknown else []
        write_page(page, {short_names([model])[0]: every}, notes)
        print(f"page: {page}")


def _of_other_suites(
    evaluator: Evaluator, names: Sequence[str], known: SetResults, file: Mapping[str, Any]
) -> SetResults:
    """Return the known results, of the sets that are there, of suites that are not asked for.

    file: its content; returns {} if it is of another artifact or precision.
    """
    from xray.evaluation.named_sets import read_entries

    if not known or not names:
        return {}
    config = evaluator.config
    facts = evaluator.sets.encoder.artifact.digest, config.precision
    if (file.get("artifact"), file.get("precision", "fp32")) != facts:
        return {}
    there = {entry.name for entry in read_entries(config, evaluator.sets.data.root)}
    others = {
        name: {suite: result for suite, result in own.items() if suite not in names}
        for name, own in known.items()
        if name in there
    }
    return {name: own for name, own in others.items() if own}
