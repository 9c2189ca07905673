"""Results of named sets as a table, with means over sets and DataComp's average."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from xray.evaluation.comparison import cells_of, notes_of
from xray.evaluation.overlap import overlap_lines
from xray.evaluation.set_runs import SetResults
from xray.evaluation.suite import Measures, Row, ends_of
from xray.evaluation.suites import SUITES, rows_of
from xray.evaluation.suites.retrieval import DIRECTIONS, RETRIEVAL
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.reports.tables import ResultTable
from xray.words import count

# DataComp's 38 sets (2304.14108) by the measure that its average takes of them. Five others are
# measured over groups of samples, or as a game, which no suite does.
BY_ACCURACY = (
    *("imagenet1k", "imagenet-sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r"),
    *("objectnet", "cifar10", "cifar100", "clevr-count-all", "clevr-closest-object-distance"),
    *("country211", "dtd", "eurosat", "food101", "gtsrb", "kitti-closest-vehicle-distance"),
    *("mnist", "voc2007", "pcam", "renderedsst2", "resisc45", "cars", "stl10", "sun397", "svhn"),
    "camelyon17",
)
BY_RECALL = ("caltech101", "fgvc-aircraft", "flowers", "pets")  # mean per-class recall
BY_RETRIEVAL = ("flickr30k", "mscoco")  # mean of R@1 in both directions
OTHERS = ("iwildcam", "fmow", "dollar-street", "geode", "winogavil")
DATACOMP = len((*BY_ACCURACY, *BY_RECALL, *BY_RETRIEVAL, *OTHERS))
ALIASES = {
    "flickr-1k-test-image-text-retrieval": "flickr30k",
    "mscoco-2014-5k-test-image-text-retrieval": "mscoco",
    "mscoco-captions": "mscoco",
}
GROUPS = ("vtab-", "wilds-", "retrieval-", "fairness-", "misc-")  # parts of names of folders


def set_table(results: SetResults) -> ResultTable:
    """Make the table of one model: a row for each set and measure, then the means over sets."""
    table = ResultTable("Data sets", ("set", "measure", "result % [95 % CI]", "chance %"))
    table.rows += [(name, *row[:3]) for name, row in _rows(results)]
    table.rows += mean_table({"": results}).rows
    table.notes += notes_on(results)
    return table


def whole_table(results: SetResults) -> ResultTable:
    """Make the table of one model for a page: with the number of samples, without means."""
    columns = ("set", "measure", "result % [95 % CI]", "chance %", "over")
    table = ResultTable("Data sets", columns, [(name, *row) for name, row in _rows(results)])
    table.notes += notes_on(results)
    return table


def for_page(table: ResultTable) -> ResultTable:
    """Join the first two columns, so that a phone shows the results without scrolling."""
    rows: list[Sequence[str]] = [(f"{row[0]}: {row[1]}", *row[2:]) for row in table.rows]
    return replace(table, columns=(table.columns[0], *table.columns[2:]), rows=rows)


def mean_table(results: Mapping[str, SetResults]) -> ResultTable:
    """Make the table of means over sets, and of DataComp's average, for each model."""
    values = [model or "result %" for model in results]
    table = ResultTable("Means over sets", ("mean", "measure", *values, "chance %"))
    rows: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for model, own in results.items():
        for row in _mean_rows(own):
            rows[f"mean of {row[3]}", row[0]][model] = row
    for (sets, title), cells in rows.items():
        table.rows.append((sets, title, *cells_of(cells, list(results))))
    averages = [datacomp(own) for own in results.values()]
    if most := max(sets for _, sets in averages):
        values = [f"{100 * mean:.1f}" if sets else "" for mean, sets in averages]
        over = f"{most} of its {DATACOMP} sets"
        table.rows.append(("DataComp's average", over, *values, ""))
    return table


def compared_sets(results: Mapping[str, SetResults], means: bool = True) -> ResultTable:
    """Make the table of several models: measures of each set as rows, models as columns."""
    table = ResultTable("Data sets: % [95 % CI]", ("set", "measure", *results, "chance %"))
    cells: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for model, own in results.items():
        for name, row in _rows(own):
            cells[name, row[0]][model] = row
    names = dict.fromkeys(name for name, _ in cells)  # a model may lack some suites of a set
    for name, title in sorted(cells, key=lambda key: list(names).index(key[0])):
        table.rows.append((name, title, *cells_of(cells[name, title], list(results))))
    if means:
        table.rows += mean_table(results).rows
    table.notes += notes_of({model: notes_on(own) for model, own in results.items()})
    return table


def summary(results: SetResults) -> dict[str, Any]:
    """Return the means over sets of each measure, and DataComp's average, as JSON values."""
    means = {
        suite: {
            key: {"mean": sum(values) / len(values), "sets": len(values)}
            for key, values in _by_measure(own).items()
        }
        for suite, own in _by_suite(results).items()
    }
    mean, sets = datacomp(results)
    facts = {"mean": mean, "sets": sets, "of": DATACOMP}
    return {"means": means} | ({"datacomp": facts} if sets else {})


def datacomp(results: SetResults) -> tuple[float, int]:
    """Return DataComp's average over its sets that are measured as there, and their number.

    Sets are recognised by their names, such as pets or wds_vtab-pets_test. (0, 0) for fewer than
    two.
    """
    found: dict[str, float] = {}
    for name, own in results.items():
        known = canonical(name)
        measures = {suite: result.measures for suite, result in own.items()}
        zero_shot, retrieval = (measures.get(s.name, {}) for s in (ZERO_SHOT, RETRIEVAL))
        key = "top1" if known in BY_ACCURACY else "mean_per_class_recall"
        if known in (*BY_ACCURACY, *BY_RECALL) and key in zero_shot:
            found.setdefault(known, zero_shot[key])
        if known in BY_RETRIEVAL and retrieval:
            recalls = [retrieval[f"{direction}_R@1"] for direction in DIRECTIONS]
            found.setdefault(known, sum(recalls) / len(recalls))
    return (sum(found.values()) / len(found), len(found)) if len(found) > 1 else (0.0, 0)


def canonical(name: str) -> str:
    """Return DataComp's name of a set without the parts that folders add to it."""
    short = name.lower().replace("_", "-").replace("/", "-").removeprefix("wds-")
    short = short.removesuffix("-test")
    for group in GROUPS:
        short = short.removeprefix(group)
    return ALIASES.get(short, short)


def notes_on(results: SetResults) -> list[str]:
    """Return the notes of suites, and lines about the shares of the sets that were trained on."""
    notes = {
        name: [
            note
            for suite in SUITES
            if suite.notes and suite.name in own
            for note in suite.notes(own[suite.name].measures)
        ]
        for name, own in results.items()
    }
    shares = {
        f"sets.{name}.{key}": share
        for name, own in results.items()
        for result in own.values()
        for key, share in result.overlap.items()
    }
    return [*notes_of(notes), *overlap_lines(shares)]


def _rows(results: SetResults) -> Iterator[tuple[str, Row]]:
    """Yield (set, row) of every measure."""
    for name, own in results.items():
        for suite in SUITES:
            if suite.name in own:
                for row in rows_of(suite, own[suite.name].measures):
                    yield name, row


def _mean_rows(results: SetResults) -> Iterator[Row]:
    """Yield the row of each measure's mean over the sets that have it, if there are several."""
    by_suite = _by_suite(results)
    for suite in SUITES:
        titles: dict[str, list[Measures]] = defaultdict(list)
        for measures in by_suite.get(suite.name, {}).values():
            for row in suite.rows(measures):
                titles[row[0]].append(measures)
        for title, having in titles.items():
            if len(having) < 2:
                continue
            common = [key for key in having[0] if all(key in own for own in having)]
            mean = {key: sum(own[key] for own in having) / len(having) for key in common}
            for end in [end for key in common for end in ends_of(key, mean)]:
                del mean[end]  # the interval of a mean is not known
            for row in suite.rows(mean):  # none, if it is itself a mean over what differs
                if row[0] == title:
                    yield *row[:3], count(len(having), "set")


def _by_suite(results: SetResults) -> dict[str, dict[str, Measures]]:
    found: dict[str, dict[str, Measures]] = defaultdict(dict)
    for name, own in results.items():
        for suite, result in own.items():
            found[suite][name] = result.measures
    return found


def _by_measure(own: Mapping[str, Measures]) -> dict[str, list[float]]:
    """Return the values of each measure that has an interval."""
    found: dict[str, list[float]] = defaultdict(list)
    for measures in own.values():
        for key in measures:
            if ends_of(key, measures):
                found[key].append(measures[key])
    return found
