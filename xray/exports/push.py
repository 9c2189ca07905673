"""`xray push`: publish an artifact or an export on the Hugging Face Hub.

Only files that are missing on the hub or differ there are sent, in one commit: the repository is
never half-written, and a second call continues where a first one was stopped. huggingface_hub
finds the token itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.side_files import user_cache
from xray.artifacts.artifact import open_artifact
from xray.artifacts.manifest_config import license_of
from xray.artifacts.model_card import UNKNOWN, artifact_card
from xray.artifacts.shards import index_name, is_large, make_index, shards_of, split
from xray.errors import ArtifactError, ConfigError
from xray.files import decode_text, inside, make_folder, sha256_file
from xray.hub import LOGIN, SCHEME, Address, advice, parse_address, silence
from xray.models.llm_folder import TOKENIZER_FILES
from xray.urls import redact
from xray.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
EXPORTED = "exported by xray to"  # in the title of an export's card
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
# Files that are searched for credentials whatever their size. Of others, the small ones are, but
# those of tokenizers, which have parts of URLs among their tokens.
SEARCHED = re.compile(r"(.*/)?(README\.md|\w*config\.json|manifest\.json|\w{64}\.json)")
SMALL = 1_000_000  # bytes
GIT_LIMIT = 20_000_000  # bytes; the hub keeps larger files as LFS objects
# Files of an earlier push that a later one removes, if it does not have them. People's are kept.
OURS = re.compile(r"(lineage|llm|text)/.*|.*\.(safetensors|safetensors\.index\.json|onnx|data)")


@dataclass(frozen=True)
class Source:
    """A folder to publish: its files by name, with sha256 if known, and its card."""

    folder: Path
    files: dict[str, str]
    card: str
    licence: str  # as the run stated it, or ""
    base: str = ""  # the LLM whose changes the artifact contains, and not its weights

    @property
    def large(self) -> list[str]:
        """Weights that are sent in parts. Other libraries read an export's weights as they are."""
        own = self.files if "manifest.json" in self.files else {}
        return [name for name in own if is_large(self.folder / name)]


@dataclass(frozen=True)
class Pushed:
    """Result of a push: the web page of the repository, and what was sent and removed."""

    page: str
    sent: list[str]
    removed: list[str]
    unchanged: int
    base: str  # LLM that the artifact needs and does not contain, or ""


def push(source: str, target: str, licence: str = "", private: bool = False) -> Pushed:
    """Send an artifact or an exported folder to `hf://ORG/NAME` or `hf://ORG/NAME@BRANCH`.

    licence: an SPDX identifier; default: that of the card or of the run. private: for a repository
    that is made now. Raises ConfigError for impossible options and if there is no licence or
    token, ArtifactError for a folder that is neither, for credentials in a file, and if the hub
    refuses it.
    """
    address = _target(target)
    opened = open_folder(source)
    card = finished_card(opened, licence, address)
    _check_secrets(opened)
    with _progress_on_terminals(), _explained(source, target):
        return _send(opened, card, address, private)


def _target(target: str) -> Address:
    address = parse_address(target if target.startswith(SCHEME) else f"{SCHEME}{target}")
    if not target.startswith(SCHEME) or address.kind != "models" or address.path:
        raise ConfigError(f"{target} is not a model on the hub: give hf://ORG/NAME, or ...@BRANCH")
    return address


def open_folder(source: str) -> Source:
    """Open an artifact, and verify it, or a folder that `xray export --to` wrote.

    Raises ArtifactError for other folders, and for links in them that are not to be followed.
    """
    folder = Path(os.path.expanduser(source))
    if _is_export(folder):
        names = _visible(folder)
        text = (folder / CARD).read_text("utf-8")
        return Source(folder, dict.fromkeys(names, ""), text, "")
    try:
        artifact = open_artifact(source)
    except ArtifactError as error:
        if is_remote(source) or (folder / "manifest.json").is_file():
            raise
        raise ArtifactError(
            f"{source} is neither an artifact nor an export of xray export --to: {error}"
        ) from error
    folder = artifact.path
    # not among the hashed files: an artifact from a URL comes without it
    card = inside(folder, CARD)
    text = card.read_text("utf-8") if card.is_file() else artifact_card(folder)
    files = {**artifact.manifest["files"], "manifest.json": artifact.digest, CARD: ""}
    base = ""
    if "text" in artifact.manifest["tensors"] and "llm/config.json" not in files:
        base = str(artifact.manifest["config"].get("text", {}).get("llm", ""))
    return Source(folder, files, text, license_of(artifact.manifest), base)


def _visible(folder: Path) -> list[str]:
    """List the files of an export that are not hidden; raises ArtifactError for a link."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():  # what it points to may be private, also in this folder
            raise ArtifactError(f"{path} is a link, and was not sent: put a file in its place")
        if path.is_file():
            names.append(str(name))
    return names


def _is_export(folder: Path) -> bool:
    card = folder / CARD
    own = card.is_file() and not (folder / "manifest.json").is_file()
    return own and EXPORTED in card.read_text("utf-8")


def finished_card(source: Source, licence: str, address: Address) -> str:
    """Return the card with its licence and the address in its code; raises ConfigError."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(source.card)
        stated = str(card.data.get("license") or "")
    except Exception as error:  # the card's YAML, which people may edit
        raise ConfigError(
            f"{source.folder / CARD}: its front matter cannot be read: {_line(error)}"
        ) from error
    chosen = licence or (stated if stated != "unknown" else "") or source.licence
    if not chosen:
        raise ConfigError(
            f"{source.folder} has no licence: give one with --license (an SPDX identifier such as "
            "apache-2.0), or set license= in the run's config"
        )
    if not LICENCE.fullmatch(chosen):
        raise ConfigError(f"--license {chosen}: give an SPDX identifier, such as apache-2.0")
    card.data["license"] = chosen.lower()
    name = f"{address.name}@{address.revision}" if address.revision else address.name
    text = str(card).replace(UNKNOWN, f"{chosen}.")
    text = text.replace('xray.load("FOLDER")', f'xray.load("{SCHEME}{name}")')
    text = text.replace("local-dir:FOLDER", f"hf-hub:{name}")
    return text.replace('from_pretrained("FOLDER")', f'from_pretrained("{address.name}")')


