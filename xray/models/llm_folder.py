"""Finding, hashing and loading a language model's folder in the format of transformers."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from xray.errors import ConfigError, brief
from xray.files import hash_file, is_inside
from xray.models.hub import hub
from xray.records import parse_record

Attention = Literal["bidirectional", "causal"]
Pooling = Literal["mean", "last", "cls", "latent"]
FILES = ["*.safetensors", "*.json", "*.model", "*.txt"]  # weights, config and tokenizer
TOKENIZER_FILES = (  # by the names that transformers gives them
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "spm.model"),
    *("sentencepiece.model", "sentencepiece.bpe.model"),
)
LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer", "n_layers")
SIZE = re.compile(r"layer|size|dim|head|width|embd|d_model|d_ff|d_kv|position|ctx|inner|expert")
SIGLIP = {"siglip_text_model": "SiglipTextModel", "siglip2_text_model": "Siglip2TextModel"}
# Text towers that AutoModel does not know, by model_type; all are pooled at their last token
TEXT_TOWERS = {"metaclip_2_text_model": "MetaClip2TextModel", **SIGLIP}
# Modules after the last hidden state, which are not used: BERT's pooler, SigLIP's projection
UNUSED = re.compile(r"(^|\.)(pooler|head)\.")
SENTENCE_POOLING = "1_Pooling/config.json"  # of sentence-transformers
NO_REMOTE_CODE = {"trust_remote_code": False}  # with None, transformers asks on the terminal


def find_llm(name: str) -> Path:
    """Return the folder of a local model, or download a hub model into the hub's cache.

    Raises ConfigError if `name` is empty, not a model's folder, or not available from the hub.
    """
    if not name:
        raise ConfigError(
            "text.llm is not set: set it to a folder or hub name of a transformers language "
            "model, or start from a text artifact (--init-from)"
        )
    folder = Path(os.path.expanduser(name))
    if _json(folder / "config.json"):
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"text.llm={name} is not a transformers folder: it has no config.json")
    from huggingface_hub import snapshot_download

    instead = f"run `hf download {name} --local-dir FOLDER` on a machine with a network, and set "
    with hub(f"{instead}text.llm to that folder") as explain:
        try:
            return Path(snapshot_download(name, allow_patterns=FILES))
        except Exception as error:  # no network, no such repository, no permission
            raise ConfigError(
                f"text.llm={name} is not a folder, and the hub cannot provide it: {explain(error)}"
            ) from error


def llm_digest(folder: Path) -> str:
    """Return the sha256 of a folder's weights, config and tokenizer."""
    state = hashlib.sha256()
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern)):
        state.update(path.name.encode())
        hash_file(path, state)
    return state.hexdigest()


def load_llm(
    folder: Path,
    attention: Attention = "bidirectional",
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a folder's decoder or encoder without its head; of an encoder-decoder, the encoder.

    The projection that follows SigLIP's pooling is a head, too.

    weights: False builds the model with random ones. Raises ConfigError for a folder without a
    usable text model or with incomplete weights.
    """
    import transformers
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

    settings = read_settings(folder)
    if hasattr(settings, "vision_config") or hasattr(settings, "audio_config"):
        raise ConfigError(
            f"{folder} contains a multimodal model: set text.llm to a text-only model"
        )
    _check_sizes(settings, folder)
    settings.use_cache = False  # the cache of keys and values serves generation only
    if attention == "bidirectional":
        settings.is_causal = False
    if weights:
        _check_files(folder)
    encodes = type(settings) in MODEL_FOR_TEXT_ENCODING_MAPPING
    if settings.is_encoder_decoder and not encodes:
        raise ConfigError(
            f"{folder} contains an encoder-decoder ({settings.model_type}) whose encoder "
            "transformers cannot load alone: set text.llm to a T5 model, a decoder or an encoder"
        )
    kind = AutoModelForTextEncoding if encodes else AutoModel
    if tower := TEXT_TOWERS.get(settings.model_type):
        AutoModel.register(type(settings), getattr(transformers, tower), exist_ok=True)
    try:
        if weights:
            options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            llm, loading_info = kind.from_pretrained(
                folder, config=settings, local_files_only=True, **NO_REMOTE_CODE, **options
            )
        else:
            loading_info = {}
            llm = kind.from_config(settings, dtype=dtype, **NO_REMOTE_CODE)
    except Exception as error:
        raise ConfigError(
            f"transformers cannot load the weights in {folder} ({brief(error)}): if the files are "
            "incomplete or damaged, download them again"
        ) from error
    _check_complete(folder, loading_info)
    if hasattr(llm, "pooler"):  # a module that is not used would get no gradient
        llm.pooler = None
    if hasattr(llm, "head"):
        llm.head = nn.Identity()
    return llm


def is_decoder(folder: Path) -> bool:
    """Return True for a model that predicts the next token, False for an encoder such as BERT."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    kind = type(read_settings(folder))  # BERT's family can do both
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def read_settings(folder: Path) -> Any:
    """Read a folder's config.json as transformers does; raises ConfigError if it cannot."""
    from transformers import AutoConfig

    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, **NO_REMOTE_CODE)
    except Exception as error:  # transformers raises many kinds
        check_no_code(folder)
        raise ConfigError(
            f"transformers cannot read {folder}/config.json: {brief(error)}"
        ) from error


