"""Report of a recipe's run: results, curves, lineage and examples from the data."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.decode.transforms import load_pixels
from data_pipelines.shards.source import Source, open_source
from stages import STAGES, stage_class
from xray.artifacts.artifact import Artifact, open_artifact
from xray.artifacts.encoders import Encoder
from xray.artifacts.offers import DECODER, JOINT, TAGS, VISION
from xray.config import DataConfig, RunConfig
from xray.config import loading as cfg
from xray.config.schedule import value_at
from xray.errors import ArtifactError, BadSample, DataError
from xray.evaluation.config import EvalConfig
from xray.evaluation.keep_rates import KEEP_RATES, Rates, keep_rate_figure, keep_rate_table
from xray.evaluation.set_runs import EarlierFile
from xray.evaluation.set_tables import for_page, mean_table, whole_table
from xray.evaluation.suites import result_table
from xray.evaluation.suites.retrieval import RETRIEVAL
from xray.evaluation.suites.zero_shot import ZERO_SHOT
from xray.files import write_text
from xray.recipes.named_results import NAMED_SETS
from xray.recipes.next_steps import next_steps
from xray.recipes.recipe import Recipe
from xray.recipes.report_examples import confused, retrieved, tags
from xray.recipes.run import held_out_sets
from xray.records import read_record
from xray.reports.figures import COLOURS, subplots, svg
from xray.reports.html import Picture, gallery, paragraph, write_report
from xray.reports.tables import ResultTable
from xray.training.metrics import read_metrics
from xray.visualize.explain import Explainer

log = logging.getLogger("xray")
FACTS = "report.json"
SHOWN = 6  # images per sheet
CLIPS = 2  # one per sheet
SIZE = (4.4, 2.6)  # inches: the width of a phone, or half of a page
Rows = Sequence[Mapping[str, float]]


@dataclass
class Facts:
    """Contents of a report.json: what was run in a folder."""

    name: str
    root: str = ""
    workers: int = 0
    eval: dict[str, Any] = field(default_factory=dict)
    # folder of each stage, from this one; older files have it from where the run was started
    stages: dict[str, str] = field(default_factory=dict)


def write_run_report(
    recipe: Recipe, artifacts: Sequence[Artifact], results: ResultTable | None
) -> Path:
    """Write `report.html` into the recipe's folder and return its path."""
    parts = [results.html()] if results is not None else []
    if named := EarlierFile(recipe.out / NAMED_SETS).sets():
        tables = mean_table({"": named}), whole_table(named)
        parts += [for_page(table).html() for table in tables if table.rows]
    parts += _keep_rates(recipe.out / KEEP_RATES)
    metrics = {run.stage: read_metrics(Path(run.out) / "metrics.jsonl") for run in recipe.runs}
    parts += [curves(metrics), data_mix(recipe.runs, metrics).html()]
    by_stage = {artifact.stage: artifact for artifact in artifacts}
    done = [(by_stage[run.stage], run) for run in recipe.runs if run.stage in by_stage]
    seeing = [pair for pair in done if VISION in pair[0].offers]
    with_decoder = [pair for pair in seeing if DECODER in pair[0].offers]
    others = [pair for pair in seeing if DECODER not in pair[0].offers]
    for artifact, run in with_decoder + others[-1:]:
        parts += _if_found(partial(_pictures, artifact, run.data))
    parts += _if_found(partial(_examples, recipe, seeing))
    if artifacts:
        parts.append(_stage_table(artifacts).html())
        rows = [(step.purpose, step.command) for step in next_steps(recipe, artifacts)]
        parts.append(ResultTable("Next", ("to see", "type"), [*rows], prose=True).html())
        versions = artifacts[-1].manifest["versions"]
        parts.append(paragraph(f"xray {versions['xray']}, {recipe.name}"))
    write_text(recipe.out / FACTS, json.dumps(asdict(_facts(recipe)), indent=1))
    path = recipe.out / "report.html"
    write_report(path, f"xray: {recipe.name}", parts)
    return path


def _if_found(show: Callable[[], list[str]]) -> list[str]:
    """Return parts that show samples; none, with a warning, if the data are not there any more."""
    try:
        return show()
    except DataError as error:
        log.warning("the report shows no samples: %s", error)
        return []


