"""What the text and clip stages share: the LLM tower from a folder or an artifact, and tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stages.base import Batch
from xray.artifact import Artifact
from xray.config import TextConfig
from xray.errors import ConfigError
from xray.models.text import TextTower, find_llm, llm_digest, load_tokenizer, tokenize
from xray.restore import llm_folder, restore_text, text_config

# What a text artifact decides for those that start from it.
STRUCTURE = ("lora_rank", "lora_alpha", "lora_targets")


class Language:
    """The LLM that a run's captions go through: a folder, or what a text artifact holds.

    `config` is the text section with the artifact's structure in it.
    """

    def __init__(self, config: TextConfig, parent: Artifact | None) -> None:
        self.parent = parent
        self.config = config
        if parent is None:
            self.folder = find_llm(config.llm)
            self.digest = llm_digest(self.folder)
            if config.tune == "none":  # LoRA that is never trained would be dead weight
                self.config = dataclasses.replace(config, lora_rank=0)
        else:
            theirs = text_config(parent)
            has = "lora" if theirs.lora_rank else "full"
            if config.tune not in ("none", has):
                raise ConfigError(
                    f"text.tune={config.tune} cannot go on from {parent.path}, which was tuned "
                    f"with {has}: use none or {has}"
                )
            structure = {name: getattr(theirs, name) for name in STRUCTURE}
            self.config = dataclasses.replace(config, llm=config.llm or theirs.llm, **structure)
            self.digest = parent.manifest["inputs"]["llm"]
            self.folder = llm_folder(parent, config.llm)
        if Path(self.config.llm).is_dir():  # what is recorded must be found from any folder
            self.config = dataclasses.replace(self.config, llm=str(Path(self.config.llm).resolve()))
        self.tokenizer = load_tokenizer(self.folder)

    def build(self) -> TextTower:
        if self.parent is None:
            return TextTower(self.config, self.folder)
        return restore_text(self.parent, self.config, self.folder)

    def tokens(self, captions: Sequence[str]) -> Batch:
        """Captions of one sample -> ids and mask, [C, L]."""
        return tokenize(self.tokenizer, captions, self.config.max_length)

    def collate(self, rows: Sequence[Batch]) -> Batch:
        """Pad [C, L] ids and masks to the micro-batch's longest: [B, C, L]."""
        longest = max(row["input_ids"].shape[-1] for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        return {
            key: torch.stack(
                [F.pad(row[key], (0, longest - row[key].shape[-1]), value=value) for row in rows]
            )
            for key, value in fill.items()
        }

    def export_files(self) -> dict[str, Any]:
        """Config and tokenizer, so that an artifact with all weights needs no base."""
        return {f"llm/{path.name}": path for path in sorted(self.folder.glob("*.json"))}
