"""Language model of a run or an artifact: its folder, tokenizer and text tower."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.text.feature_store import USUAL
from xray.artifacts.artifact import Artifact
from xray.artifacts.limits import check_size
from xray.artifacts.manifest_config import text_config
from xray.config import TextConfig
from xray.errors import ArtifactError, ConfigError
from xray.models.llm_folder import (
    default_prompt,
    find_llm,
    llm_digest,
    load_llm,
    own_pooling,
    reads_padding,
)
from xray.models.text_tower import TextTower, is_added, longest_text
from xray.models.tokenizer import CaptionTokenizer

log = logging.getLogger("xray")
# Settings that a run takes from its text parent.
STRUCTURE = ("lora_rank", "lora_alpha", "lora_targets", "attention", "pooling", "latents", "prompt",
             "pool_prompt", "pool_special", "padding")  # fmt: skip
MOST_CUT = 0.1  # share of truncated captions above which a run warns


class Language:
    """Model that encodes captions, from a folder or from a text or clip artifact.

    config: text section with the artifact's structure. digest: hash of the folder. Raises
    ConfigError or ArtifactError for a model that cannot be used.
    """

    def __init__(self, config: TextConfig, parent: Artifact | None = None) -> None:
        self.parent = parent
        if parent is None:
            self.folder = find_llm(config.llm)
            self.digest = llm_digest(self.folder)
            if config.tune == "none":  # untrained LoRA weights would be useless
                config = dataclasses.replace(config, lora_rank=0)
        else:
            config = _inherited(config, parent)
            self.folder, self.digest = _folder(parent, config.llm), parent.manifest["inputs"]["llm"]
        if config.pooling == "auto":
            config = dataclasses.replace(config, pooling=own_pooling(self.folder))
        if config.pooling == "latent" and config.tune == "none" and parent is None:
            raise ConfigError(
                "text.pooling=latent has weights to be trained: set text.tune=lora or full, or "
                "start from a text artifact (--init-from)"
            )
        given = Path(os.path.expanduser(config.llm))
        if given.is_dir():  # the recorded path must work from any folder
            config = dataclasses.replace(config, llm=str(given.resolve()))
        self.tokenizer = CaptionTokenizer(self.folder, config)
        prompt, special = self.tokenizer.pool_prompt, self.tokenizer.pool_special
        self.config = dataclasses.replace(config, pool_prompt=prompt, pool_special=special)
        if parent is None:
            self._warn_of_other_texts()

    def build(self) -> TextTower:
        """Build the tower with its weights; raises ConfigError for a tokenizer of another model."""
        weights = self.parent is None or _needs_base(self.parent)
        stored = {} if self.parent is None else self.parent.load("text")
        if self.parent is not None:
            self._check_sizes(self.parent, stored, weights)
        tower = TextTower(self.config, self.folder, weights)
        if self.parent is not None:
            tower.load_changes(stored, str(self.parent.path))
        if self.tokenizer.largest_id >= tower.vocabulary:
            raise ConfigError(
                f"the tokenizer in {self.folder} gives token {self.tokenizer.largest_id}, the "
                f"model there embeds {tower.vocabulary}: it is another model's; restore its own"
            )
        return tower

    def _check_sizes(self, parent: Artifact, stored: Mapping[str, Tensor], weights: bool) -> None:
        """Compare the sizes of a parent's LoRA and of its LLM with its stored tensors."""
        rank = max([t.shape[0] for name, t in stored.items() if ".lora_A" in name], default=0)
        if self.config.tune != "lora" and rank and self.config.lora_rank > rank:
            raise ArtifactError(
                f"{parent.path}: config.text.lora_rank={self.config.lora_rank} in its manifest, "
                f"and it stores a LoRA of rank {rank}: the manifest is damaged"
            )
        if not weights:  # all of the LLM's are stored
            build = functools.partial(load_llm, self.folder, weights=False)
            check_size(parent, stored, "llm/config.json", build)

    def changes(self) -> dict[str, Tensor]:
        """Return the parent's changes to the tower, for an artifact that does not train it."""
        return {} if self.parent is None else self.parent.load("text")

    def identity(self) -> dict[str, Any]:
        """Return everything that determines a caption's sentence vector, by name of the setting."""
        names = ("attention", "pooling", "prompt", "max_length", "dtype", *USUAL)
        artifact = "" if self.parent is None else self.parent.digest
        settings = {name: getattr(self.config, name) for name in names}
        changed = {name: value for name, value in settings.items() if value != USUAL.get(name)}
        return {"llm": self.digest, "artifact": artifact, **changed}

    def _warn_of_other_texts(self) -> None:
        """Warn if the model was trained on texts with another prompt or padding."""
        if not self.config.prompt and (usual := default_prompt(self.folder)):
            log.warning(
                "%s is made for texts after the prompt %r (default_prompt_name in its "
                "config_sentence_transformers.json): set text.prompt to it", self.folder, usual,
            )  # fmt: skip
        if self.config.padding != "full" and reads_padding(self.folder):
            log.warning(
                "%s is made for captions that are padded to the full length: set text.padding=full",
                self.folder,
            )

    def warn_of_cut(self, captions: Sequence[str]) -> None:
        """Warn if many of these captions are longer than text.max_length."""
        lengths = self.tokenizer.lengths(captions)
        share = sum(length > self.config.max_length for length in lengths) / len(lengths)
        if share > MOST_CUT:
            log.warning(
                "%.0f %% of captions are longer than text.max_length=%d tokens and are cut there: "
                "%s shorter captions", 100 * share, self.config.max_length, self._longer(),
            )  # fmt: skip

    def _longer(self) -> str:
        """Return the advice to raise text.max_length, if the model can read more tokens."""
        with torch.device("meta"):
            most = longest_text(load_llm(self.folder, weights=False))
        if most is None:
            return "raise it, or use"
        if self.config.max_length < most:
            return f"raise it to {most} at most, or use"
        return "the model reads no more, so use"

    def export_files(self) -> dict[str, Any]:
        """Return config and tokenizer files, for artifacts with all weights."""
        patterns = ("*.json", "*.model", "*.txt")
        paths = sorted(path for pattern in patterns for path in self.folder.glob(pattern))
        return {f"llm/{path.name}": path for path in paths}


