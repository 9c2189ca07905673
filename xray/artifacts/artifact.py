"""Artifacts, the result of a stage: a folder of safetensors and a manifest that verifies them.

    artifact/  backbone.safetensors  head.safetensors ...  vocabulary.json  manifest.json
               lineage/HASH.json ...  README.md

The manifest holds the sha256 of every file, the resolved config, hashes of config and data, and the
parents by the hash of their manifests. These are copied to lineage/ with those of all ancestors.
Nothing is pickled, and an artifact can be moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from data_pipelines.shards.remote import is_remote
from data_pipelines.shards.side_files import user_cache
from xray import processes
from xray.artifacts.limits import check_numbers
from xray.artifacts.location import Place
from xray.artifacts.offers import offers_are_sound, offers_of
from xray.errors import ArtifactError, NoArtifactError, brief
from xray.files import (
    is_inside,
    locked,
    make_folder,
    nearest_path,
    replacing,
    sha256_file,
    sync_tree,
    usual_mode,
)
from xray.hub import is_hub
from xray.records import parse_record
from xray.urls import conceal, redact
from xray.version import __version__

if TYPE_CHECKING:  # torch is imported by the functions that need it: opening does not
    from torch import Tensor

log = logging.getLogger("xray")
SCHEMA = 1
PACKAGES = ("torch", "timm", "transformers", "deepspeed", "peft", "safetensors")
NAMED = 8  # artifacts of a folder that an error names
LINEAGE = "lineage"  # the folder of the ancestors' manifests
SECTIONS = ("config", "inputs", "parents", "tensors", "files")  # objects in a manifest
FileState = Literal["ok", "changed", "missing", "unnamed"]
COMPLAINTS = {
    "missing": "is missing: the artifact is incomplete",
    "unnamed": "is not listed in the artifact's manifest: remove it",
    "changed": "was changed after it was written: its sha256 is not the manifest's; restore the "
    "file or run its stage again",
}


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk."""

    path: Path
    manifest: dict[str, Any]
    digest: str  # sha256 of manifest.json
    origin: str  # the URL it was fetched from, or its folder's full path
    llm: str = ""  # folder of the base LLM, if it has moved since training

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def offers(self) -> frozenset[str]:
        """Capabilities, by the names of xray.artifacts.offers."""
        return offers_of(self.manifest)

    def load(self, part: str) -> dict[str, Tensor]:
        """Load the tensors of a part; raises ArtifactError if there is no such part."""
        from safetensors.torch import load_file

        path = self.file(f"{part}.safetensors")
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ArtifactError(
                f"{path} is not a readable safetensors file: {brief(error)}"
            ) from error

    def file(self, name: str) -> Path:
        """Return the path of a file; raises ArtifactError if the manifest does not list it."""
        if name not in self.manifest["files"]:
            what = name.removesuffix(".safetensors")
            raise ArtifactError(f"{self.path}, of stage {self.stage}, contains no {what}")
        return self.path / name

    def has_tensor(self, part: str, name: str) -> bool:
        """Check if a part has a tensor."""
        return name in self.manifest["tensors"].get(part, {})


def open_artifact(path: str | Path, llm: str = "") -> Artifact:
    """Open an artifact in a folder or at a URL, and verify every byte of it.

    An artifact at a URL is downloaded into the user's cache, once per host. llm: folder of the base
    LLM, if it has moved. Raises ArtifactError for an artifact that is missing, incomplete, changed
    or of a newer schema.
    """
    place, content, manifest = find_manifest(path)
    digest = hashlib.sha256(content).hexdigest()
    if not place.remote:
        check_files(place, manifest)
        return Artifact(place.folder, manifest, digest, str(place.folder.resolve()), llm)
    folder = user_cache("artifacts") / digest
    try:
        check_files(Place(str(folder)), manifest)
    except ArtifactError:  # not there yet, or damaged
        make_folder(folder.parent, "the cache of artifacts", "XDG_CACHE_HOME")
        with locked(folder.with_suffix(".lock")):
            _fetch(place, folder, manifest, content)
    return Artifact(folder, manifest, digest, place.where, llm)


def find_manifest(path: str | Path) -> tuple[Place, bytes, dict[str, Any]]:
    """Find an artifact and read its manifest: (place, bytes, content); no other file is read.

    Raises NoArtifactError if there is none, ArtifactError for one that this version cannot read.
    """
    url = conceal(str(path))
    base = url.rstrip("/") if is_remote(url) else str(Path(os.path.expanduser(path)))
    for place in (Place(base), Place(f"{base}/artifact")):  # a stage's folder is accepted
        try:
            content = place.read("manifest.json")
        except OSError as error:
            cause = redact(str(error))
            raise ArtifactError(f"{place}/manifest.json cannot be read: {cause}") from error
        if content is not None:
            return place, content, parse_manifest(content, f"{place}/manifest.json")
    raise NoArtifactError(f"{base} is not an artifact: {_what_it_is(base)}")


