"""Commands on the folder of a run: an artifact from a checkpoint, a step done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from xray import dist
from xray.command import Overrides, guarded

debug_app = typer.Typer(help="Look into a run that went wrong.", no_args_is_help=True)


@guarded
def export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN[@STEP]", help="A stage's folder; @400, @best or @last"),
    ],
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The artifact's folder [RUN/artifact_STEP]")] = "",
    weights: Annotated[
        str, typer.Option(help="last, or ema: the moving average that train.ema kept")
    ] = "last",
) -> None:
    """Write an artifact from any checkpoint of RUN, as the stage's end writes one."""
    from xray.config_files import parse_overrides
    from xray.errors import ConfigError
    from xray.export import export_checkpoint

    if weights not in ("last", "ema"):
        raise ConfigError(f"--weights {weights}: it is last or ema")
    chosen: Literal["last", "ema"] = "ema" if weights == "ema" else "last"
    folder, which = split_run(run)
    target = out or f"{folder.rstrip('/')}/artifact_{which}{'_ema' if chosen == 'ema' else ''}"
    given = parse_overrides(overrides or [])
    artifact = export_checkpoint(Path(folder), which, Path(target), chosen, given)
    print(f"artifact: {artifact.path}, step {artifact.manifest['step']}")


def split_run(text: str) -> tuple[str, str]:
    """RUN@STEP as (folder, step); an @ before the last / is the path's."""
    folder, at, which = text.rpartition("@")
    return (folder, which or "last") if at and "/" not in which else (text, "last")


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
