"""`xray config` and `xray version`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from xray import __version__
from xray.commands.common import Overrides, guarded


@guarded
def show_config(
    name: Annotated[str, typer.Argument(help="A recipe, a stage, or eval")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved config of a stage, of an evaluation, or of every stage of a recipe."""
    from omegaconf import OmegaConf

    from stages import STAGES, stage_class
    from xray.config import loading as cfg
    from xray.evaluation.config import EvalConfig

    given = cfg.parse_overrides(overrides or [])
    sections: dict[str, Any]
    if name in STAGES:
        sections = {name: cfg.load_config(stage_class(name).Config, name, given)}
    elif name == "eval":
        sections = {"eval": cfg.build(EvalConfig, given.get("eval", {}), section="eval.")}
    else:
        from xray.recipes.recipe import load_recipe

        recipe = load_recipe(name, overrides or [])
        sections = {config.stage: config for config in recipe.runs} | {"eval": recipe.eval}
    for key, section in sections.items():
        print(OmegaConf.to_yaml(OmegaConf.create({key: asdict(section)})), end="")


@guarded
def version() -> None:
    """Print the version."""
    print(__version__)
