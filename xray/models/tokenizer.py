"""Captions to tokens: a folder's tokenizer, its prompt and what of a caption is pooled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.config import TextConfig
from xray.errors import ConfigError, brief
from xray.models.llm_folder import OWN_CODE, check_no_code

TokenIds = dict[str, Tensor]
TOKENS = ("input_ids", "attention_mask", "pooled_mask")


class CaptionTokenizer:
    """A folder's tokenizer, with the prompt and the length of a text section.

    The prompt comes before every caption: it is read, but not pooled (LLM2CLIP, 2411.04997). Raises
    ConfigError for a folder without a usable tokenizer, and a prompt that leaves no room.
    """

    def __init__(self, folder: Path, config: TextConfig) -> None:
        self.tokenizer = _load(folder)
        self.prompt, self.max_length = config.prompt, config.max_length
        if self.prompt and not self.tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer in {folder} cannot say where text.prompt ends: leave it empty"
            )
        used = len(self.tokenizer(self.prompt)["input_ids"])
        if used >= self.max_length:
            raise ConfigError(
                f"text.prompt and what the tokenizer adds take {used} tokens and leave none of "
                f"text.max_length={self.max_length} to captions: raise it"
            )

    @property
    def largest_id(self) -> int:
        """Of its own vocabulary, padding, and what it adds to a caption; unused extras aside."""
        used = [self.tokenizer.vocab_size - 1, self.tokenizer.pad_token_id]
        return max([*used, *self.tokenizer("a")["input_ids"]])

    def __call__(self, captions: Sequence[str]) -> TokenIds:
        """Captions -> `input_ids`, `attention_mask` and `pooled_mask`, [C, L], padded at the right.

        `pooled_mask` leaves out padding, and what comes before the first token after the prompt.
        """
        found = self.tokenizer(
            [self.prompt + caption for caption in captions],
            truncation=True,
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
            return_offsets_mapping=bool(self.prompt),
        )
        mask = found["attention_mask"]
        pooled = mask
        if self.prompt:
            after = found["offset_mapping"][..., 1] > len(self.prompt)
            pooled = mask * (after.long().cumsum(dim=1) > 0)
        return {"input_ids": found["input_ids"], "attention_mask": mask, "pooled_mask": pooled}

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption with its prompt, uncut."""
        ids = self.tokenizer([self.prompt + caption for caption in captions])["input_ids"]
        return [len(row) for row in ids]

    def pad(self, rows: Sequence[TokenIds]) -> TokenIds:
        """[C, L] of each sample -> [B, C, longest L]."""
        longest = max(row["input_ids"].shape[-1] for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "pooled_mask": 0}
        return {
            key: torch.stack(
                [F.pad(row[key], (0, longest - row[key].shape[-1]), value=value) for row in rows]
            )
            for key, value in fill.items()
        }


def cut_share(tokenizer: CaptionTokenizer, captions: Sequence[str]) -> float:
    """The share of captions that `text.max_length` cuts."""
    lengths = tokenizer.lengths(captions) if captions else []
    return sum(length > tokenizer.max_length for length in lengths) / max(1, len(lengths))


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **OWN_CODE)
    except Exception as error:
        check_no_code(folder)
        raise ConfigError(f"{folder} has no usable tokenizer: {brief(error)}") from error
    # without its files transformers makes one up, of which every word is unknown
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    of_bytes = not tokenizer.vocab_files_names  # it needs no file
    if not (of_bytes or any((folder / name).is_file() for name in files)):
        raise ConfigError(f"{folder} has no tokenizer: none of {', '.join(sorted(files))} is there")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has neither a padding token nor an end token")
    return tokenizer
