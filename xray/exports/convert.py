"""`xray export ARTIFACT --to FORMAT`: convert, compare with our model, and write a card."""

from __future__ import annotations

from pathlib import Path

from xray.artifacts.artifact import Artifact
from xray.artifacts.lineage import lineage
from xray.artifacts.model_card import card
from xray.errors import ArtifactError
from xray.exports.common import Export
from xray.exports.formats import check_format
from xray.exports.to_onnx import to_onnx
from xray.exports.to_open_clip import to_open_clip
from xray.exports.to_safetensors import to_safetensors
from xray.exports.to_timm import to_timm
from xray.exports.to_transformers import to_transformers
from xray.files import making, replacing, sync_tree
from xray.models.token_reduction import KeepRate

TOLERANCE = 1e-5  # of normalised features: fp32 rounding by another order of sums


def convert(
    artifact: Artifact, form: str, out: Path, keep_rate: KeepRate | None = None, frames: int = 1
) -> Export:
    """Write an artifact in another library's format; on failure nothing is left.

    keep_rate, frames: fixed in an ONNX graph, not used by other formats. Raises ConfigError for
    impossible options, ArtifactError for a model that the format cannot represent exactly.
    """
    check_format(form, keep_rate, frames)
    with making(out):
        if out.exists():
            raise ArtifactError(f"{out} already exists: choose another --out, or delete it")
        with replacing(out) as temporary:
            return _write(artifact, form, temporary, keep_rate, frames)


def _write(
    artifact: Artifact, form: str, folder: Path, keep_rate: KeepRate | None, frames: int
) -> Export:
    folder.mkdir(parents=True)
    if form == "onnx":
        export = to_onnx(artifact, folder, keep_rate, frames)
    else:
        writers = {
            "timm": to_timm,
            "open_clip": to_open_clip,
            "transformers": to_transformers,
            "safetensors": to_safetensors,
        }
        export = writers[form](artifact, folder)
    rate = artifact.manifest["keep_rate"]
    if form in ("timm", "open_clip", "transformers") and rate != 1.0:
        export.notes.append(
            f"Every token is kept here. The artifact's own keep rate is {rate}, which "
            "gives other features: xray.load(ARTIFACT, keep_rate=1.0) gives the export's."
        )
    _check(artifact, form, export)
    (folder / "README.md").write_text(export_card(artifact, export), "utf-8")
    sync_tree(folder)
    return export


def _check(artifact: Artifact, form: str, export: Export) -> None:
    """Raise ArtifactError for a difference that is above the tolerance or not a number."""
    for name, value in export.differences.items():
        if not value <= TOLERANCE:
            raise ArtifactError(
                f"{artifact.origin} exported --to {form} differs in its {name} by {value:.2g}, "
                f"more than {TOLERANCE:.0e}; nothing was written"
            )


def export_card(artifact: Artifact, export: Export) -> str:
    """Write the card of an export: the comparison, then the artifact's own card."""
    rows = [f"| {name} | {value:.2g} |" for name, value in export.differences.items()]
    told = "Largest absolute difference of unit-length features to those of the xray model"
    compared = ["## Compared with the original", "", f"{told} (refused beyond {TOLERANCE:.0e}):"]
    compared += ["", "| output | difference |", "| --- | --- |", *rows, ""]
    for note in export.notes:
        compared += [note, ""]
    title = f"{artifact.stage} model, exported by xray to {export.library}"
    return card(lineage(artifact.path), export.library, title, export.code, compared)