def _check_secrets(source: Source) -> None:
    """Raise ArtifactError if a text has a token, or a URL with credentials."""
    for name in source.files:
        path = source.folder / name
        small = path.stat().st_size <= SMALL and path.name not in TOKENIZER_FILES
        if SEARCHED.fullmatch(name) or small:
            text = _text(path.read_bytes())
            if redact(text) != text:
                raise ArtifactError(
                    f"{path} contains credentials, and was not sent: change them, as others may "
                    "have read them"
                )


def _text(content: bytes) -> str:
    """Decode a text in any encoding, as far as URLs and tokens are concerned; "" if it is none."""
    try:
        return decode_text(content)
    except ValueError:
        return "" if b"\0" in content else content.decode("latin-1")


@contextlib.contextmanager
def _progress_on_terminals() -> Iterator[None]:
    """Let huggingface_hub show progress bars on a terminal only."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextlib.contextmanager
def _explained(source: str, target: str) -> Iterator[None]:
    """Raise errors of the hub and its library as ArtifactError of one line."""
    try:
        yield
    except (ConfigError, ArtifactError):
        raise
    except Exception as error:  # the library and its HTTP client have their own types
        cause = advice(error) or _line(error)
        raise ArtifactError(
            f"{source} was not pushed to {target}: {cause}; run the same command to continue"
        ) from error


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split()))[:300]


def _send(source: Source, card: str, address: Address, private: bool) -> Pushed:
    """Make the repository and the branch if they are new, and commit what differs."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if cause := silence():
        raise ArtifactError(f"nothing was pushed: {cause}")
    if get_token() is None:
        raise ConfigError(f"pushing needs a token that may write: {LOGIN}")
    api, revision = HfApi(), address.revision or None
    page = str(api.create_repo(address.name, private=private or None, exist_ok=True))
    if private and not api.model_info(address.name).private:
        raise ConfigError(f"{page} exists and is public: --private is for a new repository")
    if revision is not None:
        api.create_branch(address.name, branch=revision, exist_ok=True)
    there = _hashes(api, address)
    with _folder_for_shards(source) as folder:
        contents = _contents(source, card, there, folder)
        changed = {
            name: content
            for name, content in contents.items()
            if content is not None
            and there.get(name, "") not in _possible(content, source.files.get(name, ""))
        }
        removed = sorted(name for name in there.keys() - contents.keys() if OURS.fullmatch(name))
        operations: list[Any] = [CommitOperationDelete(name) for name in removed]
        operations += [CommitOperationAdd(name, content) for name, content in changed.items()]
        if operations:
            title = f"Upload {source.folder.name} with xray {__version__}"
            api.create_commit(address.name, operations, commit_message=title, revision=revision)
    return Pushed(page, sorted(changed), removed, len(contents) - len(changed), source.base)


@contextlib.contextmanager
def _folder_for_shards(source: Source) -> Iterator[Path]:
    """Make a temporary folder in the user's cache, if weights are to be split."""
    if not source.large:
        yield source.folder
        return
    cache = user_cache("push")
    make_folder(cache, "the folder for parts of weights", "XDG_CACHE_HOME")
    with TemporaryDirectory(dir=cache) as folder:
        yield Path(folder)


def _contents(
    source: Source, card: str, there: Mapping[str, str], folder: Path
) -> dict[str, Path | bytes | None]:
    """Return the files to send by name; None for shards that are there, as their index shows.

    folder: for the shards of large weights.
    """
    contents: dict[str, Path | bytes | None] = {CARD: card.encode()}
    for name in source.files.keys() - {CARD}:
        path = source.folder / name
        if name not in source.large:
            contents[name] = path
            continue
        index, before = make_index(path), name.removesuffix(path.name)
        contents[index_name(name)] = index
        if there.get(index_name(name), "") in _possible(index, ""):
            contents |= dict.fromkeys(before + shard for shard in shards_of(index))
        else:
            own = folder / before  # files in two folders may have the same name
            own.mkdir(parents=True, exist_ok=True)
            contents |= {before + shard.name: shard for shard in split(path, own)}
    return contents


def _hashes(api: HfApi, address: Address) -> Mapping[str, str]:
    """Return the hashes of the files on the hub: sha256 of large ones, git's hash of others."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(address.name, recursive=True, revision=address.revision or None)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: str(file.lfs.sha256 if file.lfs else file.blob_id) for file in files}


def _possible(content: Path | bytes, sha256: str) -> Iterator[str]:
    """Yield the hashes that a file may have on the hub, of which git's is of small files."""
    if isinstance(content, bytes):
        yield hashlib.sha256(content).hexdigest()
    else:
        yield sha256 or sha256_file(content)
        if content.stat().st_size > GIT_LIMIT:
            return
        content = content.read_bytes()
    yield hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
