"""The stage-to-stage contract: a folder of safetensors and a manifest that verifies them.

    artifact/  backbone.safetensors  head.safetensors ...  vocabulary.json  manifest.json

The manifest holds the sha256 of every file, the resolved config, hashes of config and data, and the
parents by the hash of their manifests; nothing in an artifact is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from xray import __version__
from xray.errors import ArtifactError
from xray.files import usual_mode

SCHEMA = 1
PACKAGES = ("torch", "timm", "transformers", "deepspeed", "peft", "safetensors")


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        state = hashlib.sha256()
        while piece := file.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A verified artifact on disk."""

    path: Path
    manifest: dict[str, Any]
    digest: str  # sha256 of manifest.json

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    def load(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part; raises ArtifactError when it has none of that name."""
        if f"{part}.safetensors" not in self.manifest["files"]:
            raise ArtifactError(f"{self.path}, of stage {self.stage}, holds no {part}")
        return load_file(self.path / f"{part}.safetensors")

    def has_tensor(self, part: str, name: str) -> bool:
        """Whether a part holds a tensor."""
        return name in self.manifest["tensors"].get(part, {})


def open_artifact(path: str | Path) -> Artifact:
    """Open an artifact and verify every byte of it.

    Raises ArtifactError when it is missing, incomplete, changed, or of a newer schema.
    """
    folder = Path(path).expanduser()
    if (folder / "artifact" / "manifest.json").is_file():  # a stage's folder will do
        folder = folder / "artifact"
    try:
        content = (folder / "manifest.json").read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is no artifact: it has no manifest.json") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder}/manifest.json cannot be read: {error}") from error
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{folder} has schema {manifest.get('schema')}, this version reads {SCHEMA}"
        )
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{folder}/manifest.json names a file outside its folder: {name}")
        if not file.is_file():
            raise ArtifactError(f"{folder} is incomplete: {name} is missing")
        if sha256_file(file) != expected:
            raise ArtifactError(
                f"{file} was changed after it was written: its sha256 is not the manifest's; "
                "restore the file or run its stage again"
            )
    return Artifact(folder, manifest, hashlib.sha256(content).hexdigest())


def write_artifact(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, Any],
    facts: Mapping[str, Any],
    parents: Mapping[str, Artifact],
) -> None:
    """Write an artifact under a temporary name and rename it; never overwrites one."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, tensors in parts.items():
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        tensors_file = temporary / f"{name}.safetensors"
        with usual_mode(tensors_file):
            save_file(plain, tensors_file, metadata={"format": "pt"})
    for name, item in files.items():
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(item, Path):
            shutil.copyfile(item, target)
        else:
            item.save(target)
    manifest = {
        "schema": SCHEMA,
        **facts,
        "parents": {
            slot: {"manifest": a.digest, "stage": a.stage, "path": str(a.path.resolve())}
            for slot, a in parents.items()
        },
        "tensors": {name: dict(_describe(temporary, name)) for name in parts},
        "files": {
            str(file.relative_to(temporary)): sha256_file(file)
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        },
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    sync_tree(temporary)
    os.replace(temporary, path)


def _describe(folder: Path, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with safe_open(folder / f"{part}.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            piece = file.get_slice(name)
            yield name, {"shape": piece.get_shape(), "dtype": piece.get_dtype()}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def sync_tree(folder: Path) -> None:
    """fsync every file below a folder, so that a rename that follows cannot outrun its content."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def package_versions() -> dict[str, str]:
    found = {"xray": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str:
    """The commit of a checkout, or "" where xray runs from an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def lineage(artifact: Artifact, depth: int = 0) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """(depth, path or reason, manifest) of an artifact and its ancestors, children first.

    An ancestor that is gone or changed has no manifest, and the reason in place of the path.
    """
    yield depth, str(artifact.path), artifact.manifest
    for slot, parent in artifact.manifest["parents"].items():
        try:
            found = open_artifact(parent["path"])
            if found.digest != parent["manifest"]:
                raise ArtifactError(f"{parent['path']} is not the {slot} parent it was")
        except ArtifactError as error:
            yield depth + 1, str(error), None
        else:
            yield from lineage(found, depth + 1)
