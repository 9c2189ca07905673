"""Small text models with random weights and a tokenizer trained on captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from xray.models.llm_folder import quiet_transformers

Family = Literal["qwen3", "clip"]
POSITIONS = 512


def build_tiny_llm(
    captions: Iterable[str],
    folder: Path,
    vocab_size: int,
    width: int,
    depth: int,
    heads: int,
    family: Family,
) -> None:
    """Write a small model with random weights and a BPE tokenizer trained on the captions.

    family: qwen3 is a decoder that replaces a pretrained LLM in tests and on machines without one.
    clip is the text transformer of CLIP (2103.00020), used as the control; use it with
    text.attention=causal and text.pooling=last.
    """
    from transformers import AutoModel

    quiet_transformers()
    tokenizer = _tokenizer(captions, vocab_size, ends=family == "clip")
    tokenizer.save_pretrained(folder)
    settings = tiny_settings(family, len(tokenizer), width, depth, heads)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(settings).save_pretrained(folder)


def _tokenizer(captions: Iterable[str], vocab_size: int, ends: bool) -> Any:
    """Train a byte-level BPE in lower case; ends: append <eos> to every caption."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    if ends:
        tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_settings(family: Family, vocabulary: int, width: int, depth: int, heads: int) -> Any:
    """Return the transformers configuration of a small model."""
    from transformers import CLIPTextConfig, Qwen3Config

    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    if family == "clip":
        return CLIPTextConfig(**common, bos_token_id=1, hidden_act="gelu")  # as in open_clip
    return Qwen3Config(**common, num_key_value_heads=heads, head_dim=width // heads)
