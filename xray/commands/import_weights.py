"""`xray import`: released weights as an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xray import dist
from xray.commands.common import guarded
from xray.commands.help import examples


@examples(
    (
        "xray import downloads/siglip --out models/siglip",
        "a folder of open_clip, transformers, timm or sentence-transformers",
    ),
    ("xray import hf-hub:openai/clip-vit-base-patch32 --out models/clip", "a name of the hub"),
    ("xray import open_clip:ViT-B-16:openai --out models/clip", "weights by open_clip's name"),
)
@guarded
def import_weights(
    source: Annotated[
        str, typer.Argument(help="A folder or file, ORG/NAME of the hub, or open_clip:MODEL:TAG")
    ],
    out: Annotated[Path, typer.Option(metavar="ARTIFACT", help="Folder to write")],
    license_id: Annotated[
        str,
        typer.Option(
            "--license", metavar="SPDX", help="Licence of the weights (default: as SOURCE states)"
        ),
    ] = "",
) -> None:
    """Write released weights as an artifact that every command takes.

    CLIP, SigLIP, MetaCLIP and DFN become clip artifacts, ViT and DINOv2 backbones, sentence
    encoders text artifacts. Pickled weights are refused.
    """
    from xray.imports.convert import import_model

    dist.choose_device("cpu")
    artifact = import_model(source, out, license_id)
    offers = ", ".join(sorted(artifact.offers))
    print(f"artifact: {artifact.path}, stage {artifact.stage}, offers {offers}")
    licence = artifact.manifest["config"]["license"]
    print(f"licence: {licence or 'not stated: give --license before you publish it'}")
