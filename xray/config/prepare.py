"""Settings of the data and the language model that a recipe makes before it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class LlmConfig:
    """Sizes of a small, randomly initialised language model with a tokenizer of the captions."""

    path: str = ""
    captions: str = ""  # shards under data.root
    vocab_size: int = 2048
    width: int = 128
    depth: int = 2
    heads: int = 4
    family: Literal["qwen3", "clip"] = "qwen3"  # a decoder, or CLIP's text transformer


@dataclass
class PrepareConfig:
    """Data and language model that a recipe makes once, before its first stage."""

    demo: dict[str, Any] | None = None  # sizes of the data set generated at data.root
    llm: LlmConfig | None = None
