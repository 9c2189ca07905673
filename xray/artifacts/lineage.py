"""Lineage of an artifact: its chain of ancestors, from the manifests that it carries."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xray.artifacts.artifact import (
    LINEAGE,
    Artifact,
    FileState,
    file_states,
    find_manifest,
    parse_manifest,
)
from xray.artifacts.location import Place
from xray.artifacts.manifest_config import read_section
from xray.artifacts.offers import IMPORTED, MIXTURE
from xray.config import DataConfig, ModelConfig, TextConfig
from xray.config.identity import differences, identity
from xray.errors import ArtifactError
from xray.urls import redact, redact_all
from xray.words import count

# State of an ancestor at the path that its child recorded. URLs are not checked; "replaced" means
# that another artifact is at that path now.
Where = Literal["found", "gone", "replaced", "url"]
COPIED = ("samples", "data_digest", "config_hash", "inputs", "metrics", "keep_rate", "seconds",
          "versions", "git_commit")  # fmt: skip
# Config sections that a child continues from its parent, and in which the two may differ.
COMPARED: dict[str, dict[str, type]] = {
    "vision": {"model": ModelConfig, "data": DataConfig},
    "text": {"text": TextConfig, "data": DataConfig},
}
Known = dict[str, dict[str, Any]]  # manifests by hash


@dataclass
class Link:
    """One artifact of a lineage.

    slot: parent slot that it fills in its child, "" for the artifact itself. manifest: None if it
    is not known. differs: settings that its child changed. files: states of the checked files.
    """

    depth: int
    slot: str
    stage: str
    digest: str
    path: str
    where: Where
    manifest: dict[str, Any] | None
    differs: list[str] = field(default_factory=list)
    files: dict[str, FileState] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """True if all files that were checked are unchanged."""
        return self.where != "replaced" and set(self.files.values()) <= {"ok"}

    @property
    def artifact(self) -> Artifact | None:
        """The artifact that the manifest describes, even if its files are missing."""
        if self.manifest is None:
            return None
        return Artifact(Path(self.path), self.manifest, self.digest, self.path)

    def facts(self) -> dict[str, Any]:
        """Return the link as JSON."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        manifest = values.pop("manifest") or {}
        values["manifest"] = values.pop("digest")
        parents = {slot: parent["manifest"] for slot, parent in manifest.get("parents", {}).items()}
        copied = {key: manifest.get(key) for key in COPIED}
        copied |= {key: manifest[key] for key in (MIXTURE, IMPORTED) if key in manifest}
        return {**values, **copied, "parents": parents, "sound": self.sound}


def lineage(path: str | Path, verify: bool = False) -> list[Link]:
    """List an artifact and its ancestors, children first; `verify` hashes their files.

    Without `verify` only manifests are read. Raises ArtifactError if there is no artifact.
    """
    place, content, manifest = find_manifest(path)
    known, damaged = _carried(place, manifest)
    where = place.where if place.remote else str(place.folder.resolve())
    digest = hashlib.sha256(content).hexdigest()
    first = Link(0, "", str(manifest["stage"]), digest, where, "found", manifest)
    first.files = damaged
    chain = [first, *_ancestors(first, known)]
    for link in chain if verify else []:
        if link.where == "found" and link.manifest is not None:
            link.files |= dict(file_states(Place(link.path), link.manifest))
    return chain


def _carried(place: Place, manifest: Mapping[str, Any]) -> tuple[Known, dict[str, FileState]]:
    """Read the ancestors' manifests in an artifact: (manifests by hash, damaged files)."""
    known: Known = {}
    damaged: dict[str, FileState] = {}
    for name in manifest["files"]:
        folder, _, file = name.partition("/")
        if folder != LINEAGE:
            continue
        content, digest = place.read(name), file.removesuffix(".json")
        if content is None:
            damaged[name] = "missing"
        elif hashlib.sha256(content).hexdigest() != digest:
            damaged[name] = "changed"
        else:
            known[digest] = parse_manifest(content, f"{place}/{name}")
    return known, damaged


