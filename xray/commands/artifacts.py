"""Commands about artifacts: show, lineage, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xray import dist
from xray.commands.common import ArtifactName, Overrides, guarded


@guarded
def show(
    artifact: ArtifactName,
    files: Annotated[list[Path], typer.Argument(help="Pictures and clips")],
    out: Annotated[Path, typer.Option(help="Where to write: .png or .html")] = Path("show.png"),
    keep_rate: Annotated[
        float | None, typer.Option(min=0.01, max=1.0, help="Instead of the artifact's own")
    ] = None,
) -> None:
    """Draw what ARTIFACT sees: tokens kept at each reducing block, MAE reconstructions."""
    from xray.artifacts.artifact import open_artifact
    from xray.visualize.explain import show as write

    write(open_artifact(artifact), files, out, keep_rate)
    print(f"written: {out}")


@guarded
def lineage(
    artifact: ArtifactName,
    verify: Annotated[bool, typer.Option("--verify", help="Re-hash every file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show what ARTIFACT was made from; exit code 1 where something of it was changed."""
    from xray.artifacts.lineage import lineage as walk
    from xray.artifacts.lineage import told

    chain = walk(artifact, verify)
    if as_json:
        print(json.dumps([link.facts() for link in chain], indent=1))
    else:
        print("\n".join(told(chain)))
    if not all(link.sound for link in chain):
        raise SystemExit(1)


@guarded
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]|ARTIFACT",
            help="Without --to a stage's folder, its checkpoint @400, @best or @last; with --to an "
            "artifact: a folder or a URL",
        ),
    ],
    overrides: Overrides = None,
    to: Annotated[
        str, typer.Option(help="timm, open_clip, onnx or safetensors: convert ARTIFACT")
    ] = "",
    out: Annotated[
        str, typer.Option(help="The folder to write (RUN/artifact_STEP; with --to FORMAT_export)")
    ] = "",
    weights: Annotated[
        str,
        typer.Option(help="Of a run: last, or ema, the moving average that train.ema kept"),
    ] = "last",
    keep_rate: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Of --to onnx, instead of the artifact's own"),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Of --to onnx: 1 for images, more for clips of so many")
    ] = 1,
) -> None:
    """Write an artifact from a checkpoint of RUN; with --to, convert ARTIFACT for another library.

    xray export runs/a/clip@400 writes the artifact that the stage would have ended with there.
    xray export runs/a/clip/artifact --to timm writes a folder that timm.create_model loads, with a
    model card (README.md). What is written is compared with the original before it is kept.
    """
    from xray.config.loading import parse_overrides
    from xray.errors import ConfigError

    given = parse_overrides(overrides or [])
    if to:
        if weights != "last":
            raise ConfigError(
                "--weights chooses of a run: leave out --to, convert what that writes"
            )
        _convert(source, to, Path(out or f"{to}_export"), given, keep_rate, frames)
        return
    if keep_rate is not None or frames != 1:
        raise ConfigError("--keep-rate and --frames are for --to onnx")
    if weights not in ("last", "ema"):
        raise ConfigError(f"--weights {weights}: it is last or ema")
    from xray.training.checkpoint_export import export_checkpoint

    chosen: Literal["last", "ema"] = "ema" if weights == "ema" else "last"
    folder, which = split_run(source)
    target = out or f"{folder.rstrip('/')}/artifact_{which}{'_ema' if chosen == 'ema' else ''}"
    artifact = export_checkpoint(Path(folder), which, Path(target), chosen, given)
    print(f"artifact: {artifact.path}, step {artifact.manifest['step']}")


def split_run(text: str) -> tuple[str, str]:
    """RUN@STEP as (folder, step); an @ before the last / is the path's."""
    folder, at, which = text.rpartition("@")
    return (folder, which or "last") if at and "/" not in which else (text, "last")


def _convert(
    source: str, form: str, out: Path, given: dict[str, Any], keep_rate: float | None, frames: int
) -> None:
    from xray.artifacts.artifact import open_artifact
    from xray.errors import ArtifactError, ConfigError
    from xray.exports.convert import convert

    text = given.get("text", {})
    if given.keys() - {"text"} or not isinstance(text, dict) or text.keys() - {"llm"}:
        raise ConfigError("with --to the only setting is text.llm=, where the LLM lies now")
    folder, _ = split_run(source)
    if folder != source and (Path(folder) / "config.yaml").is_file():
        raise ArtifactError(f"{source} is a checkpoint: make an artifact of it first, without --to")
    dist.choose_device("cpu")
    artifact = open_artifact(source, text.get("llm", ""))
    export = convert(artifact, form, out, keep_rate, frames)
    print(f"{form}: {out}, described in {out}/README.md")
    for name, value in export.differences.items():
        print(f"   {name}: differ from the original by at most {value:.2g}")
    for note in export.notes:
        print(f"   {note}")
