"""Report of an ablation: tables, plots, report.html, tables.md, ablation.json and CSV files."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import STAGES
from xray.ablations.comparison import (
    Cell,
    Comparison,
    Outcome,
    chance_of,
    chosen_metrics,
    common,
    compare,
    mean,
)
from xray.ablations.cost import Flops, arm_flops, tera
from xray.ablations.jobs import Failure
from xray.ablations.older import mixed_defaults
from xray.ablations.trials import Ablation, trains_vision
from xray.evaluation.suites import title_of
from xray.files import write_text
from xray.reports.figures import COLOR, subplots, svg
from xray.reports.html import gallery, paragraph, write_report
from xray.reports.tables import ResultTable, short

NOTE = (
    "± is the standard deviation over seeds. p is the p-value of a two-sided t-test on the "
    "differences to the baseline, paired by seed (n pairs). It is not corrected for the number of "
    "comparisons, which is {count}."
)


def write_comparison(
    ablation: Ablation, outcomes: Sequence[Outcome], flops: Flops, failures: Sequence[Failure] = ()
) -> tuple[list[ResultTable], Path]:
    """Write all report files for the finished trials; return the tables and report.html's path."""
    metrics = chosen_metrics(ablation, outcomes)
    cells = compare(ablation, outcomes, metrics)
    chance = {m: [o.values[name] for o in outcomes if (name := chance_of(m, o.values))]
              for m in metrics}  # fmt: skip
    page = Page(ablation, outcomes, metrics, cells, chance, flops)
    tables = [page.results(), page.differences(), page.cost()]
    out = ablation.out
    write_text(out / "ablation.json", json.dumps(page.facts(failures), indent=1))
    write_text(out / "runs.csv", _csv(page.run_rows()))
    write_text(out / "table.csv", _csv(page.metric_rows()))
    write_text(out / "tables.md", page.markdown(tables))
    path = out / "report.html"
    failed = [paragraph(f"{f.trial.arm}, seed {f.trial.seed} failed: {f.line}") for f in failures]
    mixed = map(paragraph, mixed_defaults(ablation))
    parts = [*failed, *mixed, tables[0].html(), gallery("Seeds", page.plots()), tables[1].html(),
             paragraph(page.note()), tables[2].html(), *page.settings()]  # fmt: skip
    write_report(path, f"xray ablate: {ablation.config.name}", parts)
    return tables, path


