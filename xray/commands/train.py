"""`xray run` (a recipe), `train` (one stage), `report` and `debug replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import dist
from xray.commands.common import Overrides, check_artifact, guarded
from xray.commands.help import examples
from xray.errors import ArtifactError, ConfigError
from xray.files import nearest_path

if TYPE_CHECKING:
    from xray.config import RunConfig
    from xray.recipes.recipe import Recipe


@examples(
    ("xray run quickstart", "all stages on generated data, in minutes on 2 CPU cores"),
    (
        "xray run small data.root=/data/mine text.llm=/models/llm --plan",
        "print the stages of a small model on your own shards, without training",
    ),
    ("xray run mine.yaml clip.train.samples=20000", "your own recipe, with one setting changed"),
    ("torchrun --nproc_per_node 8 -m xray run mine.yaml", "the same on 8 GPUs"),
)
@guarded
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a .yaml file")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print the stages, then stop")] = False,
) -> None:
    """Train the stages of RECIPE in order, skip the finished ones, evaluate, write a report.

    data.root may be a folder of pictures and clips or a list of them: they are packed once. With
    torchrun, all processes train and encode the data of the evaluation.
    """
    from xray.recipes.recipe import load_recipe

    given = overrides or []
    loaded = load_recipe(recipe, given)
    from xray.recipes.next_steps import next_steps
    from xray.recipes.own_data import recipe_settings
    from xray.recipes.plan_table import plan_notes, plan_table, plan_time
    from xray.recipes.report import write_run_report
    from xray.recipes.run import evaluate, join_ranks, run_recipe, sizes_at_hand

    plan_table(loaded, {})  # on every rank: it raises for models that cannot be built
    if not plan:
        join_ranks(loaded)
    as_given = loaded
    if packed := recipe_settings(loaded, write=not plan):
        loaded = load_recipe(recipe, [*given, *packed])
    sizes = sizes_at_hand(loaded) if dist.is_main() else {}
    table = plan_table(loaded, sizes)
    if dist.is_main():
        table.print()
        for note in filter(None, [plan_time(loaded, sizes), *plan_notes(loaded, sizes)]):
            print(note)
    if plan:
        return
    artifacts = run_recipe(loaded)
    results = evaluate(loaded, artifacts)
    if dist.is_main():
        if results is not None:
            results.print()
        print(f"report: {write_run_report(loaded, artifacts, results)}")
        for step in next_steps(as_given, artifacts):
            print(f"next: {step.command}  # {step.purpose}")


@dataclass(frozen=True)
class Typed:
    """Settings of a stage's run as they were typed."""

    stage: str
    recipe: str
    files: Sequence[str]  # .yaml, in order
    values: Sequence[str]  # KEY=VALUE
    model: Sequence[str]  # of --model, as a KEY=VALUE
    out: str

    def load(
        self, packed: Sequence[str], init_from: Sequence[str]
    ) -> tuple[RunConfig, Recipe | None]:
        """Load the run's validated config, and the recipe to prepare.

        packed: settings of data that were packed.
        """
        from stages import load_settings, stage_config
        from xray.config import loading as cfg

        values = [*self.values, *packed]
        overrides = cfg.parse_overrides(
            [*self.model, *values], cfg.kinds_of(stage_config(self.stage))
        )
        layers, recipe = list[Any](), None
        if self.recipe:
            from xray.recipes.recipe import stage_from_recipe

            layer, recipe = stage_from_recipe(self.stage, self.recipe, values)
            layers.append(layer)
        read = map(cfg.read_yaml, self.files)
        config = load_settings(self.stage, *layers, *read, overrides, init_from=init_from)
        config.out = self.out or config.out or f"runs/{self.stage}"
        config.validate()
        return config, recipe


