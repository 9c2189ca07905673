"""A folder as transformers and sentence-transformers write it: found, hashed, loaded, read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from xray.errors import ConfigError

Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "last", "cls", "latent"]
HASHED = ("*.safetensors", "*.json", "*.model", "*.txt")  # weights, config and tokenizer
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt"]


def find_llm(name: str) -> Path:
    """The folder of a local model, or of a hub name fetched into the hub's cache."""
    if not name:
        raise ConfigError(
            "text.llm is not set: give a folder or hub name of a transformers language model, "
            "or start from a text artifact (--init-from)"
        )
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"text.llm={name} is no transformers folder: it has no config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except Exception as error:  # no network, no such repository, no permission
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"text.llm={name} is neither a folder nor to be had from the hub: {reason}"
        ) from error


def llm_digest(folder: Path) -> str:
    """sha256 over the weights, config and tokenizer of a folder."""
    state = hashlib.sha256()
    for path in sorted(path for pattern in HASHED for path in folder.glob(pattern)):
        state.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                state.update(piece)
    return state.hexdigest()


def load_llm(
    folder: Path,
    attention: Attention = "bidirectional",
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The folder's decoder or encoder without a head; without `weights` only its structure.

    Of an encoder-decoder (T5) it is the encoder. Raises ConfigError.
    """
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
    )

    quiet_transformers()
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"transformers cannot read {folder}/config.json: {error}") from error
    if hasattr(settings, "vision_config") or hasattr(settings, "audio_config"):
        raise ConfigError(f"{folder} holds a multimodal model: give one of text alone in text.llm")
    settings.use_cache = False  # of keys and values, for generation
    if attention == "bidirectional":
        settings.is_causal = False
    encodes = type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING
    kind = AutoModelForTextEncoding if encodes else AutoModel
    try:
        if weights:
            llm: Any = kind.from_pretrained(
                folder, config=settings, local_files_only=True, dtype=dtype, use_safetensors=True
            )
        else:
            llm = kind.from_config(settings, dtype=dtype)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"transformers cannot load the model in {folder}: {reason}") from error
    if hasattr(llm, "pooler"):  # BERT's, which nothing here would train
        llm.pooler = None
    return llm


def quiet_transformers() -> None:
    """Keep its bars and notes out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def own_pooling(folder: Path) -> Pooling:
    """How a sentence encoder's folder says it is pooled (1_Pooling/config.json), else the mean."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    try:
        modes = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no json: set text.pooling, or restore it") from error
    names: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    chosen = [names[mode] for mode in names if modes.get(mode)]
    if len(chosen) != 1:
        known = ", ".join(get_args(Pooling))
        raise ConfigError(f"{path} asks for a pooling that is not there: set text.pooling={known}")
    return chosen[0]
