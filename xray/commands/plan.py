"""`xray plan`, `config` and `version`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from xray import __version__
from xray.commands.common import AsJson, Overrides, guarded
from xray.commands.help import examples


@examples(
    ("xray plan full --devices 64 --gpu h100", "memory, FLOPs and time of a recipe on 64 GPUs"),
    ("xray plan mine.yaml --gpu a100 --gb 40", "your own recipe, on GPUs with 40 GB"),
    ("xray plan quickstart --gpu none --gb 8", "whether a machine without a GPU has the memory"),
)
@guarded
def plan(
    name: Annotated[str, typer.Argument(metavar="RECIPE|STAGE", help="A recipe, or a stage")],
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices")] = 1,
    gpu: Annotated[str, typer.Option(help="h100, a100, ... or none")] = "h100",
    gb: Annotated[float, typer.Option(min=0, help="Memory of a device (default: the GPU's)")] = 0,
    mfu: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Model FLOPs utilisation: share of the GPU's peak"),
    ] = 0.4,
    tags: Annotated[
        int, typer.Option(min=0, help="Size of a vocabulary that is not built yet")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Print what RECIPE or STAGE needs, without a GPU or data; exit code 1 if it does not fit.

    Memory is the peak of one device, from a step with tensors without values. The time assumes
    --mfu. A stage takes its settings from KEY=VALUE.
    """
    from stages import STAGES
    from xray.recipes.recipe import load_recipe, load_stage
    from xray.training.gpu_specs import check_gpu

    check_gpu(gpu)
    given = overrides or []
    if name in STAGES:
        runs, llm = [load_stage(name, given)], None
    else:
        recipe = load_recipe(name, given, partly=True)
        from xray.recipes.own_data import recipe_settings

        if packed := recipe_settings(recipe, write=False):
            recipe = load_recipe(name, [*given, *packed], partly=True)
        runs, llm = recipe.runs, recipe.prepare.llm
    from xray.planning.plan import make_plan

    made = make_plan(runs, llm, tags, devices, gpu, gb, mfu, recipe=name not in STAGES)
    if as_json:
        content = {"devices": devices, "gpu": gpu, "stages": made.stages, "notes": made.notes}
        print(json.dumps(content, indent=1))
    else:
        made.table(f"{name} on {devices:,} x {gpu}", mfu).print()
        for note in made.notes:
            print(note)
    if not made.fits:
        raise SystemExit(1)


@guarded
def show_config(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE|STAGE|eval|KEY", help="A recipe, a stage, or a key")
    ],
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="With a comment on each key: meaning, type, default")
    ] = False,
) -> None:
    """Print the resolved settings of a stage, of an evaluation, or of every stage of a recipe.

    For a key or a section, such as data.crop_scale or optim: its meaning, type, default, and the
    shipped files that set it. Keys marked `runtime` may differ when a run is resumed.
    """
    from omegaconf import OmegaConf

    from stages import STAGES, stage_config
    from xray.config import loading as cfg
    from xray.config.explain import commented
    from xray.evaluation.config import EvalConfig
    from xray.recipes.recipe import kind_of_key

    given = cfg.parse_overrides(overrides or [], kind_of_key)
    sections: dict[str, Any]
    if name in STAGES:
        sections = {name: cfg.load_config(stage_config(name), name, given)}
    elif name == "eval":
        sections = {"eval": cfg.build(EvalConfig, given.get("eval", {}), section="eval.")}
    elif _explain_key(name):
        return
    else:
        from xray.recipes.recipe import load_recipe

        recipe = load_recipe(name, overrides or [], partly=True)
        sections = {config.stage: config for config in recipe.runs} | {"eval": recipe.eval}
    for key, section in sections.items():
        if explain:
            print("\n".join(commented(key, section)))
        else:
            print(OmegaConf.to_yaml(OmegaConf.create({key: asdict(section)})), end="")
        if key in STAGES and section.train.epochs is not None:
            print(f"# {key}: samples becomes the number of {section.train.epochs:g} epochs", end="")
            print(" when a run opens its data")


def _explain_key(name: str) -> bool:
    """Print the description of a key or a section; returns False for the name of a recipe."""
    from xray.config.explain import shown
    from xray.recipes.settings import explain_key, section_of, unknown_key

    if name.endswith((".yaml", ".yml")):
        return False
    if found := explain_key(name):
        print("\n".join(found.lines()))
    elif section := section_of(name):
        for own in section.values():
            print(f"{own.key}={shown(own.default)}\n    {own.meaning}")
    elif "." in name:
        raise unknown_key(name)
    return bool(found or section)


@guarded
def version() -> None:
    """Print the version."""
    print(__version__)
