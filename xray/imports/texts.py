"""Text towers of released models: CLIPTextModel or SiglipTextModel, and their tokenizers."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.imports.parts import Naming, State, Text, check_fit
from xray.imports.source import Source
from xray.models.llm_folder import NO_REMOTE_CODE, TOKENIZER_FILES
from xray.models.text_tower import TextTower
from xray.models.tokenizer import CaptionTokenizer

CLEANED = ("whitespace", "lower", "canonicalize")
END = "<|endoftext|>"
START = "<|startoftext|>"
LLM = "llm."  # prefix of the language model's tensors in our text tower


def clip_text(
    source: Source,
    folder: Path,
    sizes: dict[str, Any],
    state: State,
    theirs: Naming,
    end: int | None = None,
) -> Text:
    """Make CLIP's causal text tower, pooled at the end token.

    sizes: settings of transformers' CLIPTextConfig. state: by the names of CLIPTextModel, which
    `theirs` maps to those in the source. end: id of the token that ends a caption; None = the
    largest of the vocabulary. Raises ArtifactError for weights or a tokenizer that do not fit.
    """
    from transformers import CLIPTextConfig

    own = _write_config(CLIPTextConfig, source, folder, sizes)
    text = _text(source, folder, sizes, state, theirs, "causal")
    expected = sizes["vocab_size"] - 1 if end is None else end
    given = own("a dog")["input_ids"][-1]
    if given != expected:
        raise ArtifactError(
            f"{source}: its tokenizer ends a caption with token {given}, the text tower is read "
            f"at token {expected}: it is another model's tokenizer"
        )
    return text


def siglip_text(
    source: Source, folder: Path, sizes: dict[str, Any], state: State, theirs: Naming
) -> Text:
    """Make SigLIP's bidirectional text tower, pooled at the last of a full length of tokens."""
    from transformers import SiglipTextConfig

    _write_config(SiglipTextConfig, source, folder, sizes)
    return _text(source, folder, sizes, state, theirs, "bidirectional", padding="full")


def _write_config(kind: Any, source: Source, folder: Path, sizes: dict[str, Any]) -> Any:
    """Write config.json with the tokenizer's special tokens; return the tokenizer."""
    kind(**sizes).save_pretrained(folder)
    length = sizes["max_position_embeddings"]
    try:
        own = CaptionTokenizer(folder, TextConfig(max_length=length)).tokenizer
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    tokens = {
        f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    kind(**sizes, **tokens).save_pretrained(folder)
    return own


def _text(
    source: Source,
    folder: Path,
    sizes: dict[str, Any],
    state: State,
    theirs: Naming,
    attention: Literal["causal", "bidirectional"],
    **more: Any,
) -> Text:
    config = TextConfig(
        tune="none", lora_rank=0, attention=attention, pooling="last",
        max_length=sizes["max_position_embeddings"], **more,
    )  # fmt: skip
    named = {f"{LLM}{name}": value for name, value in state.items()}
    naming = lambda name: theirs(name.removeprefix(LLM))  # noqa: E731
    return checked_text(source, Text(config, folder, named, naming))


def checked_text(source: Source, text: Text) -> Text:
    """Return a text tower with all settings decided, as a run records them.

    Raises ArtifactError if the weights or the tokenizer do not fit the tower.
    """
    try:
        with torch.device("meta"):
            tower = TextTower(text.config, text.folder, weights=False)
        tokenizer = CaptionTokenizer(text.folder, text.config)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    check_fit(source, "the text tower", tower, text.state, text.theirs)
    if tokenizer.largest_id >= tower.vocabulary:
        raise ArtifactError(
            f"{source}: its tokenizer gives token {tokenizer.largest_id}, and the text tower "
            f"embeds {tower.vocabulary}: it is another model's tokenizer"
        )
    pooled = {name: getattr(tokenizer, name) for name in ("pool_prompt", "pool_special")}
    return dataclasses.replace(text, config=dataclasses.replace(text.config, **pooled))


def copy_tokenizer(source: Source, folder: Path) -> bool:
    """Copy the files of a tokenizer; False if the source has none."""
    names = source.files.intersection(TOKENIZER_FILES)
    for name in names:
        shutil.copyfile(source.folder / name, folder / name)
    return bool(names)


def require_tokenizer(source: Source, folder: Path) -> None:
    """Copy the files of a tokenizer; raises ArtifactError if the source has none."""
    if not copy_tokenizer(source, folder):
        raise ArtifactError(f"{source} has no tokenizer: put its files into the folder")


def write_clip_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer of CLIP as open_clip has it, for folders that do not contain one."""
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ConfigError(
            f"{source} has no tokenizer.json: pip install 'xray-trainer[open_clip]', which has "
            "CLIP's tokenizer"
        ) from error
    from transformers import CLIPTokenizer

    theirs = SimpleTokenizer()
    names = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {names.get(token, token): number for token, number in theirs.encoder.items()}
    merges = [pair for pair, _ in sorted(theirs.bpe_ranks.items(), key=lambda item: item[1])]
    CLIPTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)


def clean(source: Source, folder: Path, how: str) -> None:
    """Make a tokenizer clean captions itself, as open_clip does before it.

    how: open_clip's whitespace, lower or canonicalize (no punctuation). Raises ArtifactError for
    another, and for a tokenizer without a fast version.
    """
    from tokenizers import Regex, normalizers
    from transformers import AutoTokenizer

    steps = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    if how in ("lower", "canonicalize"):
        steps = [normalizers.Lowercase(), *steps]
    if how == "canonicalize":
        punctuation = normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")
        steps = [normalizers.Replace("_", " "), punctuation, *steps]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_REMOTE_CODE)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if how not in CLEANED or backend is None:
        raise ArtifactError(f"{source}: captions cannot be cleaned as its tokenizer needs ({how})")
    own = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([*steps, *own])
    tokenizer.save_pretrained(folder)
