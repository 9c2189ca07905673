"""`xray report` and `xray debug replay`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xray import dist
from xray.commands.common import Overrides, guarded


@guarded
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a recipe's run or of a stage")
    ],
) -> None:
    """Write RUN/report.html again from the current state; RUN may still be training."""
    from xray.recipes.report import report_again

    print(f"report: {report_again(run)}")


@guarded
def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundles/step_...")],
    overrides: Overrides = None,
) -> None:
    """Repeat a step that was not finite, and print its loss, gradient and first broken layers."""
    from xray.config.loading import parse_overrides
    from xray.training.checkpoint_export import find_run
    from xray.training.engine import init_distributed
    from xray.training.replay import read_bundle
    from xray.training.replay import replay as again

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
        print("the result differs: suspect faulty hardware, or kernels whose sums are")
        print("not deterministic (GPU)")
        raise SystemExit(1)
