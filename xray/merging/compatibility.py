"""Comparison of artifacts, from their manifests, before their weights are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xray.artifacts.artifact import LINEAGE, Artifact
from xray.artifacts.lineage import lineage
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
        for old, new in zip(_traits(first), _traits(other), strict=True):
            lines = differences(old, new)
            if lines:
                more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
                raise ArtifactError(
                    f"{other.origin} cannot be merged with {first.origin}: they are different "
                    f"models; {lines[0]}{more}"
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


def _traits(artifact: Artifact) -> list[dict[str, Any]]:
    """Return what must be equal, in the order in which a difference is told."""
    manifest = artifact.manifest
    files = {
        name: digest[:12]
        for name, digest in manifest["files"].items()
        if not name.endswith(WEIGHTS) and not name.startswith(f"{LINEAGE}/")
    }
    tensors = {
        f"{part}.{name}": f"{facts['dtype']} {facts['shape']}"
        for part, own in manifest["tensors"].items()
        for name, facts in own.items()
    }
    llm = {"llm": str(manifest["inputs"].get("llm", ""))[:12]}
    kind: list[dict[str, Any]] = [{"stage": artifact.stage}, {"offers": sorted(artifact.offers)}]
    config = {"config": dict(_settings(artifact))}
    return [*kind, {"inputs": llm}, config, {"files": files}, {"tensors": tensors}]


def _settings(artifact: Artifact) -> Mapping[str, Any]:
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