def _ancestors(child: Link, known: Known) -> Iterator[Link]:
    parents = child.manifest["parents"] if child.manifest is not None else {}
    for slot, parent in parents.items():
        digest, path = str(parent["manifest"]), redact(str(parent["path"]))
        where, here = _locate(path, digest)
        if where == "found" and digest not in known:  # the child is older than carried lineages
            known |= _carried(Place(path), here)[0] | {digest: here}
        stage, manifest = str(parent["stage"]), known.get(digest)
        link = Link(child.depth + 1, slot, stage, digest, path, where, manifest)
        link.differs = _differing(link, child)
        yield link
        yield from _ancestors(link, known)


def _locate(path: str, digest: str) -> tuple[Where, dict[str, Any]]:
    """Check if an artifact is still at a path; return the result and the manifest there."""
    if Place(path).remote:
        return "url", {}
    try:
        _, content, manifest = find_manifest(path)
    except ArtifactError:
        there = (Path(path) / "manifest.json").is_file()
        return ("replaced" if there else "gone"), {}
    same = hashlib.sha256(content).hexdigest() == digest
    return ("found" if same else "replaced"), manifest


def _differing(parent: Link, child: Link) -> list[str]:
    """List `section.key: old -> new` of the compared settings that change the result."""
    if parent.artifact is None or child.artifact is None:
        return []
    old, new = parent.artifact, child.artifact
    lines = []
    for name, schema in sorted(COMPARED.get(parent.slot, {}).items()):
        if name in old.manifest["config"] and name in new.manifest["config"]:
            sections = [identity(read_section(schema, own, name)) for own in (old, new)]
            lines += differences(redact_all(sections[0]), redact_all(sections[1]), name)
    return lines


# in words ---------------------------------------------------------------------------------------

PLACES: dict[Where, str] = {
    "found": "{}",
    "url": "was at {}, which was not checked",
    "gone": "no longer at {}",
    "replaced": "no longer at {}, where another artifact is now",
}


def describe(chain: list[Link]) -> Iterator[str]:
    """Yield the lines that describe a lineage."""
    for link in chain:
        pad = "  " * link.depth
        slot = f" ({link.slot})" if link.slot else ""
        yield f"{pad}{link.stage}{slot}  {PLACES[link.where].format(link.path)}"
        for line in _about(link):
            yield f"{pad}    {line}"


def made_with(manifest: Mapping[str, Any]) -> str:
    """List the packages and the commit that an artifact was made with."""
    versions = ", ".join(f"{name} {v}" for name, v in manifest.get("versions", {}).items())
    commit = manifest.get("git_commit", "")
    return versions + (f", commit {commit[:12]}" if commit else "")


def mixed_of(manifest: Mapping[str, Any]) -> str:
    """Describe the mixture that an artifact is, "" for one that was trained."""
    mixture = manifest.get(MIXTURE)
    if mixture is None:
        return ""
    weights = ", ".join(f"{weight:.4g} of {slot}" for slot, weight in mixture["weights"].items())
    why = f" ({mixture['by']})" if mixture.get("by") else ""
    return f"mean of its parents' weights: {weights}{why}"


def imported_of(manifest: Mapping[str, Any]) -> str:
    """Describe the source of imported weights, "" for an artifact that was trained or mixed."""
    own = manifest.get(IMPORTED)
    if not isinstance(own, Mapping):
        return ""
    source = redact(str(own.get("source")))
    return f"imported from {source}, a model of {own.get('library')}; its data are not known"


def _trained_on(manifest: Mapping[str, Any]) -> str:
    data, config = (str(manifest.get(key, ""))[:12] for key in ("data_digest", "config_hash"))
    return f"{count(manifest.get('samples', 0), 'sample')} seen, data {data}, config {config}"


def _about(link: Link) -> Iterator[str]:
    yield f"manifest {link.digest}"
    manifest = link.manifest
    if manifest is None:
        yield (
            "nothing else is known: its child was written before artifacts carried their lineage, "
            "or its manifest has credentials in a URL"
        )
    else:
        yield mixed_of(manifest) or imported_of(manifest) or _trained_on(manifest)
        yield made_with(manifest)
        inputs = ", ".join(f"{name} {value[:12]}" for name, value in manifest["inputs"].items())
        if inputs:
            yield f"inputs: {inputs}"
        values = manifest.get("metrics", {})
        named = [name for name in ("loss", "val/loss") if name in values]
        if named:
            yield ", ".join(f"{name} {values[name]:.4g}" for name in named)
    for line in link.differs:
        yield f"its child changed {line if len(line) <= 120 else line[:117] + '...'}"
    for name, state in link.files.items():
        yield f"{name} {state}"
