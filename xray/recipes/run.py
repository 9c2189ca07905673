"""Run a recipe: check all of its stages, then train them in order."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

from data_pipelines.curation.keep_list import keep_listed
from data_pipelines.ingest.run_sources import open_sources
from stages import stage_class
from stages.base import split_parents, text_section
from xray import dist
from xray.artifacts.artifact import Artifact, open_artifact
from xray.config import RunConfig
from xray.evaluation.config import EvalConfig
from xray.evaluation.datasets import check_sets
from xray.recipes.prepare import prepare, store_captions
from xray.recipes.recipe import Recipe


def run_recipe(recipe: Recipe) -> list[Artifact]:
    """Train every stage that is not finished, in order, and return all artifacts."""
    device = dist.choose_device(recipe.runs[0].train.device)
    from xray.training.engine import init_distributed
    from xray.training.trainer import train_stage

    init_distributed(device)
    prepare(recipe)
    preflight(recipe.runs, recipe.eval, recipe.root)
    artifacts = []
    for config in recipe.runs:
        text = text_section(config)
        if text is not None and text.features != "live":
            store_captions(config, text, device)
        artifacts.append(train_stage(stage_class(config.stage), config, device))
    return artifacts


def preflight(runs: list[RunConfig], evaluation: EvalConfig, root: str) -> None:
    """Check the data, LLM and parents of every stage after the first; that one checks its own.

    Sidecars that this writes are the ones that the stage reads later. Raises ConfigError,
    ArtifactError or DataError.
    """
    offers = {run.stage: stage_class(run.stage).offers for run in runs}
    results = {str(Path(run.out) / "artifact"): offers[run.stage] for run in runs}
    todo = [run for run in runs if not (Path(run.out) / "artifact").exists()]
    for config in todo:
        names = [block.source for block in [*config.blocks, *config.validation]]
        opened = open_sources(config.data, names)
        if config is todo[0]:
            continue
        coming = [path for path in config.init_from if path in results and not Path(path).exists()]
        there = [open_artifact(path) for path in config.init_from if path not in coming]
        kind = stage_class(config.stage)
        stage, parents = kind(copy.deepcopy(config)), split_parents(kind, there)
        kept = {n: keep_listed(s, config.data.sources[n]) for n, s in opened.items()}
        pending = frozenset[str]().union(*(results[path] for path in coming))
        dist.main_first(functools.partial(stage.foresee, kept, parents, pending))
    for suites in evaluation.in_recipe(offers).values():
        check_sets(evaluation, suites, root)
