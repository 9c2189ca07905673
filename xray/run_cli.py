"""Commands on the folder of a run: an artifact from a checkpoint, a step done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from xray import dist
from xray.command import Overrides, guarded

debug_app = typer.Typer(help="Look into a run that went wrong.", no_args_is_help=True)


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
    from xray.config_files import parse_overrides
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
    from xray.export import export_checkpoint

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
    from xray.artifact import open_artifact
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


@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A recipe's folder, or a stage's")],
) -> None:
    """Write RUN/report.html again, of what is there by now: also while it trains."""
    from xray.run_report import report_again

    print(f"report: {report_again(run)}")


@debug_app.command()
@guarded
def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundles/step_...")],
    overrides: Overrides = None,
) -> None:
    """Do a step again that was not finite: its loss, its gradient, and where they broke first."""
    from xray.bundle import read_bundle
    from xray.bundle import replay as again
    from xray.config_files import parse_overrides
    from xray.engine import init_distributed
    from xray.export import find_run

    facts = read_bundle(bundle)
    run = find_run(bundle.resolve().parent.parent, parse_overrides(overrides or []))
    device = dist.choose_device(run.config.train.device)
    init_distributed(device)
    values, broken = again(bundle, run, device)
    if not dist.is_main():
        return
    what = facts["what"]
    name = "grad_norm" if what == "gradient norm" else what
    was, now = facts["values"][what], repr(values[name])
    print(f"step {facts['step'] + 1}, {what}: {was} then, {now} now")
    for key in sorted(k for k in values if k.endswith("/loss")):
        print(f"   {key}: {facts['values'].get(key)} then, {values[key]!r} now")
    print("not finite, in this order: " + ("; ".join(broken) or "nothing"))
    for source, samples in facts["samples"].items():
        keys = ", ".join(f"{s['shard']}:{s['key']}" for s in samples[:4])
        print(f"   {source}: {keys}{', ...' if len(samples) > 4 else ''} (all in bundle.json)")
    if was != now:
        print("not the same as then: look for hardware that computes wrong, or kernels whose sums")
        print("are not ordered (a GPU)")
        raise SystemExit(1)
