"""The artifact of a mixture."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xray.artifacts.artifact import LINEAGE, Artifact, open_artifact, write_artifact
from xray.artifacts.model_card import artifact_card
from xray.artifacts.offers import IMPORTED, MIXTURE
from xray.config.identity import hash_json
from xray.merging.mixtures import Mixture
from xray.merging.parts import MixedPart

COPIED = ("stage", "offers", "heads", "summary", "keep_rate")


def write_mixture(
    path: Path, artifacts: Sequence[Artifact], mixture: Mixture, chosen: Mapping[str, Any]
) -> Artifact:
    """Write the artifact of a mixture; its parents are the artifacts of a weight above 0.

    The settings and files are those of the first of them. chosen: how the mixture was chosen, for
    the manifest. Raises ArtifactError as `write_artifact`.
    """
    members = {position: artifacts[position] for position in mixture.members}
    weighted = [(artifact, mixture.weights[position]) for position, artifact in members.items()]
    first = weighted[0][0]
    parts = {name: MixedPart(name, weighted) for name in first.manifest["tensors"]}
    slots = {f"member {position + 1}": artifact for position, artifact in members.items()}
    weights = {f"member {position + 1}": mixture.weights[position] for position in members}
    config = _config([artifact for artifact, _ in weighted], parts)
    facts = {
        **{key: first.manifest[key] for key in COPIED if key in first.manifest},
        "config": config,
        "config_hash": hash_json(config),
        "data_digest": hash_json({}),
        "sources": {},
        "inputs": _common([artifact.manifest["inputs"] for artifact, _ in weighted]),
        **{"step": 0, "samples": 0, "seconds": 0.0, "metrics": {}},
        MIXTURE: {"weights": weights, **chosen},
    }
    if IMPORTED in first.manifest:  # its summary says from where
        facts.pop("summary", None)
    files = {
        name: first.path / name
        for name in first.manifest["files"]
        if not name.startswith(f"{LINEAGE}/") and name.removesuffix(".safetensors") not in parts
    }
    write_artifact(path, parts, files, facts, slots, artifact_card)
    return open_artifact(path, first.llm)


def _config(members: Sequence[Artifact], parts: Mapping[str, MixedPart]) -> dict[str, Any]:
    """Return the config of the first artifact, without what only a run has."""
    config: dict[str, Any] = copy.deepcopy(members[0].manifest["config"])
    if isinstance(config.get("data"), dict):
        config["data"] |= {"sources": {}, "blocks": [], "validation": []}
    licences = {str(artifact.manifest["config"].get("license", "")) for artifact in members}
    config |= {"init_from": [], "out": "", "license": licences.pop() if len(licences) == 1 else ""}
    if "text" in parts and parts["text"].ranks > 1:
        for key in ("lora_rank", "lora_alpha"):  # their quotient, LoRA's scale, stays
            config["text"][key] *= parts["text"].ranks
    return config


def _common(inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the inputs that all artifacts have, such as the hash of the LLM."""
    first, *others = inputs
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }
