"""A folder as transformers and sentence-transformers write it: found, hashed, loaded, read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from xray.errors import ConfigError, brief
from xray.files import hash_file, is_inside

Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "last", "cls", "latent"]
HASHED = ("*.safetensors", "*.json", "*.model", "*.txt")  # weights, config and tokenizer
OWN_CODE = {"trust_remote_code": False}  # of a folder is never run; None would ask the user
FETCHED = ["*.json", "*.safetensors", "*.model", "*.txt"]


def find_llm(name: str) -> Path:
    """The folder of a local model, or of a hub name fetched into the hub's cache."""
    if not name:
        raise ConfigError(
            "text.llm is not set: give a folder or hub name of a transformers language model, "
            "or start from a text artifact (--init-from)"
        )
    folder = Path(name).expanduser()
    if _json(folder / "config.json"):
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"text.llm={name} is no transformers folder: it has no config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FETCHED))
    except Exception as error:  # no network, no such repository, no permission
        raise ConfigError(
            f"text.llm={name} is neither a folder nor to be had from the hub: {brief(error)}"
        ) from error


def llm_digest(folder: Path) -> str:
    """sha256 over the weights, config and tokenizer of a folder."""
    state = hashlib.sha256()
    for path in sorted(path for pattern in HASHED for path in folder.glob(pattern)):
        state.update(path.name.encode())
        hash_file(path, state)
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
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, **OWN_CODE)
    except Exception as error:
        check_no_code(folder)
        raise ConfigError(f"transformers cannot read {folder}/config.json: {error}") from error
    if hasattr(settings, "vision_config") or hasattr(settings, "audio_config"):
        raise ConfigError(f"{folder} holds a multimodal model: give one of text alone in text.llm")
    settings.use_cache = False  # of keys and values, for generation
    if attention == "bidirectional":
        settings.is_causal = False
    if weights:
        _check_files(folder)
    encodes = type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if settings.is_encoder_decoder and not encodes:
        raise ConfigError(
            f"{folder} holds an encoder-decoder ({settings.model_type}) whose encoder "
            "transformers cannot load alone: use T5's kind, a decoder or an encoder"
        )
    kind = AutoModelForTextEncoding if encodes else AutoModel
    try:
        if weights:
            given = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            llm, found = kind.from_pretrained(
                folder, config=settings, local_files_only=True, **OWN_CODE, **given
            )
        else:
            found = {}
            llm = kind.from_config(settings, dtype=dtype, **OWN_CODE)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot load the weights in {folder} ({brief(error)}): if the files are "
            "cut short or damaged, fetch them again"
        ) from error
    _check_whole(folder, found)
    if hasattr(llm, "pooler"):  # BERT's, which nothing here would train
        llm.pooler = None
    return llm


def _check_files(folder: Path) -> None:
    """Refuse weights that are pickles, which run what they like, and files outside the folder."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder}/{pickles[0]} is a pickle, which is not loaded: use a folder with "
            "model.safetensors (save_pretrained of transformers writes one)"
        )
    index = _json(folder / "model.safetensors.index.json").get("weight_map", {})
    outside = [name for name in index.values() if not is_inside(str(name))]
    if outside:
        raise ConfigError(
            f"{folder}/model.safetensors.index.json names a file outside its folder: {outside[0]}"
        )


def _check_whole(folder: Path, found: Mapping[str, Any]) -> None:
    """Refuse weights of which some are missing: transformers would draw them at random."""
    missing = [name for name in found.get("missing_keys", ()) if "pooler." not in name]
    wrong = [str(entry[0]) for entry in found.get("mismatched_keys", ())]
    if missing or wrong:
        names = sorted([*missing, *wrong])
        raise ConfigError(
            f"the weights in {folder} are not all of the model that its config.json says: "
            f"{names[0]} (of {len(names)}) is missing or of another shape"
        )


def check_no_code(folder: Path) -> None:
    """Raise ConfigError for a folder that names code of its own (auto_map), which is never run."""
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(folder / name):
            raise ConfigError(
                f"{folder}/{name} names code of its own (auto_map), and code of a model's folder "
                "is not run: use a model that transformers knows"
            )


def quiet_transformers() -> None:
    """Keep its bars and notes out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def own_pooling(folder: Path) -> Pooling:
    """How a sentence encoder's folder says it is pooled (1_Pooling/config.json), else the mean.

    Raises ConfigError where it asks for more than one of ours does.
    """
    modes, modules = (_json(folder / name) for name in ("1_Pooling/config.json", "modules.json"))
    names: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
    }
    asked = [mode for mode, on in modes.items() if mode.startswith("pooling_mode_") and on is True]
    known = ", ".join(get_args(Pooling))
    if len(asked) > 1 or any(mode not in names for mode in asked):
        raise ConfigError(
            f"{folder}/1_Pooling/config.json asks for {' and '.join(asked)}, which is not there: "
            f"set text.pooling to one of {known}"
        )
    if "Dense" in json.dumps(modules):
        raise ConfigError(
            f"{folder}/modules.json has a Dense module after the pooling, which is not there: to "
            f"go without it, set text.pooling to one of {known}"
        )
    return names[asked[0]] if asked else "mean"


def _json(path: Path) -> dict[str, Any]:
    """A json file's object; {} where there is no file; a list as {"list": ...}."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is no json: fetch it again") from error
    return content if isinstance(content, dict) else {"list": content}
