"""The command line. Torch and all that needs it is imported inside commands: help stays fast."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from xray import __version__, dist
from xray.commands import (  # noqa: F401 - each adds its commands to `xray data`
    data_curate,
    data_precompute,
    data_tags,
)
from xray.commands.ablate import ablate
from xray.commands.artifacts import export, lineage, show
from xray.commands.common import Overrides, guarded
from xray.commands.data import data_app
from xray.commands.doctor import doctor
from xray.commands.embed import embed, search
from xray.commands.evaluate import evaluate
from xray.commands.plan import plan
from xray.commands.runs import debug_app, report
from xray.commands.train import run, train

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whatever a library asks for, torch.load takes tensors alone; torch refuses to obey both.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


app = typer.Typer(
    name="xray",
    help="One vision backbone through MAE, hashtags and CLIP with an LLM, on DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (doctor, plan, ablate):
    app.command()(guarded(command))
for command in (run, train):
    app.command()(command)
app.command("eval")(evaluate)
for command in (show, lineage, export, embed, search, report):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(debug_app, name="debug")


def main() -> None:
    """Run a command; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    dist.setup_environment()
    # deepspeed's launcher says it twice: in the environment too
    sys.argv = [item for item in sys.argv if not item.startswith("--local_rank=")]
    logging.getLogger("xray").setLevel(logging.INFO if dist.is_main() else logging.ERROR)
    app()


@app.command("config")
@guarded
def show_config(
    name: Annotated[str, typer.Argument(help="A recipe, a stage, or eval")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved config of a stage, of an evaluation, or of all that a recipe has."""
    from omegaconf import OmegaConf

    from stages import STAGES, stage_class
    from xray.config import loading as cfg
    from xray.config.identity import to_dict
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
        print(OmegaConf.to_yaml(OmegaConf.create({key: to_dict(section)})), end="")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)