def _check_sizes(settings: Any, folder: Path) -> None:
    """Raise ConfigError for a size that no real model has, before anything is built with it."""
    for key, value in settings.to_dict().items():
        most = 1 << 10 if key in LAYERS else 1 << 24
        if isinstance(value, int) and value > most and SIZE.search(key):
            raise ConfigError(f"{folder}/config.json: {key}={value} must be at most {most:,}")


def _check_files(folder: Path) -> None:
    """Reject pickled weights, which can run any code, and weight files outside the folder."""
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder}/{pickles[0]} is a pickle, which xray does not load: use a folder with "
            "model.safetensors (save_pretrained of transformers writes it)"
        )
    index = _json(folder / "model.safetensors.index.json").get("weight_map", {})
    outside = [name for name in index.values() if not is_inside(str(name))]
    if outside:
        raise ConfigError(
            f"{folder}/model.safetensors.index.json names a file outside its folder: {outside[0]}"
        )


def _check_complete(folder: Path, loading_info: Mapping[str, Any]) -> None:
    """Reject incomplete weights: transformers would initialise the missing ones randomly."""
    missing = [name for name in loading_info.get("missing_keys", ()) if not UNUSED.search(name)]
    wrong = [str(entry[0]) for entry in loading_info.get("mismatched_keys", ())]
    if missing or wrong:
        names = sorted([*missing, *wrong])
        raise ConfigError(
            f"the weights in {folder} do not fit the model in its config.json: {names[0]} "
            f"(one of {len(names)}) is missing or has another shape"
        )


def check_no_code(folder: Path) -> None:
    """Raise ConfigError if a folder asks for its own Python code (auto_map), which is never run."""
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _json(folder / name):
            raise ConfigError(
                f"{folder}/{name} asks for its own Python code (auto_map), which xray does not "
                "run: use a model that transformers supports without it"
            )


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def own_pooling(folder: Path) -> Pooling:
    """Return the pooling that a folder asks for: a sentence encoder's own, `last` of SigLIP, or
    the mean.

    It is read from 1_Pooling/config.json of sentence-transformers. Raises ConfigError for a pooling
    that xray does not have.
    """
    if _json(folder / "config.json").get("model_type") in TEXT_TOWERS:
        return "last"
    modes, modules = (_json(folder / name) for name in (SENTENCE_POOLING, "modules.json"))
    names: dict[str, Pooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_lasttoken": "last",
        "pooling_mode=mean": "mean",  # as newer versions write it
        "pooling_mode=cls": "cls",
        "pooling_mode=lasttoken": "last",
    }
    enabled = [m for m, on in modes.items() if m.startswith("pooling_mode_") and on is True]
    if "pooling_mode" in modes:
        enabled = [f"pooling_mode={modes['pooling_mode']}"]
    choices = ", ".join(get_args(Pooling))
    if len(enabled) > 1 or any(mode not in names for mode in enabled):
        raise ConfigError(
            f"{folder}/1_Pooling/config.json asks for {' and '.join(enabled)}, which xray does not "
            f"support: set text.pooling to one of {choices}"
        )
    if "Dense" in json.dumps(modules):
        raise ConfigError(
            f"{folder}/modules.json has a Dense module after the pooling, which xray does not "
            f"support: to use the model without it, set text.pooling to one of {choices}"
        )
    return names[enabled[0]] if enabled else "mean"


def pools_prompt(folder: Path) -> bool | None:
    """Read if a sentence encoder's folder pools the prompt's tokens; None for any other folder.

    sentence-transformers pools them unless include_prompt is false.
    """
    if not (folder / SENTENCE_POOLING).is_file():
        return None
    return bool(_json(folder / SENTENCE_POOLING).get("include_prompt", True))


def reads_padding(folder: Path) -> bool:
    """Return True for the text towers of SigLIP, which attend to the padding."""
    return _json(folder / "config.json").get("model_type") in SIGLIP


def default_prompt(folder: Path) -> str:
    """Read the prompt that sentence-transformers puts before a text if none is named, "" if none.

    Its name is default_prompt_name in config_sentence_transformers.json.
    """
    settings = _json(folder / "config_sentence_transformers.json")
    prompts = settings.get("prompts")
    if not isinstance(prompts, dict):
        return ""
    return str(prompts.get(settings.get("default_prompt_name"), ""))


def _json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return {} if there is no file, and {"list": ...} for a list."""
    if not path.is_file():
        return {}
    try:
        content = parse_record(path.read_bytes(), object)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: download it again") from error
    return content if isinstance(content, dict) else {"list": content}