def _keep_rates(measured: Path) -> list[str]:
    """Show accuracy against speed by keep rate, if it was measured."""
    if not measured.is_file():
        return []
    by_rate = read_record(measured, Rates, advice="; delete it")
    figure = svg(keep_rate_figure(by_rate), "accuracy against speed, by keep rate")
    return [keep_rate_table(by_rate).html(), figure]


def _facts(recipe: Recipe) -> Facts:
    evaluation: Any = recipe.eval  # a dataclass by a call, which mypy does not see
    stages = {run.stage: os.path.relpath(run.out, recipe.out) for run in recipe.runs}
    return Facts(recipe.name, recipe.root, recipe.workers, asdict(evaluation), stages)


def find_recipe(folder: Path) -> Recipe:
    """Find what was run in a folder, from report.json or else from the stages' folders.

    Raises ArtifactError if it contains no run.
    """
    known = folder / FACTS
    facts = Facts(folder.name, stages={stage: stage for stage in STAGES})
    if known.is_file():
        facts = read_record(known, Facts, advice="; delete it")
    places = facts.stages
    if (folder / "config.yaml").is_file():  # of a single stage
        places = {str(cfg.read_yaml(folder / "config.yaml")["stage"]): "."}
    recipe = Recipe(facts.name, folder, root=facts.root)
    recipe.workers = facts.workers
    recipe.eval = cfg.build(EvalConfig, facts.eval)
    for stage, place in places.items():
        possible = (folder / place, Path(place), folder / stage)
        found = next((path for path in possible if (path / "config.yaml").is_file()), None)
        if found is not None:
            values = cfg.read_yaml(found / "config.yaml")
            recipe.runs.append(cfg.load_config(stage_class(stage).Config, stage, values))
            recipe.runs[-1].out = str(found)
    if not recipe.runs:
        raise ArtifactError(f"{folder} contains no run: neither config.yaml nor a stage's folder")
    return recipe


def report_again(folder: Path) -> Path:
    """Write the report of a folder's current state; for a run in training, its curves so far."""
    recipe = find_recipe(folder)
    there = [Path(run.out) / "artifact" for run in recipe.runs]
    artifacts = [open_artifact(path) for path in there if path.is_dir()]
    return write_run_report(recipe, artifacts, stored_results(folder / "results.json"))


def stored_results(file: Path) -> ResultTable | None:
    """Make the table of an earlier evaluation, None if there is none; raises ArtifactError."""
    if not file.is_file():
        return None
    results = read_record(file, dict[str, dict[str, float]], advice="; delete it")
    try:
        return result_table(results)
    except KeyError as error:
        raise ArtifactError(f"{file} is damaged: it has no {error}; delete it") from error


def _examples(recipe: Recipe, done: Sequence[tuple[Artifact, RunConfig]]) -> list[str]:
    """Show the models' outputs on samples of the evaluation's data, if there are any."""
    parts, recipe = list[str](), replace(recipe, eval=held_out_sets(recipe)[0])
    for artifact, run in [pair for pair in done if TAGS in pair[0].offers][-1:]:
        images = dict(_samples(run.data)).get("image")
        if images is not None:
            parts.append(tags(artifact, images))
    for artifact, run in [pair for pair in done if JOINT in pair[0].offers][-1:]:
        encoder, data = Encoder(artifact), run.data
        if recipe.eval.of(RETRIEVAL).shards:
            parts.append(retrieved(encoder, recipe, data))
        if recipe.eval.of(ZERO_SHOT).shards:
            parts.append(confused(encoder, recipe, data))
    return parts


def _pictures(artifact: Artifact, data: DataConfig) -> list[str]:
    """Draw what the artifact makes of the first images and clips of its data."""
    pictures, explainer = list[Picture](), Explainer(artifact)
    for modality, pixels in _samples(data):
        groups = [pixels] if modality == "image" else pixels[:CLIPS].split(1)
        pictures += [picture for group in groups for picture in explainer(group)]
    return [picture.html() for picture in pictures]


def _samples(data: DataConfig) -> list[tuple[str, Tensor]]:
    """Read the first samples of each modality's first source, centre-cropped."""
    samples: dict[str, Tensor] = {}
    for block in data.blocks:
        config = data.sources[block.source]
        seen = config.modality in samples or config.modality == "text"
        if seen or config.modality not in data.modalities:
            continue
        place = config.shards, config.modality, data.root, config.animations
        source = open_source(block.source, *place)
        pixels = list(itertools.islice(_usable(source, data), SHOWN))
        if pixels:
            samples[config.modality] = torch.stack(pixels)
    return list(samples.items())


def _usable(source: Source, data: DataConfig) -> Iterator[Tensor]:
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    for place in source.places():
        with contextlib.suppress(BadSample):
            yield load_pixels(source.sample(*place, *size), data, None)


def _stage_table(artifacts: Sequence[Artifact]) -> ResultTable:
    table = ResultTable("Stages", ("stage", "samples", "seconds", "final loss", "artifact"))
    for artifact in artifacts:
        facts = artifact.manifest
        loss = facts["metrics"].get("loss")
        cost = f"{facts['samples']:,}", f"{facts['seconds']:.0f}"
        final = "" if loss is None else f"{loss:.3f}"
        table.rows.append((artifact.stage, *cost, final, artifact.digest[:12]))
    return table


# training ---------------------------------------------------------------------------------------


def curves(metrics: Mapping[str, Rows]) -> str:
    """Plot each stage's rows of metrics.jsonl over the samples of all stages; "" for none."""
    shown = {stage: rows for stage, rows in metrics.items() if rows}
    panels = [
        _panel(shown, "loss", "loss", lambda row: row.get("loss")),
        _panel(shown, "validation loss", "val/loss", lambda row: row.get("val/loss")),
        _panel(shown, "samples per second", "samples/s", lambda row: row.get("samples/s")),
        _panel(shown, "learning rate", "lr", lambda row: row.get("lr")),
        _panel(shown, "keep rate", "keep_rate", _keep_rate, seen=True),
        _panel(shown, "resolution, pixels", "resolution", lambda row: row.get("resolution")),
    ]
    return gallery("Training", [panel for panel in panels if panel])


def _keep_rate(row: Mapping[str, float]) -> float | None:
    """Return the keep rate; the mean if each block has its own."""
    own = [value for key, value in row.items() if key.split("/")[0] == "keep_rate"]
    return sum(own) / len(own) if own else None


def _panel(
    metrics: Mapping[str, Rows],
    title: str,
    name: str,
    value: Callable[[Mapping[str, float]], float | None],
    seen: bool = False,
) -> str:
    """Plot a line per stage that has this value; seen: only of those with a backbone."""
    figure, (axis,) = subplots(1, SIZE)
    start, lows, highs = 0.0, list[float](), list[float]()
    for stage, rows in metrics.items():
        points = [(start + row["samples"], value(row)) for row in rows]
        left_out = seen and VISION not in stage_class(stage).offers
        known = [(x, y) for x, y in points if y is not None and not left_out]
        if known:
            xs, ys = zip(*known, strict=True)
            mark = "o" if len(known) == 1 else None
            axis.plot(xs, ys, color=_colour(stage), label=stage, linewidth=1.3, marker=mark)
            lows.append(min(ys))
            highs.append(max(ys))
        start += rows[-1]["samples"]
    if not highs:
        return ""
    if name in ("loss", "lr") and min(lows) > 0 and max(highs) > 20 * min(highs):
        axis.set_yscale("log")
    axis.set_xlim(0, start)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("samples seen, all stages", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_formatter(_thousands)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    return svg(figure, f"{title} over samples seen")


def _colour(stage: str) -> str:
    """Return the colour of a stage, the same in every report."""
    return COLOURS[list(STAGES).index(stage) % len(COLOURS)]


def _thousands(value: float, position: int) -> str:
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


def data_mix(runs: Sequence[RunConfig], metrics: Mapping[str, Rows]) -> ResultTable:
    """List the sources of a step of each stage, and the epochs over each source."""
    columns = ("stage", "source", "samples of a step", "share", "epochs", "size at the end")
    table = ResultTable("Data", columns)
    for run in runs:
        last = (metrics.get(run.stage) or [{}])[-1]
        for block in run.blocks:
            source = run.data.sources[block.source]
            epochs = last.get(f"{block.source}/epochs")
            side, frames = (value_at(x, 1.0) for x in (run.data.resolution, run.data.frames))
            size = {"image": f"{side} px", "video": f"{frames} x {side} px", "text": ""}
            table.rows.append(
                (
                    run.stage,
                    block.source,
                    f"{block.samples:,}",
                    f"{block.samples / run.global_batch:.0%}",
                    "" if epochs is None else f"{epochs:.3g}",
                    size[source.modality] if VISION in stage_class(run.stage).offers else "",
                )
            )
    return table
