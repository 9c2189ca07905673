"""`xray import SOURCE --out ARTIFACT`: read released weights and write them as an artifact."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from xray.artifacts.artifact import Artifact, open_artifact, write_artifact
from xray.artifacts.limits import check_numbers
from xray.artifacts.model_card import artifact_card
from xray.artifacts.offers import IMPORTED, JOINT, SENTENCES, VISION
from xray.config import DataConfig
from xray.config.data import validate_data
from xray.config.identity import hash_json
from xray.errors import ArtifactError, ConfigError
from xray.files import making
from xray.imports import clip, dinov3, mae, open_clip, sentences, siglip, timm, vit
from xray.imports.parts import STEM, Family, Imported, State, Vision, check_fit
from xray.imports.source import Source, open_source
from xray.models.backbone import VisionBackbone
from xray.models.heads import image_head, text_head
from xray.models.llm_folder import llm_digest
from xray.models.patch_embed import inflate

# The first that fits reads the folder. To add a family: its file, and a line here.
FAMILIES: tuple[Family, ...] = (
    mae.FAMILY,
    open_clip.FAMILY,
    timm.FAMILY,
    clip.FAMILY,
    siglip.FAMILY,
    vit.FAMILY,
    dinov3.FAMILY,
    sentences.FAMILY,
)
ALONE = ("logit_scale", "logit_bias")
LARGEST_SCALE = 100.0  # that training lets the logit scale reach, unless the weights exceed it


def import_model(name: str, out: Path, license_id: str = "") -> Artifact:
    """Write the artifact of released weights; on failure nothing is left.

    name: a folder, or a name of the hub or of open_clip. license_id: instead of the one that the
    source states. Raises ConfigError for a name that cannot be found, ArtifactError for a model
    that ours cannot represent.
    """
    with making(out):
        if out.exists():
            raise ArtifactError(f"{out} already exists: choose another --out, or delete it")
        import_source(open_source(name), out, license_id)
    return open_artifact(out)


def import_source(source: Source, out: Path, license_id: str = "") -> None:
    """Write the artifact of an opened source; hold the lock of `making` on `out`."""
    with TemporaryDirectory() as folder:
        imported = family_of(source).read(source, Path(folder))
        _write(imported, source, out, license_id or source.license)


def family_of(source: Source) -> Family:
    """Find the family of a folder; raises ArtifactError if there is none."""
    for family in FAMILIES:
        if family.fits(source):
            return family
    source.check_weights()
    kind = f"model_type {source.kind}" if source.kind else "no config that is known"
    raise ArtifactError(
        f"{source} cannot be imported ({kind}): families are "
        f"{', '.join(family.name for family in FAMILIES)}"
    )


def _write(imported: Imported, source: Source, out: Path, license_id: str) -> None:
    config: dict[str, Any] = {"license": license_id, "data": asdict(DataConfig())}
    parts: dict[str, State] = {}
    files: dict[str, Path] = {}
    offers, hashes = list[str](), source.hashes
    inputs = {"weights": hash_json(hashes)}
    if imported.vision is not None:
        vision = decided(imported.vision)
        parts["backbone"] = inflated(source, vision)
        config |= {"model": asdict(vision.model), "data": asdict(vision.data)}
        offers.append(VISION)
    if imported.text is not None:
        text = imported.text
        parts["text"], config["text"] = text.state, asdict(text.config)
        inputs["llm"] = llm_digest(text.folder)
        found = [path for path in sorted(text.folder.rglob("*")) if path.is_file()]
        files = {f"llm/{path.relative_to(text.folder)}": path for path in found}
        offers.append(SENTENCES)
    if imported.joint is not None:
        config["clip"], parts["head"] = joint_space(source, imported)
        offers = [JOINT, VISION]
    stage = "clip" if imported.joint is not None else "text" if imported.text else "vision"
    where = source.folder.resolve().name if source.name == str(source.folder) else source.name
    facts = {
        "stage": stage,
        "offers": offers,
        "heads": {},
        "summary": f"Imported from {where}, a model of {imported.library}.",
        IMPORTED: {"source": source.name, "library": imported.library, "files": hashes},
        "config": {"stage": stage, **config},
        "config_hash": hash_json(config),
        "data_digest": hash_json({}),
        "sources": {},
        "inputs": inputs,
        "keep_rate": 1.0,
        "weights": "last",
        "step": 0,
        "samples": 0,
        "seconds": 0.0,
        "bad_samples": 0,
        "metrics": {},
    }
    write_artifact(out, parts, files, facts, {}, artifact_card)


def decided(vision: Vision) -> Vision:
    """Return a backbone with the settings that no source states.

    Of weights that have seen images only, each frame of a clip is encoded alone.
    """
    video = vision.model.video if vision.clips else "frames"
    return replace(vision, model=replace(vision.model, sincos="columns", video=video))


def inflated(source: Source, vision: Vision) -> State:
    """Return the backbone's weights with a stem for clips; ArtifactError if they do not fit."""
    state = dict(vision.state)
    if STEM in state and not vision.clips:
        state[STEM] = inflate(state[STEM], vision.model.tubelet)
    config = {"model": asdict(vision.model), "data": asdict(vision.data)}
    check_numbers({"config": config}, str(source))
    try:
        validate_data(vision.data)
        with torch.device("meta"):
            backbone = VisionBackbone(vision.model, vision.data.resolution, vision.data.frames)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    check_fit(source, "the image tower", backbone, state, vision.theirs)
    return state


def joint_space(source: Source, imported: Imported) -> tuple[dict[str, Any], State]:
    """Return section `clip` and the heads; raises ArtifactError if they do not fit the towers."""
    head, own = dict(imported.head), imported.joint
    assert own is not None and imported.vision is not None and imported.text is not None
    width = len(imported.vision.state[STEM])
    text_width = imported.text.state["llm.embeddings.token_embedding.weight"].shape[1]
    size, bias = own.embed_dim, own.head_bias
    try:
        with torch.device("meta"):
            image = image_head(own.image_head, width, size, bias)
            heads = {"vision_projection": image}
            heads["text_adapter"] = text_head("linear", text_width, size, 0, bias)
    except ConfigError as error:
        raise ArtifactError(f"{source}: {error}") from error
    scalars = {name: head[name] for name in ALONE if name in head}
    if "logit_scale" not in scalars:
        raise ArtifactError(f"{source} has no logit_scale")
    weights = {name: value for name, value in head.items() if name not in scalars}
    check_fit(source, "the joint space", nn.ModuleDict(heads), weights, imported.theirs)
    scale = float(scalars["logit_scale"].exp())
    section = {
        **asdict(own),
        "loss": "sigmoid" if "logit_bias" in head else "info_nce",
        "logit_scale_max": max(LARGEST_SCALE, math.ceil(scale)),
    }
    return section, head
