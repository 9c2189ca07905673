"""The command line. Torch and all that needs it is imported inside commands: help stays fast."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xray import (  # noqa: F401 - the clis add their commands
    __version__,
    curation_cli,
    dist,
    offline_cli,
    tags_cli,
)
from xray.ablate_cli import ablate
from xray.command import Overrides, guarded
from xray.data_cli import data_app
from xray.doctor_cli import doctor
from xray.embed_cli import embed, search
from xray.eval_cli import evaluate, evaluated
from xray.plan_cli import plan
from xray.run_cli import debug_app, export, report

if TYPE_CHECKING:
    from xray.artifact import Artifact
    from xray.recipe import Recipe

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whatever a library asks for, torch.load takes tensors alone; torch refuses to obey both.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

ArtifactName = Annotated[str, typer.Argument(help="An artifact: a folder, or a URL")]

app = typer.Typer(
    name="xray",
    help="One vision backbone through MAE, hashtags and CLIP with an LLM, on DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(debug_app, name="debug")
app.command()(guarded(doctor))
app.command()(guarded(plan))
app.command()(guarded(ablate))


def main() -> None:
    """Run a command; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    dist.setup_environment()
    # deepspeed's launcher says it twice: in the environment too
    sys.argv = [item for item in sys.argv if not item.startswith("--local_rank=")]
    logging.getLogger("xray").setLevel(logging.INFO if dist.is_main() else logging.ERROR)
    app()


@app.command()
@guarded
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a .yaml file")],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would run, then stop")] = False,
) -> None:
    """Train the stages of RECIPE in order, skip the finished ones, evaluate, write a report."""
    from xray.plan import plan_table
    from xray.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    table = plan_table(loaded)  # on every rank: it raises for what cannot be built
    if dist.is_main():
        table.print()
    if plan:
        return
    from xray.recipe import run_recipe

    artifacts = run_recipe(loaded)
    if dist.is_main():
        _finish(loaded, artifacts)


@app.command()
@guarded
def train(
    stage: Annotated[str, typer.Argument(help="mae, hashtag, text or clip")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE.yaml|KEY=VALUE]...", help="Config files and settings"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Take this stage's settings from a recipe")] = "",
    model: Annotated[str, typer.Option(help="A shipped model, as model=NAME")] = "",
    init_from: Annotated[list[str] | None, typer.Option(help="An artifact: folder or URL")] = None,
    out: Annotated[str, typer.Option(help="The run's folder (default: runs/STAGE)")] = "",
    resume: Annotated[str, typer.Option(help="Go on with a run's folder, with its config")] = "",
) -> None:
    """Train one stage; the same command again goes on where it stopped."""
    from stages import stage_class
    from xray import config_files as cfg

    stage_type = stage_class(stage)
    items = settings or []
    files = [item for item in items if item.endswith((".yaml", ".yml")) and "=" not in item]
    values = [item for item in items if item not in files]
    overrides = cfg.parse_overrides(([f"model={model}"] if model else []) + values)
    if resume:
        files = [str(Path(resume) / "config.yaml"), *files]
        out = out or resume
    layers: list[Any] = []
    loaded = None
    if recipe:
        from xray.recipe import stage_from_recipe

        layer, loaded = stage_from_recipe(stage, recipe, values)
        layers.append(layer)
    config = cfg.load_config(
        stage_type.Config, stage, *layers, *map(cfg.read_yaml, files), overrides
    )
    config.out = out or config.out or f"runs/{stage}"
    config.init_from = init_from or config.init_from
    config.validate()
    device = dist.choose_device(config.train.device)
    from xray.engine import init_distributed
    from xray.recipe import prepare
    from xray.trainer import Trainer

    init_distributed(device)
    if loaded is not None:
        prepare(loaded)
    trainer = Trainer(stage_type, config, device)
    artifact = trainer.finished() or trainer.fit()
    if dist.is_main():
        print(f"artifact: {artifact.path}")


app.command("eval")(evaluate)


@app.command()
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
    from xray.artifact import open_artifact
    from xray.show import show as write

    write(open_artifact(artifact), files, out, keep_rate)
    print(f"written: {out}")


@app.command()
@guarded
def lineage(
    artifact: ArtifactName,
    verify: Annotated[bool, typer.Option("--verify", help="Re-hash every file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Show what ARTIFACT was made from; exit code 1 where something of it was changed."""
    from xray.lineage import lineage as walk
    from xray.lineage import told

    chain = walk(artifact, verify)
    if as_json:
        print(json.dumps([link.facts() for link in chain], indent=1))
    else:
        print("\n".join(told(chain)))
    if not all(link.sound for link in chain):
        raise SystemExit(1)


app.command()(export)
app.command()(embed)
app.command()(search)
app.command()(report)


@app.command("config")
@guarded
def show_config(
    name: Annotated[str, typer.Argument(help="A recipe, a stage, or eval")],
    overrides: Overrides = None,
) -> None:
    """Print the resolved config of a stage, of an evaluation, or of all that a recipe has."""
    from omegaconf import OmegaConf

    from stages import STAGES, stage_class
    from xray import config_files as cfg
    from xray.evaluation.config import EvalConfig
    from xray.hashing import to_dict

    given = cfg.parse_overrides(overrides or [])
    sections: dict[str, Any]
    if name in STAGES:
        sections = {name: cfg.load_config(stage_class(name).Config, name, given)}
    elif name == "eval":
        sections = {"eval": cfg.build(EvalConfig, given.get("eval", {}), section="eval.")}
    else:
        from xray.recipe import load_recipe

        recipe = load_recipe(name, overrides or [])
        sections = {config.stage: config for config in recipe.runs} | {"eval": recipe.eval}
    for key, section in sections.items():
        print(OmegaConf.to_yaml(OmegaConf.create({key: to_dict(section)})), end="")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def _finish(recipe: Recipe, artifacts: list[Artifact]) -> None:
    """Evaluate the artifacts that can be, print the table, write results.json and report.html."""
    from xray.evaluation.table import result_table
    from xray.report import ResultTable
    from xray.run_report import write_run_report

    table: ResultTable | None = None
    asked = recipe.eval.in_recipe([artifact.stage for artifact in artifacts])
    results: dict[str, dict[str, float]] = {}
    for artifact in artifacts:
        if suites := asked[artifact.stage]:
            results |= evaluated(artifact, recipe.eval, recipe.root, recipe.workers, suites)
    if results:
        table = result_table(results)
        (recipe.out / "results.json").write_text(json.dumps(results, indent=1))
        table.print()
    path = write_run_report(recipe, artifacts, table)
    print(f"report: {path}")