@examples(
    ("xray train mae --recipe quickstart", "one stage of a recipe; writes runs/mae"),
    (
        "xray train clip --recipe quickstart --init-from runs/quickstart/mae/artifact",
        "the same with the backbone of another run",
    ),
    ("xray train clip --resume runs/clip train.samples=40000", "continue a run, and train longer"),
)
@guarded
def train(
    stage: Annotated[str, typer.Argument(help="mae, hashtag, text or clip")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE.yaml|KEY=VALUE]...", help="Config files and settings"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Take this stage's settings from a recipe")] = "",
    model: Annotated[str, typer.Option(help="A shipped model, same as model=NAME")] = "",
    init_from: Annotated[
        list[str] | None,
        typer.Option(metavar="ARTIFACT", help="An artifact, or released weights (xray import)"),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="Folder of the run (default: runs/STAGE)")
    ] = "",
    resume: Annotated[
        str, typer.Option(metavar="RUN", help="Folder of a run to continue, with its config")
    ] = "",
) -> None:
    """Train one stage. After an interruption, run the same command again: it continues."""
    from stages import check_stage, stage_class
    from xray.config.loading import shipped

    check_stage(stage)
    items = settings or []
    files = [item for item in items if item.endswith((".yaml", ".yml")) and "=" not in item]
    values = [item for item in items if item not in files]
    for item in values:
        if item in shipped("recipe"):
            raise ConfigError(f"{item} is a recipe: give it as --recipe {item}")
    if resume:
        files = [str(Path(resume) / "config.yaml"), *files]
        out = out or resume
    typed = Typed(stage, recipe, files, values, [f"model={model}"] if model else [], out)
    config, loaded = typed.load([], init_from or [])
    for path in config.init_from:
        check_artifact(path)
    device = dist.choose_device(config.train.device)
    from xray.recipes.own_data import stage_settings
    from xray.recipes.run import prepare
    from xray.training.deepspeed_setup import init_distributed
    from xray.training.trainer import train_stage

    init_distributed(device)
    if packed := stage_settings(config, loaded):
        config, loaded = typed.load(packed, config.init_from)
    if loaded is not None:
        prepare(loaded)
    artifact = train_stage(stage_class(stage), config, device)
    if dist.is_main():
        print(f"artifact: {artifact.path}")


@guarded
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a recipe's run or of a stage")
    ],
) -> None:
    """Write RUN/report.html again from the current state; RUN may still be training."""
    if not run.exists():
        raise ArtifactError(f"{run} contains no run: it does not exist{nearest_path(run)}")
    from xray.recipes.report import report_again

    print(f"report: {report_again(run)}")


@guarded
def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundles/step_...")],
    overrides: Overrides = None,
) -> None:
    """Repeat a step that was not finite, and print its loss, gradient and first broken layers."""
    if not bundle.exists():
        raise ArtifactError(f"{bundle} is not a bundle: it does not exist{nearest_path(bundle)}")
    from xray.config.loading import parse_overrides
    from xray.recipes.recipe import kind_of_key
    from xray.training.checkpoint_export import find_run
    from xray.training.deepspeed_setup import init_distributed
    from xray.training.replay import read_bundle
    from xray.training.replay import replay as again

    facts = read_bundle(bundle)
    run = find_run(bundle.resolve().parent.parent, parse_overrides(overrides or [], kind_of_key))
    device = dist.choose_device(run.config.train.device)
    init_distributed(device)
    values, broken = again(bundle, run, device)
    if not dist.is_main():
        return
    what = facts.what
    name = "grad_norm" if what == "gradient norm" else what
    was, now = facts.values.get(what), repr(values[name])
    print(f"step {facts.step + 1}, {what}: {was} then, {now} now")
    for key in sorted(k for k in values if k.endswith("/loss")):
        print(f"   {key}: {facts.values.get(key)} then, {values[key]!r} now")
    print("not finite, in this order: " + ("; ".join(broken) or "nothing"))
    for source, samples in facts.samples.items():
        keys = ", ".join(f"{s['shard']}:{s['key']}" for s in samples[:4])
        print(f"   {source}: {keys}{', ...' if len(samples) > 4 else ''} (all in bundle.json)")
    if was != now:
        print("the result differs: suspect faulty hardware, or kernels whose sums are")
        print("not deterministic (GPU)")
        raise SystemExit(1)
