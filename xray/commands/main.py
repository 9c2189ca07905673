"""Command line; help stays fast, because only commands import torch and what needs it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping

import typer

from xray import dist
from xray.commands.ablate import ablate
from xray.commands.artifacts import export, lineage, show
from xray.commands.common import command_class
from xray.commands.config import show_config, version
from xray.commands.data import (
    data_check,
    data_demo,
    data_index,
    data_pack,
    data_stats,
    data_tiny_llm,
)
from xray.commands.data_curate import data_curate, data_metadata
from xray.commands.data_precompute import (
    data_embeddings,
    data_pseudo_tags,
    data_scores,
    data_text_features,
)
from xray.commands.data_tags import data_tags
from xray.commands.doctor import doctor
from xray.commands.embed import embed, search
from xray.commands.evaluate import evaluate
from xray.commands.plan import plan
from xray.commands.runs import replay, report
from xray.commands.train import run, train

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# torch.load accepts only tensors, even if a library asks for more. torch refuses both settings
# together, so the second one is removed.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)

Commands = Mapping[str, Callable[..., None]]
# In the order of the help. Each is @guarded where it is defined.
COMMANDS: Commands = {
    "doctor": doctor,
    "plan": plan,
    "ablate": ablate,
    "run": run,
    "train": train,
    "eval": evaluate,
    "show": show,
    "lineage": lineage,
    "export": export,
    "embed": embed,
    "search": search,
    "report": report,
    "config": show_config,
    "version": version,
}
DATA: Commands = {
    "demo": data_demo,
    "index": data_index,
    "pack": data_pack,
    "check": data_check,
    "stats": data_stats,
    "tiny-llm": data_tiny_llm,
    "metadata": data_metadata,
    "curate": data_curate,
    "pseudo-tags": data_pseudo_tags,
    "embeddings": data_embeddings,
    "scores": data_scores,
    "text-features": data_text_features,
    "tags": data_tags,
}
DEBUG: Commands = {"replay": replay}


def _group(help_text: str, commands: Commands, name: str | None = None) -> typer.Typer:
    group = typer.Typer(
        name=name,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for word, command in commands.items():
        group.command(word, cls=command_class(command))(command)
    return group


app = _group(
    "One vision backbone through MAE, hashtags and CLIP with an LLM, on DeepSpeed.",
    COMMANDS,
    "xray",
)
app.add_typer(_group("Make and inspect data.", DATA), name="data")
app.add_typer(_group("Inspect a run that failed.", DEBUG), name="debug")


def main() -> None:
    """Run a command; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    dist.setup_environment()
    # deepspeed's launcher passes it twice: in the environment too
    sys.argv = [item for item in sys.argv if not item.startswith("--local_rank=")]
    logging.getLogger("xray").setLevel(logging.INFO if dist.is_main() else logging.ERROR)
    app()
