"""Commands on the folder of a run: an artifact from a checkpoint, a step done again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xray import dist
from xray.commands.common import Overrides, guarded


@guarded
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A recipe's folder, or a stage's")],
) -> None:
    """Write RUN/report.html again, of what is there by now: also while it trains."""
    from xray.recipes.report import report_again

    print(f"report: {report_again(run)}")


@guarded
def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundles/step_...")],
    overrides: Overrides = None,
) -> None:
    """Do a step again that was not finite: its loss, its gradient, and where they broke first."""
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
        print("not the same as then: look for hardware that computes wrong, or kernels whose sums")
        print("are not ordered (a GPU)")
        raise SystemExit(1)
