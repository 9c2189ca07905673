"""The LLM as a text encoder: a transformers decoder read bidirectionally and mean-pooled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError


def find_llm(name: str) -> Path:
    """The folder of a local LLM, or of a hub name fetched into the hub's cache."""
    if not name:
        raise ConfigError(
            "text.llm is not set: give a folder or hub name of a transformers decoder, "
            "or start from a text artifact (--init-from)"
        )
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"text.llm={name} is no transformers folder: it has no config.json")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model"]))
    except Exception as error:  # no network, no such repository, no permission
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"text.llm={name} is neither a folder nor to be had from the hub: {reason}"
        ) from error


def llm_digest(folder: Path) -> str:
    """sha256 over the weights, config and tokenizer of an LLM folder."""
    state = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        state.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                state.update(piece)
    return state.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, padding on the right."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(f"{folder} has no usable tokenizer: {error}") from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(tokenizer: Any, captions: Sequence[str], max_length: int) -> dict[str, Tensor]:
    """Captions -> `input_ids` and `attention_mask`, [C, L], padded to the longest."""
    encoded = tokenizer(
        list(captions), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def load_llm(folder: Path, weights: bool = True) -> nn.Module:
    """The folder's decoder with bidirectional attention; without `weights` only its structure."""
    from transformers import AutoConfig, AutoModel

    _quiet_transformers()
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        settings.is_causal = False
        if weights:
            return AutoModel.from_pretrained(
                folder, config=settings, local_files_only=True, dtype=torch.float32
            )
        return AutoModel.from_config(settings, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"transformers cannot load the LLM in {folder}: {error}") from error


def _quiet_transformers() -> None:
    """Keep its bars and notes out of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@torch.no_grad()
def check_bidirectional(llm: nn.Module) -> None:
    """Raise ConfigError unless a later token changes earlier hidden states, padded or not."""
    was_training = llm.training
    llm.eval()
    ids = torch.arange(3, 11)[None]
    other = ids.clone()
    other[0, 5] = 12
    for mask in (torch.ones_like(ids), (torch.arange(8) < 7).long()[None]):
        a = llm(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        b = llm(input_ids=other, attention_mask=mask, use_cache=False).last_hidden_state
        if torch.allclose(a[:, :4], b[:, :4], atol=1e-7):
            raise ConfigError(
                f"the attention of {type(llm).__name__} stays causal with is_causal=False: "
                "use a model family that honours it (Llama, Qwen2, Qwen3)"
            )
    llm.train(was_training)


class TextTower(nn.Module):
    """An LLM, optionally with LoRA, whose mean-pooled hidden states encode a caption.

    Args:
        config: the text section.
        folder: the LLM's folder.
        weights: load the base weights; without them `load_changes` must bring all weights.
    """

    def __init__(self, config: TextConfig, folder: Path, weights: bool = True) -> None:
        super().__init__()
        self.llm = load_llm(folder, weights)
        check_bidirectional(self.llm)
        settings: Any = self.llm.config
        self.width = int(settings.hidden_size)
        self.own_weights = config.tune == "full"
        if config.lora_rank and config.tune != "full":
            _add_lora(self.llm, config)
        if config.tune == "lora" and not config.lora_rank:
            raise ConfigError("text.tune=lora needs text.lora_rank of at least 1")
        for name, parameter in self.llm.named_parameters():
            parameter.requires_grad_(
                config.tune == "full" or (config.tune == "lora" and _is_lora(name))
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[..., L] ids and mask -> [..., width], the mean over real tokens."""
        flat = attention_mask.flatten(0, -2)
        hidden = self.llm(
            input_ids=input_ids.flatten(0, -2), attention_mask=flat, use_cache=False
        ).last_hidden_state
        mask = flat[..., None].to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return pooled.unflatten(0, input_ids.shape[:-1])

    def changes(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of the tower's state that its base folder does not hold."""
        return {name: t for name, t in state.items() if self.own_weights or _is_lora(name)}

    def load_changes(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Load what `changes` gave; raises ArtifactError when it does not fit this tower."""
        own = self.state_dict()
        wrong = [k for k in state if k not in own or own[k].shape != state[k].shape]
        missing = [k for k in own if _is_lora(k) and k not in state]
        if wrong or missing:
            raise ArtifactError(
                f"{origin} does not fit the LLM: {(wrong or missing)[0]} differs; "
                "use the LLM and text.lora_rank it was trained with"
            )
        self.own_weights = self.own_weights or any(not _is_lora(k) for k in state)
        self.load_state_dict(dict(state), strict=False)


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _add_lora(llm: nn.Module, config: TextConfig) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
    )
    try:
        inject_adapter_in_model(settings, llm)
    except ValueError as error:
        raise ConfigError(f"text.lora_targets={config.lora_targets}: {error}") from error


class ResidualMlp(nn.Module):
    """x + W2 GELU(W1 LN(x)) with expansion 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class TextAdapter(nn.Module):
    """Sentence vectors into the joint space: normalise, residual MLPs, norm, projection.

    The form of LLM2CLIP's adaptor (2411.04997). [B, width] -> [B, joint], not normalised.
    """

    def __init__(self, width: int, joint: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualMlp(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, joint)

    def forward(self, sentence: Tensor) -> Tensor:
        return self.project(self.norm(self.blocks(F.normalize(sentence.float(), dim=-1))))


def build_tiny_llm(
    captions: Iterable[str],
    folder: Path,
    vocab_size: int,
    width: int,
    depth: int,
    heads: int,
    seed: int = 0,
) -> None:
    """Write a small Qwen3-style decoder with random weights and a BPE tokenizer of the captions.

    It stands where a pretrained LLM would: for machines without one and for tests.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import AutoModel, PreTrainedTokenizerFast, Qwen3Config

    _quiet_transformers()
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
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    settings = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(settings).save_pretrained(folder)
