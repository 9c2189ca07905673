"""Run a recipe: train its stages in order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage_class
from stages.base import text_section
from xray import dist
from xray.recipes.prepare import prepare, store_captions
from xray.recipes.recipe import Recipe

if TYPE_CHECKING:
    from xray.artifacts.artifact import Artifact


def run_recipe(recipe: Recipe) -> list[Artifact]:
    """Train every stage that is not finished, in order, and return all artifacts."""
    device = dist.choose_device(recipe.runs[0].train.device)
    from xray.recipes.preflight import preflight
    from xray.training.engine import init_distributed
    from xray.training.trainer import Trainer

    init_distributed(device)
    prepare(recipe)
    preflight(recipe.runs, recipe.eval, recipe.root)
    artifacts = []
    for config in recipe.runs:
        text = text_section(config)
        if text is not None and text.features != "live":
            store_captions(config, text, device)
        trainer = Trainer(stage_class(config.stage), config, device)
        artifacts.append(trainer.finished() or trainer.fit())
    return artifacts
