"""Inputs of a plan that are known without a run: LLM structure, vocabulary size, sources."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipelines.shards.source import Source
from stages import stage_class
from stages.base import Facts
from stages.parent_settings import parents_at
from xray.artifacts.artifact import Artifact
from xray.artifacts.language_model import structure_of
from xray.artifacts.manifest_config import text_config
from xray.artifacts.offers import JOINT, SENTENCES, VISION, slot_of
from xray.config import RunConfig, TextConfig
from xray.config.model import LlmConfig
from xray.config.run import text_section
from xray.models.tiny_llm import tiny_settings
from xray.training.length import sources_at_hand


@dataclasses.dataclass(frozen=True)
class Known:
    """A stage's facts, its sources that can be opened, and notes on what had to be assumed."""

    facts: Facts
    sources: dict[str, Source]
    notes: list[str]
    countable: bool  # False for a stage without a backbone whose LLM is not known


@contextmanager
def known(
    configs: Sequence[RunConfig], tiny: LlmConfig | None = None, tags: int = 0
) -> Iterator[list[Known]]:
    """Yield what is known of each stage; a temporary folder describes a tiny LLM to be made."""
    with TemporaryDirectory() as folder:
        made: dict[str, Path] = {}
        if tiny is not None and not Path(tiny.path).is_dir():
            sizes = tiny.vocab_size, tiny.width, tiny.depth, tiny.heads
            tiny_settings(tiny.family, *sizes).save_pretrained(folder)
            made[tiny.path] = Path(folder)
        stages_known, tuned = list[Known](), None
        for config in configs:
            stages_known.append(_known(config, made, tuned, tags))
            if SENTENCES in stage_class(config.stage).offers:
                tuned = text_section(config)
        yield stages_known


def _known(config: RunConfig, made: dict[str, Path], tuned: TextConfig | None, tags: int) -> Known:
    """Collect the facts of a stage. tuned: text section of an earlier stage that tunes the LLM."""
    sources, notes = sources_at_hand(config), list[str]()
    kind, own, text, llm = stage_class(config.stage), text_section(config), None, None
    if own is not None:
        parent = None if tuned is not None else _text_parent(config)
        if parent is not None:
            tuned = text_config(parent)
        name = own.llm or (tuned.llm if tuned is not None else "")  # as the stage itself takes it
        carried = parent is not None and "llm/config.json" in parent.manifest["files"]
        name = f"{parent.path}/llm" if parent is not None and carried else name
        llm = made.get(name) or _llm(name)
        if llm is None:
            named = f"text.llm={name} is not on this machine" if name else "no text.llm"
            left = "the LLM is not counted" if VISION in kind.offers else "not in the table"
            notes.append(f"{named}: {left}; give a folder with its config.json, which is enough")
        if SENTENCES in kind.accepts and tuned is not None:
            text = _inherited(own, tuned)
    facts, assumed = kind(config).count(sources, Facts(tags, llm, text))
    countable = own is None or llm is not None or VISION in kind.offers
    return Known(facts, sources, notes + assumed, countable)


def _text_parent(config: RunConfig) -> Artifact | None:
    """Find the artifact whose text tower a run starts from; only its manifest is read."""
    found = [Artifact(Path(at), dict(own), "", at) for at, own in parents_at(config.init_from)]
    tuned = [own for own in found if slot_of(own.offers) == "text"]
    if not tuned and getattr(getattr(config, "clip", None), "heads", "") == "parent":
        tuned = [own for own in found if JOINT in own.offers]
    return tuned[0] if tuned else None


def _llm(name: str) -> Path | None:
    """Find a folder with a config.json: a local one, or one in the hub's cache."""
    folder = Path(os.path.expanduser(name))
    if name and (folder / "config.json").is_file():
        return folder
    if not name or folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _inherited(own: TextConfig, tuned: TextConfig) -> TextConfig:
    """Return a stage's text section with the structure that an earlier text stage gives."""
    structure = structure_of(tuned)
    if tuned.tune == "full":
        structure["lora_rank"] = 0
    names = [item.name for item in dataclasses.fields(TextConfig)]
    return TextConfig(**({name: getattr(own, name) for name in names} | structure))
