"""Folder that weights are imported from: its JSON files, its tensors, their hashes, its licence."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xray.errors import ArtifactError, ConfigError, brief, nearest
from xray.files import is_inside, nearest_path, read_text, sha256_file
from xray.hub import SCHEME
from xray.imports.place import HUB, OPEN_CLIP, REPOSITORY
from xray.models.hub import hub
from xray.models.llm_folder import FILES, SENTENCE_POOLING
from xray.records import parse_record

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
CARD = "README.md"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LICENSE = re.compile(r"^(license|license_name):\s*['\"]?([\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A folder with released weights. name: what the user asked for. file: one alone, or ""."""

    folder: Path
    name: str
    file: str = ""

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def files(self) -> frozenset[str]:
        """Names of the files in the folder."""
        if self.file:
            return frozenset([self.file])
        return frozenset(path.name for path in self.folder.iterdir() if path.is_file())

    @functools.cached_property
    def kind(self) -> str:
        """Family of transformers that config.json names, "" without one."""
        return str(self.json("config.json").get("model_type", ""))

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object; {} if there is no such file. Raises ArtifactError if damaged."""
        path = self.folder / name
        if self.file or not path.is_file():
            return {}
        try:
            return parse_record(path.read_bytes(), dict[str, Any])
        except ValueError as error:
            raise ArtifactError(f"{path} cannot be read: {brief(error)}") from error

    @functools.cached_property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files; raises ArtifactError if there are none."""
        for stem in WEIGHTS:
            if f"{stem}.safetensors" in self.files:
                return [f"{stem}.safetensors"]
            index = self.json(f"{stem}.safetensors.index.json").get("weight_map")
            if isinstance(index, dict) and index:
                return sorted({str(name) for name in index.values()})
        others = sorted(name for name in self.files if name.endswith(".safetensors"))
        if len(others) == 1:
            return others
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            raise ArtifactError(
                f"{self}: {pickles[0]} is a pickle, which can run any code and is not loaded: "
                "give a folder with safetensors (save_pretrained of transformers writes them)"
            )
        raise ArtifactError(f"{self} has no weights: no model.safetensors, no index of parts")

    def check_weights(self) -> None:
        """Raise ArtifactError if there are no safetensors."""
        _ = self.weight_files  # unlike an assert, also read under python -O

    def tensors(self) -> dict[str, Tensor]:
        """Load all tensors as float32; raises ArtifactError for missing or unreadable files."""
        from safetensors.torch import load_file

        state: dict[str, Tensor] = {}
        for name in self.weight_files:
            path = self.folder / name
            if not is_inside(name) or not path.is_file():  # in the hub's cache, files are links
                raise ArtifactError(f"{self} lacks {name}, which its index names")
            try:
                state |= load_file(path)
            except Exception as error:  # safetensors raises its own error types
                raise ArtifactError(
                    f"{path} is not a readable safetensors file: {brief(error)}"
                ) from error
        return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """Hashes of the files that determine the model: weights, configs and tokenizer."""
        names = [name for name in self.files if self.file or _matches(Path(name), FILES)]
        if (self.folder / SENTENCE_POOLING).is_file():
            names.append(SENTENCE_POOLING)
        return {name: sha256_file(self.folder / name) for name in sorted(names)}

    @property
    def license(self) -> str:
        """Licence that the card or timm's config states, "" if neither does."""
        given = self.json("config.json").get("pretrained_cfg") or {}
        stated = {"license": str(given.get("license") or "")}
        if CARD in self.files:
            text = read_text(str(self.folder / CARD), "SOURCE")
            front = text.split("\n---", 1)[0] if text.startswith("---") else ""
            stated |= LICENSE.findall(front)
        own = stated["license"]
        own = stated.get("license_name", "") if own == "other" else own
        return "" if own == "unknown" else own


def open_source(name: str) -> Source:
    """Open a local folder, a repository of the hub, or a name of open_clip's released weights.

    Raises ConfigError with one line for a name that is neither, or that the hub does not provide,
    and ArtifactError for a folder with a link to a file outside of it.
    """
    source = _find(name)  # it refuses a local artifact
    if {"schema", "tensors"} <= source.json("manifest.json").keys():
        repository = name.removeprefix(HUB)
        raise ConfigError(f"{name} is an artifact already: commands take it as hf://{repository}")
    if not source.file:  # one that is named alone may be a link
        _check_links(source)
    return source


def _find(name: str) -> Source:
    folder = Path(os.path.expanduser(name))
    if (folder / "manifest.json").is_file():
        raise ConfigError(f"{name} is an artifact already: commands take it as it is")
    if folder.is_dir():
        return Source(folder, name)
    if folder.is_file():
        return Source(folder.parent, name, folder.name)
    if name.startswith(OPEN_CLIP):
        return Source(_download(_repository(name), name), name)
    repository = name.removeprefix(HUB).removeprefix(SCHEME)
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(
            f"{name} is not a folder{nearest_path(folder)}, nor a name of the hub (ORG/NAME) or of "
            f"open_clip ({OPEN_CLIP}MODEL:TAG)"
        )
    return Source(_download(repository, name), name)


def _check_links(source: Source) -> None:
    """Raise ArtifactError if a file to read is a link that leads outside.

    In the hub's cache, the files of a snapshot are links to `blobs` of the same repository.
    """
    folder = source.folder.resolve()
    snapshots = (path for path in folder.parents if path.name == "snapshots")
    caches = [path.parent for path in snapshots if (path.parent / "blobs").is_dir()]
    allowed = caches[0] if caches else folder
    for path in sorted(source.folder.rglob("*")):
        if not path.is_symlink() or not (path.is_dir() or _matches(path, [*FILES, CARD])):
            continue
        if not Path(os.path.realpath(path)).is_relative_to(allowed):
            raise ArtifactError(
                f"{source}: {path.relative_to(source.folder)} is a link that leads outside of the "
                "folder: put the file in its place"
            )


def _matches(path: Path, patterns: list[str]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def _repository(name: str) -> str:
    """Return the hub's repository of an open_clip name."""
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"{name} needs pip install 'xray-trainer[open_clip]'") from error
    model, _, tag = name.removeprefix(OPEN_CLIP).partition(":")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        models = open_clip.list_models()
        if model not in models:
            raise ConfigError(f"open_clip has no model {model!r}{nearest(model, models)}")
        raise ConfigError(
            f"open_clip has no weights {tag!r} of {model}: {', '.join(tags) or 'none'}"
        )
    repository = str(open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "")).strip("/")
    if repository.count("/") != 1:
        raise ConfigError(
            f"{name} is not published as safetensors: give a folder that open_clip's "
            "push_to_hf_hub wrote"
        )
    return repository


def _download(repository: str, name: str) -> Path:
    """Return the hub's cached folder of a repository, downloaded if the network answers."""
    from huggingface_hub import snapshot_download

    instead = f"run `hf download {repository} --local-dir FOLDER` where there is one, give FOLDER"
    with hub(instead) as explain:
        try:
            return Path(snapshot_download(repository, allow_patterns=[*FILES, CARD]))
        except Exception as error:  # no network, no such repository, no permission
            raise ConfigError(f"the hub cannot provide {name}: {explain(error)}") from error
