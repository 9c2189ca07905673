"""`xray show`, `lineage` and `export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xray import dist
from xray.commands.common import ArtifactName, AsJson, KeepRate, Overrides, guarded
from xray.commands.help import examples


@guarded
def show(
    artifact: ArtifactName,
    files: Annotated[list[Path], typer.Argument(help="Pictures and clips")],
    out: Annotated[Path, typer.Option(help=".png or .html to write")] = Path("show.png"),
    keep_rate: KeepRate = None,
) -> None:
    """Draw the tokens that ARTIFACT keeps at each reducing block, and MAE reconstructions."""
    from xray.artifacts.artifact import open_artifact

    opened = open_artifact(artifact)
    from xray.visualize.explain import show as write

    write(opened, files, out, keep_rate)
    print(f"written: {out}")


@guarded
def lineage(
    artifact: ArtifactName,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the artifacts and data that ARTIFACT was made from; exit code 1 if any was changed."""
    from xray.artifacts.lineage import describe
    from xray.artifacts.lineage import lineage as walk

    chain = walk(artifact, verify)
    if as_json:
        print(json.dumps([link.facts() for link in chain], indent=1))
    else:
        print("\n".join(describe(chain)))
    if not all(link.sound for link in chain):
        raise SystemExit(1)


@examples(
    ("xray export runs/small/clip@400", "the artifact of the checkpoint at step 400"),
    (
        "xray export runs/small/clip --weights ema --out averaged",
        "the moving average of the weights (train.ema), at the last checkpoint",
    ),
    (
        "xray export runs/small/clip/artifact --to timm --out exports/timm",
        'a folder for timm.create_model("local-dir:exports/timm", pretrained=True)',
    ),
    (
        "xray export runs/small/clip/artifact --to onnx --keep-rate 0.7",
        "ONNX files in onnx_export, with reduced tokens",
    ),
)
@guarded
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|ARTIFACT",
            help="Without --to: a stage's folder, with @400, @best or @last for a checkpoint; "
            "with --to: an artifact, folder or URL",
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="Convert ARTIFACT to timm, open_clip, transformers, onnx or safetensors",
        ),
    ] = "",
    out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Folder to write (default: RUN/artifact_STEP; with --to: FORMAT_export)",
        ),
    ] = "",
    weights: Annotated[
        str, typer.Option(help="Weights of RUN: last, or ema (the moving average of train.ema)")
    ] = "last",
    keep_rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="For --to onnx: replaces the artifact's own"),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="For --to onnx: frames per clip, 1 for images")
    ] = 1,
) -> None:
    """Write an artifact from a checkpoint of RUN; with --to, convert ARTIFACT for another library.

    With --to, the folder contains a model card (README.md), and the converted model is compared
    with the original before it is kept.
    """
    from xray.config.loading import parse_overrides
    from xray.errors import ConfigError
    from xray.recipes.recipe import kind_of_key

    given = parse_overrides(overrides or [], kind_of_key)
    if to:
        if weights != "last":
            raise ConfigError(
                "--weights is for RUN, not for --to: export an artifact first, then convert it"
            )
        _convert(source, to, Path(out or f"{to}_export"), given, keep_rate, frames)
        return
    if keep_rate is not None or frames != 1:
        raise ConfigError("--keep-rate and --frames are for --to onnx")
    if weights not in ("last", "ema"):
        raise ConfigError(f"--weights {weights}: use last or ema")
    _export_checkpoint(source, out, "ema" if weights == "ema" else "last", given)


def split_run(text: str) -> tuple[str, str]:
    """Split RUN@STEP into (folder, step); an @ before the last / belongs to the path."""
    folder, at, which = text.rpartition("@")
    return (folder, which or "last") if at and "/" not in which else (text, "last")


def _export_checkpoint(
    source: str, out: str, weights: Literal["last", "ema"], given: dict[str, Any]
) -> None:
    """Write the artifact of a checkpoint, RUN@STEP, to a folder, by default one in the run's."""
    from xray.config.loading import stored_config

    folder, which = split_run(source)
    stored_config(Path(folder))  # raises for a folder that is no run, before torch is imported
    from xray.training.checkpoint_export import export_checkpoint

    target = out or f"{folder.rstrip('/')}/artifact_{which}{'_ema' if weights == 'ema' else ''}"
    artifact = export_checkpoint(Path(folder), which, Path(target), weights, given)
    print(f"artifact: {artifact.path}, step {artifact.manifest['step']}")


def _convert(
    source: str, form: str, out: Path, given: dict[str, Any], keep_rate: float | None, frames: int
) -> None:
    from xray.artifacts.artifact import open_artifact
    from xray.errors import ArtifactError, ConfigError
    from xray.exports.formats import check_format

    check_format(form, keep_rate, frames)
    text = given.get("text", {})
    if given.keys() - {"text"} or not isinstance(text, dict) or text.keys() - {"llm"}:
        raise ConfigError("with --to, the only setting is text.llm=, the folder of the LLM now")
    folder, _ = split_run(source)
    if folder != source and (Path(folder) / "config.yaml").is_file():
        raise ArtifactError(f"{source} is a checkpoint: export an artifact first, without --to")
    artifact = open_artifact(source, text.get("llm", ""))
    from xray.exports.convert import convert

    dist.choose_device("cpu")
    export = convert(artifact, form, out, keep_rate, frames)
    print(f"{form}: {out}, described in {out}/README.md")
    for name, value in export.differences.items():
        print(f"   {name}: differs from the original by at most {value:.2g}")
    for note in export.notes:
        print(f"   {note}")
