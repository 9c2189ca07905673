"""A recipe on plain files: packs them once, and gives the settings that train on the shards."""

from __future__ import annotations

import os
from dataclasses import replace

from data_pipelines.ingest.auto_pack import pack_sources
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from xray import dist
from xray.config import DataConfig, RunConfig
from xray.errors import ConfigError
from xray.recipes.recipe import Recipe


def packed_settings(data: DataConfig, names: set[str], use_root: bool = True) -> list[str]:
    """Pack the plain files that sources name, on rank 0, and return the settings that replace
    them on all ranks. Collective.
    """
    settings: list[str] = []

    def work() -> None:
        settings.extend(pack_sources(data, sorted(names), use_root))

    dist.on_main(work, dist.PREPARATION, "packing the data")
    shared: list[str] = dist.broadcast_object(settings)
    return shared


def stage_settings(config: RunConfig, recipe: Recipe | None) -> list[str]:
    """Return the settings under which a stage trains on the shards of the plain files it names.

    recipe: the one that the settings are from. Collective; raises ConfigError or DataError.
    """
    names = {block.source for block in (*config.blocks, *config.validation)}
    return packed_settings(config.data, names, recipe is None or recipe.prepare.demo is None)


def recipe_settings(recipe: Recipe, write: bool = True) -> list[str]:
    """Return the settings under which a recipe trains on the shards of the plain files it names.

    write: False to pack nothing, on this rank only. Raises ConfigError or DataError.
    """
    data, names, use_root = _data(recipe), _names(recipe), recipe.prepare.demo is None
    if write:
        settings = packed_settings(data, names, use_root)
    else:
        settings = pack_sources(data, sorted(names), use_root, write=False)
    if any(item.startswith("data.root=") for item in settings):
        _check_evaluation(recipe)
    replaced = dict(item.split("=", 1) for item in settings)
    llm = recipe.prepare.llm
    for name in sorted(names) if llm is not None and llm.captions else ():
        given = replaced.get(f"data.sources.{name}.shards")
        if given is not None and llm is not None and llm.captions == data.sources[name].shards:
            return [*settings, f"prepare.llm.captions={given}"]
    return settings


def _data(recipe: Recipe) -> DataConfig:
    """Return the data settings of the first stage, with the sources and modalities of all."""
    every = [run.data for run in recipe.runs]
    sources = {name: own for data in reversed(every) for name, own in data.sources.items()}
    modalities = list(dict.fromkeys(kind for data in every for kind in data.modalities))
    return replace(every[0], sources=sources, modalities=modalities)


def _names(recipe: Recipe) -> set[str]:
    blocks = [block for run in recipe.runs for block in (*run.blocks, *run.validation)]
    return {block.source for block in blocks}


def _check_evaluation(recipe: Recipe) -> None:
    """Raise ConfigError for an evaluation set among the files of data.root, which are trained on.

    A table names its files, so what is beside it is not trained on.
    """
    root = os.path.realpath(os.path.expanduser(recipe.root))
    for key, pattern in (
        recipe.eval.data_sets(recipe.eval.configured()) if os.path.isdir(root) else ()
    ):
        for where in dict.fromkeys((resolve(pattern, recipe.root), os.path.expanduser(pattern))):
            inside = not is_remote(where) and os.path.realpath(where).startswith(root + os.sep)
            if inside and os.path.exists(where):
                raise ConfigError(
                    f"eval.{key}={pattern} is inside data.root={recipe.root}, whose files are all "
                    "trained on: set data.root to the folder of the training files"
                )