def structure_of(parent: TextConfig) -> dict[str, Any]:
    """Return the settings that a run takes from a text parent; captions in full have its length."""
    names = (*STRUCTURE, "max_length") if parent.padding == "full" else STRUCTURE
    return {name: getattr(parent, name) for name in names}


def _inherited(config: TextConfig, parent: Artifact) -> TextConfig:
    """Return the text section with the structure of the parent artifact."""
    theirs, usual = text_config(parent), TextConfig()
    has = "lora" if theirs.lora_rank else "full"
    if config.tune not in ("none", has):
        raise ConfigError(
            f"text.tune={config.tune} cannot continue from {parent.path}, whose text tower has "
            f"{'' if theirs.lora_rank else 'no '}LoRA weights: set text.tune=none or {has}"
        )
    structure = structure_of(theirs)
    for name in structure if config.tune == "lora" else [*structure][3:]:
        asked = getattr(config, name)
        if asked not in (getattr(usual, name), structure[name]):
            raise ConfigError(
                f"text.{name}={asked!r} cannot be: {parent.path} was made with "
                f"{structure[name]!r}; leave it out"
            )
    return dataclasses.replace(config, llm=config.llm or theirs.llm, **structure)


def _folder(artifact: Artifact, llm: str) -> Path:
    """Find the folder of the config, the tokenizer and the base weights, if they are needed.

    Raises ArtifactError if the base model is not the one of training.
    """
    if not _needs_base(artifact):
        return artifact.path / "llm"
    try:
        folder = find_llm(llm)
    except ConfigError as error:
        raise ArtifactError(
            f"{artifact.origin} contains changes to an LLM and not its weights, and the LLM is not "
            f"at {llm}: set text.llm (llm= of xray data) to where it is now"
        ) from error
    if llm_digest(folder) != artifact.manifest["inputs"]["llm"]:
        raise ArtifactError(
            f"the LLM in {folder} is not the one that {artifact.path} was trained with: its "
            "files' hash differs; set text.llm to the original folder"
        )
    return folder


def _needs_base(artifact: Artifact) -> bool:
    """Check if the artifact contains only changes to a base model, not all its weights."""
    return all(is_added(name) for name in artifact.manifest["tensors"].get("text", {}))
