"""`xray init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from xray.commands.common import guarded
from xray.errors import ConfigError


@guarded
def init(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The file to write")],
    data: Annotated[
        str,
        typer.Argument(
            help="A folder of shards, or of such folders (images/, clips/); a folder or list of "
            "pictures and clips"
        ),
    ],
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Number of GPUs (default: those of this machine)")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, a100, ... (default: this machine's)")] = "",
    hours: Annotated[
        float | None, typer.Option(min=0.01, help="Time (default: 10 minutes, 8 hours on GPUs)")
    ] = None,
    pretrained: Annotated[
        str, typer.Option(help="Adapt this image tower: a timm name, or a .safetensors file")
    ] = "",
    text_llm: Annotated[
        str, typer.Option(help="Model that reads captions: a sentence encoder or an LLM")
    ] = "",
) -> None:
    """Write a commented recipe that fits your data, this machine and your time.

    For example: xray init mine.yaml /data/mine --hours 1
    """
    _check(recipe, data, gpu)
    from xray.recipes.init import InitOptions, write_first_recipe

    options = InitOptions(gpus, gpu, hours or 0.0, pretrained, text_llm)
    for line in write_first_recipe(recipe, data, options):
        print(line)


def _check(recipe: Path, data: str, gpu: str) -> None:
    """Check what was typed, before torch is imported; raises ConfigError or DataError."""
    from data_pipelines.ingest.user_data import kind_of
    from xray.training.gpu_specs import check_gpu

    if recipe.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{recipe} must end in .yaml: xray run takes such files")
    if recipe.exists():
        raise ConfigError(f"{recipe} exists already: choose another name, or delete it")
    kind_of(os.path.expanduser(data), ("shards", "folder", "list"), "xray init")
    if gpu:
        check_gpu(gpu)
