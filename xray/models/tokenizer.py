"""Tokenization of captions: a folder's tokenizer, the prompt, and the mask of pooled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xray.config import TextConfig
from xray.errors import ConfigError, brief
from xray.models.llm_folder import NO_REMOTE_CODE, check_no_code, is_decoder, pools_prompt

TokenIds = dict[str, Tensor]  # one tensor per name in TOKENS
TOKENS = ("input_ids", "attention_mask", "pooled_mask")


class CaptionTokenizer:
    """Tokenizer of a model's folder, with the prompt and the maximum length of a text section.

    The model reads the prompt before every caption. Sentence encoders also pool its tokens, as in
    sentence-transformers; LLMs do not (LLM2Vec, 2404.05961; LLM2CLIP, 2411.04997). Raises
    ConfigError without a usable tokenizer, and for a prompt that is too long.
    """

    def __init__(self, folder: Path, config: TextConfig) -> None:
        self.tokenizer = _load(folder)
        self.prompt, self.max_length = config.prompt, config.max_length
        self.full = config.padding == "full"
        special: list[int] = self.tokenizer("a", return_special_tokens_mask=True)[
            "special_tokens_mask"
        ]
        self.leading = special.index(0) if 0 in special else 0  # special tokens before a caption
        self.pool_prompt = _pools_prompt(folder, config)
        self.pool_special = _pools_special(folder, config, self.leading)
        if self._ends_prompt and not self.tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer in {folder} has no fast version, so the end of text.prompt is "
                "unknown: set text.prompt to an empty string, or text.pool_prompt=true"
            )
        used = len(self.tokenizer(self.prompt)["input_ids"])
        if used >= self.max_length:
            raise ConfigError(
                f"text.prompt and the tokenizer's special tokens take {used} tokens and leave none "
                f"of text.max_length={self.max_length} to captions: increase text.max_length"
            )

    @property
    def largest_id(self) -> int:
        """Largest token id of a caption with the special tokens around it and padding."""
        used = [self.tokenizer.vocab_size - 1, self.tokenizer.pad_token_id]
        return max([*used, *self.tokenizer("a")["input_ids"]])

    def __call__(self, captions: Sequence[str]) -> TokenIds:
        """Tokenize C captions into `input_ids`, `attention_mask` and `pooled_mask`, each [C, L].

        Rows are padded on the right. `attention_mask` is 0 for padding, unless it is `full`.
        `pooled_mask` is also 0 for the prompt and the special tokens that are not pooled.
        """
        padding = "max_length" if self.full else True
        encoded = self._encoded(captions, self.max_length, padding)
        if not encoded["input_ids"].numel():  # only empty captions, and no special tokens
            encoded = self._encoded(captions, 1, padding="max_length")
        mask = encoded["attention_mask"]
        mask = torch.ones_like(mask) if self.full else mask
        pooled = mask
        if self._ends_prompt:
            after = encoded["offset_mapping"][..., 1] > len(self.prompt)
            pooled = mask * (after.long().cumsum(dim=1) > 0)
        elif not self.pool_special:
            pooled = mask * (torch.arange(mask.shape[1]) >= self.leading)
        return {"input_ids": encoded["input_ids"], "attention_mask": mask, "pooled_mask": pooled}

    def _encoded(self, captions: Sequence[str], most: int, padding: bool | str) -> Any:
        return self.tokenizer(
            [self.prompt + caption for caption in captions],
            truncation=True,
            max_length=most,
            padding=padding,
            return_tensors="pt",
            return_offsets_mapping=self._ends_prompt,
        )

    @property
    def _ends_prompt(self) -> bool:
        """True if pooling begins after the prompt."""
        return bool(self.prompt) and not self.pool_prompt

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Count the tokens of each caption with its prompt, without truncation."""
        ids = self.tokenizer([self.prompt + caption for caption in captions])["input_ids"]
        return [len(row) for row in ids]

    def pad(self, rows: Sequence[TokenIds]) -> TokenIds:
        """Stack the tokens of B samples, [C, L] each -> [B, C, longest L], padded on the right."""
        return {key: torch.stack(values) for key, values in self._padded(rows).items()}

    def bucket(self, batches: Sequence[TokenIds]) -> tuple[list[TokenIds], Tensor]:
        """Deal the rows of batches [B, C, L] to batches of the same sizes, in order of length.

        Also returns, for each row of the given batches in turn, its row in the new ones.
        """
        whole = {key: torch.cat(values) for key, values in self._padded(batches).items()}
        lengths = whole["attention_mask"].sum(dim=-1).amax(dim=-1)
        order = lengths.argsort(stable=True)
        parts = order.split([len(batch["input_ids"]) for batch in batches])
        longest = [int(lengths[part].max()) for part in parts]
        bucketed = [
            {key: value[part, :, :length] for key, value in whole.items()}
            for part, length in zip(parts, longest, strict=True)
        ]
        return bucketed, order.argsort()

    def _padded(self, rows: Sequence[TokenIds]) -> dict[str, list[Tensor]]:
        """Pad the tokens [..., L] of several rows on the right, to the longest L."""
        longest = max(row["input_ids"].shape[-1] for row in rows)
        fill = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "pooled_mask": 0}
        return {
            key: [F.pad(row[key], (0, longest - row[key].shape[-1]), value=value) for row in rows]
            for key, value in fill.items()
        }


def _pools_prompt(folder: Path, config: TextConfig) -> bool:
    """Decide text.pool_prompt=auto; false without a prompt."""
    if config.pool_prompt != "auto":
        return config.pool_prompt
    if not config.prompt:
        return False
    own = pools_prompt(folder)
    return not is_decoder(folder) if own is None else own


def _pools_special(folder: Path, config: TextConfig, leading: int) -> bool:
    """Decide text.pool_special=auto; true without leading special tokens."""
    if config.pool_special != "auto":
        return config.pool_special
    return not leading or pools_prompt(folder) is not None or not is_decoder(folder)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_REMOTE_CODE)
    except Exception as error:
        check_no_code(folder)
        raise ConfigError(f"{folder} has no usable tokenizer: {brief(error)}") from error
    # without vocabulary files, transformers returns a tokenizer for which every word is unknown
    files = {*tokenizer.vocab_files_names.values(), "tokenizer.json"}
    needs_files = bool(tokenizer.vocab_files_names)  # a byte-level one, such as ByT5's, needs none
    if needs_files and not any((folder / name).is_file() for name in files):
        raise ConfigError(
            f"{folder} has no tokenizer: it contains none of {', '.join(sorted(files))}"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer in {folder} has neither a padding token nor an end token")
    return tokenizer
