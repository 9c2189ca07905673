"""Comparison of artifacts, from their manifests, before their weights are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from xray.artifacts.artifact import LINEAGE, Artifact
from xray.artifacts.lineage import lineage
from xray.artifacts.location import Place
from xray.artifacts.manifest_config import (
    data_config,
    decoder_config,
    head_section,
    image_side,
    joint_head,
    model_config,
    text_config,
)
from xray.artifacts.offers import DECODER, JOINT, TAGS, VISION
from xray.config.data import PREPARATION
from xray.config.identity import differences, identity
from xray.config.schedule import value_at
from xray.errors import ArtifactError, ConfigError
from xray.records import parse_record

# Settings of initial weights, training and token reduction, in which the artifacts may differ.
FREE = {
    "model": {
        *("sincos", "resize_positions", "drop_path", "reduce", "reduce_at", "fuse", "keep_rate"),
        *("keep_rates", "keep_rate_levels", "keep_rate_span", "proportional_attention"),
    },
    "text": {
        *("tune", "lora_dropout", "dtype", "bucket_by_length", "features", "precision"),
    },
}
# Of section data, beside the sizes at the end of training.
PREPROCESSING = ("mean", "std", *PREPARATION)
WEIGHTS = ".safetensors"
LLM = "llm/config.json"
SHOWN = 3  # differences that an error names


def check_mergeable(artifacts: Sequence[Artifact]) -> None:
    """Raise ConfigError or ArtifactError unless the artifacts are of one architecture.

    Stage, settings of the model and of its heads, preprocessing, vocabulary, tokenizer, LLM, and
    the tensors' names, shapes and types must be equal.
    """
    if len(artifacts) < 2:
        raise ConfigError("xray merge averages two artifacts or more: name another one")
    first, *others = artifacts
    for position, other in enumerate(others, start=1):
        if other.digest in {artifact.digest for artifact in artifacts[:position]}:
            raise ConfigError(f"{other.origin} is given twice: name it once")
        if lines := _differences(first, other):
            more = f" (and {len(lines) - SHOWN} more)" if len(lines) > SHOWN else ""
            raise ArtifactError(
                f"{other.origin} cannot be merged with {first.origin}: they are different "
                f"models; {', '.join(lines[:SHOWN])}{more}"
            )


def unrelated(artifacts: Sequence[Artifact]) -> str:
    """Return a warning if backbones have no common ancestor by their lineage, else ""."""
    if VISION not in artifacts[0].offers:
        return ""
    first, *others = map(_origins, artifacts)
    for artifact, origins in zip(artifacts[1:], others, strict=True):
        if not first & origins:
            return (
                f"{artifact.origin} and {artifacts[0].origin} have no common ancestor: means of "
                "models that were not trained from the same weights are no better than chance"
            )
    return ""


def _origins(artifact: Artifact) -> set[str]:
    """Return the hashes of an artifact, of its ancestors, and of the file it was started from."""
    links = [link for link in lineage(artifact.path) if link.slot != "text"]
    files = [str((link.manifest or {"inputs": {}})["inputs"].get("pretrained")) for link in links]
    return {link.digest for link in links} | {own for own in files if own != "None"}


def _differences(first: Artifact, other: Artifact) -> list[str]:
    """List differences that a user can understand: of settings, else of files, else of tensors."""
    for traits in (_kind, _settings, _language):
        if lines := differences(traits(first), traits(other)):
            return lines
    old, new = _files(first), _files(other)
    if changed := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
        return [f"{name} is another file" for name in changed]
    if first.manifest["inputs"].get("llm") != other.manifest["inputs"].get("llm"):
        names = [own.manifest["config"].get("text", {}).get("llm", "") for own in (first, other)]
        return [f"the LLM in {names[0]} is not that in {names[1]}"]
    return differences(_tensors(first), _tensors(other))


def _kind(artifact: Artifact) -> dict[str, Any]:
    return {"stage": artifact.stage, "offers": sorted(artifact.offers)}


def _language(artifact: Artifact) -> dict[str, Any]:
    """Return the settings of an LLM that the artifact holds; the library's version is left out."""
    if LLM not in artifact.manifest["files"]:
        return {}
    content = Place(artifact.origin).read(LLM)
    try:
        found = parse_record(content or b"{}", dict[str, Any])
    except ValueError:  # the difference is that of the file, then
        return {}
    return {"llm": {name: own for name, own in found.items() if not name.endswith("_version")}}


def _files(artifact: Artifact) -> dict[str, str]:
    """Return the hashes of all files but weights and ancestors."""
    return {
        name: digest
        for name, digest in artifact.manifest["files"].items()
        if not name.endswith(WEIGHTS) and not name.startswith(f"{LINEAGE}/")
    }


def _tensors(artifact: Artifact) -> dict[str, str]:
    return {
        f"{part}.{name}": f"{facts['dtype']} {facts['shape']}"
        for part, own in artifact.manifest["tensors"].items()
        for name, facts in own.items()
    }


def _settings(artifact: Artifact) -> dict[str, Any]:
    """Return the settings of the model, its heads and its preprocessing."""
    offers, found = artifact.offers, dict[str, Any]()
    if VISION in offers:
        data = data_config(artifact)
        found["model"] = _fixed("model", model_config(artifact))
        found["data"] = {name: getattr(data, name) for name in PREPROCESSING}
        found["data"] |= {"resolution": image_side(artifact), "frames": value_at(data.frames, 1.0)}
    if "text" in artifact.manifest["config"] and "text" in artifact.manifest["tensors"]:
        found["text"] = text = _fixed("text", text_config(artifact))
        if not text["lora_rank"]:
            text.update(lora_alpha=0, lora_targets=[])  # of no effect
    if JOINT in offers:
        found["joint"] = asdict(joint_head(artifact))
    if TAGS in offers:
        found["tags"] = {"loss": head_section(artifact, TAGS).get("loss", "softmax")}
    if DECODER in offers:
        decoder = asdict(decoder_config(artifact)).items()
        found["decoder"] = {name: value for name, value in decoder if "mask" not in name}
        found["decoder"]["rows_first"] = model_config(artifact).rows_first
    return found


def _fixed(section: str, config: Any) -> dict[str, Any]:
    values = identity(config, whole=True)
    return {name: value for name, value in values.items() if name not in FREE[section]}
