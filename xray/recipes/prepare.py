"""Data and language models that a recipe makes before its stages train."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from data_pipelines.ingest.demo import DemoConfig, make_demo
from data_pipelines.ingest.plain_files import Request
from data_pipelines.ingest.user_data import open_data, open_sources
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.tar_index import TEXT_FILES
from data_pipelines.text.captions import captions_of
from stages import stage_class
from stages.base import split_parents
from xray import dist
from xray.artifacts.artifact import open_artifact
from xray.artifacts.language_model import Language
from xray.config import RunConfig, TextConfig
from xray.config import loading as cfg
from xray.config.prepare import LlmConfig
from xray.files import replacing
from xray.models.tiny_llm import build_tiny_llm
from xray.precompute.text_features import TextFeaturesConfig, write_text_features
from xray.progress import progress_bar
from xray.recipes.recipe import Recipe


def prepare(recipe: Recipe) -> None:
    """Make the demo data and the tiny LLM that a recipe asks for, on rank 0."""
    wanted = recipe.prepare

    def make() -> None:
        if wanted.demo is not None:
            make_demo(Path(recipe.root), cfg.build(DemoConfig, wanted.demo))
        if wanted.llm is not None:
            make_llm(wanted.llm, recipe.root)

    dist.on_main(make, dist.PREPARATION)


def make_llm(config: LlmConfig, root: str) -> None:
    """Build the tiny LLM, unless it is there; a half-written folder is written anew."""
    folder = Path(config.path)
    if folder.is_dir():
        return
    source = open_data(resolve(config.captions, root), Request("captions", "text"))
    captions = [
        caption
        for place in source.places()
        for caption in captions_of(source.read(*place, TEXT_FILES))
    ]
    sizes = config.vocab_size, config.width, config.depth, config.heads
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        build_tiny_llm(captions, temporary, *sizes, config.family)


def store_captions(config: RunConfig, text: TextConfig, device: torch.device) -> None:
    """Write the text features that a run reads, unless they are there already."""
    parents = split_parents(
        stage_class(config.stage), [open_artifact(path) for path in config.init_from]
    )
    names = [block.source for block in [*config.blocks, *config.validation]]

    def write() -> None:
        language = Language(text, parents.text)
        for name, source in open_sources(config.data, names).items():
            given = dataclasses.asdict(text)
            captions = config.data.sources[name].captions
            job = TextFeaturesConfig(**given, captions=captions, workers=config.data.workers)
            with progress_bar(f"captions of {name}") as progress:
                write_text_features(source, language, job, device, progress)

    dist.main_first(write)