@dataclass
class Page:
    """Content of the report: tables, plots, texts and rows of the files."""

    ablation: Ablation
    outcomes: Sequence[Outcome]
    metrics: Sequence[str]  # those that are compared
    cells: Comparison
    chance: dict[str, list[float]]  # chance levels by metric, of the runs that have one
    flops: Flops

    @property
    def baseline(self) -> str:
        """Name of the arm that the others are compared with."""
        return self.ablation.config.baseline

    def results(self) -> ResultTable:
        """Make the table of means and standard deviations by arm, with a row for chance."""
        title = f"{self.ablation.config.name} over {self.ablation.config.base}"
        table = ResultTable(title, ("arm", "seeds", *map(self._title, self.metrics)))
        for arm, cells in self.cells.items():
            seeds = len({o.seed for o in self.outcomes if o.arm == arm})
            row = [self._mean(m, cells[m]) if m in cells else "" for m in self.metrics]
            table.rows.append((_wrapped(arm), str(seeds), *row))
        if chances := self._chances():
            row = [self._number(m, chances.get(m, math.nan)) for m in self.metrics]
            table.rows.append(("chance", "", *row))
        return table

    def differences(self) -> ResultTable:
        """Make the table of each arm's differences to the baseline."""
        title = f"Difference to {self.baseline}"
        table = ResultTable(title, ("arm", *map(self._title, self.metrics)))
        for arm, cells in self.cells.items():
            if arm != self.baseline:
                row = [self._difference(m, cells[m]) if m in cells else "" for m in self.metrics]
                table.rows.append((_wrapped(arm), *row))
        return table

    def note(self) -> str:
        """Return the explanation of ± and p below the tables."""
        others = [cells for arm, cells in self.cells.items() if arm != self.baseline]
        tested = [cell for cells in others for cell in cells.values() if len(cell.differences) > 1]
        return NOTE.format(count=len(tested))

    def cost(self) -> ResultTable:
        """Make the table of the cost of one run by arm, including shared stages."""
        stages = [s for s in STAGES if any(s in t.keys for t in self.ablation.trials)]
        columns = (*(f"{s} samples" for s in stages), "pictures and clips", "TFLOP", "seconds")
        table = ResultTable("Cost of a run", ("arm", *columns))
        for arm in self.ablation.arms:
            outcomes = [o for o in self.outcomes if o.arm == arm]
            if not outcomes:
                continue
            first = outcomes[0]
            samples = [short(first.samples[s]) if s in first.samples else "" for s in stages]
            seconds = f"{mean([sum(o.seconds.values()) for o in outcomes]):,.0f}"
            cost = tera(arm_flops(self.ablation.of(arm), self.flops))
            row = _wrapped(arm), *samples, short(visual_samples(first)), cost, seconds
            table.rows.append(row)
        return table

    def settings(self) -> list[str]:
        """Make the HTML table of each arm's settings and the command that runs one trial."""
        rows = [(arm, "\n".join(_setting(k, v) for k, v in changes.items()) or "the base recipe")
                for arm, changes in self.ablation.arms.items()]  # fmt: skip
        recipe = shlex.quote(str(self.ablation.of(self.baseline)[0].folder / "recipe.yaml"))
        shared = [_setting(k, v) for layer in self.ablation.common for k, v in layer.items()]
        return [
            ResultTable("Arms", ("arm", "settings"), list(rows)).html(),
            paragraph(f"Settings of all arms: {', '.join(shared) or 'none'}"),
            f"<p>To repeat a run: <code>xray run {html.escape(recipe)}</code></p>",
        ]

    # numbers --------------------------------------------------------------------------------------

    def _chances(self) -> dict[str, float]:
        """Return the chance level of each metric that has the same one in all runs."""
        return {m: v for m, own in self.chance.items() if not math.isnan(v := common(own))}

    def _percent(self, metric: str) -> bool:
        """Check if a metric is a share, shown in %: it has a chance level and is not a rank."""
        return bool(self.chance[metric]) and "median_rank" not in metric

    def _title(self, metric: str) -> str:
        section, _, measure = metric.partition(".")
        name = title_of(section, measure)
        return f"{name} %" if self._percent(metric) else name

    def _number(self, metric: str, value: float, sign: str = "") -> str:
        if math.isnan(value):
            return ""
        return f"{100 * value:{sign}.1f}" if self._percent(metric) else f"{value:{sign}.4g}"

    def _mean(self, metric: str, cell: Cell) -> str:
        std = self._number(metric, cell.std)
        return self._number(metric, cell.mean) + (f" ± {std}" if std else "")

    def _difference(self, metric: str, cell: Cell) -> str:
        if not cell.differences:
            return ""
        p = "" if math.isnan(cell.p) else f"p {cell.p:.2g}, "
        return f"{self._number(metric, cell.difference, '+')} ({p}n {len(cell.differences)})"

    # plots ----------------------------------------------------------------------------------------

    def plots(self) -> list[str]:
        """Draw one panel per metric, and the first metric against training cost, as SVG."""
        return [*map(self._dots, self.metrics), *map(self._against_cost, self.metrics[:1])]

    def _scale(self, metric: str) -> float:
        return 100.0 if self._percent(metric) else 1.0

    def _dots(self, metric: str) -> str:
        """Draw one row per arm, with a dot per seed and a bar at the mean."""
        arms = [arm for arm in self.cells if metric in self.cells[arm]]
        scale = self._scale(metric)
        figure, (axis,) = subplots(1, (4.4, 0.9 + 0.3 * len(arms)))
        for row, arm in enumerate(arms):
            cell = self.cells[arm][metric]
            color = COLOR if arm != self.baseline else "#b4552d"
            points = [scale * value for value in cell.values.values()]
            axis.plot(points, [row] * len(points), "o", color=color, alpha=0.6, markersize=5)
            axis.plot([scale * cell.mean] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
        if self.baseline in arms:
            baseline = scale * self.cells[self.baseline][metric].mean
            axis.axvline(baseline, color="#b4552d", linewidth=0.8, linestyle="--")
        if self._percent(metric) and (chance := self._chances().get(metric)) is not None:
            axis.axvline(scale * chance, color="#6e7781", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(arms)), arms, fontsize=9)
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.set_title(self._title(metric), fontsize=10)
        return svg(figure, f"{metric} by arm: one dot per seed, a bar at the mean")

    def _against_cost(self, metric: str) -> str:
        """Draw the metric's mean over seeds against the training FLOPs of one run."""
        figure, (axis,) = subplots(1, (4.4, 3.0))
        points = {
            arm: (flops / 1e12, self._scale(metric) * cells[metric].mean)
            for arm, cells in self.cells.items()
            if metric in cells
            and (flops := arm_flops(self.ablation.of(arm), self.flops)) is not None
        }
        for arm, point in points.items():
            axis.plot(*point, "o", color="#b4552d" if arm == self.baseline else COLOR)
            axis.annotate(arm, point, fontsize=8, xytext=(4, 3), textcoords="offset points")
        axis.set_xlabel("TFLOP per run", fontsize=9)
        axis.set_title(self._title(metric), fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.15)
        highest = max((flops for flops, _ in points.values()), default=1.0)
        axis.set_xlim(0, 1.35 * highest)  # from 0, so that costs compare by length; room for names
        axis.grid(alpha=0.25)
        return svg(figure, f"{metric} against the FLOPs of a run")

    # files ----------------------------------------------------------------------------------------

    def markdown(self, tables: Sequence[ResultTable]) -> str:
        """Return the tables and the note as Markdown."""
        parts = [f"**{table.title}**\n\n{table.markdown()}" for table in tables if table.rows]
        return "\n".join([*parts, f"{self.note()}\n"])

    def facts(self, failures: Sequence[Failure]) -> dict[str, Any]:
        """Return all results and failures as JSON, the content of ablation.json."""
        config = self.ablation.config
        arms = {}
        for arm, settings in self.ablation.arms.items():
            trials = self.ablation.of(arm)
            arms[arm] = {
                "settings": settings,
                "stages": trials[0].keys,
                "flops": arm_flops(trials, self.flops),
                "metrics": {metric: cell.facts() for metric, cell in self.cells[arm].items()},
            }
        return {
            "name": config.name,
            "base": config.base,
            "all_arms": self.ablation.common,
            "seeds": config.seeds,
            "baseline": self.baseline,
            "arms": arms,
            "chance": self._chances(),
            "runs": self.run_rows(),
            "failed": [
                {"arm": f.trial.arm, "seed": f.trial.seed, "code": f.code, "line": f.line}
                for f in failures
            ],
        }

    def run_rows(self) -> list[dict[str, Any]]:
        """Return one row per run with its metrics and cost, the content of runs.csv."""
        return [
            {
                "arm": o.arm,
                "seed": o.seed,
                **{m: o.values.get(m) for m in self.metrics},
                **{f"samples_{s}": o.samples.get(s) for s in STAGES},
                "pictures_and_clips": visual_samples(o),
                "flops": arm_flops(self.ablation.of(o.arm), self.flops),
                "seconds": round(sum(o.seconds.values()), 1),
            }
            for o in self.outcomes
        ]

    def metric_rows(self) -> list[dict[str, Any]]:
        """Return one row per arm and metric, the content of table.csv."""
        return [
            {"arm": arm, "metric": metric, **cell.facts()}
            for arm, cells in self.cells.items()
            for metric, cell in cells.items()
        ]


def visual_samples(outcome: Outcome) -> int:
    """Sum the training samples of the stages that train on images and clips."""
    return sum(count for stage, count in outcome.samples.items() if trains_vision(stage))


def _wrapped(arm: str) -> str:
    """Break an arm's name after each axis, so that tables fit narrow terminals."""
    return arm.replace(",", ",\n")


def _setting(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
