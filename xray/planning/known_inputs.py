"""What a plan can know without a run: the LLM's structure, the number of tags, sizes of sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_pipelines.curation.keep_list import keep_listed
from data_pipelines.ingest.run_sources import open_sources
from data_pipelines.shards.manifest import resolve
from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.source import Source
from data_pipelines.tags.vocabulary import Vocabulary
from stages.base import Facts
from stages.hashtag import HashtagStage
from xray.artifacts.language_model import STRUCTURE
from xray.config import TextConfig
from xray.config.prepare import LlmConfig
from xray.errors import DataError
from xray.models.tiny_llm import tiny_settings

VISION_ALONE = ("mae", "hashtag")


@dataclasses.dataclass(frozen=True)
class Known:
    """A stage's facts, its sources that can be opened, and what had to be assumed."""

    facts: Facts
    sources: dict[str, Source]
    notes: list[str]


@contextmanager
def known(
    configs: Sequence[Any], tiny: LlmConfig | None = None, tags: int = 0
) -> Iterator[list[Known]]:
    """What is known of each stage; a folder of a recipe's tiny LLM is there for as long."""
    with TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        if tiny is not None and not Path(tiny.path).is_dir():
            sizes = tiny.vocab_size, tiny.width, tiny.depth, tiny.heads
            tiny_settings(tiny.family, *sizes).save_pretrained(folder)
            made[tiny.path] = Path(folder)
        tuned = next((c.text for c in configs if c.stage == "text"), None)
        yield [_known(config, made, tuned, tags) for config in configs]


def _known(config: Any, made: dict[str, Path], tuned: TextConfig | None, tags: int) -> Known:
    sources, notes = _sources(config), list[str]()
    llm, text = None, None
    if config.stage not in VISION_ALONE:
        name = config.text.llm or (tuned.llm if tuned is not None else "")  # as clip takes it
        llm = made.get(name) or _llm(name)
        if llm is None:
            named = f"text.llm={name} is not at hand" if name else "no text.llm"
            notes.append(
                f"{named}: the LLM is not counted; give a folder with its config.json, which is "
                "enough"
            )
        if config.stage == "clip" and tuned is not None:
            text = _inherited(config.text, tuned)
        if config.stage == "clip" and config.clip.teacher:
            notes.append(f"clip.teacher={config.clip.teacher} is not counted")
    if config.stage == "hashtag" or (config.stage == "clip" and config.clip.hashtag_weight):
        tags = tags or _tags(config, sources)
        if not tags:
            tags = config.hashtag.max_size
            notes.append(
                f"the vocabulary is not known yet: counted with the {tags:,} tags of "
                "hashtag.max_size; --tags or hashtag.vocabulary say it"
            )
    return Known(Facts(tags, llm, text), sources, notes)


def _sources(config: Any) -> dict[str, Source]:
    """Those on this computer."""
    found: dict[str, Source] = {}
    for block in config.blocks:
        own = config.data.sources[block.source]
        if not is_remote(resolve(own.shards, config.data.root)):
            try:
                opened = open_sources(config.data, [block.source])
            except DataError:
                continue
            found |= {name: keep_listed(source, own) for name, source in opened.items()}
    return found


def _llm(name: str) -> Path | None:
    """A folder with a config.json: a local one, or one that the hub's cache holds."""
    folder = Path(name).expanduser()
    if name and (folder / "config.json").is_file():
        return folder
    if not name or folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _inherited(own: TextConfig, tuned: TextConfig) -> TextConfig:
    """A clip stage's text section behind a text stage."""
    structure = {name: getattr(tuned, name) for name in STRUCTURE}
    if tuned.tune == "full":
        structure["lora_rank"] = 0
    names = [item.name for item in dataclasses.fields(TextConfig)]
    return TextConfig(**{name: getattr(own, name) for name in names} | structure)


def _tags(config: Any, sources: dict[str, Source]) -> int:
    """Of the vocabulary that is named or that the data give; 0 = neither is there."""
    if config.hashtag.vocabulary:
        return len(Vocabulary.load(Path(config.hashtag.vocabulary)))
    if any(block.source not in sources for block in config.blocks):
        return 0
    return len(HashtagStage(config).find_vocabulary(sources))
