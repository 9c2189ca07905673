"""Settings of the data and the language model that a recipe makes before it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class LlmConfig:
    """A small random text model and a tokenizer of the captions, where no other is at hand."""

    path: str = ""
    captions: str = ""  # shards under data.root
    vocab_size: int = 2048
    width: int = 128
    depth: int = 2
    heads: int = 4
    family: Literal["qwen3", "clip"] = "qwen3"  # a decoder, or CLIP's classic text transformer


@dataclass
class PrepareConfig:
    """What a recipe makes before its first stage, once."""

    demo: dict[str, Any] | None = None  # sizes of the generated data set at data.root
    llm: LlmConfig | None = None