def _what_it_is(base: str) -> str:
    """Describe a place without a manifest: a missing folder, a run, or a folder of artifacts."""
    folder, quoted, none = Path(base), shlex.quote(base), "it has no manifest.json"
    if is_remote(base):
        return f"{none}; xray import {quoted} reads released weights" if is_hub(base) else none
    if not folder.exists():
        return f"there is no such folder{nearest_path(folder)}"
    if (folder / "config.yaml").is_file():
        return f"its run has not finished; xray export {quoted}@last makes one from a checkpoint"
    patterns = ("*/manifest.json", "*/artifact/manifest.json", "*/*/artifact/manifest.json")
    found = {path.parent for pattern in patterns for path in folder.glob(pattern)}
    names = sorted(str(path.parent if path.name == "artifact" else path) for path in found)
    return f"give one of those inside: {', '.join(names[:NAMED])}" if names else none


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Parse a manifest.

    Raises ArtifactError if it is damaged, has a number out of bounds or names a file outside.
    """
    try:
        manifest = parse_record(content, dict[str, Any])
    except ValueError as error:
        raise ArtifactError(f"{where} cannot be read: {brief(error)}") from error
    if manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema")
        raise ArtifactError(f"{where} has schema {schema}, this version reads {SCHEMA}")
    for section in SECTIONS:
        if not isinstance(manifest.get(section), dict):
            raise ArtifactError(f"{where} is damaged: it has no {section}")
    if not offers_are_sound(manifest):
        raise ArtifactError(
            f"{where} is damaged: its offers, heads, summary or mixture cannot be read"
        )
    for parent in manifest["parents"].values():
        if not isinstance(parent, dict) or not parent.keys() >= {"manifest", "stage", "path"}:
            raise ArtifactError(f"{where} is damaged: its parents have no manifest, stage or path")
    for name in manifest["files"]:
        if not is_inside(name):
            raise ArtifactError(f"{where} names a file outside its folder: {name}")
    check_numbers(manifest, where)
    return manifest


def file_states(place: Place, manifest: Mapping[str, Any]) -> Iterator[tuple[str, FileState]]:
    """Hash every file of an artifact again and yield its name and state."""
    for name, expected in manifest["files"].items():
        actual = place.sha256(name)
        yield name, "missing" if actual is None else "ok" if actual == expected else "changed"
    for name in place.unnamed(list(manifest["files"])):
        yield name, "unnamed"


def check_files(place: Place, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError for the first file that differs from the manifest."""
    for name, state in file_states(place, manifest):
        if state != "ok":
            raise ArtifactError(f"{place}/{name} {COMPLAINTS[state]}")


def _fetch(place: Place, folder: Path, manifest: Mapping[str, Any], content: bytes) -> None:
    """Download the files of a URL's artifact that the cache folder lacks."""
    known = Place(str(folder))
    for name, expected in manifest["files"].items():
        if known.sha256(name) == expected:
            continue
        actual = place.fetch(name, folder / name)
        if actual != expected:
            (folder / name).unlink(missing_ok=True)
            state = "missing" if actual is None else "changed"
            raise ArtifactError(f"{place}/{name} {COMPLAINTS[state]}")
    for name in known.unnamed(list(manifest["files"])):
        (folder / name).unlink()
    (folder / "manifest.json").write_bytes(content)


def write_artifact(
    path: Path,
    parts: Mapping[str, Any],
    files: Mapping[str, Any],
    facts: Mapping[str, Any],
    parents: Mapping[str, Artifact],
    card: Callable[[Path], str],
) -> None:
    """Write an artifact under a temporary name and rename it; never overwrites one.

    parts: the tensors of each by name, or an object with `save(path)`. files: paths, or such
    objects. card: makes the text of README.md from the folder. The manifest has no hash of it, so
    people may edit it. Raises ArtifactError if the artifact cannot be written, and removes what was
    written.
    """
    with _whole_or_none(path) as temporary:
        _fill(temporary, parts, files)
        for parent in parents.values():
            _hand_on(parent, temporary / LINEAGE)
        manifest = {
            "schema": SCHEMA,
            **facts,
            "parents": {
                slot: {"manifest": a.digest, "stage": a.stage, "path": a.origin}
                for slot, a in parents.items()
            },
            "tensors": {name: _describe(temporary, name) for name in parts},
            "files": {
                str(file.relative_to(temporary)): sha256_file(file)
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            },
            "versions": package_versions(),
            "git_commit": git_commit(),
        }
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        (temporary / "README.md").write_text(card(temporary), "utf-8")
        sync_tree(temporary)


@contextlib.contextmanager
def _whole_or_none(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end; raises ArtifactError if it cannot."""
    try:
        with replacing(path) as temporary:
            temporary.mkdir(parents=True)
            yield temporary
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"artifact {path} cannot be written: {brief(error)}; run the same command to try again"
        ) from error


def _fill(temporary: Path, parts: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        target = temporary / f"{name}.safetensors"
        if isinstance(part, Mapping):
            save_tensors(target, part)
        else:
            part.save(target)
    for name, item in files.items():
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(item, Path):
            shutil.copyfile(item, target)
        else:
            item.save(target)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file as torch does, readable by all users."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with usual_mode(path):
        save_file(plain, path, metadata={"format": "pt"})


def _hand_on(parent: Artifact, folder: Path) -> None:
    """Copy the manifests of a parent and of its ancestors, each named by its hash.

    One with credentials, which earlier versions wrote, is left out: redacted, it would have another
    hash.
    """
    folder.mkdir(exist_ok=True)
    copies = {parent.path / "manifest.json": f"{parent.digest}.json"}
    for name in parent.manifest["files"]:
        if name.startswith(f"{LINEAGE}/"):
            copies[parent.path / name] = Path(name).name
    for path, name in copies.items():
        text = path.read_text("utf-8", "surrogateescape")
        if redact(text) == text:
            shutil.copyfile(path, folder / name)
        else:
            log.warning("%s has credentials in a URL: change them; it is not copied", path)


def _describe(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    with safe_open(folder / f"{part}.safetensors", framework="pt") as file:
        pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {n: {"shape": p.get_shape(), "dtype": p.get_dtype()} for n, p in pieces.items()}


def package_versions() -> dict[str, str]:
    """Return the versions of xray, Python and the libraries that affect results."""
    versions = {"xray": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def git_commit() -> str:
    """Return the commit of the checkout, or "" if xray runs from an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    return processes.run(command).stdout.strip()  # empty without git on this machine
