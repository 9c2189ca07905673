"""Sentence encoders: folders of sentence-transformers, and encoders of transformers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.imports.parts import Family, Imported, Text
from xray.imports.source import Source
from xray.imports.texts import checked_text, copy_tokenizer
from xray.imports.transformers_folder import read_config
from xray.models.llm_folder import SENTENCE_POOLING, default_prompt, is_decoder, own_pooling
from xray.models.text_tower import TextTower

LENGTH = 512  # tokens, if the folder does not say


def read(source: Source, folder: Path) -> Imported:
    """Read the encoder with its pooling and largest length; its tokenizer is copied."""
    source.check_weights()
    length = source.json("sentence_bert_config.json").get("max_seq_length") or LENGTH
    limit = source.json("config.json").get("max_position_embeddings") or length
    try:
        attention: Any = "causal" if is_decoder(source.folder) else "bidirectional"
        config = TextConfig(
            tune="full", lora_rank=0, attention=attention, pooling=own_pooling(source.folder),
            max_length=min(int(length), int(limit)), prompt=default_prompt(source.folder),
        )  # fmt: skip
        tower = TextTower(config, source.folder)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    copy_tokenizer(source, folder)
    for name in ("config.json", SENTENCE_POOLING, "modules.json"):
        if (source.folder / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.folder / name, folder / name)
    text = Text(dataclasses.replace(config, tune="none"), folder, tower.state_dict())
    return Imported("transformers", text=checked_text(source, text))


def fits(source: Source) -> bool:
    """Tell if a folder is of sentence-transformers, or has an encoder of transformers."""
    if "modules.json" in source.files or not source.kind:
        return "modules.json" in source.files
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING

    try:
        return type(read_config(source)) in MODEL_FOR_TEXT_ENCODING_MAPPING
    except ArtifactError:  # of a model that transformers does not have
        return False


FAMILY = Family("sentence encoder", fits, read)
