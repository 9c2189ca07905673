"""Folders of timm: config.json with an architecture, and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xray.artifacts.limits import check_numbers
from xray.config import DataConfig, ModelConfig
from xray.errors import ArtifactError, brief
from xray.imports.parts import Family, Imported, Vision, side_of
from xray.imports.source import Source

HEADS = ("head.", "head_drop.", "head_dist.")
POOLS: dict[str, Any] = {"map": "map", "avg": "mean"}


def read(source: Source, folder: Path) -> Imported:
    """Read the backbone; the classifier is left out."""
    import timm

    config = source.json("config.json")
    name, own = str(config["architecture"]), config.get("pretrained_cfg", {})
    if not timm.is_model(name):
        raise ArtifactError(f"{source}: timm has no model {name}")
    kwargs = {k: v for k, v in config.get("model_args", {}).items() if k != "img_size"}
    usual = timm.get_pretrained_cfg(name)
    given = {**(usual.to_dict() if usual is not None else {}), **own}
    interpolation: Any = given.get("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        raise ArtifactError(
            f"{source}: pretrained_cfg.interpolation={interpolation} is not supported"
        )
    state = {k: v for k, v in source.tensors().items() if not k.startswith(HEADS)}
    data = DataConfig(
        resolution=side_of(source, given.get("input_size", [3, 224, 224])[1:], state),
        mean=[*given["mean"]],
        std=[*given["std"]],
        resize="squash" if given.get("crop_mode") == "squash" else "shortest",
        interpolation=interpolation,
        crop_pct=float(given.get("crop_pct") or 1.0),
    )
    pool = kwargs.pop("global_pool", config.get("global_pool"))
    if pool is None:
        pool = _usual_pool(source, name, kwargs)
    model = ModelConfig(name=name, kwargs=kwargs, pool=POOLS.get(pool, "cls"))
    return Imported("timm", Vision(model, data, state))


def _usual_pool(source: Source, name: str, kwargs: dict[str, Any]) -> str:
    """Return timm's name of the pooling of a model whose folder does not state it."""
    import timm
    import torch

    check_numbers({"config": {"model": {"kwargs": kwargs}}}, str(source))
    try:
        with torch.device("meta"):
            return str(getattr(timm.create_model(name, **kwargs), "global_pool", ""))
    except Exception as error:  # timm raises many kinds
        raise ArtifactError(f"{source}: timm cannot build {name}: {brief(error)}") from error


FAMILY = Family("timm", lambda source: "architecture" in source.json("config.json"), read)
