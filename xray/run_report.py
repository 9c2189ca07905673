"""The report of a recipe's run: results, curves, lineage and pictures of real samples."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.decode import BadSample
from data_pipelines.sources import Source, open_source
from data_pipelines.transforms import load_pixels
from xray.artifact import Artifact
from xray.config import DataConfig
from xray.recipe import Recipe
from xray.report import Picture, ResultTable, loss_curves, paragraph, read_metrics, write_report
from xray.schedule import value_at
from xray.show import Explainer

SHOWN = 6  # images per sheet
CLIPS = 2  # each on a sheet of its own


def write_run_report(
    recipe: Recipe, artifacts: Sequence[Artifact], results: ResultTable | None
) -> Path:
    """Write `report.html` into the recipe's folder and return its path."""
    parts = [results.html()] if results is not None else []
    metrics = {run.stage: read_metrics(Path(run.out) / "metrics.jsonl") for run in recipe.runs}
    parts.append(loss_curves(metrics))
    by_stage = {artifact.stage: artifact for artifact in artifacts}
    vision = [run for run in recipe.runs if run.stage in ("hashtag", "clip")]
    for run in [run for run in recipe.runs if run.stage == "mae"] + vision[-1:]:
        parts += [picture.html() for picture in _pictures(by_stage[run.stage], run.data)]
    parts.append(_stage_table(artifacts).html())
    parts.append(paragraph(f"xray {artifacts[-1].manifest['versions']['xray']}, {recipe.name}"))
    path = recipe.out / "report.html"
    write_report(path, f"xray: {recipe.name}", parts)
    return path


def _pictures(artifact: Artifact, data: DataConfig) -> list[Picture]:
    """What the artifact makes of its first images and of its first clips."""
    found, explainer = [], Explainer(artifact)
    for modality, pixels in _samples(data):
        groups = [pixels] if modality == "image" else pixels[:CLIPS].split(1)
        found += [picture for group in groups for picture in explainer(group)]
    return found


def _samples(data: DataConfig) -> list[tuple[str, Tensor]]:
    """The first samples of each modality's first source, centre-cropped."""
    found: dict[str, Tensor] = {}
    for block in data.blocks:
        config = data.sources[block.source]
        seen = config.modality in found or config.modality == "text"
        if seen or config.modality not in data.modalities:
            continue
        source = open_source(
            block.source, config.shards, config.modality, data.root, config.animations
        )
        pixels = list(itertools.islice(_usable(source, data), SHOWN))
        if pixels:
            found[config.modality] = torch.stack(pixels)
    return list(found.items())


def _usable(source: Source, data: DataConfig) -> Iterator[Tensor]:
    size = value_at(data.resolution, 1.0), value_at(data.frames, 1.0)
    for place in source.places():
        with contextlib.suppress(BadSample):
            yield load_pixels(source.sample(*place, *size), data, None)


def _stage_table(artifacts: Sequence[Artifact]) -> ResultTable:
    table = ResultTable("Stages", ("stage", "samples", "seconds", "final loss", "artifact"))
    for artifact in artifacts:
        m = artifact.manifest
        loss = m["metrics"].get("loss")
        table.rows.append(
            (
                artifact.stage,
                f"{m['samples']:,}",
                f"{m['seconds']:.0f}",
                "" if loss is None else f"{loss:.3f}",
                artifact.digest[:12],
            )
        )
    return table
