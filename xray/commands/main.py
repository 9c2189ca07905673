"""Command line; help stays fast, because only commands import torch and what needs it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from xray import __version__, dist, processes
from xray.commands import artifacts, data, data_curate, data_precompute, embed, train
from xray.commands.ablate import ablate
from xray.commands.compare import compare
from xray.commands.doctor import doctor
from xray.commands.evaluate import evaluate
from xray.commands.help import HELP, Command, Group
from xray.commands.import_weights import import_weights
from xray.commands.init import init
from xray.commands.merge import merge
from xray.commands.plan import plan, show_config
from xray.commands.plan import version as show_version
from xray.commands.push import push
from xray.urls import RedactingFormatter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.load accepts only tensors, even if a library asks for more. torch refuses both settings
# together, so the second one is removed.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

Commands = Mapping[str, Callable[..., None]]
# In the order of the help. Each is @guarded where it is defined.
COMMANDS: Commands = {
    "doctor": doctor,
    "init": init,
    "plan": plan,
    "ablate": ablate,
    "run": train.run,
    "train": train.train,
    "eval": evaluate,
    "compare": compare,
    "show": artifacts.show,
    "lineage": artifacts.lineage,
    "export": artifacts.export,
    "import": import_weights,
    "push": push,
    "merge": merge,
    "embed": embed.embed,
    "search": embed.search,
    "report": train.report,
    "config": show_config,
    "version": show_version,
}
DATA: Commands = {
    "demo": data.data_demo,
    "index": data.data_index,
    "pack": data.data_pack,
    "split": data.data_split,
    "check": data.data_check,
    "stats": data.data_stats,
    "clean": data.data_clean,
    "tiny-llm": data.data_tiny_llm,
    "metadata": data_curate.data_metadata,
    "curate": data_curate.data_curate,
    "pseudo-tags": data_precompute.data_pseudo_tags,
    "embeddings": data_precompute.data_embeddings,
    "scores": data_precompute.data_scores,
    "text-features": data_precompute.data_text_features,
    "tags": data_curate.data_tags,
}
DEBUG: Commands = {"replay": train.replay}


def _group(name: str, help_text: str, commands: Commands) -> typer.Typer:
    group = typer.Typer(
        name=name,
        cls=Group,
        help=help_text,
        no_args_is_help=True,
        context_settings=HELP,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for word, command in commands.items():
        group.command(word, cls=Command, context_settings=HELP)(command)
    return group


TITLE = "Train one vision backbone with MAE, hashtags, and CLIP with an LLM, on DeepSpeed."
app = _group("xray", TITLE, COMMANDS)
app.add_typer(_group("data", "Make and inspect data.", DATA))
app.add_typer(_group("debug", "Inspect a run that failed.", DEBUG))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Take the options of `xray` without a command."""


def main() -> None:
    """Run a command; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(RedactingFormatter("%(message)s"))
    dist.setup_environment()
    if dist.launcher() in ("torchrun", "deepspeed"):
        processes.die_with(os.getppid())
    # deepspeed's launcher passes it twice: in the environment too
    sys.argv = [item for item in sys.argv if not item.startswith("--local_rank=")]
    logging.getLogger("xray").setLevel(logging.INFO if dist.is_main() else logging.ERROR)
    app(prog_name="xray")
